"""Criteria on hidden states: the change of the residual stream by a block, a sub-layer or a span."""

import logging
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.pruning.scoring.criterion import CRITERIA, BlockStep, Criterion, ScoreSection, ScoringJob
from llmprune.utils.errors import UserError

CKA_POSITIONS = 256
CKA_LEAST = 32  # tokens of a sample below which the choice of samples changes values by more than 0.1

log = logging.getLogger(__name__)


def one_minus_cosine(a: Tensor, b: Tensor) -> Tensor:
    """1 − cos(a, b) along the last dimension, without the cancellation that would hide small differences."""
    difference = F.normalize(a.float(), dim=-1) - F.normalize(b.float(), dim=-1)
    return difference.square().sum(-1) / 2


class _MeanOfTokens(Criterion):
    """Criteria whose score is the mean over all tokens of one value per block."""

    reads = "states"

    def __init__(self, job: ScoringJob) -> None:
        super().__init__(job)
        self._sums, self._tokens = job.zeros(job.layers), job.zeros(job.layers)

    def add(self, block: int, values: Tensor) -> None:
        """Add one value per token."""
        self._sums[block] += values.sum(dtype=self._sums.dtype)
        self._tokens[block] += values.numel()

    def sums(self) -> Sequence[Tensor]:
        return self._sums, self._tokens

    def result(self) -> list[float]:
        return (self._sums / self._tokens).tolist()


@CRITERIA.register("block_influence")
class BlockInfluence(_MeanOfTokens):
    """1 − mean cosine of a block's input and output (ShortGPT, arXiv:2403.03853)."""

    def observe(self, step: BlockStep) -> None:
        self.add(step.block, one_minus_cosine(step.before, step.after))


@CRITERIA.register("relative_magnitude")
class RelativeMagnitude(_MeanOfTokens):
    """Mean of ‖output − input‖ / ‖output‖ (arXiv:2302.06729)."""

    def observe(self, step: BlockStep) -> None:
        after = step.after.float()
        self.add(step.block, (after - step.before.float()).norm(dim=-1) / after.norm(dim=-1))


@CRITERIA.register("attention")
class AttentionInfluence(_MeanOfTokens):
    """1 − mean cosine before and after the attention's residual step alone (arXiv:2406.15786)."""

    section, reads = ScoreSection.SUBBLOCKS, "updates"

    def observe(self, step: BlockStep) -> None:
        self.add(step.block, one_minus_cosine(step.before, step.before + step.updates["attention"]))


@CRITERIA.register("mlp")
class MLPInfluence(_MeanOfTokens):
    """1 − mean cosine before and after the MLP's residual step alone (arXiv:2406.15786)."""

    section, reads = ScoreSection.SUBBLOCKS, "updates"

    def observe(self, step: BlockStep) -> None:
        before = step.before if step.parallel else step.before + step.updates["attention"]
        self.add(step.block, one_minus_cosine(before, before + step.updates["mlp"]))


class _Spans(Criterion):
    """Criteria that compare the residual streams at every two places; scores are by length of the span between."""

    section, reads = ScoreSection.SPANS, "states"

    def __init__(self, job: ScoringJob) -> None:
        super().__init__(job)
        self._totals = job.zeros(job.layers + 1, job.layers + 1)
        self._count = job.zeros(1)
        self._seen: dict[int, list[Tensor]] = {}

    def keep(self, states: Tensor) -> Tensor:
        """The normalised states at one place that are kept, [n, hidden]."""
        raise NotImplementedError

    def between(self, places: Tensor) -> Tensor:
        """The sums over n for every two places, from [n, places, hidden]."""
        raise NotImplementedError

    def observe(self, step: BlockStep) -> None:
        seen = self._seen.setdefault(step.first, [])
        if step.block == 0:
            seen.append(self.keep(step.before))
        seen.append(self.keep(step.after))
        if step.block == self.job.layers - 1:
            places = self._seen.pop(step.first)
            for part in zip(*(place.split(1024) for place in places), strict=True):
                self._totals += self.between(torch.stack(part, dim=1))
            self._count += len(places[0])

    def sums(self) -> Sequence[Tensor]:
        return self._totals, self._count

    def result(self) -> dict[str, list[float]]:
        means = (self._totals / self._count).tolist()
        layers = self.job.layers
        return {str(n): [means[j][j + n] for j in range(layers - n + 1)] for n in range(1, layers + 1)}


@CRITERIA.register("cosine")
class SpanCosine(_Spans):
    """Mean cosine of a span's input and output, for every span (LLM-Streamline, arXiv:2403.19135)."""

    def keep(self, states: Tensor) -> Tensor:
        return F.normalize(states.flatten(0, 1).float(), dim=-1)

    def between(self, places: Tensor) -> Tensor:
        return torch.bmm(places, places.transpose(1, 2)).sum(0, dtype=self._totals.dtype)


@CRITERIA.register("angular")
class SpanAngle(_Spans):
    """Mean angle / π between a span's input and output at the last token, for every span (arXiv:2403.17887)."""

    def keep(self, states: Tensor) -> Tensor:
        return F.normalize(states[:, -1].double(), dim=-1)

    def between(self, places: Tensor) -> Tensor:
        cosines = torch.bmm(places, places.transpose(1, 2)).clamp(-1, 1)
        return cosines.arccos().sum(0) / math.pi


@CRITERIA.register("cka")
class CKA(Criterion):
    """Centred kernel alignment of every two blocks' outputs, standardised, unbiased and streaming (arXiv:2010.15327).

    A linear kernel over at most 256 evenly spaced positions of each sample; HSIC is averaged over samples. The kernel
    is of standardised states (see ``standardised``), because otherwise the massive activations of a few tokens and
    hidden dimensions (arXiv:2402.17762) would decide alone.
    """

    section, reads = ScoreSection.PAIRS, "states"

    def __init__(self, job: ScoringJob) -> None:
        super().__init__(job)
        self._hsic = job.zeros(job.layers, job.layers)
        self._seen: dict[int, list[Tensor]] = {}

    @classmethod
    def check_samples(cls, samples: int, length: int) -> None:
        if length < 4:
            raise UserError(f"cka needs samples of at least 4 tokens; these have {length}: raise --seq-len")
        if length < CKA_LEAST:
            log.warning(
                "cka compares the tokens of a sample with each other; %d tokens are few for that: samples of "
                "%d or more (--seq-len) give values that depend less on the samples",
                length,
                CKA_LEAST,
            )

    def observe(self, step: BlockStep) -> None:
        length = step.after.shape[1]
        take = min(length, CKA_POSITIONS)
        positions = torch.arange(take, device=step.after.device) * length // take
        states = standardised(step.after[:, positions].to(self._hsic.dtype))
        seen = self._seen.setdefault(step.first, [])
        seen.append(centred_kernel(states @ states.transpose(1, 2)).float())
        if step.block == self.job.layers - 1:
            for sample in torch.stack(self._seen.pop(step.first), dim=1).flatten(2).to(self._hsic.dtype):
                self._hsic += (sample @ sample.T) / (take * (take - 3))

    def sums(self) -> Sequence[Tensor]:
        return (self._hsic,)

    def result(self) -> list[list[float]]:
        own = self._hsic.diagonal().clamp(min=0).sqrt()
        return (self._hsic / (own[:, None] * own)).tolist()


def standardised(states: Tensor) -> Tensor:
    """Scale states [samples, tokens, hidden]: every token to length 1, then every dimension to mean 0 and variance 1.

    Mean and variance are of the tokens of each sample. A dimension that is the same for all tokens becomes 0.
    """
    states = F.normalize(states, dim=-1)
    states = states - states.mean(1, keepdim=True)
    least = 1000 * torch.finfo(states.dtype).eps  # below this, differences are rounding
    return states / states.square().mean(1, keepdim=True).sqrt().clamp(min=least)


def centred_kernel(kernel: Tensor) -> Tensor:
    """U-centre kernels [batch, n, n]: inner products of the results, over n(n − 3), are unbiased HSIC.

    Székely and Rizzo 2014, definition 2: zero diagonal, and every row and column sums to zero.
    """
    n = kernel.shape[-1]
    kernel = kernel - torch.diag_embed(kernel.diagonal(dim1=-2, dim2=-1))
    rows = kernel.sum(-1, keepdim=True)
    total = rows.sum(-2, keepdim=True)
    centred = kernel - rows / (n - 2) - rows.transpose(-1, -2) / (n - 2) + total / ((n - 1) * (n - 2))
    return centred - torch.diag_embed(centred.diagonal(dim1=-2, dim2=-1))
