"""A section of a training job's YAML: one class defines everything that it adds to a job."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from composer import Callback, Trainer
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmprune.checkpoints.run_folder import RunFolder
from llmprune.config.schema import Config
from llmprune.data.dataset import MixedDataset
from llmprune.data.prepared import PreparedData
from llmprune.estimate.needs import Needs
from llmprune.models.source import ModelFolder
from llmprune.utils.errors import UserError
from llmprune.utils.recorded_settings import as_typed

if TYPE_CHECKING:
    from llmprune.conversion.checkpoint import Checkpoint
    from llmprune.conversion.result import Result

S = TypeVar("S")


@dataclass
class Inputs:
    """The opened inputs of a job: the model that it trains and the data; they were checked to fit.

    Attributes:
        source: folder of the model that training begins with; None = random weights.
        model_config: Hugging Face config of the model.
        tokenizer: tokenizer of the model and of the data.
        data: prepared data of the job.
        sections: sections of the job.
    """

    source: ModelFolder | None
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    sections: "list[Section[Any]]" = field(default_factory=list)


@dataclass
class Build:
    """A run that is being built; some attributes are set only after certain steps.

    Attributes:
        config: config of the job.
        inputs: opened inputs of the job.
        folder: run folder.
        resume: checkpoint that the run resumes from; None = the run begins.
        model: model in memory, set before ``model_loaded`` is called; with sharding, its tensors may still be empty.
        stream: training stream, set before ``callbacks`` is called.
        evaluated: names of the domains that have evaluation samples, by domain number; set before ``callbacks`` is
            called.
    """

    config: Config
    inputs: Inputs
    folder: RunFolder
    resume: Path | None
    model: PreTrainedModel | None = None
    stream: MixedDataset | None = None
    evaluated: Mapping[int, str] = field(default_factory=dict)


class Section(Generic[S]):
    """Base class of a section of a training job; methods that a subclass does not override have no effect.

    There is one object per section and job, so ``callbacks`` may use what ``check_inputs`` has stored in it.

    Attributes:
        name: key of the section in the YAML.
        settings: dataclass of the section's keys; the first line of its docstring describes the section.
        fixed: keys that a resumed run must not change.
        decides: keys of other sections, such as ``train.eval_interval``, that change the result when this section is
            used.
        places: keys that name files; the manifest keeps their values as they were typed, because they may contain
            environment variables; None = all keys.
        prunes: whether the section makes the model smaller.
        chooses_weights: whether the section decides which of the model's weights train.
        mixes: whether the section decides the weights of the domains.
        rate: factor of the learning rate that the model's size gives, for what the section trains.
        no_auto_microbatch: condition under which ``train.microbatch_size=auto`` can't be used, such as "while gates
            train"; None = it can always be used.
    """

    name: ClassVar[str]
    settings: ClassVar[type[Any]]
    fixed: ClassVar[tuple[str, ...]] = ()
    decides: ClassVar[tuple[str, ...]] = ()
    places: ClassVar[tuple[str, ...] | None] = None
    prunes: ClassVar[bool] = False
    chooses_weights: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    rate: ClassVar[float] = 1.0
    no_auto_microbatch: ClassVar[str | None] = None

    def __init__(self, own: S, config: Config) -> None:
        """Store the settings of the section, and the config of the job."""
        self.own, self.config = own, config

    @classmethod
    def durations(cls, own: S) -> dict[str, tuple[str, int]]:
        """Settings that must be durations such as ``100ba``: by key, the text and the smallest value allowed."""
        return {}

    def models(self) -> list[str]:
        """Folders and hub names of the models that the section reads."""
        return []

    def files(self) -> list[str]:
        """Paths of the files that the section reads."""
        return []

    def check_own(self) -> None:
        """Check that the settings fit each other and the job's other settings; the model and the data are not used.

        Raises:
            UserError: they do not fit.
        """

    def check_inputs(self, inputs: Inputs) -> None:
        """Check that the settings fit the model, the data and the other sections; nothing is loaded or written.

        Raises:
            UserError: they do not fit.
        """

    def check_steps(self, job: str, *, again: bool) -> None:
        """Check that the section fits a job of several steps, each of which cuts the model by scores.

        Args:
            job: name of the job's kind, such as ``iterate``.
            again: whether the recovered model of one step is cut again by the next step.

        Raises:
            UserError: the section does not fit such a job.
        """
        if self.prunes:
            raise UserError(f"{job} prunes by scores: leave out {self.name}")

    @property
    def needs_evaluation(self) -> str | None:
        """Setting of the section that needs evaluation samples, for an error message; None = none needs them."""
        return None

    @property
    def may_not_train(self) -> bool:
        """Whether a job with this section may train for no batches at all (``train.duration=0ba``)."""
        return False

    @property
    def trains(self) -> bool:
        """Whether a job with this section trains any weights."""
        return True

    def recorded(self) -> dict[str, Any] | None:
        """Settings that the manifest of the run's checkpoints keeps, for ``convert``; None = none.

        None is also the default for a section without ``fixed`` keys.
        """
        if not self.fixed:
            return None
        values = asdict(self.own)  # type: ignore[call-overload]
        typed = values if self.places is None else self.places
        return {k: as_typed(v, f"{self.name}.{k}") if k in typed else v for k, v in values.items()}

    def quantization(self, inputs: Inputs) -> Any:
        """Quantisation config for Transformers when the model is loaded; None = the model is not quantised."""
        return None

    def begin(self, build: Build) -> None:
        """Do the preparations that are possible before the model is loaded."""

    def model_loaded(self, build: Build) -> None:
        """Do the preparations that need the model."""

    def dataset(self, build: Build) -> "Dataset[Any] | None":
        """Dataset that the run trains on instead of the prepared data; None = the prepared data."""
        return None

    def callbacks(self, build: Build) -> Iterable[Callback]:
        """The Composer callbacks that the section adds."""
        return ()

    def ended(self, trainer: Trainer, folder: RunFolder) -> bool:
        """Do the work after the end of training, on all ranks, unless it is done already.

        Returns:
            Whether files were written into the folder of the checkpoints.
        """
        return False

    @classmethod
    def needs(cls, own: S, model: PreTrainedModel, before: Needs) -> Needs:
        """Weights that learn and memory that they need, for ``llmprune estimate`` and for the memory check of a run.

        Args:
            own: settings of the section.
            model: model that trains, on the meta device (without memory).
            before: needs of the job without this section.
        """
        return before

    @classmethod
    def weights(cls, own: S, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The model's weights in a checkpoint, by Hugging Face name; each is computed when it is read.

        Args:
            own: settings from the run's manifest.
            stored: tensors of the checkpoint under the prefix of the model.
        """
        return stored

    @classmethod
    def source_name(cls, own: S, name: str) -> str | None:
        """Name that a parameter of the run's model has in the model that the run began with; None = it is new."""
        return name

    @classmethod
    def install(cls, own: S, checkpoint: "Checkpoint", model: PreTrainedModel, *, newest: bool) -> None:
        """Change a complete model so that it computes what the checkpoint's model does, uncut, for ``llmprune verify``.

        Args:
            own: settings from the run's manifest.
            checkpoint: checkpoint that is compared.
            model: model with the checkpoint's ``weights``.
            newest: whether the user named the run, rather than one of its checkpoints.
        """

    @classmethod
    def convert(cls, own: S, checkpoint: "Checkpoint", result: "Result") -> "Result":
        """Apply the section's effect to the result when a checkpoint is converted.

        Args:
            own: settings from the run's manifest.
            checkpoint: checkpoint that is converted.
            result: conversion result without this section.
        """
        return result
