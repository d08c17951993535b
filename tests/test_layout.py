from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt import layout
from distckpt.layout import StepName

HOSTILE = [
    *("", ".", "..", "a/b", "/etc/passwd", "../up", "a\0b", "a\nb", "a\n", "\x1b[31mred", "<script>", "a;b", "$HOME"),
    *("~root", "*", "-" * 201, ".hidden", " lead", "trail ", "naïve", "a\\b", "a|b", "a'b", 'a"b', "a\u202eb"),
]


@given(st.integers(0, 10**15), st.integers(1, 10**6))
def test_the_name_of_a_step_is_read_back_as_it_was_written(step, take):
    assert StepName.parse(str(StepName(step, take))) == StepName(step, take)


@given(st.text(st.characters(categories=["Nd"], include_characters="step-.0123"), max_size=24) | st.text(max_size=24))
def test_a_name_has_one_spelling_so_what_is_read_is_what_would_be_written(name):
    for text in (name, "step-" + name, "step-" + name.rjust(8, "0")):
        parsed = StepName.parse(text)
        assert parsed is None or str(parsed) == text
    for text in (name, ".attempt-" + name, ".attempt-" + name.rjust(8, "0")):
        number = layout.parse_attempt(text)
        assert number is None or layout.attempt_file(number) == text


@pytest.mark.parametrize(
    "name",
    [
        *("step-1", "step-0000001", "step-000000001", "step-00000001.1", "step-00000001.0", "step-00000001.02"),
        *("step-00000001.", "step-00000001\n", "xstep-00000001", "step--0000001", "step-٠٠٠٠٠٠٠١", "step-00000001.٢"),
        *("step-00000001.committed", ".trash-step-00000001-0a", "step-" + "9" * 5000),
    ],
)
def test_what_is_nearly_the_name_of_a_step_is_none(name):
    assert StepName.parse(name) is None


@pytest.mark.parametrize("name", [".attempt-٠٠٠٠٠٠٠١", ".attempt-000000001", ".attempt-1", ".attempt-" + "9" * 5000])
def test_what_is_nearly_the_file_of_an_attempt_is_none(name):
    assert layout.parse_attempt(name) is None


@given(st.lists(st.builds(StepName, st.integers(0, 99_999_999), st.integers(1, 9)), max_size=8))
def test_names_of_steps_sort_as_the_steps_do(names):
    assert [StepName.parse(text) for text in sorted(map(str, names))] == sorted(names)


@given(
    st.from_regex(
        r"[A-Za-z0-9_][A-Za-z0-9._+=@, -]{0,40}[A-Za-z0-9]", fullmatch=True, alphabet=st.characters(max_codepoint=126)
    )
)
def test_a_record_names_what_it_commits(name):
    assert layout.is_safe(name)
    assert layout.recorded_by(layout.record_of(name)) == name


def test_the_record_of_a_best_file_does_not_begin_as_that_does():
    assert layout.record_of("best_acc_epoch_3.pth") == ".best_acc_epoch_3.pth.committed"
    assert layout.recorded_by(".best_acc_epoch_3.pth.committed") == "best_acc_epoch_3.pth"
    assert layout.recorded_by("best_acc_epoch_3.pth.committed") is layout.recorded_by(".epoch_3.pth.committed") is None


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_refused_and_never_that_of_a_record(name):
    assert not layout.is_safe(name)
    assert layout.recorded_by(layout.record_of(name)) is None


@pytest.mark.parametrize("name", [layout.RUN, layout.EVENTS, layout.LATEST, "step-00000001", "epoch_3.pth"])
def test_what_has_no_suffix_of_a_record_is_none(name):
    assert layout.recorded_by(name) is None


@given(st.text(st.characters(categories=["L", "N"], include_characters="./\\:\0\x1b <>*"), min_size=1, max_size=60))
def test_the_label_of_any_metric_is_one_safe_name(metric):
    assert layout.is_safe(layout.best_label(metric))


def test_the_label_of_a_metric_is_still_legible():
    assert layout.best_label("val/loss") == "best-val_loss"


@pytest.mark.parametrize("name", [layout.RUN, layout.SAVE, layout.LOCK, layout.attempt_file(1), ".draft-x", ".trash-x"])
def test_what_belongs_to_the_run_is_no_checkpoint(name):
    assert StepName.parse(name) is None and layout.recorded_by(name) is None


@given(st.text(max_size=70))
def test_a_draft_of_an_export_tells_its_domain_and_nothing_else_does(name):
    draft = layout.export_draft(name, "0123abcd", "89abcdef")
    assert layout.domain_of_export(draft) == "0123abcd"
    assert len(draft.encode(errors="surrogatepass")) <= 255
    assert layout.domain_of_export(name) is None or name.startswith(layout.EXPORT_PREFIX)
    assert layout.domain_of_export(layout.replaced(name)) is None
