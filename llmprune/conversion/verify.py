"""Comparison of the outputs of two models."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from llmprune.conversion.checkpoint import Checkpoint, is_checkpoint
from llmprune.models.loading import load_any_model, load_model, new_model
from llmprune.models.quantised import quantised_as
from llmprune.models.source import find_folder, has_replacement, longest_input
from llmprune.plans.plan import Plan
from llmprune.plans.surgery import Surgery
from llmprune.pruning.gates.attach import attach
from llmprune.pruning.gates.from_plan import factors_of, mask_experts
from llmprune.utils.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Difference:
    """Difference of two models' logits.

    All values are NaN if any logit of either model is not finite: such models count as different.

    Attributes:
        max_abs: largest absolute difference.
        max_rel: largest absolute difference, divided by the largest absolute logit.
        mean_abs: mean absolute difference.
    """

    max_abs: float
    max_rel: float
    mean_abs: float

    @property
    def is_finite(self) -> bool:
        """Whether all logits of both models are finite."""
        return math.isfinite(self.max_abs)


@torch.no_grad()
def open_for_comparison(path: Path | str, plan: Plan | None = None) -> PreTrainedModel:
    """Open a model in float32 and evaluation mode, from a Hugging Face folder or a checkpoint.

    As in the result of ``convert``, gates are at the target shape, and a replacement module is the best one.

    Args:
        path: folder, hub name or checkpoint.
        plan: plan whose removed parts are left out of the computation, without cutting; None = nothing is left out.

    Raises:
        UserError: the model can't be read, or the plan is for another shape.
    """
    if not is_checkpoint(path):
        folder = find_folder(path)
        if plan is None and (has_replacement(folder) or quantised_as(folder) is not None):
            return load_any_model(folder, dtype=torch.float32, finite=False)
        model = load_model(folder, finite=False)
        return model if plan is None else _follow(model, plan)
    checkpoint = Checkpoint.open(path)
    model = new_model(checkpoint.config, seed=0).eval()
    weights = checkpoint.weights
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
    if plan is not None:
        return _follow(model, plan)  # as in ``apply``: the plan decides, not the gates
    for section, settings in checkpoint.sections:
        section.install(settings, checkpoint, model, newest=checkpoint.path != Path(path).resolve())
    return model


def _follow(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Make a complete model compute what the cut model of a plan would compute."""
    plan.check_applicable()
    surgery = Surgery(model.config, plan)  # refuses a plan for another model
    if plan.corrections or any(block.merge is not None for block in plan.blocks):
        weights = {name: tensor.clone() for name, tensor in model.named_parameters()}
        for name, parameter in model.named_parameters():
            if surgery.new_name(name) is not None:
                parameter.copy_(surgery.whole(name, weights))
    factors = factors_of(plan)
    attach(model, surgery.family, set(factors.trainable())).factors = factors
    mask_experts(model, plan)
    return model


def verify(a: Path | str, b: Path | str, plan: Plan | None = None) -> Difference:
    """Open two models and compare their logits.

    Args:
        a: folder, hub name or checkpoint.
        b: another one.
        plan: plan whose removed parts are left out of ``a``; tokens that it removes are left out of the comparison.

    Raises:
        UserError: a model can't be read, the plan is for another one, or the vocabularies differ.
    """
    kept = None if plan is None else plan.vocabulary
    return compare_models(open_for_comparison(a, plan), open_for_comparison(b), vocabulary=kept)


@torch.no_grad()
def compare_models(
    a: PreTrainedModel,
    b: PreTrainedModel,
    *,
    vocabulary: Sequence[int] | None = None,
    samples: int = 4,
    length: int = 128,
    seed: int = 0,
) -> Difference:
    """Compare the logits of two models on the same random tokens.

    Args:
        a: first model.
        b: second model.
        vocabulary: numbers in ``a`` of the tokens of ``b``; None = both have the same vocabulary.
        samples: number of sequences.
        length: number of tokens of each sequence.
        seed: seed of the random tokens.

    Raises:
        UserError: the vocabularies differ.
    """
    size = b.config.vocab_size
    if (a.config.vocab_size if vocabulary is None else len(vocabulary)) != size:
        raise UserError(
            f"the vocabularies differ ({a.config.vocab_size} and {b.config.vocab_size}): these models can't be compared"
        )
    log.info("comparing the logits of %d random samples", samples)
    length = min(length, *(limit for one in (a, b) if (limit := longest_input(one.config)) is not None))
    generator = torch.Generator().manual_seed(seed)
    of_a = torch.arange(size) if vocabulary is None else torch.tensor(vocabulary)
    difference, total, largest = 0.0, 0.0, 0.0
    for _ in range(samples):
        tokens = torch.randint(size, (1, length), generator=generator)
        x, y = a(input_ids=of_a[tokens]).logits[..., of_a].double(), b(input_ids=tokens).logits.double()
        gap = (x - y).abs()
        if not gap.isfinite().all():
            return Difference(math.nan, math.nan, math.nan)
        difference, total = max(difference, gap.max().item()), total + gap.mean().item()
        largest = max(largest, x.abs().max().item(), y.abs().max().item())
    return Difference(difference, difference / largest if largest else 0.0, total / samples)
