"""What `llmprune estimate` says against what a run takes."""

import gc
import os
import tempfile
from pathlib import Path

from benchmarks.ratios import Ratio, in_fresh_process, peak_of

ROOT = Path(__file__).resolve().parents[2]
KINDS = {
    "all weights": [],
    "two microbatches": ["train.microbatch_size=4"],
    "activation checkpointing": ["train.activation_checkpointing=true"],
    "gates": ["l0_pruning={target: {hidden: 384, intermediate: 1024}}"],
    "last two blocks": ["trainable={parameters: [last.2]}"],
    "a teacher": ["distillation={teacher: TEACHER, dtype: float32}"],
    "a teacher's states": ["distillation={teacher: TEACHER, dtype: float32, objectives: {kl: 1.0, mse: 1.0}}"],
    "adapters": ["lora={}"],
}
# Blocks of freed memory go back to the system, so that what is resident is what is in use.
STRICT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def estimate_memory(runs: int) -> Ratio:
    """Peak memory of training jobs over the estimate, without its share for fragmentation: the furthest from one."""
    before = {name: os.environ.get(name) for name in STRICT}
    os.environ.update(STRICT)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            in_fresh_process(_prepare, folder)
            ratios = {kind: in_fresh_process(measured_over_estimated, folder, kind) for kind in KINDS}
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    furthest = max(ratios.values(), key=lambda ratio: max(ratio, 1 / ratio))
    each = ", ".join(f"{kind} {ratio:.3f}" for kind, ratio in ratios.items())
    words = f"peak memory of a run / its estimate, 12 blocks of 512 hidden dimensions ({each})"
    return Ratio(max(furthest, 1 / furthest), min(ratios.values()), max(ratios.values()), 1.15, words)


def _prepare(folder: Path) -> None:
    from data_prep.builtin import build_corpus
    from data_prep.pack import prepare
    from data_prep.recipe import PackSettings
    from data_prep.tokenizer import train_tokenizer
    from llmprune.models.loading import load_tokenizer, new_model

    build_corpus(folder / "corpus", megabytes=1)
    train_tokenizer([folder / "corpus"], folder / "tokenizer", vocab_size=4096)
    prepare([folder / "corpus"], folder / "tokenizer", folder / "data", PackSettings(128))
    for name, blocks in (("small", 1), ("large", 12)):
        new_model(_config(blocks), seed=0).save_pretrained(folder / name)
        load_tokenizer(folder / "tokenizer").save_pretrained(folder / name)


def _config(blocks: int):  # type: ignore[no-untyped-def] # transformers is not typed
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )


def measured_over_estimated(folder: Path, kind: str) -> float:
    """The ratio of one kind of job, in a process that has done a small one of the same kind."""
    from llmprune.config.job_files import load_training_job
    from llmprune.estimate.job import Cluster, estimate_job
    from llmprune.training.trainer import build_trainer

    def job(model: str):  # type: ignore[no-untyped-def]
        overrides = [
            f"run.folder={folder}/run",
            "run.overwrite=true",
            f"model.path={folder}/{model}",
            f"data.path={folder}/data",
            "train.precision=fp32",
            "train.global_batch_size=8",
            "train.duration=2ba",
            "train.microbatch_size=8",
            "train.eval_interval=0ba",
            "checkpoint.interval=100ba",
            *KINDS[kind],
        ]
        if model == "small":
            overrides = [o.replace("last.2", "last.1") for o in overrides]
        return load_training_job(
            ROOT / "yamls" / "continue.yaml", [o.replace("TEACHER", f"{folder}/{model}") for o in overrides]
        )

    kept = []

    def train(model: str) -> None:
        trainer = build_trainer(job(model))
        for callback in list(trainer.state.callbacks):
            if type(callback).__name__ in (
                "CheckpointSaver",
                "CheckpointUploading",
            ):  # what saving takes is not counted
                trainer.state.callbacks.remove(callback)
        trainer.fit()
        kept.append(trainer)

    train("small")
    kept.clear()
    gc.collect()
    peak = peak_of(lambda: train("large"))
    found = estimate_job(job("large"), Cluster(1, 1e12, device="cpu"))
    wasted = found.memory["lost to fragmentation, and libraries"]
    return peak / (found.total - wasted)
