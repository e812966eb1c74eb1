"""Passwords and tokens, recognised in what a job says: config.yaml keeps and shows every value."""

import re
from typing import Any

from llmprune.utils.errors import UserError

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
            _WORD + r"hf_[A-Za-z0-9]{25}",  # the hub
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
    """Raise ``UserError`` for what looks like a password or a token, without showing it.

    Args:
        values: nested.
        key: where they stand.
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
