"""Deciding what goes, cutting it out, and making sure."""

import json
from typing import Annotated

import typer

from llmprune.cli.options import DType, Json, Out, Overwrite, PushToHub, app, names_in, sizes_in
from llmprune.utils.errors import UserError


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
def convert(
    checkpoint: Annotated[str, typer.Argument(help="A Composer checkpoint (.pt), or the folder of its run.")],
    out: Out,
    dtype: Annotated[DType | None, typer.Option(help="Of the weights written; default: as trained.")] = None,
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
        checkpoint, out, dtype=None if dtype is None else getattr(torch, dtype.value), overwrite=overwrite
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
    activation: Annotated[str, typer.Option(help="silu, gelu or tanh.")] = "silu",
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

    from llmprune.conversion.verify import compare_models, open_for_comparison
    from llmprune.plans.plan import Plan
    from llmprune.utils.files import to_json

    source = open_for_comparison(a, None if plan is None else Plan.load(plan))
    difference = compare_models(source, open_for_comparison(b))
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
def score(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or hub name.")],
    out: Annotated[str, typer.Option(help="File to write (.json); pictures are drawn beside it.")],
    data: Annotated[str | None, typer.Option(help="Prepared data, or text, Markdown or JSON lines.")] = None,
    criteria: Annotated[
        str | None, typer.Option(help="Names, separated by commas; default: all that are possible.")
    ] = None,
    names: Annotated[
        bool, typer.Option("--names", help="List the criteria.", is_eager=True, callback=_list_criteria)
    ] = False,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens of each.")] = 128,
    bos: Annotated[str, typer.Option(help="A BOS before no sample, the first or each: none, first, each.")] = "none",
    text_field: Annotated[str, typer.Option(help="Field of a JSON record that holds the text.")] = "text",
    batch_size: Annotated[int, typer.Option(help="Samples that go through a block at a time.")] = 8,
    row_reduction: Annotated[str, typer.Option(help="Of weights, over rows: sum, mean, max, prod.")] = "sum",
    matrix_reduction: Annotated[str, typer.Option(help="Of weights, over a block's matrices.")] = "sum",
    sequence_aggregation: Annotated[
        str, typer.Option(help="Of units' activations, over a sample's tokens: mean, l2.")
    ] = "mean",
    batch_aggregation: Annotated[str, typer.Option(help="Of units' activations, over samples: mean, l2.")] = "mean",
    seed: Annotated[int, typer.Option(help="Of the samples and of the random order.")] = 17,
    dtype: Annotated[str, typer.Option(help="Of the weights in memory: float32 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu or gpu; default: what is there.")] = None,
    offload: Annotated[bool, typer.Option("--offload", help="Hold one block at a time, read from the files.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Score every block and every unit of a model by every criterion, in one pass."""
    from pathlib import Path

    from llmprune.data.calibration import CalibrationConfig
    from llmprune.jobs.score import save_scores
    from llmprune.jobs.score import score as score_model
    from llmprune.models.placement import Placement
    from llmprune.pruning.scoring.pictures import pictures_beside
    from llmprune.pruning.scoring.settings import LayerScoringConfig
    from llmprune.utils.outputs import check_output

    if (Path(out).parent / "config.json").exists():
        raise UserError(f"{Path(out).parent} is a model's folder: write the scores elsewhere")
    check_output(out, ".json", overwrite, pictures_beside(out))
    scores = score_model(
        model,
        LayerScoringConfig(
            CalibrationConfig(data, samples, seq_len, bos, text_field, seed),
            names_in(criteria),
            batch_size,
            row_reduction,
            matrix_reduction,
            sequence_aggregation,
            batch_aggregation,
            seed,
        ),
        Placement(dtype, device),
        offload=offload,
    )
    files = save_scores(scores, out)
    print(json.dumps(scores.as_dict()) if as_json else "\n".join(map(str, files)))


@app.command()
def plan(
    scores: Annotated[str, typer.Argument(help="What `llmprune score` wrote.")],
    out: Annotated[str | None, typer.Option(help="Plan to write (.json).")] = None,
    criterion: Annotated[str | None, typer.Option(help="Whose scores decide.")] = None,
    remove: Annotated[int | None, typer.Option(help="How many blocks go.")] = None,
    method: Annotated[str | None, typer.Option(help="How to select; `--methods` lists the ways.")] = None,
    span: Annotated[bool, typer.Option("--span", help="One span of neighbours goes (--method span).")] = False,
    shape: Annotated[
        str | None, typer.Option(help="What comes out, such as layers=24,hidden=2048,heads=16,intermediate=5504.")
    ] = None,
    unit_criterion: Annotated[
        str | None, typer.Option(help="Whose scores of heads, channels and hidden dimensions decide.")
    ] = None,
    expert_criterion: Annotated[str | None, typer.Option(help="The same for experts; default: the same.")] = None,
    correction: Annotated[
        str, typer.Option(help="Of output matrices, on the calibration samples: none, mean (biases), refit.")
    ] = "none",
    budget_params: Annotated[
        str | None, typer.Option(help="Parameters that stay: a share such as 0.5, or 1.3B; picks the shape.")
    ] = None,
    budget_memory: Annotated[
        str | None, typer.Option(help="Memory of weights and key/value cache: 8GB, or a share; picks the shape.")
    ] = None,
    budget_latency: Annotated[
        str | None, typer.Option(help="Share of the time of a token, measured here; picks the shape.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Budgets: tokens in the cache; default 2048, or what the model takes.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Budgets: sequences in the cache; default 1.")] = None,
    dtype: Annotated[DType | None, typer.Option(help="Budgets: of weights and cache; default bfloat16.")] = None,
    multiple: Annotated[
        int | None, typer.Option(help="Budgets: what hidden dimensions and channels are multiples of.")
    ] = None,
    tries: Annotated[int | None, typer.Option(help="Budgets: shapes to try; default 48.")] = None,
    drop: Annotated[str | None, typer.Option(help="What goes: 3,7 or attention.3,mlp.3 (--method list).")] = None,
    protect_first: Annotated[int | None, typer.Option(help="So many blocks at the start stay.")] = None,
    protect_last: Annotated[int | None, typer.Option(help="So many at the end.")] = None,
    threshold: Annotated[float, typer.Option(help="Merging: mean cosine that the final states keep.")] = 0.65,
    merge_size: Annotated[int, typer.Option(help="Merging: blocks that become one.")] = 4,
    merge_step: Annotated[int, typer.Option(help="Merging: blocks to go back after a merge.")] = 2,
    model: Annotated[str | None, typer.Option(help="Where the model lies, if it was moved since.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show what every criterion would drop.")] = False,
    methods: Annotated[
        bool, typer.Option("--methods", help="List the ways to select.", is_eager=True, callback=_list_methods)
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write a plan although its calibration loss says that it is ruined.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Choose what goes by scores; OUT is a plan for `llmprune apply`."""
    from pathlib import Path

    from llmprune.plans.plan import tensors_beside
    from llmprune.pruning import planning
    from llmprune.pruning.budgets.limits import BudgetConfig
    from llmprune.pruning.budgets.losses import PlanLosses
    from llmprune.pruning.scoring.scores import Scores
    from llmprune.pruning.selection.methods import PlanConfig
    from llmprune.utils.outputs import check_output, refuse_replacing

    ways = [way for way, chosen in ((method, method), ("span", span), ("list", drop)) if chosen]
    if len(set(ways)) > 1:
        raise UserError(f"choose one way to select, not {' and '.join(map(str, ways))}")
    config = PlanConfig(
        method=(ways or ["lowest"])[0] or "lowest",
        criterion=criterion,
        remove=remove,
        drop=names_in(drop),
        protect_first=protect_first,
        protect_last=protect_last,
        threshold=threshold,
        merge_size=merge_size,
        merge_step=merge_step,
        shape=None if shape is None else sizes_in(shape),
        unit_criterion=unit_criterion,
        expert_criterion=expert_criterion,
        correction=correction,
        force=force,
    )
    given = {
        "params": budget_params,
        "memory": budget_memory,
        "latency": budget_latency,
        "context": context,
        "batch": batch,
        "dtype": None if dtype is None else dtype.value,
        "multiple": multiple,
        "tries": tries,
    }
    asked = {name: value for name, value in given.items() if value is not None}
    loaded = Scores.load(scores)
    if compare and asked:
        raise UserError("--compare shows every criterion as it is: leave out the budget")
    if compare and (out or method or criterion):
        raise UserError("--compare shows every criterion and writes nothing: leave out --out, --method and --criterion")
    if compare:
        gone = planning.compare(loaded, config)
        print(json.dumps(gone) if as_json else planning.comparison_table(gone, loaded.layers))
        return
    if out is None:
        raise UserError("name the plan to write with --out")
    check_output(out, ".json", overwrite, [tensors_beside(Path(out))])
    refuse_replacing(out, [scores])
    choice, losses = None, list[PlanLosses]()
    if asked:
        made, choice = planning.choose_plan(loaded, config, BudgetConfig(**asked), model=model)  # type: ignore[arg-type]
    else:
        made = planning.make_plan(loaded, config, model=model, told=losses.append)
    made.save(out)
    found = [choice] if choice is not None else losses
    facts = {"removed": planning.removed_blocks(made)} | {k: v for one in found for k, v in one.facts().items()}
    print(json.dumps(facts) if as_json else "\n".join([f"{out}: {planning.describe(made)}", *map(str, found)]))


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
    """List the model families that can be pruned, and what can be pruned of each."""
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
