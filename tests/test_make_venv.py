import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "make-venv"

# A Python that notes what it was asked for, and makes environments with itself in them.
FAKE_PYTHON = """#!/bin/sh
echo "$@" >> "{log}"
if [ "$2" = venv ]; then
  mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && echo "$4/bin/python" > "$4/bin/pip"
fi
"""
# This Python, which believes that it is an older one.
TOO_OLD = f"""#!/bin/sh
[ "$1" = --version ] && echo "Python 3.10.9" && exit
exec {sys.executable} -c "import sys; sys.version_info = (3, 10, 9); exec(sys.argv[1])" "$2"
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with a space in its path, and nothing in it but what the script needs."""
    root = tmp_path / "a clone"
    (root / "scripts").mkdir(parents=True)
    shutil.copy(SCRIPT, root / "scripts")
    (root / "pyproject.toml").write_text("[project]\n")
    return root


def write_command(root: Path, name: str, text: str) -> None:
    path = root / "commands" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text.format(log=root / "log"))
    path.chmod(0o755)


def run(root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{root / 'commands'}:{os.environ['PATH']}"
    command = [str(root / "scripts" / "make-venv"), ".venv-x", "test"]
    environment = {"HOME": os.environ.get("HOME", "/"), "PATH": path, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def installs(root: Path) -> list[str]:
    return [line for line in (root / "log").read_text().splitlines() if "pip install" in line]


def test_torch_is_pinned_in_the_command_that_installs_everything_else(root):
    write_command(root, "python3", FAKE_PYTHON)
    made = run(root)
    assert (made.returncode, made.stdout) == (0, f"{root}/.venv-x/bin/python\n")
    (install,) = installs(root)
    assert install.endswith(f"torch==2.13.0 -e {root}[test]")


def test_a_second_call_installs_nothing(root):
    write_command(root, "python3", FAKE_PYTHON)
    assert run(root).stdout == run(root).stdout
    assert len(installs(root)) == 1


def test_another_pyproject_or_another_torch_is_installed(root):
    write_command(root, "python3", FAKE_PYTHON)
    run(root)
    (root / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    run(root)
    run(root, DISTCKPT_TORCH="torch==2.14.1")
    asked = [line.partition(" -e ")[0].split()[-1] for line in installs(root)]
    assert asked == ["torch==2.13.0", "torch==2.13.0", "torch==2.14.1"]


def test_an_environment_that_was_copied_elsewhere_is_made_again(root):
    write_command(root, "python3", FAKE_PYTHON)
    run(root)
    moved = shutil.copytree(root, root.parent / "moved")
    write_command(moved, "python3", FAKE_PYTHON)
    assert run(moved).stderr.startswith("making .venv-x")


def test_a_failed_install_is_tried_again(root):
    write_command(root, "python3", FAKE_PYTHON + 'case "$3" in install) exit 7;; esac\n')
    assert [run(root).returncode, run(root).returncode] == [7, 7]
    assert len(installs(root)) == 2


def test_a_python_that_is_too_old_is_named(root):
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        write_command(root, name, TOO_OLD)
    failed = run(root)
    assert failed.returncode == 1
    assert "Python 3.11 or newer" in failed.stderr and "python3: Python 3.10.9" in failed.stderr


def test_a_disk_that_is_short_is_named_before_anything_is_made(root):
    write_command(root, "python3", FAKE_PYTHON)
    write_command(root, "df", "#!/bin/sh\necho Avail\necho 100M\n")
    failed = run(root)
    assert failed.returncode == 1
    assert "100 MiB are free" in failed.stderr and str(root) in failed.stderr
    assert not (root / ".venv-x").exists()
