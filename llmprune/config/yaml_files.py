"""YAML files, read within limits (size, depth, aliases written out), and without passwords or tokens."""

import io
import math
import re
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
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, if libyaml is installed


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a YAML file, with interpolations as they are written.

    Raises:
        UserError: the file can't be read, is no YAML, has no sections, or exceeds the limits.
    """
    content = read_bytes(path, BYTES)
    try:
        text = content.decode()
        check_yaml(text)
        loaded = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except yaml.MarkedYAMLError as error:  # the line's text is not shown: it may be a password
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise UserError(f"{path} can't be read: {error.problem}{line}") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{path} can't be read: {first_line(error)}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} must hold sections such as run:, model: and data:")
    return {str(key): value for key, value in loaded.items()}


def check_yaml(text: str) -> None:
    """Check that a YAML text can be loaded within the limits.

    Raises:
        YAMLError: the text is no YAML.
        ValueError: the text is nested too deeply, has too many values with its aliases written out, or contains itself.
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
        raise ValueError(f"it has more than {VALUES:,} values")


def _extent(node: Any, known: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """The number of values and the depth of a node with its aliases written out; infinite if it contains itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1.0, 1.0
    if id(node) not in known:
        known[id(node)] = math.inf, math.inf
        pairs = isinstance(node, yaml.MappingNode)
        inner = [one for pair in node.value for one in pair] if pairs else node.value
        extents = [_extent(one, known) for one in inner]
        known[id(node)] = 1 + sum(size for size, _ in extents), 1 + max((deep for _, deep in extents), default=0)
    return known[id(node)]


_WORD = r"(?<![A-Za-z0-9])"
_SECRET = re.compile(
    "|".join(
        (
            r"://[^/@\s]*:[^/@\s]*@",  # user:password@ in a URL
            # signed URLs, and tokens among their parameters
            r"(?i:[?&;#]([\w.-]*(token|secret|signature|passw(or)?d|credentials?|key|keyid)|sig|auth|pwd|pass)=[^&\s])",
            _WORD + r"(AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Za-z])",  # AWS
            _WORD + r"AIza[\w-]{30}",  # Google
            _WORD + r"(gh[pousr]_[A-Za-z0-9]{20}|github_pat_\w{20}|glpat-[\w-]{20})",
            _WORD + r"hf_[A-Za-z0-9]{25}",  # Hugging Face hub
            _WORD + r"sk-[\w-]*[A-Za-z0-9]{20}",  # OpenAI, Anthropic
            _WORD + r"xox[a-z]-[\w-]{10}",  # Slack
            _WORD + r"eyJ[\w-]{10,}\.[\w-]{10,}\.",  # JSON web tokens
            r"(?i:\bbearer +[\w.~+/-]{16})",
            r"\A[0-9a-f]{40}\Z",  # Weights & Biases
            _WORD + r"(wandb_v\d_\w{20}|local-[0-9a-f]{40})",
        )
    )
)


def refuse_secrets(values: Any, key: str = "") -> None:
    """Raise ``UserError`` for a text that looks like a password or a token, without showing it.

    Args:
        values: a value, or nested lists and mappings of values.
        key: dotted key of the values in the YAML, for the message.
    """
    if isinstance(values, dict | list):
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            refuse_secrets(name, f"a name in {key}" if key else "a name")
            refuse_secrets(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, str) and _SECRET.search(values):
        raise UserError(
            f"{key} holds what looks like a password or a token, which everyone who sees the run would see: set it in "
            "the environment (AWS_SECRET_ACCESS_KEY, HF_TOKEN, WANDB_API_KEY, …)"
        )
