"""Prompts and responses, or chat messages, as text of which only the responses are learned."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerFast

from llmprune.data.sources import field_text, field_value
from llmprune.errors import UserError, first_line

Pieces = tuple[tuple[str, bool], ...]

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)
NAMED = {"alpaca": (ALPACA, ALPACA_WITH_INPUT), "none": ("{prompt}", "{prompt}\n{input}")}
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class ConversationSettings:
    """How records become conversations.

    Attributes:
        template: ``chat`` (the tokenizer's own), ``alpaca``, ``none``, or a file: the prompt's text with the fields
            ``{prompt}`` and ``{input}``.
        prompt: field with the prompt.
        input: field with what the prompt is about; records without it, or with an empty one, have none.
        response: field with the response.
        messages: field with a list of messages, used where a record has it: each with ``role`` and ``content``, or
            with ``from`` and ``value``.
    """

    template: str = "chat"
    prompt: str = "prompt"
    input: str = "input"
    response: str = "response"
    messages: str = "messages"

    def described(self) -> dict[str, str]:
        """The settings; a file of a template is described by its text."""
        return {**asdict(self), "template": self.own_template() or self.template}

    def own_template(self) -> str | None:
        """The text of the file that is the template, if it is one.

        Raises:
            UserError: it can't be read.
        """
        if self.template in ("chat", *NAMED) or not Path(self.template).is_file():
            return None
        try:
            return Path(self.template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.template} can't be read as a template: {first_line(error)}") from None

    @property
    def fields(self) -> list[str]:
        """The top-level fields that are read."""
        return [name.partition(".")[0] for name in (self.prompt, self.input, self.response, self.messages)]


def renderer(
    settings: ConversationSettings, tokenizer: PreTrainedTokenizerFast
) -> Callable[[Mapping[str, Any]], Pieces]:
    """What turns a record into pieces of text, each with whether it is learned.

    Raises:
        UserError: there is no such template, or the tokenizer has none.
    """
    if settings.template == "chat":
        if not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template: choose --template alpaca, none, or a file of your own")
        added = tokenizer.added_tokens_decoder.values()
        special = [*tokenizer.all_special_tokens, *(token.content for token in added if token.special)]
        _check_syntax(tokenizer)
        return lambda record: _chat(_messages(record, settings), tokenizer, special)
    if settings.template in NAMED:
        templates = NAMED[settings.template]
    elif (own := settings.own_template()) is not None:
        templates = own, own
        if "{prompt}" not in own:
            raise UserError(f"{settings.template} has no {{prompt}}: write it where the prompt belongs")
    else:
        known = ", ".join(("chat", *NAMED))
        raise UserError(f"there is no template '{settings.template}': choose {known}, or a file")
    return lambda record: _filled(record, settings, *templates)


def _filled(record: Mapping[str, Any], settings: ConversationSettings, plain: str, with_input: str) -> Pieces:
    """A prompt in its template, and the response."""
    try:
        prompt, context, response = _asked(record, settings)
    except KeyError:
        messages = _messages(record, settings)
        if [message["role"] for message in messages] != ["user", "assistant"]:
            raise ValueError(
                "this template takes one prompt and one response: use --template chat for longer ones"
            ) from None
        prompt, context, response = messages[0]["content"], "", messages[1]["content"]
    if not response.strip():
        raise ValueError("the response is empty")
    template = with_input if context.strip() else plain
    # Not str.format: prompts hold braces of their own.
    parts = template.split("{prompt}")
    filled = prompt.join(part.replace("{input}", context) for part in parts)
    return (filled, False), (response, True)


def _asked(record: Mapping[str, Any], settings: ConversationSettings) -> tuple[str, str, str]:
    """Prompt, what it is about, and response."""
    try:
        context = str(field_value(record, settings.input) or "")
    except KeyError:
        context = ""
    return field_text(record, settings.prompt), context, field_text(record, settings.response)


def _messages(record: Mapping[str, Any], settings: ConversationSettings) -> list[dict[str, str]]:
    """The messages of a record, with the roles that chat templates know."""
    try:
        raw = field_value(record, settings.messages)
    except KeyError:
        raw = None
    if raw is None:
        try:
            prompt, context, response = _asked(record, settings)
        except KeyError as error:
            raise KeyError(f"no field '{settings.messages}', and {error.args[0]}") from None
        prompt = f"{prompt}\n\n{context}" if context.strip() else prompt
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        raise TypeError(f"field '{settings.messages}' is no list of messages")
    found = []
    for message in raw:
        if not isinstance(message, Mapping):
            raise TypeError("a message is no mapping")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if role not in _ROLES or not isinstance(content, str):
            raise ValueError(f"a message of the role {role!r} can't be used")
        found.append({"role": _ROLES[role], "content": content})
    return found


def _chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, special: Sequence[str]) -> Pieces:
    """A conversation in the tokenizer's chat template; what answers a prompt is learned, with the mark of its end."""
    for message in messages:
        found = next((token for token in special if token in message["content"]), None)
        if found is not None:
            raise ValueError(f"a message holds the special token {found}")
    pieces: list[tuple[str, bool]] = []
    done = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if not message["content"].strip():
            raise ValueError("a response is empty")
        try:
            asked = _render(tokenizer, messages[:number], ask=True)
            answered = _render(tokenizer, messages[: number + 1], ask=False)
        except Exception as error:  # a template is a program
            raise ValueError(f"the chat template refuses it: {first_line(error)}") from None
        if not asked.startswith(done) or not answered.startswith(asked):
            raise ValueError("the chat template changes what it said before")
        pieces += [(asked[len(done) :], False), (answered[len(asked) :], True)]
        done = answered
    if not pieces:
        raise ValueError("there is no response")
    return tuple(pieces)


def _check_syntax(tokenizer: PreTrainedTokenizerFast) -> None:
    try:
        _render(tokenizer, [{"role": "user", "content": ""}], ask=True)
    except TemplateSyntaxError as error:
        raise UserError(f"the tokenizer's chat template is no valid one: {first_line(error)}") from None
    except Exception:  # this conversation may be one that it refuses
        return


def _render(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], *, ask: bool) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
