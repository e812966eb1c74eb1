"""Every recovery at three numbers of tokens: the small base, pruned by depth and by width to the same size.

A second run goes on where the first was stopped. What comes out is OUT/table.md, OUT/gap.md (what of the gap between
base and plain continued pretraining others close) and OUT/recovery.png.
"""

import argparse
import itertools
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.pruning.selection.settings import PlanConfig
from llmprune.utils.files import read_json, write_json, write_text
from llmprune.utils.outputs import remove

ROOT = Path(__file__).resolve().parents[1]
EVAL_SAMPLES_PER_DOMAIN = 100
BATCHES = {"small": 25, "medium": 75, "large": 225}
# Three quarters of the base's 3,221,952 parameters, by two ways.
PLANS = {
    "depth": PlanConfig(criterion="perplexity", shape={"layers": 4}),
    "width": PlanConfig(unit_criterion="unit_taylor", shape={"hidden": 160, "intermediate": 416}),
}
FIXED = "dynamic_loading=null"
TEACHER = "distillation={{teacher: {base}{more}}}"


@dataclass(frozen=True)
class Recovery:
    """One way to recover.

    Attributes:
        yaml: of the job.
        overrides: of the YAML; {base} and {taught} are filled in.
    """

    yaml: str
    overrides: tuple[str, ...]


def _parts(*parts: str) -> Recovery:
    """Some parts; the base's output layer is its embedding."""
    return Recovery("continue.yaml", (FIXED, f"trainable={{{{parameters: [{', '.join(parts)}]}}}}"))


def _taught(more: str = "", *others: str) -> Recovery:
    return Recovery("continue.yaml", (TEACHER.replace("{more}", more), *others))


RECOVERIES: Mapping[str, Recovery] = {
    "continued pretraining": Recovery("continue.yaml", (FIXED,)),
    "dynamic mixing": Recovery("continue.yaml", ()),
    "norms": _parts("norms"),
    "embedding, final norm": _parts("embedding", "final_norm"),
    "embedding, final norm, last block": _parts("embedding", "final_norm", "last.1"),
    "embedding, final norm, last 2 blocks": _parts("embedding", "final_norm", "last.2"),
    "embedding, final norm, last 3 blocks": _parts("embedding", "final_norm", "last.3"),
    "LoRA": Recovery("finetune.yaml", ()),
    "QLoRA": Recovery("finetune.yaml", ("lora.quantize=nf4",)),
    "distillation": _taught("", FIXED),
    "distillation, top 16 from disk": Recovery("continue.yaml", (FIXED, "data.path={taught}", "distillation={{}}")),
    "distillation and next-token loss": _taught(", objectives: {{kl: 1.0, lm: 1.0}}", FIXED),
    "distillation and states": _taught(", objectives: {{kl: 1.0, mse: 0.5}}", FIXED),
    "distillation and dynamic mixing": _taught(),
    "distillation, LoRA": Recovery("finetune.yaml", (TEACHER.replace("{more}", ""),)),
}


@dataclass(frozen=True)
class Entry:
    """One cell of the table."""

    kind: str
    recovery: str
    tokens: str

    @property
    def name(self) -> str:
        """Among all."""
        return f"{self.kind}: {self.recovery}: {self.tokens}"


def entries() -> Iterator[Entry]:
    """All cells."""
    for kind, recovery, tokens in itertools.product(PLANS, RECOVERIES, BATCHES):
        yield Entry(kind, recovery, tokens)


class Study:
    """Prunes, recovers and measures."""

    def __init__(self, small: Path, out: Path) -> None:
        """Work in ``out``."""
        self.base, self._data, self._out = small / "base", small / "data", out
        self._references = small / "references.json"

    def pruned(self, kind: str) -> Path:
        """The folder of a pruned model."""
        from llmprune.conversion.commands import apply
        from llmprune.jobs.score import score
        from llmprune.pruning.planning import make_plan
        from llmprune.pruning.scoring.scores import Scores
        from llmprune.pruning.scoring.settings import LayerScoringConfig

        folder, scores = self._out / kind, self._out / "scores.json"
        if not folder.exists():
            if not scores.exists():
                calibration = CalibrationConfig(str(self._data), 64, 128)
                score(str(self.base), LayerScoringConfig(calibration, ["perplexity", "unit_taylor"])).save(scores)
            apply(self.base, make_plan(Scores.load(scores), PLANS[kind]), folder)
        return folder

    def taught(self) -> Path:
        """The data with the base's predictions."""
        from data_prep.teach import TeachConfig, teach

        folder = self._out / "taught"
        if not folder.exists():
            teach(str(self._data), str(self.base), folder, TeachConfig(top_k=16))
        return folder

    def measure(self, entry: Entry) -> dict[str, Any]:
        """Recover and measure one."""
        from llmprune.conversion.commands import convert
        from llmprune.measurement.monitor import peak_memory

        model, work = self.pruned(entry.kind), self._out / "work"
        recovery = RECOVERIES[entry.recovery]
        places = {"base": self.base}
        if "{taught}" in " ".join(recovery.overrides):
            places["taught"] = self.taught()
        overrides = [
            f"model.path={model}",
            f"train.duration={BATCHES[entry.tokens]}ba",
            "train.microbatch_size=8",
            "train.eval_interval=0ba" if FIXED in recovery.overrides else f"train.eval_interval={_interval(entry)}ba",
        ]
        if FIXED not in recovery.overrides and recovery.yaml == "continue.yaml":
            overrides.append(f"dynamic_loading.references={self._references}")
        overrides += [text.format(**places) for text in recovery.overrides]
        remove(work)
        start = time.perf_counter()
        with peak_memory(torch.device("cpu")) as peak:
            trainable = self._train(recovery.yaml, work / "run", overrides)
        seconds = time.perf_counter() - start
        convert(work / "run", work / "recovered")
        found = self.losses(work / "recovered")
        return {**found, "trainable": trainable, "seconds": seconds, "peak_bytes": peak.added}

    def losses(self, folder: Path) -> dict[str, Any]:
        """The held-out losses of a model."""
        from llmprune.data.prepared import PreparedData
        from llmprune.evaluation.losses import evaluate_losses
        from llmprune.models.loading import count_parameters, load_model, load_model_config

        found = evaluate_losses(
            load_model(folder), PreparedData(self._data), samples_per_domain=EVAL_SAMPLES_PER_DOMAIN
        )
        return {"loss": found.loss, "domains": found.domains, "parameters": count_parameters(load_model_config(folder))}

    def _train(self, yaml: str, run: Path, overrides: list[str]) -> int:
        """Train; returns how many parameters learned."""
        from llmprune.config.job_files import load_training_job
        from llmprune.jobs.train import train

        common = [f"run.folder={run}", f"data.path={self._data}", "loggers.console=false"]
        trainer = train(load_training_job(ROOT / "studies" / "small" / yaml, [*common, *overrides]))
        return sum(p.numel() for p in trainer.state.model.parameters() if p.requires_grad)


def _interval(entry: Entry) -> int:
    """Batches between evaluations, after which the mix changes."""
    return max(BATCHES[entry.tokens] // 6, 10)


def table(found: Mapping[str, dict[str, Any]], pruned: Mapping[str, dict[str, Any]]) -> str:
    """The first part as Markdown."""
    head = " | ".join(f"{name}, {BATCHES[name] * 8 * 128:,} tokens" for name in BATCHES)
    rows = [
        f"| pruned by | recovery | trainable | {head} | seconds | peak memory, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in PLANS:
        before = pruned[kind]
        rows.append(f"| {kind} | none | | {before['loss']:.4f} | {before['loss']:.4f} | {before['loss']:.4f} | | |")
        for name in RECOVERIES:
            cells = [found.get(Entry(kind, name, tokens).name) for tokens in BATCHES]
            if None in cells:
                continue
            losses = " | ".join(f"{cell['loss']:.4f}" for cell in cells if cell is not None)
            last = cells[-1] or {}
            rows.append(
                f"| {kind} | {name} | {last['trainable']:,} | {losses} | {last['seconds']:.0f} | "
                f"{last['peak_bytes'] / 1e6:.0f} |"
            )
    return "\n".join(rows) + "\n"


def gap_table(found: Mapping[str, dict[str, Any]], base: float) -> str:
    """What of the gap between the base and plain continued pretraining others close, as Markdown."""
    rows = ["| pruned by | recovery | " + " | ".join(BATCHES) + " |", "|---|---|---|---|---|"]
    plain = "continued pretraining"
    for kind in PLANS:
        left = [found[Entry(kind, plain, tokens).name]["loss"] - base for tokens in BATCHES]
        rows.append(f"| {kind} | {plain} leaves | {' | '.join(f'{gap:+.4f}' for gap in left)} |")
        for name in ("dynamic mixing", "distillation", "distillation and dynamic mixing"):
            cells = []
            for tokens, gap in zip(BATCHES, left, strict=True):
                closed = gap - (found[Entry(kind, name, tokens).name]["loss"] - base)
                cells.append(f"{closed:+.4f}" + (f" ({closed / gap:.0%})" if gap > 0 else ""))
            rows.append(f"| {kind} | {name} closes | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def draw(found: Mapping[str, dict[str, Any]], base: float, path: Path) -> None:
    """Loss against tokens, a panel for each way to prune."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), PLANS, strict=True):
        for number, name in enumerate(RECOVERIES):
            losses = [found[Entry(kind, name, tokens).name]["loss"] for tokens in BATCHES]
            style = "-" if "distillation" in name else "--" if "LoRA" in name else ":"
            tokens = [count * 8 * 128 for count in BATCHES.values()]
            axes.plot(tokens, losses, f"o{style}", color=f"C{number % 10}", markersize=3, label=name)
        axes.axhline(base, color="0.4", linewidth=0.8, linestyle="--")
        axes.set_xscale("log")
        axes.set_title(f"pruned by {kind}", fontsize=10)
        axes.set_xlabel("tokens of recovery")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.axes[0].set_ylabel("held-out loss, nats per token (dashed: base)")
    lines, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def main() -> int:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", type=Path, default=Path("runs/small"))
    parser.add_argument("--out", type=Path, default=Path("runs/study_recovery"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("composer").setLevel(logging.ERROR)
    arguments.out.mkdir(parents=True, exist_ok=True)

    study = Study(arguments.small, arguments.out)
    path = arguments.out / "results.json"
    found: dict[str, Any] = read_json(path) if path.exists() else {}
    for entry in entries():
        if entry.name not in found:
            found[entry.name] = study.measure(entry)
            write_json(path, found)
            row = found[entry.name]
            print(f"{entry.name:70} {row['loss']:8.4f} {row['seconds']:6.0f} s", flush=True)
    base = study.losses(study.base)["loss"]
    pruned = {kind: study.losses(study.pruned(kind)) for kind in PLANS}
    write_text(arguments.out / "table.md", table(found, pruned))
    write_text(arguments.out / "gap.md", gap_table(found, base))
    draw(found, base, arguments.out / "recovery.png")
    print(f"base {base:.4f}", {kind: (row["loss"], row["parameters"]) for kind, row in pruned.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
