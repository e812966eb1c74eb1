"""Whether ``--correction refit`` helps a real model: channels cut by ``unit_taylor``, with it and without.

    python studies/refit.py MODEL --data MDS --text TEXT --intermediate 1088 --out OUT

A seed chooses the calibration samples. Perplexity is of a text of another kind than they are. A second run goes on
where the first was stopped. What comes out is OUT/table.md.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any, Literal

from llmprune.conversion.commands import apply
from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.evaluation.perplexity import Segmentation, measure_perplexity, read_streams
from llmprune.evaluation.settings import PerplexityConfig
from llmprune.jobs.score import score
from llmprune.models.loading import load_model, load_tokenizer
from llmprune.plans.plan import Plan
from llmprune.pruning.budgets.plan_losses import PlanLosses
from llmprune.pruning.planning import make_plan
from llmprune.pruning.scoring.settings import LayerScoringConfig
from llmprune.pruning.selection.settings import PlanConfig
from llmprune.utils.files import read_json, write_json, write_text

LENGTH = 512


def perplexity(model: Path | str, text: str) -> float:
    """Of a text, in segments that know nothing of each other."""
    (tokens,) = read_streams([text], load_tokenizer(str(model)), PerplexityConfig()).values()
    segments = Segmentation(LENGTH, LENGTH)
    return measure_perplexity(load_model(str(model)).eval(), tokens, segments, "none", bos=None, batch_size=4).value


def try_seed(model: str, data: CalibrationConfig, text: str, intermediate: int) -> dict[str, Any]:
    """Losses on the calibration samples and perplexities of the text, in the order of the table."""
    scores = score(model, LayerScoringConfig(data, criteria=["unit_taylor"], batch_size=4))
    told: list[PlanLosses] = []

    def plan(correction: Literal["none", "refit"]) -> Plan:
        settings = PlanConfig(
            shape={"intermediate": intermediate}, unit_criterion="unit_taylor", correction=correction, force=True
        )
        return make_plan(scores, settings, told=told.append)

    found: dict[str, Any] = {}
    corrections: tuple[Literal["none", "refit"], ...] = ("none", "refit")
    for correction in corrections:
        made = plan(correction)
        with tempfile.TemporaryDirectory() as folder:
            apply(model, made, Path(folder) / "cut")
            found[f"perplexity {correction}"] = perplexity(Path(folder) / "cut", text)
        found["corrected"] = len({name.partition(".")[2] for name in made.corrections})
    (losses,) = told
    return {"source": losses.source, "none": losses.uncorrected, "refit": losses.plan, **found}


def table(rows: dict[str, dict[str, Any]], source: float) -> str:
    """A row for each number of samples and each seed."""
    lines = [
        "| calibration | matrices fitted | calibration loss: source | cut | refit | perplexity: source | cut | refit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        losses = " | ".join("–" if row[key] is None else f"{row[key]:.3f}" for key in ("source", "none", "refit"))
        values = f"{source:.1f} | {row['perplexity none']:.1f} | {row['perplexity refit']:.1f}"
        lines.append(f"| {name} | {row['corrected']} | {losses} | {values} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try every number of samples with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="prepared data to calibrate on")
    parser.add_argument("--text", required=True, help="text to measure perplexity on")
    parser.add_argument("--intermediate", type=int, required=True, help="channels that stay")
    parser.add_argument("--samples", type=int, nargs="+", default=[16], help=f"calibration samples of {LENGTH} tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = arguments.out / "found.json"
    found: dict[str, Any] = read_json(kept) if kept.exists() else {}
    if not found:
        found = {"source": perplexity(arguments.model, arguments.text), "rows": {}}
    for samples in arguments.samples:
        for seed in arguments.seeds:
            name = f"{samples * LENGTH:,} tokens, seed {seed}"
            if name not in found["rows"]:
                data = CalibrationConfig(arguments.data, samples, LENGTH, seed=seed)
                found["rows"][name] = try_seed(arguments.model, data, arguments.text, arguments.intermediate)
                write_json(kept, found)
            write_text(arguments.out / "table.md", table(found["rows"], found["source"]))


if __name__ == "__main__":
    main()
