"""What becomes of checkpoints: their checksums, how many stay, and copies of them in another place."""

import logging
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from llmprune.checkpoint_folder import LATEST, CheckpointFolder, batch_of, record_name
from llmprune.checksums import describe
from llmprune.errors import UserError
from llmprune.files import is_leftover, write_json
from llmprune.processes import ACTIVITY
from llmprune.stores import Store

WAITING = 2  # checkpoints that may wait to be brought away before training waits for them
_APART = ("states", "tensorboard", "wandb")  # of a run folder: what can be made anew, or is large

log = logging.getLogger(__name__)


class Safekeeping(Callback):
    """Takes care of every checkpoint once it is written, beside the training that goes on.

    Every rank looks after the files that it wrote itself, and no rank waits for another: it computes their checksums,
    brings them to the store if there is one, vouches for them (``baN.sums-R.json``, locally and then in the store),
    and deletes its part of checkpoints of which there are enough. So a checkpoint in the store is complete when all
    ranks vouch for it, and no file is deleted that is still to be copied.

    A store that can't be reached is a warning while the run goes on, and an error if the last checkpoint is not there
    at its end; a later call with ``run.autoresume=true`` brings what is missing.
    """

    def __init__(self, folder: Path, keep: int, store: Store | None = None, *, resumed: bool = False) -> None:
        """Prepare.

        Args:
            folder: of the run; its checkpoints are in ``checkpoints``.
            keep: how many checkpoints stay in it; -1 = all.
            store: where copies go.
            resumed: whether the run goes on with what is there.

        Raises:
            UserError: the store can't be reached, or holds another run.
        """
        self._folder, self._keep, self._store = folder, keep, store
        self._checkpoints, self._rank = CheckpointFolder(folder / "checkpoints"), dist.get_global_rank()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="safekeeping")
        self._pending: deque[Future[None]] = deque()
        self._noticed: int | None = None
        self._missing: UserError | None = None  # why the newest checkpoint is not in the store
        self._copied: dict[Path, tuple[int, int]] = {}  # files beside the checkpoints, as they were brought
        self._loaded: int | None = None  # the batch that a resumed run goes on from
        self._there = set() if store is None else set(store.names("checkpoints/"))
        if store is not None and self._there and not resumed:
            raise UserError(
                f"{store.url} holds a run's checkpoints already: pass run.autoresume=true to go on with it, or another "
                "checkpoint.remote"
            )

    def after_load(self, state: State, logger: Logger) -> None:
        """Remember where the run goes on."""
        self._loaded = state.timestamp.batch.value

    def batch_start(self, state: State, logger: Logger) -> None:
        """See whether the batch before has left a checkpoint."""
        self._notice(state.timestamp.batch.value)

    def fit_end(self, state: State, logger: Logger) -> None:
        """See to the last checkpoint.

        Raises:
            UserError: it could not be brought to the store.
        """
        self.finish(state.timestamp.batch.value)

    def close(self, state: State, logger: Logger) -> None:
        """Let what was begun end, however the run ends."""
        with suppress(RuntimeError):  # the interpreter is ending, and takes no more work
            self._notice(state.timestamp.batch.value)
        self._worker.shutdown()

    def finish(self, batch: int) -> None:
        """See to the checkpoint after ``batch`` batches and wait until all is done.

        Raises:
            UserError: it could not be brought to the store.
        """
        self._notice(batch)
        while self._pending:
            self._await_oldest()
        if self._missing is not None:
            raise UserError(
                f"{self._missing}; the newest checkpoint is in {self._checkpoints.path} alone: run the same job with "
                "run.autoresume=true once the store can be reached"
            )

    def _await_oldest(self) -> None:
        while not wait([self._pending[0]], timeout=1).done:
            ACTIVITY.note()  # how long that takes is the store's affair
        self._pending.popleft().result()

    def _notice(self, batch: int) -> None:
        if batch == self._noticed or not (files := self._checkpoints.own_files(batch, self._rank)):
            return
        self._noticed = batch
        name = record_name(batch, self._rank)
        known = (self._checkpoints.path / name).is_file()
        if batch == self._loaded and (not known or self._store is None or f"checkpoints/{name}" in self._there):
            return
        while len(self._pending) >= WAITING:
            self._await_oldest()
        self._pending.append(self._worker.submit(self._keep_safe, batch, files))

    def _keep_safe(self, batch: int, files: list[Path]) -> None:
        """Do everything for a checkpoint; runs in a thread."""
        top, name = self._checkpoints.path, record_name(batch, self._rank)
        try:
            if batch != self._loaded:
                described = {path.relative_to(top).as_posix(): describe(path) for path in files}
                ranks = dist.get_world_size() if files[0].parent != top else 1
                write_json(top / name, {"schema": 1, "ranks": ranks, "files": described})
            if self._store is not None:
                if self._rank == 0:
                    self._copy_rest(self._store)
                for path in files:
                    self._store.put(path, f"checkpoints/{path.relative_to(top).as_posix()}")
                self._store.put(top / name, f"checkpoints/{name}")
                self._there.add(f"checkpoints/{name}")
            self._missing = None
        except UserError as error:
            self._missing = error
            log.warning("%s; the run goes on, and its next checkpoint is tried again", error)
        except OSError as error:
            self._missing = UserError(f"the checkpoint after batch {batch} can't be looked after: {error}")
            log.warning("%s", self._missing)
        self._delete_old(batch)

    def _copy_rest(self, store: Store) -> None:
        """Bring what has changed of the run folder's other files."""
        for path in sorted(self._folder.rglob("*")):
            name = path.relative_to(self._folder)
            if name.parts[0] in _APART or any(is_leftover(Path(part)) for part in name.parts):
                continue
            if name.parts[0] == "checkpoints" and (len(name.parts) == 1 or name.parts[1].startswith(("ba", LATEST))):
                continue
            if path.is_file():
                now = (path.stat().st_mtime_ns, path.stat().st_size)
                if self._copied.get(path) != now:
                    store.put(path, name.as_posix())
                    self._copied[path] = now

    def _delete_old(self, done: int) -> None:
        """Delete this rank's part of what is no newer than a checkpoint that is done with, but for those that stay."""
        top = self._checkpoints.path
        batches = [batch_of(path) for path in self._checkpoints.by_age()]
        for batch in [] if self._keep < 0 else batches[self._keep :]:
            if batch > done:
                continue
            for path in reversed(self._checkpoints.own_files(batch, self._rank)):  # first what marks it as complete
                path.unlink(missing_ok=True)
            (top / record_name(batch, self._rank)).unlink(missing_ok=True)
            with suppress(OSError):  # others have parts in it
                (top / f"ba{batch}").rmdir()
