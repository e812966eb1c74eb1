"""Writing a plain Hugging Face folder, tensor by tensor, cut by a plan on the way."""

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
from llmprune.models.stored_weights import parameter_names
from llmprune.plans.plan import KeptBlock, Plan
from llmprune.plans.surgery import Surgery
from llmprune.pruning.replacements.custom_block import Network
from llmprune.utils.checksums import record
from llmprune.utils.errors import UserError
from llmprune.utils.files import save_tensors, write_json
from llmprune.utils.outputs import output_folder


def keep_everything(config: PretrainedConfig, model: str) -> Plan:
    """The plan that changes nothing."""
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
    network: Network | None = None,
    card: Mapping[str, object] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> None:
    """Cut ``weights`` by ``plan`` and write them as a Hugging Face folder.

    Never more than one output shard and one source tensor are in memory. Beside the model lie its model card and, in
    ``llmprune/``, the plan.

    Args:
        weights: by Hugging Face name.
        config: of the model that the weights are of.
        plan: what stays.
        out: folder to write.
        companions: folder with the tokenizer and generation config.
        source: name of the source model, for the card.
        network: takes the place of blocks that the plan removes; the model then needs a modelling file.
        card: further facts for the card, each a heading and its value.
        dtype: of the weights written; None = as they are.
        overwrite: whether ``out`` may be replaced.
        max_shard_size: of one safetensors file.

    Raises:
        UserError: the plan does not fit the model, or ``out`` exists.
    """
    surgery = Surgery(config, plan)
    sources = {new: name for name in parameter_names(weights, config) if (new := surgery.new_name(name)) is not None}
    config = surgery.config if network is None else network.config(surgery.config)
    added = {name: torch.zeros(size) for name, size in surgery.added().items()}
    if network is not None:
        added |= network.named(surgery.config)
    expected = _meta_tensors(config, dtype or _stored_dtype(weights, sources), surgery.config, set(added))
    if missing := sorted(set(expected) ^ {*sources, *added}):
        raise UserError(f"the weights do not fit the config: '{missing[0]}' is missing or left over")
    split = split_torch_state_dict_into_shards(expected, max_shard_size=max_shard_size)
    with output_folder(out, overwrite) as folder:
        for filename, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                tensor = added[name] if name in added else surgery.cut(sources[name], weights)
                tensor = tensor.to(expected[name].dtype)
                if not is_finite(tensor):
                    raise UserError(f"'{name}' holds NaN or infinite numbers: a model of them is not written")
                if tensor.shape != expected[name].shape:
                    raise UserError(
                        f"'{name}' comes out as {list(tensor.shape)}, the config wants {list(expected[name].shape)}: "
                        "are these the weights of this config?"
                    )
                shard[name] = tensor
            save_tensors(folder / filename, shard, {"format": "pt"})
            del shard
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            write_json(folder / "model.safetensors.index.json", index)
        config.use_cache = True
        config.dtype = next(iter(expected.values())).dtype
        save_model_config(config, folder)
        copy_companions(companions, folder)
        if needs_code(config):
            write_code(folder)
        (folder / "llmprune").mkdir()
        plan.save(folder / "llmprune" / "plan.json")
        parameters = sum(tensor.numel() for tensor in expected.values())
        text = model_card(
            source, plan, parameters, surgery.config.model_type, card or {}, needs_code=needs_code(config)
        )
        (folder / "README.md").write_text(text, encoding="utf-8")
        record(folder)


def _meta_tensors(
    config: PretrainedConfig, dtype: torch.dtype, plain: PretrainedConfig, added: set[str]
) -> dict[str, Tensor]:
    """The parameters of a model with this config, without memory; a tied output layer is left out.

    ``added`` are those that the family does not know, and ``plain`` is the config of a model without them.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    state = dict(model.named_parameters(remove_duplicate=True))
    return {name: state[name].detach() for name in sorted({*parameter_names(state, plain), *added})}


def _stored_dtype(weights: Mapping[str, Tensor], sources: Mapping[str, str]) -> torch.dtype:
    return weights[next(iter(sources.values()))].dtype
