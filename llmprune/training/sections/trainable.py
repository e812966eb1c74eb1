"""``trainable``: which weights train."""

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
    """The weights that train; all others stay as they are, bit for bit."""

    name = "trainable"
    settings = TrainableConfig
    places = ()
    fixed = ("parameters", "later")
    chooses_weights = True

    def check_own(self) -> None:
        """See that something trains, and that every point of the run is one."""
        self.own.check()

    def check_inputs(self, inputs: Inputs) -> None:
        """See that the model has these parts."""
        with torch.device("meta"):
            phases(AutoModelForCausalLM.from_config(inputs.model_config), self.own.parameters, self.own.later)

    def callbacks(self, build: Build) -> Iterable[Callback]:
        """``PartialTraining``."""
        return [PartialTraining(self.own)]

    @classmethod
    def needs(cls, own: TrainableConfig, model: PreTrainedModel, before: Needs) -> Needs:
        """The parts that train at some time."""
        parts = [own.parameters, *own.later.values()]
        return replace(before, names={name for each in parts for name in parameter_names_of(model, each)})
