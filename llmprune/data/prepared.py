"""Prepared data on this machine or at a URL, compressed or not."""

import getpass
import tempfile
from functools import cached_property
from pathlib import Path

from llmprune.data.cache import CacheConfig, ShardCache, connect, download_file, limit_of
from llmprune.data.format import DataManifest
from llmprune.data.reader import SplitReader
from llmprune.utils.errors import UserError


class PreparedData:
    """A folder or URL with data prepared by ``python -m data_prep``.

    Attributes:
        location: path or URL of the data, as given.
        manifest: manifest of the data.
    """

    def __init__(self, location: Path | str, cache: CacheConfig | None = None) -> None:
        """Read the manifest.

        Args:
            location: path of a folder, or a URL of any kind that MosaicML Streaming reads (``s3://…``, ``gs://…``,
                ``hf://…``).
            cache: settings of the cache of remote or compressed data; None = the defaults.

        Raises:
            UserError: there are no prepared data, or they can't be reached.
        """
        self.location = str(location)
        cache = cache or CacheConfig()
        is_remote = "://" in self.location
        if is_remote:
            if not self.location.partition("://")[2].strip("/"):
                raise UserError(f"{self.location} names no place: write s3://BUCKET/FOLDER")
            with tempfile.TemporaryDirectory() as folder:
                url = f"{self.location.rstrip('/')}/manifest.json"
                download_file(url, Path(folder) / "manifest.json", connect(url))
                self.manifest = DataManifest.load(folder)
        else:
            self.manifest = DataManifest.load(location)
        self._cache: ShardCache | None = None
        self._root = Path(self.location)
        if is_remote or cache.folder is not None or self.manifest.compression is not None:
            top = Path(cache.folder or Path(tempfile.gettempdir()) / f"llmprune-data-{getpass.getuser()}")
            self._root = top / self.manifest.fingerprint()[:16]
            self._cache = ShardCache(self.location, self._root, limit_of(cache))

    @cached_property
    def tokenizer(self) -> Path:
        """A folder on this machine with the tokenizer.

        Raises:
            UserError: the tokenizer can't be fetched.
        """
        for name in self.manifest.tokenizer_files:
            if self._cache is not None:
                self._cache.fetch(f"tokenizer/{name}")
        return self._root / "tokenizer"

    def domains_with(self, split: str) -> list[str]:
        """The domains that have samples of a split, in order of their names."""
        return [name for name in sorted(self.manifest.domains) if self.manifest.samples(name, split)]

    def reader(self, domain: str, split: str, *, boundaries: bool | None = None) -> SplitReader:
        """A reader of one split of one domain; see ``SplitReader``.

        Args:
            domain: name of the domain.
            split: name of the split: ``train`` or ``eval``.
            boundaries: whether samples contain the positions within documents; None = true for conversations, else
                false.

        Raises:
            UserError: the split is missing, damaged, or can't be reached.
        """
        wanted = self.manifest.conversations if boundaries is None else boundaries
        return SplitReader(self._root, domain, split, cache=self._cache, boundaries=wanted)

    def check_room(self, wanted: int) -> None:
        """Raise ``UserError`` if the cache's limit is less than ``wanted``, the bytes in use at a time."""
        limit = None if self._cache is None else self._cache.limit
        if limit is not None and limit < wanted:
            raise UserError(
                f"data.cache.limit leaves {limit:,} bytes, but up to {wanted:,} are in use at a time: raise it, or "
                "choose a smaller data.shuffle_window"
            )
