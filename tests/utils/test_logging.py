"""Where lines go that are logged: standard error at a level of choice, and the folder of a job that train.py runs."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmprune.callbacks.console_lines import ConsoleLines
from llmprune.checkpoints.run_folder import RunFolder
from llmprune.pruning.gates.alarms import GateAlarms
from llmprune.utils.errors import UserError
from llmprune.utils.files import write_text
from llmprune.utils.job_log import logged_in
from llmprune.utils.logs import logs_shown
from llmprune.utils.outputs import LOG, clear, is_empty, mark, refuse_deleting

ROOT = Path(__file__).parents[2]
log = logging.getLogger("llmprune.something")


@pytest.mark.parametrize(
    "level, shown",
    [(None, ["a warning"]), ("", ["a warning"]), ("INFO", ["news", "a warning"]), ("error", [])],
)
def test_the_level_of_choice(
    level: str | None, shown: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LLMPRUNE_LOG", raising=False)
    if level is not None:
        monkeypatch.setenv("LLMPRUNE_LOG", level)
    with logs_shown():
        log.info("%s", "news")
        log.warning("a warning")
        logging.getLogger("another").info("nothing of ours")
    log.info("nobody asked")
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"^\d\d:\d\d:\d\d llmprune\.something: ", "", line) for line in lines] == shown


def test_a_level_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPRUNE_LOG", "warn")
    with pytest.raises(UserError, match="LLMPRUNE_LOG is 'warn'; did you mean 'WARNING'"), logs_shown():
        pass


@pytest.mark.parametrize("command", [["llmprune.cli", "families"], ["data_prep", "--help"], ["train", "none.yaml"]])
def test_every_command_knows_the_levels(command: list[str]) -> None:
    environment = {**os.environ, "LLMPRUNE_LOG": "loud"}
    run = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert run.returncode == 2 and run.stderr.startswith("error: LLMPRUNE_LOG is 'loud'; valid: DEBUG, ERROR")
    assert len(run.stderr.splitlines()) == 1


def lines_in(folder: Path) -> list[str]:
    pattern = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d llmprune\.something: "
    return [re.sub(pattern, "", line) for line in (folder / LOG).read_text().splitlines()]


def test_a_job_keeps_what_it_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also what it logs before it begins its folder; a job that goes on adds to it, one that begins anew does not."""
    place = tmp_path / "run"
    run = RunFolder(place)
    with logs_shown(), run.claimed():
        log.info("first")
        assert not (place / LOG).exists() and is_empty(place)
        run.create()
        log.info("second")
        log.warning("third")
        assert lines_in(place) == ["first", "second", "third"]
    log.info("of nobody")
    with logs_shown(), run.claimed():
        log.info("refused")
    assert lines_in(place) == ["first", "second", "third"]
    with logs_shown(), run.claimed():
        log.info("fourth")
        write_text(run.config, "")
        log.info("fifth")
    assert lines_in(place) == ["first", "second", "third", "fourth", "fifth"]
    with logs_shown(), run.claimed():
        log.info("sixth")
        run.create()
        log.info("seventh")
    assert lines_in(place) == ["sixth", "seventh"]
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == ["third"]


def test_what_is_logged_makes_no_run_of_a_folder(tmp_path: Path) -> None:
    ours, other = tmp_path / "ours", tmp_path / "other"
    for folder in (ours, other):
        folder.mkdir()
        (folder / LOG).write_text("a line\n")
    mark(ours)
    assert is_empty(ours) and RunFolder(ours).find(overwrite=False, autoresume=True) is None
    assert not is_empty(other)
    with pytest.raises(UserError, match="did not make"):
        refuse_deleting(other)
    clear(ours)
    assert not (ours / LOG).exists()


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    place = tmp_path / "run"
    RunFolder(place).create()
    with logs_shown(), logged_in(place):
        (place / LOG).mkdir()
        log.info("lost")
        log.info("lost as well")
    assert [*(place / LOG).iterdir()] == []


def test_who_imports_llmprune_decides_about_lines(tmp_path: Path) -> None:
    clear(tmp_path / "run")
    with logged_in(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").touch()
        log.warning("for whoever listens")
        assert logging.getLogger("llmprune").level == logging.NOTSET
    assert not (tmp_path / "run" / LOG).exists()


def test_a_target_is_reached_once_and_after_the_warm_up(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llmprune")
    alarms = GateAlarms()
    for batch, warmup, sparsity in ((1, 0.5, 0.5), (2, 1.0, 0.49), (3, 1.0, 0.4975), (4, 1.0, 0.5)):
        alarms.look(batch, warmup, {"head": sparsity}, {"head": 0.5}, {"head": 4.0})
    assert caplog.messages == ["the expected sparsity of head has reached its target, 0.5000, at batch 3"]


def test_a_line_that_cannot_be_written_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    class Full:
        def write(self, text: str) -> None:
            tried.append(text)
            raise OSError(28, "No space left on device")

    with logs_shown():
        monkeypatch.setattr(sys, "stderr", Full())
        log.warning("no room")
        ConsoleLines("1ba")._print("batch 1")
        monkeypatch.undo()
    assert len(tried) == 2 and "no room" in tried[0] and tried[1] == "batch 1"
