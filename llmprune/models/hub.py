"""Models of the Hugging Face hub: the files of a repository that are fetched, and weights stored as pickles.

The files that Transformers reads for a model, its tokenizer and its generation config are fetched, with licence and
model card: files of the top level (and further chat templates), in one format of weights. Code is never fetched, nor
are the same weights in other formats.

Weights in ``pytorch_model.bin`` are used if there are no safetensors. A separate process converts them to safetensors,
in a folder of the cache next to the snapshot, ``models--ORG--NAME/llmprune/COMMIT``, which is used as the model's
folder from then on.
"""

import glob
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

from llmprune.utils.errors import UserError, first_line
from llmprune.utils.files import inside, make_readable, read_json
from llmprune.utils.outputs import output_folder
from llmprune.utils.untrusted import inspect

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
_INDEX = ".index.json"  # suffix of either name: the index of its shards
_TEMPLATES = "additional_chat_templates/"
_COMPANIONS = (
    "*.json", "*.jinja",  # configs, vocabularies, chat templates
    "*.txt", "*.model", "*.spm", "*.tiktoken", "*.bpe", "*.codes",  # vocabularies of other kinds
    "README*", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*",
    "adapter_model.safetensors",
)  # fmt: skip
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")

log = logging.getLogger(__name__)


def fetch_model(name: str, cache: Path | None = None) -> Path:
    """The local folder of a hub model: fetched, or from the cache if the hub can't be reached.

    Args:
        name: name of the model on the hub.
        cache: folder of the cache of the hub's files; None = the usual one.

    Raises:
        UserError: the model can't be fetched, or has no weights that can be read.
    """
    try:
        snapshot = _snapshot(name, Path(constants.HF_HUB_CACHE) if cache is None else cache)
    except UserError:
        raise
    except Exception as error:  # many kinds of errors: bad names, no network, no access
        reason = first_line(error)
        raise UserError(f"the model '{name}' is neither a folder nor reachable on the hub ({reason})") from None
    inspect(snapshot)
    return snapshot if _weights(snapshot, SAFETENSORS) else _converted(name, snapshot)


def _snapshot(name: str, cache: Path) -> Path:
    try:
        info = HfApi().model_info(name, revision=constants.DEFAULT_REVISION)
    except Exception as error:
        try:
            return Path(snapshot_download(name, cache_dir=cache, local_files_only=True))
        except Exception:  # the first error is more helpful than "not in the cache"
            raise error from None

    def read(file: str) -> Any:
        return read_json(hf_hub_download(name, file, revision=info.sha, cache_dir=cache))

    wanted = wanted_files(name, [file.rfilename for file in info.siblings or ()], read)
    return Path(snapshot_download(name, allow_patterns=[glob.escape(file) for file in wanted], cache_dir=cache))


def wanted_files(name: str, files: Collection[str], read: Callable[[str], Any]) -> list[str]:
    """The files of a repository to fetch.

    Args:
        name: name of the repository, for messages.
        files: names of all files in the repository.
        read: function that returns the contents of one of the repository's JSON files.

    Raises:
        UserError: the repository has weights, but none in a readable format, or some are missing.
    """
    companions = [file for file in files if _is_companion(file)]
    for single in (SAFETENSORS, PICKLE):
        weights = [file for file in (single, single + _INDEX) if file in files]
        if single + _INDEX in weights:
            shards = _shards(read(single + _INDEX), single, name)
            if missing := sorted(shards - set(files)):
                raise UserError(f"{name} lacks {missing[0]}, which its {single}{_INDEX} names: use another repository")
            weights += sorted(shards - {single})
        if weights:
            return companions + weights
    others = [file for file in files if file.endswith(_OTHER_WEIGHTS) and file not in companions]
    if others:
        raise UserError(
            f"{name} has no {SAFETENSORS} and no {PICKLE}, whole or in shards, but {', '.join(others[:3])}: find a "
            "repository that has the model in Transformers' format"
        )
    return companions


def _is_companion(file: str) -> bool:
    if file.startswith(_TEMPLATES):
        return file.count("/") == 1 and file.endswith(".jinja")
    if "/" in file or file.startswith("consolidated") or file.endswith(_INDEX):
        return False
    return any(fnmatchcase(file, pattern) for pattern in _COMPANIONS)


def _shards(index: Any, single: str, of: object) -> set[str]:
    """The files named in an index of weights, each in the format of ``single``.

    Raises:
        UserError: the file is no such index.
    """
    try:
        found = {str(inside(Path(), file)) for file in index["weight_map"].values()}
        if odd := sorted(file for file in found if Path(file).suffix != Path(single).suffix):
            raise ValueError(odd[0])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{single}{_INDEX} of {of} is no index of weights ({reason})") from None
    return found


def _weights(folder: Path, single: str) -> list[Path]:
    """The files of a folder's weights in one format, as Transformers finds them; empty if there are none."""
    if (folder / single).is_file():
        return [folder / single]
    index = folder / (single + _INDEX)
    return [folder / file for file in sorted(_shards(read_json(index), single, folder))] if index.is_file() else []


def _converted(name: str, snapshot: Path) -> Path:
    """The snapshot with safetensors in place of pickles; the snapshot itself if it has no weights, only a tokenizer.

    Raises:
        UserError: a pickle contains other objects than tensors, or the cache can't be written.
    """
    pickles = _weights(snapshot, PICKLE)
    place = snapshot.parents[1] / "llmprune" / snapshot.name
    if not pickles or place.is_dir():
        return place if pickles else snapshot
    if missing := [path for path in pickles if not path.is_file()]:
        raise UserError(f"{missing[0]} is missing: fetch {name} again where there is a network")
    try:
        place.parent.mkdir(exist_ok=True)
        with FileLock(f"{place}.lock"):
            if not place.is_dir():
                log.info("the weights of %s are pickles: they are turned into safetensors in %s", name, place)
                with output_folder(place) as folder:
                    _convert(name, snapshot, pickles, folder)
    except OSError as error:
        raise UserError(f"can't write the cache {place}: {error.strerror or error}") from None
    return place


def _convert(name: str, snapshot: Path, pickles: list[Path], out: Path) -> None:
    for path in snapshot.rglob("*"):
        file = path.relative_to(snapshot).as_posix()
        if _is_companion(file):
            (out / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, out / file)
    script = Path(__file__).with_name("pickled_weights.py")
    command = [sys.executable, "-P", str(script), str(out), *map(str, pickles)]  # -P: no imports from this folder
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise UserError(f"the .bin weights of {name} can't be turned into safetensors: {reason}")
    for path in out.glob("*.safetensors"):
        make_readable(path)
