"""A training whose tensors are large enough to be copied late, and saves of it by the engine alone."""

from __future__ import annotations

import copy
import ctypes
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from flows import read_now
from torch import Tensor, nn

from distckpt.engine.snapshot import Staging
from distckpt.engine.stager import Stager
from distckpt.formats import Format, Snapshot, Written
from distckpt.formats.full import FORMAT
from distckpt.manifest import Manifest
from distckpt.progress import Progress
from distckpt.stores.local import LocalStore

WIDTH = 160  # squared, in float32, that is 100 KiB: more than what is small

MIB = 1024 * 1024

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def adam(parameters: Iterable[nn.Parameter], **words: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, **words)


class Training:
    """Has taken its first step, so that the optimizer has moments and is known to whoever listens to steps."""

    def __init__(self, make: Make = adam, model: nn.Module | None = None, batch: Tensor | None = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(WIDTH, WIDTH, bias=False) if model is None else model
        self.optimizer = make(self.model.parameters())
        self.batch = torch.randn(2, WIDTH) if batch is None else batch
        self.step()

    def backward(self) -> Tensor:
        loss: Tensor = self.model(self.batch).square().mean()
        loss.backward()
        return loss

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        return self.backward()

    def step(self) -> None:
        self.closure()
        self.optimizer.step(self.closure) if isinstance(self.optimizer, torch.optim.LBFGS) else self.optimizer.step()

    @property
    def weight(self) -> nn.Parameter:
        """The largest parameter."""
        return max(self.model.parameters(), key=Tensor.numel)

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def state_of(value: float, mebibytes: int = 3) -> dict[str, Any]:
    """A part of so many MB, and each number of it says whose it is."""
    return {"model": {str(nth): torch.full((MIB // 4,), float(value + nth)) for nth in range(mebibytes)}}


class Save:
    """A save of ``state``, taken and staged on this thread.

    Args:
        is_written: a thread writes it, from before it is staged, as a run does it. Else `write` does, at last.
    """

    def __init__(
        self,
        stager: Stager,
        state: dict[str, Any],
        folder: Path,
        *,
        format: Format = FORMAT,
        store: Any = None,
        is_written: bool = False,
    ) -> None:
        self._format = format
        self._local = LocalStore(folder)
        self._store = store or self._local
        self._place = "saved" if format.is_folder else "saved.file"
        if self._local.exists(self._place):
            (self._local.delete_folder if format.is_folder else self._local.delete)(self._place)
        if format.is_folder:
            self._local.make_folder(self._place)
        self.staged: Staging = stager.take(format.lay_out(Snapshot(state), 0))
        self.cut = copy.deepcopy(state)
        plan = self.staged._plan
        self.late = {plan.name(nth).key for nth in range(len(plan.witnesses))}
        self.writing = Background(self._write) if is_written else None
        self.staged.stage()

    def write(self) -> Written:
        """All is copied, and the files are there."""
        self.staged.settle()
        written: Written = self.writing.result() if self.writing else self._write()
        return written

    def read(self, written: Written) -> dict[str, Any]:
        """What stands in the files, by distckpt itself."""
        manifest = Manifest(Progress(1), self._format.name, 1, (), "", "", 0, 0, written.files, written.tensors)
        return dict(read_now(self._format, self._local, self._place, manifest).shared)

    def saved(self) -> dict[str, Any]:
        """What stands in the files once all is copied."""
        return self.read(self.write())

    def _write(self) -> Written:
        try:
            return self.staged.write(self._store, self._place)
        finally:
            self.staged.release()


def saved_beside(save: Save, change: Callable[[], object], training: Training) -> bool:
    """Whether what was saved is what there was before ``change``, and that changed something that is copied late."""
    assert save.late
    change()
    assert spelled(training.state()) != spelled(save.cut)
    return spelled(save.saved()) == spelled(save.cut)


class Minded:
    """A store that asks before each write to a file: it may wait, or raise.

    Attributes:
        operations: what it has done, in this order: ``"create saved/state.json"``.
    """

    def __init__(self, folder: Path, before_write: Callable[[int], object] = lambda _: None) -> None:
        self.operations: list[str] = []
        self._store = LocalStore(folder)
        self._before_write = before_write
        self._writes = 0

    @contextmanager
    def create(self, path: str) -> Iterator[Minded]:
        with self._store.create(path) as self._sink:
            yield self
        self.operations.append(f"create {path}")

    def write(self, data: memoryview) -> None:
        self._before_write(self._writes)
        self._writes += 1
        self._sink.write(data)

    def delete(self, path: str) -> None:
        self._store.delete(path)
        self.operations.append(f"delete {path}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class Background:
    """``work`` on a thread of its own."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._outcome: list[Any] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def result(self, seconds: float = 20.0) -> Any:
        """What it returned; what it raised is raised here."""
        assert self.ended(seconds), f"still at it after {seconds} seconds"
        if self._error is not None:
            raise self._error
        return self._outcome[0]

    def ended(self, seconds: float = 0.0) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self._outcome.append(work())
        except BaseException as error:  # raised where it is asked for
            self._error = error


def spelled(value: Any) -> Any:
    """``value`` with its types spelled out and its tensors to the last bit, so that ``==`` compares them, too."""
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), bits(value)]
    if isinstance(value, dict):
        return [type(value).__name__, [[key, spelled(one)] for key, one in value.items()]]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, [spelled(one) for one in value]]
    return [type(value).__name__, repr(value)]


def bits(tensor: Tensor) -> bytes:
    """The elements, in their order, as they lie in memory."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return ctypes.string_at(plain.data_ptr(), plain.nbytes) if plain.numel() else b""
