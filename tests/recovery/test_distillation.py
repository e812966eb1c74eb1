"""Distillation's parts and gradients against naive ones, on every family; which states correspond."""

import copy
from dataclasses import replace

import pytest
import torch

from llmprune.models.block_hooks import blocks_of
from llmprune.models.causal_lm import ComposerCausalLM
from llmprune.models.families import family_of
from llmprune.plans.plan import KeptBlock, Plan
from llmprune.recovery.correspondence import Correspondence, corresponding
from llmprune.recovery.distillation import DistillationConfig, Distilling
from llmprune.recovery.teachers import ModelTeacher
from llmprune.utils.errors import UserError
from tests.conftest import random_model
from tests.models.families.test_conformance import CONFIGS

WEIGHTS = {"kl": 1.0, "lm": 0.5, "mse": 0.25, "cosine": 2.0}
PAIRS = {0: 1, 2: 2}


def observed(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits and the output of every block, by hooks."""
    seen: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda m, i, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks_of(model)  # type: ignore[arg-type]
    ]
    logits = model(input_ids=tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, seen


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_objective_alone(name: str, tokens: torch.Tensor) -> None:
    """Its part, and the gradient that it has in the sum of all."""
    student, teacher = (random_model(CONFIGS["llama-grouped-tied"], seed=seed) for seed in (0, 1))
    teacher.requires_grad_(False)
    wrapped = ComposerCausalLM(student)

    def of(weights: dict[str, float]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        student.zero_grad()
        objective = Distilling(wrapped, ModelTeacher(teacher, blocks=PAIRS.values()), weights, Correspondence(PAIRS))
        loss = objective.loss({"input_ids": tokens})
        loss.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in student.parameters()]
        return objective.terms[name], grads

    part, alone = of({name: 1.0})
    whole, twice = of({**WEIGHTS, name: WEIGHTS[name] + 1.0})
    _, once = of(WEIGHTS)
    assert part.item() == pytest.approx(whole.item(), rel=1e-5)
    for own, a, b in zip(alone, twice, once, strict=True):
        torch.testing.assert_close(own, a - b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_naive(name: str, tokens: torch.Tensor) -> None:
    student, teacher = (random_model(CONFIGS[name], seed=seed).eval() for seed in (0, 1))
    teacher.requires_grad_(False)
    naive = copy.deepcopy(student)
    wrapped = ComposerCausalLM(student)
    wrapped.objective = Distilling(
        wrapped, ModelTeacher(teacher, blocks=PAIRS.values(), temperature=2.0), WEIGHTS, Correspondence(PAIRS)
    )
    loss = wrapped({"input_ids": tokens})
    loss.backward()

    logits, states = observed(naive, tokens)
    wanted, targets = observed(teacher, tokens)
    q, p = (x[:, :-1].double().div(2.0).log_softmax(-1) for x in (logits, wanted))
    pairs = [(states[own][:, :-1], targets[other][:, :-1]) for own, other in PAIRS.items()]
    cosine = torch.nn.functional.cosine_similarity
    parts = {
        "kl": 4.0 * (p.exp() * (p - q)).sum(-1).mean(),
        "lm": -logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean(),
        "mse": sum(((a - b).square().mean(-1) / b.square().mean(-1)).mean() for a, b in pairs) / 2,
        "cosine": sum((1 - cosine(a, b, dim=-1)).mean() for a, b in pairs) / 2,
    }
    found = wrapped.objective.terms
    assert {key: value.item() for key, value in found.items()} == pytest.approx(
        {key: float(value) for key, value in parts.items()}, rel=1e-4
    )
    total = sum(WEIGHTS[key] * value for key, value in parts.items())
    assert loss.item() == pytest.approx(float(total), rel=1e-4)
    total.backward()  # type: ignore[union-attr]
    for (key, own), other in zip(student.named_parameters(), naive.parameters(), strict=True):
        if other.grad is not None:
            assert own.grad is not None, key
            assert (own.grad - other.grad).abs().max() <= 1e-4 * max(other.grad.abs().max().item(), 1e-2), key
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("name", ["llama-grouped-tied", "gemma2", "opt", "gpt_neox", "mixtral"])
def test_blocks_alone_get_the_states_of_the_teacher(name: str, tokens: torch.Tensor) -> None:
    student, teacher = (random_model(CONFIGS[name], seed=seed).eval() for seed in (0, 1))
    teacher.requires_grad_(False)
    naive = copy.deepcopy(student)
    pairs = Correspondence({0: 1, 2: 3}, before={0: -1, 2: 1})
    objective = Distilling(
        ComposerCausalLM(student), ModelTeacher(teacher, blocks=pairs.needed(local=True)), {"local": 2.0}, pairs
    )
    loss = objective.loss({"input_ids": tokens})
    loss.backward()

    inputs: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, given: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
        inputs.append(given[0] if given else named["hidden_states"])

    hooks = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks_of(teacher)]
    _, outputs = observed(teacher, tokens)
    for hook in hooks:
        hook.remove()

    def replaced(states: torch.Tensor):  # type: ignore[no-untyped-def]
        def exchange(module, given, named):  # type: ignore[no-untyped-def]
            return ((states, *given[1:]), named) if given else (given, {**named, "hidden_states": states})

        return exchange

    blocks = list(blocks_of(naive))
    for own, other in ((0, 0), (2, 2)):  # the input of the teacher's block 2 is what comes after its block 1
        blocks[own].register_forward_pre_hook(replaced(inputs[other]), with_kwargs=True)
    _, after = observed(naive, tokens)
    errors = [
        ((after[own] - outputs[other])[:, :-1].square().mean(-1) / outputs[other][:, :-1].square().mean(-1)).mean()
        for own, other in pairs.blocks.items()
    ]
    total = 2.0 * torch.stack(errors).mean()
    assert loss.item() == pytest.approx(total.item(), rel=1e-4)
    assert objective.terms["local"].item() == pytest.approx(total.item() / 2, rel=1e-4)
    grads = torch.autograd.grad(total, [*blocks[0].parameters(), *blocks[2].parameters()], allow_unused=True)
    own = [*blocks_of(student)[0].parameters(), *blocks_of(student)[2].parameters()]  # type: ignore[index]
    for parameter, expected in zip(own, grads, strict=True):
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-6)
    assert all(parameter.grad is None for parameter in blocks_of(student)[1].parameters())  # type: ignore[index]


def test_a_plan_says_what_corresponds() -> None:
    """The states after a block are those that the next kept one was given, in its dimensions and with its factors."""
    teacher = family_of(CONFIGS["llama-grouped-tied"]).shape(CONFIGS["llama-grouped-tied"])
    teacher = replace(teacher, layers=8)
    blocks = tuple(map(KeptBlock.whole, (0, 3, 4, 6)))
    hidden = (1, 2, 5, 8)
    factors = {"hidden": torch.tensor([1.0, 0.5, 1.0, 2.0])}
    plan = Plan("llama", "", teacher, blocks, hidden, factors)
    found = corresponding(plan.shape, teacher, plan, None)
    assert found.blocks == {0: 2, 1: 3, 2: 5, 3: 7}
    assert found.before == {0: -1, 1: 2, 2: 3, 3: 5}
    states = torch.arange(32.0).expand(2, 3, 32)
    assert found.target(states)[0, 0].tolist() == [1.0, 1.0, 5.0, 16.0]
    assert corresponding(plan.shape, teacher, plan, [3]).blocks == {3: 7}
    with pytest.raises(UserError, match="the plan leads from"):
        corresponding(teacher, teacher, plan, None)
    with pytest.raises(UserError, match="name the plan that it was cut by"):
        corresponding(plan.shape, teacher, None, None)


def test_without_a_plan_blocks_are_spread_evenly() -> None:
    shape = family_of(CONFIGS["opt"]).shape(CONFIGS["opt"])
    found = {
        layers: corresponding(replace(shape, layers=layers), replace(shape, layers=12), None, None).blocks
        for layers in (3, 4, 12)
    }
    assert found == {3: {0: 3, 1: 7, 2: 11}, 4: {0: 2, 1: 5, 2: 8, 3: 11}, 12: {n: n for n in range(12)}}


def test_weights_go_in_a_straight_line() -> None:
    config = DistillationConfig(objectives={"kl": 1.0}, final_objectives={"lm": 2.0})
    assert config.weights(0.0) == {"kl": 1.0, "lm": 0.0}
    assert config.weights(0.25) == pytest.approx({"kl": 0.75, "lm": 0.5})
    assert config.weights(1.0) == {"kl": 0.0, "lm": 2.0}
    assert DistillationConfig().weights(0.7) == pytest.approx({"kl": 1.0})
