"""Scoring by any number of criteria at once, with one forward pass per batch."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.models.autocast import in_full_precision
from llmprune.models.block_hooks import RunBlock, hidden_states_in, hooked_blocks
from llmprune.models.causal_lm import token_losses
from llmprune.models.families import family_of, refuse_skipped
from llmprune.pruning.scoring.all_criteria import CRITERIA
from llmprune.pruning.scoring.criterion import GRADIENTS, BlockStep, Criterion, ScoreSection, ScoringJob
from llmprune.pruning.scoring.removals import Forward, RemovalPerplexity, Removals, in_batches
from llmprune.utils.errors import UserError

Loaded = Callable[[int], AbstractContextManager[None]]


def block_passes(criteria: Collection[str], layers: int) -> int:
    """The passes through single blocks that scoring one sample takes; a backward pass counts as two."""
    reads = {CRITERIA[name].reads for name in criteria}
    backward = sum(kind in reads for kind in GRADIENTS)
    whole = layers * (1 + bool(backward) + 2 * backward)
    return whole + (layers * (layers - 1) // 2 if "removals" in reads else 0)


class Scorer:
    """A scorer that observes a model's computation on calibration samples and scores its blocks.

    Memory use does not grow with the number of samples, only with the samples of one batch: perplexity keeps one state
    per block and sample of the batch, and so does ``cosine``. The output of the last block is taken before the final
    norm.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        criteria: Collection[str],
        job: ScoringJob,
        *,
        batch_size: int,
        forward: Forward | None = None,
        loaded: Loaded | None = None,
        told: Callable[[int], object] = lambda passes: None,
    ) -> None:
        """Create the criteria.

        Args:
            model: model of a supported family.
            criteria: names of registered criteria.
            job: settings that the criteria are created with.
            batch_size: number of samples that pass through a block at a time.
            forward: forward pass of the model, from tokens to logits; None = the model's own.
            loaded: function from a block's number to a context in which an offloaded block has its weights; None = all
                blocks are in memory.
            told: function that is called with the number of passes that were made since its last call, see
                ``block_passes``.

        Raises:
            UserError: a criterion is unknown or impossible here.
        """
        self.criteria: dict[str, Criterion] = {name: CRITERIA[name](job) for name in criteria}
        self._model, self._job, self._batch_size = model, job, batch_size
        refuse_skipped(model.config, "scored")
        self._family = family_of(model.config)
        self._blocks = list(model.get_submodule(self._family.blocks).children())
        self._forward = forward or (lambda tokens: model(input_ids=tokens, use_cache=False).logits)
        self._loaded = loaded or (lambda number: nullcontext())
        self._told = told
        self._weighed: set[int] = set()
        self._removals = Removals(batch_size)
        self._end: Tensor | None = None
        self._differentiated = GRADIENTS[0]  # what the backward pass in progress is of
        if self._family.expert_modules is None and (of := [n for n, c in self.criteria.items() if c.needs_experts]):
            raise UserError(f"{', '.join(of)}: this model has no experts")
        if loaded is not None and self._reading(*GRADIENTS):
            names = ", ".join(name for name, c in self.criteria.items() if c.reads in GRADIENTS)
            raise UserError(f"{names}: there are no gradients when blocks are offloaded; leave the criterion out")

    @property
    def reads_text(self) -> bool:
        """Whether any of the criteria needs calibration samples."""
        return bool(self._reading("states", "updates", "activations", "removals", *GRADIENTS))

    @torch.no_grad()
    def update(self, tokens: Tensor) -> None:
        """Process calibration samples, int64 [samples, length], without padding."""
        with self.watching(tokens, need_logits=False):
            self._forward(tokens)

    @contextmanager
    def watching(self, tokens: Tensor, *, need_logits: bool = True) -> Iterator[None]:
        """While open, the model's forward pass of ``tokens`` is observed; remaining computations run at the end.

        Args:
            tokens: tokens of the samples of that forward pass.
            need_logits: whether the result of the forward pass is used; if not, the output layer computes as little as
                possible.
        """
        last = self._job.layers - 1

        def visit(number: int, run: RunBlock, states: Tensor) -> Tensor:
            with self._loaded(number):
                with self._in_full():
                    self._weigh(number)
                after = self._observe(number, run, states)
                if self._reading("removals"):
                    self._removals.advance(run, states)
            self._told(len(states) * (1 + number if self._reading("removals") else 1))
            self._end = after
            return after if need_logits or number < last else after[:1, :1]

        with hooked_blocks(self._model, visit):
            yield
        assert self._end is not None
        if self._reading("removals"):
            found = self._removals.finish(self._model, self._forward, tokens, self._end)
            for number, (loss, count) in enumerate(found):
                for criterion in self._reading("removals"):
                    criterion.losses(number if number <= last else None, loss, count)
        self._end = None
        if self._reading(*GRADIENTS):
            self._gradients(tokens)

    def scores(self, add_up: Callable[[Tensor], object] = lambda sums: None) -> dict[str, dict[str, Any]]:
        """All scores by section and criterion.

        Args:
            add_up: function that adds a tensor up over all ranks, in place.
        """
        for number in range(self._job.layers):
            with self._loaded(number) if self._unweighed(number) else nullcontext():
                self._weigh(number)
        found: dict[str, dict[str, Any]] = {section.value: {} for section in ScoreSection}
        for name, criterion in self.criteria.items():
            for sums in criterion.sums():
                add_up(sums)
            found[criterion.section.value][name] = criterion.result()
        return found

    def perplexity(self) -> float | None:
        """The whole model's perplexity, available after ``scores``; None if it was not measured."""
        return next((c.whole() for c in self.criteria.values() if isinstance(c, RemovalPerplexity)), None)

    def _in_full(self) -> AbstractContextManager[None]:
        """While open, autocast around the forward pass does not reach the criteria's sums."""
        return in_full_precision(self._job.device.type)

    def _reading(self, *what: str) -> list[Criterion]:
        return [criterion for criterion in self.criteria.values() if criterion.reads in what]

    def _observe(self, number: int, run: RunBlock, states: Tensor) -> Tensor:
        """Run a block on the samples, and pass its input and output to the criteria."""
        observers = self._reading("states", "updates")
        if not observers and not self._reading("activations"):
            return in_batches(run, states, self._batch_size)
        updates: dict[str, Tensor] = {}
        parallel = self._family.is_parallel(self._model.config)
        parts = []
        with ExitStack() as stack:
            if self._reading("updates"):
                stack.enter_context(self._recording(number, updates))
            for first in range(0, len(states), self._batch_size):
                before = states[first : first + self._batch_size]
                with self._reading_units(number, len(before)) if self._reading("activations") else nullcontext():
                    after = run(before)
                shaped = {name: update.view_as(before) for name, update in updates.items()}
                step = BlockStep(number, first, before, after, shaped, parallel)
                with self._in_full():
                    for criterion in observers:
                        criterion.observe(step)
                parts.append(after)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @contextmanager
    def _recording(self, number: int, updates: dict[str, Tensor]) -> Iterator[None]:
        """While open, ``updates`` receives the contributions of a block's attention and MLP to the residual stream."""

        def keep(name: str) -> Callable[..., None]:
            return lambda module, inputs, output: updates.__setitem__(name, hidden_states_in(output))

        hooks = [
            self._blocks[number].get_submodule(self._family.update(name)).register_forward_hook(keep(name))
            for name in ("attention", "mlp")
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _reading_units(self, number: int, samples: int) -> Iterator[None]:
        """While open, the inputs of a block's matrices and the outputs of its experts are passed to the criteria."""
        block, criteria = self._blocks[number], self._reading("activations")

        def reading(dimension: str, sublayer: str) -> Callable[..., None]:
            def read(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                values = inputs[0].reshape(samples, -1, inputs[0].shape[-1])
                with self._in_full():
                    for criterion in criteria:
                        criterion.read(number, dimension, sublayer, values)

            return read

        def of_expert(expert: int) -> Callable[..., None]:
            def see(module: nn.Module, inputs: object, output: Tensor) -> None:
                with self._in_full():
                    for criterion in criteria:
                        criterion.expert(number, expert, output)

            return see

        hooks = [
            block.get_submodule(name).register_forward_pre_hook(reading(*place))
            for name, place in self._family.inputs.items()
        ]
        for expert in range(self._job.shape.experts or 0):
            name = str(self._family.expert_modules).replace("*", str(expert))
            hooks.append(block.get_submodule(name).register_forward_hook(of_expert(expert)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _unweighed(self, number: int) -> bool:
        return number not in self._weighed and bool(self._reading("weights", *GRADIENTS))

    @torch.no_grad()
    def _weigh(self, number: int) -> None:
        if not self._unweighed(number):
            return
        self._weighed.add(number)
        for name, parameter in self._weights(number).items():
            for criterion in self._reading("weights", *GRADIENTS):
                criterion.weigh(number, name, parameter)

    def _weights(self, number: int) -> Mapping[str, nn.Parameter]:
        """The matrices and the norms' weights of a block."""
        parameters = self._blocks[number].named_parameters()
        return {name: parameter for name, parameter in parameters if name.endswith(".weight")}

    def _gradients(self, tokens: Tensor) -> None:
        """Compute the gradients that criteria read, for every sample; each is passed to them and freed immediately."""
        trained = {parameter: parameter.requires_grad for parameter in self._model.parameters()}
        kinds = [kind for kind in GRADIENTS if self._reading(kind)]
        hooks = []
        try:
            self._model.requires_grad_(False)
            for number in range(self._job.layers):
                for name, parameter in self._weights(number).items():
                    parameter.requires_grad_(True)
                    hooks.append(parameter.register_post_accumulate_grad_hook(self._consume(number, name)))
            with torch.enable_grad():
                for sample in tokens.split(1):
                    logits = self._forward(sample)
                    for self._differentiated in kinds:
                        _of_logits(self._differentiated, logits, sample).backward(
                            retain_graph=self._differentiated != kinds[-1]
                        )
                    self._told((1 + 2 * len(kinds)) * self._job.layers)
        finally:
            for hook in hooks:
                hook.remove()
            for parameter, before in trained.items():
                parameter.requires_grad_(before)

    def _consume(self, number: int, name: str) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def consume(parameter: Tensor) -> None:
            assert parameter.grad is not None
            for criterion in self._reading(self._differentiated):
                criterion.gradient(number, name, parameter, parameter.grad)
            parameter.grad = None

        return consume


def _of_logits(kind: str, logits: Tensor, sample: Tensor) -> Tensor:
    """What gradients of a kind are of, a scalar: the mean loss, or the mean entropy of the predictions (nats)."""
    if kind == "gradients":
        loss, count = token_losses(logits, sample)
        return loss.sum() / count.sum()
    logs = logits[:, :-1].float().log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()
