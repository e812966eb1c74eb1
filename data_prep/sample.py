"""Text that a model writes itself, as training data for its pruned copy.

No text has a prompt. Something must make texts different from each other and still coherent; there are two recipes:

- The first token is random, the next few are the likeliest ones, and the rest is sampled: "LLM-QAT: Data-Free
  Quantization Aware Training for Large Language Models" (Liu et al., arXiv:2305.17888).
- All tokens are sampled, at a temperature that falls over the first ones: "Self-calibration for Language Model
  Quantization and Pruning" (Williams, Chrysostomou and Aletras, arXiv:2410.17170).
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.shared_job import SharedJob
from llmprune.data.order import keyed_generator
from llmprune.models.loaded import LoadedModel, ModelSource, bos_of, find_model
from llmprune.models.loading import load_model_config
from llmprune.models.number_formats import dtype_for_inference
from llmprune.models.placement import Placement
from llmprune.utils.errors import UserError
from llmprune.utils.files import read_json, write_json, write_text
from llmprune.utils.formats import Device, TeacherFormat
from llmprune.utils.outputs import output_folder, refuse_existing
from llmprune.utils.progress import Progress
from llmprune.utils.ranks import share_cores, use_own_gpu
from llmprune.utils.settings import check_settings, limited

log = logging.getLogger(__name__)

FACTS = "sample.json"
_BATCHES = 4  # batches of a file
_LIKELIEST = 3  # most probable tokens after a random one
_NGRAM, _SHORT, _DISTINCT = 4, 64, 0.5  # see ``repeats``


@dataclass
class SampleConfig:
    """Settings for text that a model writes itself.

    Attributes:
        tokens: number of tokens to sample in all; texts that repeat themselves are left out afterwards.
        length: largest number of tokens of a text.
        first_token: random = each text begins with any token, all with equal probability, and goes on with the three
            most probable ones; sampled = it is sampled like the others.
        temperature: divisor of the logits before sampling.
        temperature_start: divisor of the logits at the first token of a text; None = ``temperature``.
        fall: number of tokens over which the divisor goes from ``temperature_start`` to ``temperature``, linearly.
        batch_size: number of texts that are written at the same time.
        seed: seed of the sampling.
        dtype: dtype of the model's weights: bfloat16 or float32; auto = bfloat16 on GPUs and on processors that have
            it.
        device: cpu or gpu; None = gpu if there is one.
    """

    tokens: int = limited(least=1)
    length: int = limited(512, least=2)
    first_token: Literal["random", "sampled"] = "random"
    temperature: float = limited(0.8, least=0.01)
    temperature_start: float | None = limited(None, least=0.01)
    fall: int = limited(10, least=1)
    batch_size: int = limited(32, least=1)
    seed: int = limited(17, least=0, most=2**32 - 1)
    dtype: TeacherFormat = "auto"
    device: Device | None = None

    @property
    def files(self) -> int:
        """The number of files."""
        return math.ceil(self.tokens / self.length / (_BATCHES * self.batch_size))

    def rows(self, file: int) -> int:
        """The number of rows of tokens, of the longest text's length, that are sampled for a file."""
        each = _BATCHES * self.batch_size
        return min(each, math.ceil(self.tokens / self.length) - file * each)


def sample(model: str, out: Path, config: SampleConfig, *, overwrite: bool = False) -> None:
    """Write text of a model, as JSON lines ``{"text": …}`` in files ``part-00000.jsonl`` and so on.

    Each file has a seed of its own. So processes with the same call share the files (see ``SharedJob``), a stopped job
    goes on, and the text is the same in all cases. (Other devices, or other numbers of threads of a process, round
    differently, and then texts differ.)

    Args:
        model: Hugging Face folder or hub name of the model.
        out: folder to write; ``sample.json`` in it has the settings and the counts.
        config: settings of the text.
        overwrite: whether ``out`` may be replaced.

    Raises:
        UserError: the model can't write texts of this length or has no tokenizer, ``out`` exists, a job with other
            settings was stopped there, or all texts of a file repeat themselves.
    """
    check_settings(config)
    share_cores()
    use_own_gpu()
    placement = Placement(device=config.device)
    placement.check()
    dtype = str(dtype_for_inference(config.dtype, on_gpu=placement.on_gpu)).removeprefix("torch.")
    load_model_config(model)  # which refuses models that are not of a family
    source = find_model(model, replace(placement, dtype=dtype))  # type: ignore[arg-type]
    _check_length(source, config.length)
    facts = {"model": model, **asdict(config), "dtype": dtype}
    del facts["device"]  # a job may go on elsewhere

    def finished() -> bool:
        return not overwrite and (out / FACTS).is_file() and read_json(out / FACTS).get("settings") == facts

    if finished():
        return
    refuse_existing(out, overwrite)
    parts = [f"part-{number:05}" for number in range(config.files)]
    job = SharedJob(out, "sample", facts, parts, finished)
    if job.finished:
        return
    if not job.is_done:
        writer = TextWriter(source.open(), config)
        total, done = (
            sum(config.rows(parts.index(part)) for part in some) * config.length for some in (parts, job.done)
        )
        with Progress(desc="sampling", total=total, initial=done, unit="tokens") as progress:

            def do(part: str) -> dict[str, int]:
                number = parts.index(part)
                texts, counts = writer.file(number, progress.update)
                lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
                write_text(job.folder / f"{part}.jsonl", lines)
                log.info("file %d of %d is written: %d texts", number + 1, len(parts), len(texts))
                return counts

            job.work(do)
    with job.finishing() as mine:
        if mine:
            with output_folder(out, overwrite) as made:
                results = [job.result(part) for part in parts]
                for part in parts:
                    shutil.copy2(job.folder / f"{part}.jsonl", made)  # not moved: this may be stopped
                counts = {name: sum(result[name] for result in results) for name in results[0]}
                write_json(made / FACTS, {"settings": facts, "counts": counts})


def _check_length(source: ModelSource, length: int) -> None:
    if source.limit is not None and length > source.limit:
        raise UserError(f"--length is {length}, but {source.name} takes at most {source.limit} tokens: choose less")
    if bos_of(source.tokenizer) is None:
        raise UserError(f"the tokenizer of {source.name} has neither BOS nor EOS, so no text can begin")


def temperatures(places: Tensor, config: SampleConfig) -> Tensor:
    """The temperature at each place of a text.

    Args:
        places: numbers of tokens before each place, [n].
        config: settings of the text.
    """
    start = config.temperature if config.temperature_start is None else config.temperature_start
    return config.temperature + (start - config.temperature) * (1 - places / config.fall).clamp(min=0)


def repeats(text: list[int]) -> bool:
    """Whether a text of 64 tokens or more goes round in circles: half of its second half's 4-grams are repetitions."""
    half = text[len(text) // 2 :]
    grams = [tuple(half[start : start + _NGRAM]) for start in range(len(half) - _NGRAM + 1)]
    return len(text) >= _SHORT and len(set(grams)) < _DISTINCT * len(grams)


class TextWriter:
    """A model that writes texts."""

    def __init__(self, loaded: LoadedModel, config: SampleConfig) -> None:
        """Use a model with a tokenizer that has BOS or EOS."""
        self._name, self._model, self._tokenizer, self._config = loaded.name, loaded.model, loaded.tokenizer, config
        begin = bos_of(loaded.tokenizer)
        assert begin is not None
        self._begin = begin
        self._ends = ending_tokens(loaded.tokenizer, loaded.model)

    def file(self, number: int, progress: Callable[[int], object]) -> tuple[list[str], dict[str, int]]:
        """Write the texts of a file.

        Args:
            number: number of the file, from 0.
            progress: function that gets the number of new tokens after each step.

        Returns:
            the texts; the number of ``texts``, of their ``tokens`` with an end for each, and of ``repeating`` texts
            that were left out.

        Raises:
            UserError: all texts repeat themselves, or the model's logits are not finite.
        """
        seed = int(keyed_generator(self._config.seed, number).integers(2**63))
        generator = torch.Generator(self._model.device).manual_seed(seed)
        rows, at_once = self._config.rows(number), self._config.batch_size
        found = [
            ids
            for start in range(0, rows, at_once)
            for ids in self._texts(self._write(min(at_once, rows - start), generator, progress))
        ]
        kept = [ids for ids in found if not repeats(ids)]
        if not kept:
            raise UserError(f"all that {self._name} writes repeats itself: raise --temperature")
        decoded = (self._tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in kept)
        texts = [text for text in (each.strip("\ufffd") for each in decoded) if text.strip()]  # \ufffd: a cut character
        tokens = sum(len(ids) + 1 for ids in kept)
        return texts, {"texts": len(texts), "tokens": tokens, "repeating": len(found) - len(kept)}

    @torch.inference_mode()
    def _write(self, rows: int, generator: torch.Generator, progress: Callable[[int], object]) -> Tensor:
        """Sample rows of tokens, [rows, length].

        Where a text ends, the next one begins in the same row: it sees nothing before its beginning, and its positions
        count from there. So no row waits for others.
        """
        device = self._model.device
        ends = self._ends.to(device)
        last = torch.full((rows,), self._begin, device=device)
        places = torch.zeros_like(last)  # number of sampled tokens of the row's present text
        seen = torch.ones(rows, 0, dtype=torch.long, device=device)
        cache, written, random = None, [], self._config.first_token == "random"
        for _ in range(self._config.length):
            seen = torch.cat([seen, torch.ones_like(last)[:, None]], dim=1)
            output = self._model(
                input_ids=last[:, None],
                attention_mask=seen,
                position_ids=places[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            logits = output.logits[:, -1].float()
            first = (places == 0)[:, None]
            if random:
                logits = logits.masked_fill(first, 0)
            logits = logits.masked_fill(first & ends, -torch.inf)  # no text is empty
            new = self._draw(logits / temperatures(places, self._config)[:, None], generator)
            if random:
                new = torch.where((places > 0) & (places <= _LIKELIEST), logits.argmax(-1), new)
            written.append(new)
            ended = ends[new]
            seen = seen.masked_fill(ended[:, None], 0)
            places = torch.where(ended, 0, places + 1)
            last = torch.where(ended, self._begin, new)
            progress(rows)
        return torch.stack(written, dim=1)

    def _draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Sample a token for each row, [rows], from logits, [rows, vocabulary]."""
        try:
            return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise UserError(f"the logits of {self._name} are no numbers: its weights are broken") from None

    def _texts(self, rows: Tensor) -> Iterator[list[int]]:
        """The texts in rows of tokens, without their ends; the last text of a row may be cut."""
        for row in rows.tolist():
            text: list[int] = []
            for token in row:
                if self._ends[token]:
                    yield text
                    text = []
                else:
                    text.append(token)
            if text:
                yield text


def ending_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Tensor:
    """Which tokens end a text, [vocabulary]: special ones, and those that the tokenizer does not have."""
    ends = torch.ones(model.config.vocab_size, dtype=torch.bool)
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    ends[[i for i in tokenizer.get_vocab().values() if i < len(ends) and i not in special]] = False
    return ends
