"""The whole way from a model to a smaller, recovered and measured one.

Layout of the folder::

prune.json                     the settings, and hashes of what is read
text/ data/                    training text (built-in or self-written) and prepared data, unless they were given
score.yaml scores/             the job that scores the source model
plan.json candidates.json      what goes, and the ways that were compared
gates.yaml gates/              the job that prunes by gates, with ``method: gates``, instead of the scores
pruned/                        the smaller model
retold/                        the data for its tokens, if it has fewer
recover.yaml recover/          the job that recovers it
model/                         the result
results.json speed.json        held-out losses and speed of source, pruned and recovered model
continuations/ report.html     what the three write, and everything in pictures
"""

import dataclasses
import gc
import math
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from data_prep.builtin import build_corpus
from data_prep.pack import prepare
from data_prep.parts import write_parts
from data_prep.recipe import PackSettings
from data_prep.reencode import reencode
from data_prep.sample import SampleConfig, sample
from llmprune.checkpoints.run_folder import RunFolder
from llmprune.config.job_files import load_job
from llmprune.conversion.commands import apply
from llmprune.data.calibration import LENGTH
from llmprune.data.format import EVAL, TRAIN, tokenizer_fingerprint
from llmprune.data.prepared import PreparedData
from llmprune.data.records import find_inputs
from llmprune.data.sources import Fields
from llmprune.evaluation.continuations import (
    Prompt,
    encode_prompts,
    read_prompts,
    save_continuations,
    write_continuations,
)
from llmprune.evaluation.losses import evaluate_losses
from llmprune.evaluation.settings import GenerationConfig
from llmprune.jobs.prune.comparison import compare_ways, held_out_samples
from llmprune.jobs.prune.outcome import FILES, Outcome, losses_entry
from llmprune.jobs.prune.recipe import (
    GATING,
    DataSize,
    calibration_samples,
    criteria_of,
    learning_from,
    sample_length,
    scoring_job,
    write_job,
    written_tokens,
)
from llmprune.jobs.prune.settings import MINUTES, SELF, PruneConfig
from llmprune.jobs.prune.steps import Steps
from llmprune.jobs.prune.training import Training
from llmprune.jobs.score import run_scoring
from llmprune.jobs.stages import asked_to_end, content_of
from llmprune.measurement.measure import MeasureConfig, measure
from llmprune.measurement.results import save
from llmprune.models.families import target_shape
from llmprune.models.loaded import ModelSource, find_model, open_model
from llmprune.models.loading import load_model_config
from llmprune.models.placement import Placement
from llmprune.models.retold import Spelling
from llmprune.models.source import longest_input
from llmprune.models.stored_weights import StoredWeights, fingerprint
from llmprune.plans.plan import Plan
from llmprune.pruning.budgets.limits import Latency, costs_of, limits_of
from llmprune.pruning.budgets.shape_sizes import ShapeSizes, of_size, prunable_dimensions
from llmprune.pruning.planning import default_device
from llmprune.pruning.scoring.scores import Scores
from llmprune.reporting.page import write_report
from llmprune.utils.errors import UserError
from llmprune.utils.files import read_json, sha256_text, write_json
from llmprune.utils.logs import tell
from llmprune.utils.outputs import (
    LOCK,
    LOG,
    MARK,
    clear,
    is_empty,
    output_folder,
    refuse_deleting,
    refuse_replacing,
    remove,
)
from llmprune.utils.processes import TERMINATION, Preempted
from llmprune.utils.ranks import init_distributed, on_rank_zero, share_cores
from llmprune.utils.recorded_settings import leaves

MEGABYTES = 8.0  # of the built-in corpus
EVAL_FRACTION = 0.1
HELD_OUT = 16  # evaluation samples per domain, at the end
JUDGED = 8  # evaluation samples per domain that compare plans
MANY_TOKENS = 0.1  # share of the parameters that belong to tokens, from which fewer tokens are suggested
AUTO = Placement()
SPEED = MeasureConfig((1, 8), output_tokens=(32,), warmups=1, repeats=5)
PROMPTS = (
    "The most important thing to know about the history of Rome is",
    "To cook a simple soup for four people, you first",
    "Plants need light and water because",
)


def prune(model: str, out: str | Path, config: PruneConfig, *, overwrite: bool = False) -> Outcome:
    """Make a model smaller, recover it and measure it; a stopped command goes on when it is called again.

    On several ranks (``composer -n 8 -m llmprune.cli prune …``) scoring and training are shared, the rest is done by
    rank 0.

    Args:
        model: folder or hub name of the model.
        out: folder to write.
        config: settings.
        overwrite: whether what llmprune made in ``out`` may be replaced if it was begun with other settings.

    Raises:
        UserError: a setting is impossible, or ``out`` holds something else.
    """
    job = _Prune(model, Path(out), config)
    share_cores()
    init_distributed(None)
    try:
        with TERMINATION.ending(asked_to_end), RunFolder(Path(out)).claimed(), redirect_stdout(sys.stderr):
            on_rank_zero(lambda: job.begin(overwrite))
            return job.run()
    except Preempted:
        raise Preempted("what is done is kept", "the same command goes on") from None


def check(model: str, out: str | Path, config: PruneConfig, *, overwrite: bool = False) -> None:
    """Check everything that can be known before any work; see ``prune``."""
    _Prune(model, Path(out), config).refuse_other(overwrite)


class _Prune:
    """The settings of one call, checked, and its steps."""

    def __init__(self, model: str, out: Path, config: PruneConfig) -> None:
        config.check()
        # Paths are settled here, so that it does not matter from where, and by which spelling, a job is continued.
        self._shown, self._out, self._model = out, out.resolve(), _settled(model)
        self._config = dataclasses.replace(
            config,
            data=config.data if config.data in (None, SELF) else _settled(config.data),
            prompts=None if config.prompts is None else _settled(config.prompts),
        )
        self._source: ModelSource = find_model(model, AUTO)
        self._model_config = load_model_config(self._source.folder)
        self._sizes = ShapeSizes(self._model_config)
        self._limits = limits_of(costs_of(config.budget, self._sizes, default_device()), self._sizes.source)
        self._check_budget()
        self._prepared = _prepared(self._config.data)
        self._check_data()
        self._prompts = [Prompt(text) for text in PROMPTS] if config.prompts is None else read_prompts(config.prompts)
        encode_prompts(self._prompts, self._source.tokenizer, _GENERATION.max_new_tokens, self._model_config)

    def _check_budget(self) -> None:
        """Refuse a budget that no model keeps to."""
        source, (_, _, inner) = self._sizes.source, prunable_dimensions(self._model_config)
        vocabulary = self._config.budget.vocabulary or source.vocabulary
        if vocabulary is not None:
            source = target_shape(source, {"vocabulary": vocabulary})
        smallest = of_size(source, {"layers": 1, "hidden": 1, "kv_heads": 1, inner: 1})
        for limit in self._limits:
            if not isinstance(limit, Latency) and (least := limit.cost(smallest, [0])) > limit.most:
                raise UserError(
                    f"the budget of {limit.name} is {limit.most:,.0f}, and even the smallest model takes {least:,.0f}: "
                    "write a share of the source's such as 0.75, or a number such as 1.3B (memory: 8GB)"
                )
        if self._config.method == "gates":
            self._sparsity()

    def _check_data(self) -> None:
        given, limit = self._config.data, longest_input(self._model_config)
        if given not in (None, SELF) and self._out.is_relative_to(str(given)):
            raise UserError(f"{self._out} lies in the data: choose another --out, which is no part of what is read")
        if self._prepared is not None:
            if "://" in str(given) and self._config.method != "gates":
                raise UserError(f"scoring reads from disk: copy {given} to a folder, or take --method gates")
            if tokenizer_fingerprint(self._source.tokenizer) != self._prepared.manifest.tokenizer:
                raise UserError(f"the tokenizer of {self._model} did not make the data in {given}: give its text")
            _check_splits(self._prepared, "prepare it with a larger --eval-fraction")
            if self._fewer_tokens and self._prepared.manifest.conversations:
                raise UserError(f"{given} holds conversations, which can't be encoded again: leave out --vocabulary")
            length = self._prepared.manifest.sequence_length
        else:
            length = self._length
            if given not in (None, SELF) and not Path(str(given)).exists():
                raise UserError(f"{given} does not exist")
        if limit is not None and length > limit:
            raise UserError(f"samples of {length} tokens are too long: {self._model} takes {limit}")

    @property
    def _fewer_tokens(self) -> bool:
        return self._config.budget.vocabulary not in (None, self._sizes.source.vocabulary)

    @property
    def _length(self) -> int:
        """The number of tokens of the samples that are made here."""
        return sample_length(self._config, self._model_config)

    def begin(self, overwrite: bool) -> None:
        """Make the folder, or check that it was begun with the same settings.

        Raises:
            UserError: the folder holds something else, or was begun with other settings.
        """
        if self.refuse_other(overwrite):
            return
        inputs = [self._model, self._config.data, self._config.prompts]
        refuse_replacing(self._out, [path for path in inputs if path])
        clear(self._out)
        write_json(self._out / "prune.json", self._identity())

    def refuse_other(self, overwrite: bool) -> bool:
        """Refuse a folder that holds something else; returns whether it holds a part of this job."""
        out, known, wanted = self._out, self._out / "prune.json", self._identity()
        refuse_deleting(out)
        before = _record(known) if known.is_file() else None
        if before == wanted:
            return True
        if before is None and not is_empty(out):
            raise UserError(f"{out} holds something else: choose another --out")
        nothing = before is None or all(path.name in (MARK, LOG, LOCK, known.name) for path in out.iterdir())
        if not nothing and not overwrite:
            raise UserError(
                f"{out} was begun with {_difference(before, wanted)}: choose another --out, or pass --overwrite to "
                "begin anew"
            )
        return False

    def _identity(self) -> dict[str, Any]:
        """What distinguishes this job from others: settings, and hashes of what is read, as far as they are known."""
        settings, inputs = dataclasses.asdict(self._config), {}
        for name in ("data", "prompts"):
            if (path := settings[name]) not in (None, SELF) and (content := _content(path)) is not None:
                settings[name], inputs[name] = None, content
        return {
            "schema": 1,
            "model": fingerprint(StoredWeights(self._source.folder), self._model_config),
            "settings": settings,
            "inputs": inputs,
        }

    def run(self) -> Outcome:
        """Do all steps that are not done yet."""
        out, steps = self._out, Steps(self._out)
        data = self._prepare(steps)
        if self._config.method == "gates":
            self._gate(steps, data)
        else:
            self._cut(steps, data)
        self._recover(steps, self._retold(steps, data))
        models = {self._model: "source", str(out / "pruned"): "pruned", str(out / "model"): "recovered"}
        steps.alone("held-out losses", out / "results.json", lambda: self._evaluate(data, list(models)))
        steps.alone("speed and memory", out / "speed.json", lambda: _measure(list(models), out / "speed.json"))
        steps.alone("continuations", out / "continuations", lambda: self._continue(models))
        steps.alone("report", out / "report.html", lambda: write_report([out], out / "report.html"))
        return on_rank_zero(lambda: Outcome.of(out, models, steps.seconds, self._shown))

    def _prepare(self, steps: Steps) -> str:
        """The prepared data: those that were given, or made here from text."""
        if self._prepared is not None:
            return str(self._config.data)
        data, text = self._out / "data", self._out / "text"
        inputs = [str(self._config.data)]
        if self._config.data is None:
            say = "no data were given: the built-in corpus, which is Python documentation and code, takes their place"
            on_rank_zero(lambda: tell(f"prune: {say}"))
            steps.alone("built-in corpus", text, lambda: build_corpus(text, megabytes=MEGABYTES))
            inputs = [str(text)]
        if self._config.data == SELF:
            inputs = [str(text)]
            written = text / SELF
            steps.together("text that the model writes", written, lambda: self._write_text(written))
        steps.alone("data", data, lambda: self._pack(inputs, data))
        return str(data)

    def _pack(self, inputs: list[str], data: Path) -> None:
        """Prepare the data from text; a single file is divided into parts first."""
        settings = PackSettings(self._length, eval_fraction=EVAL_FRACTION, seed=self._config.seed)
        parts, files = self._out / "parts", find_inputs(inputs)
        divide, fields = len(files) == 1 and files[0].is_text, Fields(self._config.text_field)
        try:
            if divide and not (part := parts / Path(files[0].name).stem).exists():
                write_parts(files[0], part)
            prepare([str(parts)] if divide else inputs, self._source.folder.path, data, settings, fields=fields)
            _check_splits(PreparedData(data), "give more text, in several files or records")
        except UserError:
            for place in (parts, data):  # so that nothing is lost when the command is called with other text
                remove(place)
            raise
        remove(parts)

    def _write_text(self, folder: Path) -> None:
        """Let the source model write the training text; all ranks share the work."""
        config = SampleConfig(written_tokens(self._config), self._length, seed=self._config.seed)
        sample(self._model, folder, config)

    def _cut(self, steps: Steps, data: str) -> None:
        """Score the model, compare the ways, and cut by the best plan."""
        out, names = self._out, criteria_of(self._config.method)
        size = DataSize.of(PreparedData(data))
        length = min(LENGTH, size.length)
        samples = calibration_samples(self._model_config, length, size.samples)
        job = scoring_job(self._model, data, names, out / "scores", samples=samples, seed=self._config.seed)
        on_rank_zero(lambda: write_job(out / "score.yaml", job, "Scores the source model."))
        scores = out / "scores" / "scores.json"
        steps.together("scores", scores, lambda: run_scoring(load_job(out / "score.yaml")))  # type: ignore[arg-type]
        steps.alone("plan", out / "plan.json", lambda: self._plan(Scores.load(scores), data))
        steps.alone("cut", out / "pruned", lambda: apply(self._model, out / "plan.json", out / "pruned"))

    def _retold(self, steps: Steps, data: str) -> str:
        """The prepared data in the tokens of the pruned model."""
        if not self._fewer_tokens:
            return data
        place = self._out / "retold"
        steps.alone("data for fewer tokens", place, lambda: reencode(data, self._out / "pruned", place))
        return str(place)

    def _plan(self, scores: Scores, data: str) -> None:
        """Write the best plan under the budget, and what it was compared with."""
        held_out = held_out_samples(PreparedData(data), JUDGED)
        found = compare_ways(scores, self._model, self._config.method, self._config.budget, held_out)
        write_json(self._out / "candidates.json", {"schema": 1, "candidates": found.rows, "chosen": found.chosen})
        found.plan.save(self._out / "plan.json")
        self._suggest_fewer_tokens()

    def _suggest_fewer_tokens(self) -> None:
        """Say that tokens may go too, if they are much of the model."""
        source, given = self._sizes.source, self._config.budget
        if source.vocabulary is None or given.vocabulary is not None or given.params is None:
            return
        whole = self._sizes.parameters(source)
        share = 1 - self._sizes.parameters(target_shape(source, {"vocabulary": 1})) / whole
        if share >= MANY_TOKENS:
            tell(
                f"prune:   {share:.0%} of the parameters belong to tokens; with --vocabulary {source.vocabulary // 2} "
                "those go that your text uses least, and more of the rest stays (docs/vocabulary.md)"
            )

    def _gate(self, steps: Steps, data: str) -> None:
        """Train gates to the number of parameters, and cut by them."""
        out = self._out
        sections = {"l0_pruning": {"target_sparsity": self._sparsity()}, **learning_from(None)}
        about = "Prunes by learned gates; the model with open gates is the teacher."
        self._train(steps, "gates", about, self._model, data, sections, GATING, out / "pruned", "prune")
        made = out / "pruned" / "llmprune" / "plan.json"
        steps.alone("plan", out / "plan.json", lambda: Plan.load(made).save(out / "plan.json"))

    def _sparsity(self) -> float:
        """The share of the blocks' parameters whose removal leaves the wanted number of parameters."""
        (limit,) = self._limits
        source = self._sizes.source
        whole = self._sizes.parameters(source)
        blocks = whole - self._sizes.parameters(dataclasses.replace(source, layers=0))
        if (share := (whole - limit.most) / blocks) >= 1:
            raise UserError("the budget is smaller than what lies outside the blocks, which gates do not remove")
        return round(share, 4)

    def _recover(self, steps: Steps, data: str) -> None:
        """Train the pruned model with the source as its teacher."""
        out, share = self._out, 1 - GATING if self._config.method == "gates" else 1.0
        about = "Recovers the pruned model, which learns from the source model and from the text."
        pruned, sections = str(out / "pruned"), learning_from(self._model)
        self._train(steps, "recover", about, pruned, data, sections, share, out / "model")

    def _train(
        self,
        steps: Steps,
        name: str,
        about: str,
        model: str,
        data: str,
        sections: dict[str, Any],
        share: float,
        result: Path,
        kind: str = "train",
    ) -> None:
        """Run a job that trains, for a share of the tokens or minutes."""
        size, tokens = DataSize.of(PreparedData(data)), self._config.wanted_tokens()
        training = Training(name, about, model, data, size, self._config.seed, sections, result, kind)
        training.run(
            steps,
            self._out,
            tokens=None if tokens is None else share * tokens,
            minutes=share * (self._config.minutes or MINUTES),
        )

    def _evaluate(self, data: str, models: list[str]) -> None:
        prepared, found, spelling = PreparedData(data), {}, None
        for model in models:
            opened = open_model(model, AUTO)
            if self._fewer_tokens and model != self._model:
                kept = Plan.load(self._out / "plan.json").vocabulary
                assert kept is not None
                spelling = Spelling.of(self._source.tokenizer, kept)
            losses = evaluate_losses(opened.model, prepared, samples_per_domain=HELD_OUT, spelling=spelling)
            if not math.isfinite(losses.loss):
                raise UserError(f"the held-out loss of {model} is {losses.loss}: this model can't be measured")
            found[model] = {
                "parameters": opened.parameters,
                "perplexity": losses_entry(losses, prepared.manifest.sequence_length),
            }
            del opened
            gc.collect()
        write_json(self._out / "results.json", {"schema": 1, "models": found})

    def _continue(self, models: dict[str, str]) -> None:
        """Write the continuations of every model, a file each."""
        with output_folder(self._out / "continuations") as folder:
            for model, name in models.items():
                opened = open_model(model, AUTO)
                records = write_continuations(
                    opened, self._prompts, dataclasses.replace(_GENERATION, seed=self._config.seed)
                )
                save_continuations(records, folder / f"{FILES[name]}.jsonl")
                del opened
                gc.collect()


_GENERATION = GenerationConfig(max_new_tokens=48)


def _prepared(data: str | None) -> PreparedData | None:
    """The prepared data that a path or URL names; None if it names text or nothing."""
    if data is None or data == SELF:
        return None
    return PreparedData(data) if "://" in data or (Path(data) / "manifest.json").is_file() else None


def _settled(place: str) -> str:
    """The absolute path of a file or folder; what is none (a hub name, a URL) is returned unchanged."""
    return str(Path(place).resolve()) if Path(place).exists() else place


def _content(path: str) -> str | None:
    """A hash of what lies at a path: see ``content_of``; of a folder of text, one of the files' names and sizes."""
    if (content := content_of(path)) is not None or not Path(path).is_dir():
        return content
    files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    return sha256_text("".join(f"{file.relative_to(path)} {file.stat().st_size}\n" for file in files))


def _check_splits(data: PreparedData, remedy: str) -> None:
    """Refuse data without training or evaluation samples."""
    for split, words in ((TRAIN, "training"), (EVAL, "evaluation")):
        if not data.domains_with(split):
            raise UserError(f"{data.location} has no {words} samples: {remedy}")


def _record(path: Path) -> Any:
    """What a folder was begun with; settings that came later have their defaults."""
    record = read_json(path)
    if isinstance(record, dict) and isinstance(settings := record.get("settings"), dict):
        defaults = dataclasses.asdict(PruneConfig())
        budget = settings.get("budget")
        record["settings"] = {**defaults, **settings}
        if isinstance(budget, dict):
            record["settings"]["budget"] = {**defaults["budget"], **budget}
    return record


def _difference(before: Any, now: dict[str, Any]) -> str:
    """The first setting in which a folder's record differs from the present settings."""
    was = before if isinstance(before, dict) else {}
    if was.get("model") != now["model"]:
        return "another source model"
    if was.get("inputs") != now["inputs"]:
        return "other contents of its data or prompts"
    old, new = (dict(leaves(one.get("settings", {}))) for one in (was, now))
    changed = next((key for key in sorted({*old, *new}) if old.get(key) != new.get(key)), None)
    return "other settings" if changed is None else f"{changed} = {old.get(changed)}"


def _measure(models: list[str], out: Path) -> None:
    found, watch = measure(models, SPEED, AUTO)
    save(found, watch, out)
