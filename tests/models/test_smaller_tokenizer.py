"""Tokenizers with fewer tokens: every text survives, and what used only tokens that stay is encoded as before."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llmprune.models.smaller_tokenizer import Vocabulary, renumbered, token_ids
from llmprune.utils.errors import UserError

SPECIAL = ["<s>", "</s>", "<unk>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def corpus() -> list[str]:
    """Text of made-up words, some of which share their beginnings and ends."""
    draw = random.Random(5)
    parts = ["ba", "ko", "lin", "té", "ör", "сло", "во", "mar", "x1", "2024", "ing", "ness", "a"]
    words = ["".join(draw.choices(parts, k=draw.randint(1, 4))) for _ in range(300)]
    return [" ".join(draw.choices(words, k=30)) + "." for _ in range(100)]


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(corpus(), trainer)
    return made


def byte_fallback() -> Tokenizer:
    """As converted from SentencePiece: every way to divide a token into two is a merge."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=350))
    pieces = [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    vocabulary = {piece: place for place, piece in enumerate([*SPECIAL, *BYTES, *pieces])}
    merges = [
        (token[:cut], token[cut:])
        for token in pieces
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    made = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(SPECIAL)
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=250, special_tokens=SPECIAL, unk_token="<unk>")
    made.train_from_iterator(corpus(), trainer)
    return made


def wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    made.train_from_iterator(corpus(), trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL))
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "unigram": unigram,
    "wordpiece": wordpiece,
}


def wrapped(made: Tokenizer) -> PreTrainedTokenizerFast:
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> tuple[Tokenizer, Tokenizer, list[int]]:
    """A tokenizer, the same with half of the tokens that may go, and the numbers of those that stay."""
    made = KINDS[request.param]()
    vocabulary = Vocabulary(wrapped(made))
    counts: Counter[int] = Counter()
    for text in corpus()[:50]:
        counts.update(made.encode(text, add_special_tokens=False).ids)
    order = vocabulary.in_order(counts, len(vocabulary.ids))
    kept = sorted(order[: (len(order) + len(vocabulary.required)) // 2])
    return made, vocabulary.cut(kept), kept


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_every_text_survives(pair: tuple[Tokenizer, Tokenizer, list[int]], text: str) -> None:
    made, cut, _ = pair
    before, after = made.encode(text, add_special_tokens=False), cut.encode(text, add_special_tokens=False)
    assert cut.decode(after.ids, skip_special_tokens=False) == made.decode(before.ids, skip_special_tokens=False)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([word for line in corpus() for word in line.split()]), min_size=1, max_size=6))
def test_what_used_only_tokens_that_stay_is_encoded_as_before(
    pair: tuple[Tokenizer, Tokenizer, list[int]], words: list[str]
) -> None:
    made, cut, kept = pair
    text = " ".join(words)
    before = made.encode(text).ids
    after = [kept[number] for number in cut.encode(text).ids]
    if set(before) <= set(kept):
        assert after == before
    assert after[0] == made.token_to_id("<s>")


def test_text_is_shorter_with_the_tokens_that_it_uses(pair: tuple[Tokenizer, Tokenizer, list[int]]) -> None:
    made, cut, kept = pair
    lengths = [sum(len(one.encode(text).ids) for text in corpus()[50:]) for one in (made, cut)]
    assert len(kept) < 0.85 * made.get_vocab_size()
    assert lengths[0] < lengths[1] < 1.6 * lengths[0]


def test_a_token_that_goes_is_spelt_as_the_smaller_tokenizer_spells_it(
    pair: tuple[Tokenizer, Tokenizer, list[int]],
) -> None:
    made, _, kept = pair
    vocabulary = Vocabulary(wrapped(made))
    pieces = vocabulary.pieces(kept)
    assert pieces.keys() == set(vocabulary.ids.values()) - set(kept)
    words = {number: token for token, number in vocabulary.ids.items()}
    for number, spelt in pieces.items():
        assert set(spelt) <= set(kept)
        plain = "".join(words[piece] for piece in spelt)
        assert plain.replace("##", "") == words[number].replace("##", "") or plain.startswith("<0x")


def test_parts_stay_with_what_is_made_of_them() -> None:
    """A token that only other tokens need is not used by itself, and stays."""
    made = Tokenizer(
        models.BPE({"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "bc": 5}, [("a", "b"), ("ab", "c"), ("b", "c")])
    )
    vocabulary = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=made))
    assert vocabulary.parts == {3: (0, 1), 4: (3, 2), 5: (1, 2)}
    order = vocabulary.in_order({4: 10, 5: 3}, 8)
    assert order == [1, 2, 0, 3, 4, 5, 6, 7]  # characters by use, ab with the ten uses of abc, two rows without a token
    cut = vocabulary.cut([0, 1, 2, 3, 4])
    assert cut.encode("abc").ids == [4] and cut.encode("bc").ids == [1, 2]


def test_the_pair_that_ends_a_token_is_the_one_that_bpe_takes() -> None:
    """`abcd` can be made as ab + cd and as abc + d; BPE merges b and c first, so it ends with abc + d."""
    words = ["a", "b", "c", "d", "bc", "ab", "cd", "abc", "abcd"]
    merges = [("b", "c"), ("a", "b"), ("c", "d"), ("a", "bc"), ("ab", "cd"), ("abc", "d")]
    made = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, merges))
    vocabulary = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=made))
    assert vocabulary.parts[words.index("abcd")] == (words.index("abc"), words.index("d"))
    order = vocabulary.in_order({words.index("abcd"): 1}, len(words))
    assert {words[number] for number in order[:7]} == {"a", "b", "c", "d", "bc", "abc", "abcd"}


def test_what_must_stay_is_told(pair: tuple[Tokenizer, Tokenizer, list[int]]) -> None:
    made, _, kept = pair
    with pytest.raises(UserError, match=r"the token 0 \('<s>'\) must stay"):
        Vocabulary(wrapped(made)).cut(kept[1:])


def test_ids_of_configs() -> None:
    fields = {
        "bos_token_id": 3,
        "eos_token_id": [5, 7],
        "pad_token_id": None,
        "sep_token_id": -1,
        "vocab_size": 9,
        "suppress_tokens": [5],
        "use_token_ids": True,
    }
    assert token_ids(fields) == {3, 5, 7}
    expected = {**fields, "bos_token_id": 0, "eos_token_id": [1, 2], "suppress_tokens": [1]}
    assert renumbered(fields, [3, 5, 7]) == expected
    settings = {"added_tokens_decoder": {"5": {"content": "</s>"}}}
    assert renumbered(settings, [3, 5, 7]) == {"added_tokens_decoder": {"1": {"content": "</s>"}}}
    with pytest.raises(UserError, match="eos_token_id 7 does not stay"):
        renumbered(fields, [3, 5])


def test_slow_tokenizers_are_refused(tmp_path: Path) -> None:
    class Slow(PreTrainedTokenizerFast):
        is_fast = False  # type: ignore[assignment]

    with pytest.raises(UserError, match="can't be cut"):
        Vocabulary(Slow(tokenizer_object=byte_level()))
