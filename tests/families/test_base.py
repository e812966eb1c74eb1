"""Shapes, targets, and what a family says of a config."""

from dataclasses import replace

import pytest
from transformers import GPT2Config, LlamaConfig

from llmprune.errors import UserError
from llmprune.families import Role, Shape, family_of, shape_from, target_shape
from llmprune.families.llama import LLAMA, QWEN2
from llmprune.models.loading import new_model
from tests.conftest import tiny_config

LLAMA_2_7B = Shape(layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, intermediate=11008)
GROUPED = Shape(layers=8, hidden=64, heads=8, kv_heads=4, head_dim=8, intermediate=96)


def test_shape_of_a_config_without_newer_fields() -> None:
    config = LlamaConfig()
    config.head_dim = config.num_key_value_heads = None
    assert LLAMA.shape(config) == LLAMA_2_7B


def test_with_shape_is_the_inverse_of_shape() -> None:
    shape = Shape(3, 24, 4, 2, 8, 31)
    assert LLAMA.shape(LLAMA.with_shape(tiny_config(), shape, [0, 1, 3])) == shape


def test_lists_per_block_follow_their_blocks() -> None:
    config = tiny_config("qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=2)
    assert config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    cut = QWEN2.with_shape(config, replace(QWEN2.shape(config), layers=2), [1, 3])
    assert cut.layer_types == ["full_attention", "sliding_attention"] and len(config.layer_types) == 4


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ({"heads": 4}, (4, 2)),  # whole groups go, two queries in each stay
        ({"kv_heads": 2}, (4, 2)),
        ({"heads": 4, "kv_heads": 4}, (4, 4)),
        ({"heads": 2, "kv_heads": 2}, (2, 2)),
    ],
)
def test_heads_of_a_target(target: dict[str, int | None], expected: tuple[int, int]) -> None:
    shape = target_shape(GROUPED, target)
    assert (shape.heads, shape.kv_heads) == expected


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"hidden": 65}, "between 1 and the source's 64"),
        ({"layers": 0}, "between 1"),
        ({"heads": 3}, "choose 2 or 4"),
        ({"heads": 6, "kv_heads": 4}, "divided evenly"),
        ({"heads": 4, "kv_heads": 1}, "choose at most 2 heads"),
        ({}, "empty"),
    ],
)
def test_impossible_targets_say_what_to_do(target: dict[str, int | None], message: str) -> None:
    with pytest.raises(UserError, match=message):
        target_shape(GROUPED, target)


def test_an_unknown_architecture_names_the_supported_ones() -> None:
    with pytest.raises(UserError, match="'gpt2' is not supported; supported: llama, mistral, qwen2, qwen3"):
        family_of(GPT2Config())


def test_every_parameter_has_a_role() -> None:
    model = new_model(tiny_config(tie_word_embeddings=False, attention_bias=True, mlp_bias=True), seed=0)
    for name, parameter in model.named_parameters():
        located = LLAMA.locate(name)
        assert len(located.axes) == parameter.ndim
    assert LLAMA.locate("model.layers.2.mlp.down_proj.weight")[:2] == (Role.MLP_OUT, 2)
    with pytest.raises(UserError, match="no parameter of the family llama"):
        LLAMA.locate("transformer.h.0.attn.weight")


@pytest.mark.parametrize("values", [{}, {"layers": 1}, {**vars(GROUPED), "hidden": -1}, {**vars(GROUPED), "heads": 7}])
def test_damaged_shapes_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(UserError):
        shape_from(values)
