"""The job that searches for the best way to prune under a budget.

All candidates are compared by the loss of the pruned model on calibration samples. The best are cut, recovered on the
same tokens and compared again, because recovery changes the order (Minitron, arXiv:2407.14679, section 4). Short
recoveries may come first, after each of which the better half goes on (as in DarwinLM, arXiv:2502.07780). Layout of the
folder::

    scores.json                                              scores of every criterion, with pictures
    candidates.json                                          results of every candidate, updated during the job
    candidates/NN_NAME/plan.json pruned/ recover/ recovered/ one possible candidate; only the best have the last three
    candidates/NN_NAME/rung-1/                               its first short recovery, while it runs
    plan.json model/                                         plan and model of the winner
    table.md search.png search.csv                           comparison of all candidates
"""

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from composer.core import Time
from composer.utils import dist
from transformers import PretrainedConfig

from llmprune.checkpoints.run_folder import RunFolder
from llmprune.config.schema import SearchConfig
from llmprune.conversion.commands import apply
from llmprune.data.calibration import with_length
from llmprune.data.prepared import PreparedData
from llmprune.data.sources import clean_name
from llmprune.evaluation.losses import Losses, evaluate_losses
from llmprune.jobs.score import save_scores
from llmprune.jobs.stages import (
    asked_to_end,
    begin,
    calibration_of,
    check_pruning_job,
    check_scoring,
    keep_result,
    placement_of,
    recover,
    recovery_of,
    score_for,
    shortened,
)
from llmprune.models.families import Shape, shape_from
from llmprune.models.loaded import open_model
from llmprune.models.loading import load_model_config
from llmprune.models.source import longest_input
from llmprune.plans.plan import Plan
from llmprune.pruning.budgets.choose import NoShapeError, Steps
from llmprune.pruning.budgets.limits import Latency, Limit, costs_of, limits_of
from llmprune.pruning.budgets.plan_losses import RuinousPlanError
from llmprune.pruning.budgets.shape_sizes import ShapeSizes
from llmprune.pruning.budgets.trial import Trial, plan_hash
from llmprune.pruning.planning import (
    best_under,
    check_choice,
    default_device,
    describe,
    make_plan,
    open_scored,
    rehearse,
)
from llmprune.pruning.scoring.all_criteria import CRITERIA
from llmprune.pruning.scoring.criterion import ScoreSection
from llmprune.pruning.scoring.scores import Scores
from llmprune.pruning.selection.correction import check_tokens, most_inputs
from llmprune.pruning.selection.settings import OTHER_DATA
from llmprune.reporting.search_table import picture, search_table
from llmprune.training.checks import check
from llmprune.utils.errors import BrokenModelError, UserError
from llmprune.utils.files import read_json, write_json, write_text
from llmprune.utils.outputs import remove
from llmprune.utils.processes import TERMINATION
from llmprune.utils.progress import Progress
from llmprune.utils.ranks import init_distributed, on_rank_zero, share_cores

Row = dict[str, Any]

log = logging.getLogger(__name__)


def search(config: SearchConfig) -> None:
    """Run the job; a stopped job resumes with ``run.autoresume``.

    Raises:
        UserError: a setting does not fit, no candidate keeps to the budget, or the folder contains something else.
    """
    source = check_pruning_job(config)
    check_candidates(config, load_model_config(source))
    share_cores()
    init_distributed(config.train.device)
    with TERMINATION.ending(asked_to_end), RunFolder(Path(config.run.folder)).claimed():
        _search(config, source)


def _search(config: SearchConfig, source: str) -> None:
    folder = Path(config.run.folder)
    on_rank_zero(lambda: begin(config, "search"))
    if not (folder / "scores.json").exists():
        scores = score_for(config, source, config.search.scored(config.plan))
        on_rank_zero(lambda: save_scores(scores, folder / "scores.json"))
    job = _Job(config, source, folder)
    best = on_rank_zero(job.compare)
    on_rank_zero(lambda: job.cut(best))
    for rung, share in enumerate(config.search.rungs, start=1):
        best = _better_half(config, job, best, rung, share)
    for turn, number in enumerate(best, start=1):
        if dist.get_global_rank() == 0:
            print(f"candidate {turn} of {len(best)}: {job.words(number)}", flush=True)
        failed = None
        try:
            recover(config, job.place(number), name=job.run_name(number), seed=config.run.seed)
        except BrokenModelError as error:  # on all ranks; the other candidates are still recovered
            failed = str(error)
        on_rank_zero(lambda number=number, failed=failed: job.measure(number, failed))  # type: ignore[misc]
    on_rank_zero(job.finish)


def _better_half(config: SearchConfig, job: "_Job", numbers: list[int], rung: int, share: float) -> list[int]:
    """The better half of candidates after a recovery for a share of the tokens."""
    for number in numbers:
        _try_shortly(config, job, number, rung, share)
    return on_rank_zero(lambda: job.better_half(numbers, rung))


def _try_shortly(config: SearchConfig, job: "_Job", number: int, rung: int, share: float) -> None:
    """Recover a candidate for a share of the tokens, unless its loss after that is known."""
    if on_rank_zero(lambda: job.knows(number, rung)):
        return
    if dist.get_global_rank() == 0:
        print(f"rung {rung}: {job.words(number)}", flush=True)
    place, failed = job.place(number) / f"rung-{rung}", None
    try:
        recover(
            config,
            place,
            name=f"{job.run_name(number)}-rung-{rung}",
            seed=config.run.seed,
            pruned=job.place(number) / "pruned",
            share=share,
        )
    except BrokenModelError as error:
        failed = str(error)
    on_rank_zero(lambda: job.note_rung(number, rung, failed))


def check_candidates(config: SearchConfig, model: PretrainedConfig) -> None:
    """Check, before anything is scored, that every candidate is possible and that there is a budget.

    Raises:
        UserError: a candidate is impossible, or there is no budget.
    """
    settings, data = config.search, calibration_of(config)
    if settings.budget.vocabulary is not None:
        raise UserError(OTHER_DATA)
    names = settings.scored(config.plan)
    check_scoring(config, model, names)
    sizes = ShapeSizes(model)
    for candidate in settings.candidates(config.plan):
        plan = candidate.config
        plan.refuse_vocabulary()
        if candidate.under_budget:
            check_choice(plan)
            length = with_length(data, longest_input(model)).length
            assert length is not None
            check_tokens(most_inputs(sizes.source), plan.correction, data.samples, length)
            if plan.criterion is not None or plan.method != "lowest":
                rehearse(
                    replace(plan, remove=1, unit_criterion=None, expert_criterion=None, correction="none"),
                    names,
                    model,
                    data,
                )
            if plan.unit_criterion is not None:
                _check_units(plan.unit_criterion)
                Steps.of(sizes, settings.budget.multiple, 1, depth=False, width=True)
        else:
            rehearse(plan, names, model, data)
    _check_rungs(config)
    limits_of(costs_of(settings.budget, sizes, default_device()), sizes.source)


def _check_rungs(config: SearchConfig) -> None:
    """Refuse a warm-up that fills a short recovery: its candidates would be compared as they were cut."""
    warmup = Time.from_timestring(config.scheduler.warmup)
    for share in config.search.rungs:
        duration = Time.from_timestring(shortened(config.train.duration, share))
        if warmup.unit is duration.unit and warmup.value >= duration.value:
            raise UserError(
                f"scheduler.warmup {config.scheduler.warmup} is as long as the recovery of search.rungs {share:g} "
                f"({duration.to_timestring()}): write a share such as 0.03dur"
            )


def _check_units(name: str) -> None:
    if CRITERIA[name].section is not ScoreSection.UNITS or CRITERIA[name].needs_experts:
        raise UserError(f"search.unit_criteria: '{name}' does not score heads, channels and hidden dimensions")


class _Job:
    """The steps of rank 0, and the results of the candidates: one row of numbers for each."""

    def __init__(self, config: SearchConfig, source: str, folder: Path) -> None:
        self._config, self._settings, self._source, self._folder = config, config.search, source, folder
        self._candidates = self._settings.candidates(config.plan)
        self._sizes = ShapeSizes(load_model_config(source))
        self._known = folder / "candidates.json"
        self._costs = costs_of(self._settings.budget, self._sizes, default_device())
        self._limits = limits_of(self._costs, self._sizes.source)
        self._rows: list[Row] = read_json(self._known)["candidates"] if self._known.exists() else []

    def place(self, number: int) -> Path:
        """The folder of a candidate."""
        return self._folder / "candidates" / f"{number:02}_{clean_name(self._candidates[number].words)}"

    def words(self, number: int) -> str:
        """Description of a candidate: the criteria that decide, and the parts that are removed."""
        return self._candidates[number].words

    def run_name(self, number: int) -> str:
        """The name of the run that recovers the candidate."""
        return f"{self._config.run.name}-{number:02}"

    def compare(self) -> list[int]:
        """Plan every candidate, measure its costs and its loss; returns the numbers of the best.

        Raises:
            UserError: no candidate keeps to the budget.
        """
        remaining = range(len(self._rows), len(self._candidates))
        if remaining:
            scores = Scores.load(self._folder / "scores.json")
            trial = Trial(open_scored(scores, self._source))
            for number in Progress(remaining, desc="comparing", unit="candidates"):
                self._rows.append(self._row(number, scores, trial))
                self._save()
        possible = [row for row in self._rows if row.get("within") and row["same_as"] is None]
        ordered = sorted(
            (row for row in possible if _is_number(row["calibration_loss"])), key=lambda row: row["calibration_loss"]
        )
        best: list[int] = []
        for row in ordered:
            if len(best) < self._settings.best and self._is_as_fast(row):
                best.append(row["number"])
        if not best:
            reasons = {f"; {row['decided_by']}: {row['impossible']}" for row in self._rows if "impossible" in row}
            raise UserError(
                "no candidate keeps to the budget: let more go (search.remove, search.shapes), set "
                "search.under_budget=true, or raise search.budget" + "".join(sorted(reasons))
            )
        return best

    def _row(self, number: int, scores: Scores, trial: Trial) -> Row:
        candidate = self._candidates[number]
        row: Row = {"number": number, "decided_by": candidate.words}
        # Each candidate starts with a fresh copy of the timed latencies, because a search corrects its own table.
        fresh = [
            Latency(cost.table, self._settings.budget.latency) if isinstance(cost, Latency) else cost
            for cost in self._costs
        ]
        limits = limits_of(fresh, self._sizes.source)
        if candidate.under_budget:
            try:
                plan, choice = best_under(
                    limits, scores, candidate.config, trial, self._settings.budget, model=self._source
                )
            except (NoShapeError, RuinousPlanError) as error:  # blocks or width alone may not lead to the budget
                return {**row, "impossible": str(error)}
            if choice.measured is not None:
                row["measured_latency"] = choice.measured
        else:
            try:
                plan = make_plan(scores, candidate.config, model=self._source, trial=trial)
            except RuinousPlanError as error:
                return {**row, "impossible": str(error)}
        place = self.place(number)
        place.mkdir(parents=True, exist_ok=True)
        plan.save(place / "plan.json")
        content, blocks = plan_hash(plan), [block.attention for block in plan.blocks]
        within = all(limit.cost(plan.shape, blocks) <= limit.most for limit in limits)
        costs = {cost.name: cost.cost(plan.shape, blocks) for cost in fresh if not isinstance(cost, Latency)}
        return {
            **row,
            "content": content,
            "same_as": next(
                (o["number"] for o in self._rows if o.get("content") == content and o["within"] == within), None
            ),
            "goes": describe(plan),
            "shape": dataclasses.asdict(plan.shape),
            "parameters": int(costs["params"]),
            "memory_bytes": int(costs["memory"]),
            "latency": self._latency(fresh, plan.shape),
            "within": within,
            "calibration_loss": trial.loss(plan),
        }

    def _latency(self, costs: Sequence[Limit], shape: Shape) -> float | None:
        """Latency as a share of the source's, from the table; None if it is not limited and can't be timed."""
        latency = next(cost for cost in costs if isinstance(cost, Latency))
        try:
            return latency.cost(shape, ())
        except UserError:
            if latency in limits_of(costs, self._sizes.source):
                raise
            return None

    def _is_as_fast(self, row: Row) -> bool:
        """Whether a built model keeps to the latency limit, by a measurement; True if there is no limit."""
        limit = next((limit for limit in self._limits if isinstance(limit, Latency)), None)
        if limit is None:
            return True
        if "measured_latency" not in row:
            self._measure_latency(row)
        measured = row["measured_latency"]
        if measured is None:
            log.warning("there is no room to time %s beside its source: the table's latency counts", row["decided_by"])
        row["within"] = measured is None or limit.is_kept(measured)
        self._save()
        return bool(row["within"])

    def _measure_latency(self, row: Row) -> None:
        table = next(cost.table for cost in self._costs if isinstance(cost, Latency))
        row["measured_latency"] = table.measured(shape_from(row["shape"]), self._sizes.source)

    def cut(self, best: Sequence[int]) -> None:
        """Cut the best candidates, unless they are cut already, and check that each can be recovered.

        Raises:
            UserError: the settings do not fit a cut model.
        """
        for number in best:
            place = self.place(number)
            if not (place / "pruned").exists():
                apply(self._source, place / "plan.json", place / "pruned")
            if not (place / "recovered").exists():
                check(recovery_of(self._config, place, name=self.run_name(number), seed=self._config.run.seed))

    def knows(self, number: int, rung: int) -> bool:
        """Whether a candidate's loss after a short recovery is known."""
        return len(self._rows[number].get("rungs", ())) >= rung

    def note_rung(self, number: int, rung: int, failed: str | None) -> None:
        """Measure a candidate's held-out loss after a short recovery, and remove what that recovery made."""
        place = f"rung-{rung}"
        loss = math.inf if failed is not None else self._held_out(number, f"{place}/recovered").loss
        self._rows[number].setdefault("rungs", []).append(loss if math.isfinite(loss) else None)
        self._save()
        remove(self.place(number) / place)

    def better_half(self, numbers: Sequence[int], rung: int) -> list[int]:
        """The half of the candidates, rounded up, with the lower losses after a short recovery."""
        losses = {number: self._rows[number]["rungs"][rung - 1] for number in numbers}
        ordered = sorted((number for number in numbers if losses[number] is not None), key=lambda n: losses[n])
        if not ordered:
            share = self._settings.rungs[rung - 1]
            raise UserError(f"no candidate could be recovered, not even for the share {share} of train.duration")
        return ordered[: -(-len(numbers) // 2)]

    def measure(self, number: int, failed: str | None) -> None:
        """Measure a candidate's latency and its held-out losses, cut and recovered, unless they are known already."""
        row = self._rows[number]
        if failed is not None:
            row["failed"] = failed
            self._save()
            return
        row.pop("failed", None)  # from an earlier attempt
        if "recovered" in row:
            return
        found = self._held_out(number, "recovered")
        if not math.isfinite(found.loss):
            return self.measure(number, "the loss of the recovered model is no number")
        if "measured_latency" not in row:
            self._measure_latency(row)
        row["cut"] = dataclasses.asdict(self._held_out(number, "pruned"))
        row["recovered"] = dataclasses.asdict(found)
        self._save()
        return None

    def _held_out(self, number: int, folder: str) -> Losses:
        data = self._config.data
        return evaluate_losses(
            open_model(str(self.place(number) / folder), placement_of(self._config)).model,
            PreparedData(data.path, data.cache),
            samples_per_domain=data.eval_samples_per_domain,
            boundaries=data.document_boundaries,
        )

    def finish(self) -> None:
        """Choose the winner, and write and print the comparison of all candidates.

        Raises:
            UserError: no candidate could be recovered.
        """
        recovered = [row for row in self._rows if "recovered" in row]
        if not recovered:
            failed = next(row["failed"] for row in self._rows if "failed" in row)
            raise UserError(f"no candidate could be recovered; the first: {failed}")
        winner = min(recovered, key=lambda row: row["recovered"]["loss"])
        place = self.place(winner["number"])
        Plan.load(place / "plan.json").save(self._folder / "plan.json")
        keep_result(self._folder, place / "recovered")
        shown = search_table(self._rows)
        write_text(self._folder / "table.md", shown)
        picture(self._rows).save(self._folder)
        print(shown)
        print(f"the best: {winner['decided_by']} ({winner['goes']}); its plan is {self._folder}/plan.json")

    def _save(self) -> None:
        write_json(self._known, {"schema": 1, "model": self._source, "candidates": self._rows})


def _is_number(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)
