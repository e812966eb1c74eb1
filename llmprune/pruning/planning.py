"""Plans from scores, and a comparison of the criteria's selections."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import NoReturn

import torch
from torch import Tensor
from transformers import PretrainedConfig

from llmprune.data.calibration import calibration_samples, samples_fingerprint, with_length
from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.models.autocast import compute_in
from llmprune.models.enough_memory import check_memory
from llmprune.models.families import Shape, family_of, target_shape
from llmprune.models.loading import load_model, load_model_config, load_tokenizer
from llmprune.models.number_formats import weights_and_products
from llmprune.models.source import longest_input
from llmprune.models.stored_weights import StoredWeights, fingerprint
from llmprune.plans.plan import KeptBlock, Plan
from llmprune.plans.surgery import Surgery
from llmprune.pruning.budgets.choose import Choice, Chooser, Steps
from llmprune.pruning.budgets.limits import Limit, costs_of, limits_of
from llmprune.pruning.budgets.plan_losses import PlanLosses
from llmprune.pruning.budgets.settings import BudgetConfig
from llmprune.pruning.budgets.shape_sizes import ShapeSizes
from llmprune.pruning.budgets.skipping import without_sublayers
from llmprune.pruning.budgets.trial import Trial
from llmprune.pruning.scoring.all_criteria import CRITERIA
from llmprune.pruning.scoring.criterion import ScoreSection
from llmprune.pruning.scoring.scores import Scores
from llmprune.pruning.selection import iterative as repeated
from llmprune.pruning.selection import merging
from llmprune.pruning.selection.correction import (
    check_correction,
    check_samples,
    check_tokens,
    corrected,
    is_correctable,
    most_inputs,
)
from llmprune.pruning.selection.methods import (
    SELECTIONS,
    Request,
    ScoredModel,
    calibration_size,
    select,
    selected_blocks,
)
from llmprune.pruning.selection.settings import PlanConfig
from llmprune.pruning.selection.vocabulary import most_used
from llmprune.pruning.selection.width import narrowed, whole
from llmprune.utils.errors import UserError

__all__ = ["SELECTIONS", "compare", "make_plan", "merging", "repeated"]

log = logging.getLogger(__name__)

COMPARED = 4096  # calibration tokens on which shapes are compared


def make_plan(
    scores: Scores,
    config: PlanConfig,
    *,
    model: str | None = None,
    trial: Trial | None = None,
    told: Callable[[PlanLosses], None] | None = None,
) -> Plan:
    """The plan that is made from scores.

    Args:
        scores: scores of the model.
        config: settings of the plan.
        model: folder or hub name of the model; None = the one recorded in the scores.
        trial: calibration runs of the model in memory, for methods that run it again; None = the model is opened if
            needed.
        told: function that is called with the calibration losses of a plan with corrections; None = none.

    Raises:
        UserError: the request is impossible, or (for methods that run the model again) the model is another one.
        RuinousPlanError: the plan's corrections make it worse than it is without them.
    """
    place = model or scores.model

    @cache
    def scored() -> ScoredModel:
        return open_scored(scores, place) if trial is None else trial.scored

    plan = select(Request(scores, config, scored, _parallel(scores, config, place), _tokens(scores, place)))
    if config.sublayers:
        trial = trial or Trial(scored())
        plan = without_sublayers(plan, config.sublayers, trial, _some(trial.scored.tokens, COMPARED))
    if config.shape is not None:
        Surgery(load_model_config(place), plan)
    if config.correction != "none" and _can_correct(plan, config.correction, scores, load_model_config(place)):
        plan = corrected(plan, config.correction, scored())
        losses = PlanLosses.of(plan, trial or Trial(scored()))
        if told is not None:
            told(losses)
        if not config.force:
            losses.refuse_ruinous()
    return plan


def _can_correct(plan: Plan, kind: str, scores: Scores, model: PretrainedConfig) -> bool:
    """Whether there is something to correct; a plan that takes nothing of the kind is refused."""
    family = family_of(model)
    check_samples(plan, kind, family, *calibration_size(scores.data))
    if is_correctable(plan, kind, family):
        return True
    if kind != "refit" or len(plan.blocks) == plan.source.layers:
        raise UserError("nothing to correct: the plan takes no heads, no channels and (for refit) no blocks")
    log.warning("the correction changes nothing: no removed block follows an MLP that can be corrected")
    return False


def choose_plan(
    scores: Scores, config: PlanConfig, budget: BudgetConfig, *, model: str | None = None
) -> tuple[Plan, Choice]:
    """The plan whose shape, among those under the budget, has the lowest calibration loss before recovery.

    Without a criterion of blocks, all blocks stay; without a criterion of units, blocks keep their width.

    Args:
        scores: scores of the model, with its calibration samples.
        config: settings that select blocks and units; without a shape.
        budget: limits on the cost of the pruned model.
        model: folder or hub name of the model; None = the one recorded in the scores.

    Returns:
        The plan, corrected if the config requests it, and how it was chosen.

    Raises:
        UserError: the budget is impossible, or the model is another one.
    """
    if budget.params is None and budget.memory is None and budget.latency is None:
        raise UserError("name a budget: --budget-params, --budget-memory or --budget-latency")
    check_choice(config)
    if budget.depth_share is not None and not (_prunes_depth(config) and _width(config)):
        raise UserError("--depth-share divides a saving between blocks and width: name the criteria of both")
    if not scores.data:
        raise UserError("the scores were computed without calibration text: score again with --data")
    model = model or scores.model
    sizes = ShapeSizes(load_model_config(model))
    check_correction(config.correction, sizes.config)
    _check_tokens(config, sizes, scores)
    limits = limits_of(costs_of(budget, sizes, default_device()), sizes.source)
    _steps(_request(scores, config, model), sizes, budget.multiple)
    return best_under(limits, scores, config, Trial(open_scored(scores, model)), budget, model=model)


def _check_tokens(config: PlanConfig, sizes: ShapeSizes, scores: Scores) -> None:
    """Refuse a correction before the search, if the calibration samples may be too few for it."""
    check_tokens(most_inputs(sizes.source), config.correction, *calibration_size(scores.data))


def check_choice(config: PlanConfig) -> None:
    """Raise ``UserError`` for settings with which a budget has nothing to choose."""
    if config.shape is not None or config.remove is not None or config.drop is not None:
        raise UserError("a budget decides what stays: leave out --shape, --remove and --drop")
    if config.method in ("list", "merge"):
        raise UserError(f"a budget needs a way to select any number of blocks; '{config.method}' is none")
    if config.criterion is None and config.unit_criterion is None and config.method == "lowest":
        raise UserError("name the criterion of blocks (--criterion), of units (--unit-criterion), or both")
    if config.expert_criterion is not None and config.unit_criterion is None:
        raise UserError("a budget narrows by --unit-criterion; --expert-criterion goes with it")
    config.check()


def best_under(
    limits: Sequence[Limit],
    scores: Scores,
    config: PlanConfig,
    trial: Trial,
    budget: BudgetConfig,
    *,
    model: str | None = None,
) -> tuple[Plan, Choice]:
    """The result of ``choose_plan`` for a model in memory and limits whose costs may be known already.

    Args:
        limits: limits on the cost of the pruned model.
        scores: scores of the model.
        config: settings that select blocks and units.
        trial: calibration runs of the model in memory.
        budget: settings of the budget; its limits are not read.
        model: folder or hub name of the model; None = the one recorded in the scores.
    """
    request = _request(scores, config, model or scores.model, trial.scored)
    sizes, blocks = ShapeSizes(load_model_config(model or scores.model)), _Blocks(request)
    steps = _steps(request, sizes, budget.multiple)
    source = (
        sizes.source if budget.vocabulary is None else target_shape(scores.source, {"vocabulary": budget.vocabulary})
    )
    kept = None if budget.vocabulary in (None, scores.source.vocabulary) else request.tokens(budget.vocabulary)

    def plan_for(shape: Shape) -> Plan:
        plan = Plan(scores.family, scores.fingerprint, scores.source, blocks.of(shape.layers), vocabulary=kept)
        return narrowed(plan, shape, scores, config.unit_criterion, config.expert_criterion)

    def loss(plan: Plan) -> float:
        return trial.loss(plan, few)

    few = _some(trial.scored.tokens, COMPARED)
    share = budget.depth_share if _prunes_depth(config) and _width(config) else None
    choice = Chooser(source, steps, limits, plan_for, loss, budget.tries, share).choose()
    plan = choice.plan
    if config.correction != "none" and is_correctable(plan, config.correction, sizes.family):
        plan = corrected(plan, config.correction, trial.scored)
    losses = PlanLosses.of(plan, trial, None if plan.corrections else few)
    if not config.force:
        losses.refuse_ruinous()
    return plan, replace(choice, plan=plan, losses=losses)


def _some(samples: Tensor, tokens: int) -> Tensor:
    """Samples at even intervals that hold as many tokens; all, if there are fewer."""
    count = min(max(tokens // samples.shape[1], 1), len(samples))
    return samples[torch.linspace(0, len(samples) - 1, count).round().long()]


def _steps(request: Request, sizes: ShapeSizes, multiple: int | None) -> Steps:
    config = request.config
    return Steps.of(sizes, multiple, _least_layers(request), depth=_prunes_depth(config), width=_width(config))


def default_device() -> torch.device:
    """The device on which models are opened."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _prunes_depth(config: PlanConfig) -> bool:
    return config.criterion is not None or config.method != "lowest"


def _width(config: PlanConfig) -> bool:
    return config.unit_criterion is not None


def _least_layers(request: Request) -> int:
    default = 1 if request.config.method in ("greedy", "merge") else 0
    return max(request.layers - len(request.removable(default)), 1)


class _Blocks:
    """The blocks that stay, by their number; each number is selected once."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._found: dict[int, tuple[KeptBlock, ...]] = {request.layers: whole(request.layers)}

    def of(self, layers: int) -> tuple[KeptBlock, ...]:
        if layers not in self._found:
            config = replace(self._request.config, remove=self._request.layers - layers)
            self._found[layers] = selected_blocks(replace(self._request, config=config))
        return self._found[layers]


class _Opening(Exception):
    """Raised in a rehearsal when the model would be opened."""


def rehearse(
    config: PlanConfig, criteria: Sequence[str], model_config: PretrainedConfig, data: CalibrationConfig
) -> None:
    """Check before scoring that a plan can be made from the scores; steps that run the model again are left out.

    Args:
        config: settings of the plan.
        criteria: names of the criteria that will be computed.
        model_config: config of the model.
        data: settings of the calibration samples.

    Raises:
        UserError: no plan can be made from the scores.
    """
    check_correction(config.correction, model_config)
    family = family_of(model_config)
    shape = family.shape(model_config)
    kinds = {name: CRITERIA[name] for name in criteria}
    of = {section: [name for name, kind in kinds.items() if kind.section is section] for section in ScoreSection}
    lengths = {str(n): [0.0] * (shape.layers - n + 1) for n in range(1, shape.layers + 1)}
    scores = Scores(
        model="",
        family=family.name,
        fingerprint="",
        source=shape,
        data=asdict(with_length(data, longest_input(model_config))),
        settings={},
        perplexity=None,
        blocks={name: [float(-block) for block in range(shape.layers)] for name in of[ScoreSection.BLOCKS]},
        subblocks={name: [0.0] * shape.layers for name in of[ScoreSection.SUBBLOCKS]},
        spans=dict.fromkeys(of[ScoreSection.SPANS], lengths),
        units={name: _no_units(shape, kinds[name].needs_experts) for name in of[ScoreSection.UNITS]},
    )

    def opening(*_: object) -> NoReturn:
        raise _Opening

    try:
        plan = select(Request(scores, config, opening, family.is_parallel(model_config), opening))
        Surgery(model_config, plan)
        if config.correction != "none":
            check_samples(plan, config.correction, family, *calibration_size(scores.data))
    except _Opening:
        if config.method != "iterative" and all(kind.reads in (None, "weights") for kind in kinds.values()):
            raise UserError(f"'{config.method}' needs calibration text, which none of the criteria reads") from None


def _no_units(shape: Shape, experts_only: bool) -> dict[str, list[list[float]]]:
    counts = {"experts": shape.experts}
    if not experts_only:
        channels = {} if shape.experts else {"channels": shape.intermediate}
        counts |= {"heads": shape.heads, "kv_groups": shape.kv_heads, "hidden": shape.hidden, **channels}
    return {unit: [[0.0] * count] * shape.layers for unit, count in counts.items() if count is not None}


def removed_blocks(plan: Plan) -> list[int]:
    """The source's blocks of which no part stays and which are not merged into another block."""
    used = {number for block in plan.blocks for number in (block.attention, block.mlp)}
    used |= {number for block in plan.blocks for number, _ in block.merge or ()}
    return [number for number in range(plan.source.layers) if number not in used]


def describe(plan: Plan) -> str:
    """A description of a plan's changes to the blocks."""
    parted = [str(block) for block in plan.blocks if block.attention != block.mlp]
    merged = [f"{block} = {_sum(block.merge)}" for block in plan.blocks if block.merge]
    notes = [f"{len(plan.blocks)} of {plan.source.layers} blocks stay"]
    notes += [f"gone: {', '.join(map(str, removed_blocks(plan)))}"] if removed_blocks(plan) else []
    notes += [f"attention/MLP of two blocks: {', '.join(parted)}"] if parted else []
    notes += [f"merged: {'; '.join(merged)}"] if merged else []
    for sublayer in ("attention", "mlp"):
        if numbers := sorted(number for name, number in plan.skipped if name == sublayer):
            notes.append(f"without {sublayer}: {', '.join(map(str, numbers))}")
    if replace(plan.shape, layers=plan.source.layers) != plan.source:
        before, after = vars(plan.source), vars(plan.shape)
        narrower = [f"{n} {after[n]} of {before[n]}" for n in before if n != "layers" and before[n] != after[n]]
        notes.append(", ".join(narrower))
    kinds = [name.split(".", 1) for name in plan.corrections]
    if corrected := {place for kind, place in kinds if kind != "across"}:
        narrowed = [plan.inputs(block, sublayer)[1] for block in plan.blocks for sublayer in ("attention", "mlp")]
        notes.append(f"{len(corrected)} of {sum(map(bool, narrowed))} narrowed matrices corrected")
    if across := sorted(int(place.split(".")[1]) for kind, place in kinds if kind == "across"):
        notes.append(f"MLPs corrected for the blocks after them: {', '.join(map(str, across))}")
    return "; ".join(notes)


def _sum(merge: Sequence[tuple[int, float]]) -> str:
    return " ".join(f"{weight:+g}·[{block}]" for block, weight in merge)


def compare(scores: Scores, config: PlanConfig) -> dict[str, list[int]]:
    """The blocks that each criterion would remove: for blocks those with the lowest scores, for spans the best span.

    Raises:
        UserError: this number of blocks can't be removed.
    """
    gone = {}
    for criteria, method in ((scores.blocks, "lowest"), (scores.spans, "span")):
        for name in criteria:
            plan = make_plan(scores, replace(config, criterion=name, method=method))
            kept = {block.attention for block in plan.blocks}
            gone[name] = [block for block in range(scores.layers) if block not in kept]
    if not gone:
        raise UserError("the scores have no criterion of blocks or spans to compare")
    return gone


def comparison_table(gone: dict[str, list[int]], layers: int) -> str:
    """A comparison as text: a row for each criterion, a column for each block, and the votes for each block.

    ``tail`` and ``random``, which look at nothing, have no vote.
    """
    voting = [blocks for name, blocks in gone.items() if name not in CRITERIA or CRITERIA[name].reads is not None]
    votes = Counter(block for blocks in voting for block in blocks)
    width = max(len(name) for name in (*gone, "votes"))
    cell = max(len(str(layers - 1)), len(str(len(gone)))) + 1
    lines = [" " * width + "".join(f"{block:{cell}}" for block in range(layers))]
    for name, blocks in gone.items():
        lines.append(
            f"{name:{width}}" + "".join(f"{'x' if block in blocks else '.':>{cell}}" for block in range(layers))
        )
    lines.append(f"{'votes':{width}}" + "".join(f"{votes[block] or '.':>{cell}}" for block in range(layers)))
    return "\n".join(lines)


def _request(scores: Scores, config: PlanConfig, model: str, scored: ScoredModel | None = None) -> Request:
    parallel = _parallel(scores, config, model)
    return Request(scores, config, lambda: scored or open_scored(scores, model), parallel, _tokens(scores, model))


def _tokens(scores: Scores, model: str) -> Callable[[int], tuple[int, ...]]:
    """The function that selects tokens by their use in the scores' calibration text."""

    def selected(count: int) -> tuple[int, ...]:
        if scores.settings.get("tokenizer") is not None:
            raise UserError("the scores were made with another tokenizer than the model's: score again without it")
        return most_used(model, CalibrationConfig(**scores.data), count)

    return selected


def _parallel(scores: Scores, config: PlanConfig, model: str) -> bool:
    """Whether attention and MLP of a block read the same input; computed only for methods that separate them."""
    if config.method not in ("list", "sublayers"):
        return False  # the other methods keep blocks whole
    model_config = load_model_config(model)
    return family_of(model_config).is_parallel(model_config)


def open_scored(scores: Scores, model: str) -> ScoredModel:
    """Open the model that was scored, with its calibration samples.

    Raises:
        UserError: the model or its samples have changed, or too little memory is free.
    """
    model_config = load_model_config(model)
    if (found := fingerprint(StoredWeights(model), model_config)) != scores.fingerprint:
        raise UserError(
            f"the scores are of a model with the hash {scores.fingerprint}; {model} has {found}: name the model that "
            "was scored, or score this one"
        )
    settings = scores.settings
    try:
        dtype, tokenizer_at, batch_size = settings["dtype"], settings["tokenizer"], int(settings["batch_size"])
        data = CalibrationConfig(**scores.data)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the scores do not say how they were made ({type(error).__name__}: {error}): score again"
        ) from None
    device = default_device()
    samples = tokenizer = None
    if scores.data:
        tokenizer = load_tokenizer(tokenizer_at or model)
        samples = calibration_samples(data, tokenizer)
        if samples_fingerprint(samples) != settings.get("samples"):
            raise UserError(f"the text in {data.path} has changed since the scores were made: score again")
        samples = samples.to(device)
    remedy = "select by the scores alone (lowest, span, sublayers), or plan on a larger machine"
    weights, products = weights_and_products(dtype, on_gpu=device.type == "cuda")
    check_memory(model, dtype=weights, on_gpu=device.type == "cuda", remedy=remedy)
    opened = compute_in(load_model(model, dtype=weights).to(device), products)
    return ScoredModel(opened, samples, batch_size, tokenizer)
