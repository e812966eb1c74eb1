"""The result of a run of block replacement: weights, plan, and the network that no config can describe."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from llmprune.checkpoints.checkpoint_folder import BEST
from llmprune.conversion.checkpoint import Checkpoint
from llmprune.plans.plan import KeptBlock
from llmprune.pruning.replacements.custom_block import Network
from llmprune.pruning.replacements.modules import REPLACEMENTS, ReplacementModule, Site
from llmprune.pruning.replacements.settings import BlockReplacementConfig
from llmprune.pruning.replacements.span import Span
from llmprune.pruning.replacements.streaming import Streaming
from llmprune.utils.errors import UserError

_REPLACEMENT, _MODEL = "replacement.", "model."


class Changed(Mapping[str, Tensor]):
    """Weights of which some are replaced by others; each is read or computed when it is accessed."""

    def __init__(self, weights: Mapping[str, Tensor], others: Mapping[str, Callable[[], Tensor]]) -> None:
        """Wrap ``weights``; entries of ``others`` replace those with the same name."""
        self._weights, self._others = weights, others

    def __getitem__(self, name: str) -> Tensor:
        """Read or compute one tensor by its name."""
        return self._others[name]() if name in self._others else self._weights[name]

    def __iter__(self) -> Iterator[str]:
        """The names of ``weights``."""
        return iter(self._weights)

    def __len__(self) -> int:
        """The number of tensors."""
        return len(self._weights)


@dataclass(frozen=True)
class Replaced:
    """The result of a run of block replacement.

    Attributes:
        settings: settings of the run's section.
        span: span of blocks that is replaced.
        replacement: replacement module with its weights.
        weights: model's weights by Hugging Face name, with the weights that trained beside the replacement module, and
            with the replacement module's weights if its blocks replace the span's or if it is folded into weights.
        trained: weights that trained beside the replacement module, by name; empty unless it is the best module.
        best: held-out loss (nats per token) and batch of the replacement module, if it is the best one.
    """

    settings: BlockReplacementConfig
    span: Span
    replacement: ReplacementModule
    weights: Mapping[str, Tensor]
    trained: Mapping[str, Tensor]
    best: tuple[float, int] | None

    def kept(self, layers: int) -> tuple[KeptBlock, ...]:
        """The blocks that are kept, out of ``layers`` blocks."""
        return self.span.kept(layers, self.replacement.offsets)

    @property
    def described(self) -> str | None:
        """Text for the plan: the kind of the replacement module and the replaced blocks; None = no module."""
        return None if self.settings.kind == "none" else f"{self.settings.kind} for {self.span}"

    @property
    def network(self) -> Network | None:
        """The replacement module, if the model needs a modelling file for it; otherwise None."""
        network = self.replacement.network
        if network is None:
            return None
        return Network(self.settings.kind, network.settings, self.span.start, network.state_dict())  # type: ignore[arg-type]


def read_replaced(checkpoint: Checkpoint, *, best: bool, model: PreTrainedModel | None = None) -> Replaced:
    """Read the result of a run of block replacement.

    Args:
        checkpoint: checkpoint of that run.
        best: whether to use the replacement module with the lowest held-out loss instead of the checkpoint's.
        model: model with the checkpoint's config, if the replacement module will be run; None = a model on the meta
            device.

    Raises:
        UserError: the checkpoint is of another kind, or damaged.
    """
    config = checkpoint.manifest.section(BlockReplacementConfig)
    if config is None or config.start is None or config.length is None:
        raise UserError(f"{checkpoint.path} is of no run of block replacement")
    span = Span(config.start, config.length)
    if model is None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(checkpoint.config)
            replacement = REPLACEMENTS[config.kind](Site(model, span, 0), config)
    else:
        replacement = REPLACEMENTS[config.kind](Site(model, span, 0), config)
    trained, score = _best(checkpoint) if best else ({}, None)
    state = checkpoint.state
    values = {name: _REPLACEMENT + name for name in replacement.state_dict()}
    own = {name: trained[full] if full in trained else state[full] for name, full in values.items()}
    replacement.load_state_dict(own, assign=True)
    beside = {name.removeprefix(_MODEL): value for name, value in trained.items() if name.startswith(_MODEL)}
    weights = Changed(checkpoint.weights, {name: value.detach for name, value in beside.items()})
    changed = Changed(weights, replacement.changes(checkpoint.family, span, weights))
    return Replaced(config, span, replacement, changed, beside, score)


def _best(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], tuple[float, int] | None]:
    """The trained weights at the lowest held-out loss, and that loss with its batch."""
    path = checkpoint.path.parent / BEST
    if not path.is_file():
        return {}, None
    with safe_open(path, framework="pt") as file:
        score = float(file.metadata()["loss"]), int(file.metadata()["batch"])
        return {name: file.get_tensor(name) for name in file.keys()}, score  # noqa: SIM118 - it is no mapping


def compute_with(model: PreTrainedModel, replaced: Replaced) -> None:
    """Make a complete model compute with a replacement module instead of the span."""
    streaming = Streaming(model, replaced.replacement.float().eval(), replaced.span, {})
    plain = model.forward

    def forward(input_ids: torch.Tensor) -> CausalLMOutput:
        model.forward = plain  # the streaming runs the model itself
        try:
            states, head = streaming.final_states({"input_ids": input_ids})
            return CausalLMOutput(logits=head.logits(states).view(*input_ids.shape, -1))
        finally:
            model.forward = forward

    model.forward = forward
