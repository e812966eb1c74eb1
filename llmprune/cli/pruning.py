"""The commands that score, plan, cut, convert and verify models."""

import json
from dataclasses import replace
from typing import Annotated, Literal

import typer

from llmprune.cli.common import Json, Out, Overwrite, PushToHub, app
from llmprune.cli.options_from_settings import options_from_settings
from llmprune.jobs.prune.settings import PruneConfig
from llmprune.pruning.budgets.settings import BudgetConfig
from llmprune.pruning.scoring.settings import LayerScoringConfig
from llmprune.pruning.selection.settings import PlanConfig
from llmprune.utils.errors import UserError
from llmprune.utils.formats import Device, Format, TeacherFormat

DTypeToScore = Annotated[
    TeacherFormat,
    typer.Option(
        help="Auto: weights in float32, and matrix products in bfloat16 where that is fast.", rich_help_panel="Device"
    ),
]


def _list_criteria(wanted: bool) -> None:
    if wanted:
        from llmprune.pruning.scoring.all_criteria import CRITERIA

        _describe(CRITERIA.describe())


def _list_methods(wanted: bool) -> None:
    if wanted:
        from llmprune.pruning.planning import SELECTIONS

        _describe(SELECTIONS.describe())


def _describe(choices: dict[str, str]) -> None:
    print("\n".join(f"{name:20}{text}" for name, text in choices.items()))
    raise typer.Exit


@app.command()
@options_from_settings(leave_out=("budget.dtype",))
def prune(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or hub name.")],
    out: Out,
    settings: PruneConfig,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the steps with sizes and times; do none.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew if OUT was begun with other settings.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a model smaller and recover, evaluate, measure and report it; called again, a stopped command goes on."""
    from composer.utils import dist

    from llmprune.jobs.prune.forecast import forecast
    from llmprune.jobs.prune.job import check
    from llmprune.jobs.prune.job import prune as prune_model

    if dry_run:
        check(model, out, settings, overwrite=overwrite)
        if dist.get_global_rank() == 0:
            found = forecast(model, settings)
            print(json.dumps(found.facts()) if as_json else found)
        return
    outcome = prune_model(model, out, settings, overwrite=overwrite)
    if dist.get_global_rank() == 0:
        print(json.dumps(outcome.facts()) if as_json else outcome)


@app.command()
def convert(
    checkpoint: Annotated[str, typer.Argument(help="A Composer checkpoint (.pt), or the folder of its run.")],
    out: Out,
    dtype: Annotated[Format | None, typer.Option(help="Of the weights written; default: as trained.")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="Write the adapters alone, for PEFT.")] = False,
    overwrite: Overwrite = False,
    push_to_hub: PushToHub = None,
) -> None:
    """Turn a checkpoint (gates, replacement modules and adapters included) into a plain Hugging Face folder."""
    import torch

    from llmprune.conversion import commands

    if adapter and dtype is not None:
        raise UserError("adapters are written as trained: leave out --dtype")
    if adapter:
        commands.export_adapter(checkpoint, out, overwrite=overwrite)
        print(out if push_to_hub is None else commands.push_to_hub(out, push_to_hub))
        return
    plan = commands.convert(
        checkpoint, out, dtype=None if dtype is None else getattr(torch, dtype), overwrite=overwrite
    )
    print(f"{out}: {plan.shape}")
    if push_to_hub is not None:
        print(commands.push_to_hub(out, push_to_hub))


@app.command()
def apply(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or hub name.")],
    plan: Annotated[str, typer.Argument(help="A plan (.json).")],
    out: Out,
    overwrite: Overwrite = False,
    push_to_hub: PushToHub = None,
) -> None:
    """Cut a model by a plan; OUT is a plain Hugging Face folder."""
    from llmprune.conversion import commands

    commands.apply(model, plan, out, overwrite=overwrite)
    print(out)
    if push_to_hub is not None:
        print(commands.push_to_hub(out, push_to_hub))


@app.command()
def enrich(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or hub name.")],
    out: Out,
    per_head: Annotated[bool, typer.Option("--per-head", help="A layer for each head; default: one a block.")] = False,
    activation: Annotated[Literal["silu", "gelu", "tanh"], typer.Option(help="Of the new layers.")] = "silu",
    overwrite: Overwrite = False,
) -> None:
    """Give a model richer attention heads that begin as the identity, to be trained (yamls/continue.yaml)."""
    from llmprune.conversion import commands
    from llmprune.models.families import RicherHeadsConfig

    heads = RicherHeadsConfig(shared=not per_head, activation=activation, residual=True)
    commands.enrich(model, heads, out, overwrite=overwrite)
    print(out)


@app.command()
def verify(
    a: Annotated[str, typer.Argument(help="A Hugging Face model, or a checkpoint (gated or not).")],
    b: Annotated[str, typer.Argument(help="Another one.")],
    plan: Annotated[str | None, typer.Option(help="Leave out of A what this plan removes, without cutting.")] = None,
    as_json: Json = False,
) -> None:
    """Compare the logits of two models on the same tokens, in float32; exit code 1 if any is not finite."""
    from dataclasses import asdict

    from llmprune.conversion.verify import verify as compared
    from llmprune.plans.plan import Plan
    from llmprune.utils.files import to_json

    difference = compared(a, b, None if plan is None else Plan.load(plan))
    if as_json:
        print(to_json(asdict(difference)))
    elif not difference.is_finite:
        print("different: logits are NaN or infinite")
    else:
        print(
            f"largest difference {difference.max_abs:.3g} ({difference.max_rel:.3g} of the largest logit), "
            f"mean {difference.mean_abs:.3g}"
        )
    if not difference.is_finite:
        raise typer.Exit(1)


@app.command()
@options_from_settings({"data.path": "data", "data.length": "seq_len"}, leave_out=("seed", "data.seed"))
def score(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or hub name.")],
    out: Annotated[str, typer.Option(help="File to write (.json); pictures are drawn beside it.")],
    scoring: LayerScoringConfig,
    names: Annotated[
        bool, typer.Option("--names", help="List the criteria.", is_eager=True, callback=_list_criteria)
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the samples and of the random order.")] = 17,
    dtype: DTypeToScore = "auto",
    device: Annotated[Device | None, typer.Option(help="Default: what is there.", rich_help_panel="Device")] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Hold one block at a time, read from files.", rich_help_panel="Device")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Score every block and every unit of a model by every criterion, in one pass."""
    from pathlib import Path

    from llmprune.jobs.score import save_scores
    from llmprune.jobs.score import score as score_model
    from llmprune.models.placement import Placement
    from llmprune.pruning.scoring.pictures import pictures_beside
    from llmprune.utils.outputs import check_output

    if (Path(out).parent / "config.json").exists():
        raise UserError(f"{Path(out).parent} is a model's folder: write the scores elsewhere")
    check_output(out, ".json", overwrite, pictures_beside(out))
    config = replace(scoring, data=replace(scoring.data, seed=seed), seed=seed)
    files = save_scores(score_model(model, config, Placement(dtype, device), offload=offload), out)
    print(Path(out).read_text() if as_json else "\n".join(map(str, files)))


@app.command()
@options_from_settings({"params": "budget_params", "memory": "budget_memory", "latency": "budget_latency"})
def plan(
    scores: Annotated[str, typer.Argument(help="What `llmprune score` wrote.")],
    settings: PlanConfig,
    budget: BudgetConfig | None = None,
    out: Annotated[str | None, typer.Option(help="Plan to write (.json).")] = None,
    span: Annotated[bool, typer.Option("--span", help="One span of neighbours goes (--method span).")] = False,
    model: Annotated[str | None, typer.Option(help="Where the model is, if it was moved since.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show what every criterion would drop.")] = False,
    methods: Annotated[
        bool, typer.Option("--methods", help="List the ways to select.", is_eager=True, callback=_list_methods)
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Choose by scores which parts to remove; OUT is a plan for `llmprune apply`."""
    from pathlib import Path

    from llmprune.plans.plan import tensors_beside
    from llmprune.pruning import planning
    from llmprune.pruning.budgets.plan_losses import PlanLosses
    from llmprune.pruning.scoring.all_criteria import CRITERIA
    from llmprune.pruning.scoring.scores import Scores
    from llmprune.utils.logs import tell
    from llmprune.utils.outputs import check_output, refuse_replacing

    config = _with_method(settings, span=span)
    loaded = Scores.load(scores)
    if compare and budget is not None:
        raise UserError("--compare shows every criterion as it is: leave out the budget")
    if compare and config.correction != "none":
        raise UserError("--compare shows every criterion as it is: leave out --correction")
    if compare and (out or settings.method != PlanConfig.method or config.criterion):
        raise UserError("--compare shows every criterion and writes nothing: leave out --out, --method and --criterion")
    if compare:
        gone = planning.compare(loaded, config)
        print(json.dumps(gone) if as_json else planning.comparison_table(gone, loaded.layers))
        return
    if out is None:
        raise UserError("name the plan to write with --out")
    check_output(out, ".json", overwrite, [tensors_beside(Path(out))])
    refuse_replacing(out, [scores])
    for criterion in filter(None, (config.criterion, config.unit_criterion)):
        if criterion in CRITERIA and (caution := CRITERIA[criterion].caution):
            tell(f"plan: {criterion}: {caution}")
    choice, losses = None, list[PlanLosses]()
    if budget is not None:
        made, choice = planning.choose_plan(loaded, config, budget, model=model)
    else:
        made = planning.make_plan(loaded, config, model=model, told=losses.append)
    made.save(out)
    found = [choice] if choice is not None else losses
    facts = {"removed": planning.removed_blocks(made)} | {k: v for one in found for k, v in one.facts().items()}
    print(json.dumps(facts) if as_json else "\n".join([f"{out}: {planning.describe(made)}", *map(str, found)]))


def _with_method(settings: PlanConfig, *, span: bool) -> PlanConfig:
    """The settings with the selection method that --span or --drop implies."""
    named = None if settings.method == PlanConfig.method else settings.method
    ways = {way for way in (named, "span" if span else None, "list" if settings.drop else None) if way is not None}
    if len(ways) > 1:
        raise UserError(f"choose one way to select, not {' and '.join(sorted(ways))}")
    return replace(settings, method=next(iter(ways), PlanConfig.method))


@app.command()
def search(
    yaml: Annotated[str, typer.Argument(metavar="YAML", help="The job, such as yamls/search.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE…]", help="Of the YAML.")] = None,
) -> None:
    """Find the best way to prune under a budget: score, compare, recover the best few. Several ranks: train.py."""
    from llmprune.config.job_files import load_job
    from llmprune.config.schema import SearchConfig
    from llmprune.jobs.search import search as run_search

    job = load_job(yaml, overrides or ())
    if not isinstance(job, SearchConfig):
        raise UserError(f"{yaml} is another job ({job.job}): run it with `composer train.py`")
    run_search(job)


@app.command()
def families(as_json: Json = False) -> None:
    """List the model families that can be pruned, and the parts that can be pruned in each."""
    from llmprune.models.families import FAMILIES
    from llmprune.pruning.gates.kinds import DEPTH, WIDTH

    gates = {name: [k for k in (*DEPTH, *WIDTH) if k not in family.refused_gates] for name, family in FAMILIES.items()}
    if as_json:
        table = {
            name: {
                "model_types": family.model_types,
                "description": family.description,
                "gates": gates[name],
                "notes": family.notes(),
            }
            for name, family in FAMILIES.items()
        }
        print(json.dumps(table))
        return
    for name, family in FAMILIES.items():
        print(f"{name:10} {family.description} (model_type {', '.join(family.model_types)})")
        print(f"{'':10} blocks by scores; gates on {', '.join(gates[name])}")
        for note in family.notes():
            print(f"{'':10} {note}")
