"""Prompts and responses, or chat messages, as text in which only the responses are learned."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerFast

from data_prep.confined import Confined
from llmprune.data.records import RECORD_BYTES
from llmprune.data.sources import field_text, field_value
from llmprune.utils.errors import UserError, first_line

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
_TOOLS = ("tool_calls", "tool_call_id", "name")  # fields of messages that templates may use


@dataclass(frozen=True)
class ConversationSettings:
    """Settings for the conversion of records to conversations.

    Attributes:
        template: ``chat`` (the tokenizer's chat template), ``alpaca``, ``none``, or the path of a file with the
            prompt's text and the fields ``{prompt}`` and ``{input}``.
        prompt: name of the field with the prompt.
        input: name of the field with the context of the prompt; it may be absent or empty.
        response: name of the field with the response.
        messages: name of the field with a list of messages, used if a record has it: each message with ``role`` and
            ``content``, or with ``from`` and ``value``; content may be a list of parts with text.
    """

    template: str = "chat"
    prompt: str = "prompt"
    input: str = "input"
    response: str = "response"
    messages: str = "messages"

    def described(self) -> dict[str, str]:
        """The settings as a dictionary; the path of a template's file is replaced by its text."""
        return {**asdict(self), "template": self.own_template() or self.template}

    def own_template(self) -> str | None:
        """The text of the template's file; None if the template is not a file.

        Raises:
            UserError: the file can't be read.
        """
        if self.template in ("chat", *NAMED) or not Path(self.template).is_file():
            return None
        try:
            return Path(self.template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.template} can't be read as a template: {first_line(error)}") from None

    @property
    def fields(self) -> list[str]:
        """The names of the top-level fields that are read."""
        return [name.partition(".")[0] for name in (self.prompt, self.input, self.response, self.messages)]


def renderer(
    settings: ConversationSettings, tokenizer: PreTrainedTokenizerFast
) -> Callable[[Mapping[str, Any]], Pieces]:
    """Make the function that turns a record into pieces of text, each with a flag whether it is learned.

    Raises:
        UserError: there is no such template, or the tokenizer has none.
    """
    if settings.template == "chat":
        if not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template: choose --template alpaca, none, or a file of your own")
        added = tokenizer.added_tokens_decoder.values()
        special = [*tokenizer.all_special_tokens, *(token.content for token in added if token.special)]
        confined = Confined(
            lambda messages: _syntax_error(tokenizer) if messages is None else _chat(messages, tokenizer, special),
            "the chat template",
        )
        try:
            wrong = confined(None)
        except ValueError as error:
            wrong = str(error)
        if wrong is not None:
            raise UserError(f"the tokenizer's chat template is no valid one: {wrong}")
        return lambda record: tuple((text, learned) for text, learned in confined(_messages(record, settings)))
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
    """The prompt in its template, and the response."""
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
    # Not str.format, because prompts contain braces.
    parts = template.split("{prompt}")
    filled = prompt.join(part.replace("{input}", context) for part in parts)
    return (filled, False), (response, True)


def _asked(record: Mapping[str, Any], settings: ConversationSettings) -> tuple[str, str, str]:
    """The prompt, its context, and the response of a record."""
    try:
        context = str(field_value(record, settings.input) or "")
    except KeyError:
        context = ""
    return field_text(record, settings.prompt), context, field_text(record, settings.response)


def _messages(record: Mapping[str, Any], settings: ConversationSettings) -> list[dict[str, Any]]:
    """The messages of a record."""
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
    return [_message(message) for message in raw]


def _message(message: Any) -> dict[str, Any]:
    """A message with a role that chat templates accept, its text, and its fields of tool calls."""
    if not isinstance(message, Mapping):
        raise TypeError("a message is no mapping")
    given = {key: value for key, value in message.items() if value is not None}  # rows of a table have all fields
    role = given.get("role", given.get("from"))
    if not isinstance(role, str):
        raise ValueError("a message has no role")
    kept = {key: given[key] for key in _TOOLS if key in given}
    content = given.get("content", given.get("value", "" if "tool_calls" in kept else None))
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(map(_part, content))
    if not isinstance(content, str):
        raise ValueError(f"a message of the role '{role}' has no text")
    return {"role": _ROLES.get(role, role), "content": content, **kept}


def _part(part: Any) -> str:
    """The text of one part of a message."""
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if isinstance(part, Mapping) else part
    if kind not in ("text", "str") or not isinstance(text, str):
        raise ValueError(f"a message has a part of the type '{kind}', and only text can be learned")
    return text


def _chat(messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, special: Sequence[str]) -> Pieces:
    """A conversation in the tokenizer's chat template; answers to prompts are learned, with their end-of-turn tokens.

    If the first message is an assistant's, it answers nothing: it is part of the first prompt.
    """
    for message in messages:
        said = message["content"] + json.dumps(message.get("tool_calls", ""), ensure_ascii=False)
        found = next((token for token in special if token in said), None)
        if found is not None:
            raise ValueError(f"a message holds the special token {found}")
    try:
        return tuple(_answers(messages, tokenizer))
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # a template is a program, which can raise any exception
        begin = "it begins with the assistant, and " if messages[0]["role"] == "assistant" else ""
        raise ValueError(f"{begin}the chat template refuses it: {first_line(error)}") from None


def _answers(messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[str, bool]]:
    """Yield the prompts and the answers of a conversation, alternately."""
    begin = next((place for place, message in enumerate(messages) if message["role"] != "assistant"), len(messages))
    answers = [place for place in range(begin, len(messages)) if messages[place]["role"] == "assistant"]
    if not answers:
        raise ValueError("there is no response: no message of the role 'assistant' follows another one")
    done = ""
    for place in answers:
        message = messages[place]
        if not message["content"].strip() and not message.get("tool_calls"):
            raise ValueError("a response is empty")
        asked = _render(tokenizer, messages[:place], ask=True)
        answered = _render(tokenizer, messages[: place + 1], ask=False)
        if not asked.startswith(done) or not answered.startswith(asked):
            raise ValueError("the chat template changes what it said before")
        yield asked[len(done) :], False
        yield answered[len(asked) :], True
        done = answered
    for place in range(answers[-1]):
        _check_shown(tokenizer, messages[: place + 1])


def _check_shown(tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict[str, Any]]) -> None:
    """Raise ``ValueError`` if the last message has a role that the template silently leaves out."""
    *before, last = messages
    other = {**last, "content": f"{last['content']} other"}
    if last["role"] not in _ROLES.values() and (
        _render(tokenizer, messages, ask=False) == _render(tokenizer, [*before, other], ask=False)
    ):
        raise ValueError(f"the chat template leaves out messages of the role '{last['role']}'")


def _syntax_error(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The syntax error of a chat template, as text; None = there is none."""
    try:
        _render(tokenizer, [{"role": "user", "content": ""}], ask=True)
    except TemplateSyntaxError as error:
        return first_line(error)
    except Exception:  # the template may refuse this conversation; that is no syntax error
        return None
    return None


def _render(tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict[str, Any]], *, ask: bool) -> str:
    text = str(tokenizer.apply_chat_template([*messages], tokenize=False, add_generation_prompt=ask))
    if len(text) > RECORD_BYTES:
        raise ValueError(f"the chat template makes more than {RECORD_BYTES >> 20} MiB of it")
    return text
