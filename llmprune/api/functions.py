"""What a program calls: every function does what the command of the same name does."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmprune.utils.errors import UserError

if TYPE_CHECKING:
    from composer import Callback, Trainer

    from llmprune.config.schema import Config
    from llmprune.conversion.verify import Difference
    from llmprune.evaluation.settings import BosMode
    from llmprune.jobs.prune.outcome import Outcome
    from llmprune.plans.plan import Plan
    from llmprune.pruning.budgets.settings import BudgetConfig
    from llmprune.pruning.scoring.scores import Scores
    from llmprune.utils.formats import Device, InferenceFormat, TeacherFormat

Place = str | Path


def prune(
    model: Place,
    out: Place,
    *,
    params: float | str | None = None,
    memory: str | None = None,
    latency: float | str | None = None,
    method: Literal["auto", "depth", "width", "both", "gates"] = "auto",
    data: Place | None = None,
    tokens: int | str | None = None,
    minutes: float | None = None,
    seq_len: int | None = None,
    text_field: str = "text",
    prompts: Place | None = None,
    context: int | None = None,
    batch: int = 1,
    vocabulary: int | None = None,
    depth_share: float | None = None,
    tries: int = 48,
    seed: int = 17,
    overwrite: bool = False,
) -> "Outcome":
    """Make a model smaller, recover it and measure it; called again, what was stopped goes on.

    >>> outcome = llmprune.prune("base", "three-quarters", params=0.75, data="text", tokens="4K", seq_len=32, tries=4)
    >>> outcome.models[-1].parameters < outcome.models[0].parameters
    True

    Args:
        model: a Hugging Face folder or hub name.
        out: the folder to write; ``out``/model is the smaller model, ``out``/report.html shows everything.
        params: the budget of parameters: a share of the model's, or a number such as ``1.3B``.
        memory: the budget of memory for weights and a full key/value cache, such as ``8GB``.
        latency: the budget of the time of a token, as a share of the model's.
        method: what is removed: blocks (depth), width, or both; auto = the best of the three; gates = learned gates.
        data: text or prepared data to prune and recover with; ``self`` = text that the model writes; None = the
            built-in corpus.
        tokens: tokens of recovery, such as ``1M``.
        minutes: minutes of recovery, if the tokens are not given; None = 30.
        seq_len: tokens of a sample, unless the data are prepared already; None = 512, or as many as the model takes.
        text_field: field of a JSON record that holds the text.
        prompts: file with prompts that every model continues; None = three English sentences.
        context: tokens in the cache, for ``memory`` and ``latency``; None = 2048, or the model's longest input.
        batch: sequences in the cache, for ``memory`` and ``latency``.
        vocabulary: tokens that stay, those that the text uses most; None = all.
        depth_share: how much of the saving whole blocks make, if both go: this share of the blocks that would go alone;
            None = as much as has the lowest loss before recovery.
        tries: shapes that are tried on the calibration samples, for each way.
        seed: of the samples and of the order of the data.
        overwrite: whether what llmprune made in ``out`` may be replaced if it was begun with other settings.

    Returns:
        Parameters, held-out perplexity and speed of the source, the pruned and the recovered model.

    Raises:
        UserError: something is impossible; as far as it can be known, before any work.
    """
    from llmprune.jobs.prune.job import prune as run
    from llmprune.jobs.prune.settings import PruneConfig
    from llmprune.pruning.budgets.settings import BudgetConfig

    budget = BudgetConfig(
        _text(params),
        memory,
        _text(latency),
        context,
        batch,
        vocabulary=vocabulary,
        depth_share=depth_share,
        tries=tries,
    )
    config = PruneConfig(budget, method, _text(data), _text(tokens), minutes, seq_len, text_field, _text(prompts), seed)
    return run(str(model), out, config, overwrite=overwrite)


def score(
    model: Place,
    data: Place | None = None,
    *,
    criteria: Sequence[str] | None = None,
    samples: int = 32,
    seq_len: int | None = None,
    bos: Literal["none", "first", "each"] = "none",
    text_field: str = "text",
    batch_size: int = 8,
    seed: int = 17,
    dtype: "TeacherFormat" = "auto",
    device: "Device | None" = None,
    offload: bool = False,
) -> "Scores":
    """Score every block and every unit of a model by every criterion, in one pass.

    >>> names = ["block_influence", "unit_activation_l2"]
    >>> scores = llmprune.score("base", "text", criteria=names, samples=8, seq_len=32)
    >>> len(scores.blocks["block_influence"])
    6

    Args:
        model: a Hugging Face folder or hub name.
        data: calibration text: prepared data, or text, Markdown or JSON lines (a file or a folder). None = none: only
            criteria of weights are possible.
        criteria: names, as ``llmprune score --names`` lists them; None = all that are possible.
        samples: how many calibration samples.
        seq_len: tokens of each; None = 512, or fewer where the model or the prepared samples are shorter.
        bos: put a BOS before each sample, the first or none: ``each``, ``first``, ``none``.
        text_field: the field of a JSON record that holds the text.
        batch_size: samples that go through a block at a time.
        seed: of the samples and of the random order.
        dtype: float32 or bfloat16; auto = weights in float32, and matrix products in bfloat16 where that is fast.
        device: cpu or gpu; None = what is there.
        offload: hold one block at a time, read from the files.

    Returns:
        The scores: of blocks and units higher = keep, of spans higher = more alike at both ends.
        ``scores.save("scores.json")`` writes them.

    Raises:
        UserError: the model or the text can't be read, or a criterion is impossible here.
    """
    from llmprune.data.calibration_settings import CalibrationConfig
    from llmprune.jobs.score import score as score_model
    from llmprune.models.placement import Placement
    from llmprune.pruning.scoring.settings import LayerScoringConfig

    calibration = CalibrationConfig(None if data is None else str(data), samples, seq_len, bos, text_field, seed)
    names = None if criteria is None else list(criteria)
    config = LayerScoringConfig(calibration, names, batch_size, seed=seed)
    return score_model(str(model), config, Placement(dtype, device), offload=offload)


def plan(
    scores: "Scores | Place",
    criterion: str | None = None,
    remove: int | None = None,
    *,
    budget: "BudgetConfig | None" = None,
    model: Place | None = None,
    **settings: Any,
) -> "Plan":
    """Choose what goes by scores.

    >>> by_depth = llmprune.plan(scores, "block_influence", remove=2)
    >>> by_depth.shape.layers
    4
    >>> by_width = llmprune.plan(scores, unit_criterion="unit_activation_l2", shape={"intermediate": 32})
    >>> by_width.shape.intermediate
    32

    Args:
        scores: what ``score`` returned, or its file.
        criterion: whose scores of blocks decide.
        remove: how many blocks go.
        budget: what the model may cost; the shape is chosen. None = the settings say it.
        model: where the model lies now; None = where it lay when it was scored.
        settings: any other key of ``PlanConfig``, such as ``method="span"``, ``shape={"hidden": 2048}``,
            ``unit_criterion``, ``correction="refit"``, ``protect_first``.

    Returns:
        The plan; ``plan.save("plan.json")`` writes it.

    Raises:
        UserError: the request is impossible, or the calibration loss of what is left is too high.
    """
    from llmprune.pruning.planning import choose_plan, make_plan
    from llmprune.pruning.scoring.scores import Scores
    from llmprune.pruning.selection.settings import PlanConfig

    loaded = scores if isinstance(scores, Scores) else Scores.load(str(scores))
    config = PlanConfig(criterion=criterion, remove=remove, **settings)
    place = None if model is None else str(model)
    return (
        make_plan(loaded, config, model=place)
        if budget is None
        else choose_plan(loaded, config, budget, model=place)[0]
    )


def apply(model: Place, plan: "Plan | Place", out: Place, *, overwrite: bool = False) -> Path:
    """Cut a model by a plan.

    >>> llmprune.apply("base", by_depth, "smaller")
    PosixPath('smaller')

    Args:
        model: a Hugging Face folder or hub name.
        plan: the plan, or its file.
        out: the folder to write: a plain Hugging Face checkpoint.
        overwrite: whether ``out`` may be replaced, if llmprune made it.

    Returns:
        The folder.

    Raises:
        UserError: the plan is for other weights, a file is missing or damaged, or ``out`` exists.
    """
    from llmprune.conversion.commands import apply as apply_plan

    apply_plan(model, plan, out, overwrite=overwrite)
    return Path(out)


def train(job: "Config | Place", overrides: Sequence[str] = (), *, callbacks: "Sequence[Callback]" = ()) -> "Trainer":
    """Run a job that trains, as ``composer train.py`` does: pruning by gates, replacing blocks, recovery.

    >>> trainer = llmprune.train("continue.yaml", ["model.path=smaller", "run.folder=recover"])
    >>> trainer.state.timestamp.batch.value
    4

    Args:
        job: a YAML, or what ``llmprune.load_job`` made of one.
        overrides: of a YAML: ``section.key=value``.
        callbacks: further Composer callbacks.

    Returns:
        Composer's trainer, closed; the run folder holds what came out.

    Raises:
        UserError: something in the YAML does not fit; nothing is written then.
    """
    from llmprune.config.job_files import load_training_job, training_job
    from llmprune.jobs.train import train as run

    if isinstance(job, str | Path):
        return run(load_training_job(job, overrides), callbacks)
    if overrides:
        raise UserError("overrides are of a YAML: change the config itself")
    return run(training_job(job), callbacks)


def convert(checkpoint: Place, out: Place, *, dtype: str | None = None, overwrite: bool = False) -> Path:
    """Turn a checkpoint (with gates, a replacement module or adapters, if it has any) into a Hugging Face folder.

    >>> llmprune.convert("recover", "recovered")
    PosixPath('recovered')

    Args:
        checkpoint: a Composer checkpoint of llmprune's, or the folder of its run.
        out: the folder to write.
        dtype: of the weights written: float32, bfloat16 or float16; None = as trained.
        overwrite: whether ``out`` may be replaced, if llmprune made it.

    Returns:
        The folder.

    Raises:
        UserError: there is no checkpoint, it is damaged, or ``out`` exists.
    """
    import torch

    from llmprune.conversion.commands import convert as convert_checkpoint

    convert_checkpoint(checkpoint, out, dtype=None if dtype is None else getattr(torch, dtype), overwrite=overwrite)
    return Path(out)


def verify(a: Place, b: Place, *, plan: "Plan | Place | None" = None) -> "Difference":
    """Compare the logits of two models on the same random tokens, in float32.

    >>> llmprune.verify("base", "smaller", plan=by_depth).max_rel < 1e-5
    True

    Args:
        a: a Hugging Face folder or hub name, or a checkpoint (gated or not).
        b: another one.
        plan: leave out of ``a`` what this plan removes, without cutting.

    Returns:
        The largest difference, the same as a share of the largest logit, and the mean.

    Raises:
        UserError: a model can't be opened, or the vocabularies differ.
    """
    from llmprune.conversion.verify import verify as compared
    from llmprune.plans.plan import Plan

    loaded = plan if plan is None or isinstance(plan, Plan) else Plan.load(str(plan))
    return compared(str(a), str(b), loaded)


def evaluate(
    models: Place | Sequence[Place],
    *,
    perplexity: Place | Sequence[Place] = (),
    segment: int | None = None,
    bos: "Sequence[BosMode] | None" = None,
    perplexity_tokens: int | None = None,
    like: Literal["shortened"] | None = None,
    tasks: Sequence[str] = (),
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | Literal["auto"] = 8,
    dtype: "InferenceFormat" = "auto",
    device: "Device | None" = None,
) -> dict[str, Any]:
    """Measure perplexity and tasks of one or several models.

    >>> results = llmprune.evaluate(["base", "recovered"], perplexity="text", segment=32)
    >>> sorted(results["models"])
    ['base', 'recovered']

    Args:
        models: Hugging Face folders or hub names.
        perplexity: text, Markdown, JSON lines or prepared data to measure perplexity on.
        segment: tokens of a segment of it; None = as many as all models take, at most 2,048.
        bos: where a BOS token is put: ``none``, ``once``, ``each``, or several of them; None = what the tokenizer does
            with a text, once or none.
        perplexity_tokens: tokens at the start of each text that are measured; None = all.
        like: ``shortened`` = as the code of Shortened LLaMA measures perplexity: lines are joined by blank lines, the
            rest after the last whole segment is left out; segments of 128 tokens, BOS once and each, unless given.
        tasks: tasks of lm-eval, or suites.
        num_fewshot: examples in the prompt; None = the tasks' own.
        limit: questions of each task, or a share below 1; None = all.
        batch_size: samples per forward pass, or ``auto``.
        dtype: of the weights: float32, bfloat16, float16; auto = bfloat16 where it is fast, else float32.
        device: cpu or gpu; None = what is there.

    Returns:
        What results.json holds: ``{"schema": 1, "models": {MODEL: {"perplexity": …, "tasks": …}}}``.

    Raises:
        UserError: something is impossible; as far as it can be known, before any model is opened.
    """
    from llmprune.evaluation.evaluate import evaluate as evaluate_models
    from llmprune.evaluation.settings import EvaluationConfig, PerplexityConfig, TasksConfig
    from llmprune.models.placement import Placement

    config = EvaluationConfig(
        _listed(perplexity),
        PerplexityConfig(segment, bos=bos, tokens=perplexity_tokens, like=like),
        TasksConfig(list(tasks), num_fewshot, limit),
        batch_size=batch_size,
    )
    return evaluate_models(_listed(models), config, Placement(dtype, device))


def measure(
    models: Place | Sequence[Place],
    *,
    batch_sizes: Sequence[int] = (1,),
    prompt_tokens: Sequence[int] = (16,),
    output_tokens: Sequence[int] = (128,),
    warmups: int = 10,
    repeats: int = 20,
    seed: int = 17,
    dtype: "InferenceFormat" = "auto",
    device: "Device | None" = None,
) -> dict[str, Any]:
    """Measure latency, throughput, memory and operations; several models run in turns.

    >>> speed = llmprune.measure(["base", "smaller"], output_tokens=[4], warmups=0, repeats=2)
    >>> speed["models"]["smaller"]["parameters"] < speed["models"]["base"]["parameters"]
    True

    Args:
        models: Hugging Face folders or hub names; ratios are against the first.
        batch_sizes: sequences at a time.
        prompt_tokens: lengths of the prompt.
        output_tokens: lengths of the output, which is forced; none = prefill only.
        warmups: runs before those that count.
        repeats: runs that count.
        seed: of the random prompts.
        dtype: of the weights: float32, bfloat16, float16; auto = bfloat16 where it is fast, else float32.
        device: cpu or gpu; None = what is there.

    Returns:
        What speed.json holds.

    Raises:
        UserError: something is impossible.
    """
    from llmprune.measurement.measure import MeasureConfig
    from llmprune.measurement.measure import measure as measure_models
    from llmprune.models.placement import Placement

    config = MeasureConfig(batch_sizes, prompt_tokens, output_tokens, warmups, repeats, seed)
    return measure_models(_listed(models), config, Placement(dtype, device))[0]


def report(runs: Place | Sequence[Place], out: Place, *, plots: Place | None = None, overwrite: bool = False) -> Path:
    """Write one self-contained page that begins with what pruning gained and cost; then texts, plans, curves, scores.

    >>> llmprune.report(["recover", "smaller"], "report.html")
    PosixPath('report.html')

    Args:
        runs: run folders, models, plans, scores, results, speeds, continuations, or folders that hold several.
        out: the page to write (.html).
        plots: a folder for every figure as PNG and CSV; None = no files.
        overwrite: whether ``out`` and ``plots`` may be replaced.

    Returns:
        The page.

    Raises:
        UserError: there is nothing to report, or ``out`` exists.
    """
    from llmprune.reporting.page import write_report
    from llmprune.utils.outputs import check_output

    check_output(out, ".html", overwrite)
    write_report(_listed(runs), str(out), plots=None if plots is None else str(plots), overwrite=overwrite)
    return Path(out)


def _listed(places: Place | Sequence[Place]) -> list[str]:
    return [str(place) for place in ([places] if isinstance(places, str | Path) else places)]


def _text(value: object) -> str | None:
    return None if value is None else str(value)
