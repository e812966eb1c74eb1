"""The small base pruned by every set of gates that may be trained together, to half its prunable parameters.

Each set is pruned, converted, evaluated, recovered on as many tokens as every other and evaluated again; where gates
touch the attention only, half of the attention's parameters go. A second run goes on where the first was stopped. The
table is OUT/table.md.
"""

import argparse
import itertools
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmprune.utils.files import read_json, write_json, write_text
from llmprune.utils.outputs import remove

ROOT = Path(__file__).resolve().parents[1]
WIDTH, DEPTH = ("hidden", "kv_group", "intermediate"), ("layer", "attention", "mlp")


def gate_sets() -> Iterator[tuple[str, ...]]:
    """The sets, small ones first."""
    for count in range(1, len(DEPTH) + 1):
        yield from itertools.combinations(DEPTH, count)
    for count in range(1, len(WIDTH) + 1):
        for width in itertools.combinations(WIDTH, count):
            yield from ((*width, *depth) for depth in ((), ("layer",), ("attention", "mlp")))


def prunable_share_of_attention(base: Path) -> float:
    """The attention's share of the base's prunable parameters."""
    import torch

    from llmprune.models.families import family_of
    from llmprune.models.loading import load_model_config
    from llmprune.pruning.gates.uniform_shape import prunable_size

    config = load_model_config(base)
    family = family_of(config)
    shape, matrices = family.shape(config), family.matrices(config)
    whole, mlp = (
        float(prunable_size(shape, matrices, {"attention": torch.full((shape.layers,), p)})) for p in (1.0, 0.0)
    )
    return 1 - mlp / whole


def study(gates: tuple[str, ...], base: Path, data: Path, out: Path, batches: int) -> dict[str, Any]:
    """Prune by one set of gates and recover."""
    from llmprune.config.job_files import load_training_job
    from llmprune.conversion.commands import convert
    from llmprune.data.prepared import PreparedData
    from llmprune.evaluation.losses import evaluate_losses
    from llmprune.jobs.train import train
    from llmprune.models.loading import load_model

    attention_only = set(gates) <= {"kv_group", "attention"}
    sparsity = 0.5 * (prunable_share_of_attention(base) if attention_only else 1.0)
    common = [
        f"data.path={data}",
        f"train.duration={batches}ba",
        "train.microbatch_size=8",
        "train.eval_interval=0ba",
        "loggers.console=false",
        "run.overwrite=true",
    ]
    pruning = [f"run.folder={out}/prune", f"model.path={base}", f"l0_pruning.gates=[{','.join(gates)}]"]
    target = ["l0_pruning.target=null", f"l0_pruning.target_sparsity={sparsity:.4f}"]
    train(load_training_job(ROOT / "studies" / "small" / "prune.yaml", [*common, *pruning, *target]))
    plan = convert(out / "prune", out / "pruned", overwrite=True)
    recovery = [f"run.folder={out}/continue", f"model.path={out}/pruned"]
    train(load_training_job(ROOT / "studies" / "small" / "continue.yaml", [*common, *recovery]))
    convert(out / "continue", out / "recovered", overwrite=True)
    prepared = PreparedData(data)
    models = {name: load_model(out / name) for name in ("pruned", "recovered")}
    losses = {name: evaluate_losses(model, prepared, samples_per_domain=100).loss for name, model in models.items()}
    live = {name: int(plan.factors[name].count_nonzero()) for name in ("attention", "mlp") if name in plan.factors}
    return {
        "gates": list(gates),
        "sparsity": sparsity,
        "shape": str(plan.shape),
        "sublayers": live,
        "parameters": sum(p.numel() for p in models["pruned"].parameters()),
        **losses,
    }


def main() -> int:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", type=Path, default=Path("runs/small"))
    parser.add_argument("--out", type=Path, default=Path("runs/study_gates"))
    parser.add_argument("--batches", type=int, default=150, help="of pruning, and again of recovery")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("composer").setLevel(logging.ERROR)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "results.json"
    found: dict[str, Any] = read_json(results) if results.exists() else {}
    for gates in gate_sets():
        name = "+".join(gates)
        if name not in found:
            work = arguments.out / "work"
            remove(work)
            small = arguments.small
            found[name] = study(gates, small / "base", small / "data", work, arguments.batches)
            write_json(results, found)
            print(f"{name}: {found[name]}", flush=True)
    rows = ["| gates | parameters | shape | pruned | recovered |", "|---|---|---|---|---|"]
    for name, row in sorted(found.items(), key=lambda item: item[1]["recovered"]):
        live = "".join(f"; {count} {sublayer}" for sublayer, count in row["sublayers"].items())
        shape = row["shape"].replace(", head_dim 32", "")
        rows.append(
            f"| {name.replace('+', ', ')} | {row['parameters']:,} | {shape}{live} | {row['pruned']:.4f} | "
            f"{row['recovered']:.4f} |"
        )
    write_text(arguments.out / "table.md", "\n".join(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
