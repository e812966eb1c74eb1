"""Losses over the vocabulary in chunks equal naive float64 ones, gradients too."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.models import vocabulary
from llmprune.models.causal_lm import ComposerCausalLM, labels_of, logits_of
from llmprune.models.objectives import IGNORED, forward_kl, kl_to_likeliest, likeliest, next_token
from llmprune.models.vocabulary import Head, mean_loss, token_measures
from tests.conftest import random_model, tiny_config

VOCABULARY, HIDDEN, TOKENS = 41, 7, 13


def made(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 4, 2**20], ids=["single", "chunks", "whole"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "CHUNKS", {"cpu": 1})
    monkeypatch.setattr(vocabulary, "LEAST", request.param)


def naive_kl(own: Tensor, teacher: Tensor, k: int | None, temperature: float) -> Tensor:
    """By the definition, token by token."""
    losses = []
    for logits, wanted in zip(own, teacher, strict=True):
        q, p = (logits / temperature).softmax(0), (wanted / temperature).softmax(0)
        if k is not None:
            top = sorted(range(len(p)), key=lambda i, p=p: -p[i].item())[:k]
            rest = [i for i in range(len(p)) if i not in top]
            p, q = (torch.stack([*(x[i] for i in top), x[rest].sum()]) for x in (p, q))
        losses.append((p * (p / q).log()).sum() * temperature**2)
    return torch.stack(losses)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("k", [None, 5])
def test_value_and_gradients_are_naive_float64(k: int | None, softcap: float | None) -> None:
    states, weight, bias = made(0, TOKENS, HIDDEN), made(1, VOCABULARY, HIDDEN), made(2, VOCABULARY)
    teacher, targets = made(3, TOKENS, VOCABULARY), torch.arange(TOKENS) * 3
    own = [tensor.clone().requires_grad_() for tensor in (states, weight, bias)]
    following = next_token(targets)

    def measure(logits: Tensor, part: slice) -> list[Tensor]:
        return [*following(logits, part), forward_kl(logits, teacher[part], k, 2.0)]

    total, means = mean_loss(own[0], Head(own[1], own[2], softcap), measure, [0.3, 0.7])
    (3 * total).backward()

    exact = [tensor.double().requires_grad_() for tensor in (states, weight, bias)]
    logits = exact[0] @ exact[1].T + exact[2]
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    lm = -logits.log_softmax(-1)[range(TOKENS), targets].mean()
    kl = naive_kl(logits, teacher.double(), k, 2.0).mean()
    (3 * (0.3 * lm + 0.7 * kl)).backward()
    assert means.tolist() == pytest.approx([lm.item(), kl.item()], rel=1e-5)
    assert total.item() == pytest.approx(0.3 * lm.item() + 0.7 * kl.item(), rel=1e-5)
    for found, wanted in zip(own, exact, strict=True):
        assert found.grad is not None and wanted.grad is not None
        assert (found.grad - wanted.grad).abs().max() <= 1e-5 * wanted.grad.abs().max()
    with torch.no_grad():
        each = token_measures(own[0], Head(own[1], own[2], softcap), measure)
        assert [values.mean().item() for values in each] == pytest.approx(means.tolist(), rel=1e-5)
        assert mean_loss(own[0], Head(own[1], own[2], softcap), measure, [0.3, 0.7])[0].item() == pytest.approx(
            total.item(), rel=1e-5
        )


def test_the_likeliest_tokens_are_all_that_is_needed() -> None:
    own, teacher = made(4, TOKENS, VOCABULARY), 3 * made(5, TOKENS, VOCABULARY)
    for temperature in (1.0, 4.0):
        tokens, logs = likeliest(teacher, 6, temperature)
        found = kl_to_likeliest(own, tokens, logs, temperature)
        torch.testing.assert_close(found, forward_kl(own, teacher, 6, temperature))
        assert (found <= forward_kl(own, teacher, None, temperature) + 1e-6).all()


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_models_loss_and_gradients_are_those_of_whole_logits(model_type: str, tokens: Tensor) -> None:
    model = random_model(tiny_config(model_type)).train()
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    batch["labels"][1, :5] = IGNORED
    logits = logits_of(model, batch)
    labels = labels_of(batch)
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    loss = ComposerCausalLM(model)(batch)
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_a_batch_without_targets_moves_nothing(tokens: Tensor) -> None:
    model = random_model(tiny_config())
    loss = ComposerCausalLM(model)({"input_ids": tokens, "labels": torch.full_like(tokens, IGNORED)})
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_only_one_chunk_of_logits_exists(monkeypatch: pytest.MonkeyPatch, tokens: Tensor) -> None:
    monkeypatch.setattr(vocabulary, "CHUNKS", {"cpu": 300 * 4})
    monkeypatch.setattr(vocabulary, "LEAST", 1)
    model = random_model(tiny_config())
    sizes: list[int] = []
    raw = Head.raw
    monkeypatch.setattr(Head, "raw", lambda self, states: sizes.append(len(states)) or raw(self, states))
    wide: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: wide.append(output.shape[-1]))
    ComposerCausalLM(model)({"input_ids": tokens}).backward()
    assert sum(sizes) == 3 * 16 and max(sizes) == 4 and wide == [32]


def test_it_takes_one_backward_pass_only() -> None:
    states = made(0, 3, HIDDEN).requires_grad_()
    total, _ = mean_loss(states, Head(made(1, VOCABULARY, HIDDEN)), next_token(torch.arange(3)), [1.0])
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass only"):
        total.backward()
