"""The small base at half of its parameters: learned gates, width in one shot, depth, and a budget's own choice.

Every model is measured before any recovery and after recovery on the same tokens; learned gates see more while
they prune. Plans that are the same model are trained once. A second run goes on where the first was stopped. What comes
out is OUT/table.md and OUT/width.png.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.plans.plan import Plan
from llmprune.pruning.scoring.scores import Scores
from llmprune.pruning.selection.settings import PlanConfig
from llmprune.utils.files import read_json, sha256_text, write_json, write_text
from llmprune.utils.outputs import remove

ROOT = Path(__file__).resolve().parents[1]
EVAL_SAMPLES_PER_DOMAIN = 100
# Three shapes of the base at half of its 3,221,952 parameters: narrower, shorter, and both.
WIDTH = {"hidden": 144, "heads": 4, "intermediate": 264}
DEPTH = {"layers": 2}
BOTH = {"layers": 5, "hidden": 144, "heads": 4, "intermediate": 344}
BATCHES = 300


@dataclass(frozen=True)
class Entry:
    """One model of the study.

    Attributes:
        name: its row.
        kind: learned, width, depth, both or budget.
        plan: how to cut it; None where gates are learned or rounds are made.
        batches: of recovery.
        rounds: of scoring, cutting and recovery.
    """

    name: str
    kind: str
    plan: Callable[[Scores], Plan] | None
    batches: int = BATCHES
    rounds: int = 1


def entries(scores: Scores) -> Iterator[Entry]:
    """All models of the study."""
    from llmprune.pruning.budgets.settings import BudgetConfig
    from llmprune.pruning.planning import choose_plan, make_plan

    def made(**settings: Any) -> Callable[[Scores], Plan]:
        return lambda scores: make_plan(scores, PlanConfig(**settings))

    def chosen(**settings: Any) -> Callable[[Scores], Plan]:
        return lambda scores: choose_plan(scores, PlanConfig(**settings), BudgetConfig(params="0.5", multiple=8))[0]

    yield Entry("learned gates", "learned", None)
    for name in scores.units:
        yield Entry(name, "width", made(shape=WIDTH, unit_criterion=name))
    yield Entry("unit_taylor, refit", "width", made(shape=WIDTH, unit_criterion="unit_taylor", correction="refit"))
    for name in scores.blocks:
        yield Entry(name, "depth", made(shape=DEPTH, criterion=name))
    for name in scores.spans:
        yield Entry(f"span by {name}", "depth", made(shape=DEPTH, criterion=name, method="span"))
    mixed: dict[str, Any] = {"criterion": "perplexity", "unit_criterion": "unit_taylor"}
    yield Entry("perplexity and unit_taylor", "both", made(shape=BOTH, **mixed))
    yield Entry("perplexity and unit_taylor, 600 batches", "both", made(shape=BOTH, **mixed), batches=2 * BATCHES)
    yield Entry("perplexity and unit_taylor, two rounds", "both", None, rounds=2)
    yield Entry("perplexity and unit_taylor", "budget", chosen(**mixed))
    yield Entry("perplexity and unit_taylor, refit", "budget", chosen(**mixed, correction="refit"))


class Study:
    """Cuts, measures and recovers."""

    def __init__(self, small: Path, out: Path) -> None:
        """Work in ``out``/work."""
        self._base, self._data, self._work = small / "base", small / "data", out / "work"
        self._references = small / "references.json"

    def scores(self, path: Path) -> Scores:
        """Every criterion's scores of the base."""
        from llmprune.jobs.score import score
        from llmprune.pruning.scoring.settings import LayerScoringConfig

        if not path.exists():
            score(str(self._base), LayerScoringConfig(CalibrationConfig(str(self._data), 64, 128))).save(path)
        return Scores.load(path)

    def fingerprint(self, entry: Entry, plan: Plan | None) -> str:
        """The same for models that come out the same."""
        if plan is None:
            return sha256_text(f"{entry.kind} {entry.name}")
        corrected = sorted((name, tensor.sum().item()) for name, tensor in plan.corrections.items())
        return sha256_text(f"{plan.blocks} {plan.hidden} {corrected} {entry.batches}")

    def measure(self, entry: Entry, plan: Plan | None) -> dict[str, Any]:
        """The losses before and after recovery, and the size."""
        from llmprune.conversion.commands import apply, convert

        remove(self._work)
        self._work.mkdir(parents=True)
        cut, recovered = self._work / "cut", self._work / "recovered"
        if entry.rounds > 1:
            self._rounds(entry)
            cut, recovered = self._work / "rounds" / "round-1" / "pruned", self._work / "rounds" / "model"
        else:
            if plan is None:
                self._train("prune.yaml", "prune", self._base, f"l0_pruning.target={_braces(BOTH)}")
                convert(self._work / "prune", cut)
            else:
                apply(self._base, plan, cut)
            self._train("continue.yaml", "recover", cut, f"train.duration={entry.batches}ba")
            convert(self._work / "recover", recovered)
        found = {"before": self._losses(cut), "after": self._losses(recovered)}
        from llmprune.models.families import family_of
        from llmprune.models.loading import count_parameters, load_model_config

        config = load_model_config(recovered)
        return {
            **found,
            "parameters": count_parameters(config),
            "shape": str(family_of(config).shape(config)),
            "kind": entry.kind,
        }

    def _common(self, run: str, model: Path) -> list[str]:
        return [
            f"run.folder={self._work}/{run}",
            f"model.path={model}",
            f"data.path={self._data}",
            f"dynamic_loading.references={self._references}",
            "loggers.console=false",
        ]

    def _train(self, yaml: str, run: str, model: Path, *overrides: str) -> None:
        from llmprune.config.job_files import load_training_job
        from llmprune.jobs.train import train

        train(load_training_job(ROOT / "studies" / "small" / yaml, [*self._common(run, model), *overrides]))

    def _rounds(self, entry: Entry) -> None:
        from llmprune.config.job_files import load_job
        from llmprune.config.schema import IterationConfig
        from llmprune.jobs.iterate import iterate

        job = load_job(
            ROOT / "studies" / "small" / "iterate.yaml",
            [
                *self._common("rounds", self._base),
                f"plan.shape={_braces(BOTH)}",
                f"iterate.rounds={entry.rounds}",
                "plan.criterion=perplexity",
                "layer_scoring.data.samples=64",
                f"train.duration={entry.batches // entry.rounds}ba",
            ],
        )
        assert isinstance(job, IterationConfig)
        iterate(job)

    def _losses(self, folder: Path) -> dict[str, float]:
        from llmprune.data.prepared import PreparedData
        from llmprune.evaluation.losses import evaluate_losses
        from llmprune.models.loading import load_model

        found = evaluate_losses(
            load_model(folder), PreparedData(self._data), samples_per_domain=EVAL_SAMPLES_PER_DOMAIN
        )
        return {"loss": found.loss, **found.domains}


def _braces(values: dict[str, int]) -> str:
    return "{" + ", ".join(f"{name}: {value}" for name, value in values.items()) + "}"


def table(found: dict[str, dict[str, Any]]) -> str:
    """The study as Markdown, the best after recovery first."""
    rows = ["| kind | decided by | shape | parameters | before | after |", "|---|---|---|---|---|---|"]
    for name, row in sorted(found.items(), key=lambda item: item[1]["after"]["loss"]):
        shape = row["shape"].replace(", head_dim 32", "")
        losses = f"{row['before']['loss']:.4f} | {row['after']['loss']:.4f}"
        rows.append(f"| {row['kind']} | {name.partition(': ')[2]} | {shape} | {row['parameters']:,} | {losses} |")
    return "\n".join(rows) + "\n"


def draw(found: dict[str, dict[str, Any]], base: float, path: Path) -> None:
    """Losses before and after recovery, a line for each model."""
    from matplotlib.figure import Figure

    ordered = sorted(found.items(), key=lambda item: -item[1]["after"]["loss"])
    colours = dict(zip(("learned", "both", "budget", "width", "depth"), ("C3", "C1", "C4", "C0", "C2"), strict=True))
    figure = Figure(figsize=(7.5, 0.24 * len(ordered) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    for place, (_, row) in enumerate(ordered):
        before, after = row["before"]["loss"], row["after"]["loss"]
        axes.plot([before, after], [place, place], color=colours[row["kind"]], linewidth=1, alpha=0.6)
        axes.plot(before, place, "o", color=colours[row["kind"]], fillstyle="none", markersize=4)
        axes.plot(after, place, "o", color=colours[row["kind"]], markersize=5)
    axes.axvline(base, color="0.4", linewidth=0.8, linestyle="--")
    axes.annotate("base", (base, len(ordered) - 0.4), color="0.4", fontsize=8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(ordered)), [name for name, _ in ordered], fontsize=7)
    axes.set_xlabel("held-out loss, nats per token: before (open) and after recovery (full)")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    ticks = [4.5, 5, 6, 7, 8, 10, 12]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    figure.savefig(path, dpi=130)


def main() -> int:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", type=Path, default=Path("runs/small"))
    parser.add_argument("--out", type=Path, default=Path("runs/study_width"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("composer").setLevel(logging.ERROR)
    arguments.out.mkdir(parents=True, exist_ok=True)

    study = Study(arguments.small, arguments.out)
    scores = study.scores(arguments.out / "scores.json")
    path = arguments.out / "results.json"
    found: dict[str, Any] = read_json(path) if path.exists() else {}
    measured = {row["fingerprint"]: row for row in found.values()}
    for entry in entries(scores):
        name = f"{entry.kind}: {entry.name}"
        if name in found:
            continue
        plan = None if entry.plan is None else entry.plan(scores)
        key = study.fingerprint(entry, plan)
        if key not in measured:
            measured[key] = {**study.measure(entry, plan), "fingerprint": key}
        found[name] = {**measured[key], "kind": entry.kind}
        write_json(path, found)
        row = found[name]
        print(f"{name:50} {row['before']['loss']:8.4f} {row['after']['loss']:8.4f}  {row['shape']}", flush=True)
    base = read_json(arguments.small / "evaluation.json")["base_loss"]
    write_text(arguments.out / "table.md", table(found))
    draw(found, base, arguments.out / "width.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
