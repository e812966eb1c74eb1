"""Learned L0 gates as a Composer callback (Sheared-LLaMA, arXiv:2310.06694, section 2.1)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from composer.algorithms import GradientClipping
from composer.core import Callback, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from llmprune.data.order import keyed_generator
from llmprune.models.causal_lm import ComposerCausalLM
from llmprune.models.parameters import init_optimizer_state
from llmprune.pruning.gates.alarms import GateAlarms
from llmprune.pruning.gates.attach import GateSlot, attach
from llmprune.pruning.gates.factors import Factors
from llmprune.pruning.gates.gate_set import GateSet, load_gates
from llmprune.pruning.gates.settings import L0PruningConfig, make_goal
from llmprune.utils.errors import UserError
from llmprune.utils.files import save_tensors
from llmprune.utils.settings import check_settings

WARMUP_UNITS = (TimeUnit.BATCH, TimeUnit.SAMPLE, TimeUnit.TOKEN, TimeUnit.DURATION)


class L0Pruning(Callback):
    """Trains gates that bring the model to a target shape or size, while the model itself trains too.

    Gates multiply weights; they are float32, equal on every rank, and not part of the model's state dict. One sample of
    all gates is drawn per microbatch, with a random key of (seed, batch, microbatch, rank). The factors computed from a
    sample are detached leaves of the model's graph. After each backward pass, their gradients are propagated to the
    gates. After the batch, the gates' gradients are averaged over ranks, the gradient of the Lagrangian, which depends
    on the gates alone, is added, and gates and multipliers take an optimiser step. The model's learning-rate schedule
    scales all learning rates. Gradient clipping does not apply to gates.
    """

    def __init__(self, config: L0PruningConfig, *, seed: int, folder: Path | None = None) -> None:
        """Store the settings; the gates are made and attached at Composer's INIT.

        Args:
            config: settings of the section.
            seed: seed of the gates' initial values and noise.
            folder: folder where gate values are saved at every evaluation; None = they are not saved.

        Raises:
            UserError: a setting is out of range.
        """
        check_settings(config, "l0_pruning")
        try:
            self._warmup = Time.from_timestring(config.lagrangian_warmup)
            if self._warmup.value < 0 or self._warmup.unit not in WARMUP_UNITS:
                raise ValueError
        except (ValueError, TypeError):
            raise UserError(
                f"l0_pruning.lagrangian_warmup '{config.lagrangian_warmup}' is no duration in ba, sp, tok or dur: "
                "write 640ba or 0.2dur"
            ) from None
        self.evaluate_at = config.evaluate_at
        self.config, self.seed, self._folder = config, seed, folder
        self._microbatch = 0
        self._alarms = GateAlarms()
        self._factors = Factors()
        self._leaves = Factors()
        self.gates: GateSet
        self._slot: GateSlot
        self._optimizers: tuple[torch.optim.Optimizer, ...]

    def init(self, state: State, logger: Logger) -> None:
        """Make the gates and attach them, before the model is sharded."""
        model = cast(ComposerCausalLM, state.model)
        source = model.family.shape(model.model.config)
        gates = GateSet(source, make_goal(model.model.config, self.config), self.seed)
        gates.clamp()  # must precede every draw
        self.gates = state.device.module_to_device(gates)
        self._slot = attach(model.model, model.family, set(gates.factors(gates.at_target()).trainable()))
        model.ungated = self._slot.open
        multipliers = [*gates.linear.values(), *gates.quadratic.values()]
        # Adam without weight decay; beta and epsilon are the paper's.
        common: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8}
        self._optimizers = (
            torch.optim.Adam(gates.log_alpha.values(), lr=self.config.gate_lr, **common),
            torch.optim.Adam(multipliers, lr=self.config.multiplier_lr, maximize=True, **common),
        )
        for optimizer in self._optimizers:
            init_optimizer_state(optimizer)
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        facts = {"l0/source": str(source), "l0/target": str(gates.goal)}
        if any(isinstance(algorithm, GradientClipping) for algorithm in state.algorithms):
            facts["l0/clipping"] = "of the model's gradients only; gates are not clipped"
        logger.log_hyperparameters(facts)

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Reset the microbatch count and the gates' gradients for a new batch."""
        self._microbatch = 0
        self.gates.zero_grad(set_to_none=True)

    def noise_key(self, batch: int, microbatch: int, rank: int) -> tuple[int, ...]:
        """Key of the random noise of one microbatch."""
        return self.seed, batch, microbatch, rank

    def before_forward(self, state: State, logger: Logger) -> None:
        """Draw the gates of one microbatch and give the model detached leaves of their factors."""
        key = self.noise_key(state.timestamp.batch.value, self._microbatch, dist.get_global_rank())
        generator = torch.Generator().manual_seed(int(keyed_generator(*key).integers(2**63)))
        self._factors = self.gates.factors(self.gates.sample(generator))
        self._leaves = self._slot.factors = self._factors.detached()
        self._microbatch += 1

    def after_backward(self, state: State, logger: Logger) -> None:
        """Propagate the leaves' gradients to the gates."""
        leaves = self._leaves.trainable()
        pairs = [(value, leaves[name].grad) for name, value in self._factors.trainable().items()]
        reached = [(value, grad) for value, grad in pairs if grad is not None]
        torch.autograd.backward([value for value, _ in reached], [grad for _, grad in reached])

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Average the gates' gradients over ranks, add the constraint's gradient, and update gates and multipliers."""
        if all(parameter.grad is None for parameter in state.model.parameters()):
            return  # the batch is skipped
        average_gradients(list(self.gates.log_alpha.values()))
        targets = self.gates.targets(self.config.start_sparsity, self._warmup_progress(state))
        constraint = self.gates.constraint(targets)
        constraint.backward()
        scale = learning_rate_scale(state)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale
            optimizer.step()
        self.gates.clamp()
        self._log(targets, constraint.detach(), state, logger)

    def eval_before_all(self, state: State, logger: Logger) -> None:
        """Set deterministic gates for an evaluation."""
        self._use_deterministic_gates()

    def eval_start(self, state: State, logger: Logger) -> None:
        """Set deterministic gates also for an evaluation outside training."""
        self._use_deterministic_gates()

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Save the gates' values."""
        self._save(state)

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        """Save the gates' values also after an evaluation outside training."""
        self._save(state)

    def _save(self, state: State) -> None:
        if self._folder is not None and dist.get_global_rank() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"ba{state.timestamp.batch.value:06d}.safetensors"
            save_tensors(path, {name: value.cpu() for name, value in self._evaluated().items()})

    def state_dict(self) -> dict[str, Any]:
        """Gates, multipliers and their optimisers: tensors and plain types only."""
        return {
            "gates": self.gates.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved state.

        Raises:
            UserError: the state was saved by a run with another target shape or from another model.
        """
        load_gates(self.gates, state["gates"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def _evaluated(self) -> dict[str, Tensor]:
        return self.gates.at_target() if self.evaluate_at == "target" else self.gates.as_expected()

    @torch.no_grad()
    def _use_deterministic_gates(self) -> None:
        self._slot.factors = self.gates.factors(self._evaluated())

    def _warmup_progress(self, state: State) -> float:
        if self._warmup.value == 0:
            return 1.0
        if self._warmup.unit == TimeUnit.DURATION:
            elapsed = state.get_elapsed_duration()
            return (elapsed.value if elapsed is not None else 0.0) / self._warmup.value
        return state.timestamp.get(self._warmup.unit).value / self._warmup.value

    @torch.no_grad()
    def _log(self, targets: Mapping[str, float], constraint: Tensor, state: State, logger: Logger) -> None:
        """Log expected and target sparsities, with a single transfer from the device."""
        keep = self.gates.keep_probability()
        by_kind = {kind: 1 - value.mean() for kind, value in keep.items()}
        sparsities = {**by_kind, **{name: rows.mean() for name, rows in self.gates.sparsity().items()}}
        fewest = [value.sum(-1).min() for value in keep.values()]
        numbers = torch.stack([constraint, *sparsities.values(), *fewest]).tolist()
        expected = dict(zip(sparsities, numbers[1:], strict=False))
        if not all(map(math.isfinite, numbers)):
            raise UserError(
                f"the gates are not finite after batch {state.timestamp.batch.value}: the last checkpoint is kept; "
                "resume from it with run.autoresume=true and a lower l0_pruning.gate_lr"
            )
        logger.log_metrics(
            {
                "l0/constraint": numbers[0],
                **{f"l0/{name}/expected_sparsity": value for name, value in expected.items()},
                **{f"l0/{name}/target_sparsity": target for name, target in targets.items()},
            }
        )
        if dist.get_global_rank() == 0:
            left = dict(zip(keep, numbers[1 + len(sparsities) :], strict=True))
            self._alarms.look(state.timestamp.batch.value, self._warmup_progress(state), expected, targets, left)


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Average the gradients of replicated parameters over all ranks, in one all-reduce."""
    if dist.get_world_size() == 1:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat, reduce_operation="SUM")
    flat /= dist.get_world_size()
    for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = grad.view_as(parameter).clone()


def learning_rate_scale(state: State) -> float:
    """The schedule's factor of learning rates for this batch; gates and multipliers use the model's schedule.

    Composer steps schedulers before it counts the batch, so the model's learning rate is that of the batch before.
    """
    if not state.schedulers:
        return 1.0
    group = state.optimizers[0].param_groups[0]
    if group.get("initial_lr"):
        return float(group["lr"]) / float(group["initial_lr"])
    scheduler = cast(torch.optim.lr_scheduler.LambdaLR, state.schedulers[0])  # Composer wraps any schedule in it
    return float(scheduler.lr_lambdas[0](scheduler.last_epoch))
