"""The YAML schema: overrides, and mistakes told in one line."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from llmprune.config import load_config, save_config
from llmprune.errors import UserError
from llmprune.families.llama import LLAMA
from llmprune.gates.gate_set import GateSet
from llmprune.gates.settings import make_goal
from llmprune.surgery import Surgery

ROOT = Path(__file__).parents[1]
YAMLS = sorted((ROOT / "yamls").glob("*.yaml"))
PAPERS = ROOT / "yamls" / "papers"

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
    config = load_config(path)
    assert config.run.name == path.stem and config.data.path == "runs/quickstart/data"


# Sheared-LLaMA's published sizes.
SHEARED = {"370m": 373_867_520, "1.3b": 1_345_423_360, "2.7b": 2_701_560_320}


@pytest.mark.parametrize("size", SHEARED)
def test_sheared_llama(size: str) -> None:
    prune = load_config(PAPERS / f"sheared_llama_{size}_prune.yaml", ["data.path=somewhere"])
    assert prune.l0_pruning is not None and prune.sharding is not None and prune.train.activation_checkpointing
    tokens = 4096 * prune.train.global_batch_size * int(prune.train.duration.removesuffix("ba"))
    assert tokens == pytest.approx(0.4e9, rel=0.05) and prune.l0_pruning.lagrangian_warmup == "640ba"
    source = LlamaConfig(max_position_embeddings=4096, rms_norm_eps=1e-5)  # Llama-2-7B
    shape = LLAMA.shape(source)
    plan = GateSet(shape, make_goal(source, prune.l0_pruning)).plan("llama", "")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Surgery(source, plan).config)
    assert sum(parameter.numel() for parameter in model.parameters()) == SHEARED[size]

    continued = load_config(PAPERS / f"sheared_llama_{size}_continue.yaml", ["data.path=somewhere"])
    tokens = 4096 * continued.train.global_batch_size * int(continued.train.duration.removesuffix("ba"))
    assert tokens == pytest.approx(50e9, rel=0.01) and continued.l0_pruning is None and continued.sharding is not None
    assert continued.model.path == f"runs/sheared_llama_{size}_pruned"
    for config in (prune, continued):
        assert config.data.weights is not None and sum(config.data.weights.values()) == pytest.approx(1)
        assert (config.optimizer.lr, config.optimizer.betas, config.train.precision) == (1e-4, [0.9, 0.95], "amp_bf16")


def test_a_base_is_laid_under(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(MINIMAL + "optimizer: {lr: 0.5, eps: 0.1}\n")
    (tmp_path / "over.yaml").write_text("base: base.yaml\nrun: {name: y}\noptimizer: {lr: 0.25}\n")
    config = load_config(tmp_path / "over.yaml")
    assert (config.run.name, config.optimizer.lr, config.optimizer.eps) == ("y", 0.25, 0.1)
    (tmp_path / "over.yaml").write_text("base: nowhere.yaml\n")
    with pytest.raises(UserError, match="nowhere.yaml does not exist"):
        load_config(tmp_path / "over.yaml")
