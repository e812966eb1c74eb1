"""How processes end: with the one that started them, and when they are asked to."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

LEAVE = 600.0  # seconds that a rank which was asked to end may go on without its launcher, to save


class Termination:
    """Whether this process was asked to end (SIGTERM).

    Attributes:
        asked: it was.
    """

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self.asked = False

    def listen(self) -> None:
        """From now on only note it; to be called by the main thread, and again after imports that listen, too."""
        signal.signal(signal.SIGTERM, self._note)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within, it is only noted, wherever that is."""
        with _handling(self._note):
            yield

    @contextmanager
    def ending(self, leave: Callable[[], BaseException]) -> Iterator[None]:
        """Within, but for where it is ``noted``, it ends the work at once: what ``leave`` gives is raised."""

        def end(number: int, frame: FrameType | None) -> None:
            self.asked = True
            raise leave()

        if self.asked:
            raise leave()
        with _handling(end):
            yield

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let a handler take SIGTERM; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


TERMINATION = Termination()  # of this process


def end_on_signals() -> None:
    """Let SIGTERM end this process as Ctrl-C does: unfinished output goes with it. Composer's import does the same.

    To be called by the main thread. ``stopped_by`` tells such an end from others.
    """
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # what is under way now is tidying up
    raise SystemExit(128 + number)


def stopped_by(end: BaseException) -> int | None:
    """The exit code of a command that a signal ended; None = it ended for another reason."""
    code = 130 if isinstance(end, KeyboardInterrupt) else getattr(end, "code", None)
    return code if code in (128 + signal.SIGINT, 128 + signal.SIGTERM) else None


def outlast_one_termination(worker: int = 0) -> None:
    """Let a loader worker go on feeding its rank, which saves and leaves, when all processes are asked to end.

    The second time it ends: so its rank asks it.
    """

    def note(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, note)


def end_with(parent: int) -> None:
    """End this process within a second of its parent's end, however that ended.

    A process that was asked to end is left the time to save what it has.

    Args:
        parent: the id of the process that started this one.
    """

    def watch() -> None:
        while os.getppid() == parent:  # whoever adopts an orphan has another id
            time.sleep(0.5)
        until = time.monotonic() + LEAVE
        while TERMINATION.asked and time.monotonic() < until:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="end_with", daemon=True).start()


def end_with_launcher() -> None:
    """End this rank with the launcher that started it; a process without a launcher goes on for itself.

    It is to be called before anything slow is imported: a launcher that was gone by then is not missed.
    """
    if "LOCAL_RANK" in os.environ:
        end_with(os.getppid())


class Activity:
    """When this process was last seen at work.

    Attributes:
        last: in seconds of ``time.monotonic``.
    """

    def __init__(self) -> None:
        """It begins now."""
        self.last = time.monotonic()

    def note(self) -> None:
        """It is at work; to be called by whatever takes long."""
        self.last = time.monotonic()


ACTIVITY = Activity()  # of this process
