"""A job of several ranks, of which each is an object here: what each writes of the state, and what is read of it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import read_now, write_now
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from distckpt import strict_json
from distckpt.chunks import Chunks, Grid
from distckpt.errors import DamagedCheckpoint
from distckpt.formats import Snapshot, Written
from distckpt.formats.sharded import Sharded
from distckpt.manifest import FileEntry, Manifest, TensorGroup, digest
from distckpt.progress import Progress
from distckpt.stores.local import LocalStore


class Job:
    """So many ranks, which save what each is given."""

    def __init__(self, folder: Path, ranks: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.store = LocalStore(folder)
        self.formats = [Sharded() for _ in range(ranks)]
        self.saves = 0

    def plan(self, states: list[Snapshot]) -> None:
        planners = [one.planner for one in self.formats]
        digests = [one.look(state, rank) for rank, (one, state) in enumerate(zip(planners, states, strict=True))]
        told = [
            json.loads(json.dumps(one.tell(is_first=digests.index(digests[rank]) == rank)))
            for rank, one in enumerate(planners)
        ]
        answer = json.loads(json.dumps(planners[0].plan(told)))
        for rank, planner in enumerate(planners):
            planner.take(rank, answer)

    def save(self, states: list[Snapshot]) -> tuple[str, Manifest, list[Written]]:
        self.saves += 1
        path = f"step-{self.saves:08d}"
        self.store.make_folder(path)
        written = [
            write_now(one, state, self.store, path, rank)
            for rank, (one, state) in enumerate(zip(self.formats, states, strict=True))
        ]
        files = tuple(file for one in written for file in one.files)
        groups = self.formats[0].tensors_of(written)
        manifest = Manifest(Progress(1), "sharded", len(states), (), "", "", 0, 0, files, groups)
        return path, Manifest.from_json(manifest.to_json(), "manifest"), written

    def read(self, path: str, manifest: Manifest, rank: int = 0) -> Snapshot:
        return read_now(Sharded(), self.store, path, manifest, rank)

    def place(self, path: str, file: str) -> Path:
        return self.store.root / path / file


def model_of(*sizes: int, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {f"layer{nth}.weight": torch.randn(size, 64) for nth, size in enumerate(sizes)}


def replicated(state: dict[str, Any], ranks: int) -> list[Snapshot]:
    return [Snapshot({"model": state}, {"rng": {"seed": torch.tensor([rank])}}) for rank in range(ranks)]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


# What is replicated


def test_what_all_ranks_hold_is_written_once_and_each_writes_about_as_much(tmp_path):
    state = model_of(20_000, 3000, 5000, 1, 9000, 7000)
    job = Job(tmp_path, 3)
    job.plan(replicated(state, 3))
    path, manifest, written = job.save(replicated(state, 3))
    assert [one.tensors for one in written] == [None] * 3
    sizes = [file.size_bytes for one in written for file in one.files if file.path.endswith("safetensors")]
    total = sum(tensor.nbytes for tensor in state.values())
    assert sum(sizes) <= total + 3 * 4096 + 100 and max(sizes) < 1.01 * total / 3 + 4096
    assert all(same(job.read(path, manifest, rank).shared["model"], state) for rank in range(4))


def test_tensors_of_one_shape_come_back_though_each_is_cut_elsewhere_and_of_another_type(tmp_path):
    state = model_of(*[9000] * 8) | {f"counts.{nth}": torch.arange(9000 * 64).view(9000, 64) + nth for nth in range(4)}
    job = Job(tmp_path, 5)
    job.plan(replicated(state, 5))
    path, manifest, _ = job.save(replicated(state, 5))
    groups = [group for group in manifest.tensors if group.shape == (9000, 64)]
    assert len({group.chunks and group.chunks.starts for group in groups}) > 3 and any(one.files for one in groups)
    assert same(job.read(path, manifest).shared["model"], state)


def test_a_file_holds_one_box_of_a_tensor_and_says_where_it_lies(tmp_path):
    state = model_of(20_000, 3000)
    job = Job(tmp_path, 2)
    job.plan(replicated(state, 2))
    path, manifest, _ = job.save(replicated(state, 2))
    rows = 0
    for rank in range(2):
        with safe_open(job.place(path, f"rank-{rank:05d}.safetensors"), "pt") as file:
            told = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            assert set(told) == set(file.keys())
            box = file.get_tensor("model.layer0.weight")
            begin = told["model.layer0.weight"]["saved_offsets"][0]
            assert torch.equal(box, state["layer0.weight"][begin : begin + len(box)])
            rows += len(box)
    assert rows == 20_000
    (cut,) = [group for group in manifest.tensors if group.chunks]
    assert cut.keys == ("model.layer0.weight",) and cut.shape == (20_000, 64)


def test_where_few_are_to_write_the_first_of_each_machine_do(tmp_path, monkeypatch):
    state = model_of(20_000, 3000)
    job = Job(tmp_path, 4)
    job.formats = [Sharded(writers_per_node=1) for _ in job.formats]
    nodes = iter(["a", "b", "a", "b"])
    monkeypatch.setattr("platform.node", lambda: next(nodes))
    job.plan(replicated(state, 4))
    path, manifest, written = job.save(replicated(state, 4))
    files = {file for group in manifest.tensors for lies in group.files_of_each for file in lies}
    assert files == {"rank-00000.safetensors", "rank-00001.safetensors"}
    assert same(job.read(path, manifest).shared["model"], state)


def test_of_so_little_that_no_share_is_worth_a_file_one_rank_writes_all(tmp_path):
    state = model_of(3, 5)
    job = Job(tmp_path, 4)
    job.plan(replicated(state, 4))
    _, manifest, _ = job.save(replicated(state, 4))
    assert {group.files for group in manifest.tensors} == {("rank-00000.safetensors",)}


def test_tensors_that_are_tied_are_read_as_one_and_lie_there_under_each_name(tmp_path):
    state = model_of(3, 5)
    state["head"] = state["layer1.weight"]
    job = Job(tmp_path, 2)
    job.plan(replicated(state, 2))
    path, manifest, _ = job.save(replicated(state, 2))
    restored = job.read(path, manifest).shared["model"]
    assert same(restored, state) and restored["head"] is restored["layer1.weight"]
    with safe_open(job.place(path, "rank-00000.safetensors"), "pt") as file:
        assert torch.equal(file.get_tensor("model.head"), file.get_tensor("model.layer1.weight"))


def test_a_rank_keeps_what_is_its_own(tmp_path):
    job = Job(tmp_path, 3)
    states = replicated(model_of(3), 3)
    job.plan(states)
    path, manifest, _ = job.save(states)
    assert [job.read(path, manifest, rank).own["rng"]["seed"].item() for rank in range(3)] == [0, 1, 2]
    assert job.read(path, manifest, 3).own == {}


def test_while_an_optimizer_has_no_state_yet_the_plan_is_not_the_last(tmp_path):
    job = Job(tmp_path, 2)
    states = [Snapshot({"model": model_of(3), "optim": {"state": {}, "param_groups": [{"params": ["a"]}]}}, {})] * 2
    job.plan(states)
    assert all(one.planner.is_due for one in job.formats)
    states = [replace(one, shared={**one.shared, "optim": {"state": {"a": {}}, "param_groups": []}}) for one in states]
    job.plan(states)
    assert not any(one.planner.is_due for one in job.formats)


# Without a plan, and with one that does not hold any more


def test_who_did_not_agree_writes_all_that_it_holds_and_the_manifest_names_each_once(tmp_path):
    state = model_of(30, 50)
    job = Job(tmp_path, 2)
    path, manifest, written = job.save(replicated(state, 2))
    assert all(one.tensors for one in written)
    assert Counter(key for group in manifest.tensors for key in group.keys) == dict.fromkeys(
        (f"model.{key}" for key in state), 1
    )
    assert same(job.read(path, manifest, 1).shared["model"], state)


def test_a_tensor_that_appears_on_one_rank_only_is_written_by_it_and_read_by_all(tmp_path):
    state = model_of(20_000, 3000)
    job = Job(tmp_path, 3)
    job.plan(replicated(state, 3))
    job.save(replicated(state, 3))
    more = replicated(state, 3)
    more[1] = replace(more[1], shared={"model": {**state, "expert": torch.arange(7)}})
    path, manifest, written = job.save(more)
    assert [one.tensors is None for one in written] == [True, False, True]
    for rank in range(3):
        assert same(job.read(path, manifest, rank).shared["model"], more[1].shared["model"])
    job.plan(more)
    path, manifest, written = job.save(more)
    assert [one.tensors for one in written] == [None] * 3
    assert same(job.read(path, manifest).shared["model"], more[1].shared["model"])


def test_whole_tensors_of_one_shape_that_several_ranks_wrote_are_found_also_where_one_wrote_something_else(tmp_path):
    state = model_of(*[3000] * 20)
    job = Job(tmp_path, 3)
    job.plan(replicated(state, 3))
    path, manifest, _ = job.save(replicated(state, 3))
    (alike,) = [group for group in manifest.tensors if len(set(group.files)) > 1]
    assert alike.shape == (3000, 64) and len(set(alike.files)) == 3
    assert same(job.read(path, Manifest.from_json(manifest.to_json(), "it")).shared["model"], state)
    more = replicated(state, 3)
    more[2] = replace(more[2], shared={"model": {**state, "expert": torch.arange(7)}})
    path, manifest, _ = job.save(more)
    assert same(job.read(path, manifest).shared["model"], more[2].shared["model"])


def test_a_type_that_changed_everywhere_is_written_as_it_is_now(tmp_path):
    state = model_of(20_000, 3000)
    job = Job(tmp_path, 2)
    job.plan(replicated(state, 2))
    half = {key: tensor.bfloat16() for key, tensor in state.items()}
    path, manifest, written = job.save(replicated(half, 2))
    assert not any(one.tensors is None for one in written)
    assert same(job.read(path, manifest).shared["model"], half)


def test_what_no_rank_has_any_more_is_not_in_the_checkpoint(tmp_path):
    state = model_of(20_000, 3000)
    job = Job(tmp_path, 2)
    job.plan(replicated(state, 2))
    state.pop("layer1.weight")
    path, manifest, _ = job.save(replicated(state, 2))
    assert same(job.read(path, manifest, 1).shared["model"], state)


def test_a_rank_that_has_nothing_any_more_takes_its_share_of_a_tensor_with_it_and_that_is_no_checkpoint(tmp_path):
    state = model_of(20_000)
    job = Job(tmp_path, 2)
    job.plan(replicated(state, 2))
    states = replicated(state, 2)
    states[1] = replace(states[1], shared={"model": {}})
    with pytest.raises(ValueError, match=r"'model.layer0.weight' .* not written whole: \d+ of its"):
        job.save(states)


def test_a_tensor_of_which_ranks_hold_other_shapes_is_named_before_anything_is_written(tmp_path):
    job = Job(tmp_path, 2)
    states = [*replicated(model_of(30), 1), *replicated(model_of(31), 1)]
    with pytest.raises(ValueError, match="'model.layer0.weight' is not the same on all ranks"):
        job.plan(states)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whoever_holds_what_it_is_all_read_back(tmp_path_factory, data):
    """Each tensor is on some of the ranks; now and then one comes, is another, or comes to more ranks."""
    ranks = data.draw(st.integers(1, 4))
    job = Job(tmp_path_factory.mktemp("job"), ranks)
    held: dict[str, set[int]] = {}
    state: dict[str, Tensor] = {}
    for save in range(3):
        for name in data.draw(st.sets(st.sampled_from("abcdef"), min_size=1 if save == 0 else 0)):
            shape = data.draw(st.sampled_from([(), (3,), (0, 2), (700, 900), (2, 5)]))
            state[name] = torch.randint(100, shape).to(data.draw(st.sampled_from([torch.float32, torch.int64])))
            held[name] = held.get(name, set()) | data.draw(st.sets(st.integers(0, ranks - 1), min_size=1))
        states = [
            Snapshot({"model": {name: one for name, one in state.items() if rank in held[name]}}, {})
            for rank in range(ranks)
        ]
        if save == 0 or data.draw(st.booleans()):
            job.plan(states)
        path, manifest, _ = job.save(states)
        for rank in range(ranks + 1):
            assert same(job.read(path, manifest, rank).shared["model"], {**state})


def test_a_value_that_appears_on_one_rank_only_is_written_by_it_and_who_writes_what_of_tensors_stays(tmp_path):
    state = model_of(20_000, 3000)
    job = Job(tmp_path, 3)
    job.plan(replicated(state, 3))
    _, _, before = job.save(replicated(state, 3))
    more = replicated(state, 3)
    more[1] = replace(more[1], shared={"model": {**state, "new": 5}})
    path, manifest, written = job.save(more)
    assert [one.tensors is None for one in written] == [True, False, True]
    assert job.read(path, manifest).shared["model"]["new"] == 5
    sizes = [[file.size_bytes for file in one.files if "safetensors" in file.path] for one in written]
    assert sizes == [[file.size_bytes for file in one.files if "safetensors" in file.path] for one in before]
    job.plan(more)
    path, manifest, written = job.save(more)
    assert [one.tensors for one in written] == [None] * 3 and job.read(path, manifest, 2).shared["model"]["new"] == 5


def test_a_value_that_is_gone_on_the_rank_that_wrote_it_for_another_is_named(tmp_path):
    job = Job(tmp_path, 3)
    states = [Snapshot({"part": {"inner": {"a": 1}, "b": 2} if rank else {}}, {}) for rank in range(3)]
    job.plan(states)
    job.save(states)
    states[1] = Snapshot({"part": {"inner": {}, "b": 2}}, {})
    with pytest.raises(ValueError, match=r"'part.inner.a' is not in the state of rank 1 .*, and in that of rank 2 it"):
        job.save(states)
    states[2] = Snapshot({"part": {"inner": {"a": 3}, "b": 2, "c": 4}}, {})  # it writes all that it knows itself
    path, manifest, _ = job.save(states)
    assert job.read(path, manifest).shared == {"part": {"inner": {"a": 3}, "b": 2, "c": 4}}


def test_a_parameter_that_one_ranks_optimizer_knows_alone_is_written_although_it_has_no_state(tmp_path):
    job = Job(tmp_path, 2)
    states = [
        Snapshot({"optim": {"state": {}, "param_groups": {"a": {"lr": 0.5, "params": names}}}}, {})
        for names in (["a"], ["a", "b"])
    ]
    job.plan(states)
    path, manifest, _ = job.save(states)
    groups = job.read(path, manifest).shared["optim"]["param_groups"]
    assert [group["params"] for group in groups.values()] == [["a"], ["b"]]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_value_that_any_rank_has_is_read_back_or_named(tmp_path_factory, data):
    """Values come and go on some of the ranks."""
    ranks = data.draw(st.integers(1, 3))
    job = Job(tmp_path_factory.mktemp("job"), ranks)
    for save in range(4):
        states: list[dict[str, Any]] = [{"a": {}, 1: {}} for _ in range(ranks)]
        for rank in range(ranks):
            for outer, inner in data.draw(st.sets(st.sampled_from([("a", "b"), ("a", 2), (1, "b"), (1, "c")]))):
                states[rank][outer][inner] = (save, outer, inner)
        snapshots = [Snapshot({"part": one}, {}) for one in states]
        if save == 0 or data.draw(st.booleans()):
            job.plan(snapshots)
        known = {outer: {key: one for state in states for key, one in state[outer].items()} for outer in ("a", 1)}
        try:
            path, manifest, _ = job.save(snapshots)
        except ValueError as error:
            assert "is not in the state of rank" in str(error)
            job.plan(snapshots)
            path, manifest, _ = job.save(snapshots)
        assert job.read(path, manifest).shared == {"part": known}


# What is damaged


@pytest.fixture
def saved(tmp_path) -> tuple[Job, str, Manifest]:
    state = model_of(20_000, 3000, 4000)
    job = Job(tmp_path, 3)
    job.plan(replicated(state, 3))
    return job, *job.save(replicated(state, 3))[:2]


def changed(manifest: Manifest, **fields: Any) -> Manifest:
    told = strict_json.load(manifest.to_json(), "manifest") | fields
    return Manifest.from_json(strict_json.dump(told), "manifest")


def test_a_shard_that_is_missing_in_the_middle_is_named(saved):
    job, path, manifest = saved
    job.place(path, "rank-00001.safetensors").unlink()
    with pytest.raises(OSError, match="rank-00001.safetensors"):
        job.read(path, manifest)


def test_a_shard_of_another_step_is_named(saved):
    job, path, manifest = saved
    other, _, _ = job.save(replicated(model_of(20_000, 3000, 4000, seed=1), 3))
    job.place(other, "rank-00001.safetensors").replace(job.place(path, "rank-00001.safetensors"))
    with pytest.raises(DamagedCheckpoint, match=r"rank-00001.safetensors: its bytes changed"):
        job.read(path, manifest)


def test_a_shard_and_its_digests_of_another_step_are_named(saved):
    job, path, manifest = saved
    other, _, _ = job.save(replicated(model_of(20_000, 3000, 4000, seed=1), 3))
    for file in ("rank-00001.safetensors", "rank-00001.digests.json"):
        job.place(other, file).replace(job.place(path, file))
    with pytest.raises(DamagedCheckpoint, match=r"rank-00001.digests.json: its bytes changed"):
        job.read(path, manifest)


def cut_group(manifest: Manifest) -> TensorGroup:
    return next(group for group in manifest.tensors if group.chunks)


def with_chunks(manifest: Manifest, **fields: Any) -> Manifest:
    group = cut_group(manifest)
    assert group.chunks is not None
    listed = Chunks(group.chunks.files, group.chunks.offsets, group.chunks.sizes)
    other = replace(group, chunks=replace(listed, **fields))
    return replace(manifest, tensors=tuple(other if one is group else one for one in manifest.tensors))


def moved(numbers: tuple[int, ...], at: int, by: int) -> tuple[int, ...]:
    return (*numbers[:at], numbers[at] + by, *numbers[at + 1 :])


@pytest.mark.parametrize(
    "field, at, by, told",
    [
        ("sizes", 0, -1, "elements are missing"),
        ("sizes", 0, 1, "overlap"),
        ("offsets", 2, -1, "overlap"),
        ("offsets", 2, 10**6, "outside of it"),
        ("sizes", 2, 10**6, "outside of it"),
    ],
)
def test_a_manifest_whose_chunks_do_not_make_the_tensor_is_refused(saved, field, at, by, told):
    job, path, manifest = saved
    chunks = cut_group(manifest).chunks
    with pytest.raises(DamagedCheckpoint, match=f"'model.layer0.weight'.*{told}"):
        job.read(path, with_chunks(manifest, **{field: moved(getattr(chunks, field), at, by)}))


@pytest.mark.parametrize("shape", [[1 << 62, 64], [1 << 40, 1 << 40], [10**30], [1] * 65])
def test_a_tensor_that_cannot_be_is_refused_before_there_is_memory_for_it(saved, shape):
    job, path, manifest = saved
    group = {"file": "rank-00000.safetensors", "dtype": "F32", "shape": shape, "keys": ["model.layer0.weight"]}
    with pytest.raises(DamagedCheckpoint, match="cannot be|is not whole"):
        job.read(path, changed(manifest, tensors=[group]))


def test_a_type_that_nobody_knows_is_refused(saved):
    job, path, manifest = saved
    group = {"file": "rank-00000.safetensors", "dtype": "F7", "shape": [1], "keys": ["model.layer0.weight"]}
    with pytest.raises(DamagedCheckpoint, match="F7"):
        job.read(path, changed(manifest, tensors=[group]))


@pytest.mark.parametrize(
    "chunks",
    [
        {"files": [99], "offsets": [0, 0], "sizes": [20_000, 64]},
        {"files": [-1], "offsets": [0, 0], "sizes": [20_000, 64]},
        {"files": [0], "offsets": [0], "sizes": [20_000, 64]},
        {"files": [0], "offsets": [0, -1], "sizes": [20_000, 64]},
        {"files": [True], "offsets": [0, 0], "sizes": [20_000, 64]},
        {"files": ["../rank"], "offsets": [0, 0], "sizes": [20_000, 64]},
        {"files": [0], "offsets": [0, 0.5], "sizes": [20_000, 64]},
        {"files": [0], "sizes": [20_000, 64]},
        [],
    ],
    ids=str,
)
def test_chunks_that_cannot_be_are_refused(saved, chunks):
    _, _, manifest = saved
    group = {"chunks": chunks, "dtype": "F32", "shape": [20_000, 64], "keys": ["model.layer0.weight"]}
    with pytest.raises(DamagedCheckpoint):
        changed(manifest, tensors=[group])


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", ""])
def test_a_file_outside_of_the_folder_is_refused(saved, name):
    _, _, manifest = saved
    entries = [{**one.to_fields(), "digests": name} for one in manifest.files[:1]]
    if name:
        with pytest.raises(DamagedCheckpoint, match="no name of a file"):
            changed(manifest, files=entries, tensors=[])
    else:
        assert changed(manifest, files=entries, tensors=[]).files[0].digests == ""


def test_a_shard_without_digests_is_refused(saved):
    job, path, manifest = saved
    files = tuple(FileEntry(one.path, one.size_bytes, one.xxh3_128) for one in manifest.files)
    with pytest.raises(DamagedCheckpoint, match="digests of its blocks"):
        job.read(path, replace(manifest, files=files))


def test_a_key_that_stands_twice_is_refused(saved):
    job, path, manifest = saved
    with pytest.raises(DamagedCheckpoint, match="stands twice"):
        job.read(path, replace(manifest, tensors=(*manifest.tensors, manifest.tensors[0])))


def test_a_state_that_refers_to_a_tensor_that_is_not_there_is_refused(saved):
    job, path, manifest = saved
    with pytest.raises(DamagedCheckpoint, match=r"state.json, model"):
        job.read(path, replace(manifest, tensors=()))


def test_a_state_that_was_changed_is_refused(saved):
    job, path, manifest = saved
    place = job.place(path, "state.json")
    place.write_bytes(place.read_bytes().replace(b"layer0", b"layer9"))
    with pytest.raises(DamagedCheckpoint, match=r"state.json: its bytes changed"):
        job.read(path, manifest)


def test_a_manifest_of_a_cut_tensor_is_the_same_after_it_was_read(saved):
    _, _, manifest = saved
    again = Manifest.from_json(manifest.to_json(), "manifest")
    assert again == manifest and digest(again.to_json()) == digest(manifest.to_json())
    assert isinstance(cut_group(again).chunks, Grid)
