"""Checks of a config that need no machine, model or data: names and durations."""

from collections.abc import Sequence
from typing import Any

from composer.core import Time, TimeUnit

from llmprune.config.optimizers import OPTIMIZERS, SCHEDULERS
from llmprune.config.schema import Config
from llmprune.config.section_registry import sections_of
from llmprune.utils.errors import UserError, nearest
from llmprune.utils.settings import check_settings

LONGEST = 2**53  # limit of a duration in any unit: floats count exactly up to here
_STREAM_UNITS = {TimeUnit.BATCH, TimeUnit.SAMPLE, TimeUnit.TOKEN}


def check_config(config: Config) -> None:
    """Check every value by itself, names and durations, independent of the machine.

    Raises:
        UserError: a value is out of range, unknown, or no duration.
    """
    check_settings(config)
    for key, value, valid in (
        ("optimizer.name", config.optimizer.name, OPTIMIZERS),
        ("scheduler.name", config.scheduler.name, SCHEDULERS),
    ):
        if value not in valid:
            raise UserError(f"{key} '{value}' is unknown; {nearest(value, valid)}")
    _check_attention(config)
    sections = sections_of(config)
    _check_times(config, sections)
    for section in sections:
        section.check_own()


def _check_attention(config: Config) -> None:
    """Refuse flash attention in float32; the format of gathered shards is ``train.precision``."""
    if config.model.attention != "flash_attention_2" or config.train.precision != "fp32":
        return
    if config.model.dtype == "float32" or config.sharding is not None:
        other = "" if config.sharding is not None else ", or model.dtype=bfloat16"
        raise UserError(
            f"model.attention=flash_attention_2 computes in half precision only: take train.precision=amp_bf16{other}"
        )


def _check_times(config: Config, sections: Sequence[Any]) -> None:
    times = {}
    for key, text, least in (
        ("train.duration", config.train.duration, 0 if any(section.may_not_train for section in sections) else 1),
        ("train.eval_interval", config.train.eval_interval, 0),
        ("checkpoint.interval", config.checkpoint.interval, 1),
        ("scheduler.warmup", config.scheduler.warmup, 0),
        ("loggers.console_interval", config.loggers.console_interval, 1),
        *(
            (f"{section.name}.{name}", text, least)
            for section in sections
            for name, (text, least) in section.durations(section.own).items()
        ),
    ):
        try:
            times[key] = time = Time.from_timestring(text)
        except (ValueError, TypeError, OverflowError):
            raise UserError(f"{key} '{text:.80}' is no duration: write 100ba, 1000000tok or 0.1dur") from None
        if not time.value < LONGEST:
            raise UserError(f"{key} '{text:.80}' is longer than any run")
        if time.value < least and not (time.unit == TimeUnit.DURATION and time.value > 0):
            raise UserError(f"{key} '{text}' must be {'positive' if least else 'zero or positive'}")
        if key != "train.duration" and time.unit not in _STREAM_UNITS | {TimeUnit.DURATION}:
            raise UserError(f"{key} '{text}' must be in ba, sp, tok or dur: the stream has no end")
    duration, warmup = times["train.duration"], times["scheduler.warmup"]
    if duration.unit not in _STREAM_UNITS:
        raise UserError(f"train.duration '{config.train.duration}' must be in ba, sp or tok: the stream has no end")
    if warmup.value and warmup.unit not in (TimeUnit.DURATION, duration.unit):
        raise UserError(
            f"scheduler.warmup '{config.scheduler.warmup}' must have the unit of train.duration "
            f"('{config.train.duration}') or be a share such as 0.03dur"
        )
