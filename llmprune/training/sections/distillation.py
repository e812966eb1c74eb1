"""``distillation``: the model learns from a teacher."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from composer import Callback
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmprune.callbacks.distillation import Distillation
from llmprune.config.schema import Config
from llmprune.config.section_registry import SECTIONS
from llmprune.data.format import DataManifest, tokenizer_fingerprint
from llmprune.estimate.needs import Needs, Teaching
from llmprune.models.families import family_of
from llmprune.models.loading import load_model_config, load_tokenizer
from llmprune.models.retold import Spelling
from llmprune.models.smaller_tokenizer import Vocabulary
from llmprune.plans.plan import Plan
from llmprune.plans.recorded import recorded_plans
from llmprune.pruning.gates.settings import L0PruningConfig
from llmprune.pruning.replacements.settings import BlockReplacementConfig
from llmprune.recovery.correspondence import Correspondence, corresponding
from llmprune.recovery.distillation import DistillationConfig
from llmprune.recovery.token_map import TokenMap
from llmprune.training.section import Build, Inputs, Section
from llmprune.utils.errors import UserError

log = logging.getLogger(__name__)


@SECTIONS.register("distillation")
class DistillationSection(Section[DistillationConfig]):
    """A teacher whose predictions and hidden states the model learns to reproduce."""

    name = "distillation"
    settings = DistillationConfig
    fixed = ("teacher", "objectives", "final_objectives", "temperature", "top_k", "plan", "blocks", "dtype")
    places = ("teacher", "plan")

    def models(self) -> list[str]:
        """The teacher's folder or hub name, if the settings name one."""
        return [] if self.own.teacher is None else [self.own.teacher]

    def files(self) -> list[str]:
        """The path of the plan, if the settings name one."""
        return [] if self.own.plan is None else [self.own.plan]

    def check_own(self) -> None:
        """Check that the objectives can be computed in this job."""
        self.own.check()
        if self.config.model.attention == "flash_attention_2" and self.own.teacher and self.own.dtype == "float32":
            raise UserError(
                "model.attention=flash_attention_2 computes in half precision only: take distillation.dtype=bfloat16"
            )
        if self.config.section(BlockReplacementConfig) is not None:
            raise UserError(
                "a replacement module learns from the source as it is: leave out distillation and name "
                "block_replacement's objectives kl, mse or cosine"
            )

    def check_inputs(self, inputs: Inputs) -> None:
        """Check that the teacher, or its kept predictions, fits the model and the data."""
        model, data = inputs.model_config, inputs.data.manifest
        self._tokens = None
        if self.own.teacher is not None:
            self._tokens = token_map_of(self.config, self.own, model, data)
        elif self.config.section(L0PruningConfig) is None:
            _check_kept(self.config, self.own, model, data)
        self._correspondence = correspondence_of(self.config, self.own, model)

    def check_steps(self, job: str, *, again: bool) -> None:
        """Refuse settings that compare states by one plan, if the job has several plans."""
        if again and self.own.compares_states:
            raise UserError("states compare with the source's in the first round only: take the objectives kl and lm")
        if self.own.plan is not None or self.own.blocks is not None:
            raise UserError(f"what {job} recovers are models of several plans: leave out distillation.plan and blocks")

    def callbacks(self, build: Build) -> Iterable[Callback]:
        """The callback ``Distillation``."""
        kept = self.own.teacher is None and self.config.section(L0PruningConfig) is None
        attention = self.config.model.attention
        return [Distillation(self.own, self._correspondence, self._tokens, attention=attention, kept=kept)]

    @classmethod
    def needs(cls, own: DistillationConfig, model: PreTrainedModel, before: Needs) -> Needs:
        """Needs of the teacher's weights, its forward pass, and the states that are compared."""
        teacher, parameters, outside = None, 0, 0
        if own.teacher is not None:
            teacher = load_model_config(own.teacher)
            with torch.device("meta"):
                sizes = {n: p.numel() for n, p in AutoModelForCausalLM.from_config(teacher).named_parameters()}
            locate = family_of(teacher).locate
            parameters = sum(sizes.values())
            outside = sum(size for name, size in sizes.items() if locate(name).block is None)
        elif before.gates:
            teacher = model.config  # the same model with open gates; kept predictions take nothing
        layers = family_of(model.config).shape(model.config).layers
        compared = 0 if not own.compares_states else layers if own.blocks is None else len(own.blocks)
        return replace(before, teaching=Teaching(teacher, parameters, outside, own.dtype, compared), logits="compared")


def token_map_of(
    config: Config, settings: DistillationConfig, model: PretrainedConfig, data: DataManifest
) -> TokenMap | None:
    """The map between the tokens of the model and those of its teacher; None if both have the same vocabulary.

    Args:
        config: config of the run.
        settings: settings of the run's ``distillation`` section, with a teacher.
        model: Hugging Face config of the model that trains.
        data: manifest of the data.

    Raises:
        UserError: the teacher has another tokenizer, and the model's was not cut from it.
    """
    assert settings.teacher is not None
    teacher, tokenizer = load_model_config(settings.teacher), load_tokenizer(settings.teacher)
    if tokenizer_fingerprint(tokenizer) == data.tokenizer:
        same = teacher.vocab_size == model.vocab_size
        return None if same else TokenMap.padded(model.vocab_size, teacher.vocab_size)
    vocabulary = Vocabulary(tokenizer)
    cuts = (plan for plan in _plans_of(config, settings) if plan.source.vocabulary == teacher.vocab_size)
    kept = next((plan.vocabulary for plan in cuts if plan.vocabulary is not None), None)
    if kept is None or tokenizer_fingerprint(vocabulary.cut(kept)) != data.tokenizer:
        raise UserError(
            f"the tokenizer of the teacher {settings.teacher} did not make the data: take another teacher, or name the "
            "plan by which the model's vocabulary was cut from the teacher's (distillation.plan)"
        )
    return TokenMap.spelt(Spelling(kept, vocabulary.pieces(kept)), teacher.vocab_size)


def _check_kept(config: Config, settings: DistillationConfig, model: PretrainedConfig, data: DataManifest) -> None:
    kept = data.teacher
    if kept is None:
        raise UserError(
            "name distillation.teacher, or data with a teacher's predictions (python -m data_prep teach DATA)"
        )
    if settings.compares_states:
        raise UserError("kept predictions hold no states: leave out the objectives mse and cosine, or name the teacher")
    if kept["vocab_size"] != model.vocab_size:
        raise UserError(
            f"the vocabulary of the kept predictions' teacher has {kept['vocab_size']} tokens, the model's "
            f"{model.vocab_size}: take a teacher with the model's"
        )
    boundaries = data.conversations if config.data.document_boundaries is None else config.data.document_boundaries
    for key, wanted, found in (
        ("distillation.temperature", settings.temperature, kept["temperature"]),
        ("data.document_boundaries", boundaries, kept["boundaries"]),
    ):
        if wanted != found:
            raise UserError(f"the kept predictions were made with {key} {found}, the config asks for {wanted}")
    if settings.top_k is not None and settings.top_k > kept["top_k"]:
        raise UserError(f"distillation.top_k is {settings.top_k}; only {kept['top_k']} were kept")


def correspondence_of(config: Config, settings: DistillationConfig, model: PretrainedConfig) -> Correspondence | None:
    """The correspondence of the model's states and its teacher's; None if no states are compared.

    Args:
        config: config of the run.
        settings: settings of the run's ``distillation`` section.
        model: Hugging Face config of the model that trains.

    Raises:
        UserError: the states can't be compared.
    """
    if not settings.compares_states:
        return None
    student = family_of(model).shape(model)
    if settings.teacher is None:
        gates = config.section(L0PruningConfig)
        if gates is not None and "hidden" in (gates.gates or ["hidden"]):
            raise UserError(
                "gates of hidden dimensions leave out what an ungated model's states have: take the objectives kl and "
                "lm, or other gates"
            )
        return corresponding(student, student, None, settings.blocks)
    teacher = load_model_config(settings.teacher)
    shape, plans = family_of(teacher).shape(teacher), _plans_of(config, settings)
    plan = next((one for one in plans if settings.plan is not None or one.source.agrees(shape)), None)
    if plans and plan is None:
        log.warning(
            "the plan in %s does not begin from the teacher: the blocks are compared with blocks of the teacher at "
            "equal distances; name the plan of the cut with distillation.plan",
            config.model.path,
        )
    return corresponding(student, shape, plan, settings.blocks)


def _plans_of(config: Config, settings: DistillationConfig) -> list[Plan]:
    """The plan that the settings name, or those in the model's folder."""
    if settings.plan is not None:
        return [Plan.load(Path(settings.plan))]
    return [] if config.model.path is None else recorded_plans(Path(config.model.path))
