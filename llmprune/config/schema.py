"""The YAML of a job as a typed schema.

Every key is a field of a dataclass below; a section that configures a component is declared beside it.
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
from llmprune.utils.formats import Attention, Device, TrainableFormat
from llmprune.utils.settings import limited

S = TypeVar("S")


@dataclass
class FolderConfig:
    """The folder of what a job writes.

    Attributes:
        name: of the run, in loggers and in the default folder.
        folder: everything the run writes goes here.
        overwrite: delete what llmprune left in the folder.
        offline: use no network, and name what is missing before any work (``llmprune download`` gets it).
    """

    name: str = MISSING
    folder: str = "runs/${run.name}"
    overwrite: bool = False
    offline: bool = False


@dataclass
class RunConfig(FolderConfig):
    """The run folder.

    Attributes:
        name: of the run, in loggers and in the default folder.
        folder: everything the run writes goes here.
        overwrite: delete what llmprune left in the folder.
        offline: use no network, and name what is missing before any work (``llmprune download`` gets it).
        seed: of weights, order of the data and gates.
        autoresume: go on from the folder's newest checkpoint, if there is one.
    """

    seed: int = limited(17, least=0, most=2**32 - 1)
    autoresume: bool = False


@dataclass
class ModelConfig:
    """The model to start from: either ``path``, or ``config`` for random weights.

    Attributes:
        path: a Hugging Face folder or hub name.
        config: fields of a Hugging Face config, ``model_type`` among them; the vocabulary size and the special tokens
            come from the tokenizer unless given.
        tokenizer: folder or hub name; default: that of ``path``, or of the data.
        richer_heads: with ``config``: a non-linear layer for the output of every attention head; null = none.
        attention: ``sdpa``, ``eager`` or ``flash_attention_2`` (GPU).
        dtype: of the weights in training: float32 or bfloat16.
        verify: compare the files of ``path`` (and of a teacher) with the checksums that llmprune wrote beside them.
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
        path: a folder prepared by ``python -m data_prep tokenize``, or a URL where it lies (``s3://…``).
        cache: of remote or compressed data.
        document_boundaries: attention and positions restart at each document, and its first token is not learned; null
            = for conversations.
        weights: share of each domain in training; null = in proportion to its samples.
        workers: loader processes per rank.
        prefetch: batches that each of them loads ahead.
        partitions: disjoint parts of every domain. With a multiple of the number of machines each reads its own shards;
            a run keeps its partitions.
        shuffle_window: shards of a partition whose samples are shuffled together.
        eval_samples_per_domain: null = all.
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
    """The course of training.

    Attributes:
        duration: ``3200ba`` (batches) or ``400000000tok``.
        global_batch_size: samples per step over all ranks.
        microbatch_size: samples per forward pass on one device; ``auto`` finds the largest that fits (GPU, neither
            sharded nor with gates).
        activation_checkpointing: keep only each block's input and compute its activations anew in the backward pass.
        precision: fp32, or amp_bf16 (weights in float32, matrix products in bfloat16; fast on GPUs, and on CPUs with
            AVX512-BF16 or AMX).
        clip_norm: limit of the gradients' norm (the model's only, not the gates'); null = none.
        loss_spike_factor: a batch whose loss is so many times the mean of the last 100 is a spike; null = never.
        loss_spike: ``log`` it, or ``skip`` the batch as well.
        eval_interval: ``50ba``; ``0ba`` = never.
        eval_first: evaluate before the first batch.
        device: cpu or gpu; null = what is there.
        hang_timeout: seconds in which a rank does nothing (no event, no forward pass) after which the job ends, and the
            rank that the others wait for is named; null = never.
        check_memory: refuse a job that by ``llmprune estimate`` does not fit.
    """

    duration: str = MISSING
    global_batch_size: int = limited(MISSING, least=1)
    microbatch_size: int | Literal["auto"] = limited(1, least=1)
    activation_checkpointing: bool = False
    precision: Literal["fp32", "amp_bf16"] = "fp32"
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
    """Checkpoints go to ``run.folder``/checkpoints.

    Attributes:
        interval: ``3200ba``, ``0.1dur``; the last batch is always saved.
        keep: how many of the newest are kept; -1 = all.
        remote: a URL (``s3://BUCKET/FOLDER``, …) or folder that every checkpoint is copied to beside the training, and
            that ``run.autoresume`` goes on from on machines which have none; null = none. Nothing is deleted there.
    """

    interval: str = "0.1dur"
    keep: int = 2
    remote: str | None = None


@dataclass
class WandbConfig:
    """Weights & Biases."""

    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    offline: bool = False


@dataclass
class LoggersConfig:
    """Where metrics go besides metrics.jsonl.

    Attributes:
        console: print them every ``console_interval``; otherwise a progress bar is shown.
        tensorboard: write event files to ``run.folder``/tensorboard.
        wandb: settings of Weights & Biases; null = off.
        others: registered loggers by name, each with its arguments: ``{mlflow: {experiment_name: prune}}``.
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
        job: what the job is: train, prune (which has ``l0_pruning``) or replace (which has ``block_replacement``).
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

    def section(self, settings: type[S]) -> S | None:
        """The section whose settings are of this class; ``None`` = the job does not have it."""
        return next((found for key in fields(self) if isinstance(found := getattr(self, key.name), settings)), None)


@dataclass
class ScoredModelConfig:
    """The model to score.

    Attributes:
        path: a Hugging Face folder or hub name.
        tokenizer: folder or hub name; default: that of ``path``.
        attention: ``sdpa``, ``eager`` or ``flash_attention_2`` (GPU).
        dtype: of the weights in memory: float32 or bfloat16.
        device: cpu or gpu; null = what is there.
    """

    path: str = MISSING
    tokenizer: str | None = None
    attention: Attention = "sdpa"
    dtype: TrainableFormat = "float32"
    device: Device | None = None


@dataclass
class ScoringConfig:
    """A job that scores the blocks of a model, and writes plans if there is a ``plan``.

    Attributes:
        job: score.
        plan: the plans that follow; one for each number in ``plan.remove``.
    """

    job: str = "score"
    run: FolderConfig = field(default_factory=FolderConfig)
    model: ScoredModelConfig = field(default_factory=ScoredModelConfig)
    layer_scoring: LayerScoringConfig = field(default_factory=LayerScoringConfig)
    plan: PlansConfig | None = None


@dataclass
class RoundsConfig:
    """Rounds of scoring, cutting and recovery that end in one shape.

    Attributes:
        rounds: how many; every size shrinks by the same share in each.
    """

    rounds: int = limited(2, least=1)


@dataclass
class IterationConfig(Config):
    """A job that prunes in rounds and recovers after each as a training run would.

    Attributes:
        job: iterate.
        layer_scoring: of every round; without ``data.path`` the samples are of the training data, without ``criteria``
            the plan's are scored.
        plan: how every round selects what goes; ``shape`` is what comes out of the last one.
    """

    job: str = "iterate"
    layer_scoring: LayerScoringConfig = field(default_factory=LayerScoringConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    iterate: RoundsConfig = field(default_factory=RoundsConfig)


@dataclass
class SearchConfig(Config):
    """A job that looks for the best way to prune under a budget, and recovers candidates as a training run would.

    Attributes:
        job: search.
        layer_scoring: without ``data.path`` the samples are of the training data, without ``criteria`` the candidates'
            are scored.
        plan: what all candidates share, such as ``correction``.
    """

    job: str = "search"
    layer_scoring: LayerScoringConfig = field(default_factory=LayerScoringConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    search: CandidatesConfig = field(default_factory=CandidatesConfig)
