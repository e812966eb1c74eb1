"""The Composer model computes what Hugging Face computes."""

import math

import pytest
import torch

from llmprune.models.causal_lm import ComposerCausalLM, document_bounds, logits_of, token_losses
from llmprune.models.objectives import IGNORED
from tests.conftest import random_model, tiny_config
from tests.harness.flash import flashed


def test_same_logits_names_and_loss_as_hugging_face(tokens: torch.Tensor) -> None:
    model = random_model(tiny_config())
    with torch.no_grad():
        reference = model(input_ids=tokens, labels=tokens, use_cache=False)
    wrapped = ComposerCausalLM(model)
    batch = {"input_ids": tokens}
    with torch.no_grad():
        assert wrapped.loss(wrapped(batch), batch).item() == pytest.approx(reference.loss.item(), rel=1e-6)
        assert torch.equal(logits_of(model, batch), reference.logits)
    assert {name.removeprefix("model.") for name in wrapped.state_dict()} == set(model.state_dict())
    assert all(name.startswith("model.") for name in wrapped.state_dict())


def test_token_losses_are_a_naive_loop(tokens: torch.Tensor) -> None:
    logits = torch.randn(3, 17, 300)
    labels = tokens.clone()
    labels[1, 4:9] = IGNORED
    sums, counts = token_losses(logits, labels)
    for sample in range(3):
        expected = [
            -math.log(logits[sample, t].double().softmax(-1)[labels[sample, t + 1]])
            for t in range(16)
            if labels[sample, t + 1] != IGNORED
        ]
        assert counts[sample] == len(expected)
        assert sums[sample].item() == pytest.approx(sum(expected), rel=1e-5)


def test_losses_per_domain_and_perplexity_come_from_one_pass(tokens: torch.Tensor) -> None:
    model = ComposerCausalLM(random_model(tiny_config()), {0: "a", 2: "c"})
    batch = {"input_ids": tokens, "domain": torch.tensor([0, 2, 0])}
    metrics = model.get_metrics()
    assert list(metrics) == ["loss", "perplexity"]
    with torch.no_grad():
        outputs = model.eval_forward(batch)
        alone = [model.loss(model({"input_ids": row[None]}), {"input_ids": row[None]}).item() for row in tokens]
    for metric in metrics.values():
        model.update_metric(batch, outputs, metric)
    assert metrics["loss"].compute().item() == pytest.approx(sum(alone) / 3, rel=1e-5)
    by_domain = metrics["loss"].means
    assert (by_domain[0], by_domain[2]) == pytest.approx(((alone[0] + alone[2]) / 2, alone[1]), rel=1e-5)
    assert math.isnan(by_domain[1])
    assert metrics["perplexity"].compute().item() == pytest.approx(math.exp(sum(alone) / 3), rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_counted_by_hand(tied: bool) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    model = ComposerCausalLM(random_model(config))
    block = 32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 48  # q, k and v, o, MLP
    multiplied = 4 * block + 300 * 32
    expected = 2 * 16 * (6 * multiplied + 12 * 4 * 64 * 16)
    assert model.flops_per_batch({"input_ids": torch.zeros(2, 16)}) == expected


@pytest.mark.usefixtures("acted_flash")
def test_flash_attention_is_told_where_documents_begin(tokens: torch.Tensor) -> None:
    """Shapes stay [batch, length], and a sample that goes on with a document does not see the sample before."""
    positions = torch.stack([torch.arange(17), torch.arange(5, 22), torch.arange(17)])
    positions[0, 7:] -= 7
    batch = {"input_ids": tokens, "position_ids": positions}
    with torch.no_grad():
        found = logits_of(flashed(random_model(tiny_config())), batch)
        torch.testing.assert_close(found, logits_of(random_model(tiny_config()), batch), rtol=1e-4, atol=1e-5)
    assert document_bounds(positions)["cu_seq_lens_q"].tolist() == [0, 7, 17, 34, 51]
