"""Block replacement and distillation with flash attention and packed documents: as with any other attention."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from composer.core import Precision, State
from composer.devices import DeviceCPU
from composer.loggers import Logger
from transformers import PreTrainedModel

from llmprune.callbacks.block_replacement import BlockReplacement
from llmprune.models.causal_lm import Batch, ComposerCausalLM
from llmprune.models.families import family_of
from llmprune.pruning.replacements.cache import StatesCache
from llmprune.pruning.replacements.settings import BlockReplacementConfig
from llmprune.pruning.replacements.span import Span
from llmprune.recovery.correspondence import corresponding
from llmprune.recovery.distillation import Distilling
from llmprune.recovery.teachers import ModelTeacher
from tests.conftest import random_model, tiny_config
from tests.harness.flash import flashed

pytestmark = pytest.mark.usefixtures("acted_flash")
SAMPLES, LENGTH = 3, 17
OBJECTIVES = ("mse", "cosine", "lm", "kl")


def batch_of_documents(seed: int = 5) -> Batch:
    """Two documents in every sample."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(300, (SAMPLES, LENGTH), generator=generator)
    positions, labels = torch.arange(LENGTH).repeat(SAMPLES, 1), tokens.clone()
    positions[:, 7:] -= 7
    labels[:, [0, 7]] = -100
    return {"input_ids": tokens, "position_ids": positions, "labels": labels, "slot": torch.arange(SAMPLES)}


def source(attention: str, seed: int = 0, model_type: str = "llama") -> PreTrainedModel:
    model = random_model(tiny_config(model_type), seed=seed)
    return flashed(model) if attention == "flash" else model


def replaced(model: PreTrainedModel, cache: StatesCache | None = None, **settings: Any) -> ComposerCausalLM:
    """The model with a replacement module for blocks 1 and 2, computed from a batch or beginning as blocks."""
    wrapped, batch = ComposerCausalLM(model), batch_of_documents()
    optimizers = [torch.optim.SGD(wrapped.parameters())]
    parts = {"model": wrapped, "device": DeviceCPU(), "precision": Precision.FP32, "optimizers": optimizers}
    state, logger = cast(State, SimpleNamespace(**parts)), Logger(cast(State, None))
    callback = BlockReplacement(
        BlockReplacementConfig(start=1, length=2, force=True, **settings),
        Span(1, 2),
        seed=1,
        fit_on=[batch_of_documents(seed) for seed in range(4)],
        cache=cache,
        cached=[batch],
    )
    for event in (callback.init, callback.before_load, callback.after_load):
        event(state, logger)
    return wrapped


def loss_and_gradients(model: ComposerCausalLM, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: ComposerCausalLM, wanted: ComposerCausalLM) -> None:
    """Losses in training and in evaluation, and gradients."""
    batch = batch_of_documents()
    (loss, grads), (other, others) = loss_and_gradients(found, batch), loss_and_gradients(wanted, batch)
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-6)
    assert grads.keys() == others.keys() and grads
    for name in grads:
        torch.testing.assert_close(grads[name], others[name], rtol=1e-4, atol=1e-5)
    evaluated, expected = found.eval_forward(batch), wanted.eval_forward(batch)
    torch.testing.assert_close(evaluated["loss"], expected["loss"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "opt"])
@pytest.mark.parametrize("kind", ["blocks", "mean", "linear", "closed_form"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_replacement_equals_that_with_sdpa(objective: str, kind: str, model_type: str) -> None:
    settings = {"kind": kind, "objectives": {objective: 1.0}}
    found, wanted = (replaced(source(name, model_type=model_type), **settings) for name in ("flash", "sdpa"))
    assert_same(found, wanted)


def test_cached_states_equal_those_with_sdpa(tmp_path: Path) -> None:
    caches = [StatesCache(tmp_path / name, SAMPLES, LENGTH, 32, {}) for name in ("flash", "sdpa")]
    for cache, name in zip(caches, ("flash", "sdpa"), strict=True):
        replaced(source(name), cache, objectives={"mse": 1.0})
    for place in range(SAMPLES):
        found, wanted = (cache.read(place) for cache in caches)
        assert found.keys() == wanted.keys() >= {"before", "after", "position_ids"}
        for name in found:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-2, atol=1e-5)  # bfloat16


def test_distillation_equals_that_with_sdpa() -> None:
    def distilled(attention: str) -> ComposerCausalLM:
        student, teacher = (source(attention, seed=seed) for seed in (0, 1))
        shape, wrapped = family_of(student.config).shape(student.config), ComposerCausalLM(student)
        learned = corresponding(shape, shape, None, None)
        weights = dict.fromkeys(OBJECTIVES, 1.0)
        wrapped.objective = Distilling(wrapped, ModelTeacher(teacher, blocks=range(4)), weights, learned)
        return wrapped

    assert_same(distilled("flash"), distilled("sdpa"))
