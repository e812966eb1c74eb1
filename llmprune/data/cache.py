"""A cache of remote or compressed shards in a folder of this machine."""

import contextlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from filelock import FileLock
from streaming.base.format.base.reader import FileInfo
from streaming.base.hashing import get_hash
from streaming.base.storage.download import CloudDownloader
from streaming.base.util import bytes_to_int

from llmprune.data.unpacking import unpack
from llmprune.utils.errors import UserError, first_line
from llmprune.utils.object_store import retry

log = logging.getLogger(__name__)

_READ_TIMEOUT = 60.0  # seconds without data


@dataclass
class CacheConfig:
    """The folder in which each machine keeps shards of remote or compressed data.

    Attributes:
        folder: folder of the cache; null = one in the system's temporary folder. With a folder, data of any kind are
            read through it, for example on a faster disk.
        limit: largest size of the cache, such as 200gb: the shards not used for the longest time are deleted; shards
            being downloaded may exceed it. null = no limit.
    """

    folder: str | None = None
    limit: str | None = None


def limit_of(config: CacheConfig) -> int | None:
    """The cache's ``limit`` in bytes; None = no limit.

    Raises:
        UserError: the limit is no size.
    """
    try:
        limit = None if config.limit is None else bytes_to_int(config.limit)
    except ValueError:
        limit = -1
    if limit is not None and limit < 0:
        raise UserError(f"data.cache.limit '{config.limit}' is no size: write 500mb or 200gb")
    return limit


@dataclass(frozen=True)
class ShardFile:
    """A file in an index.

    Attributes:
        name: path of the file relative to the data's folder.
        raw: size and checksums of the file.
        packed: size and checksums of the compressed file; None = the file is stored uncompressed.
        algorithm: algorithm of the compression; None = no compression.
    """

    name: str
    raw: FileInfo
    packed: FileInfo | None = None
    algorithm: str | None = None


class ShardCache:
    """Files fetched from a remote into a folder that all processes of a machine share.

    A file in the folder is always complete and verified. The only locks are the operating system's, so a killed process
    blocks no other.
    """

    def __init__(self, remote: str, folder: Path, limit: int | None = None) -> None:
        """Fetch from ``remote`` (a URL or a folder) into ``folder``, which holds at most ``limit`` bytes of shards."""
        self.remote, self.folder, self.limit = remote.rstrip("/"), folder, limit
        self._own_by_process()

    def _own_by_process(self) -> None:
        """Reset the connection and the thread for this process, because neither survives a fork."""
        self._process = os.getpid()
        self._downloader: CloudDownloader | None = None
        self._ahead: SimpleQueue[ShardFile] | None = None

    def _download(self, url: str, path: Path) -> None:
        if self._process != os.getpid():
            self._own_by_process()
        self._downloader = self._downloader or connect(url)
        download_file(url, path, self._downloader)

    def fetch(self, name: str) -> Path:
        """Fetch a small file that is not in an index, and return its path.

        Raises:
            UserError: the file can't be fetched.
        """
        with self._missing(name) as part:
            if part is not None:
                self._download(f"{self.remote}/{name}", part)
        return self.folder / name

    def fetch_shard(self, file: ShardFile) -> Path:
        """Fetch a file of a shard, and return its path.

        Raises:
            UserError: the file can't be fetched, or is damaged at its source.
        """
        with self._missing(file.name) as part:
            if part is not None:
                self._make_room(file.raw.bytes)
                stored = file.packed or file.raw
                url = f"{self.remote}/{Path(file.name).with_name(Path(stored.basename).name)}"
                self._download(url, part)
                check_file(part, stored, url)
                log.info("%s is fetched: %.1f MB", url, stored.bytes / 1e6)
                if file.packed is not None:
                    part.write_bytes(unpack(file.algorithm, part.read_bytes(), file.raw.bytes, url))
                    check_file(part, file.raw, url)
        return self.folder / file.name

    def fetch_ahead(self, files: Iterable[ShardFile]) -> None:
        """Fetch files in the background; failures are retried, and reported, when the file is needed."""
        if self._process != os.getpid():
            self._own_by_process()
        if self._ahead is None:
            self._ahead = SimpleQueue()
            threading.Thread(target=self._work, args=(self._ahead,), daemon=True).start()
        for file in files:
            self._ahead.put(file)

    def _work(self, queue: "SimpleQueue[ShardFile]") -> None:
        while True:
            with contextlib.suppress(UserError):
                self.fetch_shard(queue.get())

    def touch(self, name: str) -> None:
        """Mark a file as in use, so that others are deleted before it."""
        with contextlib.suppress(OSError):
            os.utime(self.folder / name)

    @contextlib.contextmanager
    def _missing(self, name: str) -> Iterator[Path | None]:
        """If a file is missing, a temporary path to write it to, from where it is moved; one process at a time."""
        target = self.folder / name
        if target.exists():
            yield None
            return
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{target}.lock"):
                if target.exists():  # another process has written it
                    yield None
                    return
                part = target.with_name(f"{target.name}.part")
                try:
                    yield part
                    os.replace(part, target)
                finally:
                    part.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"can't write the cache {target}: {error.strerror or error}") from None

    def _make_room(self, size: int) -> None:
        if self.limit is None:
            return
        with FileLock(self.folder / "room.lock"):
            held = []
            for path in self.folder.rglob("*.mds"):
                with contextlib.suppress(FileNotFoundError):
                    held.append((path.stat().st_mtime_ns, path.stat().st_size, path))
            total = size + sum(size for _, size, _ in held)
            for _, freed, path in sorted(held):
                if total <= self.limit:
                    break
                path.unlink(missing_ok=True)
                total -= freed


def connect(url: str) -> CloudDownloader:
    """A downloader of files from a remote or from another folder.

    Raises:
        UserError: no downloader is available for this URL.
    """
    try:
        return CloudDownloader.get(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"{url} can't be fetched: {first_line(error)}") from None


def download_file(url: str, path: Path, downloader: CloudDownloader) -> None:
    """Copy a file to ``path``.

    Raises:
        UserError: the file can't be fetched, after several attempts if the error may be temporary.
    """

    def fetch() -> None:
        path.unlink(missing_ok=True)
        downloader.download(url, str(path), _READ_TIMEOUT)

    retry(fetch, f"{url} can't be fetched")


def check_file(path: Path, wanted: FileInfo, name: object) -> None:
    """Compare a file with the size and the checksums in its index.

    Raises:
        UserError: they differ; the message calls the file ``name``.
    """
    size = path.stat().st_size
    if size != wanted.bytes:  # checked before the file is read, which may be larger than memory
        wrong = "is cut short" if size < wanted.bytes else "is another file than its index describes"
        raise UserError(f"{name} {wrong} ({size:,} bytes, not {wanted.bytes:,}): prepare the data again")
    content = path.read_bytes()
    for algorithm, checksum in wanted.hashes.items():
        if get_hash(algorithm, content) != checksum:
            raise UserError(f"{name} is damaged (its {algorithm} is not that of the index): prepare the data again")
