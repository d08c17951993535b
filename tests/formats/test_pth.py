"""One file of torch.save: whole or refused, never unpickled."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flows import read_now, write_now
from torch import nn

from distckpt.attempt import Attempt, Holder
from distckpt.catalog import Catalog, read_manifest
from distckpt.errors import DamagedCheckpoint, NoCheckpoint
from distckpt.formats import Snapshot
from distckpt.formats.pth import FORMAT, Pth, read_pth, write_stream
from distckpt.manifest import Manifest
from distckpt.progress import Progress
from distckpt.stores.local import LocalStore

STATE = {"meta": {"epoch": 3}, "state_dict": nn.BatchNorm1d(3).state_dict(), "big": torch.arange(500_000.0)}


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.place),))


def commit(root: Path, name: str = "epoch_3.pth") -> Manifest:
    """STATE is a committed checkpoint in ``root``."""
    store = LocalStore(root)
    catalog = Catalog(store, Attempt.start(store, Holder("host", 1, "now")))
    draft = catalog.begin(Progress(12, 3), name)
    (file,) = write_now(Pth(), Snapshot(shared=STATE), store, draft.path).files
    record = catalog.commit(draft, Manifest(Progress(12, 3), "pth", 1, ("interval",), "", "", 0, 0, files=(file,)))
    return read_manifest(store, record)


def read(root: Path, manifest: Manifest, parts: Any = None) -> Snapshot:
    return read_now(FORMAT, LocalStore(root), manifest.files[0].path, manifest, parts=parts)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_plain_torch_load_reads_what_was_written(tmp_path):
    commit(tmp_path)
    held = torch.load(tmp_path / "epoch_3.pth", weights_only=True)
    assert held["meta"] == {"epoch": 3}
    assert torch.equal(held["big"], STATE["big"])
    assert held["state_dict"]._metadata == STATE["state_dict"]._metadata


def test_torch_load_can_map_it_into_memory(tmp_path):
    commit(tmp_path)
    held = torch.load(tmp_path / "epoch_3.pth", weights_only=True, mmap=True)
    assert torch.equal(held["big"], STATE["big"])


def test_what_is_read_is_what_was_written(tmp_path):
    held = read(tmp_path, commit(tmp_path)).shared
    assert list(held) == list(STATE)
    assert torch.equal(held["big"], STATE["big"])


def test_only_the_parts_that_are_asked_for_are_given(tmp_path):
    assert list(read(tmp_path, commit(tmp_path), ["meta"]).shared) == ["meta"]


def test_ranks_that_do_not_lead_write_nothing(tmp_path):
    assert FORMAT.lay_out(Snapshot(shared=STATE), 1) == []


def test_a_tensor_that_is_sharded_or_without_data_is_refused_by_its_place():
    state = {"optimizer": {"state": {0: {"x": torch.empty(3, device="meta")}}}}
    with pytest.raises(TypeError, match=r"^optimizer\.state\.0\.x cannot be saved: .*meta"):
        FORMAT.lay_out(Snapshot(shared=state), 0)


def test_live_tensors_are_filled_from_an_opened_file(tmp_path):
    manifest = commit(tmp_path)
    opened = FORMAT.open(LocalStore(tmp_path), "epoch_3.pth", manifest, 0, ["big"])
    live = nn.Parameter(torch.zeros(len(STATE["big"]), 2)[:, 1])
    opened.fill([(opened.snapshot.shared["big"], live)])
    assert torch.equal(live, STATE["big"])


def test_a_published_copy_reaches_the_file_without_a_copy_of_its_tensors():
    class Sink:
        addresses: list[int] = []

        def write(self, data: Any) -> None:
            if len(data) == STATE["big"].nbytes:
                self.addresses.append(np.frombuffer(data, np.uint8).__array_interface__["data"][0])

    class Nothing:
        def update(self, data: Any) -> None: ...

    write_stream(STATE, Sink(), Nothing())
    assert Sink.addresses == [STATE["big"].data_ptr()]


@pytest.mark.parametrize("at", [0, 100, 1_000_000, -1])
def test_a_flipped_bit_anywhere_is_found_by_the_record(tmp_path, at):
    manifest = commit(tmp_path)
    flip(tmp_path / "epoch_3.pth", at)
    with pytest.raises(DamagedCheckpoint, match="epoch_3.pth: its bytes changed after the commit"):
        read(tmp_path, manifest)
    with pytest.raises(DamagedCheckpoint, match="epoch_3.pth: its bytes changed after the commit"):
        read_pth(tmp_path / "epoch_3.pth")


def test_a_file_that_was_cut_off_is_found_by_the_record(tmp_path):
    manifest = commit(tmp_path)
    os.truncate(tmp_path / "epoch_3.pth", 1000)
    with pytest.raises(DamagedCheckpoint, match="epoch_3.pth has 1000 bytes, [0-9]+ were committed"):
        read(tmp_path, manifest)


def test_a_file_without_a_record_is_read(tmp_path):
    torch.save(STATE, tmp_path / "foreign.pth")
    assert torch.equal(read_pth(tmp_path / "foreign.pth")["big"], STATE["big"])


def test_a_flipped_bit_in_a_file_without_a_record_is_found_by_its_own_sums(tmp_path):
    # torch.load reads this file, with a wrong weight.
    torch.save(STATE, tmp_path / "foreign.pth")
    flip(tmp_path / "foreign.pth", 1_000_000)
    with pytest.raises(DamagedCheckpoint, match=r"foreign.pth: its bytes changed; the checksum of .*data/"):
        read_pth(tmp_path / "foreign.pth")


def test_a_file_of_the_format_before_zip_is_read(tmp_path):
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_pth(tmp_path / "old.pth")["big"], STATE["big"])


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, kept):
    torch.save(STATE, tmp_path / "cut.pth")
    os.truncate(tmp_path / "cut.pth", int(kept * (tmp_path / "cut.pth").stat().st_size))
    with pytest.raises(DamagedCheckpoint, match=r"cut\.pth is no whole file"):
        read_pth(tmp_path / "cut.pth")


@pytest.mark.parametrize(("content", "told"), [(b"", "is empty"), (b"hello " * 99, "is no whole file of torch.save")])
def test_what_is_no_file_of_torch_is_refused(tmp_path, content, told):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=rf"x\.pth {told}"):
        read_pth(tmp_path / "x.pth")


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_a_hostile_pickle_is_refused_and_never_run(tmp_path, write):
    write({"state_dict": Hostile(tmp_path / "owned")}, tmp_path / "hostile.pth")
    with pytest.raises(DamagedCheckpoint, match=r"hostile\.pth cannot be read without running code.*posix\.mkdir"):
        read_pth(tmp_path / "hostile.pth")
    assert not (tmp_path / "owned").exists()


def test_a_hostile_pickle_under_a_valid_record_is_not_run_either(tmp_path):
    STATE_WITH = {"state_dict": Hostile(tmp_path / "owned")}
    store = LocalStore(tmp_path)
    (file,) = write_now(FORMAT, Snapshot(shared=STATE_WITH), store, "epoch_1.pth").files
    manifest = Manifest(Progress(1), "pth", 1, (), "", "", 0, 0, files=(replace(file, path="epoch_1.pth"),))
    with pytest.raises(DamagedCheckpoint, match="without running code"):
        read(tmp_path, manifest)
    assert not (tmp_path / "owned").exists()


def test_a_missing_file_is_no_checkpoint(tmp_path):
    with pytest.raises(NoCheckpoint, match=r"none\.pth: there is no such file"):
        read_pth(tmp_path / "none.pth")


def test_a_directory_is_refused(tmp_path):
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(DamagedCheckpoint, match=r"folder\.pth cannot be read: .*not a regular file"):
        read_pth(tmp_path / "folder.pth")


@pytest.mark.timeout(20)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(DamagedCheckpoint, match=r"pipe\.pth cannot be read: .*not a regular file"):
        read_pth(tmp_path / "pipe.pth")


def test_a_link_is_followed(tmp_path):
    commit(tmp_path)
    (tmp_path / "latest.pth").symlink_to("epoch_3.pth")
    assert read_pth(tmp_path / "latest.pth")["meta"] == {"epoch": 3}


def test_a_damaged_record_is_named(tmp_path):
    commit(tmp_path)
    flip(tmp_path / "epoch_3.pth.committed", 20)
    with pytest.raises(DamagedCheckpoint, match=r"epoch_3\.pth\.committed"):
        read_pth(tmp_path / "epoch_3.pth")


def test_arrays_and_scalars_of_numpy_are_read(tmp_path):
    torch.save(OrderedDict(one=np.float32(1.5), many=np.arange(3), words=np.array(["a", "b"])), tmp_path / "np.pth")
    held = read_pth(tmp_path / "np.pth")
    assert (held["one"], list(held["many"]), list(held["words"])) == (1.5, [0, 1, 2], ["a", "b"])
