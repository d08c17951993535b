"""The processes of a benchmark: what they answer, how they fail, and that none is left behind."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import one_contender
import pytest
from contenders import REFERENCE
from running import ContenderAbsent, ContenderFailed, Running, batches, without_folders

PREFIX = """
import json, os, subprocess, sys
def answer(**told): print(json.dumps(told), flush=True)
"""


@contextmanager
def process(folder: Path, script: str) -> Iterator[Running]:
    (folder / "script.py").write_text(PREFIX + script)
    with Running("one", folder / "one", folder / "script.py") as one:
        yield one


def test_it_answers_to_each_line_and_ends_with_its_input(tmp_path: Path) -> None:
    script = "for line in sys.stdin: answer(heard=json.loads(line), heap=os.environ['MALLOC_MMAP_MAX_'])"
    with process(tmp_path, script) as one:
        assert one.ask(do="turn", before=1) == {"heard": {"do": "turn", "before": 1}, "heap": "0"}
        assert one.ask(do="alone")["heard"] == {"do": "alone"}
        one.close()


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        ("answer(failed='OSError: /a/b/c.pt is full')", ContenderFailed, "OSError: c.pt is full"),
        ("answer(absent='it is not installed')", ContenderAbsent, "it is not installed"),
        ("print('no memory', file=sys.stderr); os._exit(3)", ContenderFailed, "ended with 3: no memory"),
        ("os._exit(3)", ContenderFailed, "ended with 3: no word"),
    ],
)
def test_a_failure_is_told_in_its_own_words(
    script: str, kind: type[ContenderFailed], words: str, tmp_path: Path
) -> None:
    with process(tmp_path, script) as one:
        with pytest.raises(ContenderFailed) as failed:
            one.answer()
        assert type(failed.value) is kind and str(failed.value) == words


def test_one_that_is_gone_when_it_is_asked_failed(tmp_path: Path) -> None:
    with process(tmp_path, "answer(about='me'); sys.exit('gone')") as one:
        one.answer()
        with pytest.raises(ContenderFailed, match="ended with 1: gone"):
            one.ask(do="turn")


def test_one_that_fails_when_it_is_closed_failed(tmp_path: Path) -> None:
    script = "answer(about='me'); sys.stdin.read(); answer(failed='RuntimeError: still writing'); sys.exit(1)"
    with process(tmp_path, script) as one:
        one.answer()
        with pytest.raises(ContenderFailed, match="still writing"):
            one.close()


def test_what_it_started_is_ended_with_it(tmp_path: Path) -> None:
    script = "child = subprocess.Popen(['sleep', '600']); answer(child=child.pid); sys.stdin.read()"
    with process(tmp_path, script) as one:
        child = os.pidfd_open(one.answer()["child"])
    assert select.select([child], [], [], 30)[0], "it goes on"
    os.close(child)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ModuleNotFoundError("none", name="nobody_has.this"), {"absent": "nobody_has is not installed"}),
        (ModuleNotFoundError("none", name="torch.nothing"), {"failed": "ModuleNotFoundError: none"}),
        (OSError("full"), {"failed": "OSError: full"}),
    ],
)
def test_what_is_not_installed_is_absent_and_not_failed(error: Exception, told: dict[str, str]) -> None:
    assert one_contender.failure(error) == told


def test_contenders_are_run_in_batches_that_fit_beside_the_reference() -> None:
    needed = {REFERENCE: 2.0, "a": 3.0, "b": 3.0, "c": 9.0, "d": 1.0}
    assert batches(list(needed), needed.__getitem__, 8.0) == [["a", "b"], ["c"], ["d"]]
    assert batches([REFERENCE], needed.__getitem__, 8.0) == [[]]


def test_a_message_is_told_without_its_folders() -> None:
    assert without_folders("[Errno 2] No such file: '/a/b/c.pt' in /x/y") == "[Errno 2] No such file: 'c.pt' in y"
