"""``block_replacement``: a small network replaces a span of blocks."""

import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from composer import Callback
from composer.core import Time
from composer.utils import dist, get_device
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from llmprune.callbacks.block_replacement import BlockReplacement, check_fit
from llmprune.checkpoints.run_folder import Manifest
from llmprune.config.section_registry import SECTIONS
from llmprune.conversion.checkpoint import Checkpoint
from llmprune.conversion.replaced import Replaced, compute_with, read_replaced
from llmprune.conversion.result import Result
from llmprune.estimate.needs import Needs
from llmprune.models.families import family_of, refuse_skipped
from llmprune.models.parameters import parameter_names_of
from llmprune.plans.plan import Plan
from llmprune.pruning.replacements.cache import CachedStates, StatesCache
from llmprune.pruning.replacements.modules import planned_replacement
from llmprune.pruning.replacements.settings import BlockReplacementConfig
from llmprune.pruning.replacements.span import Span, given_span
from llmprune.pruning.replacements.streaming import replacement_flops
from llmprune.training.loaders import first_batches
from llmprune.training.replaced_span import check_plan, check_replacement, most_alike, source_fingerprint
from llmprune.training.section import Build, Inputs, Section
from llmprune.utils.errors import UserError

log = logging.getLogger(__name__)


@SECTIONS.register("block_replacement")
class BlockReplacementSection(Section[BlockReplacementConfig]):
    """A small network that replaces a span of blocks."""

    name = "block_replacement"
    rate = 4.0  # new weights beside frozen ones take larger steps (arXiv:2305.14314, 2403.19135)
    settings = BlockReplacementConfig
    fixed = (
        "start", "length", "kind", "blocks", "take", "intermediate", "objectives", "top_k", "temperature", "also",
        "cache",
    )  # fmt: skip
    places = ("plan", "cache")
    prunes = True
    _span: Span | None = None
    _cache: StatesCache | None = None

    def files(self) -> list[str]:
        """The path of the plan, if the settings name one."""
        return [] if self.own.plan is None else [self.own.plan]

    def check_own(self) -> None:
        """Check that the settings name a span and do not contradict each other."""
        self.own.check()

    def check_inputs(self, inputs: Inputs) -> None:
        """Check that the replacement module fits the model and the span."""
        own, config, model_config = self.own, self.config, inputs.model_config
        refuse_skipped(model_config, "given a replacement module")
        if own.cache is not None and any(section.name == "dynamic_loading" for section in inputs.sections):
            raise UserError("the mix in block_replacement.cache can't change any more: take dynamic_loading=null")
        if own.also and config.model.dtype != "float32":
            raise UserError("what block_replacement.also names trains in the model's dtype: take model.dtype=float32")
        if own.cache is not None and own.cache.samples % config.samples_per_step:
            raise UserError(
                f"block_replacement.cache.samples is {own.cache.samples}; it must be a multiple of the global batch, "
                f"{config.samples_per_step}"
            )
        microbatch = 1 if config.train.microbatch_size == "auto" else int(config.train.microbatch_size)
        hidden, length = family_of(model_config).shape(model_config).hidden, inputs.data.manifest.sequence_length
        check_fit(own, hidden, length, dist.get_world_size(), microbatch)
        span = given_span(own)
        if span is None and config.sharding is not None:
            raise UserError(
                "the span can't be found on a sharded model: find it first (`llmprune score`, `llmprune plan --span`) "
                "and name the plan"
            )
        settings = own
        if span is None:  # the position does not matter, except for the parts after the span that `also` names
            assert own.length is not None
            span = Span(max(family_of(model_config).shape(model_config).layers - own.length, 0), own.length)
            settings = replace(own, also=[])
        check_replacement(settings, model_config, span)

    @property
    def may_not_train(self) -> bool:
        """True: without batches, the replacement module can still be computed."""
        return True

    @property
    def trains(self) -> bool:
        """Whether the replacement module has weights that train; with no batches, it is only computed."""
        return Time.from_timestring(self.config.train.duration).value > 0 and self.own.trains

    def recorded(self) -> dict[str, Any]:
        """The settings, with the span that was found."""
        return {**(super().recorded() or {}), **({} if self._span is None else asdict(self._span))}

    def begin(self, build: Build) -> None:
        """Find the span that the settings name, or the span that a resumed run has recorded."""
        self._span = given_span(self.own)
        if self.own.plan is not None:  # the model's weights are compared only when the run begins
            source = self.config.model.path if build.resume is None else None
            check_plan(Plan.load(self.own.plan), self.own.plan, source, build.inputs.model_config)
        if self._span is None and build.resume is not None:
            saved = Manifest.load(build.folder.checkpoints).sections.get(self.name)
            if saved:  # another length is refused later, by check_same_run
                self._span = Span(saved["start"], self.own.length or saved["length"])

    def model_loaded(self, build: Build) -> None:
        """Find the span whose ends are most alike, if none is named; prepare the cache of hidden states, if any."""
        if self._span is None:
            assert self.own.length is not None and build.model is not None
            samples = first_batches(self.config, build.inputs.data, self.own.score_samples)
            self._span = most_alike(build.model, samples, self.own.length, get_device(self.config.train.device))
            check_replacement(self.own, build.inputs.model_config, self._span)
            if dist.get_global_rank() == 0:
                print(f"replaced: {self._span}, whose input and output are the most alike")
        if self.own.cache is not None:
            self._cache = _make_cache(self.own.cache.folder, self.own.cache.samples, build, self._span)

    def dataset(self, build: Build) -> Dataset[Any] | None:
        """The cached hidden states, if the settings ask for a cache."""
        if self._cache is None:
            return None
        return CachedStates(
            self._cache,
            global_batch_size=self.config.samples_per_step,
            seed=self.config.run.seed,
            rank=dist.get_global_rank(),
            world_size=dist.get_world_size(),
        )

    def callbacks(self, build: Build) -> Iterable[Callback]:
        """The callback ``BlockReplacement``."""
        assert self._span is not None
        config, data, cache = self.config, build.inputs.data, self._cache
        return [
            BlockReplacement(
                self.own,
                self._span,
                seed=config.run.seed,
                folder=build.folder.checkpoints,
                fit_on=first_batches(config, data, self.own.fit_samples),
                alone=Time.from_timestring(config.train.duration).value == 0,
                cache=cache,
                cached=() if cache is None else first_batches(config, data, cache.samples, of_machine=True),
            )
        ]

    @classmethod
    def needs(cls, own: BlockReplacementConfig, model: PreTrainedModel, before: Needs) -> Needs:
        """Needs of the replacement module, and of the weights that train beside it."""
        span, network = planned_replacement(model, own)
        layers = family_of(model.config).shape(model.config).layers
        predicts = {"lm", "kl"} & set(own.weights)
        end = span.end if predicts else layers
        places = own.blocks if own.kind == "blocks" else 1  # blocks of the span that are taken by the module
        added = sum(p.numel() for p in network.parameters())

        def flops(length: int, also: int) -> int:
            cached = own.cache is not None
            return replacement_flops(model.config, span, network, own.weights, length, also=also, cached=cached)

        return replace(
            before,
            names=set(parameter_names_of(model, own.also)),
            added=added,
            lowest=max(end - places, 0),
            logits="compared" if "kl" in predicts else "learned" if predicts else "evaluated",
            flops=flops,
        )

    @classmethod
    def install(
        cls, own: BlockReplacementConfig, checkpoint: Checkpoint, model: PreTrainedModel, *, newest: bool
    ) -> None:
        """Install the replacement module in the span's place."""
        replaced = read_replaced(checkpoint, best=newest, model=model)
        for name, parameter in model.named_parameters():
            parameter.copy_(replaced.trained.get(name, parameter))
        compute_with(model, replaced)

    @classmethod
    def convert(cls, own: BlockReplacementConfig, checkpoint: Checkpoint, result: Result) -> Result:
        """Remove the span's blocks, and put the replacement module in their place."""
        replaced = read_replaced(checkpoint, best=result.newest)
        _say_which(replaced)
        plan = result.plan
        plan = dataclasses.replace(plan, blocks=replaced.kept(plan.source.layers), replacement=replaced.described)
        return dataclasses.replace(result, weights=replaced.weights, plan=plan, network=replaced.network)


def _make_cache(folder: str | None, samples: int, build: Build, span: Span) -> StatesCache:
    """Make the cache of hidden states that the run trains on; its size is checked before anything is computed.

    Raises:
        UserError: the states can't be kept in that folder.
    """
    config, data, model_config = build.config, build.inputs.data, build.inputs.model_config
    identity = {
        "model": source_fingerprint(config.model.path, model_config),
        "span": asdict(span),
        "data": data.manifest.fingerprint(),
        "weights": config.data.weights,
        "boundaries": config.data.document_boundaries,
        "seed": config.run.seed,
        "dtype": config.model.dtype,
    }
    place = Path(folder) if folder is not None else build.folder.path / "states"
    hidden = family_of(model_config).shape(model_config).hidden
    cache = StatesCache(place, samples, data.manifest.sequence_length, hidden, identity)
    cache.check_room()
    return cache


def _say_which(replaced: Replaced) -> None:
    """Log which replacement module is exported, and what is necessary to load the model."""
    if replaced.best is not None:
        log.warning(
            "the replacement module of batch %d is exported, whose held-out loss is the lowest: %.4f",
            *replaced.best[::-1],
        )
    if replaced.network is not None:
        log.warning(
            "no config of this family can describe the replacement module '%s': the model loads with "
            "trust_remote_code=True, or with llmprune's own commands",
            replaced.settings.kind,
        )
