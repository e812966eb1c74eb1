"""Operations by formula against torch's counter, forward and backward, and one model counted by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from llmprune.models.block_hooks import blocks_of
from llmprune.models.flops import Learned, Macs, learned_by, learned_of, macs, step_flops
from llmprune.models.loading import new_model
from llmprune.recovery.lora import LoRAConfig, add_adapters
from tests.conftest import random_model, tiny_config
from tests.models.families.test_conformance import CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_against_a_counter(name: str) -> None:
    config = CONFIGS[name]
    model = new_model(config, seed=0, attention="eager").eval()
    with torch.no_grad():
        assert macs(config, 12).forward == counted(model, backward=False)
    assert macs(config, 12).step == step_flops(config, 12, learned_by(model)) == counted(model, backward=True)
    assert learned_by(model) == Learned(macs(config, 1).matrices, 0, model.config.num_hidden_layers)


def test_what_is_frozen_takes_no_gradient() -> None:
    model = random_model(tiny_config(), attention="eager").requires_grad_(False)
    blocks_of(model)[2].requires_grad_(True)
    block = macs(model.config, 12, blocks=1, logits=0)
    assert learned_by(model) == Learned(block.matrices // 12, 0, 2)
    assert step_flops(model.config, 12, learned_by(model)) == counted(model, backward=True)
    add_adapters(model, LoRAConfig(rank=2, dropout=0.0), 0)
    model.requires_grad_(False)
    adapters = [p for name, p in model.named_parameters() if ".lora_" in name]
    for parameter in adapters:
        parameter.requires_grad_(True)
    learned = learned_by(model)
    assert learned == Learned(0, sum(p.numel() for p in adapters), 4)
    assert step_flops(model.config, 12, learned) == pytest.approx(counted(model, backward=True), rel=0.05)


def test_what_no_product_is_made_of_costs_nothing() -> None:
    tied, untied = tiny_config(tie_word_embeddings=True), tiny_config(tie_word_embeddings=False)
    names = {"model.embed_tokens.weight": 300 * 32, "model.norm.weight": 32}
    assert learned_of(tied, names) == Learned(300 * 32, 0, 4)
    assert learned_of(untied, names) == Learned(0, 0, 4)
    assert learned_of(untied, {"lm_head.weight": 300 * 32}) == Learned(300 * 32, 0, 0)


def counted(model: PreTrainedModel, *, backward: bool) -> int:
    """What torch counts in the passes of 12 tokens, without the angles of rotary positions."""
    tokens = torch.randint(model.config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=tokens, use_cache=False).logits
        if backward:
            logits.sum().backward()
    rotation = sum(
        flops
        for module, of in counter.get_flop_counts().items()
        if module.rpartition(".")[2].startswith("rotary_emb")
        for flops in of.values()
    )
    return counter.get_total_flops() - rotation


def test_by_hand() -> None:
    """Four blocks: 8 query heads and 4 key/value heads of 8, hidden 32, 48 channels, 300 tokens known."""
    found = macs(tiny_config(), tokens=5, past=7, logits=1)
    projections = 32 * 64 + 2 * (32 * 32) + 64 * 32  # query, key and value, out
    assert found == Macs(
        projections=5 * 4 * projections,
        attention=5 * 4 * 2 * 64 * 12,
        mlp=5 * 4 * 3 * 32 * 48,
        output=32 * 300,
    )
