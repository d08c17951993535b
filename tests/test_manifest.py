from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt import strict_json
from distckpt.chunks import Grid
from distckpt.errors import DamagedCheckpoint, NewerVersion
from distckpt.manifest import VERSION, FileEntry, Manifest, Record, TensorGroup, digest
from distckpt.progress import Progress

RECORD = Record(
    name="step-00000300",
    progress=Progress(300, 2),
    format="full",
    world_size=2,
    reasons=("interval", "best"),
    created="2026-03-01T12:00:00.000+00:00",
    run="0123456789abcdef",
    attempt=3,
    serial=7,
    total_bytes=123_456,
    content_bytes=789,
    content_xxh3_128="0" * 32,
    metrics={"val/loss": 0.25},
)
MANIFEST = Manifest(
    progress=Progress(300, 2),
    format="full",
    world_size=2,
    reasons=("interval",),
    created="2026-03-01T12:00:00.000+00:00",
    run="0123456789abcdef",
    attempt=3,
    serial=7,
    files=(FileEntry("model.safetensors", 4096, "a" * 32), FileEntry("state.json", 2, "b" * 32)),
    tensors=(TensorGroup(("model.safetensors",), "F32", (4, 6), ("layer.weight", "head.weight")),),
    metrics={"val/loss": 0.25},
    seconds={"write": 0.5},
    environment={"torch": "2.13.0"},
    read_with="safetensors.torch.load_file('model.safetensors')",
)

count = st.integers(0, 2**62)
words = st.text(max_size=12)
numbers = st.dictionaries(words, st.floats(allow_nan=False, allow_infinity=False), max_size=2)
safe_names = st.from_regex(r"[a-z0-9_][a-z0-9._]{0,20}", fullmatch=True)
common = {
    "progress": st.builds(Progress, count, count),
    "format": words,
    "world_size": count,
    "reasons": st.lists(words, max_size=3).map(tuple),
    "created": words,
    "run": words,
    "attempt": count,
    "serial": count,
    "metrics": numbers,
}
records = st.builds(Record, name=words, total_bytes=count, content_bytes=count, content_xxh3_128=words, **common)


@st.composite
def groups(draw: st.DrawFn, paths: Sequence[str]) -> TensorGroup:
    """Tensors that are whole, in one file, or each in one of the checkpoint's."""
    keys = draw(st.lists(words, max_size=4))
    each = st.lists(st.sampled_from(paths), min_size=len(keys), max_size=len(keys)) if paths else st.nothing()
    files = draw(each if paths and len(keys) > 1 and draw(st.booleans()) else words.map(lambda one: [one]))
    shape = draw(st.lists(count, max_size=3))
    return TensorGroup(tuple(files), draw(words), tuple(shape), tuple(keys))


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    entries = st.builds(FileEntry, safe_names, count, words)
    files = draw(st.lists(entries, max_size=3, unique_by=lambda file: file.path))
    told = {name: draw(of) for name, of in common.items()}
    return Manifest(
        files=tuple(files),
        tensors=tuple(draw(st.lists(groups([one.path for one in files]), max_size=3))),
        seconds=draw(numbers),
        environment=draw(st.dictionaries(words, words, max_size=2)),
        read_with=draw(words),
        **told,
    )


def fields_of(data: bytes) -> dict:
    return json.loads(data)


def sealed(fields: dict) -> bytes:
    """A record of these fields whose own digest is right."""
    fields.pop("self_xxh3_128", None)
    return strict_json.dump(fields | {"self_xxh3_128": digest(strict_json.dump(fields))})


@settings(max_examples=50)
@given(records)
def test_a_record_is_read_back_as_it_was_written(record):
    assert Record.from_json(record.to_json(), "it") == record


@settings(max_examples=50)
@given(manifests())
def test_a_manifest_is_read_back_as_it_was_written(manifest):
    assert Manifest.from_json(manifest.to_json(), "it") == manifest


def test_of_each_tensor_it_is_known_in_which_files_it_lies():
    whole = TensorGroup(("a",), "F32", (2,), ("x", "y"))
    assert [*whole.files_of_each] == [("a",), ("a",)]
    assert [*replace(whole, files=("a", "b")).files_of_each] == [("a",), ("b",)]
    cut = Grid(("a", "b"), (2,), (range(2),))
    assert [*replace(whole, files=(), chunks=cut).files_of_each] == [("a", "b"), ("a", "b")]


@pytest.mark.parametrize("files", [[], [0], [0, 1, 0], [0, 2], [0, -1], [[0, 0, 2]], "ab", [0, 0.5], [0, None], None])
def test_tensors_that_lie_in_no_files_or_in_too_many_are_refused(files):
    fields = fields_of(MANIFEST.to_json())
    fields["tensors"] = [{"files": files, "dtype": "F32", "shape": [2], "keys": ["x", "y"]}]
    with pytest.raises(DamagedCheckpoint, match="^it"):
        Manifest.from_json(strict_json.dump(fields), "it")


def test_a_record_finds_each_bit_of_it_that_flipped():
    data = RECORD.to_json()
    for place in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            with pytest.raises(DamagedCheckpoint):
                Record.from_json(bytes(damaged), "it")


def test_a_record_finds_that_it_was_cut_at_any_byte():
    data = RECORD.to_json()
    for size in range(len(data)):
        with pytest.raises(DamagedCheckpoint, match="^it "):
            Record.from_json(data[:size], "it")


@pytest.mark.parametrize("whole", [RECORD, MANIFEST], ids=["record", "manifest"])
def test_what_a_newer_distckpt_wrote_is_refused_by_version(whole):
    data = replace(whole, version=VERSION + 1).to_json()
    with pytest.raises(NewerVersion, match=f"it has version {VERSION + 1}.*upgrade"):
        type(whole).from_json(data, "it")


def test_a_newer_version_is_told_before_anything_that_it_may_have_changed():
    with pytest.raises(NewerVersion):
        Record.from_json(b'{"version": 99, "name": ["all", "else", "is", "new"]}', "it")


@pytest.mark.parametrize("whole", [RECORD, MANIFEST], ids=["record", "manifest"])
def test_what_an_older_distckpt_wrote_is_read(whole):
    older = replace(whole, version=VERSION - 1)
    assert type(whole).from_json(older.to_json(), "it") == older


@pytest.mark.parametrize("field", [name for name in fields_of(RECORD.to_json()) if name != "self_xxh3_128"])
@pytest.mark.parametrize("value", [None, True, [[]], {"a": {}}])
def test_a_record_whose_field_is_something_else_is_damaged(field, value):
    with pytest.raises(DamagedCheckpoint, match="^it"):
        Record.from_json(sealed(fields_of(RECORD.to_json()) | {field: value}), "it")


@pytest.mark.parametrize("field", list(fields_of(MANIFEST.to_json())))
@pytest.mark.parametrize("value", [None, True, [[]], {"a": {}}])
def test_a_manifest_whose_field_is_something_else_is_damaged(field, value):
    with pytest.raises(DamagedCheckpoint, match="^it"):
        Manifest.from_json(strict_json.dump(fields_of(MANIFEST.to_json()) | {field: value}), "it")


@pytest.mark.parametrize(
    "change",
    [
        {"progress": {"step": -1, "epoch": 0}},
        {"progress": {"step": True, "epoch": 0}},
        {"progress": {"step": 1}},
        {"progress": {"step": 1, "epoch": 0, "batch": 2}},
        {"reasons": ["interval", 1]},
        {"metrics": {"a": "1"}},
        {"metrics": {"a": 10**400}},
        {"metrics": {"a": True}},
        {"world_size": -1},
        {"world_size": 1.0},
        {"attempt": -1},
        {"serial": -1},
    ],
    ids=str,
)
def test_what_no_checkpoint_can_have_is_damage_in_a_record_and_in_a_manifest(change):
    with pytest.raises(DamagedCheckpoint):
        Record.from_json(sealed(fields_of(RECORD.to_json()) | change), "it")
    with pytest.raises(DamagedCheckpoint):
        Manifest.from_json(strict_json.dump(fields_of(MANIFEST.to_json()) | change), "it")


@pytest.mark.parametrize("change", [{"total_bytes": -1}, {"content_bytes": -1}, {"content_bytes": 1.5}], ids=str)
def test_a_record_of_no_possible_size_is_damaged(change):
    with pytest.raises(DamagedCheckpoint):
        Record.from_json(sealed(fields_of(RECORD.to_json()) | change), "it")


@pytest.mark.parametrize(
    "file",
    [
        {"path": "../outside", "size_bytes": 1, "xxh3_128": ""},
        {"path": "/etc/passwd", "size_bytes": 1, "xxh3_128": ""},
        {"path": "a/b", "size_bytes": 1, "xxh3_128": ""},
        {"path": "", "size_bytes": 1, "xxh3_128": ""},
        {"path": "a\0", "size_bytes": 1, "xxh3_128": ""},
        {"path": "a", "size_bytes": -1, "xxh3_128": ""},
        {"path": "a", "size_bytes": True, "xxh3_128": ""},
        {"path": "a", "size_bytes": 1},
        {"path": "a", "size_bytes": 1, "xxh3_128": "", "more": 1},
        ["a", 1, ""],
    ],
    ids=str,
)
def test_a_file_that_cannot_be_is_refused(file):
    with pytest.raises(DamagedCheckpoint):
        Manifest.from_json(strict_json.dump(fields_of(MANIFEST.to_json()) | {"files": [file]}), "it")


@pytest.mark.parametrize("shape", [[-1], [True], [1.0], ["1"], [None], {}, "44"], ids=str)
def test_a_shape_that_cannot_be_is_refused(shape):
    tensor = {"file": "a", "key": "b", "dtype": "F32", "shape": shape}
    with pytest.raises(DamagedCheckpoint):
        Manifest.from_json(strict_json.dump(fields_of(MANIFEST.to_json()) | {"tensors": [tensor]}), "it")


def test_one_file_is_not_listed_twice():
    with pytest.raises(DamagedCheckpoint, match="state.json"):
        Manifest.from_json(replace(MANIFEST, files=MANIFEST.files + MANIFEST.files[1:]).to_json(), "it")


def test_what_a_record_learns_later_is_added_to_what_it_knew():
    told = RECORD.with_metrics({"acc": 0.5}).with_metrics({"acc": 0.75}, ("best", "last"))
    assert told.metrics == {"acc": 0.75, "val/loss": 0.25}
    assert told.reasons == ("interval", "best", "last")
    assert replace(told, metrics=RECORD.metrics, reasons=RECORD.reasons) == RECORD


def test_checkpoints_are_ordered_by_attempt_then_by_save_and_never_by_step_or_clock():
    older = replace(RECORD, attempt=1, serial=9, progress=Progress(900), created="2030-01-01")
    newer = replace(RECORD, attempt=2, serial=1, progress=Progress(100), created="2020-01-01")
    newest = replace(newer, serial=10)
    assert sorted([newest, newer, older], key=lambda record: record.order) == [older, newer, newest]


def test_the_size_of_a_checkpoint_is_that_of_its_files():
    assert MANIFEST.total_bytes == 4098
