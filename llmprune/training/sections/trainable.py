"""``trainable``: which weights train."""

from collections.abc import Iterable

import torch
from composer import Callback
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune.callbacks.partial_training import PartialTraining
from llmprune.config.sections import SECTIONS
from llmprune.estimate.sizes import Learning
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

    def check(self, inputs: Inputs) -> None:
        """See that the model has these parts."""
        self.own.check()
        with torch.device("meta"):
            phases(AutoModelForCausalLM.from_config(inputs.model_config), self.own.parameters, self.own.later)

    def callbacks(self, build: Build) -> Iterable[Callback]:
        """``PartialTraining``."""
        return [PartialTraining(self.own)]

    @classmethod
    def learning(cls, own: TrainableConfig, model: PreTrainedModel, before: Learning) -> Learning:
        """The parts that train at some time."""
        parts = [own.parameters, *own.later.values()]
        return Learning({name for each in parts for name in parameter_names_of(model, each)})
