"""Low-rank adapters (LoRA, arXiv:2106.09685), optionally on a base model in four bits (QLoRA, arXiv:2305.14314)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llmprune.models.block_hooks import blocks_of
from llmprune.models.families import MATRICES, SUBLAYERS, Role, family_of
from llmprune.recovery.four_bits import MARK, describe_packed, written_out
from llmprune.utils.errors import UserError, nearest
from llmprune.utils.settings import limited

if TYPE_CHECKING:
    from peft import LoraConfig as PeftConfig

BASE, A, B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"  # parts of the names of parameters
_ADAPTED = MATRICES - {Role.ROUTER}


@dataclass
class LoRAConfig:
    """Low-rank adapters added to frozen matrices.

    Attributes:
        rank: rank of every adapter.
        alpha: scale of the adapters: an adapter's output is multiplied by alpha / rank.
        dropout: share of an adapter's inputs that is dropped in training.
        targets: matrices with adapters: attention, mlp, or a matrix within a block by its name, such as
            self_attn.q_proj.
        quantize: number format of the blocks' frozen matrices: ``nf4`` = four bits (double quantisation, computing in
            model.dtype); null = not quantised.
    """

    rank: int = limited(8, least=1)
    alpha: float = limited(16.0, above=0)
    dropout: float = limited(0.0, least=0, below=1)
    targets: list[str] = field(default_factory=lambda: ["attention", "mlp"])
    quantize: Literal["nf4"] | None = None

    def peft(self, config: PretrainedConfig, base: str | None = None) -> "PeftConfig":
        """The settings in PEFT's form, for a model with the config ``config``."""
        from peft import LoraConfig as PeftConfig  # takes seconds

        return PeftConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type] # any number will do
            lora_dropout=self.dropout,
            target_modules=lora_targets(config, self.targets),
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
        )


def lora_targets(config: PretrainedConfig, targets: list[str]) -> list[str]:
    """The names of the matrices that get adapters, within a block; for matrices of experts, the last part of the name.

    Raises:
        UserError: a target is unknown, or there is none.
    """
    family = family_of(config)
    matrices = {name: role for name, role in family.block.items() if role in _ADAPTED}
    found: set[str] = set()
    for target in targets:
        chosen = {name for name, role in matrices.items() if role in SUBLAYERS.get(target, ()) or name == target}
        if not chosen:
            raise UserError(f"lora.targets: '{target}' is unknown; {nearest(target, ['attention', 'mlp', *matrices])}")
        found |= chosen
    if not found:
        raise UserError("lora.targets is empty: name attention, mlp, or both")
    return sorted(name.rpartition("*.")[2] for name in found)


def add_adapters(model: PreTrainedModel, config: LoRAConfig, seed: int) -> list[nn.Parameter]:
    """Add adapters to a model and return their parameters, float32; the model's outputs do not change at first.

    Args:
        model: model of a supported family.
        config: settings of the adapters.
        seed: seed of the random half of every adapter.

    Raises:
        UserError: see ``lora_targets``.
    """
    from peft import inject_adapter_in_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config.peft(model.config), model)  # type: ignore[arg-type]
    adapters = [module for name, module in model.named_modules() if name.endswith((A[:-7], B[:-7]))]
    for adapter in adapters:
        adapter.float()
    describe_packed(model)
    return [parameter for adapter in adapters for parameter in adapter.parameters()]


def hold_frozen(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Hold the frozen matrices of a model's blocks, except routers, in the dtype of matrix products under autocast.

    Every product stays bit for bit as it was, because autocast rounds the matrices in the same way. They take half of
    float32's memory, and the rounded copies that autocast keeps until the backward pass are no longer made.

    Args:
        model: model with adapters, in which only these learn.
        dtype: dtype of matrix products.
    """
    routers = tuple(name for name, role in family_of(model.config).block.items() if role is Role.ROUTER)
    for block in blocks_of(model):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad and name not in routers:
                module.to(dtype)


def base_name(name: str) -> str | None:
    """A parameter's name in the model without adapters; None = the parameter is an adapter's."""
    return None if ".lora_" in name else name.replace(BASE, ".")


class AdaptedWeights(Mapping[str, Tensor]):
    """A model's weights with the adapters merged into them, each computed when it is read.

    The base has the values used in training: a matrix in four bits is first converted to the dtype that it was
    quantised from. A merged matrix is float32.
    """

    def __init__(self, stored: Mapping[str, Tensor], config: LoRAConfig) -> None:
        """Wrap the tensors of a model with adapters, by name."""
        self._stored, self._scale = stored, config.alpha / config.rank
        self._names = {base: name for name in stored if (base := base_name(name)) is not None and MARK not in name}
        self._descriptions: dict[str, list[str]] = {}
        for name in stored:
            module, inside, _ = name.partition(MARK)
            if inside:
                self._descriptions.setdefault(f"{module}weight", []).append(name)

    def __getitem__(self, name: str) -> Tensor:
        """Read one matrix, with its adapter merged into it."""
        stored = self._names[name]
        base = self._stored[stored]
        if (description := self._descriptions.get(stored)) is not None:
            prefix = stored.removesuffix("weight")
            base = written_out(base, {name.removeprefix(prefix): self._stored[name] for name in description})
        before, inside, _ = stored.rpartition(BASE + "weight")
        if not inside:
            return base
        low, high = self._stored[before + A].float(), self._stored[before + B].float()
        return base.float() + self._scale * (high @ low)

    def __iter__(self) -> Iterator[str]:
        """The names of the model's own parameters."""
        return iter(self._names)

    def __len__(self) -> int:
        """The number of the model's own parameters."""
        return len(self._names)


def adapter_tensors(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters only, under the names in PEFT's files."""
    return {
        f"base_model.model.{name.replace('.default.', '.')}": stored[name] for name in stored if name.endswith((A, B))
    }
