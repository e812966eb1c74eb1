"""Runs whose checkpoints lie in a store."""

from composer.utils import dist

from llmprune.checkpoints.run_folder import RunFolder
from llmprune.utils.errors import UserError
from llmprune.utils.files import temporary_for
from llmprune.utils.object_store import Store
from llmprune.utils.outputs import is_empty, refuse_deleting, remove
from llmprune.utils.outputs import mark as mark_folder
from llmprune.utils.ranks import on_rank_zero


def fetch_run(run: RunFolder, store: Store) -> None:
    """Bring a run's newest checkpoint to rank 0's machine, and to all others that can't see its folder.

    Raises:
        UserError: on all ranks, if any machine could not get it, or the folder holds something else.
    """
    mark = on_rank_zero(lambda: temporary_for(run.path / "seen"))

    def leave_mark() -> None:
        refuse_deleting(run.path)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            if is_empty(run.path):
                mark_folder(run.path)
            mark.touch()
        except OSError as error:
            raise UserError(f"can't write to {run.path}: {error.strerror}") from None

    on_rank_zero(leave_mark)
    seen = mark.exists()
    shared = all(dist.all_gather_object(seen))
    failed = ""
    try:
        if dist.get_global_rank() == 0 or (dist.get_local_rank() == 0 and not seen):
            run.fetch(store, shared=shared)
    except UserError as error:
        failed = str(error)
    reasons = [reason for reason in dist.all_gather_object(failed) if reason]
    on_rank_zero(lambda: remove(mark))
    if reasons:
        raise UserError(reasons[0])


def check_unused(store: Store) -> None:
    """Raise ``UserError`` if a store holds a run, which a new one would mix with."""
    if store.names("checkpoints/"):
        raise UserError(
            f"{store.url} holds a run's checkpoints already: pass run.autoresume=true to resume it, or another "
            "checkpoint.remote"
        )
