"""The YAML of a job as a typed schema.

Every key is a field of a dataclass below. The settings of a component are declared in that component's own package.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

from omegaconf import MISSING

from llmprune.config.optimizers import OptimizerConfig, SchedulerConfig
from llmprune.config.sharding import ShardingConfig
from llmprune.data.cache import CacheConfig
from llmprune.data.weight_changes import WORKERS
from llmprune.models.families import RicherHeadsConfig
from llmprune.pruning.budgets.candidates import CandidatesConfig
from llmprune.pruning.scoring.settings import LayerScoringConfig
from llmprune.pruning.selection.settings import PlanConfig, PlansConfig
from llmprune.utils.formats import Attention, Device, Precision, TeacherFormat, TrainableFormat
from llmprune.utils.settings import limited

S = TypeVar("S")


@dataclass
class FolderConfig:
    """The name and the folder of what a job writes.

    Attributes:
        name: name of the run, used by the loggers and in the default folder.
        folder: folder that the run writes all its files to.
        overwrite: delete the files that llmprune wrote to the folder before.
        offline: use no network; files that are missing are named before any work (``llmprune download`` gets them).
    """

    name: str = MISSING
    folder: str = "runs/${run.name}"
    overwrite: bool = False
    offline: bool = False


@dataclass
class RunConfig(FolderConfig):
    """The name, the folder and the seed of a run.

    Attributes:
        name: name of the run, used by the loggers and in the default folder.
        folder: folder that the run writes all its files to.
        overwrite: delete the files that llmprune wrote to the folder before.
        offline: use no network; files that are missing are named before any work (``llmprune download`` gets them).
        seed: seed of random weights, of the order of the data and of the gates.
        autoresume: resume from the newest checkpoint in the folder, if there is one.
    """

    seed: int = limited(17, least=0, most=2**32 - 1)
    autoresume: bool = False


@dataclass
class ModelConfig:
    """The model to start from: either ``path``, or ``config`` for random weights.

    Attributes:
        path: Hugging Face folder or hub name of the model.
        config: fields of a Hugging Face config, ``model_type`` among them, for a model with random weights; the
            vocabulary size and the special tokens come from the tokenizer unless they are given.
        tokenizer: folder or hub name of the tokenizer; null = that of ``path``, or of the data.
        richer_heads: non-linear layer for the output of every attention head, only with ``config``; null = none.
        attention: implementation of attention: ``sdpa``, ``eager`` or ``flash_attention_2`` (GPU only).
        dtype: number format of the weights in training: float32 or bfloat16.
        verify: compare the files of ``path`` (and of a teacher) with the checksums that llmprune wrote into their
            folder.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    richer_heads: RicherHeadsConfig | None = None
    tokenizer: str | None = None
    attention: Attention = "sdpa"
    dtype: TrainableFormat = "float32"
    verify: bool = False


@dataclass
class DataConfig:
    """The data to train and evaluate on.

    Attributes:
        path: folder prepared by ``python -m data_prep tokenize``, or the URL of such a folder (``s3://…``).
        cache: cache of remote or compressed data.
        document_boundaries: restart attention and positions at each document, and do not learn its first token; null =
            true for conversations, else false.
        weights: share of each domain in training, by name; null = in proportion to the number of its samples.
        workers: number of loader processes per rank.
        prefetch: number of batches that each loader process loads ahead.
        partitions: number of disjoint parts that every domain is split into. If it is a multiple of the number of
            machines, each machine reads only its own shards; a run can't change it later.
        shuffle_window: number of shards of a partition whose samples are shuffled together.
        eval_samples_per_domain: number of evaluation samples of each domain that are used; null = all.
    """

    path: str = MISSING
    cache: CacheConfig = field(default_factory=CacheConfig)
    document_boundaries: bool | None = None
    weights: dict[str, float] | None = None
    workers: int = limited(0, least=0, most=WORKERS)
    prefetch: int = limited(2, least=1, most=1024)  # far more than any loader needs
    partitions: int = limited(1, least=1)
    shuffle_window: int = limited(8, least=1)
    eval_samples_per_domain: int | None = limited(None, least=1)


@dataclass
class TrainConfig:
    """Duration, batch sizes, precision and safeguards of training.

    Attributes:
        duration: length of training: ``3200ba`` (batches) or ``400000000tok`` (tokens).
        global_batch_size: number of samples per step, over all ranks; null = as many as ``global_batch_tokens`` hold.
        global_batch_tokens: number of tokens per step, over all ranks, unless ``global_batch_size`` is given.
        microbatch_size: number of samples per forward pass on one device; ``auto`` = the largest that fits (GPU only,
            neither sharded nor with gates).
        activation_checkpointing: keep only each block's input and compute its activations again in the backward pass.
        precision: number format of computation: fp32, or amp_bf16 (weights in float32, matrix products in bfloat16);
            auto = amp_bf16 where it is fast (GPUs, processors with AVX512-BF16 or AMX), else fp32.
        clip_norm: largest norm of the gradients of the model's parameters (not of the gates'); null = no clipping.
        loss_spike_factor: a batch is a loss spike if its loss is more than this many times the mean of the last 100;
            null = never.
        loss_spike: action after a loss spike: ``log`` it, or ``skip`` the batch as well.
        eval_interval: time between evaluations, such as ``50ba``; ``0ba`` = never.
        eval_first: evaluate before the first batch.
        device: cpu or gpu; null = gpu if there is one.
        hang_timeout: number of seconds without progress (an event or a forward pass) of a rank after which the job
            ends; the message names the rank that the others wait for; null = never.
        check_memory: refuse a job that needs more memory than the machine has, by the estimate of ``llmprune
            estimate``.
    """

    duration: str = MISSING
    global_batch_size: int | None = limited(None, least=1)
    global_batch_tokens: int = limited(32768, least=1)
    microbatch_size: int | Literal["auto"] = limited(1, least=1)
    activation_checkpointing: bool = False
    precision: Precision = "auto"
    clip_norm: float | None = limited(1.0, above=0)
    loss_spike_factor: float | None = limited(2.0, above=1)
    loss_spike: Literal["log", "skip"] = "log"
    eval_interval: str = "1dur"
    eval_first: bool = False
    device: Device | None = None
    hang_timeout: float | None = limited(1800.0, above=0, most=10**7)
    check_memory: bool = True


@dataclass
class CheckpointConfig:
    """When checkpoints are saved in ``run.folder``/checkpoints, and how many are kept.

    Attributes:
        interval: time between checkpoints, such as ``3200ba`` or ``0.1dur``; the last batch is always saved.
        keep: number of newest checkpoints that are kept; -1 = all.
        remote: URL (``s3://BUCKET/FOLDER``, …) or folder that every checkpoint is copied to while training continues;
            ``run.autoresume`` resumes from there on machines that have no checkpoint; null = none. Nothing is deleted
            there.
    """

    interval: str = "0.1dur"
    keep: int = 2
    remote: str | None = None


@dataclass
class WandbConfig:
    """The settings of Weights & Biases; null = what its own environment variables say.

    Attributes:
        project: name of the project.
        entity: user or team that the project belongs to.
        group: group of the run.
        tags: tags of the run.
        offline: keep everything in the run folder, for ``wandb sync``.
    """

    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    offline: bool = False


@dataclass
class LoggersConfig:
    """The loggers of metrics, besides metrics.jsonl.

    Attributes:
        console: print metrics every ``console_interval``; otherwise a progress bar is shown.
        console_interval: interval between two prints, such as ``10ba``.
        tensorboard: write event files to ``run.folder``/tensorboard.
        wandb: settings of Weights & Biases; null = off.
        others: other registered loggers by name, each with its arguments: ``{mlflow: {experiment_name: prune}}``.
    """

    console: bool = True
    console_interval: str = "10ba"
    tensorboard: bool = False
    wandb: WandbConfig | None = None
    others: dict[str, Any] = field(default_factory=dict)


@dataclass
class Config:
    """A job that trains.

    Every section (``l0_pruning`` prunes, ``block_replacement`` replaces blocks, …) adds a field; see
    ``llmprune/config/section_registry.py``.

    Attributes:
        job: kind of job: train, prune (needs ``l0_pruning``) or replace (needs ``block_replacement``).
        callbacks: registered callbacks of other packages by name, each with its arguments; see docs/extending.md.
    """

    job: str = "train"
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sharding: ShardingConfig | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    loggers: LoggersConfig = field(default_factory=LoggersConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)

    @property
    def samples_per_step(self) -> int:
        """The global batch, in samples, after ``llmprune.config.left_open.fill_in``."""
        assert self.train.global_batch_size is not None
        return self.train.global_batch_size

    def section(self, settings: type[S]) -> S | None:
        """The job's section whose settings are of the class ``settings``; ``None`` = the job does not have it."""
        return next((found for key in fields(self) if isinstance(found := getattr(self, key.name), settings)), None)


@dataclass
class ScoredModelConfig:
    """The model to score.

    Attributes:
        path: Hugging Face folder or hub name of the model.
        tokenizer: folder or hub name of the tokenizer; null = that of ``path``.
        attention: implementation of attention: ``sdpa``, ``eager`` or ``flash_attention_2`` (GPU only).
        dtype: number format: float32 or bfloat16; auto = weights in float32, and matrix products in bfloat16 where that
            is fast.
        device: cpu or gpu; null = gpu if there is one.
    """

    path: str = MISSING
    tokenizer: str | None = None
    attention: Attention = "sdpa"
    dtype: TeacherFormat = "auto"
    device: Device | None = None


@dataclass
class ScoringConfig:
    """A job that scores the blocks of a model, and writes plans if there is a ``plan``.

    Attributes:
        job: kind of job: score.
        plan: settings of the plans made from the scores, one plan for each number in ``plan.remove``; null = no plans.
    """

    job: str = "score"
    run: FolderConfig = field(default_factory=FolderConfig)
    model: ScoredModelConfig = field(default_factory=ScoredModelConfig)
    layer_scoring: LayerScoringConfig = field(default_factory=LayerScoringConfig)
    plan: PlansConfig | None = None


@dataclass
class RoundsConfig:
    """The number of rounds of scoring, cutting and recovery that end in one shape.

    Attributes:
        rounds: number of rounds; every size shrinks by the same factor in each round.
    """

    rounds: int = limited(2, least=1)


@dataclass
class IterationConfig(Config):
    """A job that prunes in rounds and recovers after each round as a training run does.

    Attributes:
        job: kind of job: iterate.
        layer_scoring: settings of the scoring in every round; without ``data.path`` the samples are taken from the
            training data, without ``criteria`` those that the plan uses are scored.
        plan: settings of the plan of every round; ``shape`` is the model's shape after the last round.
    """

    job: str = "iterate"
    layer_scoring: LayerScoringConfig = field(default_factory=LayerScoringConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    iterate: RoundsConfig = field(default_factory=RoundsConfig)


@dataclass
class SearchConfig(Config):
    """A job that searches the best way to prune under a budget, and recovers candidates as a training run does.

    Attributes:
        job: kind of job: search.
        layer_scoring: settings of scoring; without ``data.path`` the samples are taken from the training data, without
            ``criteria`` those that the candidates use are scored.
        plan: settings that all candidates share, such as ``correction``.
    """

    job: str = "search"
    layer_scoring: LayerScoringConfig = field(default_factory=LayerScoringConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    search: CandidatesConfig = field(default_factory=CandidatesConfig)
