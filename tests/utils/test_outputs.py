"""Folders and files that llmprune makes: nothing else is deleted, and one process at a time writes them."""

import os
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from queue import Queue

import pytest

from llmprune.utils import locks, outputs
from llmprune.utils.errors import UserError
from llmprune.utils.outputs import (
    MARK,
    check_output,
    clear,
    is_ours,
    output_folder,
    put_in_place,
    refuse_existing,
    working_folder,
)

FOREIGN = {
    "a project": {"config.yaml": "mine: true", "src/thesis.txt": "years of work", ".git/HEAD": "ref"},
    "a Hugging Face model": {"config.json": "{}", "model.safetensors": "weights"},
    "a mark of somebody else": {MARK: '{"made_by": "another"}', "notes.txt": "text"},
    "a broken mark": {MARK: "{", "notes.txt": "text"},
}


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_what_llmprune_did_not_make_is_never_deleted(files: dict[str, str], tmp_path: Path) -> None:
    place = tmp_path / "place"
    fill(place, files)
    made = tmp_path / "made"
    made.mkdir()
    for attempt in (
        lambda: output_folder(place, overwrite=True).__enter__(),
        lambda: put_in_place(made, place, overwrite=True),
        lambda: clear(place),
        lambda: working_folder(place).__enter__(),
        lambda: refuse_existing(place, True),
    ):
        with pytest.raises(UserError, match="llmprune did not make"):
            attempt()
        assert contents(place) == files


def test_what_llmprune_made_is_replaced_when_asked(tmp_path: Path) -> None:
    for overwrite in (False, True):
        with output_folder(tmp_path / "out", overwrite) as folder:
            (folder / "file").write_text(str(overwrite))
    assert is_ours(tmp_path / "out") and (tmp_path / "out" / "file").read_text() == "True"
    with pytest.raises(UserError, match="exists already"), output_folder(tmp_path / "out"):
        pass
    (tmp_path / "out" / ".git").mkdir()
    with pytest.raises(UserError, match="git checkout"), output_folder(tmp_path / "out", overwrite=True):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_what_killed_processes_left_goes_with_the_next(tmp_path: Path) -> None:
    for name in (".out.llmprune-0123abcd.tmp", ".out.llmprune-0123abcd.old"):
        (tmp_path / name).mkdir()
    (tmp_path / ".other.llmprune-0123abcd.tmp").mkdir()
    with output_folder(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.llmprune-0123abcd.tmp", "out"]


def test_hidden_files_of_others_are_no_leftovers(tmp_path: Path) -> None:
    for name in (".notes.old", ".backup.tmp", ".model.20240101.old"):
        (tmp_path / "project" / name).mkdir(parents=True)
    with pytest.raises(UserError, match="did not make"):
        clear(tmp_path / "project")
    (tmp_path / ".model.20240101.old").mkdir()
    with output_folder(tmp_path / "model"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.20240101.old", "model", "project"]
    assert len([*(tmp_path / "project").iterdir()]) == 3


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="within"), output_folder(tmp_path / "out"):
        raise ValueError("within")
    assert not list(tmp_path.iterdir())


def test_files_beside_are_replaced_only_together_with_the_file(tmp_path: Path) -> None:
    """Such as the tensors of a plan: MODEL/model.json would be written with MODEL/model.safetensors."""
    out, beside = tmp_path / "model.json", tmp_path / "model.safetensors"
    beside.write_text("weights")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="model.safetensors exists already and would be replaced with"):
            check_output(out, ".json", overwrite, [beside])
    out.write_text("{}")
    with pytest.raises(UserError, match="exists already"):
        check_output(out, ".json", False, [beside])
    check_output(out, ".json", True, [beside])


def _try(kind: str, place: Path, answer: "Queue[str]") -> None:
    locks._held.clear()  # of the process that this one was forked from
    try:
        if kind == "file":
            check_output(place, ".json", True)
        else:
            (output_folder(place, True) if kind == "folder" else working_folder(place)).__enter__()
        answer.put("")
    except UserError as error:
        answer.put(str(error))


def another_process(kind: str, place: Path) -> str:
    """What another process is told that wants to write a place; nothing = it may."""
    context = get_context("fork")
    answer = context.Queue()
    process = context.Process(target=_try, args=(kind, place, answer))
    process.start()
    told: str = answer.get(timeout=60)
    process.join()
    return told


@pytest.mark.parametrize("kind", ["file", "folder", "run"])
def test_the_second_process_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "RENEWAL", 0.2)
    place = tmp_path / ("out.json" if kind == "file" else "out")
    with ExitStack() as held:
        monkeypatch.setattr(outputs, "_PROCESS", held)
        if kind == "file":
            check_output(place, ".json", True)
        else:
            held.enter_context(output_folder(place) if kind == "folder" else working_folder(place))
        told = another_process(kind, place)
        assert f"process {os.getpid()} on " in told and f"is writing {place}" in told
    assert another_process(kind, place) == ""


def test_a_folder_that_nothing_came_of_is_not_left(tmp_path: Path) -> None:
    with working_folder(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not list(tmp_path.iterdir())
