"""The job that prunes in rounds: score, plan, cut and recover, until the last round's shape is reached.

Layout of the folder::

    round-1/scores.json plan.json pruned/ recover/ recovered/   results of the round
    round-2/…
    model/                                                      the last round's result
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from composer.utils import dist
from transformers import PretrainedConfig

from llmprune.checkpoints.run_folder import RunFolder
from llmprune.config.schema import IterationConfig
from llmprune.conversion.commands import apply
from llmprune.jobs.score import save_scores
from llmprune.jobs.stages import (
    asked_to_end,
    begin,
    calibration_of,
    check_pruning_job,
    check_scoring,
    keep_result,
    recover,
    score_for,
)
from llmprune.models.families import Shape, family_of, shapes_between, target_shape
from llmprune.models.loading import load_model_config
from llmprune.pruning.budgets.plan_losses import HarmfulCorrectionError
from llmprune.pruning.planning import make_plan, rehearse
from llmprune.pruning.selection.settings import PlanConfig
from llmprune.utils.errors import UserError
from llmprune.utils.processes import TERMINATION
from llmprune.utils.ranks import init_distributed, on_rank_zero, share_cores
from llmprune.utils.settings import check_settings


def iterate(config: IterationConfig) -> None:
    """Run the job; a stopped job resumes with ``run.autoresume``.

    Raises:
        UserError: a setting does not fit, or the folder contains something else.
    """
    source = check_pruning_job(config)
    model_config = load_model_config(source)
    shapes = round_shapes(config, model_config)
    check_scoring(config, model_config, _criteria(config.plan))
    share_cores()
    init_distributed(config.train.device)
    with TERMINATION.ending(asked_to_end), RunFolder(Path(config.run.folder)).claimed():
        _iterate(config, source, shapes)


def _iterate(config: IterationConfig, source: str, shapes: Sequence[Shape]) -> None:
    folder = Path(config.run.folder)
    on_rank_zero(lambda: begin(config, "job of rounds"))
    model = source
    for number, shape in enumerate(shapes, start=1):
        place = folder / f"round-{number}"
        if not (place / "recovered").exists():
            if dist.get_global_rank() == 0:
                print(f"round {number} of {len(shapes)}: {shape}", flush=True)
            _prune(config, model, shape, place)
            # Every round reads the data in another order.
            recover(config, place, name=f"{config.run.name}-{number}", seed=config.run.seed + number - 1)
        model = str(place / "recovered")
    on_rank_zero(lambda: keep_result(folder, Path(model)))


def round_shapes(config: IterationConfig, model: PretrainedConfig) -> list[Shape]:
    """Compute the shape after each round.

    Raises:
        UserError: the target shape, or a criterion, is impossible for this model.
    """
    rounds, plan = config.iterate.rounds, config.plan
    check_settings(config)
    plan.refuse("iterate", "remove", "drop")
    plan.refuse_vocabulary()
    family = family_of(model)
    source = family.shape(model)
    target = target_shape(source, plan.shape or {})
    if target == source:
        raise UserError("plan.shape is the model's own: nothing would be pruned")
    shapes = shapes_between(source, target, rounds)
    if family.head_size_is_derived(model):
        shapes = [replace(shape, hidden=shape.heads * shape.head_dim) for shape in shapes[:-1]] + shapes[-1:]
    if family.keeps_whole_heads(model):
        shapes = [
            replace(shape, hidden=-(-shape.hidden // shape.heads) * shape.heads) for shape in shapes[:-1]
        ] + shapes[-1:]
    names = _criteria(plan)
    for number, (before, after) in enumerate(zip([source, *shapes], shapes, strict=False), start=1):
        if before == after:
            raise UserError(f"round {number} of {rounds} would remove nothing: take fewer rounds")
        rehearse(
            _plan_of_round(plan, before, after),
            names,
            family.with_shape(model, before, range(before.layers)),
            calibration_of(config),
        )
    return shapes


def _criteria(plan: PlanConfig) -> list[str]:
    named = (plan.criterion, plan.unit_criterion, plan.expert_criterion)
    found = list(dict.fromkeys(name for name in named if name is not None))
    if plan.method == "sublayers":
        found += ["attention", "mlp"]
    if not found:
        raise UserError("name the criteria that decide: plan.criterion of blocks, plan.unit_criterion of units")
    return found


def _plan_of_round(plan: PlanConfig, before: Shape, after: Shape) -> PlanConfig:
    """The plan settings of one round; sizes that do not change are left out."""
    sizes = {name: size for name, size in asdict(after).items() if name != "head_dim" and size is not None}
    narrower = (after.heads, after.kv_heads, after.intermediate) != (before.heads, before.kv_heads, before.intermediate)
    shallower = after.layers < before.layers
    return replace(
        plan,
        criterion=plan.criterion if shallower else None,
        shape=sizes,
        correction=plan.correction if narrower or (shallower and plan.correction == "refit") else "none",
    )


def _prune(config: IterationConfig, model: str, shape: Shape, place: Path) -> None:
    """Score, plan and cut; steps that are already done are skipped."""
    plan_file = place / "plan.json"
    if not plan_file.exists():
        scores = score_for(config, model, _criteria(config.plan))

        def decide() -> None:
            place.mkdir(exist_ok=True)
            save_scores(scores, place / "scores.json")
            chosen = _plan_of_round(config.plan, scores.source, shape)
            try:
                plan = make_plan(scores, chosen)
            except HarmfulCorrectionError:
                print(f"{place.name}: the correction makes the plan worse, so this round continues without it")
                plan = make_plan(scores, replace(chosen, correction="none"))
            plan.save(plan_file)

        on_rank_zero(decide)

    def cut() -> None:
        if not (place / "pruned").exists():
            apply(model, plan_file, place / "pruned")

    on_rank_zero(cut)
