"""Ways to prune and to recover the built-in model, side by side: the losses of each, measured alike.

    python studies/prose.py --out runs/ladder/text/prose
    python studies/ladder.py --wikitext WIKITEXT [--tasks FOLDER] [CELL…]      what is missing is made and measured
    python studies/ladder.py --table [CELL…]                                  the table of what is there

WIKITEXT is WikiText-2's test file, FOLDER has the lm-eval tasks piqa_local, arc_easy_local and openbookqa_local. CELL
is a pattern such as ``'blocks/0.75/*'``; a model that is needed for others is made with them. Calibration and recovery
see the built-in corpus and, if it is there, prose; no WikiText.

Each cell is a model. It is made in a process of its own, and what was measured of it is kept in studies/ladder.json.
Cells that are there are not made again.
"""

import argparse
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import llmprune
from data_prep.builtin import build_corpus
from data_prep.pack import prepare
from data_prep.recipe import PackSettings
from data_prep.reencode import reencode
from llmprune.conversion.from_gguf import from_gguf
from llmprune.data.prepared import PreparedData
from llmprune.evaluation.evaluate import evaluate
from llmprune.evaluation.losses import evaluate_losses
from llmprune.evaluation.settings import EvaluationConfig, PerplexityConfig, TasksConfig
from llmprune.jobs.prune.recipe import batch_tokens
from llmprune.models.loaded import open_model
from llmprune.models.loading import load_tokenizer
from llmprune.models.placement import Placement
from llmprune.models.retold import Spelling
from llmprune.plans.plan import Plan
from llmprune.pruning.scoring.all_criteria import CRITERIA
from llmprune.pruning.scoring.scores import Scores
from llmprune.utils.files import read_json, write_json
from llmprune.utils.outputs import remove

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "studies" / "ladder.json"
LENGTH = 512  # tokens of a sample
CALIBRATION = 32  # samples
MEGABYTES = 8.0  # of the built-in corpus
HELD_OUT = 8  # samples of each domain
WIKITEXT = {512: 32_768, 2048: 16_384}  # tokens of WikiText-2, by the length of its segments
TASKS = ("piqa_local", "arc_easy_local", "openbookqa_local")
LIMIT = 3 * 3600  # seconds of a cell
BLOCKS = {"0.9": 4, "0.75": 10, "0.5": 19}  # blocks of 30 that go, so that at most this share of all parameters stays
TWO_STAGES = {"0.9": (26, 1344), "0.75": (22, 1024), "0.5": (14, 512)}  # attentions of 30, channels of 1,536
VOCABULARY = 24_576  # tokens of 49,152 that stay
CHANNELS = {"0.9": 1272, "0.75": 832}  # channels of 1,536 that stay, likewise


@dataclass(frozen=True)
class Work:
    """The folder of everything that is made, and the samples that everything is made with."""

    folder: Path

    @property
    def model(self) -> Path:
        """The source model."""
        if not (self.folder / "smollm2").exists():
            from_gguf(None, self.folder / "smollm2")
        return self.folder / "smollm2"

    @property
    def data(self) -> Path:
        """Prepared data: the built-in corpus's domains, and prose if it is there."""
        data, text = self.folder / "data", self.folder / "text"
        if not data.exists():
            if not (text / "builtin").exists():
                build_corpus(text / "builtin", megabytes=MEGABYTES)
            domains = [str(folder) for folder in (*(text / "builtin").iterdir(), text / "prose") if folder.is_dir()]
            prepare(domains, str(self.model), data, PackSettings(LENGTH, eval_fraction=0.05), processes=2)
        return data

    @property
    def scores(self) -> Scores:
        """The source's scores by every criterion."""
        path = self.folder / "scores" / "scores.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            criteria = [name for name in CRITERIA if not CRITERIA[name].needs_experts]
            llmprune.score(self.model, self.data, criteria=criteria, samples=CALIBRATION, seq_len=LENGTH).save(path)
        return Scores.load(path)

    def text(self, wikitext: str, tokens: int) -> tuple[Path, int]:
        """A file with the text of WikiText-2's first tokens, and how many tokens of the source it has."""
        path, tokenizer = self.folder / f"wikitext-{tokens}.txt", load_tokenizer(self.model)
        if not path.exists():
            whole = tokenizer(Path(wikitext).read_text(encoding="utf-8"), verbose=False)["input_ids"]
            path.write_text(tokenizer.decode(whole[:tokens], clean_up_tokenization_spaces=False), encoding="utf-8")
        return path, len(tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"])

    def kept(self, name: str | None) -> tuple[int, ...] | None:
        """The source's tokens that a cell's model kept; None = all, or there is no such cell."""
        plan = None if name is None else self.cell(name) / "model" / "llmprune" / "plan.json"
        return None if plan is None or not plan.exists() else Plan.load(plan).vocabulary

    def data_of(self, name: str | None) -> Path:
        """The prepared data in the tokens of a cell's model."""
        kept = self.kept(name)
        if name is None or kept is None:
            return self.data
        place = self.folder / f"data-{len(kept)}"
        if not place.exists():
            reencode(self.data, self.cell(name) / "model", place, processes=2)
        return place

    def cell(self, name: str) -> Path:
        """The folder of a cell."""
        return self.folder / "cells" / name.replace(" ", "_")


@dataclass(frozen=True)
class Cell:
    """A model of the ladder.

    Attributes:
        name: its name.
        make: makes it, as a Hugging Face folder, and returns how many tokens were read for it.
        parent: the cell that it begins with; None = the source.
    """

    name: str
    make: Callable[[Work, Path], int]
    parent: str | None = None


def cut(name: str, **settings: Any) -> Cell:
    """A cell that a plan from the scores cuts."""

    def make(work: Work, out: Path) -> int:
        plan = llmprune.plan(work.scores, model=work.model, **settings)
        llmprune.apply(work.model, plan, out)
        return CALIBRATION * LENGTH

    return Cell(name, make)


def trained(name: str, yaml: str, model: str | None, tokens: int, *overrides: str, rounds: int = 1) -> Cell:
    """A cell that a job of ``yamls`` trains for a number of tokens, in one run or in rounds with as many tokens."""

    def make(work: Work, out: Path) -> int:
        batch = batch_tokens(tokens / rounds)
        batches = round(tokens / rounds / batch)
        llmprune.train(
            ROOT / "yamls" / f"{yaml}.yaml",
            [
                f"model.path={work.model if model is None else work.cell(model) / 'model'}",
                f"data.path={work.data_of(model)}",
                f"run.folder={out.parent / 'run'}",
                "run.autoresume=true",
                "scheduler.warmup=0.1dur",
                f"train.duration={batches}ba",
                f"train.global_batch_size={batch // LENGTH}",
                f"train.global_batch_tokens={batch}",
                "train.microbatch_size=4",
                "train.eval_interval=1dur",
                "checkpoint.interval=1dur",
                "data.eval_samples_per_domain=1",
                *(override.replace("SOURCE", str(work.model)) for override in overrides),
            ],
        )
        if rounds > 1:
            shutil.copytree(out.parent / "run" / "model", out)
        else:
            llmprune.convert(out.parent / "run", out)
        return rounds * batches * batch

    return Cell(name, make, model)


def depth() -> Iterable[Cell]:
    """Blocks that go by every criterion; with "+" the first four and the last two blocks stay."""
    for size, gone in BLOCKS.items():
        for criterion in (
            "block_influence", "relative_magnitude", "magnitude_l1", "magnitude_l2", "taylor", "taylor_signed",
            "taylor_entropy", "perplexity", "tail", "random",
        ):  # fmt: skip
            yield cut(f"blocks/{size}/{criterion}", criterion=criterion, remove=gone)
        for criterion in ("block_influence", "magnitude_l1", "magnitude_l2", "taylor", "taylor_signed", "perplexity"):
            protected = {"protect_first": 4, "protect_last": 2}
            yield cut(f"blocks/{size}/{criterion}+", criterion=criterion, remove=gone, **protected)
        for criterion in ("cosine", "angular"):
            yield cut(f"blocks/{size}/span by {criterion}", criterion=criterion, method="span", remove=gone)
        yield cut(f"blocks/{size}/pairs of sub-layers", method="sublayers", remove=gone)
        yield cut(f"blocks/{size}/iterative", criterion="block_influence", method="iterative", remove=gone)
        yield cut(f"blocks/{size}/greedy", method="greedy", remove=gone)


def width() -> Iterable[Cell]:
    """Channels that go by every criterion, with refit and without."""
    for size, kept in CHANNELS.items():
        for criterion in (
            "unit_taylor", "unit_taylor_entropy", "unit_activation_l2", "unit_magnitude_l2", "unit_random",
        ):  # fmt: skip
            shape = {"intermediate": kept}
            yield cut(f"channels/{size}/{criterion}", unit_criterion=criterion, shape=shape)
            refit = {"correction": "refit", "force": True}
            yield cut(f"channels/{size}/{criterion} refit", unit_criterion=criterion, shape=shape, **refit)


def two_stages() -> Iterable[Cell]:
    """Channels by the norm of their outputs, then whole attentions by the loss, as in 2SSP."""
    for size, (attentions, channels) in TWO_STAGES.items():
        shape = {"intermediate": channels, "attention_layers": attentions}
        for criterion in ("unit_activation_l2", "unit_taylor"):
            yield cut(f"channels and attentions/{size}/{criterion}", unit_criterion=criterion, shape=shape)


def vocabulary() -> Iterable[Cell]:
    """Half of the tokens go, and as many channels as the size wants beside them."""
    shape = {"vocabulary": VOCABULARY}
    yield cut("tokens/0.9/24576", shape=shape)
    narrow = {"shape": {**shape, "intermediate": 1160}, "unit_criterion": "unit_taylor"}
    yield cut("tokens/0.75/24576 and channels", **narrow)
    yield cut("tokens/0.75/24576 and channels refit", correction="refit", force=True, **narrow)


def replaced(tokens: int) -> Iterable[Cell]:
    """Spans whose place one light network takes, so that as many parameters stay as without ten blocks."""
    words = f"{tokens / 1e6:g}M"
    for objective in ("mse", "lm", "kl"):
        settings = ("block_replacement.length=11", f"block_replacement.objectives={{{objective}: 1.0}}")
        yield trained(f"span/0.75/block by {objective} {words}", "replace", None, tokens, *settings)
    for kind in ("none", "closed_form", "linear"):
        fit = ("block_replacement.length=10", f"block_replacement.kind={kind}", "block_replacement.force=true")
        yield trained(f"span/0.75/{kind}", "replace", None, 0, *fit)


_BOTH = "distillation={teacher: SOURCE, objectives: {kl: 1.0, lm: 0.5}}"


def gradual(tokens: int) -> Iterable[Cell]:
    """Channels that go while the model trains: in three rounds with recovery between, or by learned gates."""
    words, channels = f"{tokens / 1e6:g}M", CHANNELS["0.75"]
    scored = (
        "iterate.rounds=3", f"plan={{unit_criterion: unit_taylor, shape: {{intermediate: {channels}}}}}",
        f"layer_scoring.data.samples={CALIBRATION}",
    )  # fmt: skip
    yield trained(f"rounds/0.75/{words}, KL + 0.5 text", "iterate", None, tokens, *scored, _BOTH, rounds=3)
    for words_of, target in (
        ("channels", f"l0_pruning={{target: {{intermediate: {channels}}}}}"),
        ("size", "l0_pruning={target_sparsity: 0.316}"),
    ):
        yield trained(f"gates/0.75/{words_of} {words}", "prune", None, tokens, target, "distillation={}")


RECOVERIES = {
    "text": ("continue",),
    "KL": ("continue", "distillation={teacher: SOURCE}"),
    "KL + 0.5 text": ("continue", _BOTH),
    "KL + 0.5 text, lr 1e-4": ("continue", _BOTH, "optimizer.lr=1e-4"),
    "KL + 0.5 text, lr 1e-3": ("continue", _BOTH, "optimizer.lr=1e-3"),
    "states, then KL + 0.5 text": (
        "continue",
        "distillation={teacher: SOURCE, objectives: {mse: 1.0}, final_objectives: {kl: 1.0, lm: 0.5}}",
    ),
    "blocks alone, then KL + 0.5 text": (
        "continue",
        "distillation={teacher: SOURCE, objectives: {local: 1.0}, final_objectives: {kl: 1.0, lm: 0.5}}",
    ),
    "last three": ("continue", "trainable={parameters: [final_norm, last.3]}"),
    "LoRA": ("finetune",),
    "LoRA, KL + 0.5 text": ("finetune", _BOTH),
}


def recovered(parents: Iterable[str], tokens: int) -> Iterable[Cell]:
    """Each of the models, recovered in every way."""
    for parent in parents:
        for way, (yaml, *overrides) in RECOVERIES.items():
            yield trained(f"recovered/{tokens / 1e6:g}M/{parent}/{way}", yaml, parent, tokens, *overrides)


def ladder() -> dict[str, Cell]:
    """All cells, by name."""
    two = ("blocks/0.75/block_influence", "channels/0.75/unit_taylor refit")
    yaml, *overrides = RECOVERIES["KL + 0.5 text"]
    cells = [
        Cell("source", lambda work, out: _link(work.model, out)),
        *depth(),
        *width(),
        *two_stages(),
        *vocabulary(),
        *replaced(50_000),
        *gradual(50_000),
        *recovered(two, 50_000),
        *recovered(two, 250_000),
        trained("recovered/0.1M/tokens/0.9/24576/KL + 0.5 text", yaml, "tokens/0.9/24576", 100_000, *overrides),
    ]
    return {cell.name: cell for cell in cells}


def _link(model: Path, out: Path) -> int:
    out.symlink_to(model.resolve())
    return 0


def make(cell: Cell, cells: dict[str, Cell], work: Work) -> dict[str, Any]:
    """Make the model of a cell, unless it is there; tokens and seconds that it took."""
    folder = work.cell(cell.name)
    known = folder / "made.json"
    if not known.exists():
        if cell.parent is not None:
            make(cells[cell.parent], cells, work)
        remove(folder / "model")
        folder.mkdir(parents=True, exist_ok=True)
        _ = work.scores  # not in the cell's time
        start = time.perf_counter()
        tokens = cell.make(work, folder / "model")
        write_json(known, {"tokens": tokens, "seconds": time.perf_counter() - start})
    return dict(read_json(known))


def perplexities(model: Path, work: Work, wikitext: str, kept: tuple[int, ...] | None) -> dict[str, Any]:
    """Perplexity of the start of WikiText-2, and held-out losses by domain; all per token of the source."""
    found: dict[str, Any] = {}
    for segment, tokens in WIKITEXT.items():
        path, count = work.text(wikitext, tokens)
        (entry,) = evaluate([str(model)], EvaluationConfig([str(path)], PerplexityConfig(segment)), Placement())[
            "models"
        ].values()
        (text,) = entry["perplexity"].values()
        bits = text["bits_per_byte"]["bos_none"] * path.stat().st_size
        found[f"wikitext_{segment}"] = 2 ** (bits / count)
        found[f"bits_per_byte_{segment}"] = text["bits_per_byte"]["bos_none"]
        found["parameters"] = entry["parameters"]
    losses = evaluate_losses(
        open_model(str(model), Placement()).model,
        PreparedData(work.data),
        samples_per_domain=HELD_OUT,
        spelling=None if kept is None else Spelling.of(load_tokenizer(work.model), kept),
    )
    return {**found, "held_out": losses.loss, "domains": losses.domains}


def tasks(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Accuracies of the first questions of each task, with standard errors."""
    config = EvaluationConfig(tasks=TasksConfig(TASKS, limit=arguments.questions, include_path=arguments.tasks))
    (entry,) = evaluate([str(model)], config, Placement())["models"].values()
    return {"questions": arguments.questions, "tasks": entry["tasks"]}


def do(cell: Cell, cells: dict[str, Cell], work: Work, arguments: argparse.Namespace) -> None:
    """Make a cell, measure what is not known of it, and keep that."""
    known = results().get(cell.name, {})
    facts = {**make(cell, cells, work), **known}
    model = work.cell(cell.name) / "model"
    if "wikitext_512" not in facts:
        kept = work.kept(cell.name) or work.kept(cell.parent)
        facts |= perplexities(model, work, arguments.wikitext, kept)
    if arguments.tasks is not None and "tasks" not in facts:
        facts |= tasks(model, arguments)
    write_json(RESULTS, dict(sorted({**results(), cell.name: facts}.items())))
    if not any(other.parent == cell.name for other in cells.values()):
        remove(work.cell(cell.name))


def results() -> dict[str, dict[str, Any]]:
    """What is known of the cells, by name."""
    return read_json(RESULTS) if RESULTS.exists() else {}


def is_known(name: str, arguments: argparse.Namespace) -> bool:
    """Whether everything that is asked for was measured of a cell."""
    facts = results().get(name, {})
    return "wikitext_512" in facts and (arguments.tasks is None or "tasks" in facts)


def table(names: list[str]) -> str:
    """A row for every cell; lost nats are those of WikiText-2 in segments of 512 tokens."""
    found = results()
    source = math.log(found["source"]["wikitext_512"])
    lines = ["| model | parameters, M | tokens | seconds | WikiText-2, 512 | 2,048 | nats lost | held-out loss |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name in names:
        if facts := found.get(name):
            lost = math.log(facts["wikitext_512"]) - source
            size, shorter, longer = facts["parameters"] / 1e6, facts["wikitext_512"], facts["wikitext_2048"]
            cells = (
                f"`{name}`", f"{size:.1f}", f"{facts['tokens']:,}", f"{facts['seconds']:.0f}",
                f"{shorter:.1f}", f"{longer:.1f}", f"{lost:.3f}", f"{facts['held_out']:.3f}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Make and measure what is missing, each cell in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", default=["*"], metavar="CELL", help="patterns of names")
    parser.add_argument("--out", type=Path, default=Path("runs/ladder"), help="folder of models and data")
    parser.add_argument("--wikitext", help="WikiText-2's test file")
    parser.add_argument("--tasks", help="folder with task files; none = no tasks")
    parser.add_argument("--questions", type=int, default=300, help="of each task")
    parser.add_argument("--table", action="store_true", help="print what is known")
    parser.add_argument("--list", action="store_true", help="print the names of the cells")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cells, work = ladder(), Work(arguments.out)
    names = [name for name in cells if any(fnmatch(name, pattern) for pattern in arguments.cells)]
    if arguments.list:
        print("\n".join(names))
    elif arguments.table:
        print(table(names))
    elif arguments.one:
        do(cells[names[0]], cells, work, arguments)
    else:
        if arguments.wikitext is None:
            parser.error("--wikitext is missing")
        arguments.out.mkdir(parents=True, exist_ok=True)
        given = [word for word in sys.argv[1:] if word not in arguments.cells]
        for place, name in enumerate(missing := [name for name in names if not is_known(name, arguments)]):
            start = time.perf_counter()
            command = [sys.executable, __file__, *given, "--one", name]
            with (arguments.out / "log.txt").open("a") as log:
                try:
                    subprocess.run(command, stdout=log, stderr=log, timeout=LIMIT, check=True)
                    what = f"perplexity {results()[name]['wikitext_512']:.1f}"
                except subprocess.SubprocessError as error:
                    what = str(error)
            print(f"{place + 1} of {len(missing)}: {name}: {what}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
