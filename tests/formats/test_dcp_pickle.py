"""Pickles that are taken for what they say, and never run."""

from __future__ import annotations

import os
import pickle
import random
import struct
from collections import OrderedDict
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from distckpt.formats.dcp_pickle import Made, Table, read_pickle

NOTHING = Table()

words = st.text(st.characters(codec="utf-8"), max_size=300)
keys = words | st.integers(0, 9)
data = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | words,
    lambda inner: st.lists(inner) | st.tuples(inner) | st.tuples(inner, inner, inner) | st.dictionaries(keys, inner),
    max_leaves=20,
)


class Asks:
    """Pickled as a call of what it is given."""

    def __init__(self, called: Any, *arguments: Any) -> None:
        self.told = called, arguments

    def __reduce__(self) -> Any:
        return self.told


def touch(path: str) -> None:
    raise AssertionError(f"{path}: it was run")


def pickled(value: object, protocol: int = 4) -> bytes:
    return pickle.dumps(value, protocol)


@given(data, st.sampled_from([2, 3, 4, 5]))
def test_plain_data_is_what_pickle_made_it_of(value, protocol):
    written = pickled(value, protocol)
    assert read_pickle(written + b"more", NOTHING) == (value, len(written))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "called, name",
    [
        (os.system, "posix.system"),
        (eval, "builtins.eval"),
        (exec, "builtins.exec"),
        (getattr, "builtins.getattr"),
        (__import__, "builtins.__import__"),
        (torch.load, "torch.serialization.load"),
        (torch.hub.load, "torch.hub.load"),
        (open, "io.open"),
        (touch, "touch"),
    ],
)
def test_a_name_that_is_not_in_the_table_is_refused_and_not_called(called, name, protocol, tmp_path):
    with pytest.raises(ValueError, match=f"asks for .*{name}"):
        read_pickle(
            pickled(Asks(called, str(tmp_path / "made")), protocol).replace(b"__builtin__", b"builtins"), NOTHING
        )
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["torch.float32.__class__", "torch.serialization", "torch", "float32", ".float32"])
def test_a_name_is_found_whole_or_not_at_all(name):
    module, _, last = name.rpartition(".")
    table = Table(constants={"torch.float32": torch.float32})
    for written in (
        f"c{module}\n{last}\n.".encode(),
        b"".join(b"\x8c" + bytes([len(one)]) + one.encode() for one in (module, last)) + b"\x93.",
    ):
        with pytest.raises(ValueError, match="asks for"):
            read_pickle(written, table)


@pytest.mark.parametrize(
    "written",
    [
        b"\x82\x01.",  # EXT1: whatever is registered in copyreg
        b"\x83\x01\0.",
        b"\x84\x01\0\0\0.",
        b"(iposix\nsystem\n.",  # INST
        b"(o.",
        b")}\x92.",  # NEWOBJ_EX
        b"Pid\n.",
        b"\x97.",  # NEXT_BUFFER
        b"I1\n.",
        b"L1L\n.",
        b"V1\n.",
        b"C\x01a.",
        b"\x96" + struct.pack("<Q", 1 << 50) + b".",  # BYTEARRAY8
        b"\x8e" + struct.pack("<Q", 1 << 50) + b".",
        b"\x8d" + struct.pack("<Q", 1 << 50) + b".",
        b"Nr\xff\xff\xff\xff.",  # LONG_BINPUT: a memo of 4 billion
        b"Np99999999999\n.",
        b"\x8b" + struct.pack("<i", 1 << 30) + b".",
        b"]\x8f.",
    ],
)
def test_an_opcode_that_torch_never_writes_is_refused(written):
    with pytest.raises(ValueError, match="opcode"):
        read_pickle(written, NOTHING)


@pytest.mark.parametrize(
    "written, told",
    [
        (b"X\xff\xff\xff\x7fabc.", "cut off"),
        (b"\x8c\xffabc.", "cut off"),
        (b"\x8a\xff" + b"\x7f" * 255 + b".", "number of 255 bytes"),
        (b"\x80\x63.", "protocol 99"),
        (b"h\x07.", "cut off or broken"),
        (b"j\xff\xff\xff\xff.", "cut off or broken"),
        (b"e.", "cut off or broken"),
        (b"\x86.", "cut off or broken"),
        (b"(NNe.", "cut off or broken"),
        (b"NNs.", "cut off or broken"),
        (b"}(Nu.", "cut off or broken"),
        (b"Q.", "persistent id"),
        (b"NN.", "cut off or broken"),
        (b"", "cut off"),
    ],
)
def test_a_pickle_that_is_broken_is_refused(written, told):
    with pytest.raises(ValueError, match=told):
        read_pickle(written, NOTHING)


def test_a_pickle_that_is_cut_off_anywhere_is_refused():
    written = pickled({"a": [1, (2, 3, "x" * 300)], "b": None})
    for end in range(len(written)):
        with pytest.raises(ValueError):
            read_pickle(written[:end], NOTHING)


def test_a_tower_of_tuples_is_no_key_and_does_not_end_the_process():
    with pytest.raises(ValueError):
        read_pickle(b"}N" + b"\x85" * 1_000_000 + b"Ns.", NOTHING)
    value, _ = read_pickle(b"N" + b"\x85" * 1_000_000 + b".", NOTHING)
    assert len(value) == 1


def test_an_object_is_its_class_and_its_state_only():
    value, _ = read_pickle(b"cthe\nkind\n)\x81}X\1\0\0\0aK\1sb.", Table(kinds=frozenset({"the.kind"})))
    assert type(value) is Made and (value.kind, value.state) == ("the.kind", {"a": 1})


@pytest.mark.parametrize(
    "written",
    [
        b"cthe\nkind\nN\x85\x81.",  # with arguments
        b"cthe\nmaker\n)\x81.",
        b"cthe\nkind\n)R.",
        b"cthe\nmaker\nNR.",
        b"cthe\nmaker\n}b.",
        b"cthe\nkind\n}b.",
        b"}}b.",
        b"cthe\ndtype\n)R.",
    ],
)
def test_what_is_named_is_used_as_what_it_is_only(written):
    table = Table(frozenset({"the.kind"}), {"the.maker": lambda: 1}, {"the.dtype": torch.float32})
    with pytest.raises(ValueError):
        read_pickle(written, table)


def test_a_maker_that_is_called_with_too_much_is_no_error_of_ours():
    with pytest.raises(ValueError, match="broken"):
        read_pickle(b"cthe\nmaker\nN\x85R.", Table(makers={"the.maker": lambda: 1}))


def test_bits_that_flip_raise_nothing_else():
    written = bytearray(pickled(OrderedDict(a=[1, 2, ("b", None)], c={"d": 1 << 40, "e": "text" * 80})))
    table = Table(makers={"collections.OrderedDict": dict})
    chance = random.Random(4)
    for _ in range(20_000):
        at, bit = chance.randrange(len(written)), 1 << chance.randrange(8)
        written[at] ^= bit
        try:
            read_pickle(bytes(written), table)
        except ValueError:
            pass
        finally:
            written[at] ^= bit
