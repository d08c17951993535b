"""A checkpoint laid beside the objects that it is for: what fits is put in, what does not is named."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from standing import Standing, put_in
from torch import nn

from distckpt import StateMismatch, rng
from distckpt.formats import Snapshot
from distckpt.manifest import Record
from distckpt.matching import Matched, match
from distckpt.progress import Progress
from distckpt.selection import Selection
from distckpt.state import Parts

RECORD = Record("step-00000007", Progress(7, 2), "full", 4, ("interval",), "", "", 1, 1, 0, 0, "")


class Counter:
    """A part that counts."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class Loader(Counter):
    """A part of each rank."""

    def __iter__(self) -> Any:
        return iter(())


class Model(nn.Module):
    def __init__(self, width: int = 2, head: str = "head") -> None:
        super().__init__()
        self.body = nn.Linear(3, 2)
        self.add_module(head, nn.Linear(2, width))


def program(fill: float, count: int, **words: Any) -> Parts:
    model = Model(**words)
    for parameter in model.parameters():
        nn.init.constant_(parameter, fill)
    optimizer = torch.optim.SGD(model.parameters(), lr=fill, momentum=0.9)
    return Parts({"model": model, "optimizer": optimizer, "counter": Counter(count), "loader": Loader(count)})


def snapshot(parts: Parts) -> Snapshot:
    return Snapshot(parts.capture_shared(is_leader=True), parts.capture_own())


class Read:
    """A checkpoint that was read into memory already, as ``init_from`` has it."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def fill(self, targets: Any) -> None:
        assert not targets


OPENED: Any = Standing


@pytest.fixture(params=[Standing, Read], autouse=True)
def opened_as(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "OPENED", request.param)


class Laid:
    """What `match` returns, with what was laid beside the objects."""

    def __init__(self, matched: Matched, opened: Standing) -> None:
        self.report = matched.report
        self.exactness = matched.exactness
        self._matched = matched
        self._opened = opened

    def apply(self) -> None:
        put_in(self._matched, self._opened)


def laid(live: Parts, saved: Snapshot, *, strict: bool = True, is_same_world: bool = True, **words: Any) -> Laid:
    asked = {"only": None, "exclude": None, "rename": None} | words
    opened = OPENED(saved)
    matched = match(live, opened.snapshot, Selection.parse(**asked), strict=strict, is_same_world=is_same_world)
    matched.judge(matched.unplaced)
    return Laid(matched, opened)


def held(parts: Parts) -> str:
    return str([parts.capture_shared(is_leader=True), {name: one.state_dict() for name, one in parts.own.items()}])


def test_what_fits_is_put_in_whole():
    live, saved = program(0.0, 0), program(1.0, 5)
    matched = laid(live, snapshot(saved))
    assert held(live) == held(program(0.0, 0)), "match itself changes nothing"
    matched.apply()
    assert held(live) == held(saved)
    assert matched.report.is_whole and len(matched.report.loaded) == 4 + 3


def test_everything_that_does_not_fit_is_in_one_report_with_the_nearest_names():
    live, saved = program(0.0, 0, width=4), program(1.0, 5)
    state = snapshot(saved)
    shared = {"counters": state.shared["counter"], **state.shared}
    del shared["counter"]
    shared["model"]["body.weigth"] = shared["model"].pop("body.weight")
    with pytest.raises(StateMismatch) as raised:
        laid(live, Snapshot(shared, state.own))
    told = str(raised.value)
    for words in (
        "2 missing in the checkpoint: model.body.weight, there is body.weigth, counter (the whole part, there is coun",
        "2 in the checkpoint alone: model.body.weigth, there is body.weight, counters (the whole part);",
        "2 of another shape: model.head.weight ((2, 2) there, (4, 2) here), model.head.bias ((2,) there, (4,) here).",
        "Nothing of it was put in. Use only=, exclude= or rename= to say what is meant, or strict=False",
    ):
        assert words in told
    assert held(live) == held(program(0.0, 0, width=4))


def test_of_very_many_names_a_few_are_told_and_how_many_more_there_are():
    live = Parts({"model": nn.Sequential(*(nn.Linear(1, 1) for _ in range(3000)))})
    saved = Snapshot({"model": {f"layers.{nth}.w": torch.ones(1) for nth in range(3000)}})
    with pytest.raises(StateMismatch) as raised:
        laid(live, saved)
    told = str(raised.value)
    assert "6000 missing" in told and "and 5980 more" in told and "3000 in the checkpoint alone" in told
    assert len(told) < 5000


def test_without_strict_what_fits_is_taken_and_the_rest_is_left():
    live, saved = program(0.0, 0, head="other"), program(1.0, 5)
    matched = laid(live, snapshot(saved), strict=False)
    matched.apply()
    model = live.modules["model"]
    assert model.body.weight.unique().tolist() == [1.0] and model.other.weight.unique().tolist() == [0.0]
    assert matched.report.missing == ["model.other.weight", "model.other.bias"]
    assert live.shared["counter"].count == 5


LEFT = {
    "only model": ({"only": "model"}, {"body", "head"}),
    "only optimizer and counter": ({"only": ["optimizer", "counter"]}, {"optimizer", "counter"}),
    "only what begins with c": ({"only": "c*"}, {"counter"}),
    "only the body": ({"only": "model.body.*"}, {"body"}),
    "only weights": ({"only": ["model.*.weight", "model.*.bias"]}, {"body", "head"}),
    "all but the model": ({"exclude": "model"}, {"optimizer", "counter", "loader", "rng"}),
    "all but the head": ({"exclude": ["model.head.*"]}, {"body", "optimizer", "counter", "loader", "rng"}),
    "all but the loader and rng": ({"exclude": ("loader", "rng")}, {"body", "head", "optimizer", "counter"}),
    "only the model but its head": ({"only": "model", "exclude": "model.head*"}, {"body"}),
    "only the generators": ({"only": "rng"}, {"rng"}),
    "only everything": ({"only": "*"}, {"body", "head", "optimizer", "counter", "loader", "rng"}),
    "nothing is left out": ({"exclude": []}, {"body", "head", "optimizer", "counter", "loader", "rng"}),
}


@pytest.mark.parametrize("what", LEFT)
def test_only_and_exclude_say_what_is_put_in(what):
    words, expected = LEFT[what]
    live, saved = program(0.0, 0), program(1.0, 5)
    torch.manual_seed(1)
    state = snapshot(saved)
    drawn = torch.rand(1)
    matched = laid(live, state, **words)
    torch.manual_seed(2)
    matched.apply()
    model = live.modules["model"]
    taken = {name for name in ("body", "head") if model.get_submodule(name).weight.unique().tolist() == [1.0]}
    taken |= {"optimizer"} if live.shared["optimizer"].param_groups[0]["lr"] == 1.0 else set()
    taken |= {name for name, one in (live.shared | live.own).items() if isinstance(one, Counter) and one.count == 5}
    taken |= {"rng"} if torch.equal(torch.rand(1), drawn) else set()
    assert taken == expected
    assert matched.report.is_whole
    if expected != {"body", "head", "optimizer", "counter", "loader", "rng"}:
        assert "not exact" in matched.exactness(RECORD)


def test_only_that_takes_nothing_is_refused_with_what_there_is():
    with pytest.raises(StateMismatch, match=r"only= takes nothing.*there are model, optimizer, counter, loader"):
        laid(program(0.0, 0), snapshot(program(1.0, 5)), only="modle")


@pytest.mark.parametrize("word", ["only", "exclude"])
def test_a_pattern_for_keys_of_what_is_no_module_is_refused(word):
    with pytest.raises(StateMismatch, match=rf"{word}= names keys of optimizer, which is no module"):
        laid(program(0.0, 0), snapshot(program(1.0, 5)), **{word: "optimizer.state.*"})


def test_rename_calls_keys_of_the_checkpoint_as_they_are_called_here():
    live, saved = program(0.0, 0, head="classifier"), program(1.0, 5)
    laid(live, snapshot(saved), rename={r"^head\.": "classifier."}).apply()
    assert live.modules["model"].classifier.weight.unique().tolist() == [1.0]


def test_renames_follow_one_another_and_may_use_groups():
    live, saved = program(0.0, 0, head="h1"), program(1.0, 5)
    laid(live, snapshot(saved), rename={r"^(h)ead\.": r"\1_.", r"^h_": "h1"}).apply()
    assert live.modules["model"].h1.weight.unique().tolist() == [1.0]


def test_a_rename_that_gives_two_keys_one_name_is_refused():
    with pytest.raises(StateMismatch, match=r"rename= makes model\.body\.weight of two keys"):
        laid(program(0.0, 0), snapshot(program(1.0, 5)), rename={"^head": "body"})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_that_another_library_saved_are_taken_off(prefix):
    live, saved = program(0.0, 0), program(1.0, 5)
    state = snapshot(saved)
    foreign = {f"{prefix}{key}": value for key, value in state.shared["model"].items()}
    laid(live, Snapshot({**state.shared, "model": foreign}, state.own)).apply()
    assert held(live) == held(saved)


def test_a_prefix_that_is_the_models_own_is_left():
    averaged = Parts({"ema": torch.optim.swa_utils.AveragedModel(nn.Linear(1, 1))})
    state = {key: torch.ones_like(value) for key, value in averaged.capture_shared(is_leader=True)["ema"].items()}
    laid(averaged, Snapshot({"ema": state})).apply()
    assert averaged.modules["ema"].module.weight.item() == 1.0


def test_an_optimizer_of_other_groups_is_told_with_both():
    live, saved = program(0.0, 0), program(1.0, 5)
    body, head = live.modules["model"].body, live.modules["model"].head
    live.shared["optimizer"] = torch.optim.SGD([{"params": body.parameters()}, {"params": head.parameters()}], lr=0.1)
    with pytest.raises(StateMismatch, match=r"optimizer \(groups of \[4\] parameters there, of \[2, 2\] here\)"):
        laid(live, snapshot(saved))


@pytest.mark.parametrize("state", [{}, [], 3, {"count": 3}])
def test_the_state_of_something_else_is_no_optimizers(state):
    live, saved = program(0.0, 0), snapshot(program(1.0, 5))
    with pytest.raises(StateMismatch, match=r"optimizer \(groups of \[\] parameters there, of \[4\] here\)"):
        laid(live, Snapshot({**saved.shared, "optimizer": state}, saved.own))


@pytest.mark.parametrize("state", [[], 3, None])
def test_the_state_of_something_else_is_no_modules(state):
    live, saved = program(0.0, 0), snapshot(program(1.0, 5))
    with pytest.raises(StateMismatch, match=r"model is a module here, and a .* in the checkpoint"):
        laid(live, Snapshot({**saved.shared, "model": state}, saved.own))


def test_in_another_world_what_was_a_ranks_own_is_left_and_told():
    live, saved = program(0.0, 0), program(1.0, 5)
    state = snapshot(saved)
    random.seed(3)
    drawn = random.getstate()
    matched = laid(live, state, is_same_world=False)
    matched.apply()
    assert random.getstate() == drawn
    assert live.shared["counter"].count == 5 and live.own["loader"].count == 0
    assert matched.report.left == ["loader"]
    assert matched.exactness(RECORD) == (
        "resumed step-00000007 (step 7, epoch 2)  exact: model, optimizer, counter  not exact: loader, rng of 4 ranks"
    )


def test_a_whole_resume_says_that_all_of_it_is_exact():
    told = laid(program(0.0, 0), snapshot(program(1.0, 5))).exactness(RECORD)
    assert told.endswith("  exact: model, optimizer, counter, loader, rng of 4 ranks")


def test_what_is_missing_or_misshapen_is_not_called_exact():
    live = program(0.0, 0, width=3)
    live.shared["extra"] = Counter()
    told = laid(live, snapshot(program(1.0, 5)), strict=False).exactness(RECORD)
    assert "  exact: optimizer, counter, loader, rng of 4 ranks  not exact: model, extra  (" in told
    assert "1 missing in the checkpoint: extra (the whole part)" in told and "2 of another shape" in told


def test_a_tensor_of_another_type_is_converted_and_told():
    live, saved = program(0.0, 0), program(0.1, 5)
    live.modules["model"].body.half()
    matched = laid(live, snapshot(saved))
    matched.apply()
    assert live.modules["model"].body.bias.tolist() == [torch.tensor(0.1).half().item()] * 2
    told = matched.exactness(RECORD)
    assert "  not exact: model  (" in told
    assert "2 converted: model.body.weight (float32 there, float16 here), model.body.bias (float32" in told


class Versioned(nn.Module):
    """A module that reads the state of its first version otherwise."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *args: Any) -> None:
        assert metadata.get("version") == 2, "of the first version"
        super()._load_from_state_dict(state, prefix, metadata, *args)


def test_modules_see_the_version_of_their_state():
    live = Parts({"model": nn.Sequential(Versioned())})
    laid(live, Snapshot({"model": {"0.weight": torch.ones(1)}})).apply()
    assert live.modules["model"][0].weight.item() == 1.0


class Extra(nn.Module):
    """A module with more state than tensors, of any shape."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("here", [None, {"scale": 1}, torch.zeros(0), torch.zeros(2)])
@pytest.mark.parametrize("there", [None, {"scale": 2}, torch.ones(3)])
def test_extra_state_of_a_module_may_have_any_shape(here, there):
    live = Parts({"model": nn.Sequential(Extra(here))})
    laid(live, Snapshot({"model": {"0._extra_state": there}})).apply()
    assert str(live.modules["model"][0].extra) == str(there)


def test_a_module_without_shapes_yet_takes_those_of_the_checkpoint():
    live = Parts({"model": nn.Sequential(nn.LazyLinear(2))})
    laid(live, Snapshot({"model": {"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2)}})).apply()
    assert live.modules["model"][0].weight.tolist() == [[1.0] * 3] * 2


def test_random_number_generators_are_set_last():
    class Drawing(Counter):
        def load_state_dict(self, state: dict[str, int]) -> None:
            torch.rand(1)

    parts = Parts({"drawing": Drawing()})
    torch.manual_seed(1)
    state = Snapshot({"drawing": {"count": 1}}, {"rng": rng.capture()})
    expected = torch.rand(1)
    laid(parts, state).apply()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("word", ["only", "exclude"])
@pytest.mark.parametrize("value", [3, True, [3], ["model", None], b"model"])
def test_patterns_that_are_no_names_are_refused(word, value):
    with pytest.raises(TypeError, match=f"{word} should be a name or a list of names"):
        Selection.parse(**{"only": None, "exclude": None, "rename": None, word: value})


@pytest.mark.parametrize("value", ["a", ["a"], {"a": 3}, {3: "a"}, {"a": None}])
def test_a_rename_that_is_no_dict_of_texts_is_refused(value):
    with pytest.raises(TypeError, match="rename should be a dict of regular expressions and replacements"):
        Selection.parse(None, None, value)


@pytest.mark.parametrize("value", [{"(": "a"}, {"[": ""}, {"a": r"\1"}, {"a": r"\g<no>"}, {"a": "\\"}])
def test_a_rename_that_is_no_regular_expression_is_refused(value):
    with pytest.raises(ValueError, match="rename: .* is no regular expression, or .* no replacement for it"):
        Selection.parse(None, None, value)
