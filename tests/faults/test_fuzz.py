"""Whatever stands in a file that the tool reads: it is read, or refused in one clear sentence."""

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_prep.describe import show_samples
from llmprune.config.job_files import load_job
from llmprune.conversion.checkpoint import Checkpoint
from llmprune.conversion.commands import apply
from llmprune.conversion.export import keep_everything
from llmprune.data.format import EVAL
from llmprune.data.prepared import PreparedData
from llmprune.evaluation.continuations import read_prompts
from llmprune.jobs.train import train
from llmprune.models.loading import load_model, load_model_config
from llmprune.models.stored_weights import StoredWeights, fingerprint
from llmprune.plans.plan import Plan
from llmprune.pruning.planning import make_plan
from llmprune.pruning.scoring.scores import Scores
from llmprune.pruning.selection.settings import PlanConfig
from llmprune.reporting.collect import collect
from llmprune.training.checks import check
from llmprune.utils.checksums import record, verify_checksums
from llmprune.utils.errors import UserError

TRIES = 120
VALUES: tuple[Any, ...] = (
    None, "", "../../etc/passwd", "/etc/passwd", -1, 0, 1, 2.5, 10**30, 1e308, float("inf"), float("nan"), True, [], {},
    [None], {"a": 1}, "x" * 5000, "\x00", "ä", [[1, 2], [3]], "1ba", "none",
)  # fmt: skip


def damaged_bytes(content: bytes, chance: random.Random) -> bytes:
    """The file as a bad disk or a kill would leave it."""
    place = chance.randrange(max(len(content), 1))
    return chance.choice(
        (
            lambda: content[:place],
            lambda: content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :],
            lambda: content[:place] + chance.randbytes(9) + content[place:],
            lambda: content[place:],
            lambda: chance.randbytes(50),
            lambda: b"",
        )
    )()


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def damaged_values(values: Any, chance: random.Random) -> Any:
    """What somebody might have written into it."""
    values = copy.deepcopy(values)
    for _ in range(chance.choice((1, 1, 2))):
        if not (found := [*places(values)]):
            return chance.choice(VALUES)
        container, key = chance.choice(found)
        what = chance.randrange(4)
        if what == 0:
            del container[key]
        elif what == 1 and isinstance(container, list):
            container.append(container[key])
        elif what == 2 and isinstance(container, dict):
            container[chance.choice(("new", "", "layers", "kind"))] = container[key]
        else:
            container[key] = chance.choice(VALUES)
    return values


@pytest.fixture(scope="module")
def files(data: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good file of every kind."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "job.yaml").write_text(f"""
run: {{name: test, folder: {folder}/run, seed: 3}}
model: {{path: {model_folder}}}
data: {{path: {data}, eval_samples_per_domain: 2, weights: {{letters: 0.5, numbers: 0.5}}}}
dynamic_loading: {{references: {{letters: 1.0, numbers: 3.0}}, update_delay: 2}}
l0_pruning: {{target: {{layers: 3, hidden: 24}}, lagrangian_warmup: 1ba}}
optimizer: {{lr: 1.0e-3, betas: [0.9, 0.95]}}
train: {{duration: 2ba, global_batch_size: 2, microbatch_size: 2, eval_interval: 1ba}}
checkpoint: {{interval: 1ba}}
loggers: {{console: false}}
""")
    train(load_job(folder / "job.yaml"))  # type: ignore[arg-type]
    config = load_model_config(model_folder)
    plan = keep_everything(config, fingerprint(StoredWeights(model_folder), config))
    factors = {"hidden": torch.ones(config.hidden_size)}
    Plan(plan.family, plan.model, plan.source, plan.blocks[:3], tuple(range(32)), factors).save(folder / "plan.json")
    scores = Scores("m", plan.family, plan.model, plan.source, {}, {}, None, {"taylor": [1.0, 2.0, 3.0, 4.0]})
    scores.save(folder / "scores.json")
    shutil.copytree(data, folder / "data")
    shutil.copytree(model_folder, folder / "model")
    record(folder / "model")
    speeds = {"parameters": 1, "macs_per_token": 1, "peak_memory_bytes": 1, "generation": [], "prefill": []}
    (folder / "speed.json").write_text(json.dumps({"schema": 1, "models": {"m": speeds}}))
    (folder / "prompts.jsonl").write_text('{"prompt": "a b", "reference": "c"}\n{"prompt": "a"}\n')
    return folder


def read_data(folder: Path) -> None:
    opened = PreparedData(folder)
    assert [*show_samples(opened, 1)]
    for domain in opened.domains_with(EVAL):
        opened.reader(domain, EVAL).read(0, 0)


def read_job(path: Path) -> None:
    check(load_job(path))  # type: ignore[arg-type]


def carry_out(path: Path) -> None:
    Plan.load(path)
    apply(path.parent / "model", path, path.parent / "out", overwrite=True)


def choose(path: Path) -> None:
    make_plan(Scores.load(path), PlanConfig(criterion="taylor", remove=1))


def convertible(run: Path) -> None:
    opened = Checkpoint.open(run)
    for name in opened.weights:
        opened.weights[name]
    opened.gates()


KINDS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    # file, what reads it, and the path given to that, from the folder's top
    "job": ("job.yaml", read_job, "job.yaml"),
    "plan": ("plan.json", carry_out, "plan.json"),
    "factors of a plan": ("plan.safetensors", carry_out, "plan.json"),
    "scores": ("scores.json", choose, "scores.json"),
    "data manifest": ("data/manifest.json", read_data, "data"),
    "index of shards": ("data/letters/eval/index.json", read_data, "data"),
    "shard": ("data/letters/eval/shard.00000.mds", read_data, "data"),
    "run manifest": ("run/checkpoints/manifest.json", convertible, "run"),
    "checksums of a checkpoint": ("run/checkpoints/ba2.sums-0.json", convertible, "run/checkpoints/ba2-rank0.pt"),
    "checkpoint": ("run/checkpoints/ba2-rank0.pt", convertible, "run/checkpoints/ba2-rank0.pt"),
    "checksums": ("model/checksums.json", verify_checksums, "model"),
    "config of a model": ("model/config.json", load_model, "model"),
    "weights": ("model/model.safetensors", load_model, "model"),
    "speeds": ("speed.json", lambda path: collect([path]), "speed.json"),
    "metrics": ("run/metrics.jsonl", lambda path: collect([path]), "run"),
    "prompts": ("prompts.jsonl", read_prompts, "prompts.jsonl"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_read_or_refused(kind: str, files: Path, tmp_path: Path) -> None:
    name, read, at = KINDS[kind]
    top = tmp_path / "files"
    shutil.copytree(files, top, symlinks=True)
    target, good = top / name, (files / name).read_bytes()
    if kind == "checkpoint":
        (top / "run/checkpoints/ba2.sums-0.json").unlink()
    read(top / at)  # as it is
    tries = TRIES // 3 if target.parts[-2] == "checkpoints" else TRIES  # these take long
    refused, odd = 0, list[tuple[int, str, str, bytes]]()
    for number in range(tries):
        chance = random.Random(f"{kind} {number}")
        text = number % 2 == 0 and target.suffix in (".json", ".yaml")
        if text:
            parse, write = (json.loads, json.dumps) if target.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
            target.write_text(write(damaged_values(parse(good), chance)))
        else:
            target.write_bytes(damaged_bytes(good, chance))
        try:
            read(top / at)
        except UserError as error:
            refused += 1
            if "\n" in str(error).strip() or len(str(error)) > 20_000:
                odd.append((number, "long", str(error), b""))
        except Exception as error:
            odd.append((number, type(error).__name__, str(error)[:200], target.read_bytes()[:150]))
    assert not odd, f"{len(odd)} of {tries}: {odd[:6]}"
    assert refused > tries / 10 or kind in ("metrics", "weights", "checkpoint")
    assert not [*tmp_path.glob("*passwd")]
