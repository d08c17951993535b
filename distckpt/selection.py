"""Which of a checkpoint's contents are wanted, and how their keys are called here."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Selection:
    """The words ``only``, ``exclude`` and ``rename`` of a restore.

    Attributes:
        only, exclude: patterns, as in a shell, of parts (``"optimizer"``) or of keys in them (``"model.head.*"``).
        rename: regular expressions for keys of modules in the checkpoint, and what replaces them. Parameters that
            optimizers know by name are called likewise.
    """

    only: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    rename: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, only: object, exclude: object, rename: object) -> Selection:
        """The user's words, checked.

        Raises:
            TypeError, ValueError: naming the word.
        """
        wanted = _patterns(only, "only")
        names = {} if rename is None else rename
        if not isinstance(names, Mapping) or not all(isinstance(one, str) for pair in names.items() for one in pair):
            raise TypeError(f"rename should be a dict of regular expressions and replacements, is {rename!r}")
        for pattern, replacement in names.items():
            try:
                re.sub(pattern, replacement, "")
            except (re.error, IndexError) as error:  # IndexError: a group that is not there
                raise ValueError(
                    f"rename: {pattern!r} is no regular expression, or {replacement!r} no replacement for it: {error}"
                ) from error
        return cls(wanted, _patterns(exclude, "exclude") or (), dict(names))

    def takes_part(self, part: str) -> bool:
        """Whether anything of that part is wanted."""
        if any(fnmatch.fnmatchcase(part, pattern) for pattern in self.exclude):
            return False
        return self.only is None or any(
            fnmatch.fnmatchcase(part, pattern) or pattern.startswith(f"{part}.") for pattern in self.only
        )

    def takes(self, part: str, key: str) -> bool:
        """Whether that key of that part is wanted."""
        if self.only is None and not self.exclude:
            return True
        if any(fnmatch.fnmatchcase(f"{part}.{key}", pattern) for pattern in self.exclude):
            return False
        return self.only is None or any(
            fnmatch.fnmatchcase(part, pattern) or fnmatch.fnmatchcase(f"{part}.{key}", pattern) for pattern in self.only
        )

    def word_for_keys_of(self, part: str) -> str | None:
        """The word, ``only`` or ``exclude``, that names single keys of that part; ``None`` where neither does."""
        for word, patterns in (("only", self.only or ()), ("exclude", self.exclude)):
            if any(pattern.startswith(f"{part}.") for pattern in patterns):
                return word
        return None

    def renamed(self, key: str) -> str:
        """What the key of a module in the checkpoint is called here."""
        for pattern, replacement in self.rename.items():
            key = re.sub(pattern, replacement, key)
        return key


def _patterns(value: object, word: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, Collection) or not all(isinstance(one, str) for one in listed):
        raise TypeError(f"{word} should be a name or a list of names, is {value!r}")
    return tuple(listed)
