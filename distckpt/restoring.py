"""One restore, whole: the leader proposes a checkpoint, every rank opens it, lays it beside the state and reads it
into that; all agree, or go on to the one before it.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from distckpt import layout
from distckpt.catalog import is_passing, read_manifest, refuse_newer, scan
from distckpt.errors import DamagedCheckpoint, NewerVersion, NoCheckpoint, StateMismatch, by_rank
from distckpt.formats import Format, Opened, Snapshot
from distckpt.manifest import Record, digest
from distckpt.ranks import Json, Ranks, first_of_each, from_leader, is_among, to_leader, together
from distckpt.stores import Store

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger("distckpt")

_MIXED = " The state is not what it was: something of {} was read into it before that turned out to be damaged."


class Fitted(Protocol):
    """A checkpoint that was laid beside the state, and fits."""

    @property
    def targets(self) -> Sequence[tuple[Tensor, Tensor]]:
        """What is to be read, and where it goes; see `distckpt.formats.Opened.fill`."""
        ...

    @property
    def unplaced(self) -> Sequence[str]:
        """What of the checkpoint has no place on this rank. Others may have one for it: those of another pipeline
        stage."""
        ...

    @property
    def is_fit(self) -> bool:
        """Whether `judge` would raise nothing, were there nothing unplaced."""
        ...

    def judge(self, unplaced: Collection[str]) -> None:
        """It is known that no rank has a place for these.

        Raises:
            StateMismatch: where the checkpoint does not fit, of that or of anything else.
        """
        ...

    def apply(self) -> None:
        """The state is the checkpoint's. To be called once the targets are filled, on all ranks."""
        ...


F = TypeVar("F", bound=Fitted)


@dataclass(frozen=True)
class Restored(Generic[F]):
    """What was restored: the checkpoint's record, how it fitted, and which newer ones were passed over."""

    record: Record
    fitted: F
    skipped: tuple[str, ...] = ()


def restore_newest(
    ranks: Ranks,
    fit: Callable[[Snapshot, Record], F],
    *,
    store: Store,
    get_format: Callable[[str], Format],
    parts: Collection[str] | None = None,
    name: str | None = None,
) -> Restored[F] | None:
    """The state is that of the newest checkpoint that verifies on every rank; ``None`` where nothing was ever
    committed. Collective.

    It is read straight into the tensors that ``fit`` chose, each byte checked on the way; all else is put in after
    that. A checkpoint that is damaged for any rank is named in a warning, left for inspection, and the one before it
    is taken, which replaces what was read of it.

    Args:
        fit: lays a checkpoint beside the state, and changes nothing.
        parts: only these parts of the state.
        name: only this checkpoint, whatever else is there.

    Raises:
        NoCheckpoint: on every rank, where none of the candidates verifies. Never a silent fresh start.
        NewerVersion: on every rank, where a newer distckpt wrote one.
        StateMismatch: on every rank, where ``fit`` raises it on any.
        RankFailure: on every rank, where one failed otherwise.
        Where something was read into the state by then, each of them says so.
    """
    with _uncollected():
        return _restore_newest(ranks, fit, store, get_format, parts, name)


def _restore_newest(
    ranks: Ranks,
    fit: Callable[[Snapshot, Record], F],
    store: Store,
    get_format: Callable[[str], Format],
    parts: Collection[str] | None,
    name: str | None,
) -> Restored[F] | None:
    skipped: list[str] = []
    mixed = ""
    for text in from_leader(ranks, "choice of a checkpoint", lambda: _candidates(store, name)):
        one = _Candidate(Record.from_json(text.encode(), "record"), store, get_format, ranks.rank, parts, fit)
        is_sound = _is_sound(ranks, one.name, f"look into {one.name}", one.open)
        if is_sound:
            _match(ranks, one, mixed)
            during = f"read of {one.name}, of which the state holds a part now,"
            is_sound = _is_sound(ranks, one.name, during, one.fill)
            mixed = _MIXED.format(one.name)
        if is_sound:
            to_leader(ranks, f"load of {one.name}", one.apply)
            return Restored(one.record, one.fitted, tuple(skipped))
        skipped.append(one.name)
    if skipped:
        raise NoCheckpoint(
            f"{store.url}: none of the committed checkpoints can be read ({', '.join(skipped)}). They are left as "
            f"they are; to start from nothing, use another directory.{mixed}"
        )
    return None


@contextmanager
def _uncollected() -> Iterator[None]:
    """Python does not look for garbage. It would while objects are made for thousands of tensors, none of which is
    garbage, again and again through all that the program holds: half of the time of such a restore."""
    is_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_on:
            gc.enable()


def _candidates(store: Store, name: str | None) -> Json:
    listing = scan(store)
    if name is not None:
        for record in listing.records:
            if record.name == name:
                return [record.to_json().decode()]
        if name in listing.unreadable:
            raise listing.unreadable[name]
        known = ", ".join(record.name for record in listing.records) or "none"
        raise NoCheckpoint(f"{store.url}: {ascii(name)[:120]} is not committed there; committed: {known}")
    refuse_newer(listing)
    for damaged, error in listing.unreadable.items():
        _log.warning("%s is passed over: %s", damaged, error)
    if listing.unreadable and not listing.records:
        raise NoCheckpoint(
            f"{store.url}: no record there can be read: {'; '.join(map(str, listing.unreadable.values()))}"
        )
    if not listing.records:
        _log.info("%s: nothing is committed there, so training starts at step 0", store.url)
    return [record.to_json().decode() for record in reversed(listing.records)]


def _match(ranks: Ranks, one: _Candidate[F], mixed: str) -> None:
    try:
        one.fitted = fit_together(ranks, f"match of {one.name} with the state", one.fit)
    except StateMismatch as error:
        raise StateMismatch(f"{error}{mixed}") from error


def fit_together(ranks: Ranks, during: str, fit: Callable[[], F]) -> F:
    """What ``fit`` returned on this rank; all ranks know that it fits. Collective. Where all is placed, they agree
    once.

    Raises:
        StateMismatch: on every rank, where it does not fit one, or none has a place for something.
        RankFailure: on every rank, where one failed otherwise.
    """
    found: list[F] = []

    def look() -> Json:
        found.append(fit())
        return [found[0].is_fit, digest("\n".join(found[0].unplaced).encode()) if found[0].unplaced else ""]

    tellers = together(ranks, during, look, _tellers)
    (fitted,) = found
    if tellers is not None:
        tells = is_among(ranks.rank, tellers)
        nowhere = set(together(ranks, during, lambda: [*fitted.unplaced] if tells else None, _in_all))
        to_leader(ranks, during, lambda: fitted.judge(nowhere))
    return fitted


def _tellers(told: list[Json]) -> Json:
    """Who says what has no place there: of those that would say the same, one, as ranks of one stage are many; nobody,
    where all has a place on some rank. ``None`` where all ranks fit."""
    digests = [of for _, of in told]
    if not any(digests) and all(is_fit for is_fit, _ in told):
        return None
    return first_of_each(digests) if all(digests) else []


def _in_all(told: list[Json]) -> list[str]:
    """The names that all said who said any."""
    names = [one for one in told if one]
    return sorted(set(names[0]).intersection(*names[1:])) if names else []


def _is_sound(ranks: Ranks, name: str, during: str, work: Callable[[], None]) -> bool:
    """Whether no rank finds the checkpoint damaged. That is a result, and no exception; the leader says what it is."""
    faults: list[str] = []

    def has_none(told: list[Json]) -> bool:
        faults.extend(told)
        return not any(told)

    def fault() -> str:
        try:
            work()
        except NewerVersion:
            raise
        except (DamagedCheckpoint, OSError, EOFError) as error:
            if not isinstance(error, DamagedCheckpoint) and is_passing(error):
                raise
            return f"{type(error).__name__}: {error}"
        return ""

    is_sound = bool(together(ranks, during, fault, has_none))
    if any(faults):
        told = by_rank({rank: fault for rank, fault in enumerate(faults) if fault})
        _log.warning("%s is damaged and passed over; it is left for inspection. %s", name, told)
    return is_sound


class _Candidate(Generic[F]):
    """One checkpoint on its way into the state of one rank."""

    fitted: F
    _opened: Opened

    def __init__(
        self,
        record: Record,
        store: Store,
        get_format: Callable[[str], Format],
        rank: int,
        parts: Collection[str] | None,
        fit: Callable[[Snapshot, Record], F],
    ) -> None:
        self.record = record
        self.name = record.name
        self._store = store
        self._get_format = get_format
        self._rank = rank
        self._parts = parts
        self._fit = fit

    def open(self) -> None:
        record = self.record
        manifest = read_manifest(self._store, record)
        if layout.StepName.parse(record.name) and manifest.progress != record.progress:
            raise DamagedCheckpoint(f"{record.name}: its manifest is of step {manifest.progress.step}")
        read = self._get_format(record.format)
        self._opened = read.open(self._store, record.name, manifest, self._rank, self._parts)

    def fit(self) -> F:
        return self._fit(self._opened.snapshot, self.record)

    def fill(self) -> None:
        self._opened.fill(self.fitted.targets)

    def apply(self) -> None:
        self.fitted.apply()
