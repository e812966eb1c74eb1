"""Predicted sizes against those of models that were built."""

from dataclasses import replace

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel

from llmprune.models.families import Shape, family_of
from llmprune.models.loading import count_parameters, new_model
from llmprune.pruning.budgets.shape_sizes import ShapeSizes, of_size, prunable_dimensions
from tests.models.families.test_conformance import CONFIGS


def shapes(config: PretrainedConfig) -> list[tuple[Shape, list[int]]]:
    """Some shapes of a model, each with the blocks that stay."""
    family = family_of(config)
    source = family.shape(config)
    narrow = {"kv_heads": max(source.kv_heads // 2, 1), prunable_dimensions(config)[2]: 3}
    hidden = 24
    if family.head_size_is_derived(config):
        hidden = narrow["kv_heads"] * source.heads_per_group * source.head_dim
    return [
        (source, [0, 1, 2, 3]),
        (of_size(source, {"layers": 2}), [0, 3]),
        (of_size(source, {**narrow, "hidden": hidden, "layers": 3}), [0, 1, 3]),
        (replace(of_size(source, {prunable_dimensions(config)[2]: 2}), layers=1), [2]),
    ]


def kept_bytes(model: PreTrainedModel, batch: int, context: int) -> int:
    """Of the key/value cache once a text has passed the model and some more tokens were generated one by one."""
    tokens = torch.ones(batch, context - 3, dtype=torch.int64)
    with torch.no_grad():
        cache = model(input_ids=tokens, use_cache=True).past_key_values
        for _ in range(3):
            model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True)
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_predicted_is_what_is_built(name: str) -> None:
    config = CONFIGS[name]
    sizes = ShapeSizes(config)
    for shape, blocks in shapes(config):
        built = sizes.family.with_shape(config, shape, blocks)
        assert sizes.parameters(shape) == count_parameters(built)
        model = new_model(built, seed=0).eval()
        for batch, context in ((1, 5), (3, 21)):
            predicted = sizes.cache_bytes(shape, blocks, batch=batch, context=context, itemsize=4)
            assert predicted == kept_bytes(model, batch, context)
