"""What all ranks of a job work out for themselves covers every tensor once, and is what the manifest says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard

from distckpt import layout
from distckpt.formats.boxes import fault
from distckpt.formats.held import Holding, Kind, Told
from distckpt.formats.safetensors_file import ITEM_BYTES
from distckpt.formats.sharded_plan import Plan, make_plan, parts_of
from distckpt.formats.shards import boxes_at
from distckpt.formats.spread import Box
from distckpt.manifest import digest

Shape = tuple[int, ...]
Held = Mapping[int, Sequence[Box]]  # by rank that knows the tensor
Chunk = tuple[str, str, Shape, Shape]  # its key, file, offsets and sizes


def whole(shape: Shape) -> Box:
    return Box((0,) * len(shape), shape, (0,) * len(shape))


@dataclass
class Job:
    """Ranks, and what each knows: by key the dtype, the shape, and the boxes of each rank."""

    ranks: int
    held: dict[str, tuple[str, Shape, dict[int, Sequence[Box]]]] = field(default_factory=dict)

    def replicated(self, key: str, shape: Shape, ranks: Sequence[int] | None = None, dtype: str = "F32") -> None:
        holders = range(self.ranks) if ranks is None else ranks
        self.held[key] = dtype, shape, {rank: [whole(shape)] for rank in holders}

    def spread(
        self,
        key: str,
        shape: Shape,
        placements: Sequence[Placement],
        mesh: Shape | None = None,
        ranks: Sequence[int] | None = None,
        dtype: str = "F32",
    ) -> None:
        """Over a mesh of these ranks, in their order."""
        on = [*range(self.ranks)] if ranks is None else ranks
        mesh = mesh or (len(on),)
        at = [tuple(map(int, np.unravel_index(nth, mesh))) for nth in range(len(on))]
        self.held[key] = (
            dtype,
            shape,
            {rank: boxes_at(shape, mesh, one, placements) for rank, one in zip(on, at, strict=True)},
        )

    def holdings(self) -> list[Holding]:
        found = []
        for rank in range(self.ranks):
            of: list[tuple[Kind, Box | None]] = []
            for key, (dtype, shape, held) in self.held.items():
                if rank in held:
                    of += [(Kind(key, nth, dtype, shape), box) for nth, box in enumerate(held[rank] or (None,))]
            of.sort(key=lambda one: one[0])
            found.append(Holding([kind for kind, _ in of], [box for _, box in of]))
        return found


def told_by(holdings: Sequence[Holding]) -> list[Told]:
    """What reaches the leader, as JSON. Of ranks that know the same tensors, the first one tells what they are."""
    schemas = [digest(holding.schema()) for holding in holdings]
    told = [
        holding.tell(is_schema_told=schemas.index(schema) == rank)
        for rank, (holding, schema) in enumerate(zip(holdings, schemas, strict=True))
    ]
    return [Told.parse(json.loads(json.dumps(one))) for one in told]


def planned(job: Job) -> Plan:
    return make_plan(told_by(job.holdings()))


def written(holdings: Sequence[Holding], answer: Mapping[str, Any]) -> Iterator[Chunk]:
    """What each rank will write, by what it works out for itself."""
    answer = json.loads(json.dumps(answer))
    for rank, holding in enumerate(holdings):
        for part in parts_of(holding, rank, answer, digest(holding.schema())):
            kind, box = holding.kinds[part.nth], holding.boxes[part.nth]
            assert box is not None, "it has no element of it"
            for begin, size, extent in zip(part.begins, part.sizes, box.sizes, strict=True):
                assert begin >= 0 and begin + size <= extent
            offsets = tuple(map(sum, zip(box.offsets, part.begins, strict=True)))
            yield kind.key, layout.shard_file(rank, kind.nth), offsets, part.sizes


def listed(plan: Plan) -> Iterator[Chunk]:
    """What the manifest says."""
    for group in plan.groups:
        dims = len(group.shape)
        for key, files in zip(group.keys, group.files_of_each, strict=True):
            if group.chunks is None:
                yield key, *files, (0,) * dims, group.shape
                continue
            for nth, file in enumerate(files):
                offsets, sizes = (
                    numbers[nth * dims : (nth + 1) * dims] for numbers in (group.chunks.offsets, group.chunks.sizes)
                )
                yield key, file, offsets, sizes


def bytes_by_rank(job: Job, chunks: Sequence[Chunk]) -> list[int]:
    found = [0] * job.ranks
    for key, file, _, sizes in chunks:
        found[layout.rank_of(file)] += ITEM_BYTES[job.held[key][0]] * math.prod(sizes)
    return found


def assert_planned(job: Job) -> list[Chunk]:
    """All that was promised of a plan. What is written."""
    holdings = job.holdings()
    plan = make_plan(told_by(holdings))
    chunks = [*written(holdings, plan.answer)]
    assert sorted(chunks) == sorted(listed(plan)), "the manifest says what is written"
    assert len({(key, file) for key, file, _, _ in chunks}) == len(chunks), "a file holds one box of a tensor"
    for key, (_, shape, held) in job.held.items():
        mine = [(offsets, sizes) for name, _, offsets, sizes in chunks if name == key]
        rows = [np.array([one[at] for one in mine], dtype=np.int64).reshape(len(mine), -1) for at in (0, 1)]
        assert fault(shape, *rows) == "", key
        assert plan.holders[key] == {rank for rank, boxes in held.items() if boxes}
    kinds = {key: (group.dtype, group.shape) for group in plan.groups for key in group.keys}
    assert kinds == {key: (dtype, shape) for key, (dtype, shape, _) in job.held.items()}
    assert sum(len(group.keys) for group in plan.groups) == len(job.held), "each key stands once"
    return chunks


def test_ddp_each_rank_writes_as_much():
    job = Job(5)
    for nth, shape in enumerate([(50257, 64), (1000, 33), (4096,), ()] * 3):
        job.replicated(f"t{nth}", shape)
    loads = bytes_by_rank(job, assert_planned(job))
    assert max(loads) / (sum(loads) / 5) <= 1.005


def test_ddp_of_so_little_that_no_share_is_worth_a_file_is_written_by_one():
    job = Job(5)
    job.replicated("weight", (17, 10))
    job.replicated("step", ())
    assert {file for _, file, _, _ in assert_planned(job)} == {"rank-00000.safetensors"}


def test_fsdp_each_rank_writes_what_it_has():
    job = Job(4)
    for key, shape in {"even": (8, 3), "uneven": (10, 3), "few": (2, 3), "one": (1,), "none": (0, 3)}.items():
        job.spread(key, shape, [Shard(0)])
    job.replicated("step", ())
    chunks = assert_planned(job)
    assert [file for key, file, _, _ in chunks if key == "few"] == ["rank-00000.safetensors", "rank-00001.safetensors"]


def test_hsdp_replicas_share_each_shard():
    job = Job(8)
    for nth in range(6):
        job.spread(f"t{nth}", (4096 + nth, 515), [Replicate(), Shard(0)], (2, 4))
        job.replicated(f"step{nth}", ())
    loads = np.array(bytes_by_rank(job, assert_planned(job))).reshape(2, 4)
    assert (loads.max(axis=0) / loads.mean(axis=0)).max() <= 1.005


def test_replicas_share_what_is_cut_into_more_and_into_fewer_shards():
    job = Job(8)
    for nth in range(4):
        job.spread(f"t{nth}.few", (3, 700_001), [Replicate(), Shard(0)], (2, 4))
        job.spread(f"t{nth}.many", (4096, 515), [Replicate(), Shard(0)], (2, 4))
    loads = np.array(bytes_by_rank(job, assert_planned(job))).reshape(2, 4)
    assert (loads.max(axis=0) / loads.mean(axis=0)).max() <= 1.005


def test_who_writes_more_than_others_anyway_takes_less_of_what_all_hold():
    job = Job(4)
    job.replicated("alone", (1000, 1000), [0])
    job.replicated("of two", (3001, 1000), [1, 2])
    job.spread("of two that another one shares", (2, 2501, 500), [Shard(0)], ranks=[2, 3])
    for nth in range(5):
        job.replicated(f"of all {nth}", (4999, 1000))
    loads = bytes_by_rank(job, assert_planned(job))
    assert max(loads) / (sum(loads) / 4) <= 1.005


def test_fsdp_over_tensor_parallel_ranks():
    job = Job(8)
    rows = [_StridedShard(0, split_factor=2), Shard(0)]
    job.spread("rows", (17, 6), rows, (4, 2))
    job.spread("columns", (17, 6), [Shard(0), Shard(1)], (4, 2))
    job.spread("norm", (7,), [Shard(0), Replicate()], (4, 2))
    job.replicated("step", ())
    assert_planned(job)


def test_several_boxes_of_a_rank_lie_in_several_files():
    job = Job(4)
    job.spread("fused", (12, 3), [_StridedShard(0, split_factor=3)], (2,), [0, 1])
    job.spread("replicated", (12, 3), [Replicate(), _StridedShard(0, split_factor=3)], (2, 2))
    chunks = assert_planned(job)
    assert {file for key, file, _, _ in chunks if key == "fused"} == {
        *(layout.shard_file(rank, nth) for rank in range(2) for nth in range(3))
    }


def test_pipeline_stages_know_other_tensors_each():
    job = Job(6)
    for stage in range(3):
        ranks = [2 * stage, 2 * stage + 1]
        job.spread(f"stage{stage}.weight", (33, 4), [Shard(0)], ranks=ranks)
        job.replicated(f"stage{stage}.bias", (4,), ranks)
    job.replicated("tied", (900, 700), [0, 1, 4, 5])
    job.replicated("step", ())
    assert_planned(job)


@pytest.mark.parametrize("mesh", [(4, 256), (256, 4)], ids=str)
def test_what_all_ranks_are_answered_does_not_grow_with_the_groups_that_share(mesh):
    replicas, parts = mesh
    job = Job(replicas * parts)
    for nth in range(3):
        job.spread(f"weight{nth}", (4096 + nth, 256), [Replicate(), Shard(0)], mesh)
    job.replicated("step", ())
    plan = planned(job)
    assert len(json.dumps(plan.answer)) < 1500
    assert sorted(listed(plan)) == sorted(written(job.holdings(), plan.answer))


def test_experts_are_held_by_some_ranks():
    job = Job(8)
    for expert in range(4):
        job.replicated(f"expert{expert}", (512, 1024), [expert, expert + 4])
    job.spread("stacked", (4, 16, 3), [Replicate(), Shard(0)], (2, 4))
    job.replicated("router", (1024, 4))
    assert_planned(job)


def test_ranks_that_know_nothing_write_nothing():
    job = Job(3)
    job.replicated("weight", (4,), [1])
    chunks = assert_planned(job)
    assert [file for _, file, _, _ in chunks] == ["rank-00001.safetensors"]


def test_a_job_without_tensors_has_an_empty_plan():
    assert assert_planned(Job(2)) == []


def test_tensors_that_lie_alike_stand_together_in_the_manifest():
    job = Job(4)
    for nth in range(50):
        job.spread(f"t{nth}", (10, 3), [Shard(0)])
        job.spread(f"moment{nth}", (10, 3), [Shard(0)], dtype="BF16")
    assert sorted(len(group.keys) for group in planned(job).groups) == [50, 50]


def test_tensors_that_are_whole_stand_together_in_the_manifest_whoever_writes_them():
    job = Job(4)
    for nth in range(41):
        job.replicated(f"t{nth}", (1000, 300))
    whole, *cut = planned(job).groups
    assert len(whole.files) == len(whole.keys) == 38 and len(cut) == 3, "a whole one goes to one rank"
    assert {file for (file,) in whole.files_of_each} == {layout.shard_file(rank) for rank in range(4)}


shapes = st.lists(st.sampled_from([1, 2, 3, 5, 8, 33, 1000, 4099, 0]), max_size=3).map(tuple)


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """Any tensors on any of the ranks: all of them, one of several meshes, or some; several boxes of one, too."""
    job = Job(draw(st.integers(1, 8)))
    meshes: list[tuple[Shape, list[int]]] = []
    for _ in range(draw(st.integers(1, 2))):
        mesh = draw(st.sampled_from([(job.ranks,), *((n, job.ranks // n) for n in range(1, 5) if job.ranks % n == 0)]))
        meshes.append((mesh, draw(st.permutations(range(job.ranks)))))
    some = st.lists(st.integers(0, job.ranks - 1), min_size=1, unique=True)
    for nth in range(draw(st.integers(1, 7))):
        key, shape, dtype = f"t{nth}", draw(shapes), draw(st.sampled_from(["F32", "BF16", "U8"]))
        kind = draw(st.sampled_from(["all", "some", "mesh", "mesh", "mesh"])) if shape else "all"
        if kind == "mesh":
            mesh, ranks = draw(st.sampled_from(meshes))
            dims = st.integers(0, len(shape) - 1)
            strided = st.builds(lambda dim, number: _StridedShard(dim, split_factor=number), dims, st.integers(1, 3))
            placement = st.one_of(st.just(Replicate()), st.builds(Shard, dims), strided)
            job.spread(key, shape, [draw(placement) for _ in mesh], mesh, ranks, dtype)
        else:
            job.replicated(key, shape, None if kind == "all" else draw(some), dtype)
    return job


@given(jobs())
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_any_job_is_covered_once_by_what_its_ranks_work_out(job):
    assert_planned(job)


def moved(box: Box) -> Box:
    return box._replace(offsets=(box.offsets[0] + 1, *box.offsets[1:]))


def shorter(box: Box) -> Box:
    return box._replace(sizes=(box.sizes[0] - 1, *box.sizes[1:]))


def job_with_a_box(key: str, rank: int, change: Callable[[Box], Box]) -> Job:
    job = Job(4)
    for nth in range(3):
        job.spread(f"rows{nth}", (40, 3), [Shard(0)])
        job.spread(f"parts{nth}", (40, 6), [Shard(0), Shard(1)], (2, 2))
        job.spread(f"replicas{nth}", (40, 3), [Replicate(), Shard(0)], (2, 2))
        job.replicated(f"all{nth}", (40, 3))
        job.spread(f"fused{nth}", (40, 3), [Replicate(), _StridedShard(0, split_factor=2)], (2, 2))
    boxes = job.held[key][2]
    boxes[rank] = [change(boxes[rank][0]), *boxes[rank][1:]]
    return job


@pytest.mark.parametrize("change", [moved, shorter])
@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("key", ["rows1", "parts1", "replicas1", "all1", "fused1"])
def test_a_box_that_is_not_where_it_should_be_is_named(key, rank, change):
    with pytest.raises(ValueError, match=f"^'{key}' of shape .* is not whole on the ranks of this job: "):
        planned(job_with_a_box(key, rank, change))


@pytest.mark.parametrize("key", ["rows1", "parts1", "fused1"])
def test_a_rank_that_has_nothing_of_what_it_should_hold_is_found(key):
    job = job_with_a_box(key, 0, lambda box: box)
    job.held[key][2][1] = []
    if key == "fused1":  # its replica has nothing either
        job.held[key][2][3] = []
    with pytest.raises(ValueError, match=f"'{key}' of shape .* elements are missing"):
        planned(job)


def with_another_kind(rank: int, **fields: Any) -> list[Told]:
    job = Job(3)
    job.spread("rows", (6, 3), [Shard(0)])
    job.replicated("weight", (4, 3))
    holdings = job.holdings()
    kinds = [kind._replace(**fields) if kind.key == "weight" else kind for kind in holdings[rank].kinds]
    holdings[rank] = Holding(kinds, holdings[rank].boxes)
    return told_by(holdings)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("fields", [{"dtype": "BF16"}, {"shape": (3, 4)}])
def test_a_tensor_that_is_of_another_kind_on_one_rank_is_named(rank, fields):
    with pytest.raises(ValueError, match="^'weight' is not the same on all ranks: .*F32 of "):
        make_plan(with_another_kind(rank, **fields))


def test_a_part_that_two_ranks_have_as_different_ones_is_refused():
    first, second = Box((0,), (2,), (0,)), Box((2,), (2,), (0,))
    job = Job(2)
    job.held["weight"] = "F32", (4,), {0: [first, second], 1: [second]}
    with pytest.raises(ValueError, match="'weight'.*overlap"):
        planned(job)
