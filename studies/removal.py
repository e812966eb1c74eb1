"""What removing blocks costs before recovery: held-out losses by every criterion and every way to select."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.plans.plan import Plan
from llmprune.pruning.scoring.scores import Scores
from llmprune.pruning.scoring.settings import LayerScoringConfig
from llmprune.pruning.selection.settings import PlanConfig
from llmprune.utils.errors import UserError
from llmprune.utils.files import write_json

EVAL_SAMPLES_PER_DOMAIN = 100


def ways(scores: Scores) -> Iterator[tuple[str, PlanConfig]]:
    """Every way to decide: its name and its settings."""
    for name in scores.blocks:
        yield name, PlanConfig("lowest", name)
    for name in scores.spans:
        yield f"span by {name}", PlanConfig("span", name)
    yield "sublayers", PlanConfig("sublayers")
    for name in ("perplexity", "taylor", "block_influence"):
        yield f"iterative by {name}", PlanConfig("iterative", name)
    yield "greedy perplexity", PlanConfig("greedy")
    yield "merge", PlanConfig("merge", threshold=-1.0, merge_size=2, merge_step=1)


def loss_of(model: Path, plan: Plan, data: Path) -> float:
    """The held-out loss of a model cut by a plan."""
    from llmprune.conversion.commands import apply
    from llmprune.data.prepared import PreparedData
    from llmprune.evaluation.losses import evaluate_losses
    from llmprune.models.loading import load_model

    with tempfile.TemporaryDirectory() as folder:
        apply(model, plan, Path(folder) / "cut")
        cut = load_model(Path(folder) / "cut")
        return evaluate_losses(cut, PreparedData(data), samples_per_domain=EVAL_SAMPLES_PER_DOMAIN).loss


def study(model: Path, data: Path, counts: list[int], samples: int) -> dict[str, dict[int, float]]:
    """Score once, then cut by every way; a plan that was seen before is not evaluated again."""
    from llmprune.jobs.score import score
    from llmprune.pruning.planning import make_plan

    scores = score(str(model), LayerScoringConfig(CalibrationConfig(str(data), samples, 128)))
    known: dict[object, float] = {}
    table: dict[str, dict[int, float]] = {}
    for name, settings in ways(scores):
        table[name] = {}
        for count in counts:
            try:
                plan = make_plan(scores, replace(settings, remove=count))
            except UserError as error:
                print(f"{name}, {count}: {error}", file=sys.stderr)
                continue
            if plan.blocks not in known:
                known[plan.blocks] = loss_of(model, plan, data)
            table[name][count] = known[plan.blocks]
        print(f"{name:28}" + "".join(f"{loss:9.4f}" for loss in table[name].values()), flush=True)
    return table


def main() -> int:
    """Run the study and print the table as Markdown, the best way first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("runs/small/base"))
    parser.add_argument("--data", type=Path, default=Path("runs/small/data"))
    parser.add_argument("--remove", default="1,2,3", help="how many blocks go, separated by commas")
    parser.add_argument("--samples", type=int, default=64, help="calibration samples, from the training split")
    parser.add_argument("--out", type=Path, default=Path("runs/study_removal.json"))
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.remove.split(",")]
    table = study(arguments.model, arguments.data, counts, arguments.samples)
    print("\n| decided by | " + " | ".join(f"{count} gone" for count in counts) + " |")
    print("|---|" + "---|" * len(counts))
    for name, losses in sorted(table.items(), key=lambda row: sum(row[1].values())):
        cells = (f"{losses[count]:.4f}" if count in losses else "–" for count in counts)
        print(f"| {name} | " + " | ".join(cells) + " |")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
