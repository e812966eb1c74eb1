"""Remote stores that files are copied to and fetched from."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from composer.utils import ObjectStore, maybe_create_object_store_from_uri, parse_uri
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from llmprune.utils.errors import UserError, first_line
from llmprune.utils.files import temporary_for

T = TypeVar("T")

ATTEMPTS = 4
WAIT = 1.0  # seconds before the second attempt; the time doubles with each further attempt


class Store(Protocol):
    """Files by name, below a URL.

    Attributes:
        url: URL or path of the store.
    """

    url: str

    def put(self, path: Path, name: str) -> None:
        """Copy a file to the store; it appears completely or not at all, and replaces a file of the same name."""
        ...

    def get(self, name: str, path: Path) -> None:
        """Copy a file of the store to ``path``."""
        ...

    def names(self, prefix: str) -> list[str]:
        """The names of the files that begin with ``prefix``."""
        ...


def open_store(url: str) -> Store:
    """Open the store at a URL (``s3://BUCKET/FOLDER``, ``gs://…``, ``oci://…``, ``azure://…``) or a folder's path.

    Credentials are read from the environment variables of the cloud's own tools; ``S3_ENDPOINT_URL`` is the URL of an
    S3-compatible server.

    Raises:
        UserError: there is no such kind of store, or it can't be used.
    """
    if "://" not in url:
        return _Folder(url)
    try:
        store = maybe_create_object_store_from_uri(url)
    except Exception as error:  # each kind of store has its own exceptions
        raise UserError(f"{url} can't be used: {first_line(error)}") from None
    assert store is not None
    return _Bucket(url, store)


def retry(work: Callable[[], T], what: str) -> T:
    """Call a function that may fail temporarily, and repeat it a few times.

    Args:
        work: function to call.
        what: beginning of the error message, such as "URL can't be fetched".

    Raises:
        UserError: every attempt failed, or a further attempt can't succeed.
    """
    attempts = Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(multiplier=WAIT),
        retry=retry_if_exception(_may_pass),
        reraise=True,
    )
    try:
        return attempts(work)
    except Exception as error:  # each kind of store has its own exceptions
        raise UserError(f"{what}: {first_line(error)}") from None


def _may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed after this error."""
    final = isinstance(error, FileNotFoundError | ValueError | ImportError | UserError)
    return isinstance(error, Exception) and not final and "not found" not in str(error)


class _Folder:
    """A store in a folder, such as a folder on a file system that all machines share."""

    def __init__(self, path: str) -> None:
        self.url, self._root = path, Path(path)

    def put(self, path: Path, name: str) -> None:
        def copy() -> None:
            target = self._root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            part = temporary_for(target)
            try:
                shutil.copyfile(path, part)
                os.replace(part, target)
            finally:
                part.unlink(missing_ok=True)

        retry(copy, f"{path} can't be copied to {self._root}")

    def get(self, name: str, path: Path) -> None:
        retry(lambda: shutil.copyfile(self._root / name, path), f"{self._root / name} can't be copied")

    def names(self, prefix: str) -> list[str]:
        found = (path.relative_to(self._root).as_posix() for path in self._root.rglob("*") if path.is_file())
        return sorted(name for name in found if name.startswith(prefix) and not name.endswith(".tmp"))


class _Bucket:
    """An object store."""

    def __init__(self, url: str, store: ObjectStore) -> None:
        self.url, self._store = url.rstrip("/"), store
        folder = parse_uri(self.url)[2].strip("/")
        self._prefix = f"{folder}/" if folder else ""

    def put(self, path: Path, name: str) -> None:
        retry(
            lambda: self._store.upload_object(self._prefix + name, str(path)),
            f"{path} can't be brought to {self.url}/{name}",
        )

    def get(self, name: str, path: Path) -> None:
        retry(
            lambda: self._store.download_object(self._prefix + name, str(path), overwrite=True),
            f"{self.url}/{name} can't be fetched",
        )

    def names(self, prefix: str) -> list[str]:
        found = retry(lambda: self._store.list_objects(self._prefix + prefix), f"{self.url} can't be listed")
        return sorted(name.removeprefix(self._prefix) for name in found)
