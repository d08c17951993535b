"""A package that is missing, too old or too new is named together with what to install."""

from __future__ import annotations

from importlib import metadata

import pytest

from distckpt.extras import require


@pytest.fixture
def installed(monkeypatch):
    """Some package is there in that version, for whoever asks."""
    return lambda version: monkeypatch.setattr(metadata, "version", lambda _: version)


def test_what_is_there_is_fine():
    require("torch", extra="none", at_least="2.13")


def test_what_is_missing_is_named_with_the_extra_that_brings_it():
    with pytest.raises(ImportError, match=r"nobody-has-this>=1\.0, which is not .*install 'distckpt\[some\]'"):
        require("nobody-has-this", extra="some", at_least="1.0")


@pytest.mark.parametrize("version", ["2.6", "2.6.0", "2.10", "2.6.1+cpu", "2.9.0.dev20261101", "3.0.rc1"])
def test_versions_between_the_bounds_are_fine(installed, version):
    installed(version)
    require("some", extra="some", at_least="2.6", below="3.1")


@pytest.mark.parametrize("version", ["2.5.9", "2.5.10", "1.99", "3.1", "3.1.0", "3.10", "4.0"])
def test_versions_beyond_them_are_named(installed, version):
    installed(version)
    with pytest.raises(ImportError, match=rf"needs some>=2\.6,<3\.1, and {version} is installed: pip install"):
        require("some", extra="some", at_least="2.6", below="3.1")
