"""What becomes of checkpoints: their checksums, how many stay, and copies of them in another place."""

import logging
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from llmprune.checkpoints.checkpoint_folder import LATEST, CheckpointFolder, batch_of, is_complete, record_name
from llmprune.utils.checksums import describe_file
from llmprune.utils.errors import UserError
from llmprune.utils.files import write_json
from llmprune.utils.object_store import Store
from llmprune.utils.outputs import is_leftover
from llmprune.utils.processes import ACTIVITY
from llmprune.utils.ranks import on_rank_zero

ROUND = 20.0  # seconds in which ranks tell each other whether they are done
WAITING = 2  # checkpoints that may wait to be brought away before training waits for them
_APART = ("states", "tensorboard", "wandb")  # of a run folder: what can be made anew, or is large

log = logging.getLogger(__name__)


class CheckpointUploading(Callback):
    """Takes care of every checkpoint once it is written, beside the training that goes on.

    Every rank looks after the files that it wrote itself, and no rank waits for another: it computes their checksums,
    brings them to the store if there is one, vouches for them (``baN.sums-R.json``, locally and then in the store),
    and deletes its part of checkpoints of which there are enough. So a checkpoint in the store is complete when all
    ranks vouch for it, and no file is deleted that is still to be copied.

    A store that can't be reached is a warning while the run goes on, and an error if the last checkpoint is not there
    at its end; a later call with ``run.autoresume=true`` brings what is missing.
    """

    def __init__(
        self, folder: Path, keep: int, store: Store | None = None, *, writers: int = 1, resumed: bool = False
    ) -> None:
        """Prepare.

        Args:
            folder: of the run; its checkpoints are in ``checkpoints``.
            keep: how many checkpoints stay in it; -1 = all.
            store: where copies go; it may hold nothing, or a run that was resumed.
            writers: ranks that write a part of a sharded checkpoint.
            resumed: whether the run goes on with a checkpoint.

        Raises:
            UserError: the store can't be reached.
        """
        self._folder, self._keep, self._store = folder, keep, store
        self._checkpoints, self._rank = CheckpointFolder(folder / "checkpoints"), dist.get_global_rank()
        self._writers, self._resumed = writers, resumed
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-uploading")
        self._pending: deque[Future[None]] = deque()
        self._noticed: int | None = None
        self._missing: UserError | None = None  # why the newest checkpoint is not in the store
        self._copied: dict[Path, tuple[int, int]] = {}  # files beside the checkpoints, as they were brought
        self._loaded: int | None = None  # the batch that a resumed run goes on from
        self._there = set() if store is None else set(on_rank_zero(lambda: store.names("checkpoints/ba")))

    def after_load(self, state: State, logger: Logger) -> None:
        """Remember where a resumed run goes on."""
        if self._resumed:
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
        """See to the checkpoint after ``batch`` batches and wait until all ranks have done that.

        Raises:
            UserError: on all ranks, if one of them could not bring its part to the store.
        """
        self._notice(batch)
        while True:  # in rounds, since collectives lose patience with a rank that copies for long
            done = not self._pending or wait([self._pending[-1]], timeout=ROUND).done
            ACTIVITY.note()
            if all(dist.all_gather_object(bool(done))):
                break
        while self._pending:
            self._pending.popleft().result()
        lost = [reason for reason in dist.all_gather_object(str(self._missing or "")) if reason]
        if lost:
            raise UserError(
                f"{lost[0]}; the newest checkpoint is in {self._checkpoints.path} alone: run the same job with "
                "run.autoresume=true once the store can be reached"
            )

    def copy_rest(self) -> None:
        """Bring what was written after the last checkpoint to the store, if there is one.

        Raises:
            UserError: on all ranks, if it could not be brought there.
        """
        if self._store is not None:
            store = self._store
            on_rank_zero(lambda: self._copy_rest(store))

    def _await_oldest(self) -> None:
        while not wait([self._pending[0]], timeout=1).done:
            ACTIVITY.note()  # how long that takes is the store's affair
        self._pending.popleft().result()

    def _notice(self, batch: int) -> None:
        if batch == self._noticed or not (files := self._checkpoints.own_files(batch, self._rank)):
            return
        top = self._checkpoints.path
        if self._rank == 0 and not is_complete(files[0] if files[0].parent == top else files[0].parent):
            return  # its writing has failed: nobody vouches for what is left
        self._noticed = batch
        name = record_name(batch, self._rank)
        known = (top / name).is_file()
        if batch == self._loaded:
            if known and (self._store is None or f"checkpoints/{name}" in self._there):
                return
            parts = self._checkpoints.ranks_of(batch)
            if parts and parts != set(range(self._writers)):  # other ranks wrote it, and would have to vouch for it
                return
        while len(self._pending) >= WAITING:
            self._await_oldest()
        self._pending.append(self._worker.submit(self._keep_safe, batch, files))

    def _keep_safe(self, batch: int, files: list[Path]) -> None:
        """Do everything for a checkpoint; runs in a thread."""
        top, name = self._checkpoints.path, record_name(batch, self._rank)
        try:
            if batch != self._loaded or not (top / name).is_file():
                described = {path.relative_to(top).as_posix(): describe_file(path) for path in files}
                ranks = self._writers if files[0].parent != top else 1
                write_json(top / name, {"schema": 1, "ranks": ranks, "files": described})
                if self._rank == 0:
                    self._checkpoints.note_written(batch)
                    size = sum(file["bytes"] for file in described.values()) / 1e9
                    log.info("the checkpoint after batch %d is saved: %.3f GB by rank 0", batch, size)
            if self._store is not None:
                if self._rank == 0:
                    self._copy_rest(self._store)
                for path in files:
                    self._store.put(path, f"checkpoints/{path.relative_to(top).as_posix()}")
                self._store.put(top / name, f"checkpoints/{name}")
                self._there.add(f"checkpoints/{name}")
                log.info("the checkpoint after batch %d is copied to %s", batch, self._store.url)
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
        tops = [path for path in sorted(self._folder.iterdir()) if path.name not in (*_APART, "checkpoints")]
        tops += [p for p in sorted(self._checkpoints.path.iterdir()) if not p.name.startswith(("ba", LATEST))]
        for path in (inner for top in tops for inner in (sorted(top.rglob("*")) if top.is_dir() else [top])):
            name = path.relative_to(self._folder)
            if path.is_file() and not any(is_leftover(Path(part)) for part in name.parts):
                now = (path.stat().st_mtime_ns, path.stat().st_size)
                if self._copied.get(path) != now:
                    store.put(path, name.as_posix())
                    self._copied[path] = now

    def _delete_old(self, done: int) -> None:
        """Delete this rank's part of all but the newest checkpoints up to the one that is done with.

        Newer ones may still be being written, so that they do not count.
        """
        if self._keep < 0:
            return
        batches = [batch for batch in map(batch_of, self._checkpoints.by_age()) if batch <= done]
        for batch in batches[self._keep :]:
            if self._checkpoints.is_read(batch):
                continue  # by another process: it goes with a later one
            gone = {self._rank}
            if self._rank == 0:  # parts of ranks that the run does not have any more
                gone |= {rank for rank in self._checkpoints.ranks_of(batch) if rank >= dist.get_world_size()}
            for rank in sorted(gone):
                for path in reversed(self._checkpoints.own_files(batch, rank)):  # first what marks it as complete
                    path.unlink(missing_ok=True)
                (self._checkpoints.path / record_name(batch, rank)).unlink(missing_ok=True)
            with suppress(OSError):  # others have parts in it
                (self._checkpoints.path / f"ba{batch}").rmdir()
            if self._rank == 0:
                log.info("the checkpoint after batch %d is deleted: there are %d newer ones", batch, self._keep)
