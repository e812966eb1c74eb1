"""Cutting single tensors, against indexing by hand."""

from dataclasses import replace

import pytest
import torch

from llmprune.models.families import family_of
from llmprune.models.families.llama import LLAMA
from llmprune.plans.plan import KeptBlock, Plan
from llmprune.plans.surgery import Surgery
from llmprune.utils.errors import UserError
from tests.conftest import tiny_config

CONFIG = tiny_config(tie_word_embeddings=False)


def plan() -> Plan:
    return Plan(
        family="llama",
        model="",
        source=LLAMA.shape(CONFIG),
        blocks=(
            KeptBlock.whole(1, heads=(2, 3, 6, 7), channels=(0, 7)),
            KeptBlock.whole(3, heads=(0, 1, 4, 5), channels=(5, 9)),
        ),
        hidden=(0, 10, 20, 31),
        factors={
            "hidden": torch.tensor([1.0, 0.5, 4.0, 2.0]),
            "attention": torch.tensor([1.0, 3.0]),
            "heads.3": torch.tensor([1.0, 2.0, 4.0, 8.0]),
        },
    )


def test_the_attention_output_loses_rows_and_columns_and_takes_all_factors() -> None:
    surgery = Surgery(CONFIG, plan())
    weight = torch.randn(32, 64)
    name = "model.layers.3.self_attn.o_proj.weight"
    assert surgery.new_name(name) == "model.layers.1.self_attn.o_proj.weight"
    found = surgery.cut(name, {name: weight})
    for row, (hidden, factor) in enumerate(((0, 1.0), (10, 0.5), (20, 4.0), (31, 2.0))):
        for column, (head, gate) in enumerate(((0, 1.0), (1, 2.0), (4, 4.0), (5, 8.0))):
            expected = weight[hidden, head * 8 : head * 8 + 8] * factor * 3.0 * gate
            torch.testing.assert_close(found[row, column * 8 : column * 8 + 8], expected)


def test_keys_follow_their_groups_and_norms_the_hidden_dimensions() -> None:
    surgery = Surgery(CONFIG, plan())
    weight = torch.randn(32, 32)
    found = surgery.cut(name := "model.layers.1.self_attn.k_proj.weight", {name: weight})
    kept = [*range(8, 16), *range(24, 32)]  # groups 1 and 3
    torch.testing.assert_close(found, weight[kept][:, [0, 10, 20, 31]])
    norm = torch.randn(32)
    found = surgery.cut("model.norm.weight", {"model.norm.weight": norm})
    torch.testing.assert_close(found, norm[[0, 10, 20, 31]] * torch.tensor([1, 0.5, 4, 2]))


def test_removed_blocks_have_no_name() -> None:
    surgery = Surgery(CONFIG, plan())
    assert surgery.new_name("model.layers.0.mlp.up_proj.weight") is None
    assert surgery.new_name("lm_head.weight") == "lm_head.weight"
    assert Surgery(tiny_config(), plan()).new_name("lm_head.weight") is None


def test_attention_and_mlp_of_two_blocks_share_one() -> None:
    surgery = Surgery(CONFIG, Plan("llama", "", LLAMA.shape(CONFIG), (KeptBlock(0, 2), KeptBlock.whole(3))))
    names = {
        "model.layers.0.self_attn.q_proj.weight": "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.post_attention_layernorm.weight": None,
        "model.layers.0.mlp.up_proj.weight": None,
        "model.layers.1.input_layernorm.weight": None,
        "model.layers.2.self_attn.o_proj.weight": None,
        "model.layers.2.post_attention_layernorm.weight": "model.layers.0.post_attention_layernorm.weight",
        "model.layers.2.mlp.down_proj.weight": "model.layers.0.mlp.down_proj.weight",
        "model.layers.3.input_layernorm.weight": "model.layers.1.input_layernorm.weight",
    }
    assert {name: surgery.new_name(name) for name in names} == names


def test_factors_keep_the_dtype() -> None:
    weight = torch.randn(32, 64, dtype=torch.bfloat16)
    name = "model.layers.1.self_attn.o_proj.weight"
    assert Surgery(CONFIG, plan()).cut(name, {name: weight}).dtype == torch.bfloat16


def test_the_config_describes_the_cut_model() -> None:
    config = Surgery(CONFIG, plan()).config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 4, 4)
    assert (config.num_key_value_heads, config.head_dim, config.intermediate_size) == (2, 8, 2)
    assert CONFIG.num_hidden_layers == 4


def test_a_plan_for_another_shape_is_refused() -> None:
    with pytest.raises(UserError, match="the plan is for a llama model with layers 4"):
        Surgery(tiny_config(num_hidden_layers=5), plan())


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text"])
def test_shapes_that_transformers_5_refuses_are_refused(model_type: str) -> None:
    """Such as hidden 512 with 9 heads: its configs ask for a multiple, although they name a head size."""
    config = tiny_config(model_type, hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    family = family_of(config)
    shape = family.shape(config)
    family.check_shape(config, replace(shape, hidden=24))
    with pytest.raises(UserError, match="hidden 32 with heads 6; choose hidden 30 or 36"):
        family.check_shape(config, replace(shape, hidden=32))
    config.hidden_size = 44  # a model that only Transformers 4 loads stays what it is
    family.check_shape(config, replace(shape, hidden=32))


def test_other_families_have_no_such_rule() -> None:
    config = tiny_config("qwen3", hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    family_of(config).check_shape(config, replace(family_of(config).shape(config), hidden=32))
