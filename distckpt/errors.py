"""The errors of distckpt, drawn as a tree.

::

    DistckptError
    +-- RankFailure              work that all ranks shared failed on some of them; raised on every rank
    |   +-- SaveFailed           a save did not commit; what was committed before it is untouched
    +-- DirectoryInUse           another live process writes into the run's directory
    +-- Superseded               a newer attempt has taken the directory over; this process may save no more
    +-- RestoreError
        +-- NoCheckpoint         nothing that is committed and verifies is there
        +-- DamagedCheckpoint    its bytes are not those that were committed
        +-- NewerVersion         written by a newer distckpt than this one can read
        +-- StateMismatch        a checkpoint of something else: its keys or shapes are not those asked for

Arguments of the wrong type or value raise ``TypeError`` and ``ValueError`` as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping

# A message is for people to read, and thousands of ranks may fail.
_MOST_TOLD = 20


class DistckptError(Exception):
    """Everything that distckpt raises by itself."""


class RankFailure(DistckptError):
    """Work that all ranks shared failed on some of them. Every rank raises it, with the same words.

    Attributes:
        during: what the ranks were doing, e.g. ``"write of step-00000300"``.
        failures: what went wrong, by rank.
    """

    def __init__(self, during: str, failures: Mapping[int, str]) -> None:
        self.during = during
        self.failures = dict(failures)
        super().__init__(f"{during} failed: {by_rank(self.failures)}")

    def __reduce__(self) -> tuple[type[RankFailure], tuple[str, dict[int, str]]]:
        # Errors cross processes as pickles, which know how to make one of its message only.
        return type(self), (self.during, self.failures)


def by_rank(words: Mapping[int, str]) -> str:
    """What there is to say of some ranks, in one line."""
    told = [f"rank {rank}: {what}" for rank, what in sorted(words.items())]
    more = len(told) - _MOST_TOLD
    return "; ".join([*told[:_MOST_TOLD], *([f"and {more} more ranks"] if more > 0 else [])])


class SaveFailed(RankFailure):
    """A save did not commit. Everything committed before it is untouched, and training may go on."""


class DirectoryInUse(DistckptError):
    """Another live process writes into the run's directory."""


class Superseded(DistckptError):
    """A newer attempt has taken the run's directory over, so this process may save no more."""


class RestoreError(DistckptError):
    """A checkpoint was not restored."""


class NoCheckpoint(RestoreError):
    """Nothing that is committed and verifies is there."""


class DamagedCheckpoint(RestoreError):
    """The bytes on disk are not those that were committed, or never were a checkpoint."""


class NewerVersion(RestoreError):
    """The checkpoint was written by a newer distckpt than this one can read."""


class StateMismatch(RestoreError):
    """The checkpoint is of something else: its keys or shapes are not those asked for."""
