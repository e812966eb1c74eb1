"""The models of the ladder: how each is made, and of which it is made."""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from work import CALIBRATION, LENGTH, OWN, Work

import llmprune
from llmprune.jobs.prune.recipe import batch_tokens

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = {"0.9": 4, "0.75": 10, "0.5": 19}  # blocks of 30 that go, so that at most this share of all parameters stays
CHANNELS = {"0.9": 1272, "0.75": 832}  # channels of 1,536 that stay, likewise
TWO_STAGES = {"0.9": (26, 1344), "0.75": (22, 1016), "0.5": (14, 504)}  # attentions of 30, channels of 1,536
MIXED = {
    "0.9": {2: 1400},
    "0.75": {3: 984, 5: 1104, 7: 1240},
    "0.5": {10: 608, 13: 800},
}  # channels that stay, by blocks that go; as many parameters as with channels alone, at 0.5 as with blocks alone
CRITERIA_OF_UNITS = (
    "unit_taylor", "unit_taylor_entropy", "unit_activation_l2", "unit_magnitude_l2", "unit_random",
)  # fmt: skip
REFIT: dict[str, Any] = {"correction": "refit", "force": True}
MORE = 4 * CALIBRATION  # samples, where calibration is compared
UNITS = "unit_activation_l2"  # the criterion of channels beside other cuts
VOCABULARY = 24_576  # tokens of 49,152 that stay
FEWER_TOKENS = {
    "0.75": {0: 1120, 3: 1304, 5: 1448},
    "0.5": {6: 760, 9: 944, 13: 1288},
}  # likewise, with so many tokens


@dataclass(frozen=True)
class Cell:
    """A model of the ladder.

    Attributes:
        name: its name.
        make: makes it, as a Hugging Face folder, and returns how many tokens were read for it.
        parent: the cell that it begins with; None = the source.
        calibration: number of samples of the scores that it needs.
    """

    name: str
    make: Callable[[Work, Path], int]
    parent: str | None = None
    calibration: int = CALIBRATION


def cut(name: str, calibration: int = CALIBRATION, **settings: Any) -> Cell:
    """A cell that a plan from the scores cuts."""

    def make(work: Work, out: Path) -> int:
        plan = llmprune.plan(work.scores(calibration), model=work.model, **settings)
        llmprune.apply(work.model, plan, out)
        return calibration * LENGTH

    return Cell(name, make, calibration=calibration)


@dataclass(frozen=True)
class Training:
    """How a cell trains.

    Attributes:
        yaml: job of ``yamls``.
        overrides: its overrides; in them SOURCE stands for the source's folder, REFERENCES for its losses by domain.
        batch: tokens of a batch; None = as ``llmprune prune`` takes them.
        rounds: number of rounds, with as many tokens each; 1 = a plain run.
        text: kind of text, see ``Work.data_from``; empty = the built-in corpus and prose.
    """

    yaml: str = "continue"
    overrides: tuple[str, ...] = ()
    batch: int | None = None
    rounds: int = 1
    text: str = ""

    def given(self, work: Work) -> list[str]:
        """The overrides with their places."""
        found = []
        for override in self.overrides:
            if "REFERENCES" in override:
                override = override.replace("REFERENCES", str(work.references))
            found.append(override.replace("SOURCE", str(work.model)))
        return found


def trained(name: str, training: Training, model: str | None, tokens: int) -> Cell:
    """A cell that trains for a number of tokens."""

    def make(work: Work, out: Path) -> int:
        each = tokens / training.rounds
        batch = training.batch or batch_tokens(each)
        batches = round(each / batch)
        llmprune.train(
            ROOT / "yamls" / f"{training.yaml}.yaml",
            [
                f"model.path={work.model if model is None else work.cell(model) / 'model'}",
                f"data.path={work.data_from(training.text) if training.text else work.data_of(model)}",
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
                *training.given(work),
            ],
        )
        if training.rounds > 1:
            shutil.copytree(out.parent / "run" / "model", out)
        else:
            llmprune.convert(out.parent / "run", out)
        return training.rounds * batches * batch

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
        yield cut(f"blocks/{size}/block_influence refit", MORE, criterion="block_influence", remove=gone, **REFIT)
        for criterion in ("cosine", "angular"):
            yield cut(f"blocks/{size}/span by {criterion}", criterion=criterion, method="span", remove=gone)
        yield cut(f"blocks/{size}/pairs of sub-layers", method="sublayers", remove=gone)
        yield cut(f"blocks/{size}/iterative", criterion="block_influence", method="iterative", remove=gone)
        yield cut(f"blocks/{size}/greedy", method="greedy", remove=gone)
        yield cut(f"blocks/{size}/merged", method="merge", remove=gone, threshold=0.4)


def width() -> Iterable[Cell]:
    """Channels that go by every criterion, with refit and without; heads and hidden dimensions for comparison."""
    for size, kept in CHANNELS.items():
        for criterion in CRITERIA_OF_UNITS:
            narrow: dict[str, Any] = {"unit_criterion": criterion, "shape": {"intermediate": kept}}
            yield cut(f"channels/{size}/{criterion}", **narrow)
            yield cut(f"channels/{size}/{criterion} refit", **narrow, **REFIT)
        for words, samples in (("more", MORE), ("most", 4 * MORE)):
            name = f"channels/{size}/{UNITS} refit, {words} calibration"
            yield cut(name, samples, unit_criterion=UNITS, shape={"intermediate": kept}, **REFIT)
    for criterion in CRITERIA_OF_UNITS:
        yield cut(f"heads/2 of 3 groups/{criterion}", unit_criterion=criterion, shape={"kv_heads": 2})
        yield cut(f"hidden/504 of 576/{criterion}", unit_criterion=criterion, shape={"hidden": 504})


def mixed() -> Iterable[Cell]:
    """Some blocks go by block influence, and as many channels as the size wants beside them; with more calibration."""
    for size, mixes in MIXED.items():
        for blocks, channels in mixes.items():
            shape = {"layers": 30 - blocks, "intermediate": channels}
            criteria = {"criterion": "block_influence", "unit_criterion": UNITS}
            yield cut(f"blocks and channels/{size}/{blocks} blocks", MORE, shape=shape, **criteria, **REFIT)


def two_stages() -> Iterable[Cell]:
    """Channels by the norm of their outputs, then whole attentions by the loss, as in 2SSP."""
    for size, (attentions, channels) in TWO_STAGES.items():
        shape = {"intermediate": channels, "attention_layers": attentions}
        yield cut(f"channels and attentions/{size}/{UNITS}", unit_criterion=UNITS, shape=shape)


def vocabulary() -> Iterable[Cell]:
    """Half of the tokens go, and as many blocks and channels as the size wants beside them."""
    shape = {"vocabulary": VOCABULARY}
    yield cut(f"tokens/0.9/{VOCABULARY}", shape=shape)
    for size, mixes in FEWER_TOKENS.items():
        for blocks, channels in mixes.items():
            name = f"tokens/{size}/{VOCABULARY}{f', {blocks} blocks' if blocks else ''} and channels"
            settings: dict[str, Any] = {"shape": {**shape, "intermediate": channels}, "unit_criterion": UNITS}
            if blocks:
                settings |= {"criterion": "block_influence", "remove": blocks}
            else:
                yield cut(name, **settings)
            yield cut(f"{name} refit", MORE if blocks else CALIBRATION, **settings, **REFIT)


def replaced(size: str, tokens: int) -> Iterable[Cell]:
    """Spans whose place one light network takes, so that as many parameters stay as without the blocks of the size."""
    words, blocks = amount(tokens), BLOCKS[size]
    for objective in ("mse", "lm", "kl"):
        settings = (
            f"block_replacement.length={blocks + 1}",
            f"block_replacement.objectives={{{objective}: 1.0}}",
        )
        yield trained(f"span/{size}/block by {objective} {words}", Training("replace", settings), None, tokens)


def fitted(size: str) -> Iterable[Cell]:
    """Spans whose place a matrix takes, in closed form or as it begins, or nothing."""
    for kind in ("none", "closed_form", "linear"):
        settings = (
            f"block_replacement.length={BLOCKS[size]}",
            f"block_replacement.kind={kind}",
            "block_replacement.force=true",
        )
        yield trained(f"span/{size}/{kind}", Training("replace", settings), None, 0)


_BOTH = "distillation={teacher: SOURCE, objectives: {kl: 1.0, lm: 0.5}}"
_DYNAMIC = (
    "dynamic_loading={references: REFERENCES}",
    "train.eval_interval=0.1dur",
    "data.eval_samples_per_domain=8",
)
GATED = {"0.75": "{intermediate: 832}", "0.5": "{layers: 17, intermediate: 800}"}  # shapes that gates are asked for


def gradual(tokens: int) -> Iterable[Cell]:
    """Channels that go while the model trains: in three rounds with recovery between, or by learned gates."""
    words, channels = amount(tokens), CHANNELS["0.75"]
    scored = (
        "iterate.rounds=3", f"plan={{unit_criterion: {UNITS}, shape: {{intermediate: {channels}}}}}",
        f"layer_scoring.data.samples={CALIBRATION}", _BOTH,
    )  # fmt: skip
    yield trained(f"rounds/0.75/{words}, KL + 0.5 text", Training("iterate", scored, rounds=3), None, tokens)
    for words_of, target in (
        ("channels", f"l0_pruning={{target: {GATED['0.75']}}}"),
        ("size", "l0_pruning={target_sparsity: 0.316}"),
    ):
        gates = Training("prune", (target, "distillation={}"))
        yield trained(f"gates/0.75/{words_of} {words}", gates, None, tokens)


WAY = "KL + 0.5 text"  # the recovery in which cuts are compared
RECOVERIES = {
    "text": Training(),
    "text, encyclopedia": Training(text="encyclopedia"),
    "KL": Training(overrides=("distillation={teacher: SOURCE}",)),
    WAY: Training(overrides=(_BOTH,)),
    "KL of the 16 likeliest + 0.5 text": Training(overrides=(_BOTH, "distillation.top_k=16")),
    f"{WAY}, lr 1e-4": Training(overrides=(_BOTH, "optimizer.lr=1e-4")),
    f"{WAY}, lr 6e-4": Training(overrides=(_BOTH, "optimizer.lr=6e-4")),
    f"{WAY}, lr 1e-3": Training(overrides=(_BOTH, "optimizer.lr=1e-3")),
    f"{WAY}, batch 512": Training(overrides=(_BOTH,), batch=512),
    f"{WAY}, batch 1024": Training(overrides=(_BOTH,), batch=1024),
    f"{WAY}, own text": Training(overrides=(_BOTH,), text=OWN),
    f"{WAY}, encyclopedia": Training(overrides=(_BOTH,), text="encyclopedia"),
    f"{WAY}, batch 512, encyclopedia": Training(overrides=(_BOTH,), batch=512, text="encyclopedia"),
    f"{WAY}, seed 1": Training(overrides=(_BOTH, "run.seed=1")),
    f"{WAY}, seed 2": Training(overrides=(_BOTH, "run.seed=2")),
    f"{WAY}, dynamic mixing": Training(overrides=(_BOTH, *_DYNAMIC)),
    f"{WAY} + states": Training(
        overrides=("distillation={teacher: SOURCE, objectives: {kl: 1.0, lm: 0.5, mse: 1.0}}",)
    ),
    f"states, then {WAY}": Training(
        overrides=("distillation={teacher: SOURCE, objectives: {mse: 1.0}, final_objectives: {kl: 1.0, lm: 0.5}}",)
    ),
    f"blocks alone, then {WAY}": Training(
        overrides=("distillation={teacher: SOURCE, objectives: {local: 1.0}, final_objectives: {kl: 1.0, lm: 0.5}}",)
    ),
    "last three": Training(overrides=("trainable={parameters: [output, final_norm, last.3]}",)),
    "LoRA": Training("finetune"),
    f"LoRA, {WAY}": Training("finetune", (_BOTH,)),
    f"QLoRA, {WAY}": Training("finetune", (_BOTH, "lora.quantize=nf4")),
}


def amount(tokens: int) -> str:
    """A number of tokens in words: 50,000 are 0.05M."""
    return f"{tokens / 1e6:g}M"


def recovered(parent: str, ways: Iterable[str], tokens: int) -> Iterable[Cell]:
    """A model, recovered in each of the ways."""
    for way in ways:
        yield trained(f"recovered/{amount(tokens)}/{parent}/{way}", RECOVERIES[way], parent, tokens)


BEST = ("blocks/0.75/block_influence", "channels/0.75/unit_activation_l2 refit")  # recovered in every way
MIX = "blocks and channels/0.75/5 blocks"
COMPARED = (
    "blocks/0.9/block_influence", "channels/0.9/unit_activation_l2 refit, more calibration",
    "blocks and channels/0.9/2 blocks", "tokens/0.9/24576",
    "blocks/0.75/block_influence refit", "blocks/0.75/perplexity+", "blocks/0.75/iterative",
    "channels/0.75/unit_activation_l2", "channels/0.75/unit_taylor refit",
    "channels/0.75/unit_activation_l2 refit, more calibration",
    "channels/0.75/unit_activation_l2 refit, most calibration",
    "blocks and channels/0.75/3 blocks", "blocks and channels/0.75/5 blocks", "blocks and channels/0.75/7 blocks",
    "channels and attentions/0.75/unit_activation_l2", "tokens/0.75/24576 and channels refit",
    "tokens/0.75/24576, 3 blocks and channels refit",
    "blocks/0.5/block_influence", "blocks/0.5/block_influence refit",
    "blocks and channels/0.5/10 blocks", "blocks and channels/0.5/13 blocks",
    "tokens/0.5/24576, 9 blocks and channels refit",
)  # fmt: skip


def recipes(size: str) -> Iterable[Cell]:
    """Published recipes with a quarter of a million tokens in all, at the learning rate of the model's size."""
    yield from recovered(f"blocks/{size}/tail", ["last three"], 250_000)  # Reassessing Layer Pruning
    for criterion in ("perplexity+", "taylor+"):  # Shortened LLaMA
        yield from recovered(f"blocks/{size}/{criterion}", ["text", "text, encyclopedia", "LoRA"], 250_000)
    yield from replaced(size, 250_000)  # LLM-Streamline
    gates = f"gates/{size}/as published 0.075M"  # Sheared-LLaMA
    settings = (f"l0_pruning={{target: {GATED[size]}, lagrangian_warmup: 0.2dur}}", *_DYNAMIC)
    yield trained(gates, Training("prune", settings), None, 75_000)
    yield trained(f"recovered/0.175M/{gates}/text, dynamic mixing", Training(overrides=_DYNAMIC), gates, 175_000)


def ladder() -> dict[str, Cell]:
    """All cells, by name."""
    cells = [
        Cell("source", lambda work, out: _link(work.model, out)),
        *depth(),
        *width(),
        *mixed(),
        *two_stages(),
        *vocabulary(),
        *replaced("0.75", 50_000),
        *fitted("0.75"),
        *gradual(50_000),
        *(cell for tokens in (50_000, 250_000) for parent in BEST for cell in recovered(parent, RECOVERIES, tokens)),
        *(cell for tokens in (50_000, 250_000) for parent in COMPARED for cell in recovered(parent, [WAY], tokens)),
        *recipes("0.75"),
        *recipes("0.5"),
        *(cell for parent in BEST for cell in recovered(parent, [WAY], 1_000_000)),
        *recovered("tokens/0.75/24576 and channels refit", [WAY], 1_000_000),
        *recovered(MIX, [f"{WAY}, encyclopedia", f"{WAY}, batch 512", f"{WAY}, batch 512, encyclopedia"], 250_000),
        *recovered(MIX, [WAY, f"{WAY}, encyclopedia"], 1_000_000),
        *recovered("tokens/0.9/24576", [WAY], 100_000),
    ]
    return {cell.name: cell for cell in cells}


def _link(model: Path, out: Path) -> int:
    out.symlink_to(model.resolve())
    return 0
