"""The kinds of replacement modules for a span of blocks."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from llmprune.models.block_hooks import RunBlock, blocks_of
from llmprune.models.families import Family, Role, Shape, family_of
from llmprune.models.least_squares import least_squares
from llmprune.models.modeling_llmprune import FFN, Linear, Mean, RicherHeads, SwiGLU
from llmprune.pruning.replacements.fitting import Map, Sums
from llmprune.pruning.replacements.settings import BlockReplacementConfig
from llmprune.pruning.replacements.span import Span, given_span
from llmprune.utils.errors import UserError
from llmprune.utils.registry import Registry

REPLACEMENTS: "Registry[Callable[[Site, BlockReplacementConfig], ReplacementModule]]" = Registry(
    "replacements", "replacement module"
)
"""Kinds of replacement modules by name."""

Changes = Mapping[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Site:
    """The place of a replacement module in a model.

    Attributes:
        model: source model.
        span: span of the source's blocks that is replaced.
        seed: seed of random weights.
    """

    model: PreTrainedModel
    span: Span
    seed: int

    @property
    def family(self) -> Family:
        """The family of the source model."""
        return family_of(self.model.config)

    @property
    def shape(self) -> Shape:
        """The shape of the source model."""
        return self.family.shape(self.model.config)

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks of the span."""
        return blocks_of(self.model)[self.span.start : self.span.end]

    @property
    def eps(self) -> float:
        """Epsilon of the model's norms."""
        config = self.model.config
        found = (getattr(config, name, None) for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"))
        return next((value for value in found if value is not None), 1e-5)


class ReplacementModule(nn.Module):
    """A network in the place of a span; a forward pass calls it at each of the span's blocks.

    Attributes:
        offsets: numbers within the span of the blocks that stay in the shortened model, with the replacement module's
            weights.
        reads_update: whether the module reads what the MLP before the span adds to the residual stream.
        is_fitted: whether the module is computed from hidden states before any training.
    """

    offsets: tuple[int, ...] = ()
    reads_update = False
    is_fitted = False

    @property
    def network(self) -> nn.Module | None:
        """The network that is exported with a modelling file; None = the result needs no such file."""
        return None

    def step(self, offset: int, run: RunBlock, states: Tensor, update: Tensor | None) -> Tensor:
        """Compute in the place of one block.

        Args:
            offset: number of the block within the span.
            run: function that runs a block with this block's masks and positions.
            states: residual stream after the module's earlier steps, [batch, length, hidden].
            update: output of the MLP before the span, [batch, length, hidden]; None unless ``reads_update``.
        """
        return states

    def begin(self, blocks: nn.ModuleList) -> None:
        """Copy values from the span's blocks, after their weights are loaded."""

    def ways(self, sums: Sums, ridges: Sequence[float]) -> list[Map]:
        """The possible maps of a module that ``is_fitted``: one for each ridge, or only one."""
        return []

    def take(self, chosen: Map) -> None:
        """Set the module to a map; an empty map adds nothing to the residual stream."""

    def changes(self, family: Family, span: Span, weights: Mapping[str, Tensor]) -> "Changes":
        """The source's weights that change on export, by Hugging Face name, as functions that compute them."""
        return {}


@REPLACEMENTS.register("none")
class NoReplacement(ReplacementModule):
    """No module: the span is removed."""

    def __init__(self, site: Site, config: BlockReplacementConfig) -> None:
        super().__init__()


class _Network(ReplacementModule):
    """A network that processes each token's state separately."""

    def __init__(self, site: Site, config: BlockReplacementConfig) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(site.seed)
            self.net = self.make(site, config)

    @property
    def network(self) -> nn.Module:
        return self.net

    def make(self, site: Site, config: BlockReplacementConfig) -> nn.Module:
        """Create the network for a site."""
        raise NotImplementedError

    def forward(self, states: Tensor) -> Tensor:
        """The states after the span."""
        found: Tensor = self.net(states)
        return found

    def step(self, offset: int, run: RunBlock, states: Tensor, update: Tensor | None) -> Tensor:
        return states if offset else self(states)


@REPLACEMENTS.register("mean")
class MeanReplacement(_Network):
    """The mean of the span's contribution to the residual stream (mean ablation)."""

    is_fitted = True

    def make(self, site: Site, config: BlockReplacementConfig) -> nn.Module:
        return Mean(site.shape.hidden)

    def ways(self, sums: Sums, ridges: Sequence[float]) -> list[Map]:
        return [Map(bias=sums.y / sums.tokens)]

    def take(self, chosen: Map) -> None:
        _assign(self.get_parameter("net.bias"), chosen.bias)


@REPLACEMENTS.register("linear")
class LinearReplacement(_Network):
    """A linear map, initialised by least squares."""

    is_fitted = True

    def make(self, site: Site, config: BlockReplacementConfig) -> nn.Module:
        return Linear(site.shape.hidden)

    def ways(self, sums: Sums, ridges: Sequence[float]) -> list[Map]:
        x, y = sums.x / sums.tokens, sums.y / sums.tokens
        xx, xy = sums.xx / sums.tokens - x.outer(x), sums.xy / sums.tokens - x.outer(y)
        weights = [least_squares(xx, xy, ridge) for ridge in ridges]
        return [Map(weight, y - x @ weight) for weight in weights]

    def take(self, chosen: Map) -> None:
        _assign(self.get_parameter("net.update.weight"), None if chosen.weight is None else chosen.weight.T)
        _assign(self.get_parameter("net.update.bias"), chosen.bias)


@REPLACEMENTS.register("closed_form")
class ClosedForm(ReplacementModule):
    """A linear map of the update by the MLP before the span, folded into that MLP (ReplaceMe, arXiv:2505.02819)."""

    reads_update = True
    is_fitted = True

    def __init__(self, site: Site, config: BlockReplacementConfig) -> None:
        super().__init__()
        if site.span.start == 0:
            raise UserError("closed_form is folded into the MLP before the span: the span can't begin at block 0")
        if not site.family.ends_linearly:
            raise UserError(
                f"{site.family.name} models have a norm after the MLP, so nothing can be folded into it: choose linear"
            )
        self.update = nn.Parameter(torch.zeros(site.shape.hidden, site.shape.hidden))  # T − 1

    def forward(self, states: Tensor, update: Tensor) -> Tensor:
        """The states after the span, [batch, length, hidden], from states and updates of this shape."""
        return states + (update.to(self.update.dtype) @ self.update).to(states.dtype)

    def step(self, offset: int, run: RunBlock, states: Tensor, update: Tensor | None) -> Tensor:
        if offset:
            return states
        assert update is not None
        found: Tensor = self(states, update)
        return found

    def ways(self, sums: Sums, ridges: Sequence[float]) -> list[Map]:
        return [Map(least_squares(sums.xx / sums.tokens, sums.xy / sums.tokens, ridge)) for ridge in ridges]

    def take(self, chosen: Map) -> None:
        _assign(self.update, chosen.weight)

    def changes(self, family: Family, span: Span, weights: Mapping[str, Tensor]) -> "Changes":
        inside = (name for name in weights if name.startswith(f"{family.blocks}.{span.start - 1}."))
        mlp = [name for name in inside if not family.is_buffer(name) and family.locate(name).role is Role.MLP_OUT]
        return {name: partial(self.folded, name, weights) for name in mlp}

    @torch.no_grad()
    def folded(self, name: str, weights: Mapping[str, Tensor]) -> Tensor:
        """The MLP's output matrix [hidden, channels], or its bias [hidden], multiplied by the map."""
        tensor, whole = weights[name], self.update.float() + torch.eye(len(self.update))
        return (whole.T @ tensor.float()).to(tensor.dtype)


@REPLACEMENTS.register("ffn")
class FFNReplacement(_Network):
    """A norm and two matrices with a ReLU between them, with a residual connection; d → 4d → d by default."""

    def make(self, site: Site, config: BlockReplacementConfig) -> nn.Module:
        return FFN(site.shape.hidden, config.intermediate or 4 * site.shape.hidden, site.eps)


@REPLACEMENTS.register("swiglu")
class SwiGLUReplacement(_Network):
    """A norm and a gated MLP with a residual connection; by default as many channels as the model's own MLPs."""

    def make(self, site: Site, config: BlockReplacementConfig) -> nn.Module:
        return SwiGLU(site.shape.hidden, config.intermediate or site.shape.intermediate, site.eps)


@REPLACEMENTS.register("blocks")
class BlocksReplacement(ReplacementModule):
    """Blocks of the model's own kind, initialised from blocks of the span; the result is a plain model."""

    def __init__(self, site: Site, config: BlockReplacementConfig) -> None:
        super().__init__()
        length, count = site.span.length, config.blocks
        if count > length:
            raise UserError(f"{count} blocks can't replace {length}: choose block_replacement.blocks ≤ {length}")
        places = {
            "last": range(length - count, length),
            "spread": [round(place * (length - 1) / max(count - 1, 1)) for place in range(count)],
        }
        self.offsets = tuple(places.get(config.take, range(count)))
        self._taken = config.take != "random"
        self.blocks = nn.ModuleList(copy.deepcopy(site.blocks[offset]) for offset in self.offsets)
        if not self._taken:
            with torch.random.fork_rng():
                torch.manual_seed(site.seed)
                self.blocks.apply(site.model._init_weights)  # by the architecture's own code
                for module in self.blocks.modules():
                    if isinstance(module, RicherHeads):
                        module.begin()
        # Composer shards these modules and checkpoints their activations.
        self.fsdp_wrap_fn = self.activation_checkpointing_fn = self._is_block

    def _is_block(self, module: nn.Module) -> bool:
        return any(module is block for block in self.blocks)

    def forward(self, states: Tensor) -> Tensor:
        """Never called: the blocks run in the place of the model's own blocks."""
        raise NotImplementedError

    def step(self, offset: int, run: RunBlock, states: Tensor, update: Tensor | None) -> Tensor:
        return run(states, self.blocks[self.offsets.index(offset)]) if offset in self.offsets else states

    def changes(self, family: Family, span: Span, weights: Mapping[str, Tensor]) -> "Changes":
        return {
            f"{family.blocks}.{span.start + offset}.{name}": parameter.detach
            for offset, block in zip(self.offsets, self.blocks, strict=True)
            for name, parameter in block.named_parameters()
        }

    @torch.no_grad()
    def begin(self, blocks: nn.ModuleList) -> None:
        for offset, block in zip(self.offsets, self.blocks, strict=True) if self._taken else ():
            for parameter, source in zip(block.parameters(), blocks[offset].parameters(), strict=True):
                _local(parameter).copy_(_local(source))


def planned_replacement(model: PreTrainedModel, config: BlockReplacementConfig) -> tuple[Span, ReplacementModule]:
    """The span and the replacement module that the settings describe, without memory for weights.

    If the span is yet to be found, only its length is right. It then does not begin at the first block, because some
    kinds can't be there.
    """
    span = given_span(config)
    if span is None:
        assert config.length is not None
        span = Span(max(family_of(model.config).shape(model.config).layers - config.length, 0), config.length)
    with torch.device("meta"):
        return span, REPLACEMENTS[config.kind](Site(model, span, 0), config)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@torch.no_grad()
def _assign(parameter: Tensor, value: Tensor | None) -> None:
    """Set a parameter, or this rank's shard of it; None = to zero."""
    if value is None:
        parameter.zero_()
        return
    value = value.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)
