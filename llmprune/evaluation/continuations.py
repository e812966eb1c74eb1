"""Continuations of prompts: generate them, and score their similarity to references."""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from rapidfuzz.distance import Levenshtein
from rouge_score.rouge_scorer import RougeScorer
from transformers import PretrainedConfig, PreTrainedTokenizerBase, set_seed

from llmprune.evaluation.settings import GenerationConfig
from llmprune.models.loaded import LoadedModel, check_vocabulary
from llmprune.models.source import longest_input
from llmprune.utils.errors import UserError, first_line
from llmprune.utils.files import JSON_LIMIT, parse_json, read_bytes, write_text
from llmprune.utils.progress import Progress

ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Prompt:
    """A text to continue.

    Attributes:
        prompt: text.
        reference: original continuation of the text; None = not known.
        chat: whether the text is a user's message, which the model's chat template surrounds.
    """

    prompt: str
    reference: str | None = None
    chat: bool = False


def read_prompts(path: Path | str, share: float | None = None) -> list[Prompt]:
    """Read the prompts in a file: text with one prompt per line, or JSON lines {"prompt", "reference"}.

    Args:
        path: path of the file.
        share: share of each line's words that is the prompt; the remaining words, at least one, are its reference. In a
            JSON record, the words are those of its field "text". Lines of one word are skipped. None = no division.

    Raises:
        UserError: the file can't be read or contains no prompts.
    """
    if share is not None and not 0 < share < 1:
        raise UserError(f"the share of a text that is the prompt must lie between 0 and 1; got {share}")
    path = Path(path)
    prompts = []
    for number, line in _lines(path):
        record = _record(path, number, line, "prompt" if share is None else "text")
        if share is None:
            prompts.append(Prompt(record["prompt"], record.get("reference")))
        else:
            words = record["text"].split(" ")
            if len(words) < 2:
                continue
            cut = min(max(round(share * len(words)), 1), len(words) - 1)
            prompts.append(Prompt(" ".join(words[:cut]), " " + " ".join(words[cut:])))
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return prompts


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank, with their line numbers."""
    try:
        lines = read_bytes(path, JSON_LIMIT).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} can't be read: {error}") from None
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _record(path: Path, number: int, line: str, name: str) -> dict[str, Any]:
    if path.suffix not in (".jsonl", ".ndjson"):
        return {name: line}
    try:
        record = parse_json(line, finite=False)
    except ValueError as error:
        raise UserError(f"{path}:{number} is no JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get(name), str):
        raise UserError(f"{path}:{number} has no field '{name}' with a text")
    if not isinstance(record.get("reference"), str | None):
        raise UserError(f"{path}:{number}: its reference is no text")
    return record


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, model: PretrainedConfig
) -> list[list[int]]:
    """Tokenise every prompt.

    Args:
        prompts: prompts to tokenise.
        tokenizer: tokenizer of the model.
        max_new_tokens: largest number of tokens of a continuation.
        model: Hugging Face config of the model that reads the prompts.

    Raises:
        UserError: a prompt has no tokens, has tokens outside the model's vocabulary, leaves no room for an output, or
            needs a chat template that the tokenizer does not have.
    """
    limit = longest_input(model)
    encoded = [_tokens(prompt, tokenizer) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        check_vocabulary(max(ids, default=0), model, f"the prompt '{prompt.prompt[:40]}'")
        if not ids or (limit is not None and len(ids) + max_new_tokens > limit):
            raise UserError(
                f"the prompt '{prompt.prompt[:40]}' has {len(ids)} tokens: with {max_new_tokens} new ones it must have "
                f"between 1 and {limit} together"
            )
    return encoded


def _tokens(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not prompt.chat:
        return list(tokenizer(prompt.prompt)["input_ids"])
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: give the prompt as plain text")
    messages = [{"role": "user", "content": prompt.prompt}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program, which may end in any way
        raise UserError(f"the tokenizer's chat template fails: {first_line(error)}") from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template has written them


@torch.inference_mode()
def write_continuations(
    loaded: LoadedModel, prompts: Sequence[Prompt], config: GenerationConfig
) -> list[dict[str, Any]]:
    """Generate continuations of every prompt with a model.

    The same model, prompts and settings, including the batch size, give the same text again.

    Returns:
        Records {"prompt", "output", "reference"}; the ``per_prompt`` records of a prompt follow each other.

    Raises:
        UserError: a prompt has no tokens or leaves no room for an output, or the model is broken.
    """
    config.check()
    model, tokenizer = loaded.model, loaded.tokenizer
    encoded = encode_prompts(prompts, tokenizer, config.max_new_tokens, model.config)
    generation = loaded.generation(**config.settings)
    pad = generation["generation_config"].pad_token_id
    set_seed(config.seed)
    outputs: list[str] = []
    with Progress(desc="generating", total=len(prompts) * config.per_prompt, unit="continuations") as progress:
        for first in range(0, len(prompts), config.batch_size):
            ids = encoded[first : first + config.batch_size]
            longest = max(map(len, ids))
            inputs = torch.tensor([[pad] * (longest - len(i)) + i for i in ids], device=model.device)
            mask = torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i in ids], device=model.device)
            try:
                written = model.generate(input_ids=inputs, attention_mask=mask, **generation)
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise UserError(f"the logits of {loaded.name} are no numbers: its weights are broken") from None
            outputs += tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
            progress.update(len(written))
    repeated = [prompt for prompt in prompts for _ in range(config.per_prompt)]
    return [
        {"prompt": prompt.prompt, "output": output, "reference": prompt.reference}
        for prompt, output in zip(repeated, outputs, strict=True)
    ]


def save_continuations(records: Sequence[dict[str, Any]], path: Path | str) -> None:
    """Write records as JSON lines."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_continuations(path: Path | str) -> list[dict[str, Any]]:
    """Read the records that ``llmprune generate`` has written.

    Raises:
        UserError: the file can't be read.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".ndjson"):
        raise UserError(f"{path} must be JSON lines with prompt, output and reference (.jsonl)")
    return [_record(path, number, line, "output") for number, line in _lines(path)]


def continuation_scores(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Score the similarity of outputs to their references, in percent.

    Returns:
        BLEU and chrF over the whole corpus (sacrebleu), ROUGE-1, -2 and -L (F measure, mean over outputs), edit
        similarity (1 − Levenshtein distance / length of the longer text, mean over outputs), and the number of outputs.

    Raises:
        UserError: no record has a reference.
    """
    pairs = [(r["output"], r["reference"]) for r in records if r.get("reference")]
    if not pairs:
        raise UserError("the continuations have no references to be scored against")
    outputs, references = [output for output, _ in pairs], [reference for _, reference in pairs]
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    rouge = [scorer.score(reference, output) for output, reference in pairs]
    return {
        "bleu": sacrebleu.corpus_bleu(outputs, [references]).score,
        "chrf": sacrebleu.corpus_chrf(outputs, [references]).score,
        **{name: 100 * statistics.fmean(found[name].fmeasure for found in rouge) for name in ROUGE},
        "edit_similarity": 100 * statistics.fmean(Levenshtein.normalized_similarity(o, r) for o, r in pairs),
        "outputs": len(pairs),
    }
