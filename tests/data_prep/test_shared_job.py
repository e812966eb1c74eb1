"""Processes that share a job begin and end in any order."""

from pathlib import Path

import pytest

from data_prep.shared_job import SharedJob
from llmprune.utils.errors import UserError


def test_a_process_that_comes_after_the_end_has_nothing_to_do(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def job() -> SharedJob:
        return SharedJob(out, "job", {"size": 1}, ["a", "b/c"], out.is_file)

    first, second = job(), job()
    first.work(str.upper)
    second.work(lambda piece: pytest.fail(f"{piece} is done"))
    assert [second.result(piece) for piece in second.done] == ["A", "B/C"]
    with first.finishing() as mine:
        assert mine
        out.write_text("joined")
    with second.finishing() as mine:
        assert not mine
    late = job()
    assert late.finished and not late.is_open
    late.work(lambda piece: pytest.fail(f"{piece} is done"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_job_with_another_description_is_not_mixed_with_it(tmp_path: Path) -> None:
    SharedJob(tmp_path / "out", "job", {"size": 1}, ["a"])
    with pytest.raises(UserError, match="with other settings or data"):
        SharedJob(tmp_path / "out", "job", {"size": 2}, ["a"])
