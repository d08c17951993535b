from __future__ import annotations

import json
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt import strict_json

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=50)
@given(st.dictionaries(st.text(), PLAIN, max_size=3))
def test_what_is_written_is_read_back_as_it_was(value):
    data = strict_json.dump(value)
    assert strict_json.load(data, "it") == value
    assert data.isascii() and b"\n" not in data


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":1,"a":1}',
        b'{"a":{"b":1,"c":2,"b":3}}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":-Infinity}',
        b'{"a":1e999}',
        b'{"a":-1e999}',
        b'{"a":' + b"9" * 100_000 + b"}",
        b"[" * 200_000 + b"]" * 200_000,
        b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
        b'{"a":' + b"[" * 200_000,
        b"[1]",
        b"1",
        b"null",
        b'"text"',
        b"",
        b"\0" * 64,
        b"{",
        b'{"a":1}{"b":2}',
        b"{'a':1}",
        b'{"a":1,}',
        b'{"a":"\xff"}',
        b'{"a":"line\nbreak"}',
        b"\xef\xbb\xbf{}",
    ],
    ids=lambda text: ascii(text)[2:30] + str(len(text)),
)
def test_what_is_not_one_plain_object_is_refused_by_name_and_soon(text):
    began = time.process_time()
    with pytest.raises(ValueError, match=r"^run\.json is not"):
        strict_json.load(text, "run.json")
    assert time.process_time() - began < 2


def test_blanks_cost_no_more_than_their_reading():
    began = time.process_time()
    assert strict_json.load(b" " * 16_000_000 + b"{}", "it") == {}
    assert time.process_time() - began < 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, [math.nan], {"a": {"b": math.inf}}])
def test_what_is_no_number_is_not_written(value):
    with pytest.raises(ValueError):
        strict_json.dump(value)


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, object()])
def test_what_json_cannot_hold_is_not_written(value):
    with pytest.raises(TypeError):
        strict_json.dump(value)


def test_a_value_of_the_right_type_is_taken():
    fields = {"a": 1, "b": "x", "c": True, "d": 1.5, "e": [], "f": {}}
    taken = [
        strict_json.take(fields, key, kind, "it")
        for key, kind in zip(fields, (int, str, bool, float, list, dict), strict=True)
    ]
    assert taken == list(fields.values())


def test_a_whole_number_will_do_for_a_float():
    taken = strict_json.take({"a": 3}, "a", float, "it")
    assert taken == 3.0 and type(taken) is float


@pytest.mark.parametrize(
    ("value", "kind"),
    [(True, int), (True, float), (1, bool), (1.0, int), ("1", int), (None, str), ([], dict), ({}, list), (1, str)],
)
def test_a_value_of_another_type_is_refused_by_key(value, kind):
    with pytest.raises(ValueError, match="it: 'key' should be " + kind.__name__):
        strict_json.take({"key": value}, "key", kind, "it")


def test_a_missing_key_is_refused_by_name():
    with pytest.raises(ValueError, match="'key' should be int, is None"):
        strict_json.take({}, "key", int, "it")


def test_a_whole_number_that_no_float_can_hold_is_refused():
    with pytest.raises(ValueError, match="'key'"):
        strict_json.take(json.loads('{"key": 1' + "0" * 400 + "}"), "key", float, "it")


def test_what_is_shown_of_a_value_is_short_and_plain():
    with pytest.raises(ValueError) as refused:
        strict_json.take({"key": "\x1b[31m<b>ü" * 10_000}, "key", int, "it")
    assert len(str(refused.value)) < 200 and str(refused.value).isprintable() and str(refused.value).isascii()
