"""A job that can be killed and goes on: its folder, and what it writes down on its way."""

import json
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.packer import Packer
from llmprune.data.sources import BadRecord, Place
from llmprune.utils.errors import UserError
from llmprune.utils.files import read_json, to_json, write_json
from llmprune.utils.outputs import locked_output, mark, refuse_deleting, refuse_existing, remove

SCHEMA = 2


@dataclass
class Progress:
    """How far a job has come.

    Attributes:
        place: of the last document that was packed.
        documents: packed so far.
        bad: records that could not be used.
        names: of domains, as their inputs spell them, by clean name.
        complete: whether nothing is left.
    """

    place: Place = (0, 0)
    documents: int = 0
    bad: list[BadRecord] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    complete: bool = False


class PackingJob:
    """The folder of a job.

    FOLDER/
      job.json          what the job is: settings and inputs
      data/             becomes the output
      notes/            what the packers need to go on
      progress.json     how far it has come; names the folder of the packers' state
    """

    def __init__(self, folder: Path) -> None:
        """The job in ``folder``."""
        self.folder, self.data, self.notes = folder, folder / "data", folder / "notes"

    def packers_notes(self, name: str) -> Path:
        """Where a packer keeps its notes."""
        return self.notes / (name or "all")

    @property
    def has_progress(self) -> bool:
        """Whether there is something to go on from."""
        return (self.folder / "progress.json").exists()

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.has_progress and self.load()[0].complete

    def load(self) -> tuple[Progress, Path]:
        """How far the job has come, and the folder of its packers' state."""
        state = read_json(self.folder / "progress.json")
        bad = [BadRecord(record["place"], record["reason"]) for record in state["bad"]]
        place = (state["place"][0], state["place"][1])
        return Progress(place, state["documents"], bad, state["names"], state["complete"]), self.folder / state["state"]

    def give_up(self) -> None:
        """Leave nothing to go on from."""
        (self.folder / "progress.json").unlink(missing_ok=True)

    def save(self, packers: Mapping[str, Packer], progress: Progress) -> None:
        """Write down how far the job has come; until that is done, what was written down before is valid."""
        state = self.folder / f"state-{secrets.token_hex(4)}"
        for name, packer in packers.items():
            packer.save(state / (name or "all"))
        write_json(self.folder / "progress.json", {**asdict(progress), "state": state.name})
        for other in self.folder.glob("state-*"):
            if other != state:
                shutil.rmtree(other)

    def resume(self, packers: Mapping[str, Packer]) -> Progress:
        """Make packers what they were when the job wrote itself down last, if it did."""
        if not self.has_progress:
            for path in (self.data, self.notes):
                remove(path)
                path.mkdir()
            return Progress()
        progress, state = self.load()
        for name, packer in packers.items():
            packer.resume(state / (name or "all"))
        return progress


@contextmanager
def opened_job(out: Path | str, description: Mapping[str, Any], *, overwrite: bool) -> Iterator[PackingJob]:
    """The job that writes ``out``: a new one, or the one of this description that was stopped.

    Its folder stands beside ``out``. What is to become the output must be moved there by the caller, before the block
    ends; then the folder is removed. If the block fails, a job that has progress stays, so that it can go on.

    Raises:
        UserError: ``out`` exists, another job for it was stopped or is at work, or the place can't be written.
    """
    out = Path(out).resolve()
    refuse_existing(out, overwrite)
    job = PackingJob(out.with_name(f".{out.name}.partial"))
    described = json.loads(to_json({"schema": SCHEMA, **description}))
    with ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked_output(out))
            refuse_existing(out, overwrite)  # another process may have been faster
            refuse_deleting(job.folder)
            job.folder.mkdir(exist_ok=True)
            mark(job.folder)
        except OSError as error:
            raise UserError(f"can't write beside {out}: {error.strerror}") from None
        try:
            if job.has_progress and read_json(job.folder / "job.json") != described:
                raise UserError(
                    f"{job.folder} is what is left of a job with other settings or inputs: go on with those, or "
                    "delete it"
                )
            write_json(job.folder / "job.json", described)
            yield job
            remove(job.folder)
        except BaseException:
            if not job.has_progress:
                remove(job.folder)
            elif job.folder.exists():
                print(f"{job.folder} keeps what is done: the same command goes on from there", file=sys.stderr)
            raise
