"""What every family must pass: gated = cut, skipped = removed, saved = reloaded, cached = uncached."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmprune.convert.commands import apply
from llmprune.families import family_of
from llmprune.gates.attach import attach
from llmprune.gates.gate_set import GateSet
from llmprune.gates.settings import L0PruningConfig, TargetShape, make_goal
from llmprune.models.loading import fingerprint, new_model
from llmprune.plans import KeptBlock, Plan
from llmprune.surgery import Surgery
from tests.conftest import random_model, tiny_config

# One entry per family: small configs that cover its variants.
CONFIGS: dict[str, PretrainedConfig] = {
    "llama-grouped-tied": tiny_config(),
    "llama-grouped-untied": tiny_config(tie_word_embeddings=False),
    "llama-multihead": tiny_config(num_key_value_heads=8, tie_word_embeddings=False),
    "llama-multiquery": tiny_config(num_key_value_heads=1),
    "llama-biases": tiny_config(attention_bias=True, mlp_bias=True),
    "llama-3-rope": tiny_config(
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        rope_theta=500000.0,
    ),
    "mistral": tiny_config("mistral", tie_word_embeddings=False, sliding_window=8),
    "qwen2-tied": tiny_config("qwen2"),
    "qwen2-sliding": tiny_config(
        "qwen2", tie_word_embeddings=False, use_sliding_window=True, sliding_window=6, max_window_layers=2
    ),
    "qwen3-tied": tiny_config("qwen3"),
    "qwen3-wide-heads": tiny_config("qwen3", tie_word_embeddings=False, head_dim=16, attention_bias=True),
}
TARGETS = {
    "hidden": {"hidden": 20},
    "layers": {"layers": 2},
    "intermediate": {"intermediate": 30},
    "half the heads": {"heads": 4},
    "everything": {"layers": 3, "hidden": 24, "heads": 4, "intermediate": 31},
}
SUBLAYER_TARGETS: dict[str, dict[str, int]] = {
    "attention": {"attention_layers": 2},
    "mlp": {"mlp_layers": 3},
    "attention and mlp": {"attention_layers": 3, "mlp_layers": 2},
    "layer and attention": {"layers": 3, "attention_layers": 2},
    "sub-layers and widths": {"attention_layers": 2, "mlp_layers": 2, "hidden": 24, "heads": 4, "intermediate": 31},
}
GROUPED_TARGETS = {
    "queries within groups": {"heads": 4, "kv_heads": 4},
    "groups and queries": {"heads": 2, "kv_heads": 2},
}


def soft_gates(config: PretrainedConfig, target: dict[str, int]) -> GateSet:
    """Gates with random values, as in the middle of training."""
    family = family_of(config)
    source = family.shape(config)
    gates = GateSet(source, make_goal(family, source, L0PruningConfig(target=TargetShape(**target))))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for log_alpha in gates.log_alpha.values():
            log_alpha.copy_(torch.randn(log_alpha.shape, generator=generator) * 2)
    return gates


def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def cut(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    surgery = Surgery(model.config, plan)
    smaller = new_model(surgery.config, seed=99, attention=model.config._attn_implementation).eval()
    result = smaller.load_state_dict(dict(surgery.cut_all(model.state_dict().items())), strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert not result.unexpected_keys and set(result.missing_keys) == tied
    return smaller


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / a.abs().max()).item()


def check_gated_equals_cut(config: PretrainedConfig, gates: GateSet, tokens: torch.Tensor, attention: str) -> Plan:
    model = random_model(config, attention=attention)
    family = family_of(config)
    plan = gates.plan(family.name, "")
    smaller = cut(model, plan)
    dense = logits(model, tokens)
    factors = gates.factors(gates.at_target())
    slot = attach(model, family, set(factors.trainable()))
    assert torch.equal(logits(model, tokens), dense) or relative(dense, logits(model, tokens)) < 1e-6
    slot.factors = factors
    gated = logits(model, tokens)
    assert relative(gated, logits(smaller, tokens)) <= 1e-5
    assert relative(gated, dense) > 1e-2  # the gates do something
    return plan


@pytest.mark.parametrize("target", [*TARGETS, *GROUPED_TARGETS, *SUBLAYER_TARGETS])
@pytest.mark.parametrize("name", CONFIGS)
def test_gated_equals_cut(name: str, target: str, tokens: torch.Tensor) -> None:
    config = CONFIGS[name]
    if target in GROUPED_TARGETS and config.num_key_value_heads != 4:
        target, wanted = "half the heads", TARGETS["half the heads"]
    else:
        wanted = {**TARGETS, **GROUPED_TARGETS, **SUBLAYER_TARGETS}[target]
    if config.num_key_value_heads == 1 and "heads" in wanted:
        wanted = {**wanted, "kv_heads": 1}
    plan = check_gated_equals_cut(config, soft_gates(config, wanted), tokens, "sdpa")
    shape = {name: value for name, value in wanted.items() if not name.endswith("_layers")}
    assert {name: getattr(plan.shape, name) for name in shape if target not in SUBLAYER_TARGETS} == (
        shape if target not in SUBLAYER_TARGETS else {}
    )
    for sublayer in ("attention", "mlp"):
        if (count := wanted.get(f"{sublayer}_layers")) is not None:
            assert plan.factors[sublayer].count_nonzero() == count


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama-grouped-tied", "mistral", "qwen2-sliding", "qwen3-tied"])
def test_gated_equals_cut_under_each_attention_kernel(name: str, attention: str, tokens: torch.Tensor) -> None:
    gates = soft_gates(CONFIGS[name], {**TARGETS["everything"], "kv_heads": 2})
    check_gated_equals_cut(CONFIGS[name], gates, tokens, attention)


@pytest.mark.parametrize("name", CONFIGS)
def test_skipped_equals_removed(name: str, tokens: torch.Tensor) -> None:
    model = random_model(CONFIGS[name])
    family = family_of(model.config)
    source = family.shape(model.config)
    smaller = cut(model, Plan(family.name, "", source, tuple(KeptBlock.whole(i) for i in (0, 2, 3))))
    skipped = model.get_submodule(family.blocks)[1]
    skipped.forward = lambda hidden_states, *args, **kwargs: hidden_states  # type: ignore[assignment]
    assert relative(logits(model, tokens), logits(smaller, tokens)) <= 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_equals_reloaded_and_generates_with_cache(name: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = random_model(CONFIGS[name])
    model.save_pretrained(tmp_path / "source")
    gates = soft_gates(model.config, {"layers": 3, "hidden": 24, "intermediate": 31})
    plan = gates.plan(family_of(model.config).name, fingerprint(model.state_dict(), model.config))
    apply(tmp_path / "source", plan, tmp_path / "cut")
    expected = logits(cut(model, plan), tokens)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    assert relative(expected, logits(reloaded, tokens)) <= 1e-6
    assert reloaded.config.use_cache
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with_cache = reloaded.generate(tokens, use_cache=True, **options)
    without = reloaded.generate(tokens, use_cache=False, **options)
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(torch.stack(with_cache.logits), torch.stack(without.logits), rtol=1e-4, atol=1e-4)


def test_a_tied_output_layer_is_stored_once(tmp_path: Path) -> None:
    model = random_model(tiny_config())
    model.save_pretrained(tmp_path / "source")
    plan = soft_gates(model.config, {"hidden": 24}).plan("llama", fingerprint(model.state_dict(), model.config))
    apply(tmp_path / "source", plan, tmp_path / "cut")
    assert "lm_head.weight" not in load_file(tmp_path / "cut" / "model.safetensors")
