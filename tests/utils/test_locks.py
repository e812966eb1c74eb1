"""Locks: one holder at a time, on one host and on several that see the same files."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest

from llmprune.utils import locks
from llmprune.utils.errors import UserError
from llmprune.utils.locks import is_held, locked

HOLD = """
import socket, sys, time
host, file = sys.argv[1:]
socket.gethostname = lambda: host
from pathlib import Path
from llmprune.utils import locks
locks.RENEWAL, locks.LEASE = {renewal}, {lease}
with locks.locked(Path(file), Path(file)):
    print("held", flush=True)
    time.sleep(60)
"""
RENEWAL, LEASE = 0.2, 1.5


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "RENEWAL", RENEWAL)
    monkeypatch.setattr(locks, "LEASE", LEASE)


@contextmanager
def holder(file: Path, host: str) -> Iterator["subprocess.Popen[str]"]:
    """Another process, on a host of this name, that holds a lock."""
    code = HOLD.format(renewal=RENEWAL, lease=LEASE)
    with subprocess.Popen([sys.executable, "-c", code, host, str(file)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("host", [os.uname().nodename, "node2"])
def test_a_living_holder_is_named(host: str, tmp_path: Path) -> None:
    with (
        holder(tmp_path / "lock", host) as process,
        pytest.raises(UserError, match=f"process {process.pid} on {host} is writing .*out: wait until it ends"),
        locked(tmp_path / "lock", tmp_path / "out"),
    ):
        pass


def test_the_lock_of_a_dead_process_of_this_host_is_free_at_once(tmp_path: Path) -> None:
    with holder(tmp_path / "lock", os.uname().nodename) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        began = time.monotonic()
        with locked(tmp_path / "lock", tmp_path):
            assert time.monotonic() - began < LEASE


def test_the_lock_of_a_dead_host_is_free_after_the_lease(tmp_path: Path) -> None:
    """Whether a process of another host lives can't be asked: it counts as dead when it renews nothing any more."""
    with holder(tmp_path / "lock", "node2") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        began = time.monotonic()
        with locked(tmp_path / "lock", tmp_path):
            assert time.monotonic() - began >= LEASE - RENEWAL


def test_a_holder_whose_lock_was_taken_over_ends(tmp_path: Path) -> None:
    """A process that stood still for too long must not go on writing beside the one that took its place."""
    with holder(tmp_path / "lock", "node2") as process:
        process.send_signal(signal.SIGSTOP)
        with locked(tmp_path / "lock", tmp_path):
            process.send_signal(signal.SIGCONT)
            assert process.wait(timeout=10) == 1


def test_a_file_system_without_exchange_has_no_eternal_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS, SMB and some others can't exchange two files at once, which is how filelock takes a lock over."""
    monkeypatch.setattr(filelock._soft, "exchange_names", lambda *_: False)
    with holder(tmp_path / "lock", "node2") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with locked(tmp_path / "lock", tmp_path):
            assert (tmp_path / "lock").exists()
    assert [*tmp_path.iterdir()] == []


def test_a_lock_that_names_nobody_is_free_after_the_lease(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    began = time.monotonic()
    with locked(tmp_path / "lock", tmp_path):
        assert time.monotonic() - began >= LEASE
    assert [*tmp_path.iterdir()] == []


def test_a_lock_is_renewed_when_the_store_answers_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, ended = tmp_path / "lock", threading.Event()
    monkeypatch.setattr(locks, "_end", lambda what: ended.set() or sys.exit())
    lease = locks._lease(file, tmp_path)
    lease.acquire()
    lease._on_compromise(SimpleNamespace(reason="refresh-failed"))  # type: ignore[misc, arg-type]
    os.utime(file, (0, 0))
    time.sleep(3 * RENEWAL)
    assert is_held(file) and not ended.is_set()
    file.write_text(file.read_text().replace(str(lease.token), "another"))
    assert ended.wait(timeout=5)
    file.unlink()


def test_a_process_may_share_a_lock_with_itself(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with locked(file, tmp_path):
        with locked(file, tmp_path, shared=True):
            assert file.exists()
        with pytest.raises(UserError, match="this process is writing"), locked(file, tmp_path):
            pass
        assert file.exists() and is_held(file)
    assert not file.exists() and not is_held(file)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't write"), locked(tmp_path / "file" / "lock", tmp_path):
        pass
