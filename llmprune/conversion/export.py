"""Writing a plain Hugging Face folder tensor by tensor, each cut by a plan."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from llmprune.conversion.model_card import model_card
from llmprune.models.companions import copy_companions, save_model_config
from llmprune.models.families import family_of
from llmprune.models.finite import is_finite
from llmprune.models.own_model_types import needs_code, write_code
from llmprune.models.smaller_tokenizer import write_companions
from llmprune.models.stored_weights import parameter_names
from llmprune.plans.plan import KeptBlock, Plan
from llmprune.plans.recorded import APPLIED, EARLIER
from llmprune.plans.surgery import Surgery
from llmprune.pruning.replacements.custom_block import Network
from llmprune.utils.checksums import record
from llmprune.utils.errors import UserError
from llmprune.utils.files import save_tensors, write_json
from llmprune.utils.outputs import output_folder

log = logging.getLogger(__name__)


def keep_everything(config: PretrainedConfig, model: str) -> Plan:
    """Make a plan that changes nothing."""
    family = family_of(config)
    shape = family.shape(config)
    return Plan(family.name, model, shape, tuple(KeptBlock.whole(i) for i in range(shape.layers)))


def export(
    weights: Mapping[str, Tensor],
    config: PretrainedConfig,
    plan: Plan,
    out: Path | str,
    *,
    companions: Path,
    source: str,
    earlier: Plan | None = None,
    network: Network | None = None,
    card: Mapping[str, object] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> None:
    """Cut ``weights`` by ``plan`` and write them as a Hugging Face folder.

    Memory never holds more than one output shard and one source tensor. The folder also gets a model card and, in
    ``llmprune/``, the plan, and the earlier one.

    Args:
        weights: weights of the model by Hugging Face name.
        config: Hugging Face config of the uncut model.
        plan: plan of the parts that are kept.
        out: folder to write.
        companions: folder with the tokenizer and generation config.
        source: name of the source model, for the model card.
        earlier: plan by which the source was cut from its own source, if ``plan`` removes nothing; None = not known.
        network: network that replaces blocks that the plan removes; the model then needs a modelling file.
        card: further facts for the model card: value by heading.
        dtype: dtype of the written weights; None = unchanged.
        overwrite: whether ``out`` may be replaced.
        max_shard_size: largest size of one safetensors file, such as "5GB".

    Raises:
        UserError: the plan does not fit the model, or ``out`` exists.
    """
    made = _CutModel(weights, config, plan, network, dtype)
    split = split_torch_state_dict_into_shards(made.expected, max_shard_size=max_shard_size)
    log.info(
        "%s becomes a %s of %d blocks with %s parameters", source, plan.family, len(plan.blocks), f"{made.parameters:,}"
    )
    with output_folder(out, overwrite) as folder:
        for number, (filename, names) in enumerate(split.filename_to_tensors.items(), 1):
            save_tensors(folder / filename, {name: made.tensor(name) for name in names}, {"format": "pt"})
            size = (folder / filename).stat().st_size / 1e9
            log.info("file %d of %d is written: %.3f GB", number, len(split.filename_to_tensors), size)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            write_json(folder / "model.safetensors.index.json", index)
        made.save_config(folder)
        if plan.vocabulary is None:
            copy_companions(companions, folder)
        else:
            write_companions(plan.vocabulary, companions, folder)
        (folder / "llmprune").mkdir()
        plan.save(folder / APPLIED)
        if earlier is not None:
            earlier.save(folder / EARLIER)
        told = plan if earlier is None else earlier
        code = needs_code(made.config)
        text = model_card(source, told, made.parameters, made.plain.model_type, card or {}, needs_code=code)
        (folder / "README.md").write_text(text, encoding="utf-8")
        record(folder)


class _CutModel:
    """The cut model; each of its tensors is computed when it is accessed.

    Attributes:
        config: Hugging Face config of the cut model.
        plain: config of the cut model without a network that replaces blocks.
        expected: parameters by name on the meta device (without memory), in the dtype that is written.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        config: PretrainedConfig,
        plan: Plan,
        network: Network | None,
        dtype: torch.dtype | None,
    ) -> None:
        """See ``export``.

        Raises:
            UserError: the plan or the weights do not fit the config.
        """
        self._weights, self._surgery = weights, Surgery(config, plan)
        renamed = {name: self._surgery.new_name(name) for name in parameter_names(weights, config)}
        self._sources = {new: name for name, new in renamed.items() if new is not None}
        self._added = {name: torch.zeros(size) for name, size in self._surgery.added().items()}
        self.config = self.plain = self._surgery.config
        if network is not None:
            self.config = network.config(self.plain)
            self._added |= network.named(self.plain)
        self.expected = _meta_tensors(
            self.config, dtype or _stored_dtype(weights, self._sources), self.plain, set(self._added)
        )
        if missing := sorted(set(self.expected) ^ {*self._sources, *self._added}):
            raise UserError(f"the weights do not fit the config: '{missing[0]}' is missing or left over")

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(tensor.numel() for tensor in self.expected.values())

    def tensor(self, name: str) -> Tensor:
        """Compute one parameter of the cut model.

        Raises:
            UserError: it has NaN or infinite values, or its shape differs from the config's.
        """
        expected = self.expected[name]
        cut = self._added[name] if name in self._added else self._surgery.cut(self._sources[name], self._weights)
        tensor = cut.to(expected.dtype)
        if not is_finite(tensor):
            raise UserError(f"'{name}' holds NaN or infinite numbers: a model of them is not written")
        if tensor.shape != expected.shape:
            raise UserError(
                f"'{name}' comes out as {list(tensor.shape)}, the config wants {list(expected.shape)}: "
                "are these the weights of this config?"
            )
        return tensor

    def save_config(self, folder: Path) -> None:
        """Write the config, and the modelling file if the model needs one."""
        self.config.use_cache = True
        self.config.dtype = next(iter(self.expected.values())).dtype
        save_model_config(self.config, folder)
        if needs_code(self.config):
            write_code(folder)


def _meta_tensors(
    config: PretrainedConfig, dtype: torch.dtype, plain: PretrainedConfig, added: set[str]
) -> dict[str, Tensor]:
    """The parameters of a model with this config, on the meta device; a tied output layer is left out.

    ``added`` are names of parameters that the family does not have; ``plain`` is the config of a model without them.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    state = dict(model.named_parameters(remove_duplicate=True))
    return {name: state[name].detach() for name in sorted({*parameter_names(state, plain), *added})}


def _stored_dtype(weights: Mapping[str, Tensor], sources: Mapping[str, str]) -> torch.dtype:
    return weights[next(iter(sources.values()))].dtype
