"""Runs whose checkpoints lie in a store."""

import secrets

from composer.utils import dist

from llmprune.errors import UserError
from llmprune.files import remove
from llmprune.ranks import on_rank_zero
from llmprune.run_folder import RunFolder
from llmprune.stores import Store


def fetch_run(run: RunFolder, store: Store) -> None:
    """Bring a run's newest checkpoint to every machine that can't see rank 0's folder, and to rank 0.

    Raises:
        UserError: on all ranks, if any machine could not get it.
    """
    mark = run.path / f".{on_rank_zero(lambda: secrets.token_hex(4))}.tmp"

    def leave_mark() -> None:
        run.path.mkdir(parents=True, exist_ok=True)
        mark.touch()

    on_rank_zero(leave_mark)
    failed = ""
    try:
        if dist.get_global_rank() == 0 or (dist.get_local_rank() == 0 and not mark.exists()):
            run.fetch(store)
    except UserError as error:
        failed = str(error)
    reasons = [reason for reason in dist.all_gather_object(failed) if reason]
    on_rank_zero(lambda: remove(mark))
    if reasons:
        raise UserError(reasons[0])
