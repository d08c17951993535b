from __future__ import annotations

import pickle
import re

import pytest

from distckpt import errors
from distckpt.errors import DistckptError, RankFailure, SaveFailed


def test_the_tree_that_is_drawn_is_the_tree_that_is_there():
    drawn = [(match[2], len(match[1]) // 4) for match in re.finditer(r"^    ([|+ -]*)(\w+) +\w", errors.__doc__, re.M)]
    ancestors = {name: getattr(errors, name).__mro__.index(DistckptError) for name, _ in drawn}
    assert dict(drawn) == {name: depth for name, depth in ancestors.items() if depth}


@pytest.mark.parametrize("kind", [RankFailure, SaveFailed])
def test_a_failure_tells_each_rank_in_order(kind):
    failure = kind("save of step 3", {10: "hangs", 2: "disk full"})
    assert str(failure) == "save of step 3 failed: rank 2: disk full; rank 10: hangs"
    assert failure.during == "save of step 3" and failure.failures == {2: "disk full", 10: "hangs"}


def test_a_failure_of_thousands_names_some_and_knows_all():
    failure = RankFailure("save", {rank: "disk full" for rank in range(3000)})
    assert str(failure).endswith("rank 18: disk full; rank 19: disk full; and 2980 more ranks")
    assert len(failure.failures) == 3000


@pytest.mark.parametrize("kind", [RankFailure, SaveFailed, errors.DirectoryInUse, errors.StateMismatch])
def test_an_error_crosses_to_another_process_whole(kind):
    error = kind("save", {1: "disk full"}) if issubclass(kind, RankFailure) else kind("words")
    crossed = pickle.loads(pickle.dumps(error))
    assert type(crossed) is kind and str(crossed) == str(error) and vars(crossed) == vars(error)
