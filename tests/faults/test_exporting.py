"""Whatever happens to an export, its target is there whole, or as it was before."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import exports
import power
import pytest
import shim
from disk_tree import build
from forks import Forks
from power import Disk, PowerCut
from shim import Action, Fault

KINDS = [("pth", None), ("safetensors", None), ("hf", 1000), ("dcp", None)]
PLACES = ["nothing there", "an older one there"]


@pytest.fixture(scope="module")
def exporting(library: Path) -> Iterator[Forks]:
    """Forks of a process that has imported torch and distckpt."""
    with Forks(library, "exports") as running:
        yield running


def content(place: Path) -> dict[str, bytes] | None:
    """What is at ``place``; None if nothing is."""
    if place.is_file():
        return {"": place.read_bytes()}
    return {path.name: path.read_bytes() for path in place.iterdir()} if place.exists() else None


class Exporting:
    """A folder with or without an older export, and copies of it in which an export goes wrong."""

    def __init__(self, exporting: Forks, scratch: Path, to: str, most_bytes: int | None, is_there: bool) -> None:
        self._exporting, self._scratch = exporting, scratch
        old, new = (str(exports.save(scratch / name, fill)) for name, fill in (("old", 1.0), ("new", 2.0)))
        self._words = {"source": new, "to": to, "max_shard_bytes": most_bytes}
        self._start = scratch / "start"
        self._start.mkdir()
        if is_there:
            assert exporting.run(exports.run, self._start, **self._words | {"source": old}).said == ["exported"]
        self.before = content(self._start / exports.TARGET)
        shutil.copytree(self._start, scratch / "whole")
        self._disks = [Disk.scan(scratch / "whole", model) for model in ("posix", "ordered")]
        outcome = exporting.run(exports.run, scratch / "whole", trace=scratch / "trace", **self._words)
        assert outcome.said == ["exported"], outcome
        self._trace = shim.read_trace(scratch / "trace")
        self.calls = [call for call in self._trace if call.number]
        self.after = content(scratch / "whole" / exports.TARGET)
        assert self.after != self.before and len(self.calls) > 8

    def go_wrong(self, fault: Fault):
        """What becomes of an export with that fault, and of the folder."""
        root = self._scratch / f"{fault.action.name}-{fault.call}-{fault.error}"
        shutil.copytree(self._start, root)
        return self.export(root, fault), root

    def export(self, root: Path, fault: Fault | None = None, trace: Path | None = None):
        return self._exporting.run(exports.run, root, fault=fault, trace=trace, **self._words)

    def cuts(self) -> Iterator[tuple[PowerCut, dict[str, bytes] | None]]:
        """What a power cut may leave at any of its calls, and what is at the target then."""
        for disk in self._disks:
            yield from self._built(power.cuts(disk, self._trace))

    def cuts_after(self, fault: Fault) -> Iterator[tuple[PowerCut, dict[str, bytes] | None]]:
        """As `cuts`, of an export after one with that fault."""
        root = self._scratch / "twice"
        shutil.copytree(self._start, root)
        disks = [Disk.scan(root, model) for model in ("posix", "ordered")]
        traces = [self._scratch / "first-trace", self._scratch / "second-trace"]
        self.export(root, fault, traces[0])
        self.export(root, None, traces[1])
        first, second = map(shim.read_trace, traces)
        for disk in disks:
            yield from self._built(power.cuts(disk, first + second, since=len(first)))

    def _built(self, cuts: list[PowerCut]) -> Iterator[tuple[PowerCut, dict[str, bytes] | None]]:
        for cut in cuts:
            with tempfile.TemporaryDirectory(dir=self._scratch) as root:
                build(cut.tree, Path(root))
                yield cut, content(Path(root) / exports.TARGET)


@pytest.fixture(params=KINDS, ids=[kind for kind, _ in KINDS])
def kind(request):
    return request.param


@pytest.fixture(params=PLACES)
def disk(request, exporting, scratch, kind) -> Exporting:
    return Exporting(exporting, scratch, *kind, is_there=request.param != PLACES[0])


def test_killed_at_every_call_it_leaves_the_old_or_the_new_whole_and_no_more_once_there_was_another(disk):
    came, left = [], []
    for fault in shim.kills(disk.calls):
        outcome, root = disk.go_wrong(fault)
        assert outcome.was_killed, f"{fault} did not happen: {outcome}"
        assert (found := content(root / exports.TARGET)) in (disk.before, disk.after), str(fault)
        came.append(found == disk.after)
        left += [(fault, root)] if others_in(root) else []
    assert any(came) and not all(came) and len(left) > 3
    for fault, root in left[::3]:
        assert disk.export(root).said == ["exported"] and content(root / exports.TARGET) == disk.after
        assert others_in(root) == [], str(fault)


def others_in(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.name != exports.TARGET]


def test_a_power_cut_at_any_call_leaves_the_old_or_the_new_whole(disk):
    for cut, found in disk.cuts():
        assert found == disk.after or (found == disk.before and cut.told != "exported"), cut.after


def test_a_power_cut_while_what_was_left_is_swept_leaves_the_old_or_the_new_whole(exporting, scratch):
    """Where a process was killed right after that, it is not durable yet that the names were exchanged."""
    disk = Exporting(exporting, scratch, "dcp", None, is_there=True)
    (moved,) = [call for call in disk.calls if call.name == "exchange"]
    states = list(disk.cuts_after(Fault(moved.number + 1, Action.KILL)))
    assert len(states) > 50
    for cut, found in states:
        assert found in (disk.before, disk.after), cut.after


def test_where_two_names_cannot_be_exchanged_a_folder_is_moved_away_first(exporting, scratch):
    disk = Exporting(exporting, scratch, "dcp", None, is_there=True)
    (call,) = [call for call in disk.calls if call.name == "exchange"]
    outcome, root = disk.go_wrong(Fault(call.number, Action.FAIL, errno.EINVAL))
    assert outcome.said == ["exported"] and content(root / exports.TARGET) == disk.after and others_in(root) == []


@pytest.mark.parametrize("action, error", [(Action.FAIL, errno.EIO), (Action.FAIL_FROM_HERE, errno.ENOSPC)])
def test_a_disk_that_fails_at_any_call_fails_it_by_name_and_leaves_what_was_there(disk, action, error):
    moved = next(nth for nth, call in enumerate(disk.calls) if call.name in ("rename", "link", "exchange"))
    assert disk.calls[moved + 1].name == "fsync"  # which a disk that is full would not fail, as what undoes the move
    for call in disk.calls[: moved + 2 if action is Action.FAIL else moved + 1]:
        outcome, root = disk.go_wrong(Fault(call.number, action, error))
        if outcome.said == ["exported"]:  # a full disk does not stop what needs no space
            assert action is Action.FAIL_FROM_HERE and content(root / exports.TARGET) == disk.after, str(call)
            continue
        (told,) = outcome.said
        assert told.startswith("failed ") and os.strerror(error) in told and str(root) in told, f"{call}: {outcome}"
        assert content(root / exports.TARGET) == disk.before
        assert others_in(root) == [], str(call)


def test_what_was_there_is_not_removed_where_its_name_cannot_be_given_back(exporting, scratch):
    disk = Exporting(exporting, scratch, "dcp", None, is_there=True)
    (moved,) = [nth for nth, call in enumerate(disk.calls) if call.name == "exchange"]
    _, root = disk.go_wrong(Fault(disk.calls[moved + 1].number, Action.FAIL_FROM_HERE, errno.ENOSPC))
    (left,) = others_in(root)
    assert content(root / exports.TARGET) == disk.after and content(root / left) == disk.before
