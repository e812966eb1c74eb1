"""The job of a scoring YAML: scores, pictures and plans in a run folder."""

import shutil
from pathlib import Path

from composer.utils import dist, get_device

from llmprune.config import ScoringConfig, save_config
from llmprune.errors import UserError
from llmprune.families import family_of
from llmprune.files import output_folder
from llmprune.models.loading import load_config
from llmprune.planning import SELECTIONS, make_plan
from llmprune.ranks import on_rank_zero, share_cores
from llmprune.score import Source, save_scores, score
from llmprune.scoring.scores import Scores
from llmprune.scoring.selection import PlansConfig


def run_scoring(config: ScoringConfig) -> Scores:
    """Run the job: the folder then holds ``scores.json``, its pictures, and a plan for each number asked for.

    Raises:
        UserError: something does not fit, or the folder holds something already.
    """
    model_config = load_config(config.model.path)
    layers = family_of(model_config).shape(model_config).layers
    if config.plan is not None:
        _check_plans(config.plan, config.layer_scoring.names(), layers)
    share_cores()
    dist.initialize_dist(get_device(config.model.device))
    folder = Path(config.run.folder)
    on_rank_zero(lambda: _check_folder(folder, config.run.overwrite))
    model = config.model
    source = Source(model.path, model.tokenizer, model.dtype, model.attention, model.device)
    scores = score(source, config.layer_scoring)
    on_rank_zero(lambda: _write(config, scores, folder))
    return scores


def _check_plans(plans: PlansConfig, criteria: list[str], layers: int) -> None:
    """Check what can be checked before scoring."""
    SELECTIONS.get(plans.method)
    if plans.criterion is not None and plans.criterion not in criteria:
        raise UserError(
            f"plan.criterion is {plans.criterion}, but layer_scoring.criteria has only {', '.join(criteria)}"
        )
    kept = (plans.protect_first or 0) + (plans.protect_last or 0)
    for count in plans.remove:
        if not 1 <= count < layers or count > layers - kept:
            raise UserError(f"plan.remove has {count}, but {layers - kept} of {layers} blocks can go")


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} holds something already: pass run.overwrite=true to delete it, or another run.folder"
        )
    if overwrite and folder.exists() and not (folder / "scores.json").is_file():
        raise UserError(f"{folder} holds something that is no scoring run: choose another run.folder")


def _write(config: ScoringConfig, scores: Scores, folder: Path) -> None:
    plans = {} if config.plan is None else config.plan.each()
    if folder.exists() and not config.run.overwrite:
        shutil.rmtree(folder)  # it is empty
    with output_folder(folder, overwrite=config.run.overwrite) as temporary:
        save_config(config, temporary / "config.yaml")
        save_scores(scores, temporary / "scores.json")
    for count, plan in plans.items():  # scores that took hours stay, whatever becomes of the plans
        make_plan(scores, plan).save(folder / f"plan-{count}.json")
    names = ["scores.json", *(f"plan-{count}.json" for count in plans)]
    print(f"{folder}: {', '.join(names)}")
