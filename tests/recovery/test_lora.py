"""Adapters on every family: where they sit, and that merging them changes nothing."""

import pytest
import torch

from llmprune.models.parameters import train_only
from llmprune.recovery.lora import AdaptedWeights, LoRAConfig, add_adapters, hold_frozen, lora_targets
from llmprune.utils.errors import UserError
from tests.conftest import random_model
from tests.models.families.test_conformance import CONFIGS

LLAMA = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}, {
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
}  # fmt: skip
OTHERS = {
    "phi3": ({"self_attn.qkv_proj", "self_attn.o_proj"}, {"mlp.gate_up_proj", "mlp.down_proj"}),
    "opt": ({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"}, {"fc1", "fc2"}),
    "gpt_neox": ({"attention.query_key_value", "attention.dense"}, {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}),
    "mixtral": (LLAMA[0], {"w1", "w2", "w3"}),
    "qwen3_moe": (LLAMA[0], {"gate_proj", "up_proj", "down_proj"}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_targets_are_the_blocks_matrices(name: str) -> None:
    """By hand for each architecture; an adapter sits on as many matrices as there are, and on none elsewhere."""
    config = CONFIGS[name]
    attention, mlp = OTHERS.get(config.model_type.removeprefix("llmprune_"), LLAMA)
    assert set(lora_targets(config, ["attention"])) == attention
    assert set(lora_targets(config, ["mlp"])) == mlp
    model = random_model(config)
    matrices = {
        module_name
        for module_name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in f".{module_name}"
        if not module_name.endswith((".gate", ".router"))
    }
    add_adapters(model, LoRAConfig(rank=2), seed=0)
    adapted = {n.removesuffix(".lora_A.default") for n, _ in model.named_modules() if n.endswith(".lora_A.default")}
    assert adapted == matrices


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_is_adapted(name: str, tokens: torch.Tensor) -> None:
    model, plain = random_model(CONFIGS[name]).eval(), random_model(CONFIGS[name]).eval()
    settings = LoRAConfig(rank=3, alpha=5.0, dropout=0.0)
    adapters = add_adapters(model, settings, seed=1)
    with torch.no_grad():
        before = plain(input_ids=tokens).logits
        assert torch.equal(model(input_ids=tokens).logits, before)  # they begin by doing nothing
        for place, parameter in enumerate(adapters):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place))
        wanted = model(input_ids=tokens).logits
        merged = AdaptedWeights(dict(model.state_dict()), settings)
        assert set(merged) == set(plain.state_dict())
        plain.load_state_dict({key: merged[key] for key in merged})
        found = plain(input_ids=tokens).logits
    assert (wanted - before).abs().max() > 1e-2 * before.abs().max()
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
def test_frozen_matrices_in_the_dtype_of_the_products_change_nothing(name: str, tokens: torch.Tensor) -> None:
    """Outputs and the adapters' gradients are the same bits, and the merged matrices those of the rounded base."""
    settings = LoRAConfig(rank=3)
    found, merged = [], []
    for held in (False, True):
        model = random_model(CONFIGS[name]).eval()
        adapters = add_adapters(model, settings, seed=1)
        train_only(model, [], adapters)
        with torch.no_grad():
            for place, parameter in enumerate(adapters):
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place))
        if held:
            hold_frozen(model, torch.bfloat16)
        else:  # by hand
            rounded = {key: value.bfloat16().float() for key, value in random_model(CONFIGS[name]).named_parameters()}
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=tokens).logits
        logits.square().mean().backward()
        found.append([logits, *(parameter.grad for parameter in adapters)])
        merged.append(AdaptedWeights(dict(model.state_dict()), settings))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)  # type: ignore[arg-type]
    changed = 0
    for key in merged[0]:
        difference = merged[1][key].float() - merged[0][key]
        if key in rounded and not torch.equal(merged[1][key], merged[0][key]):
            changed += 1
            exact = random_model(CONFIGS[name]).get_parameter(key)
            torch.testing.assert_close(difference, rounded[key] - exact, rtol=0, atol=1e-6)
    assert changed


def test_the_seed_decides_how_adapters_begin() -> None:
    made = [add_adapters(random_model(CONFIGS["opt"]), LoRAConfig(), seed) for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(made[0], made[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(made[0], made[2], strict=True))


def test_other_targets() -> None:
    assert lora_targets(CONFIGS["opt"], ["self_attn.q_proj", "mlp"]) == ["fc1", "fc2", "self_attn.q_proj"]
    with pytest.raises(UserError, match="'block_sparse_moe.gate' is unknown"):
        lora_targets(CONFIGS["mixtral"], ["block_sparse_moe.gate"])
