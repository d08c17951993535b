"""What a checkpoint says of the programs that wrote it."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distckpt
from distckpt import environment


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    run = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    return run.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    (root / "deep").mkdir(parents=True)
    git(root, "init")
    git(root, "commit", "--allow-empty", "-m", "one")
    return root


def described_from(monkeypatch: pytest.MonkeyPatch, script: Path) -> dict[str, str]:
    monkeypatch.setattr(sys, "argv", [str(script)])
    return environment.describe()


def test_versions_are_told(monkeypatch, tmp_path):
    told = described_from(monkeypatch, tmp_path / "train.py")
    assert told["distckpt"] == distckpt.__version__
    assert told["torch"] == torch.__version__
    assert told["python"] == platform.python_version()
    assert "git_commit" not in told


@pytest.mark.parametrize("where", ["train.py", "deep/train.py", "not/there/train.py"])
def test_the_commit_of_the_training_script_is_told(monkeypatch, repository, where):
    told = described_from(monkeypatch, repository / where)
    assert told["git_commit"] == git(repository, "rev-parse", "HEAD")


@pytest.mark.parametrize(
    "done", [("pack-refs", "--all"), ("checkout", "--detach"), ("checkout", "-b", "feature/of-mine"), ("gc",)]
)
def test_the_commit_is_told_however_the_repository_holds_it(monkeypatch, repository, done):
    git(repository, *done)
    told = described_from(monkeypatch, repository / "train.py")
    assert told["git_commit"] == git(repository, "rev-parse", "HEAD")


def test_the_commit_of_a_worktree_is_that_of_the_worktree(monkeypatch, repository, tmp_path):
    git(repository, "worktree", "add", "-b", "other", str(tmp_path / "other"))
    git(tmp_path / "other", "commit", "--allow-empty", "-m", "two")
    told = described_from(monkeypatch, tmp_path / "other" / "train.py")
    assert told["git_commit"] == git(tmp_path / "other", "rev-parse", "HEAD") != git(repository, "rev-parse", "HEAD")


def test_a_repository_without_a_commit_does_not_borrow_that_of_the_folder_above(monkeypatch, repository):
    inner = repository / "inner"
    inner.mkdir()
    git(inner, "init")
    assert "git_commit" not in described_from(monkeypatch, inner / "train.py")


@pytest.mark.parametrize("head", [b"", b"\xff\xfe", b"ref: ../../secret\n", b"ref: a\0b", b"<b>no commit</b>"])
def test_a_damaged_repository_tells_no_commit(monkeypatch, repository, head):
    (repository / "secret").write_text("not a commit")
    (repository / ".git" / "HEAD").write_bytes(head)
    assert "git_commit" not in described_from(monkeypatch, repository / "train.py")


@pytest.mark.parametrize("argv", [[], [""], ["-c"]])
def test_a_program_without_a_script_is_described_too(monkeypatch, tmp_path, argv):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", argv)
    assert environment.describe().keys() == {"distckpt", "torch", "python"}
