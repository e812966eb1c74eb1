"""The end of processes: together with their parent, and on request (signals)."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

LEAVE = 600.0  # seconds that a rank may continue without its launcher to save, after a request to end


class Preempted(BaseException):
    """The job was asked to end and can be resumed; not an error of the job, so no code should catch it as one."""

    def __init__(self, kept: str, again: str = "run.autoresume=true resumes it") -> None:
        """Set the message; ``kept`` describes the results that are kept, ``again`` how the job is resumed."""
        super().__init__(f"asked to end: {kept}; {again}")


class Termination:
    """Whether this process was asked to end (SIGTERM).

    Attributes:
        asked: whether SIGTERM has arrived.
    """

    def __init__(self) -> None:
        """Start without a request."""
        self.asked = False

    def listen(self) -> None:
        """From now on, only record SIGTERM; call this in the main thread, again after imports that set a handler."""
        signal.signal(signal.SIGTERM, self._note)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within the ``with`` block, SIGTERM is only recorded, also inside an ``ending`` block."""
        with _handling(self._note):
            yield

    @contextmanager
    def ending(self, leave: Callable[[], BaseException]) -> Iterator[None]:
        """Within the ``with`` block, SIGTERM raises the exception from ``leave``, except in a ``noted`` block."""

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
    """Set the handler of SIGTERM within the ``with`` block; this has an effect in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


TERMINATION = Termination()  # the state of this process


def end_on_signals() -> None:
    """Make SIGTERM end this process as Ctrl-C does, so that unfinished output is removed; so does Composer's import.

    Call this in the main thread. ``stopped_by`` distinguishes such an end from others.
    """
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
    raise SystemExit(128 + number)


def stopped_by(end: BaseException) -> int | None:
    """The exit code of a command that a signal ended; None = it ended for another reason."""
    code = 130 if isinstance(end, KeyboardInterrupt) else getattr(end, "code", None)
    return code if code in (128 + signal.SIGINT, 128 + signal.SIGTERM) else None


def outlast_one_termination(worker: int = 0) -> None:
    """Make a loader worker survive the first SIGTERM, so that its rank can save a checkpoint and end.

    The second SIGTERM, which the rank sends, ends the worker.
    """

    def note(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, note)


def end_with(parent: int) -> None:
    """End this process within a second after its parent's end, whatever the reason.

    A process that was asked to end gets time to save its work.

    Args:
        parent: id of the process that started this one.
    """

    def watch() -> None:
        while os.getppid() == parent:  # an orphan gets another parent id
            time.sleep(0.5)
        until = time.monotonic() + LEAVE
        while TERMINATION.asked and time.monotonic() < until:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="end_with", daemon=True).start()


def end_with_launcher() -> None:
    """End this rank when the launcher that started it ends; a process without a launcher continues.

    Call this before slow imports: the end of the launcher before the call is not noticed.
    """
    if "LOCAL_RANK" in os.environ:
        end_with(os.getppid())


class Activity:
    """The time of the last sign of activity of this process.

    Attributes:
        last: time of the last sign of activity, in seconds of ``time.monotonic``.
    """

    def __init__(self) -> None:
        """Count the start as activity."""
        self.last = time.monotonic()

    def note(self) -> None:
        """Record activity now; slow functions must call this."""
        self.last = time.monotonic()


ACTIVITY = Activity()  # the state of this process
