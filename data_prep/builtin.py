"""The built-in corpus: real text from the Python installation, so that neither a network nor bundled text is needed.

Four domains: the Python language reference (``reference``), docstrings of the installed scientific packages
(``docstrings``), source code of the standard library (``code``), and the descriptions in the metadata of installed
packages (``packages``).
"""

import ast
import importlib.metadata
import importlib.util
import json
import random
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from llmprune.utils.outputs import output_folder

DOCUMENTED = (
    "torch",
    "numpy",
    "transformers",
    "composer",
    "streaming",
    "torchmetrics",
    "torchvision",
    "huggingface_hub",
)
_SKIPPED_FOLDERS = {"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "__pycache__", "pydoc_data"}
_SHORTEST = 200  # smallest number of characters of a document

T = TypeVar("T")
Domain = Callable[[random.Random], Iterator[tuple[str, str]]]  # yields (source, text), in the generator's random order


def reference(order: random.Random) -> Iterator[tuple[str, str]]:
    """Yield the topics of the Python language reference, as in ``help()``."""
    from pydoc_data.topics import topics

    yield from _shuffled(topics.items(), order)


def docstrings(order: random.Random) -> Iterator[tuple[str, str]]:
    """Yield the docstrings of each module of the scientific packages; nothing is imported."""
    specs = [spec for package in DOCUMENTED if (spec := importlib.util.find_spec(package)) and spec.origin]
    roots = [Path(str(spec.origin)).parent for spec in specs]
    files = [(root, path) for root in roots for path in _python_files(root)]
    for root, path in _shuffled(files, order):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, nodes)]
        yield f"{root.name}/{path.relative_to(root)}", "\n\n".join(text for text in found if text)


def code(order: random.Random) -> Iterator[tuple[str, str]]:
    """Yield the source files of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _shuffled(_python_files(root), order):
        try:
            yield str(path.relative_to(root)), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def packages(order: random.Random) -> Iterator[tuple[str, str]]:
    """Yield the long descriptions of all installed packages."""
    found = {d.metadata["Name"]: d for d in importlib.metadata.distributions() if d.metadata["Name"]}
    for name, distribution in _shuffled(found.items(), order):
        metadata: dict[str, Any] = distribution.metadata.json
        yield name, metadata.get("description", "")


# From the smallest to the largest, so that megabytes that a small domain does not use go to the others.
DOMAINS: dict[str, Domain] = {"reference": reference, "packages": packages, "code": code, "docstrings": docstrings}


def build_corpus(
    out: Path | str, *, megabytes: float = 16.0, seed: int = 17, overwrite: bool = False
) -> dict[str, int]:
    """Write the corpus as JSON lines, ``OUT/DOMAIN/part-000.jsonl`` with the fields ``text`` and ``source``.

    Args:
        out: folder to write.
        megabytes: total limit; a domain with less text than its quarter leaves the rest to the other domains.
        seed: seed of the order of documents.
        overwrite: whether ``out`` may be replaced.

    Returns:
        Bytes of text in each domain, by name.
    """
    left = int(megabytes * 1e6)
    written: dict[str, int] = {}
    with output_folder(out, overwrite) as folder:
        for name, domain in DOMAINS.items():
            (folder / name).mkdir()
            share = left // (len(DOMAINS) - len(written))
            written[name] = _write(folder / name / "part-000.jsonl", domain(random.Random(seed)), share)
            left -= written[name]
    return written


def _write(path: Path, documents: Iterator[tuple[str, str]], limit: int) -> int:
    """Write documents up to ``limit`` bytes, without repeated or very short texts; returns the bytes written."""
    seen: set[str] = set()
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for source, text in documents:
            if len(text) < _SHORTEST or text in seen:
                continue
            seen.add(text)
            size += len(text.encode("utf-8", "replace"))
            file.write(json.dumps({"text": text, "source": source}) + "\n")
            if size >= limit:
                break
    return size


def _shuffled(items: Iterable[T], order: random.Random) -> list[T]:
    """The items sorted, then shuffled: the order is the same on every machine with the same items."""
    shuffled = sorted(items)  # type: ignore[type-var]
    order.shuffle(shuffled)
    return shuffled


def _python_files(root: Path) -> list[Path]:
    return [p for p in root.rglob("*.py") if not _SKIPPED_FOLDERS & set(p.relative_to(root).parts)]
