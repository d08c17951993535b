"""Which checkpoint is best, by which metric and rule."""

from __future__ import annotations

import difflib
import logging
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from distckpt import layout
from distckpt.manifest import Record

_log = logging.getLogger("distckpt")

DEFAULT_GREATER_KEYS = ["acc", "top", "AR@", "auc", "precision", "mAP", "mDice", "mIoU", "mAcc", "aAcc"]
DEFAULT_LESS_KEYS = ["loss"]

AUTO = "auto"


@dataclass(frozen=True)
class Metric:
    """A metric that has a best: ``rule`` says whether the ``"greater"`` or the ``"less"`` value is better.

    Raises:
        KeyError: for any other rule.
    """

    name: str
    rule: str

    def __post_init__(self) -> None:
        _check_rule(self.rule)

    def is_better(self, new: float, old: float) -> bool:
        """Whether ``new`` beats ``old``. A tie does not, so the first of equals stays the best."""
        return new > old if self.rule == "greater" else new < old

    def value_in(self, metrics: Mapping[str, object]) -> float | None:
        """This metric's value among those reported; ``None``, with a warning, where it is no finite number.

        Raises:
            KeyError: where it was not reported, naming what was, and the nearest of it.
            TypeError: where it is no number at all, see `as_number`.
        """
        if self.name not in metrics:
            raise KeyError(_missing(self.name, list(metrics)))
        return as_number(metrics[self.name], self.name)


@dataclass(frozen=True)
class AutoMetric:
    """``save_best="auto"``: the first metric that is reported will be the one, and stays it.

    Attributes:
        rule: as given; ``None`` where it is inferred from the metric's name, then.
    """

    rule: str | None = None
    greater_keys: tuple[str, ...] = tuple(DEFAULT_GREATER_KEYS)
    less_keys: tuple[str, ...] = tuple(DEFAULT_LESS_KEYS)

    def __post_init__(self) -> None:
        if self.rule is not None:
            _check_rule(self.rule)

    def settle(self, metrics: Mapping[str, object]) -> Metric:
        """The metric that the first report makes the one.

        Raises:
            ValueError: where ``metrics`` is empty, or the rule neither given nor inferable.
        """
        if not metrics:
            raise ValueError('"save_best" is "auto", which takes the first metric that is reported, but none was')
        name = next(iter(metrics))
        return Metric(name, self.rule or infer_rule(name, self.greater_keys, self.less_keys))


class BestBy:
    """The metrics by which checkpoints are best.

    Attributes:
        asked: what ``save_best`` asks for; with ``"auto"`` the first report settles which one.
        keep: how many of the best are kept for each metric, so also how many count as best.
    """

    def __init__(self, asked: tuple[Metric, ...] | AutoMetric, keep: int) -> None:
        self.asked = asked
        self.keep = keep

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those that are known by now."""
        return () if isinstance(self.asked, AutoMetric) else self.asked

    def settle(self, reported: Mapping[str, object]) -> None:
        """``"auto"`` means the first metric that was reported, from now on.

        Raises:
            ValueError: where its rule cannot be inferred.
        """
        if isinstance(self.asked, AutoMetric):
            self.asked = (self.asked.settle(reported),)


def parse_metrics(
    save_best: str | list[str] | None,
    rule: str | list[str] | None = None,
    greater_keys: Sequence[str] | str | None = None,
    less_keys: Sequence[str] | str | None = None,
) -> tuple[Metric, ...] | AutoMetric:
    """The metrics that the user's words ask for, in their order; none for ``None`` and ``[]``.

    The words, their defaults and the type of each error are those of MMEngine's CheckpointHook.

    Raises:
        AssertionError: for words of a wrong type, a name given twice, ``"auto"`` beside others, and as many rules
            as fit neither one nor the number of metrics.
        TypeError: for a list of rules without metrics.
        KeyError: for a rule that is neither ``"greater"`` nor ``"less"``, if there is a metric.
        ValueError: where a rule cannot be inferred, or two metrics would share one label on disk.
    """
    names = _names(save_best)
    rules = _rules(rule, names)
    greater = parse_keys(greater_keys, DEFAULT_GREATER_KEYS, "greater_keys")
    less = parse_keys(less_keys, DEFAULT_LESS_KEYS, "less_keys")
    if names == [AUTO]:
        return AutoMetric(rules[0], tuple(greater), tuple(less))
    metrics = tuple(
        Metric(name, infer_rule(name, greater, less) if asked is None else asked)
        for name, asked in zip(names or (), rules, strict=True)
    )
    _refuse_shared_labels(metrics)
    return metrics


def parse_keys(keys: Sequence[str] | str | None, default: Sequence[str], word: str) -> Sequence[str]:
    """The keys that the user gave for ``word``, a list or tuple as given, or else ``default``. They replace it.

    Raises:
        AssertionError: where they are not all str.
    """
    if keys is None:
        return default
    asked = keys if isinstance(keys, list | tuple) else (keys,)
    if not all(isinstance(key, str) for key in asked):
        raise AssertionError(f'"{word}" should be a str or a list or tuple of str or None, but got {ascii(keys)[:80]}')
    return asked


def infer_rule(metric: str, greater_keys: Iterable[str], less_keys: Iterable[str]) -> str:
    """``"greater"`` or ``"less"``, by the first that fits, whatever the case: ``metric`` is a greater key, is a less
    key, contains a greater key, contains a less key. (So ``stop_loss``, which contains ``top``, is greater.)

    Raises:
        ValueError: where none fits.
    """
    name = metric.lower()
    greater = {key.lower() for key in greater_keys}
    less = {key.lower() for key in less_keys}
    if name in greater:
        return "greater"
    if name in less:
        return "less"
    if any(key in name for key in greater):
        return "greater"
    if any(key in name for key in less):
        return "less"
    raise ValueError(
        f"Cannot infer the rule for key {metric}, thus a specific rule must be specified: "
        'rule="greater" or rule="less", or add it to greater_keys or less_keys'
    )


def as_number(value: object, name: str) -> float | None:
    """``value`` as a float; ``None``, with a warning that names the metric, for what can never be the best.

    Ints, floats, NumPy scalars, and tensors and arrays of one element are numbers; ``None``, NaN and infinities can
    never be the best. A tensor on an accelerator is waited for.

    Raises:
        TypeError: for everything else: bool, str, tensors and arrays of several elements.
    """
    try:
        number = value.item() if hasattr(value, "item") else value
    except (TypeError, ValueError, RuntimeError) as error:  # what they raise that hold several elements, or none
        raise TypeError(_no_number(value, name)) from error
    if number is not None and (isinstance(number, bool) or not isinstance(number, numbers.Real)):
        raise TypeError(_no_number(value, name))
    found = math.nan if number is None else _as_float(number)
    if math.isfinite(found):
        return found
    _log.warning("metric %s is %s, which is never the best", name, None if number is None else found)
    return None


def ranking(metric: Metric, records: Iterable[Record]) -> list[Record]:
    """Those of ``records`` that carry ``metric``, the best first; of equals the older first."""
    sign = -1.0 if metric.rule == "greater" else 1.0
    carrying = [record for record in records if math.isfinite(record.metrics.get(metric.name, math.nan))]
    return sorted(carrying, key=lambda record: (sign * record.metrics[metric.name], record.order))


def improves(metric: Metric, value: float | None, records: Iterable[Record], keep: int = 1) -> bool:
    """Whether a new checkpoint with ``value`` would be among the best ``keep``; a tie loses to the older one."""
    if value is None or not math.isfinite(value):
        return False
    return ahead_of(metric, value, [one.metrics[metric.name] for one in ranking(metric, records)]) < keep


def ahead_of(metric: Metric, value: float, scores: Iterable[float]) -> int:
    """How many of these older ``scores`` ``value`` does not beat."""
    return sum(not metric.is_better(value, score) for score in scores)


def _check_rule(rule: str) -> None:
    if rule not in ("greater", "less"):
        raise KeyError(f"rule must be greater, less or None, but got {rule}.")


def _names(save_best: object) -> list[str] | None:
    if save_best is None:
        return None
    names = [save_best] if isinstance(save_best, str) else save_best
    # Raised, not asserted: `python -O` must refuse the same words.
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AssertionError(f'"save_best" should be a str or list of str or None, but got {type(save_best)}')
    if AUTO in names and len(names) != 1:
        raise AssertionError('Only support one "auto" in "save_best" list.')
    if len(names) != len(set(names)):
        raise AssertionError(f'Find duplicate element in "save_best": {ascii(names)[:200]}')
    return names


def _rules(rule: object, names: list[str] | None) -> list[str | None]:
    if rule is None or isinstance(rule, str):
        return [rule] * len(names or ())
    if not isinstance(rule, list) or not all(isinstance(one, str) for one in rule):
        raise AssertionError(f'"rule" should be a str or list of str or None, but got {type(rule)}')
    if names is None:
        raise TypeError('"rule" is a list, one for each metric, but "save_best" names none')
    if len(rule) not in (1, len(names)):
        raise AssertionError(
            f'Number of "rule" must be 1 or the same as number of "save_best", but got {len(rule)} for {len(names)}.'
        )
    return rule * len(names) if len(rule) == 1 else list(rule)


def _refuse_shared_labels(metrics: Iterable[Metric]) -> None:
    owners: dict[str, str] = {}
    for metric in metrics:
        label = layout.best_label(metric.name)
        other = owners.setdefault(label, metric.name)
        if other != metric.name:
            raise ValueError(
                f'"save_best": {other!r} and {metric.name!r} would both be labelled {label} on disk; rename one'
            )


def _no_number(value: object, name: str) -> str:
    return f"metric {name} should be one number, is {type(value).__name__}: {ascii(value)[:80]}"


def _as_float(number: numbers.Real) -> float:
    try:
        return float(number)
    except OverflowError:  # an int beyond every float
        return math.inf


def _missing(name: str, reported: list[str]) -> str:
    if not reported:
        return f"metric {name} was not reported: no metric was"
    wanted = name.lower()
    spelled = {key.lower(): key for key in reported}
    # A prefix that was left out is the usual mistake, and no near miss for difflib.
    near = [key for key in spelled if wanted in key or key in wanted] or difflib.get_close_matches(wanted, spelled, 1)
    meant = f"; did you mean {spelled[near[0]]}?" if near else ""
    return f"metric {name} was not reported, but {', '.join(reported)} were{meant}"
