"""The job that looks for the best way to prune under a budget.

Every candidate is compared by the loss that it leaves on calibration samples; the best are cut, recovered on the same
tokens and compared again, because recovery changes the order (Minitron, arXiv:2407.14679, section 4). The folder::

    scores.json                                              every criterion's, with pictures
    candidates.json                                          what is known of every candidate, as it becomes known
    candidates/NN_NAME/plan.json pruned/ recover/ recovered/ one that keeps to the budget; the last three of the best
    plan.json model/                                         the winner's
    table.md search.png search.csv                           all of them
"""

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PretrainedConfig

from llmprune.budgets.limits import Latency, costs_of, limits_of
from llmprune.budgets.sizes import Sizes
from llmprune.budgets.trial import Trial
from llmprune.checks import check
from llmprune.config import SearchConfig
from llmprune.convert.commands import apply
from llmprune.data.prepared import PreparedData
from llmprune.data.sources import clean_name
from llmprune.errors import UserError
from llmprune.evaluation.losses import evaluate_losses
from llmprune.families import shape_from
from llmprune.files import read_json, sha256_text, write_json, write_text
from llmprune.models.loading import load_config
from llmprune.models.opened import open_model
from llmprune.models.placement import Placement
from llmprune.planning import (
    best_under,
    check_choice,
    default_device,
    describe,
    make_plan,
    open_scored,
    rehearse,
)
from llmprune.plans import Plan
from llmprune.ranks import initialize_ranks, on_rank_zero, share_cores
from llmprune.report.search import picture, table
from llmprune.score import save_scores, score
from llmprune.scoring.scores import Scores
from llmprune.scoring.settings import LayerScoringConfig
from llmprune.stages import begin, keep_result, recover

Row = dict[str, Any]


def search(config: SearchConfig) -> None:
    """Run the job; one that was stopped goes on with ``run.autoresume``.

    Raises:
        UserError: something does not fit, no candidate keeps to the budget, or the folder holds something else.
    """
    source = config.model.path
    if source is None:
        raise UserError("search prunes a model: name it with model.path")
    for name in ("l0_pruning", "block_replacement"):
        if getattr(config, name) is not None:
            raise UserError(f"search prunes by scores: leave out {name}")
    check(config)
    check_candidates(config, load_config(source))
    share_cores()
    initialize_ranks(config.train.device)
    folder = Path(config.run.folder)
    on_rank_zero(lambda: begin(config, "search"))
    if not (folder / "scores.json").exists():
        scores = _score(config, source)
        on_rank_zero(lambda: save_scores(scores, folder / "scores.json"))
    job = _Job(config, source, folder)
    for number in on_rank_zero(job.compare):
        place = job.place(number)
        on_rank_zero(lambda place=place: job.cut(place))  # type: ignore[misc]
        recover(config, place, name=place.name, seed=config.run.seed)
        on_rank_zero(lambda number=number: job.measure(number))  # type: ignore[misc]
    on_rank_zero(job.finish)


def check_candidates(config: SearchConfig, model: PretrainedConfig) -> None:
    """See, before anything is scored, that every candidate is possible and that there is a budget.

    Raises:
        UserError: one is not.
    """
    settings = config.search
    names = settings.scored()
    for candidate in settings.candidates():
        if candidate.under_budget:
            check_choice(candidate.config)
        else:
            rehearse(candidate.config, names, model)
    sizes = Sizes(model)
    limits_of(costs_of(settings.budget, sizes, default_device()), sizes.source)


def _score(config: SearchConfig, source: str) -> Scores:
    settings = config.search
    data = replace(settings.calibration, path=settings.calibration.path or config.data.path)
    scoring = LayerScoringConfig(data, settings.scored(), settings.batch_size, seed=config.run.seed)
    placement = Placement(config.model.dtype, config.train.device, attention=config.model.attention)
    return score(source, scoring, placement, tokenizer=config.model.tokenizer)


class _Job:
    """What rank 0 does alone, and what is known of the candidates: a row of numbers for each."""

    def __init__(self, config: SearchConfig, source: str, folder: Path) -> None:
        self._config, self._settings, self._source, self._folder = config, config.search, source, folder
        self._candidates = self._settings.candidates()
        self._sizes = Sizes(load_config(source))
        self._known = folder / "candidates.json"
        self._costs = costs_of(self._settings.budget, self._sizes, default_device())
        self._limits = limits_of(self._costs, self._sizes.source)
        self._rows: list[Row] = read_json(self._known)["candidates"] if self._known.exists() else []

    def place(self, number: int) -> Path:
        """The folder of a candidate."""
        return self._folder / "candidates" / f"{number:02}_{clean_name(self._candidates[number].words)}"

    def compare(self) -> list[int]:
        """Plan every candidate, measure what it costs and loses; returns the numbers of the best.

        Raises:
            UserError: none keeps to the budget.
        """
        remaining = range(len(self._rows), len(self._candidates))
        if remaining:
            scores = Scores.load(self._folder / "scores.json")
            trial = Trial(open_scored(scores, self._source))
            for number in tqdm(remaining, desc="candidates", disable=None):
                self._rows.append(self._row(number, scores, trial))
                self._save()
        ordered = sorted(
            (row for row in self._rows if row.get("within") and row["same_as"] is None),
            key=lambda row: row["calibration_loss"],
        )
        best: list[int] = []
        for row in ordered:
            if len(best) < self._settings.best and self._is_as_fast(row):
                best.append(row["number"])
        if not best:
            raise UserError(
                "no candidate keeps to the budget: let more go (search.remove, search.shapes), set "
                "search.under_budget=true, or raise search.budget"
            )
        return best

    def _row(self, number: int, scores: Scores, trial: Trial) -> Row:
        candidate = self._candidates[number]
        row: Row = {"number": number, "decided_by": candidate.words}
        if candidate.under_budget:
            try:
                plan, _ = best_under(
                    self._limits, scores, candidate.config, trial, self._settings.budget, model=self._source
                )
            except UserError as error:  # blocks alone, or width alone, may not lead to the budget
                return {**row, "impossible": str(error)}
        else:
            plan = make_plan(scores, candidate.config, model=self._source, opened=trial.opened)
        place = self.place(number)
        place.mkdir(parents=True, exist_ok=True)
        plan.save(place / "plan.json")
        content = _content(plan)
        blocks = [block.attention for block in plan.blocks]
        costs = {cost.name: cost.cost(plan.shape, blocks) for cost in self._costs}
        return {
            **row,
            "content": content,
            "same_as": next((other["number"] for other in self._rows if other.get("content") == content), None),
            "goes": describe(plan),
            "shape": dataclasses.asdict(plan.shape),
            "parameters": int(costs["params"]),
            "memory_bytes": int(costs["memory"]),
            "latency": costs["latency"],
            "within": all(costs[limit.name] <= limit.most for limit in self._limits),
            "calibration_loss": trial.loss(plan),
        }

    def _is_as_fast(self, row: Row) -> bool:
        """Measure the latency of a built model, if there is a limit; whether it is kept."""
        limit = next((limit for limit in self._limits if isinstance(limit, Latency)), None)
        if limit is None:
            return True
        if "measured_latency" not in row:
            self._measure_latency(row)
        measured = row["measured_latency"]
        row["within"] = measured is None or limit.is_kept(measured)
        self._save()
        return bool(row["within"])

    def _measure_latency(self, row: Row) -> None:
        table = next(cost.table for cost in self._costs if isinstance(cost, Latency))
        row["measured_latency"] = table.measured(shape_from(row["shape"]), self._sizes.source)

    def cut(self, place: Path) -> None:
        """Cut a candidate, if that is not done yet."""
        if not (place / "pruned").exists():
            apply(self._source, place / "plan.json", place / "pruned")

    def measure(self, number: int) -> None:
        """The held-out losses of a recovered candidate, and its latency, if they are not known yet."""
        row = self._rows[number]
        if "recovered" in row:
            return
        data = self._config.data
        placement = Placement(self._config.model.dtype, self._config.train.device)
        found = evaluate_losses(
            open_model(str(self.place(number) / "recovered"), placement).model,
            PreparedData(data.path, data.cache),
            samples_per_domain=data.eval_samples_per_domain,
            boundaries=data.document_boundaries,
        )
        if "measured_latency" not in row:
            self._measure_latency(row)
        row["recovered"] = dataclasses.asdict(found)
        self._save()

    def finish(self) -> None:
        """Name the winner and show all."""
        recovered = [row for row in self._rows if "recovered" in row]
        winner = min(recovered, key=lambda row: row["recovered"]["loss"])
        place = self.place(winner["number"])
        Plan.load(place / "plan.json").save(self._folder / "plan.json")
        keep_result(self._folder, place / "recovered")
        shown = table(self._rows)
        write_text(self._folder / "table.md", shown)
        picture(self._rows).save(self._folder)
        print(shown)
        print(f"the best: {winner['decided_by']} ({winner['goes']}); its plan is {self._folder}/plan.json")

    def _save(self) -> None:
        write_json(self._known, {"schema": 1, "model": self._source, "candidates": self._rows})


def _content(plan: Plan) -> str:
    """The same for plans that leave the same."""
    corrections = sorted((name, tensor.double().sum().item()) for name, tensor in plan.corrections.items())
    return sha256_text(f"{plan.blocks} {plan.hidden} {corrections}")
