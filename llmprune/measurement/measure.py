"""Speed and memory of one or several models, run in turns so that disturbances affect all models alike."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmprune.measurement.monitor import UtilisationWatch, peak_memory
from llmprune.models.flops import macs
from llmprune.models.loaded import LoadedModel, find_model
from llmprune.models.placement import Placement
from llmprune.utils.errors import UserError
from llmprune.utils.progress import Progress

log = logging.getLogger(__name__)

SCHEMA = 1


@dataclass(frozen=True)
class MeasureConfig:
    """The settings of a measurement.

    Attributes:
        batch_sizes: numbers of sequences at a time.
        prompt_tokens: numbers of tokens in the prompt.
        output_tokens: numbers of tokens to generate, always the full number; empty = prefill only.
        warmups: number of untimed runs before the timed ones.
        repeats: number of timed runs.
        seed: seed of the random prompts.
        uncached: time generation without a key/value cache as well.
    """

    batch_sizes: Sequence[int] = (1,)
    prompt_tokens: Sequence[int] = (16,)
    output_tokens: Sequence[int] = (128,)
    warmups: int = 10
    repeats: int = 20
    seed: int = 17
    uncached: bool = False

    def check(self) -> None:
        """Raise ``UserError`` for settings that are not possible."""
        for name in ("batch_sizes", "prompt_tokens", "output_tokens"):
            if any(value < 1 for value in getattr(self, name)):
                raise UserError(f"{name.replace('_', ' ')} must be positive; got {getattr(self, name)}")
        if not self.batch_sizes or not self.prompt_tokens:
            raise UserError("name at least one batch size and one prompt length")
        if self.warmups < 0 or self.repeats < 1:
            raise UserError(f"{self.warmups} warm-ups and {self.repeats} repeats: at least 0 and 1 are needed")


@dataclass(frozen=True)
class Setting:
    """One setting to time: generation, or prefill if ``output`` is None."""

    batch: int
    prompt: int
    output: int | None
    cached: bool = True

    @property
    def kind(self) -> str:
        """The setting's section in speed.json."""
        return "prefill" if self.output is None else "generation"

    def describe(self) -> dict[str, int]:
        """The setting's sizes, as in speed.json."""
        sizes = {"batch": self.batch, "prompt_tokens": self.prompt}
        if self.output is not None:
            sizes["output_tokens"] = self.output
        return sizes if self.cached else {**sizes, "cached": False}

    @property
    def tokens(self) -> int:
        """The number of tokens that a run generates (or, in prefill, reads)."""
        return self.batch * (self.prompt if self.output is None else self.output)


def measure(
    models: Sequence[str], config: MeasureConfig, placement: Placement, *, progress: bool = True
) -> tuple[dict[str, Any], UtilisationWatch]:
    """Measure several models in turns and compare them.

    Args:
        models: folders or hub names of the models; ratios are relative to the first.
        config: settings of the measurement.
        placement: number format, device and attention of the models; all are in memory at the same time.
        progress: whether a progress bar is shown.

    Returns:
        The contents of speed.json, and the device's utilisation.

    Raises:
        UserError: a setting is impossible, or a model can't be opened.
    """
    config.check()
    for name in models:
        if list(models).count(name) > 1:
            raise UserError(f"the model {name} is named twice")
    found_models = [find_model(name, placement) for name in models]
    settings = [
        Setting(batch, prompt, output, cached)
        for output in (None, *config.output_tokens)
        for cached in ((True, False) if config.uncached and output is not None else (True,))
        for prompt in config.prompt_tokens
        for batch in config.batch_sizes
    ]
    longest = max(s.prompt + (s.output or 0) for s in settings)
    for one in found_models:
        if one.limit is not None and longest > one.limit:
            raise UserError(f"prompt and output have {longest} tokens together; {one.name} takes {one.limit}")
    loaded = [one.open() for one in found_models]
    found: dict[str, Any] = {one.name: size(one, max(config.prompt_tokens)) for one in loaded}
    watch = UtilisationWatch(loaded[0].model.device)
    runs = len(settings) * len(loaded) * (1 + config.warmups + config.repeats)
    with watch.running(), Progress(desc="measuring", total=runs, unit="runs", disable=not progress) as bar:
        for setting in settings:
            for name, entry in _measure_setting(loaded, setting, config, watch, bar.update).items():
                found[name][setting.kind].append(setting.describe() | entry)
    for entry in found.values():
        peaks = [e["peak_memory_bytes"] for kind in ("generation", "prefill") for e in entry[kind] if "latency_s" in e]
        entry["peak_memory_bytes"] = max(peaks, default=None)
    device = loaded[0].model.device.type
    return {
        "schema": SCHEMA,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "dtype": str(loaded[0].model.dtype).removeprefix("torch."),
        "warmups": config.warmups,
        "repeats": config.repeats,
        "models": found,
    }, watch


def size(loaded: LoadedModel, context: int) -> dict[str, Any]:
    """The numbers of parameters, and of operations for one token after ``context`` others."""
    model = loaded.model
    total = loaded.parameters
    embeddings = {id(p): p.numel() for p in model.get_input_embeddings().parameters()}
    if (output := model.get_output_embeddings()) is not None:
        embeddings |= {id(p): p.numel() for p in output.parameters()}
    entry: dict[str, Any] = {
        "parameters": total,
        "parameters_without_embeddings": total - sum(embeddings.values()),
        "weights_bytes": weights_bytes(loaded),
        "macs_per_token": None,
        "context": context,
        "generation": [],
        "prefill": [],
    }
    try:
        found = macs(model.config, 1, context)
    except UserError:
        return entry  # no formula for this architecture
    return {**entry, "macs_per_token": found.total, "flops_per_token": found.forward}


def weights_bytes(loaded: LoadedModel) -> int:
    """The bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*loaded.model.parameters(), *loaded.model.buffers()))


def _measure_setting(
    loaded: Sequence[LoadedModel],
    setting: Setting,
    config: MeasureConfig,
    watch: UtilisationWatch,
    told: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Time one setting of every model, in turns; ``told`` is called for every run."""
    runs = {one.name: _runner(one, setting, config.seed) for one in loaded}
    entries: dict[str, dict[str, Any]] = {one.name: {} for one in loaded}
    times: dict[str, list[float]] = {one.name: [] for one in loaded}
    for one in loaded:
        device = one.model.device
        fits = _timed(runs[one.name], device) is not None  # a first run, so that permanent allocations already exist
        with peak_memory(device) as peak:
            fits = fits and _timed(runs[one.name], device) is not None
        entries[one.name] = (
            {"peak_memory_bytes": weights_bytes(one) + peak.added, "process_peak_bytes": peak.process}
            if fits
            else {"out_of_memory": True}
        )
        told()
    for number in range(config.warmups + config.repeats):
        for one in loaded:
            told()
            if "out_of_memory" in entries[one.name]:
                continue
            watch.doing = f"{setting.kind} {one.name} batch {setting.batch}"
            seconds = _timed(runs[one.name], one.model.device)
            if seconds is None:  # another process took the memory meanwhile
                entries[one.name], times[one.name] = {"out_of_memory": True}, []
            elif number >= config.warmups:
                times[one.name].append(seconds)
    first = times[loaded[0].name]
    for one in loaded:
        if seconds_of := times[one.name]:
            entries[one.name] |= {"latency_s": spread(seconds_of), "tokens_per_s": setting.tokens / np.mean(seconds_of)}
            if one is not loaded[0] and first:
                entries[one.name]["speedup"] = _ratios(first, seconds_of)
        took = f"{np.mean(times[one.name]):.4f} s" if times[one.name] else "out of memory"
        sizes = ", ".join(f"{name} {value}" for name, value in setting.describe().items())
        log.info("%s of %s, %s: %s", setting.kind, one.name, sizes, took)
    return entries


def _runner(loaded: LoadedModel, setting: Setting, seed: int) -> Callable[[], Tensor]:
    model = loaded.model

    @cache  # made by the first run, which is not timed and may run out of memory
    def prompts() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(model.config.vocab_size, (setting.batch, setting.prompt), generator=generator)
        tokens = tokens.to(model.device)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    length = {"min_new_tokens": setting.output, "max_new_tokens": setting.output}
    generation = (
        {} if setting.output is None else loaded.generation(do_sample=False, use_cache=setting.cached, **length)
    )
    last_alone = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}

    @torch.inference_mode()
    def prefill() -> Tensor:
        return model(**prompts(), use_cache=True, **last_alone).logits

    @torch.inference_mode()
    def generate() -> Tensor:
        written = model.generate(**prompts(), **generation)
        assert written.shape[1] == setting.prompt + (setting.output or 0)
        return written

    return prefill if setting.output is None else generate


def _timed(run: Callable[[], Tensor], device: torch.device) -> float | None:
    """The seconds that a run takes; None if memory runs out."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation (of the sample) and percentiles."""
    percentiles = {f"p{p}": float(np.percentile(values, p)) for p in (5, 50, 95)}
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "std": deviation, **percentiles}


def _ratios(first: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """The speed relative to the first model, from pairs of successive runs."""
    ratios = np.divide(first, other)
    return {
        "p50": float(np.median(ratios)),
        "p10": float(np.percentile(ratios, 10)),
        "p90": float(np.percentile(ratios, 90)),
    }
