"""The pretended device itself."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmprune.models.causal_lm import ComposerCausalLM
from tests.conftest import random_model, tiny_config
from tests.harness.pretend_device import DEVICE, MixedDevices, pretended


def test_mixing_is_refused_where_cuda_refuses_it() -> None:
    with pretended():
        x, index = torch.ones(3, device=DEVICE), torch.tensor([0, 2])
        assert x.device == DEVICE and (x + 1).device == DEVICE
        for mixed in (
            lambda: x + torch.ones(3),
            lambda: torch.cat([x, torch.ones(1)]),
            lambda: torch.ones(3) * x.sum(),
        ):
            with pytest.raises(MixedDevices, match="on the CPU"):
                mixed()
        with pytest.raises(MixedDevices):
            x[index.to(DEVICE)] = torch.ones(2)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert (x * torch.tensor(2.0)).tolist() == [2, 2, 2] and x[index].tolist() == [1, 1]
        x.copy_(torch.zeros(3))
        assert x.cpu().device.type == "cpu" and x.cpu().sum() == 0


def test_waits_are_counted_by_kind() -> None:
    with pretended() as waits:
        x = torch.arange(4.0, device=DEVICE)
        mask, found = x > 1, torch.arange(4).to(DEVICE, non_blocking=True)
        x[mask] = 5.0
        x.masked_fill(mask, 0.0), torch.where(mask, x, found), F.softmax(x, -1)
        assert waits.of() == 0, waits
        for wait, kind in (
            (lambda: x.sum().item(), "read"),
            (lambda: x.tolist(), "read"),
            (lambda: bool(mask.any()), "read"),
            (lambda: float(x[0]), "read"),
            (lambda: x.cpu(), "read"),
            (lambda: torch.equal(x, x), "read"),
            (lambda: x[mask], "size"),
            (lambda: mask.nonzero(), "size"),
            (lambda: torch.tensor([1.0, 2.0], device=DEVICE), "copy"),
            (lambda: torch.ones(2).to(DEVICE), "copy"),
            (lambda: x.copy_(torch.ones(4)), "copy"),
            (lambda: x[torch.tensor([1, 2])], "copy"),
        ):
            waits.clear()
            wait()
            assert (waits.of(), waits.of(kind)) == (1, 1), waits
            assert "test_pretend_device.py" in repr(waits)


def test_a_model_computes_and_learns_as_on_the_cpu(tokens: torch.Tensor) -> None:
    model = ComposerCausalLM(random_model(tiny_config()))
    moved = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (model, moved)]
    with pretended():
        kept = [*moved.parameters()]
        moved.to(DEVICE)
        assert all(a is b and a.device == DEVICE for a, b in zip(kept, moved.parameters(), strict=True))
        assert moved.model.lm_head.weight is moved.model.model.embed_tokens.weight  # tied
        assert isinstance(kept[0], nn.Parameter) and len(kept) == len([*model.parameters()])
        for each, optimizer in zip((model, moved), optimizers, strict=True):
            device = next(each.parameters()).device
            for _ in range(2):
                optimizer.zero_grad()
                each({"input_ids": tokens.to(device)}).backward()
                optimizer.step()
        for a, b in zip(model.parameters(), moved.parameters(), strict=True):
            torch.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-5)
        copied = copy.deepcopy(moved)
        assert isinstance(next(copied.parameters()), nn.Parameter)
        with pytest.raises(MixedDevices):
            moved({"input_ids": tokens})
