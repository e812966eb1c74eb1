"""The selection of tokens: those that text uses most."""

from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.data.token_counts import count_tokens
from llmprune.models.companions import GENERATION
from llmprune.models.loading import load_model_config, load_tokenizer
from llmprune.models.smaller_tokenizer import Vocabulary, renumbered, token_ids
from llmprune.models.source import find_folder
from llmprune.utils.errors import UserError
from llmprune.utils.files import read_json


def most_used(model: str, data: CalibrationConfig, count: int) -> tuple[int, ...]:
    """The tokens that stay, ascending: those that must, then those that text uses most.

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
    kept = tuple(sorted(vocabulary.in_order(count_tokens(data, tokenizer), config.vocab_size)[:count]))
    vocabulary.cut(kept)  # what is wrong with the tokenizer or the configs is told now, not when the model is written
    for one in fields:
        renumbered(one, kept)
    return kept
