"""Processes that do not outlive the one that started them."""

import os
import threading
import time


def end_with(parent: int) -> None:
    """End this process within a second of its parent's end, however that ended.

    Args:
        parent: the id of the process that started this one.
    """

    def watch() -> None:
        while os.getppid() == parent:  # whoever adopts an orphan has another id
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="end_with", daemon=True).start()


def end_with_launcher() -> None:
    """End this rank with the launcher that started it; a process without a launcher goes on for itself.

    It is to be called before anything slow is imported: a launcher that was gone by then is not missed.
    """
    if "LOCAL_RANK" in os.environ:
        end_with(os.getppid())
