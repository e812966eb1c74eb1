"""Locks of paths that only one process at a time may write.

A lock is a file (see ``filelock.SoftFileLease``) that names its holder: host, process, and the process's start time.
The holder renews the lock every ``RENEWAL`` seconds, so it works on file systems that several machines share.

The lock of a dead holder is taken over. On the same host, the process is looked up, and its lock is free at once. A
process of another host can't be looked up: its lock is free when it was not renewed for ``LEASE`` seconds, measured by
the clock of the waiting process, so the hosts' clocks need not agree. The same rule applies to a lock that names no
holder (its machine crashed while writing it), and to locks on a file system that can't exchange two files atomically,
such as NFS.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from llmprune.utils.errors import UserError
from llmprune.utils.files import temporary_for

RENEWAL = 2.0  # seconds between two renewals by a holder
LEASE = 60.0  # seconds without a renewal after which the holder counts as dead

log = logging.getLogger(__name__)
_held: dict[Path, int] = {}  # number of ``with`` blocks of this process that hold a lock, by its file


@contextmanager
def locked(file: Path, what: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock while the ``with`` block runs.

    Args:
        file: path of the lock's file; its folder exists.
        what: path that the lock protects, for messages.
        shared: whether this process may hold the lock already.

    Raises:
        UserError: another process holds the lock, or this one does and it is not shared; or the file can't be written.
    """
    file = file.resolve()
    if file in _held and not shared:
        raise UserError(f"this process is writing {what} already: choose another place")
    with ExitStack() as stack:
        if file not in _held:
            lease = _lease(file, what)
            _acquire(lease, file, what)
            stack.callback(lease.release)
        _held[file] = _held.get(file, 0) + 1
        try:
            yield
        finally:
            _held[file] -= 1
            if not _held[file]:
                del _held[file]


def is_held(file: Path) -> bool:
    """Whether the holder of a lock has renewed it in the last ``LEASE`` seconds; the hosts' clocks must agree."""
    try:
        return abs(time.time() - file.stat().st_mtime) < LEASE
    except OSError:
        return False


def _lease(file: Path, what: Path) -> SoftFileLease:
    def lost(loss: object) -> None:
        reason = getattr(loss, "reason", "")
        if reason in ("owner-changed", "evicted"):
            _end(what)
        log.warning("the lock of %s is gone (%s): do not start another job there", what, reason)
        # filelock stops renewing here; a store that did not answer for a while may be available again.
        threading.Thread(target=_renew, args=(lease, file, what), name="renew", daemon=True).start()

    lease = SoftFileLease(
        file, lease_duration=LEASE, heartbeat_interval=RENEWAL, on_compromise=lost, thread_local=False, timeout=0
    )
    return lease


def _end(what: Path) -> None:
    print(
        f"error: this process gave no sign of life for more than {LEASE:g} s, and another one has taken over {what}: "
        "this one ends",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _renew(lease: SoftFileLease, file: Path, what: Path) -> None:
    """Renew a lock as long as it is held, and end the process if another process has taken it over."""
    while lease.is_locked:
        with suppress(OSError, ValueError):
            owner = lease.owner
            if owner is not None and getattr(owner, "token", None) != lease.token and lease.is_locked:
                _end(what)
            if owner is not None:
                os.utime(file)
        time.sleep(RENEWAL)


def _acquire(lease: SoftFileLease, file: Path, what: Path) -> None:
    """Take a free lock, or the lock of a dead holder; a holder that renews it during the wait is alive."""
    seen, began, told = None, time.monotonic(), False
    while True:
        try:
            lease.acquire()
            return
        except Timeout:
            pass
        except LeaseSettingsMismatch:
            raise _in_use(lease, what) from None
        except OSError as error:
            raise UserError(f"can't write {file}: {error.strerror}") from None
        stamp = _stamp(file)
        if seen is not None and stamp is not None and stamp != seen:
            raise _in_use(lease, what)
        seen = seen or stamp
        if not told and time.monotonic() - began > 3 * RENEWAL:
            told = True
            print(
                f"{_holder(lease)} holds {what} but gives no sign of life: waiting up to {LEASE:g} s", file=sys.stderr
            )
        if seen is not None and time.monotonic() - began > LEASE + 2 * RENEWAL:
            _take_away(file, seen)
            seen, began = None, time.monotonic()
        time.sleep(RENEWAL / 8)


def _take_away(file: Path, seen: tuple[int, int]) -> None:
    """Remove a lock if it is still the one that was ``seen``; a new lock that has replaced it is put back."""
    aside = temporary_for(file, "old")
    with suppress(OSError):
        file.rename(aside)
        if _stamp(aside) != seen:
            os.link(aside, file)
        aside.unlink()


def _stamp(file: Path) -> tuple[int, int] | None:
    """Values that change when a lock is renewed; the file is opened, because shared file systems cache attributes."""
    try:
        with file.open("rb") as opened:
            status = os.fstat(opened.fileno())
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino


def _holder(lease: SoftFileLease) -> str:
    owner = lease.owner
    return "another process" if owner is None else f"process {owner.pid} on {owner.hostname.partition('?')[0]}"


def _in_use(lease: SoftFileLease, what: Path) -> UserError:
    return UserError(f"{_holder(lease)} is writing {what}: wait until it ends, or choose another place")
