"""The small base without two of its blocks' parameters, by every replacement module and objective.

The span is longer the larger its replacement module is, so that all models have about the same size: two blocks go and
nothing comes, or three and a network of one block's size, or four and two blocks. Each span is the one whose ends are
most alike. Held-out losses before and after training are those of the same samples. A second run goes on where the
first was stopped. The table is OUT/table.md.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmprune.checkpoints.metrics import read_metrics
from llmprune.utils.files import read_json, write_json, write_text
from llmprune.utils.outputs import remove

ROOT = Path(__file__).resolve().parents[1]
OBJECTIVES = ("mse", "lm", "kl")
PREFIX = "metrics/eval/"


def studied(hidden: int, block: int) -> Iterator[tuple[str, str | None, list[str]]]:
    """Name, objective (None = nothing is trained) and settings of every model.

    Args:
        hidden: dimensions of the base.
        block: parameters of one of its blocks.
    """
    sizes = {"ffn": (block - 3 * hidden) // (2 * hidden + 1), "swiglu": block // (3 * hidden)}
    yield "none", None, ["kind=none", "length=2"]
    yield "mean", None, ["kind=mean", "length=2"]
    yield "closed form", None, ["kind=closed_form", "length=2"]
    for objective in OBJECTIVES:
        for kind, size in sizes.items():
            yield kind, objective, [f"kind={kind}", "length=3", f"intermediate={size}"]
        yield "one block", objective, ["kind=blocks", "blocks=1", "length=3"]
        yield "two blocks", objective, ["kind=blocks", "blocks=2", "length=4"]


def study(objective: str | None, settings: list[str], small: Path, run: Path, batches: int) -> dict[str, Any]:
    """Train one replacement module."""
    from llmprune.config.job_files import load_training_job
    from llmprune.conversion.commands import convert
    from llmprune.jobs.train import train
    from llmprune.models.loading import load_any_model

    remove(run)
    overrides = [
        f"run.folder={run}/run",
        f"model.path={small}/base",
        f"data.path={small}/data",
        f"train.duration={batches if objective else 0}ba",
        "data.eval_samples_per_domain=100",
        f"block_replacement.objectives={{{objective or 'mse'}: 1.0}}",
        *(f"block_replacement.{setting}" for setting in settings),
        "loggers.console=false",
    ]
    train(load_training_job(ROOT / "studies" / "small" / "replace.yaml", overrides))
    convert(run / "run", run / "model", overwrite=True)
    evaluated = [line for line in read_metrics(run / "run" / "metrics.jsonl") if f"{PREFIX}loss" in line]
    best = min(evaluated, key=lambda line: line[f"{PREFIX}loss"])
    manifest = read_json(run / "run" / "checkpoints" / "manifest.json")["block_replacement"]

    def losses(line: dict[str, Any]) -> dict[str, float]:
        return {key.removeprefix(PREFIX): value for key, value in line.items() if key.startswith(f"{PREFIX}loss")}

    return {
        "span": [manifest["start"], manifest["length"]],
        "parameters": sum(p.numel() for p in load_any_model(run / "model").parameters()),
        "before": losses(evaluated[0]),
        "after": losses(best),
        "batch": best["batch"],
    }


def main() -> int:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", type=Path, default=Path("runs/small"))
    parser.add_argument("--out", type=Path, default=Path("runs/study_replacement"))
    parser.add_argument("--batches", type=int, default=300)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("composer").setLevel(logging.ERROR)
    arguments.out.mkdir(parents=True, exist_ok=True)

    from llmprune.models.block_hooks import blocks_of
    from llmprune.models.loading import load_model

    base = load_model(arguments.small / "base")
    block = sum(p.numel() for p in blocks_of(base)[0].parameters())
    results = arguments.out / "results.json"
    found: dict[str, Any] = read_json(results) if results.exists() else {}
    for kind, objective, settings in studied(base.config.hidden_size, block):
        name = f"{kind}, {objective}" if objective else kind
        if name not in found:
            found[name] = study(objective, settings, arguments.small, arguments.out / "work", arguments.batches)
            write_json(results, found)
            print(f"{name}: {found[name]}", flush=True)
    domains = [key for key in next(iter(found.values()))["after"] if "/" in key]
    head = [
        "replacement module, objective",
        "span",
        "parameters",
        "before",
        "after",
        *(d.partition("/")[2] for d in domains),
    ]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in found.items():
        start, length = row["span"]
        cells = [name, f"{start}–{start + length - 1}", f"{row['parameters']:,}"]
        cells += [f"{row['before']['loss']:.4f}", f"{row['after']['loss']:.4f}"]
        cells += [f"{row['before'][domain]:.3f} → {row['after'][domain]:.3f}" for domain in domains]
        rows.append("| " + " | ".join(cells) + " |")
    write_text(arguments.out / "table.md", "\n".join(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
