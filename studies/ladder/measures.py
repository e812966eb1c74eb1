"""What is measured of each model of the ladder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from work import Work

from llmprune.data.prepared import PreparedData
from llmprune.evaluation.evaluate import evaluate
from llmprune.evaluation.losses import evaluate_losses
from llmprune.evaluation.settings import EvaluationConfig, PerplexityConfig, TasksConfig
from llmprune.measurement.measure import MeasureConfig, measure
from llmprune.models.loaded import open_model
from llmprune.models.loading import load_tokenizer
from llmprune.models.placement import Placement
from llmprune.models.retold import Spelling

HELD_OUT = 8  # samples of each domain
WIKITEXT = {512: 32_768, 2048: 16_384}  # tokens of WikiText-2, by the length of its segments
SPEED = MeasureConfig((1, 8), output_tokens=(32,), warmups=1, repeats=5)
TASKS = ("piqa_local", "arc_easy_local", "openbookqa_local")


def perplexities(model: Path, work: Work, wikitext: str, kept: tuple[int, ...] | None) -> dict[str, Any]:
    """Perplexity of the start of WikiText-2, and held-out losses by domain; all per token of the source."""
    found: dict[str, Any] = {}
    for segment, tokens in WIKITEXT.items():
        path, count = work.text(wikitext, tokens)
        (entry,) = evaluate([str(model)], EvaluationConfig([str(path)], PerplexityConfig(segment)), Placement())[
            "models"
        ].values()
        (text,) = entry["perplexity"].values()
        bits = text["bits_per_byte"]["bos_none"] * path.stat().st_size
        found[f"wikitext_{segment}"] = 2 ** (bits / count)
        found[f"bits_per_byte_{segment}"] = text["bits_per_byte"]["bos_none"]
        found["parameters"] = entry["parameters"]
    losses = evaluate_losses(
        open_model(str(model), Placement()).model,
        PreparedData(work.data),
        samples_per_domain=HELD_OUT,
        spelling=None if kept is None else Spelling.of(load_tokenizer(work.model), kept),
    )
    return {**found, "held_out": losses.loss, "domains": losses.domains}


def tasks(model: Path, folder: str, questions: int) -> dict[str, Any]:
    """Accuracies of the first questions of each task, with standard errors."""
    config = EvaluationConfig(tasks=TasksConfig(TASKS, limit=questions, include_path=folder))
    (entry,) = evaluate([str(model)], config, Placement())["models"].values()
    return {"questions": questions, "tasks": entry["tasks"]}


def speeds(models: Sequence[Path]) -> list[dict[str, Any]]:
    """How many times as fast as the first each of the others generates, in turns, and its peak memory."""
    found, _ = measure([str(model) for model in models], SPEED, Placement())
    return [
        {
            "faster": {str(entry["batch"]): entry["speedup"]["p50"] for entry in facts["generation"]},
            "peak_memory": facts["peak_memory_bytes"],
        }
        for name, facts in found["models"].items()
        if name != str(models[0])
    ]
