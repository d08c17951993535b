"""Every name that distckpt gives to something on disk, and the one parser of each."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

RECORD_SUFFIX = ".committed"
MANIFEST = "manifest.json"
STATE = "state.json"
CLAIM = "claim.json"
RUN = "run.json"
EVENTS = "events.jsonl"
LOCK = ".lock"
LATEST = "latest"
COPIES = "copies.json"
LAST_CHECKPOINT = "last_checkpoint"  # of MMEngine: one line, the path of the file to resume from

# What makes a model of weights, for those who export them: config and tokenizer, as Hugging Face has them.
PRETRAINED = "pretrained"

# Control files: whoever makes one asks the run for something; it is removed when obeyed.
SAVE = "SAVE"
STOP = "STOP"

# Names that begin so are never read as anything: a draft is not whole yet, trash is being deleted, and spares are what
# is left of it to be written over.
DRAFT_PREFIX = ".draft-"
TRASH_PREFIX = ".trash-"
SPARE_PREFIX = ".spare-"

# What is being exported, wherever that is, and what it replaces: they are no run's, so no run takes them for drafts of
# its own and deletes them.
EXPORT_PREFIX = ".export-"
REPLACED_PREFIX = ".replaced-"

_BEST = "best_"
_STEP = re.compile(r"step-([0-9]{8,18})(?:\.([0-9]{1,9}))?")
_ATTEMPT = re.compile(r"\.attempt-([0-9]{8,18})")
_EXPORT = re.compile(r"\.export-.*-([0-9a-f]{8})-[0-9a-f]{8}", re.DOTALL)
_SHARD = re.compile(r"rank-([0-9]{5,9})(?:\.[1-9][0-9]*)?\.safetensors")
_SAFE = re.compile(r"[A-Za-z0-9_+=@,-][A-Za-z0-9._+=@, -]{0,199}")


@dataclass(frozen=True, order=True)
class StepName:
    """The folder of a checkpoint: ``step-00012000``, or ``step-00012000.2`` where that name is taken.

    A name is taken by what was saved at the same step in an earlier attempt, or by what a killed save left:
    a folder is never written into by two saves.
    """

    step: int
    take: int = 1

    def __str__(self) -> str:
        return f"step-{self.step:08d}" + (f".{self.take}" if self.take > 1 else "")

    @classmethod
    def parse(cls, name: str) -> StepName | None:
        """The inverse of ``str``; ``None`` for every other name."""
        match = _STEP.fullmatch(name)
        if match is None:
            return None
        parsed = cls(int(match[1]), int(match[2] or 1))
        return parsed if str(parsed) == name else None


def record_of(name: str) -> str:
    """The record that makes the folder or file ``name`` a checkpoint. That of a `best_file` is hidden: who looks for
    what begins as those do, as MMEngine's users may, finds them alone."""
    return ("." if name.startswith(_BEST) else "") + name + RECORD_SUFFIX


def recorded_by(record: str) -> str | None:
    """The inverse of `record_of`; ``None`` for a name that is no record's."""
    name = record.removesuffix(RECORD_SUFFIX).removeprefix(".")
    return name if record_of(name) == record and is_safe(name) else None


def attempt_file(attempt: int) -> str:
    """The file whose existence says that the run was started for the ``attempt``-th time."""
    return f".attempt-{attempt:08d}"


def parse_attempt(name: str) -> int | None:
    """The inverse of `attempt_file`; ``None`` for every other name."""
    match = _ATTEMPT.fullmatch(name)
    if match is None:
        return None
    attempt = int(match[1])
    return attempt if attempt_file(attempt) == name else None


def part_file(part: str) -> str:
    """The tensors of one part of the state, in the full format."""
    return f"{part}.safetensors"


def rank_file(rank: int) -> str:
    """What belongs to one rank alone and is no tensor."""
    return f"rank-{rank:05d}.json"


def rank_tensors(rank: int) -> str:
    """The tensors that belong to one rank alone."""
    return f"rank-{rank:05d}.safetensors"


def shard_file(rank: int, nth: int = 0) -> str:
    """The tensors that one rank writes, in the sharded format. A file holds one box of a tensor: further ones go to
    further files."""
    return f"rank-{rank:05d}.{nth}.safetensors" if nth else rank_tensors(rank)


def rank_of(file: str) -> int | None:
    """The rank whose `shard_file` that is."""
    match = _SHARD.fullmatch(file)
    return int(match[1]) if match else None


def rank_state(rank: int) -> str:
    """What one rank knows of the job's state, where it is not what the leader knows."""
    return f"rank-{rank:05d}.state.json"


def rank_states(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are a `rank_state`."""
    return [name for name in names if name.endswith(".state.json")]


def own_key(rank: int, part: str, key: str) -> str:
    """The key of a tensor that belongs to one rank alone, among those of all ranks."""
    return f"rank-{rank:05d}.{part}.{key}"


def digests_file(file: str) -> str:
    """The digests of the blocks of ``file``."""
    return f"{file.removesuffix('.safetensors')}.digests.json"


def best_label(metric: str) -> str:
    """The label of the best checkpoint by ``metric``: ``val/loss`` gives ``best-val_loss``."""
    return "best-" + re.sub(r"[^A-Za-z0-9._+=@-]", "_", metric)


def best_file(metric: str, name: str) -> str:
    """What the file ``name`` is also called when it is the best by ``metric``, as MMEngine does:
    ``best_coco_bbox_mAP_epoch_3.pth``."""
    return f"{best_prefix(metric)}{name}"


def best_prefix(metric: str) -> str:
    """How each `best_file` of ``metric`` begins."""
    return _BEST + best_label(metric).removeprefix("best-") + "_"


def is_best_file(name: str) -> bool:
    """Whether that is a `best_file`, of whatever metric."""
    return name.startswith(_BEST)


def published_file(name: str, sha256: str) -> str:
    """The published form of the file ``name``, as ``torch.hub`` checks it: ``epoch_3-0a1b2c3d.pth``."""
    return f"{name.rpartition('.')[0] or name}-{sha256[:8]}.pth"


def export_draft(name: str, domain: str, nonce: str) -> str:
    """What will be called ``name``, while it is being exported. The others are of 8 hex digits: the ``domain`` says
    where one can see whether that still goes on."""
    return f"{EXPORT_PREFIX}{name[:50]}-{domain}-{nonce}"


def domain_of_export(draft: str) -> str | None:
    """The domain in an `export_draft`; ``None`` for every other name."""
    match = _EXPORT.fullmatch(draft)
    return match[1] if match else None


def replaced(name: str) -> str:
    """What was called ``name``, while something else comes to be called so."""
    return f"{REPLACED_PREFIX}{name}"


def is_safe(name: str) -> bool:
    """Whether ``name`` is one plain path component that no shell, file system or reader trips over."""
    return _SAFE.fullmatch(name) is not None and not name.endswith(" ")
