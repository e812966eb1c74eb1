"""How often each token occurs in text."""

from collections import Counter
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.data.dataset import MixedDataset
from llmprune.data.format import TRAIN, tokenizer_fingerprint
from llmprune.data.prepared import PreparedData
from llmprune.data.records import find_inputs
from llmprune.data.sources import Document, Fields, documents
from llmprune.utils.errors import UserError

MOST = 10_000_000  # tokens that are counted


def count_tokens(config: CalibrationConfig, tokenizer: PreTrainedTokenizerBase, most: int = MOST) -> Counter[int]:
    """The number of uses of every token in calibration text, of which not only the calibration samples are read.

    Args:
        config: settings of the calibration text: path, field and seed; prepared data are read in the order of their
            training, text in the order of its files.
        tokenizer: tokenizer of the text.
        most: number of tokens after which counting ends.

    Raises:
        UserError: there is no text, or it can't be read.
    """
    if config.path is None:
        raise UserError(
            "tokens stay by their use in calibration text: score again with --data, by a criterion that reads it"
        )
    if (Path(config.path) / "manifest.json").is_file():
        data = PreparedData(config.path)
        if tokenizer_fingerprint(tokenizer) != data.manifest.tokenizer:
            raise UserError(f"the model's tokenizer did not make the data in {config.path}: prepare the data with it")
        return _in_prepared(data, config.seed, most)
    found: Counter[int] = Counter()
    counted = 0
    for document in documents(find_inputs([config.path]), Fields(config.text_field)):
        if not isinstance(document, Document):
            raise UserError(f"{document.place} can't be read: {document.reason}")
        tokens = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        found.update(tokens)
        counted += len(tokens)
        if counted >= most:
            break
    return found


def _in_prepared(data: PreparedData, seed: int, most: int) -> Counter[int]:
    manifest = data.manifest
    samples = sum(manifest.samples(domain, TRAIN) for domain in manifest.domains)
    stream = MixedDataset(data, global_batch_size=1, weights=None, seed=seed)
    found: Counter[int] = Counter()
    for sample in islice(stream, min(samples, -(-most // manifest.sequence_length))):
        found.update(sample["input_ids"].tolist())
    return found
