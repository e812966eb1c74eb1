"""The command line as a user meets it: another process, its exit code and what it prints."""

import subprocess
import sys
from pathlib import Path


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_prep", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_mistake_is_one_line_and_exit_code_2(corpus: Path, data: Path, tmp_path: Path) -> None:
    made = run("tokenize", tmp_path / "missing", "--tokenizer", data / "tokenizer", "--out", tmp_path / "out")
    assert made.returncode == 2 and made.stdout == ""
    assert made.stderr == f"error: {tmp_path}/missing does not exist\n"
    assert not list(tmp_path.iterdir())


def test_describe_gives_the_text_back(corpus: Path, data: Path) -> None:
    made = run("describe", data, "--samples", "2", "--domain", "letters")
    assert made.returncode == 0, made.stderr
    table, *samples = made.stdout.split("\n--- ")
    assert "samples of 32 tokens" in table and "numbers" in table
    assert [s.split(", sample")[0] for s in samples] == ["letters, train"] * 2 + ["letters, eval"] * 2
    written = (corpus / "letters/part.jsonl").read_text()
    for sample in samples:
        parts = sample.partition("\n")[2].split("</s>")
        assert all(part.strip() in written for part in parts)
    refused = run("describe", data, "--domain", "x")
    assert (refused.stdout, refused.stderr.split(";")[0]) == ("", "error: there is no domain 'x'")
    assert "--samples" in run("describe", data, "--samples", "-1").stderr


def test_tokenize_prints_counts_and_skipped_records(data: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.jsonl").write_text('{"text": "one two three four five six"}\n' * 50 + "{oops\n")
    arguments = ["--tokenizer", data / "tokenizer", "--out", tmp_path / "out", "--sequence-length", "16"]
    made = run("tokenize", tmp_path / "in", *arguments, "--domain", "mine", "--max-bad", "0.1", "--processes", "2")
    assert made.returncode == 0, made.stderr
    domain, split, documents, *_ = made.stdout.splitlines()[1].split()
    assert (domain, split, documents) == ("mine", "train", "50")
    assert "x.jsonl:51" in made.stderr
