"""The models of the ladder: how each is made, and of which it is made."""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from work import CALIBRATION, LENGTH, Work

import llmprune
from llmprune.jobs.prune.recipe import batch_tokens

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = {"0.9": 4, "0.75": 10, "0.5": 19}  # blocks of 30 that go, so that at most this share of all parameters stays
CHANNELS = {"0.9": 1272, "0.75": 832}  # channels of 1,536 that stay, likewise
TWO_STAGES = {"0.9": (26, 1344), "0.75": (22, 1016), "0.5": (14, 504)}  # attentions of 30, channels of 1,536
MIXED = {
    "0.75": {3: 1024, 5: 1152, 7: 1312},
    "0.5": {9: 512, 13: 800, 16: 1088},
}  # channels that stay, by blocks that go
VOCABULARY = 24_576  # tokens of 49,152 that stay


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


def trained(
    name: str, yaml: str, model: str | None, tokens: int, *overrides: str, rounds: int = 1, own_text: bool = False
) -> Cell:
    """A cell that a job of ``yamls`` trains for a number of tokens, in one run or in rounds with as many tokens."""

    def make(work: Work, out: Path) -> int:
        batch = batch_tokens(tokens / rounds)
        batches = round(tokens / rounds / batch)
        llmprune.train(
            ROOT / "yamls" / f"{yaml}.yaml",
            [
                f"model.path={work.model if model is None else work.cell(model) / 'model'}",
                f"data.path={work.own_data if own_text else work.data_of(model)}",
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


def mixed() -> Iterable[Cell]:
    """Some blocks go by block influence, and as many channels as the size wants beside them, with refit."""
    for size, mixes in MIXED.items():
        for blocks, channels in mixes.items():
            yield cut(
                f"blocks and channels/{size}/{blocks} blocks",
                criterion="block_influence",
                unit_criterion="unit_taylor",
                shape={"layers": 30 - blocks, "intermediate": channels},
                correction="refit",
                force=True,
            )


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


WAY = "KL + 0.5 text"  # the recovery in which cuts are compared


def compared(tokens: int) -> Iterable[Cell]:
    """Cuts of every size, recovered alike."""
    yaml, *overrides = RECOVERIES[WAY]
    for parent in (
        "blocks/0.9/block_influence", "channels/0.9/unit_taylor refit", "tokens/0.9/24576",
        "blocks/0.75/perplexity+", "channels/0.75/unit_taylor", "blocks and channels/0.75/5 blocks",
        "channels and attentions/0.75/unit_taylor", "tokens/0.75/24576 and channels refit",
        "blocks/0.5/block_influence", "blocks and channels/0.5/9 blocks", "blocks and channels/0.5/13 blocks",
    ):  # fmt: skip
        yield trained(f"recovered/{tokens / 1e6:g}M/{parent}/{WAY}", yaml, parent, tokens, *overrides)


def by_text(parents: Iterable[str], tokens: int) -> Iterable[Cell]:
    """Recovery with text that the source wrote itself."""
    yaml, *overrides = RECOVERIES[WAY]
    for parent in parents:
        name = f"recovered/{tokens / 1e6:g}M/{parent}/{WAY}, own text"
        yield trained(name, yaml, parent, tokens, *overrides, own_text=True)


def recovered(parents: Iterable[str], tokens: int) -> Iterable[Cell]:
    """Each of the models, recovered in every way."""
    for parent in parents:
        for way, (yaml, *overrides) in RECOVERIES.items():
            yield trained(f"recovered/{tokens / 1e6:g}M/{parent}/{way}", yaml, parent, tokens, *overrides)


def ladder() -> dict[str, Cell]:
    """All cells, by name."""
    two = ("blocks/0.75/block_influence", "channels/0.75/unit_taylor refit")
    yaml, *overrides = RECOVERIES[WAY]
    cells = [
        Cell("source", lambda work, out: _link(work.model, out)),
        *depth(),
        *width(),
        *mixed(),
        *two_stages(),
        *vocabulary(),
        *replaced(50_000),
        *gradual(50_000),
        *recovered(two, 50_000),
        *recovered(two, 250_000),
        *compared(50_000),
        *compared(250_000),
        *by_text(two, 50_000),
        *by_text(two, 250_000),
        *(trained(f"recovered/1M/{parent}/{WAY}", yaml, parent, 1_000_000, *overrides) for parent in two),
        trained(f"recovered/0.1M/tokens/0.9/24576/{WAY}", yaml, "tokens/0.9/24576", 100_000, *overrides),
    ]
    return {cell.name: cell for cell in cells}


def _link(model: Path, out: Path) -> int:
    out.symlink_to(model.resolve())
    return 0
