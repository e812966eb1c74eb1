"""A job that can be killed and resumed: its folder, and the state that it saves."""

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
    """The progress of a job.

    Attributes:
        place: position in the inputs of the last packed document.
        documents: number of documents packed so far.
        bad: records that could not be used.
        names: domain names as in the inputs, by clean name.
        complete: whether the job is complete.
    """

    place: Place = (0, 0)
    documents: int = 0
    bad: list[BadRecord] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    complete: bool = False


class PackingJob:
    """The folder of a job.

    FOLDER/
      job.json          description of the job: settings and inputs
      data/             data that become the output
      notes/            notes that the packers need to resume
      progress.json     progress of the job, with the name of the folder of the packers' state
    """

    def __init__(self, folder: Path) -> None:
        """Use the job in ``folder``."""
        self.folder, self.data, self.notes = folder, folder / "data", folder / "notes"

    def packers_notes(self, name: str) -> Path:
        """The path of a packer's notes."""
        return self.notes / (name or "all")

    @property
    def has_progress(self) -> bool:
        """Whether there is saved progress to resume from."""
        return (self.folder / "progress.json").exists()

    @property
    def is_complete(self) -> bool:
        """Whether the job is complete."""
        return self.has_progress and self.load()[0].complete

    def load(self) -> tuple[Progress, Path]:
        """The saved progress of the job, and the folder of its packers' state."""
        state = read_json(self.folder / "progress.json")
        bad = [BadRecord(record["place"], record["reason"]) for record in state["bad"]]
        place = (state["place"][0], state["place"][1])
        return Progress(place, state["documents"], bad, state["names"], state["complete"]), self.folder / state["state"]

    def give_up(self) -> None:
        """Delete the saved progress, so that the job can't be resumed."""
        (self.folder / "progress.json").unlink(missing_ok=True)

    def save(self, packers: Mapping[str, Packer], progress: Progress) -> None:
        """Save the progress of the job; until this is complete, the previous saved progress is valid."""
        state = self.folder / f"state-{secrets.token_hex(4)}"
        for name, packer in packers.items():
            packer.save(state / (name or "all"))
        write_json(self.folder / "progress.json", {**asdict(progress), "state": state.name})
        for other in self.folder.glob("state-*"):
            if other != state:
                shutil.rmtree(other)

    def resume(self, packers: Mapping[str, Packer]) -> Progress:
        """Restore the packers' saved state and return the saved progress; without saved progress, start anew."""
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
    """Open the job that writes ``out``: a new one, or a stopped one with this description.

    Its folder is beside ``out``. The caller must move the output to ``out`` before the ``with`` block ends; then the
    folder is removed. If the block fails, a job with saved progress is kept, so that it can be resumed.

    Raises:
        UserError: ``out`` exists, another job for it was stopped or is running, or the path can't be written.
    """
    out = Path(out).resolve()
    refuse_existing(out, overwrite)
    job = PackingJob(out.with_name(f".{out.name}.partial"))
    described = json.loads(to_json({"schema": SCHEMA, **description}))
    with ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked_output(out))
            refuse_existing(out, overwrite)  # another process may have finished first
            refuse_deleting(job.folder)
            job.folder.mkdir(exist_ok=True)
            mark(job.folder)
        except OSError as error:
            raise UserError(f"can't write beside {out}: {error.strerror}") from None
        try:
            if job.has_progress and read_json(job.folder / "job.json") != described:
                raise UserError(
                    f"{job.folder} is what is left of a job with other settings or inputs: continue with those, or "
                    "delete it"
                )
            write_json(job.folder / "job.json", described)
            yield job
            remove(job.folder)
        except BaseException:
            if not job.has_progress:
                remove(job.folder)
            elif job.folder.exists():
                print(f"{job.folder} keeps what is done: the same command continues from there", file=sys.stderr)
            raise
