"""YAML files, read within limits: how large, how deep, and how much they come to once their aliases are written out."""

import io
import math
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmprune.utils.errors import UserError, first_line
from llmprune.utils.files import read_bytes

BYTES = 2**22
VALUES = 100_000
DEPTH = 40
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where libyaml is


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a YAML file, in which interpolations stay as they are typed.

    Raises:
        UserError: it can't be read, is none, holds no sections, or goes beyond the limits.
    """
    content = read_bytes(path, BYTES)
    try:
        text = content.decode()
        check_yaml(text)
        loaded = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except yaml.MarkedYAMLError as error:  # the problem and its line, but not what stands there: it may be a password
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise UserError(f"{path} can't be read: {error.problem}{line}") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{path} can't be read: {first_line(error)}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} must hold sections such as run:, model: and data:")
    return {str(key): value for key, value in loaded.items()}


def check_yaml(text: str) -> None:
    """Check that a YAML text can be built without harm.

    Raises:
        YAMLError: it is none.
        ValueError: it is nested too deeply, or its aliases make too much of it, or something part of itself.
    """
    deep = 0
    for number, event in enumerate(yaml.parse(text, Loader=_LOADER)):
        deep += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if deep > DEPTH:
            raise ValueError(f"it is nested more than {DEPTH} deep")
        if number > 2 * VALUES:
            raise ValueError(f"it holds more than {VALUES:,} values")
    size, depth = _extent(yaml.compose(text, Loader=_LOADER), {})
    if depth > DEPTH + 1:
        raise ValueError(f"with its aliases it is nested more than {DEPTH} deep")
    if size > VALUES:
        raise ValueError(f"it comes to more than {VALUES:,} values")


def _extent(node: Any, known: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """How many values a node holds once its aliases are written out, and how deep; infinite for a part of itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1.0, 1.0
    if id(node) not in known:
        known[id(node)] = math.inf, math.inf
        pairs = isinstance(node, yaml.MappingNode)
        inner = [one for pair in node.value for one in pair] if pairs else node.value
        extents = [_extent(one, known) for one in inner]
        known[id(node)] = 1 + sum(size for size, _ in extents), 1 + max((deep for _, deep in extents), default=0)
    return known[id(node)]
