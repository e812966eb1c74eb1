"""Rounds of pruning and recovery: their shapes, going on after a stop, and two ranks."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmprune.config.job_files import load_job
from llmprune.config.schema import IterationConfig
from llmprune.conversion.verify import compare_models, open_for_comparison
from llmprune.jobs import iterate as iteration
from llmprune.jobs import stages
from llmprune.jobs.iterate import iterate, round_shapes
from llmprune.jobs.train import train
from llmprune.models.families import Shape, family_of, shapes_between
from llmprune.models.loading import load_model_config
from llmprune.plans.plan import Plan
from llmprune.utils.checksums import record
from llmprune.utils.errors import UserError
from tests.callbacks.fixed_noise import KillAt, Killed
from tests.conftest import tiny_config
from tests.models.families.test_conformance import CONFIGS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def yaml(data: Path, trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounds")
    path = folder / "iterate.yaml"
    path.write_text(f"""
run: {{name: test, folder: {folder}/once, seed: 3}}
model: {{path: {trained_folder}}}
data: {{path: {data}, eval_samples_per_domain: 2}}
job: iterate
iterate: {{rounds: 2}}
plan:
  shape: {{layers: 4, hidden: 24, heads: 4, intermediate: 24}}
  criterion: block_influence
  unit_criterion: unit_taylor
  correction: refit
layer_scoring: {{data: {{samples: 64, length: 24}}}}
optimizer: {{lr: 1.0e-3}}
scheduler: {{warmup: 1ba}}
train: {{duration: 4ba, global_batch_size: 8, microbatch_size: 4, eval_interval: 2ba}}
checkpoint: {{interval: 2ba}}
loggers: {{console: false}}
""")
    return path


def job(yaml: Path, *overrides: str) -> IterationConfig:
    loaded = load_job(yaml, overrides)
    assert isinstance(loaded, IterationConfig)
    return loaded


@pytest.fixture(scope="module")
def once(yaml: Path) -> Path:
    """The folder of an undisturbed job."""
    iterate(job(yaml))
    return yaml.parent / "once"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_rounds_end_in_the_shape(once: Path) -> None:
    shapes = [Plan.load(once / f"round-{number}" / "plan.json").shape for number in (1, 2)]
    assert shapes[1] == Shape(4, hidden=24, heads=4, kv_heads=2, head_dim=8, intermediate=24, vocabulary=300)
    assert (shapes[0].layers, shapes[0].hidden, shapes[0].kv_heads, shapes[0].intermediate) == (5, 30, 3, 34)
    config = load_model_config(once / "model")
    assert family_of(config).shape(config) == shapes[1]
    recovered, final = weights(once / "round-2" / "recovered"), weights(once / "model")
    assert all(torch.equal(recovered[name], final[name]) for name in final)
    second = Plan.load(once / "round-2" / "plan.json")
    whole = open_for_comparison(once / "round-1" / "recovered", second)
    assert compare_models(whole, open_for_comparison(once / "round-2" / "pruned"), length=48).max_rel <= 1e-5
    losses = [json.loads(line) for line in (once / "round-1" / "recover" / "metrics.jsonl").read_text().splitlines()]
    assert any("metrics/eval/loss" in line for line in losses)


@pytest.mark.parametrize("stop", ["scoring", "cutting", "training", "exporting"])
def test_a_stopped_job_goes_on_where_it_was(
    yaml: Path, once: Path, tmp_path: Path, stop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [f"run.folder={tmp_path}/job"]
    with monkeypatch.context() as patch:
        if stop == "training":

            def killing(config: Any) -> Any:
                return train(config, [KillAt(3)] if "round-2" in config.run.folder else [])

            patch.setattr(stages, "train", killing)
        else:
            name = {"scoring": "score", "cutting": "apply", "exporting": "convert"}[stop]
            module = iteration if stop == "cutting" else stages
            real = getattr(module, name)
            calls = []

            def failing(*args: Any, **kwargs: Any) -> Any:
                calls.append(args)
                if len(calls) == 2:
                    raise Killed
                return real(*args, **kwargs)

            patch.setattr(module, name, failing)
        with pytest.raises(Killed):
            iterate(job(yaml, *overrides))
    before = {plan: plan.stat().st_mtime_ns for plan in (tmp_path / "job").glob("round-*/plan.json")}
    assert len(before) == (1 if stop == "scoring" else 2)
    with pytest.raises(UserError, match="run.autoresume=true"):
        iterate(job(yaml, *overrides))
    iterate(job(yaml, *overrides, "run.autoresume=true"))
    assert all(plan.stat().st_mtime_ns == time for plan, time in before.items())
    expected, found = weights(once / "model"), weights(tmp_path / "job" / "model")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    iterate(job(yaml, *overrides, "run.autoresume=true"))  # nothing is left to do


def test_two_ranks(yaml: Path, once: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "composer"), "-n", "2", "train.py", str(yaml)]
    done = subprocess.run(
        [*command, f"run.folder={tmp_path}/job"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for number in (1, 2):
        one, two = (Plan.load(place / f"round-{number}" / "plan.json") for place in (once, tmp_path / "job"))
        assert one.blocks == two.blocks and one.hidden == two.hidden
    expected, found = weights(once / "model"), weights(tmp_path / "job" / "model")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_of_every_family(name: str) -> None:
    config = CONFIGS[name]
    family, source = family_of(config), family_of(CONFIGS[name]).shape(CONFIGS[name])
    target = {"layers": 2, "kv_heads": max(source.kv_heads // 2, 1)}
    target |= {"experts": 2} if source.experts else {"intermediate": 16}
    target["hidden"] = 16
    if family.head_size_is_derived(config):
        target["hidden"] = target["kv_heads"] * source.heads_per_group * source.head_dim
    loaded = IterationConfig()
    loaded.iterate.rounds, loaded.plan.shape = 3, target
    loaded.plan.criterion, loaded.plan.unit_criterion = "block_influence", "unit_activation_l2"
    shapes = round_shapes(loaded, config)
    assert len(shapes) == 3 and {key: getattr(shapes[-1], key) for key in target} == target
    for before, after in zip([source, *shapes], shapes, strict=False):
        assert all(getattr(before, size) >= getattr(after, size) for size in ("layers", "hidden", "heads", "kv_heads"))


def test_a_round_that_takes_no_heads_and_no_channels_has_nothing_to_correct() -> None:
    loaded = IterationConfig()
    loaded.plan.shape, loaded.iterate.rounds, loaded.plan.correction = {"hidden": 16, "heads": 4}, 3, "refit"
    loaded.plan.unit_criterion = "unit_activation_l2"
    shapes = round_shapes(loaded, tiny_config())
    assert [shape.kv_heads for shape in shapes] == [3, 3, 2]  # the second round is narrower in hidden dimensions alone


def test_every_size_shrinks_by_the_same_share() -> None:
    source = family_of(tiny_config()).shape(tiny_config(hidden_size=1024, intermediate_size=4096))
    target = Shape(layers=1, hidden=128, heads=2, kv_heads=1, head_dim=8, intermediate=512)
    hidden = [shape.hidden for shape in shapes_between(source, target, 3)]
    assert hidden == [512, 256, 128]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["iterate.rounds=0"], "rounds is 0"),
        (["distillation={teacher: x, objectives: {mse: 1.0}}", "model.path=null"], "name it with model.path"),
        (["plan.shape={}"], "the target shape is empty"),
        (["plan.shape={hidden: 64}"], "must lie between 1 and the source's 32"),
        (["plan.shape={layers: 6}"], "nothing would be pruned"),
        (["plan.shape={layers: 5}"], "round 1 of 2 would remove nothing|round 2 of 2 would remove nothing"),
        (["plan.correction=mean"], "has no biases in self_attn.o_proj"),
        (["plan.criterion=null"], "name the criterion that decides"),
        (["plan.unit_criterion=null"], "name the criterion that ranks"),
        (["plan.unit_criterion=unit_tailor"], "did you mean 'unit_taylor'"),
        (["model.path=null", "model.config={model_type: llama}"], "name it with model.path"),
        (["l0_pruning.target_sparsity=0.5"], "leave out l0_pruning"),
        (["iterate.round=3"], "unknown key 'iterate.round'"),
        (["layer_scoring.criteria=[perplexty]"], "did you mean 'perplexity'"),
        (["layer_scoring.data.path=nowhere.txt"], "nowhere.txt does not exist"),
        (["layer_scoring.data.length=4096"], "the model takes 128"),
        (["plan.shape={layers: 4, vocabulary: 280}"], "cut the vocabulary first"),
        (["plan.remove=1"], "leave out plan.remove: iterate decides it"),
    ],
)
def test_mistakes(yaml: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        iterate(job(yaml, f"run.folder={tmp_path}/job", *overrides))
    assert not (tmp_path / "job").exists()


def test_another_job_is_not_gone_on_with(yaml: Path, once: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was begun with iterate.rounds 2; the config asks for 3"):
        iterate(job(yaml, "run.autoresume=true", "iterate.rounds=3"))
    for change in ("train.duration=5ba", "optimizer.lr=1e-5", "data.weights={letters: 1.0, numbers: 1.0}"):
        with pytest.raises(UserError, match=f"was begun with {change.partition('=')[0]}"):
            iterate(job(yaml, "run.autoresume=true", change))
    shutil.copytree(once / "round-1" / "recover", tmp_path / "run")
    with pytest.raises(UserError, match="holds something that is no job of rounds"):
        iterate(job(yaml, f"run.folder={tmp_path}/run", "run.overwrite=true"))


def test_data_that_were_moved_are_the_same_data(yaml: Path, once: Path, data: Path, tmp_path: Path) -> None:
    """The last round is recovered again, from the data's new place."""
    moved, copy = shutil.copytree(data, tmp_path / "moved"), shutil.copytree(once, tmp_path / "job")
    shutil.rmtree(copy / "round-2" / "recovered")
    shutil.rmtree(copy / "model")
    iterate(job(yaml, f"run.folder={copy}", "run.autoresume=true", f"data.path={moved}"))
    expected, found = weights(once / "model"), weights(copy / "model")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_job_of_another_version_can_be_overwritten(yaml: Path, tmp_path: Path) -> None:
    config = job(yaml, f"run.folder={tmp_path}/job")
    stages.begin(config, "job of rounds")
    known = tmp_path / "job" / "config.yaml"
    known.write_text(known.read_text().replace("rounds: 2", "circles: 2"))
    for change in ({}, {"autoresume": True}):
        config.run = replace(config.run, **change)
        with pytest.raises(UserError, match="unknown key 'iterate.circles'.*: begin anew with run.overwrite=true"):
            stages.begin(config, "job of rounds")
    config.run = replace(config.run, overwrite=True)
    stages.begin(config, "job of rounds")
    assert "rounds: 2" in known.read_text()


@pytest.mark.parametrize("key", ["data.path", "layer_scoring.data.path", "model.path", "distillation.teacher"])
def test_what_a_job_reads_is_told_by_its_contents(
    yaml: Path, corpus: Path, data: Path, trained_folder: Path, tmp_path: Path, key: str
) -> None:
    text, model = tmp_path / "text.jsonl", tmp_path / "model"
    shutil.copyfile(corpus / "numbers" / "part.jsonl", text)
    shutil.copytree(trained_folder, model)
    record(model)  # as llmprune's own models have it
    own = {
        "data.path": shutil.copytree(data, tmp_path / "data"),
        "layer_scoring.data.path": text,
        "model.path": model,
        "distillation.teacher": model,
    }
    config = job(yaml, "distillation={teacher: x}", f"run.folder={tmp_path}/job", "run.autoresume=true")

    def put(moved: Path | None = None) -> IterationConfig:
        paths = {name: str(moved if moved and path == own[key] else path) for name, path in own.items()}
        config.data.path, config.model.path = paths["data.path"], paths["model.path"]
        config.layer_scoring.data.path, config.distillation.teacher = (
            paths["layer_scoring.data.path"],
            paths["distillation.teacher"],
        )
        return config

    stages.begin(put(), "job of rounds")
    place = own[key].rename(tmp_path / "renamed.jsonl")
    stages.begin(put(place), "job of rounds")
    if key == "data.path":
        (place / "manifest.json").write_text((place / "manifest.json").read_text().replace('"seed": ', '"seed": 1'))
    elif key == "layer_scoring.data.path":
        place.write_text(place.read_text() + "{}\n")
    else:
        (place / "another.json").write_text("{}")
        record(place)
    with pytest.raises(UserError, match=r"was begun with .* the config asks for .*renamed"):
        stages.begin(put(place), "job of rounds")
    place.rename(own[key])
    with pytest.raises(UserError, match="was begun with other contents of"):
        stages.begin(put(), "job of rounds")
