"""A section of a training job's YAML: everything that it adds to a job, said in one class."""

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
    """What a job trains and what it trains on, opened and found to fit.

    Attributes:
        source: the folder of the model that training begins with; None = random weights.
        model_config: of the model.
        tokenizer: of the model and the data.
        data: the prepared data.
        sections: of the job.
    """

    source: ModelFolder | None
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    sections: "list[Section[Any]]" = field(default_factory=list)


@dataclass
class Build:
    """A run that is being built, as far as it is known by then.

    Attributes:
        config: of the job.
        inputs: of the job.
        folder: of the run.
        resume: the checkpoint that it goes on from; None = it begins.
        model: in memory, from ``model_loaded`` on; sharded, it is still empty.
        stream: the training stream, from ``callbacks`` on.
        evaluated: names of the domains that have evaluation samples, by their numbers, from ``callbacks`` on.
    """

    config: Config
    inputs: Inputs
    folder: RunFolder
    resume: Path | None
    model: PreTrainedModel | None = None
    stream: MixedDataset | None = None
    evaluated: Mapping[int, str] = field(default_factory=dict)


class Section(Generic[S]):
    """A section of a job that trains; what a subclass leaves out has no effect.

    One object lives as long as its job: what ``check_inputs`` finds out, ``callbacks`` may use.

    Attributes:
        name: the section's key in the YAML.
        settings: the dataclass of its keys; the first line of its docstring describes the section.
        fixed: keys that a resumed run must not change.
        decides: keys of other sections, such as ``train.eval_interval``, that change the result when this section is
            used.
        places: keys whose texts the manifest keeps as they were typed, since they may come from the environment: those
            that name files; None = all.
        prunes: whether the job makes the model smaller.
        chooses_weights: whether it says which of the model's weights train.
        mixes: whether it decides the weights of the domains.
        no_auto_microbatch: when ``train.microbatch_size=auto`` can't be used with it, in words.
    """

    name: ClassVar[str]
    settings: ClassVar[type[Any]]
    fixed: ClassVar[tuple[str, ...]] = ()
    decides: ClassVar[tuple[str, ...]] = ()
    places: ClassVar[tuple[str, ...] | None] = None
    prunes: ClassVar[bool] = False
    chooses_weights: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    no_auto_microbatch: ClassVar[str | None] = None

    def __init__(self, own: S, config: Config) -> None:
        """Keep the settings of a job's section, and the job's config."""
        self.own, self.config = own, config

    @classmethod
    def durations(cls, own: S) -> dict[str, tuple[str, int]]:
        """Texts that must be durations such as ``100ba``, by key, each with the least that it may be."""
        return {}

    def models(self) -> list[str]:
        """Folders and hub names of models that the section reads."""
        return []

    def files(self) -> list[str]:
        """Files that it reads."""
        return []

    def check_own(self) -> None:
        """See that the settings fit each other and those of the job, whatever the model and the data.

        Raises:
            UserError: they don't.
        """

    def check_inputs(self, inputs: Inputs) -> None:
        """See that the settings fit the model, the data and the other sections; nothing is loaded or written.

        Raises:
            UserError: they don't.
        """

    def check_steps(self, job: str, *, again: bool) -> None:
        """See that the section fits a job of several steps, each of which cuts the model by scores.

        Args:
            job: what the job is, in a word.
            again: whether what one step has recovered is cut again by the next.

        Raises:
            UserError: it does not.
        """
        if self.prunes:
            raise UserError(f"{job} prunes by scores: leave out {self.name}")

    @property
    def needs_evaluation(self) -> str | None:
        """What of the section needs evaluation samples; None = nothing."""
        return None

    @property
    def may_not_train(self) -> bool:
        """Whether a job with this section may have no batches at all (``train.duration=0ba``)."""
        return False

    @property
    def trains(self) -> bool:
        """Whether the job trains anything with this section."""
        return True

    def recorded(self) -> dict[str, Any] | None:
        """What the manifest of the run's checkpoints keeps of the settings; ``convert`` reads it. None = nothing.

        Nothing is kept of a section without ``fixed`` keys.
        """
        if not self.fixed:
            return None
        values = asdict(self.own)  # type: ignore[call-overload]
        typed = values if self.places is None else self.places
        return {k: as_typed(v, f"{self.name}.{k}") if k in typed else v for k, v in values.items()}

    def quantization(self, inputs: Inputs) -> Any:
        """How the model is quantised when it is loaded, for Transformers; None = not."""
        return None

    def begin(self, build: Build) -> None:
        """Prepare what can be prepared before the model is loaded."""

    def model_loaded(self, build: Build) -> None:
        """Prepare what needs the model."""

    def dataset(self, build: Build) -> "Dataset[Any] | None":
        """What is trained on in the place of the data; None = the data."""
        return None

    def callbacks(self, build: Build) -> Iterable[Callback]:
        """The Composer callbacks that the section adds."""
        return ()

    def ended(self, trainer: Trainer, folder: RunFolder) -> bool:
        """Do what is to be done once training has come to its end, on all ranks, unless it is done already.

        Returns:
            Whether files were written beside the checkpoints.
        """
        return False

    @classmethod
    def needs(cls, own: S, model: PreTrainedModel, before: Needs) -> Needs:
        """What learns and what it takes: for ``llmprune estimate``, and for the check of memory before a run begins.

        Args:
            own: the section's settings.
            model: that trains, without memory.
            before: the needs without this section.
        """
        return before

    @classmethod
    def weights(cls, own: S, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The model's weights in a checkpoint, by Hugging Face name, each made when it is asked for.

        Args:
            own: the settings, as the run's manifest has them.
            stored: what the checkpoint holds under the prefix of the model.
        """
        return stored

    @classmethod
    def source_name(cls, own: S, name: str) -> str | None:
        """What a parameter of the run's model is called in the model that the run began with; None = it is new."""
        return name

    @classmethod
    def install(cls, own: S, checkpoint: "Checkpoint", model: PreTrainedModel, *, newest: bool) -> None:
        """Let a whole model compute what a checkpoint's does, without cutting it: for ``llmprune verify``.

        Args:
            own: the settings, as the run's manifest has them.
            checkpoint: that is compared.
            model: with the checkpoint's ``weights``.
            newest: whether the run was named, not one of its checkpoints.
        """

    @classmethod
    def convert(cls, own: S, checkpoint: "Checkpoint", result: "Result") -> "Result":
        """What becomes of the section when a checkpoint is converted.

        Args:
            own: the settings, as the run's manifest has them.
            checkpoint: that is converted.
            result: what the model is without this section.
        """
        return result
