"""Richer heads in a model's config (LLM_Compression; see docs/heads.md)."""

from dataclasses import asdict

from transformers import PretrainedConfig

from llmprune.models.custom_code import own_config
from llmprune.models.families import RicherHeadsConfig, attention_output, family_of, richer_heads_of
from llmprune.utils.errors import UserError


def with_richer_heads(plain: PretrainedConfig, heads: RicherHeadsConfig) -> PretrainedConfig:
    """The config of a model with richer heads, from that of the model without.

    Raises:
        UserError: it has them already.
    """
    if richer_heads_of(plain) is not None:
        raise UserError("the heads of this model are richer already")
    family = family_of(plain)
    config = own_config(plain)
    config.llmprune_richer_heads = {
        "blocks": family.blocks,
        "output": attention_output(family),
        **asdict(heads),
    }
    return config
