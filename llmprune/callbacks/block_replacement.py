"""Replacing a span of blocks by a small network, as a Composer callback (LLM-Streamline, arXiv:2403.19135)."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from composer.core import Callback, Precision, State
from composer.loggers import Logger
from composer.utils import dist
from torch import nn
from torch.distributed.tensor import DTensor

from llmprune.callbacks.loss_terms import LossTerms
from llmprune.checkpoints.checkpoint_folder import BEST
from llmprune.models.block_hooks import blocks_of
from llmprune.models.causal_lm import Batch, ComposerCausalLM, labels_of
from llmprune.models.least_squares import LEAST, RIDGES, samples_fitted, samples_for
from llmprune.models.objectives import predicting
from llmprune.models.parameters import parameters_after, plain_name, train_only
from llmprune.models.sharded import reshard
from llmprune.pruning.replacements.cache import StatesCache
from llmprune.pruning.replacements.fitting import FittedLosses, Map, Sums, best_map
from llmprune.pruning.replacements.modules import REPLACEMENTS, ReplacementModule, Site
from llmprune.pruning.replacements.settings import BlockReplacementConfig
from llmprune.pruning.replacements.span import Span
from llmprune.pruning.replacements.streaming import Streaming
from llmprune.utils.errors import UserError
from llmprune.utils.files import save_tensors
from llmprune.utils.progress import Progress

log = logging.getLogger(__name__)


class BlockReplacement(Callback):
    """Trains a replacement module for a span of blocks; the source's weights do not change.

    At INIT the replacement module becomes the Composer model's submodule ``replacement``, everything else is frozen,
    and the optimiser gets the parameters that train. The model then learns by ``Streaming`` and is evaluated with the
    replacement module in place of the span. When its held-out loss is the lowest so far, the trained weights are saved
    in the folder of the checkpoints.
    """

    def __init__(
        self,
        config: BlockReplacementConfig,
        span: Span,
        *,
        seed: int,
        folder: Path | None = None,
        fit_on: Iterable[Batch] = (),
        alone: bool = False,
        cache: StatesCache | None = None,
        cached: Iterable[Batch] = (),
    ) -> None:
        """Store the settings.

        Args:
            config: settings of the section.
            span: span of blocks that is replaced.
            seed: seed of random weights.
            folder: folder where the best replacement module is saved; None = it is not saved.
            fit_on: this rank's batches for computing a replacement module in closed form, if its kind is computed.
            alone: whether the module is only computed, with no training afterwards.
            cache: cache of the hidden states that the run trains on; None = no cache.
            cached: batches of samples whose states this rank computes for the cache of this machine.

        Raises:
            UserError: a setting is out of range.
        """
        config.check()
        self.config, self.span, self._seed, self._folder, self._fit_on = config, span, seed, folder, fit_on
        self._cache, self._cached, self._alone = cache, cached, alone
        self.best: tuple[float, int] | None = None  # loss, batch
        self._means = LossTerms("replacement")
        self._is_new = True
        self.replacement: ReplacementModule
        self.streaming: Streaming

    def init(self, state: State, logger: Logger) -> None:
        """Make the replacement module, before the model is sharded."""
        model = cast(ComposerCausalLM, state.model)
        self.span.check_within(len(blocks_of(model.model)))
        self.replacement = make_replacement(model, self.config, self.span, self._seed)
        if state.precision != Precision.FP32 or model.products is not None:
            self.replacement.float()  # trained weights must be float32, even if the frozen weights are bfloat16
        self.replacement = state.device.module_to_device(self.replacement)
        model.replacement = self.replacement
        chosen = [*self.replacement.parameters(), *parameters_after(model.model, self.span.end, self.config.also)]
        train_only(model, state.optimizers, chosen)
        self.streaming = Streaming(
            model.model,
            self.replacement,
            self.span,
            self.config.weights,
            top_k=self.config.top_k,
            temperature=self.config.temperature,
        )
        model.objective = self.streaming
        self._say_sizes(model, logger)

    def _say_sizes(self, model: ComposerCausalLM, logger: Logger) -> None:
        removed = sum(p.numel() for p in self._blocks(model).parameters())
        added = 0 if self.replacement.reads_update else sum(p.numel() for p in self.replacement.parameters())
        logger.log_hyperparameters(
            {"replacement/span": str(self.span), "replacement/removed": removed, "replacement/added": added}
        )
        if added >= removed:
            log.warning(
                "the replacement module has %s parameters, %s has %s: nothing is saved",
                f"{added:,}",
                self.span,
                f"{removed:,}",
            )

    def _blocks(self, model: ComposerCausalLM) -> nn.ModuleList:
        return blocks_of(model.model)[self.span.start : self.span.end]

    def before_load(self, state: State, logger: Logger) -> None:
        """Copy the current values of the blocks into a replacement module that is made of blocks."""
        model = cast(ComposerCausalLM, state.model)
        self.replacement.begin(self._blocks(model))

    def after_load(self, state: State, logger: Logger) -> None:
        """Compute a replacement module of a computed kind, unless the run resumes from a checkpoint."""
        if self._is_new and self.replacement.is_fitted:
            self._fit(state)
        if self._cache is not None:
            self._fill(self._cache, state)

    def _fill(self, cache: StatesCache, state: State) -> None:
        """Compute the hidden states for the cache; each machine computes its own cache."""
        complete = state.device.tensor_to_device(torch.tensor(int(cache.is_complete)))
        dist.all_reduce(complete, reduce_operation="MIN")
        if complete.item():
            return
        if dist.get_local_rank() == 0:
            print(f"the states of {cache.samples:,} samples are computed: {cache.size / 1e9:.2f} GB")
            cache.create()
        dist.barrier()
        own = cache.samples // dist.get_local_world_size()
        with Progress(desc="caching states", total=own, unit="samples") as progress:
            for batch in self._cached:
                source = self.streaming.source(state.device.batch_to_device(batch), after=True, final=False)
                assert source.after is not None
                cache.write(
                    batch["slot"].tolist(), source.before, source.after, labels_of(batch), batch.get("position_ids")
                )
                progress.update(len(batch["slot"]))
        reshard(state.model)
        dist.barrier()
        if dist.get_local_rank() == 0:
            cache.complete()
        dist.barrier()

    def _fit(self, state: State) -> None:
        """Compute the replacement module on most of the samples; compare it with no module on the rest.

        Raises:
            UserError: on all ranks, if there are too few samples, or if the module is no better and no training
                follows.
        """
        batches = list(self._fit_on)
        fitted, tried = _parted(batches)
        if not all(dist.all_gather_object(bool(tried))):
            raise UserError(
                "a replacement module is computed on some samples and tried on others: raise "
                "block_replacement.fit_samples until every rank has two of them"
            )
        total = sum(len(batch["input_ids"]) for part in (fitted, *[tried] * 4) for batch in part)
        with Progress(desc=f"computing {self.config.kind}", total=total, unit="samples") as progress:

            def shown(part: Iterable[Batch]) -> Iterator[Batch]:
                for batch in part:
                    yield batch
                    progress.update(len(batch["input_ids"]))

            sums = self.sums(state, shown(fitted))
            if self.config.kind != "mean" and (tokens := int(sums.tokens)) < LEAST * len(sums.x):
                raise _too_few(self.config.kind, len(sums.x), tokens, _enough(batches, LEAST * len(sums.x), tokens))
            ridges = RIDGES if self.config.ridge is None else (self.config.ridge,)
            chosen = best_map(self.replacement.ways(sums, ridges), self.sums(state, shown(tried)))
            self.replacement.take(Map())
            nothing = self._loss(state, shown(tried))
            self.replacement.take(chosen)
            source = self._loss(state, shown(tried), whole=True)
            losses = FittedLosses(source, nothing, self._loss(state, shown(tried)))
        if not losses.helps and not self.config.force:
            if self._alone:
                raise UserError(
                    f"{self.config.kind} is no better than nothing in the place of {self.span} ({losses}): choose "
                    "another span, raise block_replacement.fit_samples, train it, or set block_replacement.force=true"
                )
            self.replacement.take(Map())
        if dist.get_global_rank() == 0:
            left = "" if losses.helps or self.config.force else "; it begins as nothing"
            print(f"{self.config.kind} on samples that it was not fitted on: {losses}{left}")

    @torch.no_grad()
    def _loss(self, state: State, batches: Iterable[Batch], *, whole: bool = False) -> float:
        """The mean next-token loss over all ranks, in nats per token; with ``whole``, of the unchanged source."""
        model = cast(ComposerCausalLM, getattr(state.model, "module", state.model))
        total = state.device.tensor_to_device(torch.zeros(2, dtype=torch.float64))
        model.objective = None if whole else self.streaming
        for batch in batches:
            found = model.eval_forward(state.device.batch_to_device(batch))
            total += torch.stack([found["loss"].double().sum(), found["tokens"].double().sum()])
        model.objective = self.streaming
        reshard(state.model)
        dist.all_reduce(total, reduce_operation="SUM")
        return float(total[0] / total[1])

    @torch.no_grad()
    def sums(self, state: State, batches: Iterable[Batch]) -> Sums:
        """Sums over all ranks that a replacement module is computed from."""
        found: Sums | None = None
        for batch in batches:
            batch = state.device.batch_to_device(batch)
            source = self.streaming.source(batch, after=True, final=False)
            assert source.after is not None
            read = source.update if self.replacement.reads_update else source.before
            assert read is not None
            chosen = predicting(labels_of(batch))
            found = found or Sums.empty(read.shape[-1], read.device)
            found.add(read[chosen], (source.after - source.before)[chosen])
        reshard(state.model)
        assert found is not None
        for tensor in found.each() if dist.get_world_size() > 1 else ():
            dist.all_reduce(tensor, reduce_operation="SUM")
        return found

    def after_loss(self, state: State, logger: Logger) -> None:
        """Add the terms of the loss of a microbatch."""
        self._means.add(self.streaming.terms, state.batch)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log the means of the terms over all tokens of the batch."""
        self._means.log(logger)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Save the trained weights if the loss is the lowest so far."""
        self._judge(state, logger)

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        """Do the same after an evaluation outside training."""
        self._judge(state, logger)

    def _judge(self, state: State, logger: Logger) -> None:
        found = state.eval_metric_values.get("loss")
        if found is None:
            return
        loss, batch = float(found), state.timestamp.batch.value
        if self.best is None or loss < self.best[0]:
            self.best = loss, batch
            self._keep(cast(ComposerCausalLM, getattr(state.model, "module", state.model)), loss, batch)
        logger.log_metrics({"replacement/best_loss": self.best[0], "replacement/best_batch": self.best[1]})

    def _keep(self, model: ComposerCausalLM, loss: float, batch: int) -> None:
        tensors = {}
        reshard(model)  # tensors that the evaluation has gathered may have another layout
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                tensors[plain_name(name)] = whole.detach().cpu()
        if self._folder is not None and dist.get_global_rank() == 0 and tensors:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_tensors(self._folder / f".{BEST}", tensors, {"loss": repr(loss), "batch": str(batch)})
            (self._folder / f".{BEST}").replace(self._folder / BEST)

    def state_dict(self) -> dict[str, Any]:
        """The lowest loss so far and its batch; the replacement module itself is in the model's state."""
        return {"best": None if self.best is None else list(self.best)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved state."""
        self.best = None if state["best"] is None else (state["best"][0], int(state["best"][1]))
        self._is_new = False


def _parted(batches: Sequence[Batch]) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """Divide this rank's batches into those for computing a replacement module and those for evaluating it.

    If there is only one batch, its samples are divided.
    """
    if len(batches) != 1:
        place = samples_fitted(len(batches))
        return batches[:place], batches[place:]
    (batch,) = batches
    samples = len(batch["input_ids"])
    place = samples_fitted(samples)
    fitted, tried = (
        {name: value[part] for name, value in batch.items()} for part in (slice(place), slice(place, None))
    )
    return [fitted], [tried] if place < samples else []


def check_fit(config: BlockReplacementConfig, hidden: int, length: int, ranks: int, microbatch: int) -> None:
    """Refuse a fit on too few tokens before any work; where not every token is learned, the fit itself may refuse more.

    Args:
        config: settings of the section.
        hidden: number of hidden dimensions of the model.
        length: number of tokens in each sample.
        ranks: number of ranks.
        microbatch: number of samples in each batch of a rank.

    Raises:
        UserError: there are too few tokens; the message contains a number of samples that is enough.
    """
    if config.kind == "mean" or not getattr(REPLACEMENTS[config.kind], "is_fitted", False):
        return

    def tokens(samples: int) -> int:
        share = -(-samples // ranks)
        batches = -(-share // microbatch)
        fitted = samples_fitted(share) if batches == 1 else samples_fitted(batches) * microbatch
        return fitted * ranks * (length - 1)  # no token follows the last one

    if tokens(config.fit_samples) < LEAST * hidden:
        enough = next(samples for samples in count(config.fit_samples) if tokens(samples) >= LEAST * hidden)
        raise _too_few(config.kind, hidden, tokens(config.fit_samples), enough)


def _too_few(kind: str, hidden: int, tokens: int, enough: int) -> UserError:
    return UserError(
        f"{kind} fits {hidden:,} hidden dimensions on {tokens:,} tokens, which must be {LEAST} for each at least: set "
        f"block_replacement.fit_samples={enough}"
    )


def _enough(batches: Sequence[Batch], needed: int, tokens: int) -> int:
    """Number of samples, over all ranks, for ``needed`` tokens to fit on; ``batches`` of a rank gave ``tokens``."""
    samples = len(batches[0]["input_ids"])
    fitted = samples_fitted(len(batches)) if len(batches) > 1 else samples_fitted(samples) / samples
    return samples_for(math.ceil(needed * fitted / max(tokens, 1))) * samples * dist.get_world_size()


def make_replacement(
    model: ComposerCausalLM, config: BlockReplacementConfig, span: Span, seed: int
) -> ReplacementModule:
    """Make the replacement module that the settings describe, in the model's dtype."""
    made = REPLACEMENTS[config.kind](Site(model.model, span, seed), config)
    return made.to(model.model.dtype)
