"""The answer that a report begins with: the final model compared with its source, in one line."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.reporting.collect import Material, source_of
from llmprune.reporting.numbers import memory, shown


@dataclass(frozen=True)
class Part:
    """One part of the headline.

    Attributes:
        text: the part with signs, as it is seen.
        spoken: the part in words, as a screen reader reads it.
        basis: what was measured; empty = that is clear.
    """

    text: str
    spoken: str
    basis: str = ""


@dataclass(frozen=True)
class Headline:
    """The headline.

    Attributes:
        text: all parts with signs, as they are seen.
        spoken: all parts in words.
        basis: which models are compared, and what was measured.
    """

    text: str
    spoken: str
    basis: str


def headline(material: Material) -> Headline | None:
    """Compare the source with the last model of the results that is smaller, as far as the files have figures.

    Returns:
        The headline; None if no results and no speeds have a source and a smaller model.
    """
    pairs = material.made({**material.results, **material.speeds}, lambda _, content: _pair(content["models"]))
    if not pairs:
        return None
    source, final, size = pairs[0]
    quality = material.made(material.results, lambda _, results: _quality(results["models"], source, final))[:1]
    speeds = material.made(material.speeds, lambda _, speed: _speed(speed, source, final))[:1]
    as_fast = [part for parts in speeds for part in parts[:1]]
    less = [part for parts in speeds for part in parts[1:]]
    parts = [size, *as_fast, *quality, *less]
    text = ", ".join(part.text.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)  # lines break between parts
    spoken = ", ".join(part.spoken for part in parts)
    bases = [part.basis for part in (*quality, *as_fast) if part.basis]
    compared = f"{material.label(final)} compared with {material.label(source)}"
    return Headline(text[0].upper() + text[1:], spoken[0].upper() + spoken[1:], "; ".join([compared, *bases]))


def first_generation(entry: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The measurement of generation at the smallest batch, for a model in a speed.json; None = there is none."""
    measured = [found for found in entry["generation"] if "tokens_per_s" in found]
    return min(measured, key=lambda found: found["batch"]) if measured else None


def _pair(models: Mapping[str, Any]) -> list[tuple[str, str, Part]]:
    source = source_of(models)
    if source is None:
        return []
    whole = models[source]["parameters"]
    final = [name for name, entry in models.items() if entry["parameters"] < whole][-1]
    percent = 100 * (1 - models[final]["parameters"] / whole)
    number = f"{percent:.0f}" if percent >= 10 else f"{percent:.2g}"
    return [(source, final, Part(f"parameters −{number} %", f"{number} percent fewer parameters"))]


def _quality(models: Mapping[str, Any], source: str, final: str) -> list[Part]:
    """The perplexity of the first text, in its first BOS mode."""
    texts = [models[name].get("perplexity", {}) if name in models else {} for name in (source, final)]
    for text in texts[0]:
        for mode in texts[0][text]:
            if mode.startswith("bos_") and mode in texts[1].get(text, {}):
                before, after = (_perplexity(found[text][mode]) for found in texts)
                name = Path(text).name
                return [
                    Part(
                        f"perplexity {before} → {after}",
                        f"perplexity from {before} to {after}",
                        f"perplexity of {name}",
                    )
                ]
    return []


def _perplexity(value: float | None) -> str:
    return shown(value, 4 if value is not None and math.isfinite(value) and value >= 1000 else 3)


def _speed(speed: Mapping[str, Any], source: str, final: str) -> list[list[Part]]:
    """The speed and the memory of generation; ratios in a speed.json are relative to its first model."""
    models = speed["models"]
    if next(iter(models)) != source or final not in models:
        return []
    before, after = first_generation(models[source]), first_generation(models[final])
    if before is None or after is None or "speedup" not in after:
        return []
    ratio = after["speedup"]["p50"]
    number = f"{ratio:.2f}" if ratio < 1 else f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"
    work = f"{after['output_tokens']} tokens after {after['prompt_tokens']}, batch {after['batch']}"
    basis = f"generation of {work} ({speed['device']}, {speed['dtype']})"
    parts = [Part(f"{number}× as fast", f"{number} times as fast", basis)]
    saved = before["peak_memory_bytes"] - after["peak_memory_bytes"]
    if saved:
        words = f"{memory(abs(saved))} {'less' if saved > 0 else 'more'} memory"
        spoken = words.replace("MB", "megabytes").replace("GB", "gigabytes")
        parts.append(Part(words, spoken))
    return [parts]
