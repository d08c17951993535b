"""Whatever happens to an export, its target is there whole, or as it was before."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import exports
import pytest
import shim
from forks import Forks
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


class Disk:
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
        outcome = exporting.run(exports.run, scratch / "whole", trace=scratch / "trace", **self._words)
        assert outcome.said == ["exported"], outcome
        self.calls = [call for call in shim.read_trace(scratch / "trace") if call.number]
        self.after = content(scratch / "whole" / exports.TARGET)
        assert self.after != self.before and len(self.calls) > 8

    def go_wrong(self, fault: Fault):
        """What becomes of an export with that fault, and of the folder."""
        root = self._scratch / f"{fault.action.name}-{fault.call}-{fault.error}"
        shutil.copytree(self._start, root)
        return self._exporting.run(exports.run, root, fault=fault, **self._words), root


@pytest.fixture(params=KINDS, ids=[kind for kind, _ in KINDS])
def kind(request):
    return request.param


@pytest.fixture(params=PLACES)
def disk(request, exporting, scratch, kind) -> Disk:
    return Disk(exporting, scratch, *kind, is_there=request.param != PLACES[0])


def test_killed_at_every_call_it_leaves_the_old_or_the_new_whole(disk):
    came = []
    for fault in shim.kills(disk.calls):
        outcome, root = disk.go_wrong(fault)
        assert outcome.was_killed, f"{fault} did not happen: {outcome}"
        found = content(root / exports.TARGET)
        if found is None and disk.before is not None:  # killed between the two renames of a folder
            found = next(one for one in map(content, root.iterdir()) if one == disk.before)
        assert found in (disk.before, disk.after), str(fault)
        came.append(found == disk.after)
    assert any(came) and not all(came)


@pytest.mark.parametrize("action, error", [(Action.FAIL, errno.EIO), (Action.FAIL_FROM_HERE, errno.ENOSPC)])
def test_a_disk_that_fails_at_any_call_fails_it_by_name_and_leaves_what_was_there(disk, action, error):
    first_move = next(nth for nth, call in enumerate(disk.calls) if call.name in ("rename", "link"))
    for call in disk.calls[:first_move]:
        outcome, root = disk.go_wrong(Fault(call.number, action, error))
        if outcome.said == ["exported"]:  # a full disk does not stop what needs no space
            assert action is Action.FAIL_FROM_HERE and content(root / exports.TARGET) == disk.after, str(call)
            continue
        (told,) = outcome.said
        assert told.startswith("failed ") and os.strerror(error) in told and str(root) in told, f"{call}: {outcome}"
        assert content(root / exports.TARGET) == disk.before
        assert [path.name for path in root.iterdir()] == ([] if disk.before is None else [exports.TARGET]), str(call)
