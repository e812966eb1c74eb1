"""Which uniform shape gates that were trained to a size should be cut to: each that a run compared, cut and measured.

    python studies/shape.py MODEL --data MDS --text TEXT --sparsity 0.2 --out OUT

Perplexity is of a text of another kind than the run's data. A second run goes on where the first was stopped. What
comes out is OUT/table.md.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from refit import perplexity

from llmprune.checkpoints.run_folder import RunFolder
from llmprune.conversion.commands import convert
from llmprune.models.loading import count_parameters
from llmprune.models.source import read_config
from llmprune.pruning.gates.shape_record import save_shape
from llmprune.utils.files import read_json, write_json, write_text
from llmprune.utils.outputs import remove

ROOT = Path(__file__).resolve().parents[1]


def train(model: str, data: str, sparsity: float, batches: int, seed: int, folder: Path) -> None:
    """Train weights and gates, and let the run choose a shape."""
    settings = [
        f"run.folder={folder}",
        f"run.seed={seed}",
        "run.autoresume=true",
        f"model.path={model}",
        f"data.path={data}",
        "data.eval_samples_per_domain=16",
        "dynamic_loading=null",
        "l0_pruning.target=null",
        f"l0_pruning.target_sparsity={sparsity}",
        "optimizer.lr=1e-4",
        f"train.duration={batches}ba",
        "train.global_batch_size=1",
        "train.microbatch_size=1",
        "train.eval_interval=0ba",
    ]
    subprocess.run(
        [sys.executable, ROOT / "train.py", ROOT / "studies" / "small" / "prune.yaml", *settings], check=True
    )


def measure(run: Path, text: str, work: Path) -> list[dict[str, Any]]:
    """Cut the model to each shape that the run compared, and measure it."""
    checkpoints = RunFolder(run).checkpoints
    known = read_json(checkpoints / "shape.json")
    rivals = [one["counts"] for one in known["compared"]]
    losses = [one["loss"] for one in known["compared"]]
    found = []
    for place, counts in enumerate(rivals):
        save_shape(checkpoints, known["batch"], rivals, losses, place)
        remove(work)
        convert(run, work)
        config = read_config(str(work))
        found.append(
            {
                "counts": counts,
                "loss": losses[place],
                "chosen": counts == known["counts"],
                "parameters": count_parameters(config),
                "perplexity": perplexity(work, text),
            }
        )
    save_shape(checkpoints, known["batch"], rivals, losses, rivals.index(known["counts"]))
    remove(work)
    return found


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each shape of each seed."""
    lines = ["| seed | gates that stay of each row | parameters | loss under the gates | perplexity | |"]
    lines.append("|---|---|---|---|---|---|")
    for seed, shapes in found.items():
        for one in shapes:
            counts = ", ".join(f"{kind} {count}" for kind, count in one["counts"].items())
            size, loss, value = one["parameters"] / 1e6, one["loss"], one["perplexity"]
            mark = "chosen" if one["chosen"] else ""
            lines.append(f"| {seed} | {counts} | {size:.1f} M | {loss:.3f} | {value:.1f} | {mark} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train, cut and measure with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="prepared data to train on")
    parser.add_argument("--text", required=True, help="text to measure perplexity on")
    parser.add_argument("--sparsity", type=float, required=True, help="share of the prunable size that goes")
    parser.add_argument("--batches", type=int, default=100, help="of one sample")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = arguments.out / "found.json"
    found: dict[str, list[dict[str, Any]]] = read_json(kept) if kept.exists() else {}
    for seed in arguments.seeds:
        if str(seed) not in found:
            run = arguments.out / f"seed-{seed}"
            train(arguments.model, arguments.data, arguments.sparsity, arguments.batches, seed, run)
            found[str(seed)] = measure(run, arguments.text, arguments.out / "cut")
            write_json(kept, found)
        write_text(arguments.out / "table.md", table(found))


if __name__ == "__main__":
    main()
