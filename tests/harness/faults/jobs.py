"""Small jobs of every kind, which end in the same bytes whenever nothing disturbs them."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llmprune.utils.checksums import verify_checksums

MODEL = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 300, "max_position_embeddings": 128,
    "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
WORDS = {"animals": ("ant", "bee", "cow"), "letters": ("alpha", "beta", "gamma"), "numbers": ("one", "two", "three")}
BATCHES = 12
CONFIG = f"""
run: {{name: faults, folder: nowhere, seed: 3, autoresume: true}}
model: {{path: MODEL}}
data: {{path: DATA, eval_samples_per_domain: 4}}
dynamic_loading: {{references: {{animals: 1.0, letters: 3.0, numbers: 2.0}}, eta: 0.1, update_delay: 4}}
optimizer: {{lr: 1.0e-3}}
scheduler: {{warmup: 3ba}}
train: {{duration: {BATCHES}ba, global_batch_size: 8, microbatch_size: 4, eval_interval: 3ba}}
checkpoint: {{interval: 2ba}}
loggers: {{console: false}}
"""
ROUNDS = """
base: job.yaml
job: iterate
iterate: {rounds: 2}
plan:
  shape: {layers: 3, hidden: 24}
  criterion: block_influence
  unit_criterion: unit_taylor
  correction: refit
layer_scoring: {data: {samples: 6, length: 24}}
train: {duration: 4ba}
"""
TRAINING = {  # kind: overrides
    "pretrain": ["model.path=null", f"model.config={json.dumps(MODEL)}"],
    "continue": [],
    "prune": ["l0_pruning={target: {layers: 3, hidden: 24, heads: 4}, lagrangian_warmup: 4ba, gate_lr: 0.05}"],
    "replace": ["block_replacement={start: 1, length: 2, kind: swiglu, intermediate: 16}"],
    "parts": ["trainable={parameters: [final_norm, last.1], later: {3ba: [norms], 6ba: [all]}}"],
    "lora": ["lora={dropout: 0.3}"],
    "distil": ["distillation={teacher: MODEL, objectives: {kl: 1.0}, final_objectives: {lm: 1.0}, dtype: float32}"],
    "rounds": [],
}


@dataclass(frozen=True)
class Job:
    """A kind of job.

    Attributes:
        name: of the kind.
        run: does it in a folder, or goes on with what is there, given the folder of inputs and overrides.
        digest: of what has come out.
        trains: whether it is a run with checkpoints.
    """

    name: str
    run: Callable[[Path, Path, list[str]], None]
    digest: Callable[[Path], str]
    trains: bool = True


def prepare(inputs: Path) -> None:
    """Make text, tokenizer, data, a model and the YAML, unless they are there."""
    from data_prep.pack import prepare as prepare_data
    from data_prep.recipe import PackSettings
    from data_prep.tokenizer import train_tokenizer
    from llmprune.models.loading import load_tokenizer, new_model
    from llmprune.utils.files import write_text

    if (inputs / "job.yaml").exists():
        return
    for domain, words in WORDS.items():
        texts = (" ".join(f"{w} {number}.{place}" for place in range(5) for w in words) for number in range(120))
        (inputs / "corpus" / domain).mkdir(parents=True, exist_ok=True)
        write_text(inputs / "corpus" / domain / "part.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts))
    train_tokenizer([inputs / "corpus"], inputs / "tokenizer", vocab_size=300, overwrite=True)
    settings = PackSettings(32, eval_fraction=0.2)
    prepare_data([inputs / "corpus"], inputs / "tokenizer", inputs / "data", settings, processes=1, overwrite=True)
    new_model(_config(), seed=3).save_pretrained(inputs / "model")
    load_tokenizer(inputs / "tokenizer").save_pretrained(inputs / "model")
    write_text(inputs / "rounds.yaml", ROUNDS)
    write_text(inputs / "job.yaml", CONFIG.replace("MODEL", f"{inputs}/model").replace("DATA", f"{inputs}/data"))


def _config():  # type: ignore[no-untyped-def] # transformers is not typed
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[str(MODEL["model_type"])](**MODEL)


def _train(kind: str) -> Callable[[Path, Path, list[str]], None]:
    def run(folder: Path, inputs: Path, more: list[str]) -> None:
        from llmprune.config.job_files import load_job
        from llmprune.config.schema import IterationConfig
        from llmprune.jobs.iterate import iterate
        from llmprune.jobs.train import train

        settings = [setting.replace("MODEL", f"{inputs}/model") for setting in TRAINING[kind]]
        yaml = inputs / ("rounds.yaml" if kind == "rounds" else "job.yaml")
        job = load_job(yaml, [*settings, f"run.folder={folder}", *more])
        if isinstance(job, IterationConfig):
            iterate(job)
        else:
            train(job)  # type: ignore[arg-type]

    return run


def _trained(folder: Path) -> str:
    """Of all tensors of the newest checkpoint, and of all losses on the way."""
    import torch

    from llmprune.conversion.checkpoint import Checkpoint

    opened, digest = Checkpoint.open(folder), hashlib.sha256()
    assert opened.batch == BATCHES, opened.path
    for name in sorted(opened.state):
        digest.update(name.encode() + opened.state[name].contiguous().view(torch.uint8).numpy().tobytes())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("loss/train/total", "metrics/eval/loss")
    digest.update(repr([(name, line[name]) for line in lines for name in names if name in line]).encode())
    return digest.hexdigest()


def _files(folder: Path, *names: str) -> str:
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()


def _export(folder: Path, inputs: Path, more: list[str]) -> None:
    """Cut the model by a plan."""
    from llmprune.conversion.commands import apply
    from llmprune.conversion.export import keep_everything
    from llmprune.models.loading import load_model_config
    from llmprune.models.stored_weights import StoredWeights, fingerprint
    from llmprune.plans.plan import Plan

    config = load_model_config(inputs / "model")
    whole = keep_everything(config, fingerprint(StoredWeights(inputs / "model"), config))
    plan = Plan(whole.family, whole.model, whole.source, whole.blocks[:3])
    if not (folder / "model").exists():
        apply(inputs / "model", plan, folder / "model")


def _exported(folder: Path) -> str:

    verify_checksums(folder / "model")
    return _files(folder, "model/model.safetensors", "model/config.json", "model/llmprune/plan.json")


def _pack(folder: Path, inputs: Path, more: list[str]) -> None:
    """Make shards of text."""
    from data_prep.pack import prepare as prepare_data
    from data_prep.recipe import PackSettings

    if not (folder / "data").exists():
        settings = PackSettings(32, eval_fraction=0.2)
        prepare_data([inputs / "corpus"], inputs / "tokenizer", folder / "data", settings, processes=1)


def _packed(folder: Path) -> str:
    from llmprune.data.prepared import PreparedData

    return PreparedData(folder / "data").manifest.fingerprint()


def _jobs() -> Iterator[Job]:
    for kind in TRAINING:
        if kind == "rounds":
            yield Job(kind, _train(kind), lambda folder: _files(folder, "model/model.safetensors"), trains=False)
        else:
            yield Job(kind, _train(kind), _trained)
    yield Job("export", _export, _exported, trains=False)
    yield Job("shards", _pack, _packed, trains=False)


JOBS = {job.name: job for job in _jobs()}
