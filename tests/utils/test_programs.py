"""The exit codes and last lines of programs."""

import pytest

from llmprune.utils.errors import UserError
from llmprune.utils.processes import Preempted
from llmprune.utils.programs import run_program


@pytest.mark.parametrize(
    ("end", "code", "line"),
    [
        (UserError("no such model"), 2, "error: no such model"),
        (Preempted("steps are kept", "the same command goes on"), 75, "asked to end: steps are kept; the same command"),
        (KeyboardInterrupt(), 130, "error: stopped; all is kept"),
        (SystemExit(143), 143, "error: stopped; all is kept"),
        (OSError(28, "No space left on device"), 2, "error: the disk is full"),
    ],
)
def test_the_ends_of_a_program(
    end: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)

    def work() -> int:
        raise end

    assert run_program(work, "all is kept") == code
    error = capsys.readouterr().err
    assert error.startswith(line) and error.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    if isinstance(end, Preempted | KeyboardInterrupt | SystemExit):  # rank 0 alone tells
        assert run_program(work, "all is kept") == code
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("end", [ValueError("a mistake in llmprune"), SystemExit(3)])
def test_other_ends_are_not_touched(end: BaseException) -> None:
    def work() -> int:
        raise end

    with pytest.raises(type(end)):
        run_program(work, "all is kept")
    assert run_program(lambda: 7, "all is kept") == 7
