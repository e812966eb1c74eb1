"""``trainable``: the choice of weights that train."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from composer import Callback
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune.callbacks.partial_training import PartialTraining
from llmprune.config.section_registry import SECTIONS
from llmprune.estimate.needs import Needs
from llmprune.models.parameters import parameter_names_of
from llmprune.recovery.trainable import TrainableConfig, phases
from llmprune.training.section import Build, Inputs, Section


@SECTIONS.register("trainable")
class TrainableSection(Section[TrainableConfig]):
    """The weights that train; all others remain unchanged, bit for bit."""

    name = "trainable"
    settings = TrainableConfig
    places = ()
    fixed = ("parameters", "later")
    chooses_weights = True

    def check_own(self) -> None:
        """Check that something trains, and that every key of ``later`` is a point of the run."""
        self.own.check()

    def check_inputs(self, inputs: Inputs) -> None:
        """Check that the model has the named parts."""
        with torch.device("meta"):
            phases(AutoModelForCausalLM.from_config(inputs.model_config), self.own.parameters, self.own.later)

    def callbacks(self, build: Build) -> Iterable[Callback]:
        """The callback ``PartialTraining``."""
        return [PartialTraining(self.own)]

    @classmethod
    def needs(cls, own: TrainableConfig, model: PreTrainedModel, before: Needs) -> Needs:
        """Needs of all parts that train at any time of the run."""
        parts = [own.parameters, *own.later.values()]
        return replace(before, names={name for each in parts for name in parameter_names_of(model, each)})
