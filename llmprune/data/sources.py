"""Documents: the texts of records, with their domains."""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmprune.data.records import RECORD_BYTES, DamagedInput, Input, TooLarge, records
from llmprune.utils.errors import UserError

Place = tuple[int, int]  # number of the input, and of the record in it


@dataclass(frozen=True)
class Document:
    """A text with its domain.

    Attributes:
        text: whole text; only spaces = an empty document.
        domain: name of the domain, which is valid as a folder name.
        place: number of the input, and of the record in it.
        position: number of bytes of all inputs that were read up to this document.
        pieces: pieces of the text, each with whether a model learns it; empty = one piece that is learned.
    """

    text: str
    domain: str
    place: Place
    position: int
    pieces: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True)
class BadRecord:
    """A record that could not be read.

    Attributes:
        place: description of the record's place.
        reason: description of the error.
        after: numbers of the input and of the record in it, from which reading can resume.
    """

    place: str
    reason: str
    after: Place = (0, 0)


@dataclass(frozen=True)
class Fields:
    """The fields of a record that are read (nested ones with dots), and an override of the domain.

    Attributes:
        text: name of the field with the text.
        domain_field: name of the field with the domain; None = the domain is the input's folder.
        domain: name of one domain for all records; None = no override.
    """

    text: str = "text"
    domain_field: str | None = None
    domain: str | None = None


def clean_name(name: str) -> str:
    """A domain's name as a folder name: letters and digits of any script, ``.``, ``_`` and ``-``; no dot first."""
    kept = (c if c in "._-" or c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in name)
    cleaned = re.sub(" +", "_", "".join(kept)).lstrip(".")
    return cleaned.encode()[:100].decode(errors="ignore") or "unnamed"


def folded(name: str) -> str:
    """A name in the form in which file systems that ignore case compare it."""
    return unicodedata.normalize("NFC", name).casefold()


class DomainNames:
    """The clean names of domains, which are all different, also when upper and lower case are ignored.

    Attributes:
        originals: original names, by clean name in folded form.
    """

    def __init__(self, originals: Mapping[str, str] | None = None) -> None:
        """Start with the names in ``originals``."""
        self.originals = dict(originals or {})
        self._cleaned: dict[str, str] = {}

    def clean(self, name: str) -> str:
        """The clean name of a domain.

        Raises:
            UserError: another domain has the same clean name.
        """
        name = unicodedata.normalize("NFC", name)  # file systems spell the same name in different ways
        if name not in self._cleaned:
            cleaned = clean_name(name)
            original = self.originals.setdefault(folded(cleaned), name)
            if original != name:
                both = f"would both be named '{cleaned}'"
                if clean_name(original) != cleaned:
                    both = "differ in upper and lower case alone, which are the same name on some file systems"
                raise UserError(f"the domains '{original}' and '{name}' {both}: rename one of them, or pass --domain")
            self._cleaned[name] = cleaned
        return self._cleaned[name]


Render = Callable[[Mapping[str, Any]], tuple[tuple[str, bool], ...]]


def documents(
    inputs: Sequence[Input],
    fields: Fields,
    *,
    after: Place = (0, 0),
    text_bytes: int | None = None,
    render: Render | None = None,
    rendered: Sequence[str] = (),
    names: DomainNames | None = None,
    empty: bool = False,
) -> Iterator[Document | BadRecord]:
    """Every document of ``inputs``, and every record that could not be read or is too large.

    Args:
        inputs: inputs to read, see ``find_inputs``.
        fields: names of the fields that are read.
        after: place after which reading begins.
        text_bytes: number of bytes of a text file that are read; None = all.
        render: function that makes a document's pieces from a record, in place of the text field; it raises
            ``ValueError``, ``KeyError`` or ``TypeError`` for a record that it can't use.
        rendered: names of the top-level fields that ``render`` reads.
        names: names of domains found elsewhere, to which the new ones are added; None = none.
        empty: whether documents without text are returned as well.

    Raises:
        UserError: two domains would get the same name.
    """
    names = DomainNames() if names is None else names
    if fields.domain is None and fields.domain_field is None:
        for source in inputs:
            names.clean(source.folder)  # a conflict is reported before anything is read
    wanted = [*rendered] if render else [fields.text.partition(".")[0]]
    wanted += [] if fields.domain_field is None else [fields.domain_field.partition(".")[0]]
    before = sum(source.size for source in inputs[: after[0]])
    for number, source in enumerate(inputs[after[0] :], after[0]):
        record = start = after[1] if number == after[0] else 0
        try:
            for record, content, read in records(source, after=start, fields=wanted, text_bytes=text_bytes):
                try:
                    pieces, domain = _content(content, source, fields, render)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    yield BadRecord(f"{source.name}:{record}", _reason(error), (number, record))
                    continue
                text = "".join(piece for piece, _ in pieces)
                if empty or text.strip():
                    name = names.clean(fields.domain or domain or source.folder)
                    yield Document(text, name, (number, record), before + read, pieces if render else ())
        except DamagedInput as error:
            # What was read before the damage is kept, the rest is lost.
            reason = f"the file is damaged from here on ({error})"
            yield BadRecord(f"{source.name}:{record + 1}", reason, (number + 1, 0))
        before += source.size


def _content(
    content: bytes | Mapping[str, Any] | TooLarge, source: Input, fields: Fields, render: Render | None
) -> tuple[tuple[tuple[str, bool], ...], str | None]:
    """A record's pieces and the domain in its domain field."""
    if isinstance(content, TooLarge):
        raise content
    if source.is_text:
        assert isinstance(content, bytes)
        if render:
            raise TypeError("text has no fields")
        return ((content.decode("utf-8-sig"), True),), None
    value = json.loads(content.decode("utf-8-sig")) if isinstance(content, bytes) else content
    pieces = render(value) if render else ((field_text(value, fields.text), True),)
    # An escaped lone surrogate is JSON but no text: encoding it raises a ValueError.
    if sum(len(piece.encode("utf-8")) for piece, _ in pieces) > RECORD_BYTES:
        raise TooLarge()
    return pieces, None if fields.domain_field is None else field_text(value, fields.domain_field)


def field_value(record: Any, dotted: str) -> Any:
    """The value of a record's field; the names of nested fields are joined by dots.

    Raises:
        KeyError: the record has no such field.
    """
    value = record
    for name in dotted.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise KeyError(f"no field '{dotted}'")
        value = value[name]
    return value


def field_text(record: Any, dotted: str) -> str:
    """The text in a record's field.

    Raises:
        KeyError: the record has no such field.
        TypeError: the field contains something else.
    """
    value = field_value(record, dotted)
    if not isinstance(value, str):
        raise TypeError(f"field '{dotted}' is no string")
    return value


def _reason(error: Exception) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) else str(error)
