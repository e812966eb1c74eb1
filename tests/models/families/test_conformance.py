"""What every family must pass: gated = cut, skipped = removed, saved = reloaded, cached = uncached."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmprune.conversion.commands import apply
from llmprune.models.block_hooks import RunBlock, hooked_blocks
from llmprune.models.causal_lm import logits_of
from llmprune.models.families import RicherHeadsConfig, Role, family_of
from llmprune.models.loading import new_model
from llmprune.models.own_model_types import with_richer_heads
from llmprune.models.smaller_tokenizer import token_ids
from llmprune.models.stored_weights import fingerprint
from llmprune.plans.plan import KeptBlock, Plan
from llmprune.plans.surgery import Surgery
from llmprune.pruning.gates.attach import attach
from llmprune.pruning.gates.gate_set import GateSet
from llmprune.pruning.gates.settings import L0PruningConfig, TargetShape, make_goal
from llmprune.utils.errors import UserError
from tests.conftest import random_model, tiny_config
from tests.harness.flash import flashed

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
    "gemma": tiny_config("gemma", head_dim=16),
    "gemma2": tiny_config("gemma2", sliding_window=6, query_pre_attn_scalar=8, pad_token_id=2),
    "gemma3": tiny_config(
        "gemma3_text", sliding_window=6, query_pre_attn_scalar=8, sliding_window_pattern=2, pad_token_id=2
    ),
    "phi3": tiny_config("phi3", tie_word_embeddings=False, partial_rotary_factor=0.5, pad_token_id=2),
    "olmo2": tiny_config("olmo2", tie_word_embeddings=False, pad_token_id=2),
    "olmo2-biases": tiny_config("olmo2", attention_bias=True, pad_token_id=2),
    "opt": tiny_config("opt", num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
    "opt-no-biases": tiny_config(
        "opt", num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32, enable_bias=False, dropout=0.0
    ),
    "gpt_neox": tiny_config("gpt_neox", num_attention_heads=4, tie_word_embeddings=False),
    "gpt_neox-sequential": tiny_config("gpt_neox", num_attention_heads=4, use_parallel_residual=False),
    "mixtral": tiny_config("mixtral", tie_word_embeddings=False, num_local_experts=4),
    "qwen3_moe": tiny_config(
        "qwen3_moe",
        tie_word_embeddings=False,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
    ),
    "llama-richer": with_richer_heads(tiny_config(), RicherHeadsConfig(shared=False)),
    "qwen3-richer-shared": with_richer_heads(tiny_config("qwen3"), RicherHeadsConfig(activation="gelu")),
    "opt-richer-residual": with_richer_heads(
        tiny_config("opt", num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
        RicherHeadsConfig(shared=False, residual=True),
    ),
}
TARGETS = {
    "hidden": {"hidden": 24},
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
    gates = GateSet(source, make_goal(config, L0PruningConfig(target=TargetShape(**target))))
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
    result = smaller.load_state_dict(dict(surgery.cut_all(model.state_dict())), strict=False)
    output = surgery.family.outer_name(Role.OUTPUT)
    tied = {f"{output}.weight"} if model.config.tie_word_embeddings else set()
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


def possible(config: PretrainedConfig, target: str) -> dict[str, int]:
    """The target as this family can have it: its groups, its experts, and hidden = heads × head size where it must."""
    family = family_of(config)
    source = family.shape(config)
    wanted = {**TARGETS, **GROUPED_TARGETS, **SUBLAYER_TARGETS}[target]
    if target in GROUPED_TARGETS and (source.kv_heads, source.heads) != (4, 8):
        wanted = {"heads": source.heads // 2}
    if source.kv_heads == 1 and "heads" in wanted:
        wanted = {**wanted, "kv_heads": 1}
    if family.head_size_is_derived(config) and {"hidden", "heads"} & set(wanted):
        wanted = {**wanted, "hidden": 2 * source.head_dim, "heads": 2}
    refused = family.refused(config)
    for kind, name in (("intermediate", "intermediate"), ("attention", "attention_layers"), ("mlp", "mlp_layers")):
        if kind in refused and name in wanted:
            with pytest.raises(UserError, match=f"can't have {kind} gates"):
                make_goal(config, L0PruningConfig(target=TargetShape(**{name: 2})))
            wanted = {other: value for other, value in wanted.items() if other != name}
    return wanted or {"layers": 3}


@pytest.mark.parametrize("target", [*TARGETS, *GROUPED_TARGETS, *SUBLAYER_TARGETS])
@pytest.mark.parametrize("name", CONFIGS)
def test_gated_equals_cut(name: str, target: str, tokens: torch.Tensor) -> None:
    config = CONFIGS[name]
    wanted = possible(config, target)
    plan = check_gated_equals_cut(config, soft_gates(config, wanted), tokens, "sdpa")
    if not any(name.endswith("_layers") for name in wanted):
        assert {name: getattr(plan.shape, name) for name in wanted} == wanted
    for sublayer in ("attention", "mlp"):
        if (count := wanted.get(f"{sublayer}_layers")) is not None:
            assert plan.factors[sublayer].count_nonzero() == count


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "name", ["llama-grouped-tied", "mistral", "qwen2-sliding", "qwen3-tied", "gemma2", "gemma3", "opt", "gpt_neox"]
)
def test_gated_equals_cut_under_each_attention_kernel(name: str, attention: str, tokens: torch.Tensor) -> None:
    gates = soft_gates(CONFIGS[name], possible(CONFIGS[name], "everything"))
    check_gated_equals_cut(CONFIGS[name], gates, tokens, attention)


@pytest.mark.parametrize("name", CONFIGS)
def test_skipped_equals_removed(name: str, tokens: torch.Tensor) -> None:
    model = random_model(CONFIGS[name])
    family = family_of(model.config)
    source = family.shape(model.config)
    smaller = cut(model, Plan(family.name, "", source, tuple(KeptBlock.whole(i) for i in (0, 2, 3))))
    dense = logits(model, tokens)
    with hooked_blocks(model, lambda number, run, states: states if number == 1 else run(states)):
        skipped = logits(model, tokens)
    assert relative(skipped, logits(smaller, tokens)) <= 1e-6
    assert torch.equal(logits(model, tokens), dense) and relative(dense, skipped) > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_keeps_its_logits_when_others_go(name: str, tokens: torch.Tensor) -> None:
    model = random_model(CONFIGS[name])
    family, named = family_of(model.config), token_ids(model.config.to_dict())
    source = family.shape(model.config)
    assert source.vocabulary == model.config.vocab_size
    kept = tuple(sorted({*range(0, model.config.vocab_size, 3), *named}))
    blocks = tuple(KeptBlock.whole(number) for number in range(source.layers))
    smaller = cut(model, Plan(family.name, "", source, blocks, vocabulary=kept))
    old, new = torch.tensor(kept), tokens % len(kept)
    assert relative(logits(model, old[new])[..., old], logits(smaller, new)) <= 1e-6
    assert {kept[number] for number in token_ids(smaller.config.to_dict())} == named


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_visited_block_runs_on_any_number_of_samples(name: str, attention: str, tokens: torch.Tensor) -> None:
    model = random_model(CONFIGS[name], attention=attention)

    def one_by_one(number: int, run: RunBlock, states: torch.Tensor) -> torch.Tensor:
        return torch.cat([run(states[i : i + 1]) for i in range(len(states))])

    dense = logits(model, tokens)
    with hooked_blocks(model, one_by_one):
        assert relative(dense, logits(model, tokens)) <= 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_equals_reloaded_and_generates_with_cache(name: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = random_model(CONFIGS[name])
    model.save_pretrained(tmp_path / "source")
    gates = soft_gates(model.config, possible(model.config, "everything"))
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


@pytest.mark.usefixtures("acted_flash")
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_documents_of_a_sample_do_not_see_each_other(config: PretrainedConfig, attention: str) -> None:
    """Longer than the windows of models that have one, so that both masks are at work."""
    on_flash = attention == "flash_attention_2"
    model = flashed(random_model(config)) if on_flash else random_model(config, attention=attention)
    tokens = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(2))
    sizes = ((11, 13), (1, 15, 8))
    positions = torch.stack([torch.cat([torch.arange(size) for size in row]) for row in sizes])
    with torch.no_grad():
        packed = logits_of(model, {"input_ids": tokens, "position_ids": positions})
    for row, documents in enumerate(sizes):
        for document, found in zip(tokens[row].split(list(documents)), packed[row].split(list(documents)), strict=True):
            torch.testing.assert_close(found, logits(model, document[None])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_mask_of_ones_changes_nothing(config: PretrainedConfig, tokens: torch.Tensor) -> None:
    """It is what models on a GPU are given, so that their attention needs no mask at all."""
    model = random_model(config)
    with torch.no_grad():
        found = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
        torch.testing.assert_close(found, logits_of(model, {"input_ids": tokens}), rtol=1e-5, atol=1e-5)
