"""How far a data loader is in its data, for loaders that cannot tell by themselves."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset

from distckpt import rng

_MOST_AHEAD = 64  # batches that a framework may have fetched before training sees them


class Stateful(Protocol):
    """What tells by itself how far it is."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class LoaderPosition:
    """A part of a state: how many batches training has seen of a ``DataLoader``, and by which random numbers they came.
    Each rank has its own.

    After `load_state_dict` the next iteration of the loader goes on behind the last batch that was seen, in the order
    that the loader drew then; it reads none of those before, but for an ``IterableDataset``. The random numbers that
    this draws, and those that fetching ahead does, are drawn as they were then, and training's go on as they would
    have. Not so those of random transforms inside of worker processes: these begin anew.

    Attributes:
        running: the iterator that the loader gave out last, if it did.

    Args:
        loader: it goes on as it is, and counts from now on. One position for each.
        ahead: how many of the batches that were fetched training has not seen, as a loop that asks whether there is one
            more has fetched it; ``None`` where it has seen all of the epoch. Without, it has seen what was fetched.
        epoch: the number of the epoch that is beginning, where somebody else counts them.
        inner: what tells by itself how far it is: then nothing is skipped here.
        looks_ahead: whether ``ahead`` may be more than 0; costs a look at the random numbers before each batch.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        ahead: Callable[[], int | None] | None = None,
        epoch: Callable[[], int] | None = None,
        inner: Stateful | None = None,
        looks_ahead: bool = True,
    ) -> None:
        self._loader = loader
        self._ahead = ahead
        self._is_watched = ahead is not None and looks_ahead
        self._begun = 0
        self._epoch = epoch if epoch is not None else lambda: self._begun
        self._inner = inner
        self.running: _Counted | None = None
        self._resumed: Mapping[str, Any] | None = None
        previous = getattr(loader._get_iterator, "__self__", None)
        self._make: Callable[[], Any] = getattr(previous, "_make", loader._get_iterator)
        loader.__dict__["_get_iterator"] = self._iterator  # what DataLoader.__iter__ asks for one
        if getattr(
            loader, "_initial_iter_for_state_dict", False
        ):  # a StatefulDataLoader that was asked has one already
            loader.load_state_dict({})  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """``epoch``, whether it ``is_begun``, and how many ``batches`` of it were seen. ``start`` and ``fetched``: the
        random numbers that it began with, and those that each batch was fetched with that was not seen."""
        if self._resumed is not None:
            return dict(self._resumed)  # nobody has iterated since
        told: dict[str, Any] = {} if self._inner is None else {"inner": self._inner.state_dict()}
        running = self.running
        ahead = self._unseen(running) if running is not None else None
        if running is None or ahead is None:
            epoch = self._epoch() if running is None else running.epoch + 1
            start = {"own": self._own_states(), "is_new": running is None or not self._loader.persistent_workers}
            return told | {"epoch": epoch, "is_begun": False, "start": start}
        told |= {"epoch": running.epoch, "is_begun": True, "batches": max(running.count - ahead, 0)}
        fetched = list(running.before)[-ahead:] if ahead else []
        return told | {"start": running.start, "first": running.first, "fetched": fetched}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See the class."""
        self._loader._iterator = None
        if not state["is_begun"] and not state["start"]["is_new"]:  # workers lived on, and had not to be seeded again
            kept = rng.capture(host_only=True)
            self._loader._iterator = self._iterator()  # type: ignore[assignment]  # it has all that one has
            rng.apply(kept)
        self.running = None
        self._set_own_states(state["start"]["own"])
        self._resumed = state if state["is_begun"] else None
        self._begun = state["epoch"] + state["is_begun"]
        if self._inner is not None and "inner" in state:
            self._inner.load_state_dict(dict(state["inner"]))

    def skip(self, batches: int) -> None:
        """As `load_state_dict`, where nothing is known but how many batches of the epoch were seen."""
        start = {**self.numbers(), "is_new": True}
        told = {"epoch": self._epoch(), "is_begun": True, "batches": batches}
        self.load_state_dict(told | {"start": start, "first": None, "fetched": []})

    def begin(self, *, is_new: bool = True) -> tuple[dict[str, Any], int]:
        """What the order of an epoch is drawn from that begins now, and its number.

        Args:
            is_new: whether an iterator is made for it, which draws, too.
        """
        start, epoch = {**self.numbers(), "is_new": is_new}, self._epoch()
        self._begun = epoch + 1
        return start, epoch

    def numbers(self) -> dict[str, Any]:
        """What the loader would draw from now."""
        return {**rng.capture(host_only=True), "own": self._own_states()}

    def _unseen(self, running: _Counted) -> int | None:
        """How many of the batches that were fetched training has not seen; ``None`` where it has seen all."""
        if self._ahead is not None:
            return self._ahead()
        is_sized = not isinstance(self._loader.dataset, IterableDataset)
        return None if running.is_exhausted or (is_sized and running.count == len(self._loader)) else 0

    def _iterator(self) -> _Counted:
        """In the place of ``DataLoader._get_iterator``."""
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            start, epoch = self.begin()
            self.running = _Counted(self, self._make(), start, epoch, is_watched=self._is_watched)
            return self.running
        start = resumed["start"]
        kept = rng.capture(host_only=True)
        self._draw_as(start)
        try:
            made = self._make() if "inner" in resumed else self._behind(resumed["batches"], start, resumed["first"])
        finally:
            rng.apply(kept)
        self.running = _Counted(self, made, start, resumed["epoch"], is_watched=self._is_watched)
        self.running.count, self.running.first = resumed["batches"], resumed["first"]
        self.running.replayed.extend(resumed["fetched"])
        return self.running

    def _behind(self, count: int, start: Mapping[str, Any], first: Mapping[str, Any] | None) -> Any:
        """An iterator that has so many batches behind it."""
        if isinstance(self._loader.dataset, IterableDataset):
            made = self._make()
            if first is not None:
                self._draw_as(first)
            for _ in islice(made, count):
                pass
            return made
        name = "batch_sampler" if self._loader.batch_sampler is not None else "sampler"
        whole = getattr(self._loader, name)
        # Without workers the order is drawn when the first batch is asked for, and others may have drawn since.
        drawn = first if not self._loader.num_workers else None if start["is_new"] else start
        behind = _Behind(whole, count, (lambda: None) if drawn is None else lambda: self._draw_as(drawn))
        self._loader.__dict__[name] = behind  # a loader refuses to be given another
        try:
            made = self._make()
        finally:
            self._loader.__dict__[name] = whole
        behind.catch_up()
        return made

    def _draw_as(self, start: Mapping[str, Any]) -> None:
        rng.apply(start)
        self._set_own_states(start["own"])

    def _own_states(self) -> dict[str, bytes]:
        generators = {place: getattr(one, "generator", None) for place, one in self._holders().items()}
        return {
            place: one.get_state().numpy().tobytes()
            for place, one in generators.items()
            if isinstance(one, torch.Generator)
        }

    def _set_own_states(self, states: Mapping[str, bytes]) -> None:
        holders = self._holders()
        for place, told in states.items():
            if holders[place].generator is None:  # some samplers make theirs when they are iterated over first
                holders[place].generator = torch.Generator()
            holders[place].generator.set_state(torch.frombuffer(bytearray(told), dtype=torch.uint8))

    def _holders(self) -> dict[str, Any]:
        """What may have a generator of its own, the loader and its samplers, by where they are."""
        found: dict[str, Any] = {"loader": self._loader}
        places = [*found]
        for place in places:
            for name in ("batch_sampler", "sampler"):
                if (sampler := getattr(found[place], name, None)) is not None:
                    found[f"{place}.{name}"] = sampler
                    places.append(f"{place}.{name}")
        return found


class _Counted:
    """An iterator of a loader, which counts.

    Attributes:
        start, epoch: what it began with.
        first: the random numbers that its first batch was fetched with; ``None`` before.
        count: how many batches it gave, with those that lay behind it from its start.
        before: the random numbers that each of the last was fetched with.
        replayed: those that the next ones are to be fetched with.
    """

    def __init__(
        self, position: LoaderPosition, iterator: Any, start: Mapping[str, Any], epoch: int, *, is_watched: bool
    ) -> None:
        self._position = position
        self._iterator = iterator
        self._is_watched = is_watched
        self.start, self.epoch = start, epoch
        self.first: Mapping[str, Any] | None = None
        self.count = 0
        self.is_exhausted = False
        self.before: deque[Mapping[str, Any]] = deque(maxlen=_MOST_AHEAD)
        self.replayed: deque[Mapping[str, Any]] = deque()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.first is None:
            self.first = self._position.numbers()
        if not self.replayed:
            if self._is_watched:
                self.before.append(rng.capture(host_only=True))
            return self._fetch()
        kept = rng.capture(host_only=True)
        self.before.append(self.replayed.popleft())
        rng.apply(self.before[-1])
        try:
            return self._fetch()
        finally:
            rng.apply(kept)

    def __len__(self) -> int:
        return len(self._iterator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)

    def _fetch(self) -> Any:
        try:
            batch = next(self._iterator)
        except StopIteration:
            self.is_exhausted = True
            if self.before:
                self.before.pop()  # no batch was fetched with these
            raise
        self.count += 1
        return batch

    def _reset(self, loader: Any) -> None:
        """Workers that live on begin another epoch."""
        self._position.running = self
        self.start, self.epoch = self._position.begin(is_new=False)
        self._iterator._reset(loader)
        self.count, self.is_exhausted, self.first = 0, False, None
        self.before.clear()


class _Behind:
    """A sampler that has, the first time that it is asked for one, so many of its indexes behind it, drawn after
    ``prepare``."""

    def __init__(self, sampler: Any, count: int, prepare: Callable[[], object]) -> None:
        self._sampler = sampler
        self._count = count
        self._prepare = prepare
        self._indexes: Iterator[Any] = iter(())

    def catch_up(self) -> None:
        """They were drawn. Not sooner, or an iterator would not have drawn by then what comes before."""
        if self._count:
            self._prepare()
        for _ in range(self._count):
            next(self._indexes, None)
        self._count = 0

    def __iter__(self) -> Iterator[Any]:
        self._indexes = iter(self._sampler)
        return self

    def __next__(self) -> Any:
        self.catch_up()
        return next(self._indexes)

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)
