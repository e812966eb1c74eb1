"""The papers' recipes: each loads, and what it asks for can be built (without memory) and has the published size."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from llmprune.config import ScoringConfig, load_config, load_job
from llmprune.data.sources import clean_name
from llmprune.data.updates import check_updates
from llmprune.families import family_of
from llmprune.gates.gate_set import GateSet
from llmprune.gates.settings import make_goal
from llmprune.plans import Plan
from llmprune.replacements.span import Span
from llmprune.replacing import check_replacement
from llmprune.scoring.criteria import CRITERIA
from llmprune.scoring.scores import Scores
from llmprune.scoring.selection import Request, select
from llmprune.surgery import Surgery

PAPERS = Path(__file__).parents[1] / "yamls" / "papers"

# The published configs.
LLAMA_7B = LlamaConfig(max_position_embeddings=4096, rms_norm_eps=1e-5)
LLAMA_13B = LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
LLAMA_8B = LlamaConfig(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8)
PYTHIA_410M = GPTNeoXConfig(
    vocab_size=50304, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
)
MODELS: dict[str, PretrainedConfig] = {
    "meta-llama/Llama-2-7b-hf": LLAMA_7B,
    "huggyllama/llama-7b": LLAMA_7B,
    "lmsys/vicuna-7b-v1.3": LLAMA_7B,
    "lmsys/vicuna-7b-v1.5": LLAMA_7B,
    "lmsys/vicuna-13b-v1.3": LLAMA_13B,
    "meta-llama/Meta-Llama-3-8B": LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_8B,
    "mistralai/Mistral-7B-v0.1": MistralConfig(),
    "google/gemma-2b": GemmaConfig(
        hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1
    ),
    "google/gemma-7b": GemmaConfig(),
    "google/gemma-2-2b-it": Gemma2Config(
        hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4
    ),
    "Qwen/Qwen1.5-7B": Qwen2Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    ),
    "EleutherAI/pythia-410m": PYTHIA_410M,
    "meta-llama/Llama-3.1-8B": LLAMA_8B,
    "facebook/opt-1.3b": OPTConfig(
        hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32, word_embed_proj_dim=2048
    ),
}
SCORING = sorted(path for path in PAPERS.glob("*_*.yaml") if path.stem.split("_")[0] in ("shortened", "reassessing"))
# Blocks that go in Shortened LLaMA, by the number that there are.
SHORTENED = {32: [6, 9, 11], 40: [8, 11, 15], 18: [4], 28: [5]}


def built(config: PretrainedConfig, plan: Plan) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(Surgery(config, plan).config)


def parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Sheared-LLaMA's published sizes.
SHEARED = {"370m": 373_867_520, "1.3b": 1_345_423_360, "2.7b": 2_701_560_320}


@pytest.mark.parametrize("size", SHEARED)
def test_sheared_llama(size: str) -> None:
    prune = load_config(PAPERS / f"sheared_llama_{size}_prune.yaml", ["data.path=somewhere"])
    for job in (prune, load_config(PAPERS / f"sheared_llama_{size}_continue.yaml", ["data.path=somewhere"])):
        assert job.dynamic_loading is not None and job.data.weights is not None
        domains = list(job.data.weights)
        check_updates(job.dynamic_loading, domains, job.data.weights, domains)
        assert job.data.document_boundaries is False
        assert job.data.workers * job.data.prefetch <= job.dynamic_loading.update_delay
        assert sum(job.data.weights.values()) == pytest.approx(1, abs=2e-3)
    assert prune.l0_pruning is not None and prune.sharding is not None and prune.train.activation_checkpointing
    tokens = 4096 * prune.train.global_batch_size * int(prune.train.duration.removesuffix("ba"))
    assert tokens == pytest.approx(0.4e9, rel=0.05) and prune.l0_pruning.lagrangian_warmup == "640ba"
    source = MODELS[prune.model.path or ""]
    plan = GateSet(family_of(source).shape(source), make_goal(source, prune.l0_pruning)).plan("llama", "")
    assert parameters(built(source, plan)) == SHEARED[size]

    continued = load_config(PAPERS / f"sheared_llama_{size}_continue.yaml", ["data.path=somewhere"])
    tokens = 4096 * continued.train.global_batch_size * int(continued.train.duration.removesuffix("ba"))
    assert tokens == pytest.approx(50e9, rel=0.01) and continued.l0_pruning is None and continued.sharding is not None
    assert continued.model.path == f"runs/sheared_llama_{size}_pruned"
    for config in (prune, continued):
        assert config.data.weights is not None and sum(config.data.weights.values()) == pytest.approx(1)
        assert (config.optimizer.lr, config.optimizer.betas, config.train.precision) == (1e-4, [0.9, 0.95], "amp_bf16")


def test_sheared_pythia() -> None:
    prune = load_config(PAPERS / "sheared_pythia_160m_prune.yaml", ["data.path=somewhere"])
    assert prune.l0_pruning is not None and prune.data.weights is None and prune.model.path == "EleutherAI/pythia-410m"
    shape = family_of(PYTHIA_410M).shape(PYTHIA_410M)
    plan = GateSet(shape, make_goal(PYTHIA_410M, prune.l0_pruning)).plan("gpt_neox", "")
    assert parameters(built(PYTHIA_410M, plan)) == 162_322_944  # Pythia-160M's own
    continued = load_config(PAPERS / "sheared_pythia_160m_continue.yaml", ["data.path=somewhere"])
    assert continued.model.path == "runs/sheared_pythia_160m_pruned" and continued.data.weights is None


def test_all_models_and_criteria_are_there() -> None:
    assert len(SCORING) == 8 * 3 + 4 * 6


@pytest.mark.parametrize("path", SCORING, ids=lambda path: path.stem)
def test_scoring_recipes(path: Path) -> None:
    job = load_job(path, ["layer_scoring.data.path=somewhere"])
    assert isinstance(job, ScoringConfig) and job.plan is not None and job.run.name == path.stem
    config = MODELS[job.model.path]
    family, layers = family_of(config), config.num_hidden_layers
    (name,) = job.layer_scoring.names(config)
    assert name == job.plan.criterion and name in CRITERIA.names()
    assert (job.layer_scoring.data.samples, job.layer_scoring.data.length) == (10, 128)
    assert job.layer_scoring.data.bos == ("each" if family.name.startswith("gemma") else "none")
    shortened = path.stem.startswith("shortened")
    wanted = SHORTENED[layers] if shortened else [layers // 4]
    assert job.plan.remove[: len(wanted)] == wanted
    worst_first = [float(block) for block in range(layers)]  # the first blocks would go first
    scores = Scores("", family.name, "", family.shape(config), {}, {}, None, blocks={name: worst_first})
    for settings in job.plan.each().values():
        count = settings.remove
        assert count is not None
        request = Request(scores, settings, lambda: pytest.fail("no need to open a model"), parallel=False)
        plan = select(request)
        assert built(config, plan).config.num_hidden_layers == layers - count
        kept = {block.attention for block in plan.blocks}
        if shortened:
            assert kept >= {0, 1, 2, 3, layers - 2, layers - 1} and not kept & set(range(4, 4 + count))
        else:
            assert not kept & set(range(count))


def test_llm_streamlines_mix() -> None:
    job = load_config(PAPERS / "llm_streamline.yaml", ["data.path=x", "run.name=x", "train.duration=1ba"])
    assert job.data.weights is not None and sum(job.data.weights.values()) == pytest.approx(1)
    assert max(job.data.weights, key=job.data.weights.__getitem__) == "RedPajamaC4"
    assert all(clean_name(name) == name for name in job.data.weights) and job.data.document_boundaries is False


# Published parameters (in billions) and what the spans come to; OPT's is ours.
STREAMLINE = {"llama2_4.7b": 4.7, "llama3.1_5.4b": 5.4, "opt_1.3b": 1.0}


@pytest.mark.parametrize("loss", ["mse", "lm"])
@pytest.mark.parametrize("name", STREAMLINE)
def test_llm_streamline(name: str, loss: str) -> None:
    job = load_config(PAPERS / f"streamline_{name}_{loss}.yaml", ["data.path=x"])
    settings = job.block_replacement
    assert settings is not None and settings.weights == {loss: 1.0} and settings.length is not None
    settings.check()
    config, span = MODELS[str(job.model.path)], Span(5, settings.length)
    check_replacement(settings, config, span)
    family = family_of(config)
    layers = family.shape(config).layers
    offsets = tuple(range(settings.blocks))
    plan = Plan(family.name, "", family.shape(config), span.kept(layers, offsets))
    assert round(parameters(built(config, plan)) / 1e9, 1) == STREAMLINE[name]
    assert (job.train.global_batch_size, job.train.clip_norm) == (128, {"mse": 5.0, "lm": 1.0}[loss])
    assert job.optimizer.lr * job.scheduler.final == pytest.approx(5e-5)
