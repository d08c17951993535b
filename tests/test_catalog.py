from __future__ import annotations

import errno
import os
from dataclasses import replace

import pytest

from distckpt import layout, strict_json
from distckpt.attempt import Attempt, Holder
from distckpt.catalog import Catalog, Draft, read_manifest, read_record, refuse_newer, scan
from distckpt.errors import DamagedCheckpoint, NewerVersion, Superseded
from distckpt.manifest import VERSION, FileEntry, Manifest, Record, digest
from distckpt.progress import Progress
from distckpt.stores import spares
from distckpt.stores.local import LocalStore
from distckpt.testing import FaultyStore

HOLDER = Holder("here", 11, "2026-03-01T12:00:00+00:00")
DATA = b"tensors"
LARGE = DATA * 1000


@pytest.fixture
def store(tmp_path) -> LocalStore:
    return LocalStore(tmp_path)


@pytest.fixture
def catalog(store) -> Catalog:
    return open_catalog(store)


def open_catalog(store) -> Catalog:
    """The catalog of a new attempt: the one before is superseded."""
    return Catalog(store, Attempt.start(store, HOLDER))


def write(store, draft: Draft, step: int, data: bytes = DATA) -> Manifest:
    """A checkpoint's data are in the draft, durable; the manifest that says so."""
    path = f"{draft.path}/data" if draft.is_folder else draft.path
    with store.create(path) as sink:
        sink.write(data)
    entry = FileEntry("data" if draft.is_folder else draft.name, len(data), digest(data))
    return Manifest(Progress(step), "full", 1, ("interval",), "", "", 0, 0, (entry,), metrics={"loss": float(step)})


def save(catalog: Catalog, step: int, file_name: str | None = None, data: bytes = DATA) -> Record:
    draft = catalog.begin(Progress(step), file_name)
    return catalog.commit(draft, write(catalog.store, draft, step, data))


def committed(store) -> list[str]:
    return [record.name for record in scan(store).records]


def verify(store) -> None:
    """All that is recorded is whole, and every record can be read."""
    listing = scan(store)
    assert not listing.unreadable
    for record in listing.records:
        for file in read_manifest(store, record).files:
            path = record.name if file.path == record.name else f"{record.name}/{file.path}"
            assert digest(store.read(path)) == file.xxh3_128


def names(store) -> list[str]:
    """What lies in the directory beside the run's own files."""
    own = {layout.RUN, layout.LOCK}
    return [name for name in store.list() if name not in own and layout.parse_attempt(name) is None]


def everything(store) -> dict[str, tuple]:
    """Each file by what would show that it was touched."""
    files = (path for path in store.root.rglob("*") if path.is_file() and path.name != layout.LOCK)
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size) for path in files}


# Exists if and only if the record does


def test_a_checkpoint_is_there_from_its_record_on_and_not_before(catalog, store):
    draft = catalog.begin(Progress(3))
    manifest = write(store, draft, 3)
    assert committed(store) == []
    record = catalog.commit(draft, manifest)
    assert scan(store).records == [record] and record.progress == Progress(3)
    assert read_manifest(store, record).files == manifest.files


def test_a_checkpoint_is_not_there_without_its_record(catalog, store):
    record = save(catalog, 3)
    store.delete(layout.record_of(record.name))
    assert committed(store) == [] and store.exists(record.name)
    with pytest.raises(FileNotFoundError):
        read_record(store, record.name)


def test_a_record_says_whose_save_it_was_and_the_how_manieth(catalog, store):
    save(catalog, 3)
    save(open_catalog(store), 1)
    first, second = scan(store).records
    assert (first.run, first.attempt, first.serial) == (catalog.attempt.run, 1, 1)
    assert (second.run, second.attempt, second.serial) == (catalog.attempt.run, 2, 1)
    assert read_manifest(store, second).attempt == 2 and second.created.endswith("+00:00")


def test_checkpoints_are_listed_from_the_oldest_save_to_the_newest(catalog, store):
    for step in (9, 2, 100):
        save(catalog, step)
    save(open_catalog(store), 1)
    assert [record.progress.step for record in scan(store).records] == [9, 2, 100, 1]


# Places


def test_a_folder_without_a_record_is_never_written_into_again(catalog, store):
    first, second = catalog.begin(Progress(3)), catalog.begin(Progress(3))
    assert [first.name, second.name] == ["step-00000003", "step-00000003.2"]
    write(store, second, 3)
    assert store.list(first.path) == [layout.CLAIM]


def test_a_committed_step_is_never_written_again(catalog, store):
    save(catalog, 3)
    before = {path: state for path, state in everything(store).items() if "step-" in path}
    assert save(open_catalog(store), 3).name == "step-00000003.2"
    assert save(open_catalog(store), 3).name == "step-00000003.3"
    assert before.items() <= everything(store).items()


def test_a_name_whose_folder_was_lost_is_still_taken_by_its_record(catalog, store):
    record = save(catalog, 3)
    store.delete_folder(record.name)
    assert catalog.begin(Progress(3)).name == "step-00000003.2"


def test_a_name_that_a_file_has_is_taken(catalog, store):
    store.put("step-00000003", b"what is it?")
    assert catalog.begin(Progress(3)).name == "step-00000003.2"


def test_drafts_of_one_file_are_apart_and_no_name_of_a_checkpoint(catalog, store):
    drafts = [catalog.begin(Progress(3), "epoch_1.pth") for _ in range(2)]
    assert drafts[0].path != drafts[1].path and {draft.name for draft in drafts} == {"epoch_1.pth"}
    assert all(draft.path.startswith(layout.DRAFT_PREFIX) for draft in drafts)


# The order of calls


@pytest.fixture
def counted(store) -> FaultyStore:
    return FaultyStore(store)


def test_what_a_commit_does_is_in_the_order_that_outlives_a_power_cut(counted):
    catalog = open_catalog(counted)
    counted.operations.clear()
    save(catalog, 3)
    assert counted.operations == [
        *("make_folder step-00000003", "publish step-00000003/claim.json"),
        "create step-00000003/data",
        *("publish step-00000003/manifest.json", "settle step-00000003", "settle"),
        "publish step-00000003.committed",
    ]


def test_what_a_commit_of_one_file_does_is_in_that_order_too(counted):
    catalog = open_catalog(counted)
    save(catalog, 3, "last.pth")
    counted.operations.clear()
    save(catalog, 4, "last.pth")
    create, forget, settle, move, *rest = counted.operations
    assert create.startswith("create .draft-last.pth-") and move == create.replace("create", "move")
    assert [forget, settle, *rest] == ["delete last.pth.committed", "settle", "settle", "publish last.pth.committed"]


def test_a_deletion_ends_the_record_durably_before_it_touches_what_the_record_named(counted):
    catalog = open_catalog(counted)
    record = save(catalog, 3)
    counted.operations.clear()
    catalog.delete(record)
    *before, last = counted.operations
    assert before[:3] == ["delete step-00000003.committed", "settle", "move step-00000003"]
    assert last.startswith("recycle_folder .trash-step-00000003-")
    assert names(counted) == []


def test_a_deletion_of_one_file_is_in_that_order_too(counted):
    catalog = open_catalog(counted)
    record = save(catalog, 3, "last.pth")
    counted.operations.clear()
    catalog.delete(record)
    trash = ".trash-last.pth.committed"
    assert counted.operations == [
        *("move last.pth.committed", "settle", "delete last.pth", "settle", f"delete {trash}"),
    ]
    assert names(counted) == []


def test_only_what_was_committed_and_deleted_is_recycled(counted):
    catalog = open_catalog(counted)
    catalog.begin(Progress(3))
    catalog.abandon(catalog.begin(Progress(4)))
    counted.make_folder(".trash-step-00000009-0a0b0c0d")
    catalog.sweep()
    told = [operation for operation in counted.operations if "_folder .trash" in operation]
    assert names(counted) == [] and [one.split("-")[0] for one in told].count("delete_folder .trash") == 3
    assert not [operation for operation in counted.operations if operation.startswith("recycle_folder")]


def interrupted(tmp_path, work):
    """The stores after ``work(catalog)``, once for each of its operations, which fails; from a fresh directory each."""
    for moment in range(40):
        root = tmp_path / str(moment)
        root.mkdir()
        catalog = open_catalog(LocalStore(root))
        work.prepare(catalog)
        catalog.store = FaultyStore(catalog.store, fail_at=moment)
        try:
            work.go(catalog)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            yield LocalStore(root)
        else:
            return
    raise AssertionError("it never ended")


class Saving:
    prepare = staticmethod(lambda catalog: save(catalog, 1))
    go = staticmethod(lambda catalog: save(catalog, 2))


class SavingOneFile:
    prepare = staticmethod(lambda catalog: save(catalog, 1, "epoch_1.pth"))
    go = staticmethod(lambda catalog: save(catalog, 2, "epoch_2.pth"))


class Deleting:
    @staticmethod
    def prepare(catalog):
        save(catalog, 1)
        save(catalog, 2)

    go = staticmethod(lambda catalog: catalog.delete(scan(catalog.store).records[1]))


class Relabelling:
    prepare = staticmethod(lambda catalog: save(catalog, 1))
    go = staticmethod(lambda catalog: catalog.relabel(scan(catalog.store).records[0].with_metrics({"acc": 1.0})))


class Aliasing:
    @staticmethod
    def prepare(catalog):
        save(catalog, 1, "epoch_1.pth")
        catalog.alias(save(catalog, 2, "epoch_2.pth"), "best.pth", reasons=("best",), metrics={})

    go = staticmethod(lambda catalog: catalog.alias(scan(catalog.store).records[0], "best.pth", reasons=(), metrics={}))


class Sweeping:
    @staticmethod
    def prepare(catalog):
        save(catalog, 1)
        for step in (2, 3):
            write(catalog.store, catalog.begin(Progress(step)), step)
        write(catalog.store, catalog.begin(Progress(4), "epoch_4.pth"), 4)

    go = staticmethod(lambda catalog: catalog.sweep())


@pytest.mark.parametrize("work", [Saving, SavingOneFile, Deleting, Relabelling, Aliasing, Sweeping])
def test_whatever_operation_fails_what_was_committed_is_whole_and_the_next_attempt_cleans_up(tmp_path, work):
    count = 0
    for store in interrupted(tmp_path, work):
        count += 1
        verify(store)
        assert scan(store).records[0].progress == Progress(1)
        again = open_catalog(store)
        save(again, 5)
        again.sweep()
        verify(store)
        left = {name for name in names(store) if layout.record_of(name) not in names(store)}
        # A file whose record is missing counts as one that somebody else put there.
        assert left <= {*map(layout.record_of, committed(store)), "epoch_2.pth", "best.pth"}
    assert count >= {Relabelling: 1, Aliasing: 3, Saving: 6}.get(work, 3)


# Labels


def test_a_new_label_changes_the_record_and_nothing_else(catalog, store):
    record = save(catalog, 3)
    before = everything(store)
    catalog.relabel(record.with_metrics({"acc": 0.5}, ("best",)))
    (now,) = scan(store).records
    assert now.metrics == {"loss": 3.0, "acc": 0.5} and now.reasons == ("interval", "best")
    changed = {path for path, state in everything(store).items() if before.get(path) != state}
    assert changed == {str(store.root / "step-00000003.committed")}


def test_a_label_that_comes_too_late_does_not_bring_a_deleted_checkpoint_back(catalog, store):
    record = save(catalog, 3)
    catalog.delete(record)
    catalog.relabel(record.with_metrics({"acc": 0.5}))
    assert names(store) == []


def test_an_alias_is_a_checkpoint_of_its_own_over_the_same_bytes(catalog, store):
    record = save(catalog, 3, "epoch_1.pth")
    alias = catalog.alias(record, "best.pth", reasons=("best",), metrics={"acc": 0.5})
    assert alias == replace(
        record, name="best.pth", reasons=("best",), metrics={"loss": 3.0, "acc": 0.5}, serial=record.serial + 1
    )
    assert (store.root / "best.pth").samefile(store.root / "epoch_1.pth")
    catalog.delete(record)
    assert committed(store) == ["best.pth"]
    verify(store)


def test_an_alias_replaces_the_checkpoint_that_had_its_name(catalog, store):
    older = catalog.alias(save(catalog, 3, "epoch_1.pth"), "best.pth", reasons=("best",), metrics={})
    newer = catalog.alias(save(catalog, 4, "epoch_2.pth"), "best.pth", reasons=("best",), metrics={})
    assert committed(store) == ["epoch_1.pth", "epoch_2.pth", "best.pth"]
    assert older.progress.step == 3 and read_record(store, "best.pth") == newer
    verify(store)


# Giving up


def test_an_abandoned_draft_leaves_nothing(catalog, store):
    for file_name in (None, "epoch_1.pth"):
        draft = catalog.begin(Progress(3), file_name)
        write(store, draft, 3)
        catalog.abandon(draft)
    assert names(store) == []


def test_a_draft_that_was_committed_after_all_is_not_abandoned(catalog, store):
    draft = catalog.begin(Progress(3))
    catalog.commit(draft, write(store, draft, 3))
    catalog.abandon(draft)
    assert committed(store) == ["step-00000003"]
    verify(store)


def test_a_file_that_was_committed_after_all_is_not_abandoned(catalog, store):
    draft = catalog.begin(Progress(3), "epoch_1.pth")
    catalog.commit(draft, write(store, draft, 3))
    catalog.abandon(draft)
    assert committed(store) == ["epoch_1.pth"]
    verify(store)


# Sweeping


def test_a_sweep_takes_what_saves_of_this_run_left_and_nothing_else(catalog, store):
    save(catalog, 1)
    write(store, catalog.begin(Progress(2)), 2)
    again = open_catalog(store)
    kept = save(again, 3)
    write(store, again.begin(Progress(3)), 3)
    write(store, again.begin(Progress(4), "epoch_4.pth"), 4)
    store.make_folder(".trash-step-00000009-0a0b0c0d")
    store.put(".spare-data-0a0b0c0d", b"of a process that was killed")
    swept = again.sweep()
    left = [".draft-epoch_4.pth", ".spare-data", ".trash-step", "step-00000002", "step-00000003.2"]
    assert sorted(map(short, swept)) == left
    assert names(store) == ["step-00000001", "step-00000001.committed", kept.name, layout.record_of(kept.name)]
    verify(store)


def short(name: str) -> str:
    return "-".join(name.split("-")[:2])


@pytest.fixture
def recycling(scratch, monkeypatch) -> Catalog:
    """Of a store that keeps files to be written over, if they are as large as this."""
    monkeypatch.setattr(spares, "LEAST_BYTES", len(LARGE))
    return open_catalog(LocalStore(scratch, recycles=True))


def test_a_sweep_leaves_what_this_process_will_write_over_and_the_next_attempt_takes_it(recycling):
    recycling.delete(save(recycling, 1, data=LARGE))
    (spare,) = recycling.store.root.glob(".spare-*")
    inode = spare.stat().st_ino
    assert recycling.sweep() == []
    record = save(recycling, 2, data=LARGE)
    assert (recycling.store.root / record.name / "data").stat().st_ino == inode
    recycling.delete(record)
    other = LocalStore(recycling.store.root, recycles=True)
    assert [short(name) for name in open_catalog(other).sweep()] == [".spare-data"] and names(other) == []


def test_a_save_whose_spare_a_newer_attempt_has_swept_writes_a_new_file(recycling):
    store = recycling.store
    recycling.delete(save(recycling, 1, data=LARGE))
    draft = recycling.begin(Progress(2))
    newer = open_catalog(LocalStore(store.root))
    assert [short(name) for name in newer.sweep()] == [".spare-data", "step-00000002"]
    store.make_folder(draft.path)
    write(store, draft, 2, LARGE)
    assert names(newer.store) == [draft.name] and store.read(f"{draft.path}/data") == LARGE


def test_a_folder_that_was_killed_before_it_had_its_claim_is_swept(catalog, store):
    store.make_folder("step-00000002")
    store.make_folder("step-00000003")
    store.put("step-00000003/.draft-claim.json-0a0b0c0d", b"")
    catalog.sweep()
    assert names(store) == []


def claim(**fields):
    return strict_json.dump({"run": "another", "attempt": 1, "since": ""} | fields)


@pytest.mark.parametrize(
    "inside",
    [
        {"model.safetensors": b"copied in by hand"},
        {"data": b"", "claim.json": claim()},
        {"data": b"", "claim.json": b"{"},
        {"data": b"", "claim.json": b"[" * 100_000},
        {"data": b"", "claim.json": b'{"run": true, "attempt": true}'},
    ],
)
def test_a_folder_that_this_run_did_not_claim_is_left_alone(catalog, store, inside):
    store.make_folder("step-00000007")
    for name, data in inside.items():
        store.put(f"step-00000007/{name}", data)
    before = everything(store)
    assert catalog.sweep() == []
    assert everything(store) == before


@pytest.mark.parametrize("attempt", [True, 99, "1", None])
def test_a_folder_of_this_run_with_an_attempt_that_never_was_is_left_alone(catalog, store, attempt):
    store.make_folder("step-00000007")
    store.put("step-00000007/claim.json", claim(run=catalog.attempt.run, attempt=attempt))
    assert catalog.sweep() == []


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["file", "fifo", "folder with a fifo", "dangling link"])
def test_what_is_no_folder_of_a_checkpoint_neither_stops_a_sweep_nor_is_swept(catalog, store, kind):
    place = store.root / "step-00000007"
    match kind:
        case "file":
            place.write_bytes(b"")
        case "fifo":
            os.mkfifo(place)
        case "folder with a fifo":
            place.mkdir()
            os.mkfifo(place / layout.CLAIM)
        case _:
            place.symlink_to("nowhere")
    write(store, catalog.begin(Progress(3)), 3)
    catalog.sweep()
    assert [name for name in names(store) if name != "step-00000007"] == []
    assert kind == "dangling link" or names(store) == ["step-00000007"]


def test_a_sweep_does_not_follow_a_link_out_of_the_directory(catalog, store, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / layout.CLAIM).write_bytes(claim(run=catalog.attempt.run))
    (store.root / "step-00000007").symlink_to(outside)
    (store.root / ".trash-step-00000008-0a0b0c0d").symlink_to(outside)
    catalog.sweep()
    assert names(store) == [] and (outside / layout.CLAIM).exists()


# Records that cannot be read


def corrupt(store, record: Record, how: str) -> None:
    place = store.root / layout.record_of(record.name)
    data = place.read_bytes()
    match how:
        case "a flipped bit":
            place.write_bytes(data[:20] + bytes([data[20] ^ 1]) + data[21:])
        case "cut":
            place.write_bytes(data[: len(data) // 2])
        case "empty":
            place.write_bytes(b"")
        case "of another":
            place.write_bytes(replace(record, name="step-00000099").to_json())
        case "a folder":
            place.unlink()
            place.mkdir()
        case "a fifo":
            place.unlink()
            os.mkfifo(place)
        case "a link":
            place.rename(store.root / "elsewhere")
            place.symlink_to("elsewhere")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("how", ["a flipped bit", "cut", "empty", "of another", "a folder", "a fifo", "a link"])
def test_a_damaged_record_is_told_and_hides_no_other(catalog, store, how):
    records = [save(catalog, step) for step in (1, 2, 3)]
    corrupt(store, records[1], how)
    listing = scan(store)
    assert listing.records == [records[0], records[2]]
    assert list(listing.unreadable) == ["step-00000002"]
    assert "step-00000002.committed" in str(listing.unreadable["step-00000002"])
    refuse_newer(listing)
    with pytest.raises(DamagedCheckpoint):
        read_record(store, "step-00000002")


def test_the_folder_of_a_damaged_record_is_left_for_inspection(catalog, store):
    corrupt(store, save(catalog, 1), "a flipped bit")
    assert catalog.sweep() == [] and store.exists("step-00000001/data")
    assert catalog.begin(Progress(1)).name == "step-00000001.2"


def test_a_record_of_a_newer_version_is_refused_by_name(catalog, store):
    record = save(catalog, 1)
    save(catalog, 2)
    store.put(layout.record_of(record.name), replace(record, version=VERSION + 1).to_json())
    listing = scan(store)
    assert [one.name for one in listing.records] == ["step-00000002"]
    with pytest.raises(NewerVersion, match="step-00000001.committed has version"):
        refuse_newer(listing)


def test_a_record_that_goes_while_records_are_read_is_no_damage(catalog, store):
    for step in (1, 2):
        save(catalog, step)

    class Racing(LocalStore):
        def read(self, path):
            self.delete("step-00000001.committed")
            return super().read(path)

    listing = scan(Racing(store.root))
    assert [record.name for record in listing.records] == ["step-00000002"] and not listing.unreadable


def test_a_disk_that_cannot_be_read_now_is_an_error_and_no_damage(catalog, store):
    record = save(catalog, 1)

    class Stale(LocalStore):
        def read(self, path):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)

    for read in (lambda: scan(Stale(store.root)), lambda: read_manifest(Stale(store.root), record)):
        with pytest.raises(OSError) as raised:
            read()
        assert raised.value.errno == errno.ESTALE


def test_a_manifest_that_is_not_the_committed_one_is_found(catalog, store):
    record = save(catalog, 1)
    other = save(catalog, 2)
    store.put("step-00000001/manifest.json", store.read("step-00000002/manifest.json"))
    with pytest.raises(DamagedCheckpoint, match="step-00000001/manifest.json is not the one that was committed"):
        read_manifest(store, record)
    assert read_manifest(store, other).progress == Progress(2)
    store.delete("step-00000001/manifest.json")
    with pytest.raises(DamagedCheckpoint, match="step-00000001/manifest.json cannot be read"):
        read_manifest(store, record)


# An attempt that was succeeded


def superseded(store) -> tuple[Catalog, Record, Draft, Manifest]:
    """The catalog of an attempt that stopped in the middle of a save, while a newer one took over and saved."""
    catalog = open_catalog(store)
    record = save(catalog, 1)
    draft = catalog.begin(Progress(2))
    manifest = write(store, draft, 2)
    newer = open_catalog(store)
    save(newer, 2)
    return catalog, record, draft, manifest


@pytest.mark.parametrize(
    "work",
    [
        lambda catalog, record, draft, manifest: catalog.begin(Progress(5)),
        lambda catalog, record, draft, manifest: catalog.begin(Progress(5), "epoch_5.pth"),
        lambda catalog, record, draft, manifest: catalog.commit(draft, manifest),
        lambda catalog, record, draft, manifest: catalog.delete(record),
        lambda catalog, record, draft, manifest: catalog.relabel(record),
        lambda catalog, record, draft, manifest: catalog.alias(record, "best.pth", reasons=(), metrics={}),
        lambda catalog, record, draft, manifest: catalog.abandon(draft),
        lambda catalog, record, draft, manifest: catalog.sweep(),
    ],
    ids=["begin", "begin a file", "commit", "delete", "relabel", "alias", "abandon", "sweep"],
)
def test_an_attempt_that_was_succeeded_changes_nothing_more(store, work):
    catalog, *rest = superseded(store)
    before = everything(store)
    with pytest.raises(Superseded, match="attempt 2 .*has taken over from attempt 1"):
        work(catalog, *rest)
    assert everything(store) == before


def test_an_attempt_that_is_succeeded_while_it_commits_publishes_nothing(store):
    class Overtaken(LocalStore):
        def settle(self, folder=""):
            super().settle(folder)
            if not folder:
                open_catalog(LocalStore(self.root))

    catalog = open_catalog(store)
    catalog.store = Overtaken(store.root)
    draft = catalog.begin(Progress(2))
    with pytest.raises(Superseded):
        catalog.commit(draft, write(store, draft, 2))
    assert committed(store) == []


@pytest.mark.parametrize("work", ["commit", "abandon"])
def test_an_attempt_that_was_succeeded_leaves_a_checkpoint_alone_that_has_the_name_of_its_draft(store, work):
    catalog, _, draft, manifest = superseded(store)
    newer = open_catalog(store)
    newer.sweep()
    assert not store.exists(draft.path)
    assert save(newer, 2).name == draft.name
    before = everything(store)
    with pytest.raises(Superseded):
        catalog.commit(draft, manifest) if work == "commit" else catalog.abandon(draft)
    with pytest.raises(FileExistsError):
        write(store, draft, 2)
    assert everything(store) == before
    verify(store)


def test_an_attempt_that_looked_before_it_was_succeeded_still_overwrites_nothing(store, monkeypatch):
    catalog, _, draft, manifest = superseded(store)
    newer = open_catalog(store)
    newer.sweep()
    save(newer, 2)
    before = everything(store)
    monkeypatch.setattr(Attempt, "check", lambda self: None)
    with pytest.raises(FileExistsError):
        catalog.commit(draft, manifest)
    assert everything(store) == before
    verify(store)
