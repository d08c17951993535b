"""The names that users import."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import distckpt
from distckpt import errors


def in_a_fresh_python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.parametrize("name", distckpt.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name):
    one = getattr(distckpt, name)
    assert one.__name__ == name and inspect.getdoc(one)


def test_all_is_sorted_without_a_name_twice():
    assert distckpt.__all__ == sorted(set(distckpt.__all__))


def test_all_errors_of_ours_are_public():
    ours = {name for name, one in vars(errors).items() if inspect.isclass(one) and issubclass(one, Exception)}
    assert ours <= set(distckpt.__all__)
    assert all(issubclass(getattr(errors, name), distckpt.DistckptError) for name in ours)


def test_dir_lists_the_public_names_and_the_version():
    assert {*distckpt.__all__, "__version__"} <= set(dir(distckpt))


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'distckpt' has no attribute 'Chekpointer'"):
        _ = distckpt.Chekpointer
    with pytest.raises(ImportError, match="cannot import name 'Chekpointer'"):
        from distckpt import Chekpointer  # noqa: F401


def test_importing_and_listing_costs_no_torch():
    loaded = "sorted(name for name in sys.modules if name.split('.')[0] in ('torch', 'numpy', 'mmengine'))"
    assert in_a_fresh_python(f"import sys, distckpt; dir(distckpt); distckpt.SaveFailed; print({loaded})") == "[]"


def test_a_star_import_gives_all_of_them_and_needs_nothing_that_is_an_extra():
    code = "import sys; sys.modules['mmengine'] = sys.modules['safetensors'] = None; from distckpt import *\n"
    told = in_a_fresh_python(code + "print(sorted(name for name in dir() if name[0] != '_' and name != 'sys'))")
    assert told == str(distckpt.__all__)
