"""The selection of tokens: those that text uses most."""

from collections.abc import Mapping

from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.data.token_counts import count_tokens
from llmprune.models.companions import GENERATION
from llmprune.models.loading import load_model_config, load_tokenizer
from llmprune.models.smaller_tokenizer import Vocabulary, renumbered, token_ids
from llmprune.models.source import find_folder
from llmprune.utils.errors import UserError
from llmprune.utils.files import read_json

IN_GENERAL = 0.3  # tokens of text in general for each token of the text that is counted


def expected_uses(counts: Mapping[int, int], rows: int, weight: float = IN_GENERAL) -> dict[int, float]:
    """The uses of tokens in the text at hand, and in some text in general, which uses other words too.

    Tokenizers number their tokens by their use in the text that they were made from, roughly; so the token i is
    expected with a probability proportional to 1 / (i + 1) (Zipf's law).

    Args:
        counts: uses of every token in the text at hand; absent = none.
        rows: number of tokens.
        weight: number of tokens of text in general for each token of the text at hand.
    """
    harmonic = sum(1 / (number + 1) for number in range(rows))
    share = weight * sum(counts.values()) / harmonic
    return {number: counts.get(number, 0) + share / (number + 1) for number in range(rows)}


def most_used(model: str, data: CalibrationConfig, count: int) -> tuple[int, ...]:
    """The tokens that stay, ascending: those that must, then those with the most ``expected_uses``.

    Args:
        model: folder or hub name of the model.
        data: settings of the calibration text in which uses are counted.
        count: number of tokens that stay.

    Raises:
        UserError: there is no text, more tokens must stay, or the tokenizer can't be made smaller.
    """
    source = find_folder(model)
    tokenizer, config = load_tokenizer(source.path), load_model_config(source)
    fields = [config.to_dict()]
    if (generation := source.path / GENERATION).is_file():
        fields.append(read_json(generation))
    vocabulary = Vocabulary(tokenizer, {number for one in fields for number in token_ids(one)})
    beyond = sorted((number, token) for token, number in vocabulary.ids.items() if number >= config.vocab_size)
    if beyond:
        raise UserError(f"the model has no row for its tokenizer's token {beyond[0][1]!r} ({beyond[0][0]})")
    if count < (required := len(vocabulary.required)):
        raise UserError(
            f"a vocabulary of {count} is too small: {required} tokens (bytes, special tokens, numbers) must stay"
        )
    uses = expected_uses(count_tokens(data, tokenizer), config.vocab_size)
    kept = tuple(sorted(vocabulary.in_order(uses, config.vocab_size)[:count]))
    vocabulary.cut(kept)  # what is wrong with the tokenizer or the configs is told now, not when the model is written
    for one in fields:
        renumbered(one, kept)
    return kept
