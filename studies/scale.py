"""Every kind of job on one rank and on two, whole and sharded: are the losses the same, how fast, how much memory?

Each job trains 20 batches, whose losses are compared with those of one rank. In processes of their own, whose freed
memory goes back to the system at once, it trains four more for the peak memory of a rank, which is compared with what
``llmprune estimate`` says without its share for fragmentation; a run of one batch before that is not counted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from composer.core import State
    from composer.loggers import Logger

ROOT = Path(__file__).resolve().parents[1]
BATCHES = 20
JOBS = {
    "continue": [],
    "prune": ["l0_pruning={target: {layers: 4, hidden: 256, heads: 6, intermediate: 768}, lagrangian_warmup: 10ba}"],
    "replace": ["block_replacement={start: 2, length: 3, kind: blocks}"],
    "last two blocks": ["trainable={parameters: [last.2]}"],
    "LoRA": ["lora={dropout: 0.0}"],
    "distillation": ["distillation={teacher: OUT/teacher, dtype: float32}"],
}
SETTINGS = {"one": (1, []), "whole": (2, []), "sharded": (2, ["sharding={}", "train.activation_checkpointing=true"])}
CONFIG = """
run: {name: scale, folder: OUT/run, seed: 3, overwrite: true}
model: {path: OUT/model}
data: {path: OUT/data, eval_samples_per_domain: 4}
dynamic_loading: null
optimizer: {lr: 1.0e-3}
scheduler: {warmup: 3ba}
train: {duration: 20ba, global_batch_size: 8, microbatch_size: 2, eval_interval: 0ba}
checkpoint: {interval: 1000ba}
loggers: {console: false}
"""


def prepare(out: Path) -> None:
    """Make data and a model of six blocks with 384 hidden dimensions."""
    from transformers import LlamaConfig

    from data_prep.builtin import build_corpus
    from data_prep.pack import prepare as prepare_data
    from data_prep.recipe import PackSettings
    from data_prep.tokenizer import train_tokenizer
    from llmprune.models.loading import load_tokenizer, new_model

    build_corpus(out / "corpus", megabytes=1, overwrite=True)
    train_tokenizer([out / "corpus"], out / "tokenizer", vocab_size=4096, overwrite=True)
    prepare_data([out / "corpus"], out / "tokenizer", out / "data", PackSettings(128), overwrite=True)
    sizes = {"vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1152, "num_attention_heads": 8}
    config = LlamaConfig(**sizes, num_hidden_layers=6, tie_word_embeddings=True)
    for seed, name in enumerate(("model", "teacher")):
        new_model(config, seed=seed).save_pretrained(out / name)
        load_tokenizer(out / "tokenizer").save_pretrained(out / name)
    (out / "job.yaml").write_text(CONFIG.replace("OUT", str(out)))


def run_all(out: Path, setting: str, what: str) -> None:
    """Do every job in this rank, and write what was seen: its speed and losses, or its memory."""
    import gc

    from benchmarks.ratios import peak_of  # of scripts/, which the command that starts the ranks puts on the path
    from composer import Callback
    from composer.utils import dist

    from llmprune.callbacks.l0_pruning import L0Pruning
    from llmprune.checkpoints.metrics import read_metrics
    from llmprune.config.job_files import load_training_job
    from llmprune.estimate.job import Cluster, estimate_job
    from llmprune.training import trainer as training

    class Clock(Callback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def batch_start(self, state: "State", logger: "Logger") -> None:
            self._start = time.perf_counter()

        def batch_end(self, state: "State", logger: "Logger") -> None:
            self.seconds.append(time.perf_counter() - self._start)

    # Noise is drawn for every microbatch of every rank: the same for all, so that ranks make no difference.
    L0Pruning.noise_key = lambda self, batch, microbatch, rank: (self.seed, batch)  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    for job, changes in JOBS.items():
        settings = [*(change.replace("OUT", str(out)) for change in changes), *SETTINGS[setting][1]]
        config = load_training_job(out / "job.yaml", [*settings, f"run.folder={out}/{setting}-{job}".replace(" ", "-")])
        clock = Clock()
        kept: list[Any] = []

        def train(duration: str, config: Any = config, clock: Clock = clock, kept: list[Any] = kept) -> None:
            config.train.duration = duration
            trainer = training.build_trainer(config)
            for callback in list(trainer.state.callbacks):
                if type(callback).__name__ in (
                    "CheckpointSaver",
                    "CheckpointUploading",
                ):  # saving is not looked at here
                    trainer.state.callbacks.remove(callback)
            trainer.state.callbacks.append(clock)
            trainer.fit()
            trainer.close()
            kept.append(trainer)

        ranks = dist.get_world_size()
        if what == "speed":
            train(f"{BATCHES}ba")
            lines = read_metrics(Path(config.run.folder) / "metrics.jsonl")
            found[job] = {
                "losses": [line["loss/train/total"] for line in lines if "loss/train/total" in line],
                "tokens_per_s": 8 * 128 / ranks / statistics.median(clock.seconds[3:]),
            }
            continue
        train("1ba")
        kept.clear()
        gc.collect()
        peak = peak_of(lambda: train("4ba"))  # it is called here
        kept.clear()
        estimate = estimate_job(config, Cluster(ranks, 1e12, ranks, device="cpu"))
        found[job] = {
            "peak_bytes": peak,
            "estimated_bytes": estimate.total - estimate.memory["lost to fragmentation, and libraries"],
        }
    (out / f"{setting}-{what}.{dist.get_global_rank()}.json").write_text(json.dumps(found))


def table(out: Path) -> str:
    """What all ranks have seen, as Markdown."""
    titles = (
        "job", "ranks", "sharded", "largest difference of a loss", "tokens/s of a rank", "in all", "peak memory",
        "measured / estimated",
    )  # fmt: skip
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]

    def seen(setting: str, job: str) -> list[dict[str, Any]]:
        names = [
            (f"{setting}-speed.{rank}.json", f"{setting}-memory.{rank}.json") for rank in range(SETTINGS[setting][0])
        ]
        return [{k: v for name in pair for k, v in json.loads((out / name).read_text())[job].items()} for pair in names]

    for job in JOBS:
        alone = seen("one", job)[0]["losses"]
        for setting, (ranks, _) in SETTINGS.items():
            mine = seen(setting, job)
            losses = mine[0]["losses"]
            assert len(losses) == len(alone) == BATCHES, (job, setting, len(losses))
            difference = max(abs(a / b - 1) for a, b in zip(losses, alone, strict=True))
            speed = [rank["tokens_per_s"] for rank in mine]
            peak = max(mine, key=lambda rank: rank["peak_bytes"])
            cells = [
                job,
                str(ranks),
                "yes" if setting == "sharded" else "no",
                "" if setting == "one" else f"{difference:.1e}",
                f"{statistics.mean(speed):,.0f}",
                f"{sum(speed):,.0f}",
                f"{peak['peak_bytes'] / 1e6:,.0f} MB",
                f"{peak['peak_bytes'] / peak['estimated_bytes']:.3f}",
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def main() -> int:
    """Run every job in every setting, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scale"))
    parser.add_argument("--as-rank", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    if arguments.as_rank is not None:
        setting, what = arguments.as_rank
        run_all(out, setting, what)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    prepare(out)
    path = os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])
    given_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for setting, (ranks, _) in SETTINGS.items():
        launcher = [str(Path(sys.executable).parent / "composer"), "-n", str(ranks), str(Path(__file__).resolve())]
        for what, memory in (("speed", {}), ("memory", given_back)):
            command = [*launcher, "--out", str(out), "--as-rank", setting, what]
            subprocess.run(command, env={**os.environ, **memory, "PYTHONPATH": path}, check=True)
    (out / "scale.md").write_text(table(out))
    print(table(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
