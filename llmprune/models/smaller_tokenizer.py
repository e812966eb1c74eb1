"""A tokenizer with fewer tokens, which still encodes every text, and the token ids of a model's configs.

Example: a tokenizer without the token " photosynthesis" encodes the word as " photos", "ynthesis". The tokens that stay
are numbered anew, in the same order.
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llmprune.models.companions import GENERATION, INPUTS, copy_companions
from llmprune.models.loading import load_tokenizer
from llmprune.utils.errors import UserError
from llmprune.utils.files import read_json, write_json

KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")
_IDS = re.compile(r"(^|_)(token_ids?|token_index|suppress_tokens|bad_words_ids)$")  # fields of configs that hold ids

_OTHER_IDS = ("forced_decoder_ids", "sequence_bias")


class Vocabulary:
    """The tokens of a tokenizer, which of them must stay, and which are made of others.

    Attributes:
        ids: number of every token, by its string as the tokenizer stores it.
        added: numbers of the tokens that are found in a text before it is divided, special ones among them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, named: Iterable[int] = ()) -> None:
        """Read a tokenizer.

        Args:
            tokenizer: tokenizer.
            named: further tokens that must stay, such as those that configs name.

        Raises:
            UserError: the tokenizer is of a kind that can't be made smaller.
        """
        if not tokenizer.is_fast:
            raise UserError("the tokenizer has no form for the tokenizers library: its vocabulary can't be cut")
        self._file: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        self._model = self._file["model"]
        kind = self._model.get("type", "BPE")
        if kind not in KINDS:
            raise UserError(f"a tokenizer of the kind {kind} can't be made smaller, only {', '.join(KINDS)} can")
        if kind == "BPE" and (self._model.get("continuing_subword_prefix") or self._model.get("end_of_word_suffix")):
            raise UserError("a BPE tokenizer whose tokens carry the place in the word can't be made smaller")
        stored = self._model["vocab"]
        pieces = {piece: place for place, (piece, _) in enumerate(stored)} if isinstance(stored, list) else dict(stored)
        added = {token["content"]: token["id"] for token in self._file.get("added_tokens", [])}
        self.ids: dict[str, int] = pieces | added
        self.added = frozenset(added.values())
        self._kind, self._named = kind, frozenset((*named, *tokenizer.all_special_ids))

    @cached_property
    def parts(self) -> dict[int, tuple[int, int]]:
        """The two tokens that every token of a BPE is made of, by number; absent = it is made of none.

        If several pairs make a token, the pair is the one that BPE ends with if it encodes the token's own string; then
        it ends with this pair within every text too.
        """
        if self._kind != "BPE":
            return {}
        makers: dict[str, list[tuple[str, str]]] = {}
        for pair in self._merges:
            makers.setdefault("".join(pair), []).append(pair)
        ranks = {pair: rank for rank, pair in enumerate(self._merges)}
        found = {}
        for token, pairs in makers.items():
            last = pairs[0] if len(pairs) == 1 else _last_merge(token, ranks)
            if last is not None and token in self.ids and all(part in self.ids for part in last):
                found[self.ids[token]] = (self.ids[last[0]], self.ids[last[1]])
        return found

    @property
    def _merges(self) -> list[tuple[str, str]]:
        """The merges of a BPE, in order; files have them as pairs or as strings with a space."""
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in self._model["merges"])
        return [(first, second) for first, second in pairs]

    @cached_property
    def required(self) -> frozenset[int]:
        """The tokens that must stay: special and added ones, bytes or characters, numbers, and what these are made of.

        With the bytes, or without them the single characters, every text can be encoded.
        """
        kinds = set(_types(self._file))
        if "ByteLevel" in kinds:
            alphabet = {*pre_tokenizers.ByteLevel.alphabet()}
        elif self._model.get("byte_fallback"):
            alphabet = {f"<0x{byte:02X}>" for byte in range(256)}
        else:
            prefix = self._model.get("continuing_subword_prefix") or ""
            alphabet = {token for token in self.ids if len(token.removeprefix(prefix) if prefix else token) == 1}
        numbers = {token for token in self.ids if (plain := token.strip("▁Ġ#")).isascii() and plain.isdigit()}
        found = {self.ids[token] for token in (alphabet | numbers | {"▁"}) & self.ids.keys()}
        found |= self.added | self._named | _in_template(self._file.get("post_processor"))
        unknown = self._model.get("unk_id") if self._kind == "Unigram" else self.ids.get(self._model.get("unk_token"))
        return self._with_parts(found if unknown is None else found | {unknown})

    def _with_parts(self, tokens: set[int]) -> frozenset[int]:
        found, new = set(tokens), list(tokens)
        while new:
            more = set(self.parts.get(new.pop(), ())) - found
            found |= more
            new += more
        return frozenset(found)

    def in_order(self, counts: Mapping[int, float], rows: int) -> list[int]:
        """All token ids, in the order in which they should stay: those that must, then by use.

        A use of a token counts for the tokens that it is made of too, so that these never come after it.

        Args:
            counts: number of uses of every token in text; absent = never.
            rows: number of rows of the embedding; rows without a token come last.
        """
        length = {number: len(token) for token, number in self.ids.items()}
        uses = {number: counts.get(number, 0) for number in length}
        for number in sorted(length, key=lambda one: -length[one]):
            for part in self.parts.get(number, ()):
                uses[part] += uses[number]
        return sorted(
            {*length, *range(rows)},
            key=lambda one: (one not in self.required, one not in length, -uses.get(one, 0), length.get(one, 0), one),
        )

    def cut(self, kept: Sequence[int]) -> Tokenizer:
        """The tokenizer with only some tokens; token ``kept[i]`` gets the number i.

        Text that was encoded with tokens that stay, each with all tokens that it is made of, is encoded as before.

        Args:
            kept: numbers of the tokens that stay, ascending; they contain ``required``.

        Raises:
            UserError: a token that must stay is missing.
        """
        new = {number: place for place, number in enumerate(kept)}
        if missing := sorted(self.required - new.keys()):
            words = {number: token for token, number in self.ids.items()}
            raise UserError(f"the token {missing[0]} ({words.get(missing[0])!r}) must stay in the vocabulary")
        file = copy.deepcopy(self._file)
        model = file["model"]
        left = {token: new[number] for token, number in self.ids.items() if number in new}
        if isinstance(model["vocab"], list):
            model["vocab"] = [pair for place, pair in enumerate(model["vocab"]) if place in new]
            model["unk_id"] = None if model.get("unk_id") is None else new[model["unk_id"]]
        else:
            model["vocab"] = {token: left[token] for token in model["vocab"] if token in left}
        if self._kind == "BPE":
            words = model["vocab"]
            model["merges"] = [
                [first, second]
                for first, second in self._merges
                if first in words and second in words and first + second in words
            ]
        for token in file.get("added_tokens", []):
            token["id"] = new[token["id"]]
        _renumber_template(file.get("post_processor"), new)
        file["padding"] = file["truncation"] = None
        made = Tokenizer.from_str(json.dumps(file))
        if made.get_vocab() != left:
            raise UserError("the tokenizer numbers its tokens in a way that can't be kept: its vocabulary can't be cut")
        return made

    def pieces(self, kept: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """The spelling of every token that goes, with tokens that stay; all in this vocabulary's numbers.

        A token that can't be spelt has an empty spelling.

        Args:
            kept: numbers of the tokens that stay, ascending.
        """
        model, stays = self.cut(kept).model, {*kept}
        prefix = self._model.get("continuing_subword_prefix") or "" if self._kind == "WordPiece" else ""
        found = {}
        for token, number in self.ids.items():
            if number in stays:
                continue
            if prefix and token.startswith(prefix):
                found[number] = self._within_word(token.removeprefix(prefix), prefix, stays)
            else:
                found[number] = tuple(kept[piece.id] for piece in model.tokenize(token))
        return found

    def _within_word(self, rest: str, prefix: str, stays: set[int]) -> tuple[int, ...]:
        """The longest tokens that stay, one after the other, of the inner part of a word of WordPiece."""
        found = []
        while rest:
            size = next((n for n in range(len(rest), 0, -1) if self.ids.get(prefix + rest[:n]) in stays), 0)
            if not size:
                return ()
            found.append(self.ids[prefix + rest[:size]])
            rest = rest[size:]
        return tuple(found)


def _last_merge(token: str, ranks: Mapping[tuple[str, str], int]) -> tuple[str, str] | None:
    """The last pair that BPE merges in encoding ``token``; None if it does not end with the one token."""
    parts, last = list(token), None
    while len(parts) > 1:
        pairs = [(ranks.get(pair, len(ranks)), place) for place, pair in enumerate(pairwise(parts))]
        rank, place = min(pairs)
        if rank == len(ranks):
            return None
        last = (parts[place], parts[place + 1])
        parts[place : place + 2] = ["".join(last)]
    return last


def _types(node: Any) -> Iterator[str]:
    """The types of all parts of a tokenizer's file."""
    if isinstance(node, list):
        for one in node:
            yield from _types(one)
    elif isinstance(node, dict):
        if isinstance(node.get("type"), str):
            yield node["type"]
        for name in ("normalizer", "pre_tokenizer", "decoder", "normalizers", "pretokenizers", "decoders"):
            yield from _types(node.get(name))


def _templates(node: Any) -> Iterator[dict[str, Any]]:
    """The post-processors that name tokens."""
    if isinstance(node, dict):
        yield node
        for one in node.get("processors", []):
            yield from _templates(one)


def _in_template(node: Any) -> set[int]:
    """The numbers of the tokens that a post-processor puts around text."""
    found: set[int] = set()
    for template in _templates(node):
        tokens = template.get("special_tokens")
        for token in tokens.values() if isinstance(tokens, dict) else ():
            found.update(token["ids"])
        found.update(template[name][1] for name in ("sep", "cls") if isinstance(template.get(name), list))
    return found


def _renumber_template(node: Any, new: Mapping[int, int]) -> None:
    for template in _templates(node):
        tokens = template.get("special_tokens")
        for token in tokens.values() if isinstance(tokens, dict) else ():
            token["ids"] = [new[number] for number in token["ids"]]
        for name in ("sep", "cls"):
            if isinstance(template.get(name), list):
                template[name][1] = new[template[name][1]]


def renumbered(fields: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The fields of a config with its token ids numbered anew.

    Args:
        fields: fields of a config or generation config.
        kept: numbers of the tokens that stay, ascending.

    Raises:
        UserError: an id is of a token that does not stay.
    """
    new = {number: place for place, number in enumerate(kept)}

    def of(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [of(name, one) for one in value]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            return value
        if value not in new:
            raise UserError(f"the config's {name} {value} does not stay in the vocabulary")
        return new[value]

    found = {name: of(name, value) if _IDS.search(name) else value for name, value in fields.items()}
    if isinstance(decoder := found.get("added_tokens_decoder"), dict):  # of a tokenizer config: its keys are ids
        found["added_tokens_decoder"] = {
            str(of("added token", int(number))): token for number, token in decoder.items()
        }
    return found


def token_ids(fields: Mapping[str, Any]) -> set[int]:
    """The token ids that the fields of a config or generation config name."""

    def of(value: Any) -> Iterator[int]:
        if isinstance(value, list):
            for one in value:
                yield from of(one)
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            yield value

    return {number for name, value in fields.items() if _IDS.search(name) for number in of(value)}


def write_companions(kept: Sequence[int], source: Path, folder: Path) -> None:
    """Write a model's companion files for the tokens that stay: tokenizer, generation config, licence.

    The tokenizer needs no class of its own to be loaded.

    Args:
        kept: numbers of the tokens that stay, ascending.
        source: folder of the source model.
        folder: folder to write.

    Raises:
        UserError: the source has no tokenizer that can be made smaller, or a token that must stay is missing.
    """
    before = load_tokenizer(source)
    copy_companions(source, folder, tokenizer=False)
    cut = Vocabulary(before).cut(kept)
    settings = {
        "model_max_length": before.model_max_length,
        "padding_side": before.padding_side,
        "truncation_side": before.truncation_side,
        "clean_up_tokenization_spaces": before.clean_up_tokenization_spaces,
        "chat_template": before.chat_template,
        "model_input_names": INPUTS,
    }
    prefix = json.loads(cut.to_str())["pre_tokenizer"] or {}
    if "add_prefix_space" in prefix:  # otherwise Transformers sets it to false
        settings["add_prefix_space"] = prefix["add_prefix_space"]
    made = PreTrainedTokenizerFast(tokenizer_object=cut, **before.special_tokens_map, **settings)
    made.save_pretrained(folder)
    if (generation := folder / GENERATION).is_file():
        write_json(generation, renumbered(read_json(generation), kept))
