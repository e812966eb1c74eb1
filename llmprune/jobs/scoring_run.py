"""The job of a scoring YAML: scores, pictures and plans in a run folder."""

from pathlib import Path

from llmprune.checkpoints.run_folder import RunFolder
from llmprune.config.job_files import save_config
from llmprune.config.schema import ScoringConfig
from llmprune.jobs.score import save_scores, score
from llmprune.models.loading import load_config
from llmprune.models.placement import Placement
from llmprune.pruning.planning import make_plan, rehearse
from llmprune.pruning.scoring.scores import Scores
from llmprune.utils.outputs import clear, refuse_replacing
from llmprune.utils.ranks import initialize_ranks, on_rank_zero, share_cores


def run_scoring(config: ScoringConfig) -> Scores:
    """Run the job: the folder then holds ``scores.json``, its pictures, and a plan for each number asked for.

    Raises:
        UserError: something does not fit, or the folder holds something already.
    """
    if config.plan is not None:
        model_config = load_config(config.model.path)
        names = config.layer_scoring.names(model_config)
        for plan in config.plan.each().values():
            rehearse(plan, names, model_config, config.layer_scoring.data)
    share_cores()
    initialize_ranks(config.model.device)
    run, model = RunFolder(Path(config.run.folder)), config.model
    with run.claimed():
        on_rank_zero(lambda: run.find(overwrite=config.run.overwrite, autoresume=False))
        inputs = (model.path, model.tokenizer, config.layer_scoring.data.path)
        refuse_replacing(run.path, [path for path in inputs if path and "://" not in path])
        placement = Placement(model.dtype, model.device, attention=model.attention)
        scores = score(model.path, config.layer_scoring, placement, tokenizer=model.tokenizer)
        on_rank_zero(lambda: _write(config, scores, run.path))
    return scores


def _write(config: ScoringConfig, scores: Scores, folder: Path) -> None:
    plans = {} if config.plan is None else config.plan.each()
    clear(folder)
    save_config(config, folder / "config.yaml")
    save_scores(scores, folder / "scores.json")
    for name, plan in plans.items():  # scores that took hours stay, whatever becomes of the plans
        make_plan(scores, plan).save(folder / name)
    names = ["scores.json", *plans]
    print(f"{folder}: {', '.join(names)}")
