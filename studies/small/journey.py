"""The whole workflow with a small model: corpus → base → pruned → recovered, compared with training from scratch.

Every stage writes its results to OUT; a second run reuses the stages whose inputs have not changed. The last results
are a table, OUT/summary.json, and a report page with all results, OUT/report.html.
"""

import argparse
import hashlib
import json
import logging
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmprune.utils.errors import UserError
from llmprune.utils.files import read_json, write_json
from llmprune.utils.outputs import remove

ROOT = Path(__file__).resolve().parents[2]
SEQUENCE_LENGTH, VOCABULARY, MEGABYTES = 128, 4096, 16.0
EVAL_SAMPLES_PER_DOMAIN = 100
PROMPTS_PER_DOMAIN = 3


class Stages:
    """Runs named stages, each only once for the same inputs."""

    def __init__(self, out: Path) -> None:
        """Read the completed stages from ``out``/stages.json."""
        self._path = out / "stages.json"
        self._done: dict[str, dict[str, Any]] = read_json(self._path) if self._path.exists() else {}
        self._previous = ""

    def run(self, name: str, inputs: Any, outputs: list[Path], work: Callable[[], None]) -> None:
        """Run ``work``, unless it was done with the same inputs (its own and all earlier ones) and has its outputs."""
        key = hashlib.sha256(json.dumps([self._previous, name, inputs]).encode()).hexdigest()
        self._previous = key
        if self._done.get(name, {}).get("key") == key and all(path.exists() for path in outputs):
            print(f"small: {name}: reused", flush=True)
            return
        print(f"small: {name} …", flush=True)
        for path in outputs:
            remove(path)
        start = time.perf_counter()
        work()
        self._done[name] = {"key": key, "seconds": round(time.perf_counter() - start, 1)}
        write_json(self._path, self._done)
        print(f"small: {name}: {self._done[name]['seconds']} s", flush=True)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage when it was last run."""
        return {name: stage["seconds"] for name, stage in self._done.items()}


def train_here(yaml: str, overrides: list[str]) -> None:
    """Train in this process, because starting another process takes longer than a small stage."""
    from llmprune.config.job_files import load_training_job
    from llmprune.jobs.train import train

    train(load_training_job(ROOT / "studies" / "small" / yaml, overrides))


def prune_by_launcher(overrides: list[str]) -> None:
    """Prune as a user would, with Composer's launcher."""
    command = [str(Path(sys.executable).parent / "composer"), "train.py", "studies/small/prune.yaml", *overrides]
    print("small:   " + " ".join(["composer", *command[1:]]), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def journey(out: Path, seed: int) -> dict[str, Any]:
    """Run all stages; returns the summary."""
    from data_prep.builtin import build_corpus
    from data_prep.pack import prepare
    from data_prep.recipe import PackSettings
    from data_prep.tokenizer import train_tokenizer
    from llmprune.conversion.commands import convert
    from llmprune.data.prepared import PreparedData
    from llmprune.evaluation.references import references
    from llmprune.models.placement import Placement
    from llmprune.reporting.page import write_report

    stages = Stages(out)
    data, base, pruned = out / "data", out / "base", out / "pruned"
    common = [f"data.path={data}", f"run.seed={seed}"]
    mixed = [*common, f"dynamic_loading.references={out}/references.json"]
    yamls = {path.name: path.read_text() for path in sorted((ROOT / "studies" / "small").glob("*.yaml"))}

    stages.run(
        "corpus", MEGABYTES, [out / "corpus"], lambda: _ignore(build_corpus(out / "corpus", megabytes=MEGABYTES))
    )
    stages.run(
        "tokenizer",
        VOCABULARY,
        [out / "tokenizer"],
        lambda: _ignore(train_tokenizer([out / "corpus"], out / "tokenizer", vocab_size=VOCABULARY, megabytes=8)),
    )
    settings = PackSettings(SEQUENCE_LENGTH, eval_fraction=0.06)
    stages.run(
        "data", asdict(settings), [data], lambda: _ignore(prepare([out / "corpus"], out / "tokenizer", data, settings))
    )

    def pretrain() -> None:
        train_here("pretrain.yaml", [*common, f"run.folder={out}/pretrain"])
        convert(out / "pretrain", base)

    def prune() -> None:
        prune_by_launcher([*mixed, f"model.path={base}", f"run.folder={out}/prune"])
        convert(out / "prune", pruned)

    def recover() -> None:
        train_here("continue.yaml", [*mixed, f"model.path={pruned}", f"run.folder={out}/continue"])
        convert(out / "continue", out / "recovered")

    def scratch() -> None:
        train_here("pretrain.yaml", [*common, f"run.folder={out}/from_scratch", *scratch_overrides(pruned, out)])
        convert(out / "from_scratch", out / "scratch")

    stages.run("pretrain", [seed, yamls["pretrain.yaml"]], [out / "pretrain", base], pretrain)
    stages.run(
        "references",
        EVAL_SAMPLES_PER_DOMAIN,
        [out / "references.json"],
        lambda: write_json(
            out / "references.json",
            references(
                [str(base)], PreparedData(data), Placement("float32"), samples_per_domain=EVAL_SAMPLES_PER_DOMAIN
            ),
        ),
    )
    stages.run("prune", [seed, yamls["prune.yaml"]], [out / "prune", pruned], prune)
    stages.run("continue", [seed, yamls["continue.yaml"]], [out / "continue", out / "recovered"], recover)
    stages.run("scratch", seed, [out / "from_scratch", out / "scratch"], scratch)
    stages.run("evaluate", EVAL_SAMPLES_PER_DOMAIN, [out / "evaluation.json"], lambda: evaluate(out, data))
    found = [out / name for name in ("results.json", "results.samples", "speed.json")]
    stages.run("measure", EVAL_SAMPLES_PER_DOMAIN, found, lambda: measure(out, data))
    stages.run(
        "report", PROMPTS_PER_DOMAIN, [out / "report.html"], lambda: _ignore(write_report([out], out / "report.html"))
    )
    summary = {**read_json(out / "evaluation.json"), "seed": seed, "seconds": stages.seconds}
    write_json(out / "summary.json", summary)
    return summary


def scratch_overrides(pruned: Path, out: Path) -> list[str]:
    """Overrides for training from scratch: the pruned model's shape, and the total batches of pruning and recovery."""
    from llmprune.config.job_files import load_training_job

    config = read_json(pruned / "config.json")
    fields = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    batches = sum(
        int(load_training_job(out / run / "config.yaml").train.duration.removesuffix("ba"))
        for run in ("prune", "continue")
    )
    return [*(f"model.config.{field}={config[field]}" for field in fields), f"train.duration={batches}ba"]


def evaluate(out: Path, data: Path) -> None:
    """Measure the four models, and compare the gated checkpoint with its export."""
    from llmprune.conversion.verify import compare_models, open_for_comparison
    from llmprune.data.prepared import PreparedData
    from llmprune.evaluation.losses import evaluate_losses
    from llmprune.models.loading import load_model

    folders = {name: out / name for name in ("base", "pruned", "recovered", "scratch")}
    losses, parameters = {}, {}
    for name, folder in folders.items():
        model = load_model(folder)
        losses[name] = evaluate_losses(model, PreparedData(data), samples_per_domain=EVAL_SAMPLES_PER_DOMAIN)
        parameters[name] = sum(p.numel() for p in model.parameters())
    difference = compare_models(open_for_comparison(out / "prune"), open_for_comparison(folders["pruned"]))
    write_json(
        out / "evaluation.json",
        {
            "base_params": parameters["base"],
            "pruned_params": parameters["pruned"],
            **{f"{name}_loss": found.loss for name, found in losses.items()},
            "domains": {name: found.domains for name, found in losses.items()},
            "gated_minus_cut": asdict(difference),
        },
    )


def measure(out: Path, data: Path) -> None:
    """Evaluate and measure the models, as ``llmprune evaluate`` and ``llmprune measure`` do."""
    from llmprune.evaluation.evaluate import evaluate as evaluate_models
    from llmprune.evaluation.settings import EvaluationConfig, GenerationConfig, PerplexityConfig
    from llmprune.measurement.measure import MeasureConfig
    from llmprune.measurement.measure import measure as measure_models
    from llmprune.measurement.results import save
    from llmprune.models.placement import Placement

    models = [str(out / name) for name in ("base", "pruned", "recovered")]
    prompts, placement = out / "prompts.jsonl", Placement()
    write_prompts(data, prompts)
    config = EvaluationConfig(
        texts=[str(data)],
        perplexity=PerplexityConfig(SEQUENCE_LENGTH, bos=("once", "each"), samples_per_domain=EVAL_SAMPLES_PER_DOMAIN),
        prompts=str(prompts),
        generation=GenerationConfig(max_new_tokens=48),
    )
    results = evaluate_models(models, config, placement, out / "results.samples")
    quoted = shlex.join(models)
    results["command"] = (
        f"llmprune evaluate {quoted} --perplexity {data} --segment {SEQUENCE_LENGTH} --bos once,each "
        f"--samples-per-domain {EVAL_SAMPLES_PER_DOMAIN} --prompts {prompts} --max-new-tokens 48 --out ANOTHER.json"
    )
    write_json(out / "results.json", results)
    speed, watch = measure_models(models, MeasureConfig((1, 8), output_tokens=(64,), warmups=2, repeats=7), placement)
    speed["command"] = (
        f"llmprune measure {quoted} --batch-sizes 1,8 --output-tokens 64 --warmups 2 --repeats 7 --out ANOTHER.json"
    )
    save(speed, watch, out / "speed.json")


def write_prompts(data: Path, path: Path) -> None:
    """Write the first tokens of some evaluation samples as prompts, and their continuations as references."""
    from llmprune.data.dataset import EvalDataset
    from llmprune.data.prepared import PreparedData
    from llmprune.models.loading import load_tokenizer

    tokenizer, samples = load_tokenizer(data / "tokenizer"), EvalDataset(PreparedData(data), PROMPTS_PER_DOMAIN)
    texts = [samples[place]["input_ids"] for place in range(len(samples))]
    parts = [(tokenizer.decode(t[:32]), tokenizer.decode(t[32:80])) for t in texts]
    lines = [json.dumps({"prompt": prompt, "reference": reference}) + "\n" for prompt, reference in parts]
    path.write_text("".join(lines), encoding="utf-8")


def show(summary: dict[str, Any], out: Path) -> None:
    """Print the table."""
    rows = {
        "base": ("base", summary["base_params"]),
        "pruned": ("pruned (cut, not yet recovered)", summary["pruned_params"]),
        "recovered": ("recovered", summary["pruned_params"]),
        "scratch": ("same shape and tokens from scratch", summary["pruned_params"]),
    }
    domains = sorted(summary["domains"]["base"])
    print(f"\n{'model':36}{'parameters':>12}{'loss':>9}" + "".join(f"{name:>12}" for name in domains))
    for name, (label, parameters) in rows.items():
        found = summary["domains"][name]
        print(
            f"{label:36}{parameters:12,}{summary[f'{name}_loss']:9.4f}" + "".join(f"{found[d]:12.4f}" for d in domains)
        )
    speed = read_json(out / "speed.json")["models"][str(out / "recovered")]
    times = [entry["speedup"]["p50"] for entry in speed["generation"]]
    ratios = " and ".join(f"{ratio:.2f}" for ratio in times)
    print(f"\nThe recovered model generates {ratios} times as fast as the base (batch 1 and 8).")
    print(f"It is {out}/recovered; figures and seconds per stage: {out}/summary.json")
    print(f"Everything that was done, in pictures: {out}/report.html")


def _ignore(_: object) -> None:
    """Discard a value, because the work of a stage returns nothing."""


def main() -> int:
    """Run the workflow; a mistake of the user is one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/small"), help="folder of all results")
    parser.add_argument("--seed", type=int, default=17, help="of weights, data order and gates")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("composer").setLevel(logging.ERROR)
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        show(journey(arguments.out, arguments.seed), arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print("error: pruning failed; see its message above", file=sys.stderr)
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
