"""The folder of a job that prunes and recovers a model, as small files with known figures."""

import json
import shutil
from pathlib import Path
from typing import Any

from llmprune.conversion.commands import apply
from llmprune.models.families import family_of
from llmprune.models.loading import load_model_config
from llmprune.models.stored_weights import StoredWeights, fingerprint
from llmprune.plans.plan import KeptBlock, Plan
from llmprune.pruning.scoring.scores import Scores

PARAMETERS = {"source": 2_000_000, "pruned": 1_500_000, "model": 1_500_000}
PERPLEXITY = {"source": 12.1449, "pruned": 17.25, "model": 13.0}
TOKENS_PER_BATCH = 4096


def make(folder: Path, model: Path, *, hub: str | None = None) -> Path:
    """Write the folder: ``model`` is the source, or the hub name ``hub`` stands for it."""
    folder.mkdir()
    config, weights = load_model_config(model), StoredWeights(model)
    shape = family_of(config).shape(config)
    plan = Plan("llama", fingerprint(weights, config), shape, tuple(KeptBlock.whole(i) for i in (0, 2, 3)))
    plan.save(folder / "plan.json")
    write(folder / "config.yaml", {"job": "prune"})
    if hub is None:
        shutil.copytree(model, folder / "source")
    for name in ("pruned", "model"):
        apply(model, plan, folder / name)
    names = {name: hub if hub is not None and name == "source" else str(folder / name) for name in PARAMETERS}
    blocks = {"block_influence": [0.1 * block for block in range(shape.layers)]}
    Scores(str(model), "llama", plan.model, shape, {}, {}, None, blocks).save(folder / "scores.json")
    write(folder / "results.json", {
        "schema": 1,
        "models": {
            path: {
                "parameters": PARAMETERS[name],
                "perplexity": {
                    "wiki": {"segment": 8, "bos_once": PERPLEXITY[name]},
                    "other": {"bos_once": None if name == "pruned" else 20.0},
                },
            }
            for name, path in names.items()
        },
        "command": "llmprune evaluate",
    })  # fmt: skip
    write(folder / "speed.json", {
        "schema": 1, "device": "gpu", "dtype": "bfloat16",
        "models": {path: speed_of(name) for name, path in names.items()},
        "command": "llmprune measure",
    })  # fmt: skip
    (folder / "continuations").mkdir()
    for name in names:
        records = [{"prompt": "alone", "output": "x", "reference": None}] if name == "source" else []
        records += [{"prompt": p, "output": f" {name} on {p}", "reference": None} for p in ("first", "second")]
        write(folder / f"continuations/{name}.jsonl", *records)
    run(folder / "recover", "2031-05-06 07:08:09")
    return folder


def speed_of(name: str) -> dict[str, Any]:
    """A model's entry in speed.json; the larger batch must not get into the headline."""

    def measured(batch: int, ratio: float) -> dict[str, Any]:
        return {
            "batch": batch, "prompt_tokens": 16, "output_tokens": 64, "latency_s": {"mean": 1.0, "std": 0.1},
            "tokens_per_s": 64.0 * ratio, "peak_memory_bytes": 500_000_000 if name == "source" else 382_000_000,
            **({} if name == "source" else {"speedup": {"p50": ratio, "p10": ratio, "p90": ratio}}),
        }  # fmt: skip

    return {"parameters": PARAMETERS[name], "prefill": [], "generation": [measured(8, 2.5), measured(1, 1.312)]}


def run(folder: Path, started: str, batches: int = 4) -> None:
    """A run folder that counted tokens, with an evaluation at its end."""
    folder.mkdir()
    write(folder / "config.yaml", {"train": {"duration": f"{batches}ba"}, "model": {"path": "x"}})
    (folder / "log.txt").write_text(f"{started} llmprune.training.trainer: begins\nlater\n")
    lines = [
        {"batch": n, "time/batch": n, "time/token": n * TOKENS_PER_BATCH, "loss/train/total": 3.0 - n / 10}
        for n in range(batches)
    ]
    write(folder / "metrics.jsonl", *lines, {"batch": batches, "metrics/eval/loss": 2.5})


def write(path: Path, *lines: Any) -> None:
    """Write JSON, one value a line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
