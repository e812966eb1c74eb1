"""Destinations of a run's metrics."""

from collections.abc import Callable

from composer.loggers import LoggerDestination, MLFlowLogger, TensorboardLogger, WandBLogger

from llmprune.callbacks.console_lines import ConsoleLines
from llmprune.callbacks.metrics_file import MetricsFile
from llmprune.callbacks.progress_bar import ProgressBar
from llmprune.checkpoints.run_folder import RunFolder
from llmprune.config.schema import LoggersConfig
from llmprune.utils.registry import Registry

LOGGERS: Registry[Callable[..., LoggerDestination]] = Registry("loggers", "logger")
LOGGERS.register("mlflow")(MLFlowLogger)


def make_loggers(config: LoggersConfig, run: RunFolder, name: str) -> list[LoggerDestination]:
    """Make the loggers: always metrics.jsonl, and those that the config asks for.

    Raises:
        UserError: a logger or one of its arguments is unknown.
    """
    loggers: list[LoggerDestination] = [MetricsFile(run.metrics)]
    loggers.append(ConsoleLines(config.console_interval) if config.console else ProgressBar())
    if config.tensorboard:
        loggers.append(TensorboardLogger(log_dir=str(run.path / "tensorboard"), flush_interval=100))
    if config.wandb is not None:
        settings = {"mode": "offline"} if config.wandb.offline else {}
        loggers.append(
            WandBLogger(
                project=config.wandb.project,
                entity=config.wandb.entity,
                group=config.wandb.group,
                name=name,
                tags=config.wandb.tags,
                init_kwargs={"dir": str(run.path), **settings},
            )
        )
    return [*loggers, *(LOGGERS.build(name, arguments) for name, arguments in config.others.items())]
