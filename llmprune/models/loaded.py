"""A loaded model: weights on their device, with the tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmprune.models.enough_memory import check_memory
from llmprune.models.loading import count_parameters, load_any_model, load_tokenizer
from llmprune.models.placement import Placement
from llmprune.models.quantised import quantised_as
from llmprune.models.source import ModelFolder, find_folder, longest_input, read_config
from llmprune.utils.errors import UserError


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, with its tokenizer.

    Attributes:
        name: name of the model, as the user wrote it.
        folder: folder that contains the model.
        model: model with its weights.
        tokenizer: tokenizer of the model.
    """

    name: str
    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def parameters(self) -> int:
        """The number of parameters; packed values of a quantised model count as the parameters that they contain."""
        if getattr(self.model.config, "quantization_config", None) is not None:
            return count_parameters(self.model.config)
        return sum(p.numel() for p in self.model.parameters())

    def generation(self, **settings: Any) -> dict[str, Any]:
        """The arguments of ``model.generate`` with which only ``settings`` apply.

        Without them, the settings in the model's own generation_config.json (beams, penalties) would apply as well.
        """
        own = self.model.generation_config
        tokens = {"eos_token_id": own.eos_token_id, "bos_token_id": own.bos_token_id} if own is not None else {}
        pad = next(t for t in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if t is not None)
        config = transformers.GenerationConfig(**tokens, pad_token_id=pad, **settings)
        return {"generation_config": config, "use_model_defaults": False}


@dataclass(frozen=True)
class ModelSource:
    """A model that can be opened; only its config and tokenizer are read.

    Attributes:
        folder: folder of the model.
        config: config of the model.
        tokenizer: tokenizer of the model.
        placement: number format, device and attention to load the model with.
    """

    folder: ModelFolder
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    placement: Placement

    def __post_init__(self) -> None:
        """Raise ``UserError`` if the model needs more memory than is free."""
        self._check_memory()

    @property
    def name(self) -> str:
        """The name of the model, as the user wrote it."""
        return self.folder.name

    @property
    def limit(self) -> int | None:
        """The largest number of tokens that the model takes; None = its config has no limit."""
        return longest_input(self.config)

    def open(self) -> LoadedModel:
        """Load the model with its weights.

        Raises:
            UserError: the weights can't be read, or there is no longer enough free memory.
        """
        self._check_memory()
        placement = self.placement
        model = load_any_model(
            self.folder,
            dtype=self._dtype or "auto",
            attention=placement.attention,
            device_map=placement.device_map,
            adapter=placement.adapter,
        )
        if placement.device_map is None:
            model.to(placement.torch_device)  # type: ignore[arg-type]
        return LoadedModel(self.name, self.folder.path, model, self.tokenizer)

    @property
    def _dtype(self) -> torch.dtype | None:
        """The dtype of the weights; None = as stored, for quantised weights."""
        quantised = self.placement.dtype == "auto" and quantised_as(self.folder) is not None
        return None if quantised else self.placement.torch_dtype

    def _check_memory(self) -> None:
        if self.placement.device_map is None:
            remedy = "spread it over all devices with --device-map auto, or take bfloat16"
            check_memory(self.folder, dtype=self._dtype, on_gpu=self.placement.on_gpu, remedy=remedy)


def check_vocabulary(largest: int, config: PretrainedConfig, what: str) -> None:
    """Raise ``UserError`` for tokens outside a model's vocabulary: its tokenizer may have more tokens than the model.

    Args:
        largest: largest token of a text.
        config: config of the model.
        what: description of the text, for the message.
    """
    if largest >= config.vocab_size:
        raise UserError(
            f"{what} has the token {largest}, but the model's vocabulary ends at {config.vocab_size - 1}: is this the "
            "model's own tokenizer?"
        )


def bos_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token that begins a text: BOS, or EOS if a tokenizer has no BOS (as in lm-eval)."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def find_model(name: str, placement: Placement) -> ModelSource:
    """Find a causal LM of any architecture, and check that it can be opened.

    Args:
        name: folder or hub name of the model.
        placement: number format, device and attention to load the model with.

    Raises:
        UserError: the model is missing or too large, or the placement is impossible.
    """
    placement.check()
    folder = find_folder(name)
    return ModelSource(folder, read_config(folder), load_tokenizer(folder), placement)


def open_model(name: str, placement: Placement) -> LoadedModel:
    """Open a causal LM of any architecture; see ``find_model`` and ``ModelSource.open``."""
    return find_model(name, placement).open()
