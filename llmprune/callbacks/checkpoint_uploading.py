"""Checksums of checkpoints, deletion of old checkpoints, and copies in a remote store."""

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

ROUND = 20.0  # seconds between two exchanges in which the ranks report whether they are done
WAITING = 2  # number of checkpoints that may wait for their upload before training waits for the oldest
_APART = ("states", "tensorboard", "wandb")  # parts of a run folder that are not copied: reproducible, or large

log = logging.getLogger(__name__)


class CheckpointUploading(Callback):
    """Processes every checkpoint after it is written, in a thread, while training continues.

    Every rank processes the files that it wrote itself, and no rank waits for another: it computes their checksums,
    copies them to the store if there is one, writes a record of them (``baN.sums-R.json``, locally and then in the
    store), and deletes its part of old checkpoints. So a checkpoint in the store is complete when the records of all
    ranks are there, and no file is deleted before it is copied.

    If the store can't be reached, this is a warning during the run, and an error at the end of the run if the last
    checkpoint is not in the store; a later call with ``run.autoresume=true`` copies the missing files.
    """

    def __init__(
        self, folder: Path, keep: int, store: Store | None = None, *, writers: int = 1, resumed: bool = False
    ) -> None:
        """Start the upload thread.

        Args:
            folder: run folder; its checkpoints are in ``checkpoints``.
            keep: number of checkpoints to keep in the run folder; -1 = all.
            store: remote store for copies, either empty or with the copy of a resumed run; None = no copies.
            writers: number of ranks that write a part of a sharded checkpoint.
            resumed: whether the run resumes from a checkpoint.

        Raises:
            UserError: the store can't be reached.
        """
        self._folder, self._keep, self._store = folder, keep, store
        self._checkpoints, self._rank = CheckpointFolder(folder / "checkpoints"), dist.get_global_rank()
        self._writers, self._resumed = writers, resumed
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-uploading")
        self._pending: deque[Future[None]] = deque()
        self._noticed: int | None = None
        self._missing: UserError | None = None  # reason why the newest checkpoint is not in the store
        self._copied: dict[Path, tuple[int, int]] = {}  # other files: time and size when they were copied
        self._loaded: int | None = None  # batch number that a resumed run started from
        self._there = set() if store is None else set(on_rank_zero(lambda: store.names("checkpoints/ba")))

    def after_load(self, state: State, logger: Logger) -> None:
        """Store the batch number that a resumed run starts from."""
        if self._resumed:
            self._loaded = state.timestamp.batch.value

    def batch_start(self, state: State, logger: Logger) -> None:
        """Check whether the previous batch has left a checkpoint."""
        self._notice(state.timestamp.batch.value)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Process the last checkpoint.

        Raises:
            UserError: the checkpoint could not be copied to the store.
        """
        self.finish(state.timestamp.batch.value)

    def close(self, state: State, logger: Logger) -> None:
        """Wait for the work in flight, even if the run ends with an error."""
        with suppress(RuntimeError):  # the interpreter is ending, and accepts no more work
            self._notice(state.timestamp.batch.value)
        self._worker.shutdown()

    def finish(self, batch: int) -> None:
        """Process the checkpoint after ``batch`` batches and wait until all ranks have done so.

        Raises:
            UserError: on all ranks, if one of them could not copy its part to the store.
        """
        self._notice(batch)
        while True:  # in rounds, because collectives time out when one rank copies for long
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
        """Copy files that were written after the last checkpoint to the store, if there is one.

        Raises:
            UserError: on all ranks, if the files could not be copied.
        """
        if self._store is not None:
            store = self._store
            on_rank_zero(lambda: self._copy_rest(store))

    def _await_oldest(self) -> None:
        while not wait([self._pending[0]], timeout=1).done:
            ACTIVITY.note()  # a slow store is not a hang
        self._pending.popleft().result()

    def _notice(self, batch: int) -> None:
        if batch == self._noticed or not (files := self._checkpoints.own_files(batch, self._rank)):
            return
        top = self._checkpoints.path
        if self._rank == 0 and not is_complete(files[0] if files[0].parent == top else files[0].parent):
            return  # writing it has failed: no rank writes a record for the remaining files
        self._noticed = batch
        name = record_name(batch, self._rank)
        known = (top / name).is_file()
        if batch == self._loaded:
            if known and (self._store is None or f"checkpoints/{name}" in self._there):
                return
            parts = self._checkpoints.ranks_of(batch)
            if parts and parts != set(range(self._writers)):  # another number of ranks wrote it: no records are written
                return
        while len(self._pending) >= WAITING:
            self._await_oldest()
        self._pending.append(self._worker.submit(self._keep_safe, batch, files))

    def _keep_safe(self, batch: int, files: list[Path]) -> None:
        """Compute checksums, write the record, copy and delete for one checkpoint; runs in a thread."""
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
            log.warning("%s; the run continues, and its next checkpoint is tried again", error)
        except OSError as error:
            self._missing = UserError(f"the checkpoint after batch {batch} can't be looked after: {error}")
            log.warning("%s", self._missing)
        self._delete_old(batch)

    def _copy_rest(self, store: Store) -> None:
        """Copy the changed files of the run folder that are not part of a checkpoint."""
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
        """Delete this rank's part of old checkpoints, counting only checkpoints up to batch ``done``.

        Newer checkpoints may still be in the middle of writing, so they do not count.
        """
        if self._keep < 0:
            return
        batches = [batch for batch in map(batch_of, self._checkpoints.by_age()) if batch <= done]
        for batch in batches[self._keep :]:
            if self._checkpoints.is_read(batch):
                continue  # in use by another process: it is deleted together with a later checkpoint
            gone = {self._rank}
            if self._rank == 0:  # also the parts of ranks that the run no longer has
                gone |= {rank for rank in self._checkpoints.ranks_of(batch) if rank >= dist.get_world_size()}
            for rank in sorted(gone):
                for path in reversed(self._checkpoints.own_files(batch, rank)):  # deletes the mark of completion first
                    path.unlink(missing_ok=True)
                (self._checkpoints.path / record_name(batch, rank)).unlink(missing_ok=True)
            with suppress(OSError):  # the folder still has parts of other ranks
                (self._checkpoints.path / f"ba{batch}").rmdir()
            if self._rank == 0:
                log.info("the checkpoint after batch %d is deleted; the newest %d stay", batch, self._keep)
