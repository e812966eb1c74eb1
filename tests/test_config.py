"""The YAML schema: overrides, and mistakes told in one line."""

from pathlib import Path

import pytest

from llmprune.config import ScoringConfig
from llmprune.errors import UserError
from llmprune.job_files import load_config, load_job, save_config

ROOT = Path(__file__).parents[1]
YAMLS = sorted((ROOT / "yamls").glob("*.yaml"))

MINIMAL = """
run: {name: x}
model: {path: somewhere}
data: {path: there}
train: {duration: 10ba, global_batch_size: 4}
"""


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_overrides_win_and_sections_appear_on_demand(yaml: Path) -> None:
    config = load_config(yaml, ["optimizer.lr=0.5", "l0_pruning.target.hidden=8", "data.weights.web=2"])
    assert config.optimizer.lr == 0.5 and config.run.folder == "runs/x"
    assert config.l0_pruning is not None and config.l0_pruning.target is not None
    assert config.l0_pruning.target.hidden == 8
    assert config.data.weights == {"web": 2.0}


def test_a_mapping_in_an_override_replaces_the_mapping(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + "l0_pruning: {target: {layers: 3, hidden: 20}, gate_lr: 0.5}\n")
    target = load_config(path, ["l0_pruning.target={layers: 2}"]).l0_pruning
    assert target is not None and target.target is not None
    assert (target.target.layers, target.target.hidden, target.gate_lr) == (2, None, 0.5)
    assert load_config(path, ["l0_pruning.target.layers=2"]).l0_pruning.target.hidden == 20  # type: ignore[union-attr]
    with pytest.raises(UserError, match="put quotes around the whole"):
        load_config(path, ["l0_pruning.target={layers:"])


def test_a_saved_config_loads_as_itself(yaml: Path, tmp_path: Path) -> None:
    config = load_config(yaml, ["l0_pruning.target.heads=4"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rate=1", "unknown key 'optimizer.learning_rate'"),
        ("trian.duration=3ba", "did you mean 'train'"),
        ("train.global_batchsize=3", "did you mean 'global_batch_size'"),
        ("l0_pruning.target.hiden=3", "did you mean 'hidden'"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("nonsense", "not of the form"),
    ],
)
def test_mistakes_name_the_key_and_the_nearest(yaml: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_config(yaml, [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {name: x", "can't be read"),
        ("- 1", "must hold sections"),
        ("run: {name: x}", "must be set"),
        (MINIMAL + "\nscheduler: {naem: cosine}", "did you mean 'name'"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(path)
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "missing.yaml")


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_shipped_yaml_loads(path: Path) -> None:
    job = load_job(path)
    data = job.layer_scoring.data if isinstance(job, ScoringConfig) else job.data
    assert job.run.name == path.stem and data.path == "runs/quickstart/data"


def test_a_scoring_job_has_its_own_keys(tmp_path: Path) -> None:
    path = tmp_path / "score.yaml"
    path.write_text("run: {name: x}\nmodel: {path: here}\nlayer_scoring: {criteria: [tail]}\n")
    job = load_job(path, ["plan.remove=[2]", "layer_scoring.data.bos=each"])
    assert isinstance(job, ScoringConfig) and job.plan is not None and job.plan.remove == [2]
    save_config(job, tmp_path / "saved.yaml")
    assert load_job(tmp_path / "saved.yaml") == job
    with pytest.raises(UserError, match="unknown key 'layer_scoring.criterion'; did you mean 'criteria'"):
        load_job(path, ["layer_scoring.criterion=tail"])
    with pytest.raises(UserError, match="unknown key 'train"):
        load_job(path, ["train.duration=3ba"])


def test_a_base_is_laid_under(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(MINIMAL + "optimizer: {lr: 0.5, eps: 0.1}\n")
    (tmp_path / "over.yaml").write_text("base: base.yaml\nrun: {name: y}\noptimizer: {lr: 0.25}\n")
    config = load_config(tmp_path / "over.yaml")
    assert (config.run.name, config.optimizer.lr, config.optimizer.eps) == ("y", 0.25, 0.1)
    (tmp_path / "over.yaml").write_text("base: nowhere.yaml\n")
    with pytest.raises(UserError, match="nowhere.yaml does not exist"):
        load_config(tmp_path / "over.yaml")


@pytest.mark.parametrize(
    "override",
    [
        "data.path=s3://key:word@bucket/data",
        "data.path=https://host/data?X-Amz-Signature=abc",
        "checkpoint.remote=s3://b/AKIAIOSFODNN7EXAMPLE",
        "run.name=hf_abcdefghijklmnopqrstuvwxyzabcdefgh",
        "loggers.wandb={project: 0123456789abcdef0123456789abcdef01234567}",
    ],
)
def test_secrets_are_not_taken(yaml: Path, override: str) -> None:
    with pytest.raises(UserError, match="holds what looks like a password or a token.*set it in the environment"):
        load_config(yaml, [override])


def test_what_looks_like_no_secret_is_taken(yaml: Path) -> None:
    snapshot = "home/hub/models--a--b/snapshots/0123456789abcdef0123456789abcdef01234567"
    load_config(yaml, [f"model.path={snapshot}", "data.path=azure://container@account/data"])
