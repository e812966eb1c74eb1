"""However a command ends, it takes its workers and unfinished output with it."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import pytest

from data_prep import __main__ as command
from llmprune.data.records import Input
from llmprune.data.sources import Document, Fields

ORPHANS = """
import os, signal
from tokenizers import Tokenizer, models
from data_prep.encode import Batch, Tokens, encoded
from llmprune.data.sources import Document

batches = (Batch([Document("text", "a", (0, n), n)]) for n in range(100))
results = encoded(Tokens(Tokenizer(models.BPE()), [], []), batches, 2)
next(results)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def _own_handler() -> Iterator[None]:
    """A SIGTERM that nobody handles fails the test and not the whole session."""

    def fail(number: int, frame: FrameType | None) -> None:
        raise AssertionError("SIGTERM is not handled")

    before = signal.signal(signal.SIGTERM, fail)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("_own_handler")
def test_sigterm_ends_workers_and_removes_unfinished_output(
    corpus: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminated(inputs: Sequence[Input], fields: Fields, **options: object) -> Iterator[Document]:
        for number in range(1000 if inputs else 0):
            yield Document(f"{number}: " + "one two " * 40, "a", (0, number), number)
            if number == 100:
                assert len(multiprocessing.active_children()) == 2
                assert list(tmp_path.glob(".out.partial"))
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("data_prep.reading.documents", terminated)
    monkeypatch.setattr("data_prep.reading._BATCH_CHARACTERS", 1000)
    arguments = [corpus, "--tokenizer", data / "tokenizer", "--out", tmp_path / "out", "--processes", "2"]
    monkeypatch.setattr(sys, "argv", ["data_prep", "tokenize", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 128 + signal.SIGTERM
    assert not multiprocessing.active_children() and not list(tmp_path.iterdir())


def test_workers_end_with_a_killed_parent() -> None:
    process = subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, start_new_session=True)
    try:
        process.communicate(timeout=20)  # until the last process that holds the pipe has ended
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
