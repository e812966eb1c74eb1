"""The set-up, with a Python that only notes what it is asked: begun twice at once, cut off, with pins that change."""

import os
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "scripts" / "setup.sh"
# Makes an environment that holds itself, and installs slowly.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  -V) echo "Python 3.11.0" ;;
  "-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; rm -f .venv/stamp; echo made >> log ;;
  *install*editable*) sleep 1; [ ! -e broken ] || exit 1; echo installed >> log ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "a checkout"
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts/setup.sh").write_text(SETUP.read_text())
    (folder / "setup.py").write_text("ranges\n")
    (folder / "requirements").mkdir()
    (folder / "requirements/pinned.txt").write_text("pins\n")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return folder


def begin(checkout: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        ["bash", "scripts/setup.sh"],
        cwd=checkout,
        env={**os.environ, "PYTHON": str(checkout.parent / "python")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def log(checkout: Path) -> list[str]:
    return (checkout / "log").read_text().split()


def test_of_two_at_once_one_works(checkout: Path) -> None:
    told = [one.communicate(timeout=60)[0] for one in [begin(checkout), begin(checkout)]]
    assert sorted(text.splitlines()[-1][:12] for text in told) == ["setup: .venv", "setup: done;"]
    assert log(checkout) == ["made", "installed"]


def test_what_was_cut_off_is_made_anew_and_what_is_current_stays(checkout: Path) -> None:
    (checkout / "broken").touch()
    first = begin(checkout)
    first.communicate(timeout=60)
    assert first.returncode != 0
    (checkout / "broken").unlink()
    for _ in range(2):
        assert begin(checkout).wait(60) == 0
    assert log(checkout) == ["made", "made", "installed"]
    (checkout / "requirements/pinned.txt").write_text("other pins\n")
    assert begin(checkout).wait(60) == 0
    assert log(checkout)[3:] == ["made", "installed"]


@pytest.mark.parametrize("link", [True, False])
def test_an_environment_of_others_stays(checkout: Path, link: bool) -> None:
    own = checkout.parent / "own" if link else checkout / ".venv"
    own.mkdir()
    (own / "package").touch()
    if link:
        (checkout / ".venv").symlink_to(own)
    run = begin(checkout)
    error = run.communicate(timeout=60)[1]
    assert run.returncode == 2 and error.splitlines()[-1].startswith("error: .venv was not made by this script")
    assert [file.name for file in own.iterdir()] == ["package"]


def test_an_environment_of_an_older_version_is_replaced(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "stamp").write_text("old")
    assert begin(checkout).wait(60) == 0
    assert log(checkout) == ["made", "installed"]
