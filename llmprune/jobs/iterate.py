"""The job that prunes in rounds: score, plan, cut and recover, until the last round's shape is reached.

The folder::

    round-1/scores.json plan.json pruned/ recover/ recovered/   what the round did
    round-2/…
    model/                                                      the last round's result
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from composer.utils import dist
from transformers import PretrainedConfig

from llmprune.checkpoints.run_folder import RunFolder
from llmprune.config.schema import IterationConfig, RoundsConfig
from llmprune.conversion.commands import apply
from llmprune.jobs.score import save_scores, score
from llmprune.jobs.stages import asked_to_end, begin, check_pruning_job, keep_result, recover
from llmprune.models.families import Shape, family_of, shapes_between, target_shape
from llmprune.models.loading import load_model_config
from llmprune.models.placement import Placement
from llmprune.pruning.budgets.losses import HarmfulCorrectionError
from llmprune.pruning.planning import make_plan, rehearse
from llmprune.pruning.scoring.settings import LayerScoringConfig
from llmprune.pruning.selection.methods import PlanConfig
from llmprune.recovery.distillation import DistillationConfig
from llmprune.utils.errors import UserError
from llmprune.utils.processes import TERMINATION
from llmprune.utils.ranks import init_distributed, on_rank_zero, share_cores


def iterate(config: IterationConfig) -> None:
    """Run the job; one that was stopped goes on with ``run.autoresume``.

    Raises:
        UserError: something does not fit, or the folder holds something else.
    """
    source = check_pruning_job(config, "iterate", config.iterate.calibration)
    distillation = config.section(DistillationConfig)
    if distillation is not None and distillation.compares_states and config.iterate.rounds > 1:
        raise UserError("states compare with the source's in the first round only: take the objectives kl and lm")
    shapes = round_shapes(config.iterate, load_model_config(source))
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
            # Every round sees the data in another order.
            recover(config, place, name=f"{config.run.name}-{number}", seed=config.run.seed + number - 1)
        model = str(place / "recovered")
    on_rank_zero(lambda: keep_result(folder, Path(model)))


def round_shapes(rounds: RoundsConfig, model: PretrainedConfig) -> list[Shape]:
    """The shape after each round.

    Raises:
        UserError: the target, or a criterion, is impossible for this model.
    """
    if rounds.rounds < 1:
        raise UserError(f"iterate.rounds is {rounds.rounds}; it must be positive")
    family = family_of(model)
    source = family.shape(model)
    target = target_shape(source, rounds.shape)
    if target == source:
        raise UserError("iterate.shape is the model's own: nothing would be pruned")
    shapes = shapes_between(source, target, rounds.rounds)
    if family.head_size_is_derived(model):
        shapes = [replace(shape, hidden=shape.heads * shape.head_dim) for shape in shapes[:-1]] + shapes[-1:]
    if family.keeps_whole_heads(model):
        shapes = [
            replace(shape, hidden=-(-shape.hidden // shape.heads) * shape.heads) for shape in shapes[:-1]
        ] + shapes[-1:]
    names = _criteria(rounds)
    for number, (before, after) in enumerate(zip([source, *shapes], shapes, strict=False), start=1):
        if before == after:
            raise UserError(f"round {number} of {rounds.rounds} would remove nothing: take fewer rounds")
        rehearse(
            _plan_config(rounds, before, after),
            names,
            family.with_shape(model, before, range(before.layers)),
            rounds.calibration,
        )
    return shapes


def _criteria(rounds: RoundsConfig) -> list[str]:
    named = (rounds.criterion, rounds.unit_criterion, rounds.expert_criterion)
    found = list(dict.fromkeys(name for name in named if name is not None))
    if rounds.method == "sublayers":
        found += ["attention", "mlp"]
    if not found:
        raise UserError("name the criteria that decide: iterate.criterion of blocks, iterate.unit_criterion of units")
    return found


def _plan_config(rounds: RoundsConfig, before: Shape, after: Shape) -> PlanConfig:
    """How to plan one round; what does not change is left out."""
    sizes = {name: size for name, size in asdict(after).items() if name != "head_dim" and size is not None}
    narrower = (after.heads, after.kv_heads, after.intermediate) != (before.heads, before.kv_heads, before.intermediate)
    return PlanConfig(
        rounds.method,
        None if after.layers == before.layers else rounds.criterion,
        protect_first=rounds.protect_first,
        protect_last=rounds.protect_last,
        shape=sizes,
        unit_criterion=rounds.unit_criterion,
        expert_criterion=rounds.expert_criterion,
        correction=rounds.correction if narrower else "none",
    )


def _prune(config: IterationConfig, model: str, shape: Shape, place: Path) -> None:
    """Score, plan and cut, as far as it is not done yet."""
    rounds, plan_file = config.iterate, place / "plan.json"
    if not plan_file.exists():
        data = replace(rounds.calibration, path=rounds.calibration.path or config.data.path)
        settings = LayerScoringConfig(data, _criteria(rounds), rounds.batch_size, seed=config.run.seed)
        placement = Placement(config.model.dtype, config.train.device, attention=config.model.attention)
        scores = score(model, settings, placement, tokenizer=config.model.tokenizer)

        def decide() -> None:
            place.mkdir(exist_ok=True)
            save_scores(scores, place / "scores.json")
            chosen = _plan_config(rounds, scores.source, shape)
            try:
                plan = make_plan(scores, chosen)
            except HarmfulCorrectionError:
                print(f"{place.name}: the correction makes the plan worse, so this round goes on without it")
                plan = make_plan(scores, replace(chosen, correction="none"))
            plan.save(plan_file)

        on_rank_zero(decide)

    def cut() -> None:
        if not (place / "pruned").exists():
            apply(model, plan_file, place / "pruned")

    on_rank_zero(cut)
