"""Operations by formula against torch's counter, and one model counted by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmprune.measurement.flops import Macs, macs
from llmprune.models.loading import new_model
from tests.conftest import tiny_config
from tests.models.families.test_conformance import CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_against_a_counter(name: str) -> None:
    config = CONFIGS[name]
    model = new_model(config, seed=0, attention="eager").eval()
    tokens = torch.randint(config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    rotation = sum(
        flops
        for module, of in counter.get_flop_counts().items()
        if module.rpartition(".")[2].startswith("rotary_emb")
        for flops in of.values()
    )
    assert 2 * macs(config, 12).total == counter.get_total_flops() - rotation


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
