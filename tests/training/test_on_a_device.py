"""Every path on a pretended device: nothing is mixed, no collective gets a tensor of the CPU, and few waits.

The numbers of waits are today's, as bounds. A read or a blocking copy costs some 10 µs and the time that the device
needs to catch up.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import composer.utils.dist as dist
import pytest
import torch
import torch.nn.functional as F
from composer.core import Callback
from torch import Tensor
from torch.utils.data import default_collate

from llmprune.callbacks import distillation
from llmprune.callbacks.block_replacement import BlockReplacement
from llmprune.callbacks.l0_pruning import L0Pruning
from llmprune.callbacks.loss_guard import LossGuard
from llmprune.callbacks.low_rank_adaptation import LowRankAdaptation
from llmprune.callbacks.partial_training import PartialTraining
from llmprune.callbacks.preemption import Preemption
from llmprune.evaluation.perplexity import Segmentation, measure_perplexity
from llmprune.models.causal_lm import Batch, ComposerCausalLM
from llmprune.models.families import Shape, family_of
from llmprune.plans.plan import KeptBlock, Plan
from llmprune.pruning.budgets.trial import Trial
from llmprune.pruning.gates.settings import L0PruningConfig, TargetShape
from llmprune.pruning.replacements.cache import StatesCache
from llmprune.pruning.replacements.modules import REPLACEMENTS
from llmprune.pruning.replacements.settings import BlockReplacementConfig
from llmprune.pruning.replacements.span import Span
from llmprune.pruning.scoring.all_criteria import CRITERIA
from llmprune.pruning.scoring.criterion import ScoringJob
from llmprune.pruning.scoring.scorer import Scorer
from llmprune.pruning.selection.correction import corrected
from llmprune.pruning.selection.methods import ScoredModel
from llmprune.recovery.correspondence import corresponding
from llmprune.recovery.distillation import DistillationConfig
from llmprune.recovery.lora import LoRAConfig
from llmprune.recovery.token_map import TokenMap
from llmprune.recovery.trainable import TrainableConfig
from llmprune.training.replaced_span import most_alike
from llmprune.utils.processes import TERMINATION
from tests.conftest import random_model, tiny_config
from tests.harness.flash import flashed
from tests.harness.pretend_device import DEVICE, Waits, pretended
from tests.harness.steps import Loop, PretendedDevice, second_rank
from tests.models.families.test_conformance import CONFIGS

LENGTH = 16


@pytest.fixture
def waits() -> Iterator[Waits]:
    with pretended() as waits, second_rank():
        yield waits


def wrapped(layers: int = 4, **changes: Any) -> ComposerCausalLM:
    return ComposerCausalLM(random_model(tiny_config(num_hidden_layers=layers, **changes)), {0: "a", 1: "b"}).train()


def a_batch(*, documents: bool = False, teacher: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(300, (2, LENGTH), generator=generator)
    batch = {"input_ids": tokens, "domain": torch.tensor([0, 1]), "slot": torch.arange(2)}
    if documents:
        positions, labels = torch.arange(LENGTH).repeat(2, 1), tokens.clone()
        positions[:, 7:] -= 7
        labels[:, [0, 7]] = -100
        batch |= {"position_ids": positions, "labels": labels}
    if teacher:
        logs = torch.randn(2, LENGTH, 4, generator=generator).log_softmax(-1)
        batch |= {"teacher_tokens": torch.randint(300, logs.shape, generator=generator), "teacher_logs": logs}
    return batch


def steps(loop: Loop, microbatch: int, batch: int, evaluation: int = 5, **kinds: bool) -> None:
    """Train on samples without and with documents, and evaluate, with at most so many waits."""
    for documents in (False, True):
        loop.train(a_batch(documents=documents, **kinds))
        assert loop.in_microbatch.of() <= microbatch, loop.in_microbatch
        assert loop.in_batch.of() <= batch, loop.in_batch
    loop.evaluate(a_batch())
    assert loop.in_evaluation.of() <= evaluation, loop.in_evaluation


def test_plain_training(waits: Waits) -> None:
    steps(Loop(wrapped(), [LossGuard(), Preemption(TERMINATION)], waits), 5, 4)


GOALS: dict[str, dict[str, Any]] = {
    "shape": {"target": TargetShape(layers=3, hidden=24, heads=4, intermediate=32)},
    "size": {"target_sparsity": 0.4},
}


@pytest.mark.parametrize(("goal", "manner"), [("shape", "expected"), ("shape", "target"), ("size", "target")])
def test_gates(waits: Waits, goal: str, manner: str) -> None:
    callback = L0Pruning(L0PruningConfig(lagrangian_warmup="4ba", evaluate_at=manner, **GOALS[goal]), seed=1)
    loop = Loop(wrapped(), [callback], waits)
    steps(loop, 5, 1, 5 if manner == "expected" else 23)  # the shape of the target is found on the host
    callback.gates.plan("llama", "")
    callback.state_dict()


@pytest.mark.parametrize("objectives", [{"mse": 1.0, "cosine": 1.0}, {"lm": 1.0, "kl": 1.0}], ids="+".join)
@pytest.mark.parametrize("kind", sorted({*list(REPLACEMENTS)} - {"none"}))
def test_block_replacement(waits: Waits, kind: str, objectives: dict[str, float]) -> None:
    callback = BlockReplacement(
        BlockReplacementConfig(start=1, length=2, kind=kind, objectives=objectives, force=True),
        Span(1, 2),
        seed=1,
        fit_on=[a_batch(), a_batch(documents=True)] * 8,
    )
    steps(Loop(wrapped(), [callback], waits), 4 if "lm" in objectives else 2, 1)


def test_removal_without_a_replacement_module(waits: Waits) -> None:
    config = BlockReplacementConfig(start=1, length=2, kind="none")
    loop = Loop(wrapped(), [BlockReplacement(config, Span(1, 2), seed=1)], waits)
    loop.evaluate(a_batch())
    assert loop.in_evaluation.of() <= 5, loop.in_evaluation


def test_states_are_cached(waits: Waits, tmp_path: Path) -> None:
    cache = StatesCache(tmp_path / "states", 2, LENGTH, 32, {})
    config = BlockReplacementConfig(start=1, length=2, kind="ffn", objectives={"mse": 1.0})
    callback = BlockReplacement(config, Span(1, 2), seed=1, cache=cache, cached=[a_batch()])
    loop = Loop(wrapped(), [callback], waits)
    assert cache.is_complete
    loop.train(default_collate([cache.read(place) for place in range(2)]))
    assert loop.in_microbatch.of() <= 1, loop.in_microbatch


def test_a_span_is_found(waits: Waits) -> None:
    model = wrapped().model
    assert most_alike(model, [a_batch()], 2, PretendedDevice()).length == 2
    assert next(model.parameters()).device == DEVICE


def shape_of(layers: int) -> Shape:
    config = tiny_config(num_hidden_layers=layers)
    return family_of(config).shape(config)


TEACHERS: dict[str, dict[str, Any]] = {
    "own": {"objectives": {"kl": 1.0, "lm": 1.0, "mse": 1.0}},
    "other": {"teacher": "other", "objectives": {"kl": 1.0, "lm": 1.0}},
    "other-top-k": {"teacher": "other", "objectives": {"kl": 1.0}, "top_k": 8},
    "other-states": {"teacher": "other", "objectives": {"mse": 1.0, "cosine": 1.0}},
    "other-alone": {"teacher": "other", "objectives": {"kl": 1.0, "local": 1.0}},
    "other-vocabulary": {"teacher": "other", "objectives": {"kl": 1.0, "lm": 1.0}},
    "kept": {"objectives": {"kl": 1.0, "lm": 1.0}, "top_k": 2},
}


@pytest.mark.parametrize("name", TEACHERS)
def test_distillation(waits: Waits, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, gated = TEACHERS[name], name == "own"
    layers = 4 if gated else 3
    monkeypatch.setattr(distillation, "load_model", lambda *_, **__: random_model(tiny_config(), seed=1))
    states = {"mse", "cosine", "local"} & settings["objectives"].keys()
    learned = corresponding(shape_of(layers), shape_of(4), None, None) if states else None
    kept = name == "kept"
    tokens = TokenMap.padded(300, 300) if name == "other-vocabulary" else None
    callbacks: list[Callback] = [distillation.Distillation(DistillationConfig(**settings), learned, tokens, kept=kept)]
    if gated:
        config = L0PruningConfig(target=TargetShape(intermediate=32), lagrangian_warmup="4ba")
        callbacks.insert(0, L0Pruning(config, seed=1))
    passes = 3 if "local" in settings["objectives"] else 2  # each forward pass of Transformers waits once
    steps(Loop(wrapped(layers), callbacks, waits), passes + 2, 2, teacher=kept)


def test_adapters(waits: Waits) -> None:
    steps(Loop(wrapped(), [LowRankAdaptation(LoRAConfig(dropout=0.1), seed=1)], waits), 5, 0)


def test_partial_training(waits: Waits) -> None:
    config = TrainableConfig(["output", "last.1"], {"1ba": ["last.2"]})
    steps(Loop(wrapped(tie_word_embeddings=False), [PartialTraining(config)], waits), 5, 0)


@pytest.mark.usefixtures("acted_flash")
def test_flash_attention_with_documents(waits: Waits) -> None:
    """Where they begin is found once in a forward pass, not in every block."""
    model = wrapped()
    flashed(model.model)
    loop = Loop(model, [], waits)
    loop.train(a_batch(documents=True))
    assert loop.in_microbatch.of() <= 5, loop.in_microbatch


@pytest.mark.parametrize("documents", [False, True])
def test_without_documents_attention_is_causal_by_itself(
    waits: Waits, monkeypatch: pytest.MonkeyPatch, documents: bool
) -> None:
    """A GPU's fast kernels take no mask."""
    seen: list[tuple[bool, bool]] = []
    attend = F.scaled_dot_product_attention

    def watched(*args: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **kwargs: Any) -> Tensor:
        seen.append((attn_mask is None, is_causal))
        return attend(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    model = wrapped()
    with torch.no_grad():
        wanted = model.eval_forward(a_batch(documents=documents))["loss"]
        seen.clear()
        batch = PretendedDevice().batch_to_device(a_batch(documents=documents))
        found = model.to(DEVICE).eval_forward(batch)["loss"]
    assert seen == [(not documents, not documents)] * 4
    torch.testing.assert_close(found.cpu(), wanted)


@pytest.mark.parametrize("experts", [False, True])
def test_scoring(waits: Waits, experts: bool) -> None:
    """By all criteria at once; those of experts on a mixture."""
    config = CONFIGS["mixtral"] if experts else tiny_config()
    model = random_model(config).to(DEVICE)
    names = [name for name in CRITERIA if CRITERIA[name].needs_experts == experts]
    scorer = Scorer(model, names, ScoringJob(config, DEVICE), batch_size=2)
    tokens = a_batch()["input_ids"].to(DEVICE, non_blocking=True)
    waits.clear()
    scorer.update(tokens)
    assert experts or waits.of() == 0, waits  # Transformers' own experts ask which tokens are theirs
    found = scorer.scores(dist.all_reduce)
    assert {name for section in found.values() for name in section} == {*names}


@pytest.mark.parametrize("bos", ["none", "once"])
def test_perplexity(waits: Waits, bos: str) -> None:
    model = random_model(tiny_config()).to(DEVICE)
    tokens, settings = a_batch()["input_ids"].flatten(), Segmentation(8, 8)
    waits.clear()
    found = measure_perplexity(model, tokens, settings, bos, bos=1, batch_size=4)
    assert waits.of() <= (4 if bos == "none" else 8), waits  # 4 for a batch; with the BOS a token makes another
    assert found.tokens == 28


def test_correction_and_trial(waits: Waits) -> None:
    tokens = torch.randint(300, (32, LENGTH), generator=torch.Generator().manual_seed(1))
    opened = ScoredModel(random_model(tiny_config()).to(DEVICE), tokens.to(DEVICE), 32)
    blocks = tuple(KeptBlock(n, n, heads=(0, 1, 2, 3), channels=tuple(range(40))) for n in (0, 1, 3))
    plan = Plan(family="llama", model="", source=shape_of(4), blocks=blocks, hidden=None, factors={})
    trial, better = Trial(opened), corrected(plan, "refit", opened)
    waits.clear()
    loss = trial.loss(plan)
    assert waits.of() <= 15, waits
    assert trial.loss(better) != loss
