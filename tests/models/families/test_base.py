"""Shapes, targets, and what a family says of a config."""

import re
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from llmprune.models.families import Role, Shape, family_of, shape_from, target_shape
from llmprune.models.families.llama import LLAMA, QWEN2
from llmprune.models.loading import new_model
from llmprune.models.stored_weights import parameter_names
from llmprune.pruning.gates.settings import L0PruningConfig, make_goal
from llmprune.utils.errors import UserError
from tests.conftest import tiny_config

LLAMA_2_7B = Shape(32, hidden=4096, heads=32, kv_heads=32, head_dim=128, intermediate=11008, vocabulary=32000)
GROUPED = Shape(layers=8, hidden=64, heads=8, kv_heads=4, head_dim=8, intermediate=96)


def test_shape_of_a_config_without_newer_fields() -> None:
    config = LlamaConfig()
    config.head_dim = config.num_key_value_heads = None
    assert LLAMA.shape(config) == LLAMA_2_7B


def test_with_shape_is_the_inverse_of_shape() -> None:
    shape = Shape(3, 24, 4, 2, 8, 31, vocabulary=200)
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


def named(told: str) -> list[dict[str, int]]:
    """The changes of a target that a refusal proposes."""
    proposed = told.rpartition("choose ")[2]
    if pairs := re.findall(r"hidden (\d+) with heads (\d+)", proposed):
        return [{"hidden": int(hidden), "heads": int(heads)} for hidden, heads in pairs]
    kind = "hidden" if proposed.startswith("hidden") else "heads"
    return [{kind: int(number)} for number in re.findall(r"\d+", proposed.partition(",")[0])]


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "opt", "gemma2", "qwen3"])
def test_the_sizes_that_a_refusal_names_are_possible(model_type: str) -> None:
    config = tiny_config(model_type)
    family = family_of(config)
    source = family.shape(config)

    def refused(target: dict[str, int]) -> str | None:
        try:
            family.check_shape(config, target_shape(source, target))
        except UserError as error:
            return str(error)
        return None

    refusals = 0
    for heads in range(1, source.heads + 1):
        for hidden in range(1, source.hidden + 1):
            targets = [{"heads": heads, "hidden": hidden}]
            for _ in range(3):  # one refusal for heads, one for hidden
                found = [(target, refused(target)) for target in targets]
                targets = [{**target, **change} for target, told in found if told for change in named(told)]
                refusals += len(targets)
            assert not targets, (heads, hidden, targets)
    assert refusals > 0 or model_type == "qwen3"


def test_an_unknown_architecture_names_the_supported_ones() -> None:
    with pytest.raises(UserError, match="'gpt2' is not supported; supported: gemma, gemma2, gemma3_text, "):
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


def test_fused_projections_and_experts_count_as_what_they_hold() -> None:
    assert LLAMA.matrices(tiny_config()) == {"query": 2, "key_value": 2, "channel": 3}
    phi = tiny_config("phi3", pad_token_id=2)
    assert family_of(phi).matrices(phi) == {"query": 2, "key_value": 2, "channel": 3}
    neox = tiny_config("gpt_neox", num_attention_heads=4)
    assert family_of(neox).matrices(neox) == {"query": 4, "channel": 2}
    mixture = tiny_config("mixtral", num_local_experts=5)
    assert family_of(mixture).matrices(mixture) == {"query": 2, "key_value": 2, "channel": 15, "expert": 1}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tiny_config("opt", do_layer_norm_before=False), "do_layer_norm_before = False are not supported"),
        (tiny_config("opt", word_embed_proj_dim=16), "word_embed_proj_dim = 16 other than hidden_size = 32"),
        (tiny_config("qwen3_moe", mlp_only_layers=[1]), "mlp_only_layers"),
    ],
)
def test_variants_that_no_entry_describes_are_refused(config: PretrainedConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        family_of(config)


def test_a_derived_head_size_says_which_shapes_work() -> None:
    config = tiny_config("opt", num_attention_heads=4, word_embed_proj_dim=32)
    family = family_of(config)
    with pytest.raises(UserError, match="choose hidden 32 with heads 4, or hidden 24 with heads 3"):
        family.check_shape(config, replace(family.shape(config), hidden=24))
    family.check_shape(config, replace(family.shape(config), hidden=24, heads=3, kv_heads=3))


def test_long_context_rope_fixes_the_head_size() -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 2, "long_factor": [2.0] * 2}
    fields = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "hidden_size": 16, "pad_token_id": 2}
    config = tiny_config("phi3", rope_scaling=scaling, original_max_position_embeddings=32, **fields)
    family = family_of(config)
    with pytest.raises(UserError, match="shrink together"):
        family.with_shape(config, replace(family.shape(config), hidden=8), range(4))
    with pytest.raises(UserError, match="choose gates on both hidden and kv_group"):
        make_goal(config, L0PruningConfig(target_sparsity=0.3, gates=["hidden", "intermediate"]))
    cut = family.with_shape(config, replace(family.shape(config), hidden=8, heads=2, kv_heads=1), range(4))
    assert family.shape(type(cut)(**cut.to_dict())).hidden == 8


def test_buffers_of_old_checkpoints_are_no_parameters() -> None:
    config = tiny_config("gpt_neox", num_attention_heads=4)
    weights = {name: torch.zeros(1) for name in ("gpt_neox.embed_in.weight", "gpt_neox.layers.0.attention.bias")}
    assert parameter_names(weights, config) == ["gpt_neox.embed_in.weight"]
