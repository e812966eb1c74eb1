"""The job of a scoring YAML: scores, pictures and plans in a run folder."""

import shutil
from pathlib import Path

from llmprune.config import ScoringConfig
from llmprune.errors import UserError
from llmprune.files import output_folder
from llmprune.job_files import save_config
from llmprune.models.loading import load_config
from llmprune.models.placement import Placement
from llmprune.planning import make_plan, rehearse
from llmprune.ranks import initialize_ranks, on_rank_zero, share_cores
from llmprune.score import save_scores, score
from llmprune.scoring.scores import Scores


def run_scoring(config: ScoringConfig) -> Scores:
    """Run the job: the folder then holds ``scores.json``, its pictures, and a plan for each number asked for.

    Raises:
        UserError: something does not fit, or the folder holds something already.
    """
    if config.plan is not None:
        model_config = load_config(config.model.path)
        names = config.layer_scoring.names(model_config)
        for plan in config.plan.each().values():
            rehearse(plan, names, model_config)
    share_cores()
    initialize_ranks(config.model.device)
    folder = Path(config.run.folder)
    on_rank_zero(lambda: _check_folder(folder, config.run.overwrite))
    model = config.model
    placement = Placement(model.dtype, model.device, attention=model.attention)
    scores = score(model.path, config.layer_scoring, placement, tokenizer=model.tokenizer)
    on_rank_zero(lambda: _write(config, scores, folder))
    return scores


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} holds something already: pass run.overwrite=true to delete it, or another run.folder"
        )
    if overwrite and folder.exists() and any(folder.iterdir()) and not (folder / "scores.json").is_file():
        raise UserError(f"{folder} holds something that is no scoring run: choose another run.folder")


def _write(config: ScoringConfig, scores: Scores, folder: Path) -> None:
    plans = {} if config.plan is None else config.plan.each()
    if folder.exists() and not config.run.overwrite:
        shutil.rmtree(folder)  # it is empty
    with output_folder(folder, overwrite=config.run.overwrite) as temporary:
        save_config(config, temporary / "config.yaml")
        save_scores(scores, temporary / "scores.json")
    for name, plan in plans.items():  # scores that took hours stay, whatever becomes of the plans
        make_plan(scores, plan).save(folder / name)
    names = ["scores.json", *plans]
    print(f"{folder}: {', '.join(names)}")
