"""Composer's loop in small: the events of a few steps, on the pretended device and with a second rank pretended, too.

An example:

    with pretended() as waits, second_rank():
        loop = Loop(model, [L0Pruning(settings, seed=1)], waits)
        loop.train(batch)
        loop.evaluate(batch)
        assert loop.in_microbatch.of() <= 4, loop.in_microbatch
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import composer.utils.dist as dist
import torch
from composer.core import Callback, Precision, State, Time, Timestamp, TimeUnit
from composer.devices import DeviceCPU
from composer.loggers import Logger
from torch import Tensor

from llmprune.models.causal_lm import Batch, ComposerCausalLM
from tests.harness.pretend_device import DEVICE, MixedDevices, Pretended, Waits


class PretendedDevice(DeviceCPU):
    """As Composer's device of a GPU: tensors are copied without waiting."""

    def module_to_device(self, module: Any) -> Any:
        """Move a module."""
        return module.to(DEVICE)

    def tensor_to_device(self, tensor: Tensor) -> Tensor:
        """Copy a tensor."""
        return tensor.to(DEVICE, non_blocking=True)


@contextmanager
def second_rank() -> Iterator[None]:
    """While open, there is a second rank, and the ranks' collectives take tensors of the device only, as NCCL's do."""

    def all_reduce(tensor: Tensor, reduce_operation: str = "SUM", **_: Any) -> None:
        if not isinstance(tensor, Pretended):
            raise MixedDevices("NCCL can't reduce a tensor on the CPU")
        if reduce_operation == "SUM":
            tensor.mul_(2)  # the other has the same

    with (
        mock.patch.object(dist, "get_world_size", return_value=2),
        mock.patch.object(dist, "all_reduce", all_reduce),
        mock.patch.object(dist, "all_gather_object", lambda value: [value, value]),
        mock.patch.object(dist, "barrier", return_value=None),
    ):
        yield


class _Numbers:
    """A logger: it reads what it is given, as the file of metrics does."""

    def log_metrics(self, metrics: Mapping[str, Any]) -> None:
        assert all(isinstance(value, int | float) for value in metrics.values()), metrics

    def log_hyperparameters(self, facts: Mapping[str, Any]) -> None:
        pass


class Loop:
    """Trains and evaluates a model with callbacks.

    Attributes:
        in_microbatch: the waits of the last microbatch, its events included.
        in_batch: those of the rest of the last batch.
        in_evaluation: those of the last evaluation of one batch.
    """

    def __init__(self, model: ComposerCausalLM, callbacks: Sequence[Callback], waits: Waits) -> None:
        """Put the model on the device and begin."""
        self.in_microbatch = self.in_batch = self.in_evaluation = Waits()
        self._waits, self._callbacks, self.device = waits, callbacks, PretendedDevice()
        self.model = self.device.module_to_device(model)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        parts = {
            "model": model,
            "device": self.device,
            "precision": Precision.FP32,
            "optimizers": [self._optimizer],
            "schedulers": [],
            "algorithms": [],
            "callbacks": callbacks,
            "fsdp_config": None,
            "timestamp": Timestamp(),
            "get_elapsed_duration": lambda: Time(0.1, TimeUnit.DURATION),
            "eval_metric_values": {},
        }
        self.state = cast(State, SimpleNamespace(**parts))
        self._events("init", "before_load", "after_load", "fit_start")

    def _events(self, *names: str) -> None:
        for name in names:
            for callback in self._callbacks:
                getattr(callback, name)(self.state, cast(Logger, _Numbers()))

    def train(self, batch: Batch) -> None:
        """One step with a microbatch."""
        state = self.state
        self._waits.clear()
        self._events("batch_start", "before_train_batch")
        before = self._cut()
        state.batch = self.device.batch_to_device(batch)
        self._events("before_forward")
        state.outputs = self.model(state.batch)
        self._events("after_forward", "before_loss")
        state.loss = self.model.loss(state.outputs, state.batch)
        self._events("after_loss", "before_backward")
        state.loss.backward()
        self._events("after_backward")
        self.in_microbatch = self._cut()
        self._events("after_train_batch")
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._events("batch_end")
        self.in_batch = before + self._cut()
        assert state.loss.isfinite().item()
        state.timestamp = state.timestamp.to_next_batch(len(batch["input_ids"]))

    def evaluate(self, batch: Batch) -> None:
        """An evaluation of one batch."""
        state = self.state
        metrics = self.model.get_metrics()
        for metric in metrics.values():
            self.device.module_to_device(metric)
        self._waits.clear()
        with torch.no_grad():
            self._events("eval_before_all", "eval_start")
            state.batch = self.device.batch_to_device(batch)
            self._events("eval_before_forward")
            outputs = self.model.eval_forward(state.batch)
            self._events("eval_after_forward")
            for metric in metrics.values():
                self.model.update_metric(state.batch, outputs, metric)
        self.in_evaluation = self._cut()
        with torch.no_grad():
            state.eval_metric_values = {name: metric.compute().item() for name, metric in metrics.items()}
            self._events("eval_end", "eval_after_all")

    def _cut(self) -> Waits:
        found = copy.deepcopy(self._waits)
        self._waits.clear()
        return found
