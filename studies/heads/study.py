"""Fewer blocks with richer heads, or more plain ones? Eight models from random weights, compared (docs/heads.md).

All learn from the same samples in the same order. A second run goes on where the first was stopped, and nothing is
overwritten. What comes out is OUT/report.md with six pictures, and every number after them as JSON.
"""

import argparse
import itertools
import json
import logging
import math
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmprune.utils.errors import UserError
from llmprune.utils.files import read_json, sha256_text, write_json, write_text

ROOT = Path(__file__).resolve().parents[2]
MODELS = [f"{kind}_{blocks}" for blocks in (5, 6, 7, 8) for kind in ("plain", "richer")]
COLOURS = {"plain": "#2f7ed8", "richer": "#e07b39"}


@dataclass(frozen=True)
class Size:
    """How large the study is.

    Attributes:
        config: fields of the models' config that differ from the published ones.
        train: the same of other sections of the YAMLs, as overrides.
        vocabulary: of the tokenizer of the built-in corpus; None = data must be named.
        length: tokens of a sample.
        megabytes: of the built-in corpus.
        eval_samples: of each domain at most.
        prompts: continuations that are written.
        output_tokens: of each, and of what is timed.
        repeats: runs that are timed.
    """

    config: Mapping[str, int]
    train: Sequence[str]
    vocabulary: int | None
    length: int
    megabytes: float = 16.0
    eval_samples: int = 100
    prompts: int = 64
    output_tokens: int = 64
    repeats: int = 20


SIZES = {
    "small": Size(
        {"hidden_size": 192, "num_attention_heads": 6, "intermediate_size": 512, "max_position_embeddings": 256},
        (
            "train.duration=500ba",
            "train.global_batch_size=8",
            "train.microbatch_size=8",
            "train.precision=fp32",
            "train.eval_interval=100ba",
            "optimizer.lr=2e-3",
            "scheduler.warmup=0.1dur",
            "data.workers=0",
            "data.eval_samples_per_domain=32",
            "checkpoint.interval=100ba",
        ),
        vocabulary=4096,
        length=128,
    ),
    "published": Size({}, (), vocabulary=None, length=512, eval_samples=1000, prompts=256, output_tokens=128),
}


class Study:
    """Trains and measures, model by model."""

    def __init__(self, size: Size, out: Path, data: Path | None, prompts: Path | None) -> None:
        """Work in ``out``.

        Raises:
            UserError: ``out`` holds something else, a study of another size or of other data, no data are named, or the
                prompts can't be read.
        """
        from llmprune.evaluation.continuations import read_prompts

        if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "study.json").exists())):
            raise UserError(f"{out} holds something that is no study: choose another --out")
        if prompts is not None:
            read_prompts(prompts)
        if data is None and size.vocabulary is None:
            raise UserError(f"name data of {size.length} tokens a sample with --data (python -m data_prep tokenize)")
        self._size, self._out, self._prompts = size, out, prompts
        if data is not None:
            self._check_length(data)
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "study.json").exists():
            write_json(out / "study.json", {})  # marks the folder; its data may still have to be made
        self._data = data or self._corpus()
        self._check()

    def _check_length(self, data: Path) -> None:
        from llmprune.data.prepared import PreparedData

        if (length := PreparedData(data).manifest.sequence_length) != self._size.length:
            raise UserError(f"the samples in {data} have {length} tokens; this size takes {self._size.length}")

    def _check(self) -> None:
        """See that the folder holds this study, or nothing yet."""
        from llmprune.data.prepared import PreparedData

        self._check_length(self._data)
        prompts = None if self._prompts is None else sha256_text(self._prompts.read_text(encoding="utf-8"))
        data = PreparedData(self._data).manifest.fingerprint()
        identity = json.loads(json.dumps({**asdict(self._size), "data": data, "prompts_file": prompts}))
        path = self._out / "study.json"
        if (known := read_json(path)) not in ({}, identity):
            different = [key for key in identity if known.get(key) != identity[key]]
            raise UserError(
                f"{self._out} holds a study with other settings ({', '.join(different)}): choose another --out"
            )
        write_json(path, identity)

    def _corpus(self) -> Path:
        """The built-in corpus, prepared."""
        from data_prep.builtin import build_corpus
        from data_prep.pack import prepare
        from data_prep.recipe import PackSettings
        from data_prep.tokenizer import train_tokenizer

        corpus, tokenizer, data = (self._out / name for name in ("corpus", "tokenizer", "data"))
        if not data.exists():
            if not corpus.exists():
                build_corpus(corpus, megabytes=self._size.megabytes)
            if not tokenizer.exists():
                train_tokenizer([corpus], tokenizer, vocab_size=self._size.vocabulary or 0, megabytes=8)
            prepare([corpus], tokenizer, data, PackSettings(self._size.length, eval_fraction=0.06))
        return data

    def train(self, name: str) -> None:
        """Train a model, if that is not done yet."""
        from llmprune.config.job_files import load_training_job
        from llmprune.conversion.commands import convert
        from llmprune.jobs.train import train

        place = self._out / name
        if (place / "model").exists():
            return
        fields = [f"model.config.{field}={value}" for field, value in self._size.config.items()]
        where = [f"run.folder={place}/run", "run.autoresume=true", f"data.path={self._data}", "loggers.console=false"]
        train(load_training_job(Path(__file__).parent / f"{name}.yaml", [*fields, *self._size.train, *where]))
        convert(place / "run", place / "model")

    def evaluate(self, name: str) -> dict[str, Any]:
        """What is measured of one model by itself."""
        from llmprune.checkpoints.metrics import read_metrics
        from llmprune.data.prepared import PreparedData
        from llmprune.evaluation.continuations import continuation_scores as scores
        from llmprune.evaluation.continuations import read_prompts, write_continuations
        from llmprune.evaluation.losses import evaluate_losses
        from llmprune.evaluation.settings import GenerationConfig
        from llmprune.models.loaded import open_model
        from llmprune.models.placement import Placement

        path = self._out / name / "results.json"
        if path.exists():
            found: dict[str, Any] = read_json(path)
            return found
        opened = open_model(str(self._out / name / "model"), Placement("float32"))
        losses = evaluate_losses(opened.model, PreparedData(self._data), samples_per_domain=self._size.eval_samples)
        sets = {"held-out text": self._own_prompts()}
        if self._prompts is not None:
            sets[self._prompts.stem] = self._prompts
        continuations = {}
        for title, file in sets.items():
            prompts = read_prompts(file)
            for manner, temperature in (("greedy", 0.0), ("sampled", 0.6)):
                config = GenerationConfig(self._size.output_tokens, temperature, 0.9)
                continuations[f"{title}, {manner}"] = scores(write_continuations(opened, prompts, config))
        speeds = [v for m in read_metrics(self._out / name / "run" / "metrics.jsonl") if (v := m.get(_SPEED))]
        batches = int(self._duration().removesuffix("ba"))
        found = {
            "parameters": opened.parameters,
            "blocks": int(name.partition("_")[2]),
            "kind": name.partition("_")[0],
            "loss": losses.loss,
            "perplexity": math.exp(losses.loss),
            "domains": losses.domains,
            "continuations": continuations,
            # At the median speed, so that what ran beside it or stopped it does not count.
            "training_s": batches / statistics.median(speeds) if speeds else None,
        }
        write_json(path, found)
        return found

    def _duration(self) -> str:
        from llmprune.config.job_files import load_training_job

        duration = [o for o in self._size.train if o.startswith("train.duration")]
        return load_training_job(
            Path(__file__).parent / "plain_5.yaml", [*duration, f"data.path={self._data}"]
        ).train.duration

    def _own_prompts(self) -> Path:
        """The first 30 % of held-out samples, and what they go on with."""
        from llmprune.data.dataset import EvalDataset
        from llmprune.data.prepared import PreparedData
        from llmprune.models.loading import load_tokenizer

        path = self._out / "prompts.jsonl"
        if not path.exists():
            tokenizer = load_tokenizer(self._data / "tokenizer")
            samples = EvalDataset(PreparedData(self._data), self._size.prompts)
            places = [round(n * len(samples) / self._size.prompts) for n in range(self._size.prompts)]
            cut, lines = round(0.3 * self._size.length), []
            for place in sorted({min(place, len(samples) - 1) for place in places}):
                tokens = samples[place]["input_ids"]
                end = cut + self._size.output_tokens
                texts = {"prompt": tokenizer.decode(tokens[:cut]), "reference": tokenizer.decode(tokens[cut:end])}
                if all(text.strip() for text in texts.values()):
                    lines.append(json.dumps(texts))
            write_text(path, "\n".join(lines) + "\n")
        return path

    def speeds(self) -> dict[str, Any]:
        """How long all models take, in turns."""
        from llmprune.measurement.measure import MeasureConfig, measure
        from llmprune.measurement.results import save
        from llmprune.models.placement import Placement

        path = self._out / "speed.json"
        if not path.exists():
            folders = {str(self._out / name / "model"): name for name in MODELS}
            config = MeasureConfig(
                (1,), (32,), (self._size.output_tokens,), warmups=3, repeats=self._size.repeats, uncached=True
            )
            found, watch = measure(list(folders), config, Placement("float32"))
            found["models"] = {folders[folder]: entry for folder, entry in found["models"].items()}
            save(found, watch, path)
        speeds: dict[str, Any] = read_json(path)["models"]
        return speeds


_SPEED = "throughput/batches_per_sec"
CACHED, UNCACHED = 0, 1  # places in speed.json's generation


def at_equal(rows: Mapping[str, Mapping[str, Any]], name: str, cost: str) -> float | None:
    """The loss that plain models would have at a richer model's cost, in a line between the nearest two.

    None where no plain model is as cheap, or none as dear.
    """
    plain = sorted((row[cost], row["loss"]) for row in rows.values() if row["kind"] == "plain")
    wanted = rows[name][cost]
    for (low, above), (high, below) in itertools.pairwise(plain):
        if low <= wanted <= high:
            return float(above + (below - above) * (wanted - low) / (high - low))
    return None


def report(rows: Mapping[str, Mapping[str, Any]], size: str, out: Path) -> str:
    """The table and what it comes to, as Markdown; the pictures lie beside it."""
    sets = list(next(iter(rows.values()))["continuations"])
    lines = [
        f"# Richer heads against more blocks, size {size}",
        "",
        "| model | parameters | loss | perplexity | ms, cached | ms, uncached | training, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        times = [_spread(row[key]) for key in ("cached", "uncached")]
        lines.append(
            f"| {name} | {row['parameters']:,} | {row['loss']:.4f} | {row['perplexity']:.2f} | {times[0]} | "
            f"{times[1]} | {'' if row['training_s'] is None else format(row['training_s'], '.0f')} |"
        )
    lines += ["", "Continuations, in percent:", ""]
    lines += [
        "| model | prompts | BLEU | ROUGE-1 | ROUGE-2 | ROUGE-L | edit similarity |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        for title in sets:
            found = row["continuations"][title]
            keys = ("bleu", "rouge1", "rouge2", "rougeL", "edit_similarity")
            lines.append(f"| {name} | {title} | " + " | ".join(f"{found[key]:.2f}" for key in keys) + " |")
    lines += ["", "Losses of richer models, and what plain ones would have at the same cost:", ""]
    lines += ["| model | loss | plain, as many parameters | plain, as long to generate |", "|---|---|---|---|"]
    for name, row in rows.items():
        if row["kind"] == "richer":
            cells = []
            for cost in ("parameters", "latency"):
                other = at_equal(rows, name, cost)
                cells.append("" if other is None else f"{other:.4f} ({row['loss'] - other:+.4f})")
            lines.append(f"| {name} | {row['loss']:.4f} | {' | '.join(cells)} |")
    lines += [""] + [f"![{title}]({file}.png)" for file, title in draw(rows, out).items()]
    return "\n".join(lines) + "\n"


def _spread(seconds: Mapping[str, float]) -> str:
    inner = ", ".join(f"{key} {seconds[key] * 1e3:.1f}" for key in ("p5", "p50", "p95"))
    return f"{seconds['mean'] * 1e3:.1f} ± {seconds['std'] * 1e3:.1f} ({inner})"


def draw(rows: Mapping[str, Mapping[str, Any]], out: Path) -> dict[str, str]:
    """The six pictures; their files and titles."""
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    def curve(axes: Axes, of: str, y: Any, **style: Any) -> None:
        points = [(row["blocks"], y(row)) for row in rows.values() if row["kind"] == of]
        axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[of], label=of, **style)

    def perplexity(axes: Axes) -> None:
        for kind in COLOURS:
            curve(axes, kind, lambda row: row["perplexity"])
        axes.set_ylabel("perplexity of held-out text")

    def quality(axes: Axes) -> None:
        for key, style in (("bleu", "-"), ("rougeL", "--"), ("edit_similarity", ":")):
            for kind in COLOURS:
                curve(axes, kind, lambda row, key=key: row["continuations"]["held-out text, sampled"][key], ls=style)
        axes.set_ylabel("percent: BLEU (line), ROUGE-L (dashed), edit similarity (dotted)", fontsize=7)

    def times(key: str) -> Any:
        def work(axes: Axes) -> None:
            for kind in COLOURS:
                chosen = [row for row in rows.values() if row["kind"] == kind]
                middle = [1e3 * row[key]["p50"] for row in chosen]
                bars = [
                    [m - 1e3 * row[key]["p5"] for m, row in zip(middle, chosen, strict=True)],
                    [1e3 * row[key]["p95"] - m for m, row in zip(middle, chosen, strict=True)],
                ]
                blocks = [row["blocks"] + (0.06 if kind == "richer" else -0.06) for row in chosen]
                axes.errorbar(blocks, middle, bars, fmt="o-", color=COLOURS[kind], capsize=3, label=kind)
            axes.set_ylabel("ms: median, 5 to 95 %")

        return work

    def training(axes: Axes) -> None:
        for kind in COLOURS:
            curve(axes, kind, lambda row: row["training_s"] or math.nan)
        axes.set_ylabel("seconds")

    def trade_off(axes: Axes) -> None:
        for name, row in rows.items():
            axes.plot(row["latency"] * 1e3, row["perplexity"], "o", color=COLOURS[row["kind"]])
            axes.annotate(name, (row["latency"] * 1e3, row["perplexity"]), xytext=(4, 4), textcoords="offset points")
        axes.margins(0.15)
        axes.set_xlabel("ms to generate (cached)")
        axes.set_ylabel("perplexity of held-out text")

    pictures = {
        "perplexity": ("Perplexity", perplexity),
        "continuations": ("Continuations", quality),
        "time_cached": ("Inference time with a cache", times("cached")),
        "time_uncached": ("Inference time without a cache", times("uncached")),
        "training_time": ("Training time", training),
        "trade_off": ("Perplexity against inference time", trade_off),
    }
    for file, (title, work) in pictures.items():
        figure = Figure(figsize=(5, 3.4), layout="constrained")
        axes = figure.add_subplot(title=title)
        work(axes)
        if not axes.get_xlabel():
            axes.set_xlabel("blocks")
            axes.set_xticks(sorted({row["blocks"] for row in rows.values()}))
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        if handles:
            axes.legend(handles.values(), handles.keys(), frameon=False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.savefig(out / f"{file}.png", dpi=130)
    return {file: title for file, (title, _) in pictures.items()}


def run(size: str, out: Path, data: Path | None = None, prompts: Path | None = None) -> None:
    """The whole study.

    Raises:
        UserError: see ``Study``.
    """
    study = Study(SIZES[size], out, data, prompts)
    rows: dict[str, dict[str, Any]] = {}
    for name in MODELS:
        study.train(name)
        rows[name] = study.evaluate(name)
        print(f"{name}: {rows[name]['parameters']:,} parameters, loss {rows[name]['loss']:.4f}", flush=True)
    for name, speed in study.speeds().items():
        times = [entry["latency_s"] for entry in speed["generation"]]
        rows[name] |= {"cached": times[CACHED], "uncached": times[UNCACHED], "latency": times[CACHED]["p50"]}
    write_json(out / "results.json", rows)
    text = report(rows, size, out)
    write_text(out / "report.md", text)
    print(text)


def main() -> int:
    """Run the study; a mistake of the user's is one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--data", type=Path, help="prepared data; default: the built-in corpus (small)")
    parser.add_argument("--prompts", type=Path, help="JSON lines with prompt and reference to go on from as well")
    parser.add_argument("--out", type=Path, default=Path("runs/study_heads"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("composer").setLevel(logging.ERROR)
    try:
        run(arguments.size, arguments.out, arguments.data, arguments.prompts)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
