"""What the whole way came to, as numbers and as text."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.evaluation.continuations import read_continuations
from llmprune.evaluation.losses import Losses
from llmprune.utils.files import read_json

HELD_OUT_TEXT = "held-out text"
FILES = {"source": "source", "pruned": "pruned", "recovered": "model"}  # of continuations, by the model's name


def losses_entry(losses: Losses, length: int) -> dict[str, Any]:
    """Held-out losses as results.json keeps perplexities: of all domains, and of each.

    Args:
        losses: mean losses, in nats per token.
        length: number of tokens of a sample.
    """
    named = {HELD_OUT_TEXT: losses.loss, **{f"{HELD_OUT_TEXT}/{name}": loss for name, loss in losses.domains.items()}}
    return {name: {"segment": length, "stride": length, "bos_none": math.exp(loss)} for name, loss in named.items()}


@dataclass(frozen=True)
class Measured:
    """What is known of one model.

    Attributes:
        name: source, pruned or recovered.
        parameters: number of parameters.
        bytes: size of the weights in memory.
        peak_memory: peak memory while it generates, in bytes; None = it never had enough memory.
        perplexity: perplexity of held-out text, by domain; the key "" is all of it.
        tokens_per_s: generated tokens per second, by batch size.
        faster: how many times as fast as the source it generates, by batch size: the median over runs in turns.
    """

    name: str
    parameters: int
    bytes: int
    peak_memory: int | None
    perplexity: dict[str, float]
    tokens_per_s: dict[int, float]
    faster: dict[int, float]


@dataclass(frozen=True)
class Outcome:
    """The result of the whole way.

    Attributes:
        folder: folder of all results; ``folder``/model is the smaller model.
        models: what was measured of the source, the pruned and the recovered model, in this order.
        continuations: what each model wrote, by prompt and by the model's name.
        seconds: seconds of each step.
    """

    folder: Path
    models: list[Measured]
    continuations: dict[str, dict[str, str]]
    seconds: dict[str, float]

    @classmethod
    def of(cls, folder: Path, models: dict[str, str], seconds: dict[str, float], shown: Path) -> "Outcome":
        """Read the outcome from its files.

        Args:
            folder: folder of the files.
            models: names of the models, by their paths in the files.
            seconds: seconds of each step.
            shown: the folder as the user wrote it.
        """
        results, speeds = (read_json(folder / f"{name}.json")["models"] for name in ("results", "speed"))
        measured = []
        for path, name in models.items():
            found, speed = results[path], speeds[path]
            perplexity = {
                text.removeprefix(HELD_OUT_TEXT).lstrip("/"): entry["bos_none"]
                for text, entry in found["perplexity"].items()
            }
            timed = [entry for entry in speed["generation"] if "tokens_per_s" in entry]
            rates = {entry["batch"]: entry["tokens_per_s"] for entry in timed}
            faster = {entry["batch"]: entry["speedup"]["p50"] for entry in timed if "speedup" in entry}
            measured.append(
                Measured(
                    name,
                    found["parameters"],
                    speed["weights_bytes"],
                    speed["peak_memory_bytes"],
                    perplexity,
                    rates,
                    faster,
                )
            )
        written: dict[str, dict[str, str]] = {}
        for name in models.values():
            for record in read_continuations(folder / "continuations" / f"{FILES[name]}.jsonl"):
                written.setdefault(record["prompt"], {})[name] = record["output"]
        return cls(shown, measured, written, seconds)

    @property
    def won_back(self) -> float | None:
        """The share of the held-out nats lost by the cut that recovery won back; None = none were lost."""
        source, cut, recovered = (math.log(one.perplexity[""]) for one in self.models)
        return None if cut <= source else (cut - recovered) / (cut - source)

    @property
    def faster(self) -> dict[int, float]:
        """How many times as fast as the source the recovered model generates, by batch size."""
        return self.models[-1].faster

    def facts(self) -> dict[str, Any]:
        """The outcome, for JSON."""
        return {
            "model": str(self.folder / "model"),
            "models": {one.name: vars(one) for one in self.models},
            "won_back": self.won_back,
            "faster": self.faster,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        domains = [name for name in self.models[0].perplexity if name]
        batches = list(self.models[0].tokens_per_s)
        head = ["", "parameters", "MB", "peak MB", "perplexity", *domains, *(f"tokens/s ×{batch}" for batch in batches)]
        rows = [
            [
                one.name,
                f"{one.parameters:,}",
                f"{one.bytes / 1e6:,.0f}",
                "" if one.peak_memory is None else f"{one.peak_memory / 1e6:,.0f}",
                *(f"{one.perplexity[name]:.2f}" for name in ("", *domains)),
                *(f"{one.tokens_per_s[batch]:.1f}" if batch in one.tokens_per_s else "" for batch in batches),
            ]
            for one in self.models
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)
        ]
        won, faster = self.won_back, " and ".join(f"{ratio:.2f}" for ratio in self.faster.values())
        if won is not None:
            lines.append(f"\nRecovery won back {won:.0%} of the nats per token that the cut lost on held-out text.")
        if sizes := " and ".join(map(str, self.faster)):
            lines.append(f"The recovered model generates {faster} times as fast as the source (batch {sizes}).")
        for prompt, outputs in self.continuations.items():
            lines.append(f"\n{prompt} …")
            lines += [f"  {name}: {' '.join(text.split())}" for name, text in outputs.items()]
        lines.append(f"\nThe smaller model: {self.folder}/model; everything in pictures: {self.folder}/report.html")
        return "\n".join(lines)
