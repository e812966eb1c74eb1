"""Shapes under budgets: kept by the built model, and none of the neighbours is better."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune.cli import app
from llmprune.conversion.commands import apply
from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.jobs.score import score
from llmprune.models.families import Shape, family_of
from llmprune.models.loading import load_model_config, load_tokenizer, new_model
from llmprune.models.objectives import IGNORED
from llmprune.models.placement import Placement
from llmprune.plans.plan import KeptBlock, Plan
from llmprune.pruning.budgets.choose import Chooser, Steps
from llmprune.pruning.budgets.latency import LatencyTable
from llmprune.pruning.budgets.limits import Latency, Parameters, costs_of, limits_of
from llmprune.pruning.budgets.settings import BudgetConfig
from llmprune.pruning.budgets.shape_sizes import ShapeSizes, of_size
from llmprune.pruning.budgets.trial import Trial
from llmprune.pruning.planning import choose_plan, make_plan
from llmprune.pruning.scoring.scores import Scores
from llmprune.pruning.scoring.settings import LayerScoringConfig
from llmprune.pruning.selection.methods import ScoredModel
from llmprune.pruning.selection.settings import PlanConfig
from llmprune.utils.errors import UserError
from tests.conftest import random_model, tiny_config
from tests.models.families.test_conformance import CONFIGS
from tests.pruning.budgets.test_shape_sizes import kept_bytes

CRITERIA = ["block_influence", "unit_activation_l2", "expert_frequency"]
BOTH = PlanConfig(criterion="block_influence", unit_criterion="unit_activation_l2")


def scored(folder: Path, data: Path) -> Scores:
    mixture = family_of(load_model_config(folder)).expert_modules is not None
    names = CRITERIA if mixture else CRITERIA[:2]
    return score(
        str(folder),
        LayerScoringConfig(CalibrationConfig(str(data), samples=9, length=24), names),
        Placement("float32", "cpu"),
    )


@pytest.fixture(scope="module")
def scores(trained_folder: Path, data: Path) -> Scores:
    return scored(trained_folder, data)


def mean_loss(model: PreTrainedModel, tokens: Tensor) -> float:
    with torch.no_grad():
        return torch.stack([model(input_ids=s[None], labels=s[None]).loss.double() for s in tokens]).mean().item()


@pytest.mark.parametrize("name", ["llama-grouped-tied", "gemma2", "opt", "olmo2", "mixtral", "gpt_neox"])
def test_a_trial_has_the_loss_of_the_cut_model(name: str, tokens: Tensor, data: Path, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model = random_model(config)
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(data / "tokenizer").save_pretrained(tmp_path / "model")
    found, dense = scored(tmp_path / "model", data), mean_loss(model, tokens)
    trial = Trial(ScoredModel(model, tokens, 2))
    family, source = family_of(config), family_of(config).shape(config)
    target = {"layers": 3, "kv_heads": source.kv_heads // 2, "hidden": 24}
    if family.head_size_is_derived(config):
        target["hidden"] = target["kv_heads"] * source.heads_per_group * source.head_dim
    target |= {"experts": 3} if source.experts else {"intermediate": 31}
    narrow = {"layers": 4, **({"experts": 2} if source.experts else {"intermediate": 9})}
    for shape, correction in (
        (target, "none"),
        ({"layers": 2}, "none"),
        (narrow, "none"),
        (narrow, "none" if source.experts else "refit"),
    ):
        criterion = None if shape["layers"] == 4 else "block_influence"
        plan = make_plan(found, replace(BOTH, shape=shape, criterion=criterion, correction=correction, force=True))
        assert bool(plan.corrections) == (correction == "refit")
        loss, others = trial.loss(plan), tokens.flip(0, 1)
        assert trial.loss(plan) == loss
        apply(tmp_path / "model", plan, tmp_path / "cut", overwrite=True)
        cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
        assert loss == pytest.approx(mean_loss(cut, tokens), rel=1e-5)
        assert trial.loss(plan, others) == pytest.approx(mean_loss(cut, others), rel=1e-5)
        labels = torch.where(torch.arange(others.shape[1]) < others.shape[1] // 2, IGNORED, others)
        answers = trial.loss(plan, {"input_ids": others, "labels": labels})
        with torch.no_grad():
            assert answers == pytest.approx(cut(input_ids=others, labels=labels).loss.item(), rel=1e-5)
    assert mean_loss(model, tokens) == pytest.approx(dense, rel=1e-6)  # as before


@pytest.mark.parametrize("params", ["0.5", "0.7", "40k"])
def test_parameters(scores: Scores, trained_folder: Path, tmp_path: Path, params: str) -> None:
    plan, choice = choose_plan(scores, BOTH, BudgetConfig(params=params, multiple=2, tries=30))
    apply(trained_folder, plan, tmp_path / "cut")
    built = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "cut").parameters())
    whole = ShapeSizes(load_model_config(trained_folder)).parameters(scores.source)
    most = float(params) * whole if params != "40k" else 40_000
    assert built == choice.costs["params"] and 0.9 * most < built <= most
    assert plan.shape.hidden % 2 == plan.shape.intermediate % 2 == 0 and choice.tried <= 30


def test_memory(scores: Scores, trained_folder: Path, tmp_path: Path) -> None:
    budget = BudgetConfig(memory="0.6", context=96, batch=4, dtype="float32")
    plan, choice = choose_plan(scores, BOTH, budget)
    apply(trained_folder, plan, tmp_path / "cut")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert choice.costs["memory"] == weights + kept_bytes(model, 4, 96)
    before = ShapeSizes(load_model_config(trained_folder))
    whole = 4 * before.parameters(before.source) + 2 * 6 * 4 * 96 * 4 * 8 * 4
    assert 0.5 * whole < choice.costs["memory"] <= 0.6 * whole


def test_two_budgets_at_once(scores: Scores) -> None:
    budget = BudgetConfig(params="0.8", memory="0.5", context=128, batch=16, dtype="float32")
    _, choice = choose_plan(scores, BOTH, budget)
    sizes = ShapeSizes(load_model_config(scores.model))
    limits = limits_of(costs_of(budget, sizes, torch.device("cpu")), sizes.source)
    assert set(choice.costs) == {"params", "memory"}
    assert all(choice.costs[limit.name] <= limit.most for limit in limits)


class Known:
    """A loss known beforehand: how far a shape is from a best one."""

    def __init__(self, sizes: ShapeSizes) -> None:
        self.source, self.tried = sizes.source, 0

    def plan(self, shape: Shape) -> Plan:
        blocks = tuple(
            KeptBlock.whole(b, heads=tuple(range(shape.heads)), channels=tuple(range(shape.intermediate)))
            for b in range(shape.layers)
        )
        return Plan("llama", "", self.source, blocks, hidden=tuple(range(shape.hidden)))

    def loss(self, plan: Plan) -> float:
        self.tried += 1
        shape = plan.shape
        return (shape.layers - 7) ** 2 + ((shape.hidden - 48) / 4) ** 2 + (shape.kv_heads - 6) ** 2


def test_the_best_shape_is_found() -> None:
    config = tiny_config(
        num_hidden_layers=12, hidden_size=64, num_attention_heads=8, num_key_value_heads=8, intermediate_size=160
    )
    sizes = ShapeSizes(config)
    steps, known = Steps.of(sizes, 4, 1, depth=True, width=True), Known(sizes)
    choice = Chooser(sizes.source, steps, [Parameters(sizes, "0.4")], known.plan, known.loss, 100).choose()
    shape = choice.plan.shape
    assert (shape.layers, shape.hidden, shape.kv_heads, choice.loss) == (7, 48, 6, 0)
    assert choice.tried == known.tried <= 100
    larger = replace(shape, intermediate=shape.intermediate + 4)
    assert shape.intermediate == 160 or sizes.parameters(larger) > 0.4 * sizes.parameters(sizes.source)


@pytest.mark.parametrize(("share", "layers"), [(0, 12), (0.25, 10), (0.5, 8), (0.75, 6), (1, 4)])
def test_whole_blocks_make_a_share_of_the_saving(share: float, layers: int) -> None:
    """Of twelve blocks, eight must go if nothing else goes: 4 blocks are 0.36 of the parameters, and 5 are 0.44."""
    sizes = ShapeSizes(tiny_config(num_hidden_layers=12, hidden_size=64, intermediate_size=160))
    steps, known = Steps.of(sizes, 4, 1, depth=True, width=True), Known(sizes)
    limits = [Parameters(sizes, "0.4")]
    shape = Chooser(sizes.source, steps, limits, known.plan, known.loss, 100, share).choose().plan.shape
    whole = sizes.parameters(sizes.source)
    assert sizes.parameters(replace(sizes.source, layers=4)) <= 0.4 * whole
    assert sizes.parameters(replace(sizes.source, layers=5)) > 0.4 * whole
    assert shape.layers == layers and sizes.parameters(shape) <= 0.4 * whole


class _Clock(LatencyTable):
    """A table that believes a block to take twice of what it takes beside everything else."""

    def seconds(self, shape: Shape) -> float:
        return 1 + 2 * shape.layers * shape.hidden * shape.intermediate / 2**12

    def measured(self, shape: Shape, reference: Shape) -> float | None:
        def real(s: Shape) -> float:
            return 4 + s.layers * s.hidden * s.intermediate / 2**12

        return real(shape) / real(reference)


def test_a_latency_is_mended_by_what_is_measured() -> None:
    config = tiny_config(num_hidden_layers=12, hidden_size=64, intermediate_size=160)
    sizes = ShapeSizes(config)
    steps, known = Steps.of(sizes, 4, 1, depth=True, width=True), Known(sizes)
    table = _Clock(config, batch=1, context=8, device=torch.device("cpu"), dtype=torch.float32)
    choice = Chooser(sizes.source, steps, [Latency(table, "0.5")], known.plan, known.loss, 100).choose()
    assert choice.measured is not None and choice.measured <= 0.525
    assert choice.costs["latency"] == pytest.approx(choice.measured, rel=0.1)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_of_every_family_can_be_timed(name: str) -> None:
    for context in (9, 128):  # as many as fit
        table = LatencyTable(CONFIGS[name], batch=2, context=context, device=torch.device("cpu"), dtype=torch.bfloat16)
        decoder = table._decoder(replace(table.source, layers=2))
        for _ in range(3):
            decoder.fill()
            logits = decoder.step()
        assert logits.shape == (2, 1, 300) and logits.isfinite().all()


def test_sizes_are_timed_though_no_model_has_just_them() -> None:
    """Half of 72 hidden dimensions with a group of heads fewer: a config needs a multiple of its heads."""
    config = tiny_config(hidden_size=72, num_attention_heads=9, num_key_value_heads=3, head_dim=8)
    table = LatencyTable(config, batch=1, context=9, device=torch.device("cpu"), dtype=torch.float32)
    for hidden, groups in ((42, 3), (40, 2), (7, 1), (72, 3)):
        outside, block = table._time(hidden, groups, 48)
        assert outside >= 0 and block >= 0


def test_so_many_blocks_are_timed_that_no_cache_holds_them() -> None:
    """A block of 20.16 M numbers has 80.6 MB in float32 and 40.3 in bfloat16: 3.3 and 6.7 of them have 2²⁸ bytes."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 320, "intermediate_size": 20_573}

    def timed(layers: int, dtype: torch.dtype, **changed: int) -> int:
        config = tiny_config(num_hidden_layers=layers, **{**sizes, **changed})
        return LatencyTable(config, batch=1, context=8, device=torch.device("cpu"), dtype=dtype)._many

    assert timed(30, torch.float32) == 5  # five at least
    assert timed(30, torch.bfloat16) == 7
    assert timed(6, torch.bfloat16) == 6  # a model has no more
    assert timed(3, torch.bfloat16, intermediate_size=64) == 5


def test_timing_needs_room() -> None:
    table = LatencyTable(tiny_config(), batch=2**30, context=100, device=torch.device("cpu"), dtype=torch.float32)
    assert table.measured(table.source, table.source) is None
    with pytest.raises(UserError, match="take a smaller --batch or --context"):
        table.seconds(table.source)


@pytest.mark.parametrize("params", ["0.45", "0.3", "0.12"])
def test_small_budgets(scores: Scores, params: str) -> None:
    """Shapes far below half of the depth and the width are found where there are any."""
    whole = ShapeSizes(load_model_config(scores.model)).parameters(scores.source)
    _, choice = choose_plan(scores, BOTH, BudgetConfig(params=params, multiple=1))
    assert 0.5 * float(params) * whole < choice.costs["params"] <= float(params) * whole
    if float(params) >= 0.3:
        depth, _ = choose_plan(scores, replace(BOTH, unit_criterion=None), BudgetConfig(params=params, multiple=1000))
        assert depth.shape == replace(scores.source, layers=depth.shape.layers)


def test_the_table_of_timings() -> None:
    config = tiny_config(num_hidden_layers=6, hidden_size=64, intermediate_size=96, head_dim=8)
    table = LatencyTable(config, batch=1, context=16, device=torch.device("cpu"), dtype=torch.float32)
    source = table.source
    times = [table.seconds(of_size(source, {"layers": layers})) for layers in (1, 2, 6)]
    assert 0 < times[0] < times[1] < times[2]
    assert times[2] - times[1] == pytest.approx(4 * (times[1] - times[0]))
    ratio = table.measured(source, source)
    assert ratio is not None and 0.3 < ratio < 3


@pytest.mark.parametrize("name", ["opt", "gpt_neox", "mixtral", "gemma2"])
def test_families(name: str, data: Path, tmp_path: Path) -> None:
    config = CONFIGS[name]
    random_model(config).save_pretrained(tmp_path / "model")
    load_tokenizer(data / "tokenizer").save_pretrained(tmp_path / "model")
    found = scored(tmp_path / "model", data)
    settings = replace(BOTH, expert_criterion="expert_frequency") if name == "mixtral" else BOTH
    plan, choice = choose_plan(found, settings, BudgetConfig(params="0.7", context=16, tries=12))
    sizes = ShapeSizes(config)
    built = sizes.family.with_shape(config, plan.shape, [block.attention for block in plan.blocks])
    assert sum(p.numel() for p in new_model(built, seed=0).parameters()) == choice.costs["params"]
    assert choice.costs["params"] <= 0.7 * sizes.parameters(sizes.source)


def test_a_share_of_depth(scores: Scores) -> None:
    budget = BudgetConfig(params="0.6", multiple=2, tries=6)
    alone, _ = choose_plan(scores, replace(BOTH, unit_criterion=None), budget)
    gone = 6 - alone.shape.layers
    for share in (0.5, 1.0):
        plan, _ = choose_plan(scores, BOTH, replace(budget, depth_share=share))
        assert plan.shape.layers == 6 - round(share * gone)
    for criteria in (replace(BOTH, unit_criterion=None), replace(BOTH, criterion=None)):
        with pytest.raises(UserError, match="--depth-share divides a saving between blocks and width"):
            choose_plan(scores, criteria, replace(budget, depth_share=0.5))


def test_depth_or_width_alone(scores: Scores) -> None:
    budget = BudgetConfig(params="0.7")
    depth, of_depth = choose_plan(scores, replace(BOTH, unit_criterion=None), budget)
    assert of_depth.tried == 1  # as many blocks as keep to the budget
    sizes = ShapeSizes(load_model_config(scores.model))
    more = replace(depth.shape, layers=depth.shape.layers + 1)
    assert sizes.parameters(depth.shape) <= 0.7 * sizes.parameters(sizes.source) < sizes.parameters(more)
    width, _ = choose_plan(scores, replace(BOTH, criterion=None), budget)
    assert depth.shape == replace(scores.source, layers=depth.shape.layers) and depth.shape.layers < 6
    assert width.shape.layers == 6 and width.shape != scores.source
    kept, _ = choose_plan(scores, replace(BOTH, protect_first=2, protect_last=2), BudgetConfig(params="0.5"))
    assert {0, 1, 4, 5} <= {block.attention for block in kept.blocks}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    app(list(arguments), standalone_mode=False)
    return capsys.readouterr().out


def test_the_command(scores: Scores, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores.save(tmp_path / "scores.json")
    path, out = str(tmp_path / "scores.json"), str(tmp_path / "plan.json")
    criteria = ("--criterion", "block_influence", "--unit-criterion", "unit_activation_l2")
    budget = ("--budget-params", "0.6", "--tries", "8", "--correction", "refit")
    facts = json.loads(run(capsys, "plan", path, *criteria, *budget, "--out", out, "--json"))
    plan = Plan.load(out)
    assert facts["shape"]["hidden"] == plan.shape.hidden and facts["tried"] <= 8 and facts["costs"]["params"]
    printed = run(capsys, "plan", path, *criteria, *budget, "--out", out, "--overwrite")
    assert "shapes tried; calibration loss before recovery" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget-params", "much"], "'much' is no budget of params: write 0.75 or 1.3B"),
        (["--budget-params", "1.0"], "keeps to the budget as it is"),
        (["--budget-params", "0.001"], "no shape keeps to the budget"),
        (["--budget-params", "3GB"], "is no budget of params: write 0.75 or 1.3B"),
        (["--budget-memory", "3B", "--context", "9"], "is no budget of memory: write 8GB or 0.75"),
        (["--budget-params", "0.5", "--correction", "mean"], "has no biases in"),
        (["--budget-latency", "2"], "write a number below 1"),
        (["--budget-memory", "1GB", "--context", "64"], "keeps to the budget as it is"),
        (["--budget-memory", "0.5", "--context", "2048"], "a context of 2048 tokens is too long: the model takes 128"),
        (["--context", "8"], "name a budget"),
        (["--tries", "3", "--remove", "1"], "name a budget"),
        (["--budget-params", "0.5", "--method", "merge"], "'merge' is none"),
        (["--budget-params", "0.5", "--expert-criterion", "unit_activation_l2"], "this model has none"),
        (["--budget-params", "0.5", "--remove", "2"], "leave out --shape, --remove and --drop"),
        (["--budget-params", "0.5", "--multiple", "64"], "no size of hidden up to the model's is a multiple of 64"),
        (["--budget-params", "0.5", "--tries", "0"], "tries is 0; it must be positive"),
        (["--budget-params", "0.5", "--depth-share", "1.5"], "depth_share is 1.5"),
    ],
)
def test_mistakes(scores: Scores, tmp_path: Path, arguments: Sequence[str], message: str) -> None:
    scores.save(tmp_path / "scores.json")
    criteria = ["--criterion", "block_influence", "--unit-criterion", "unit_activation_l2"]
    command = ["plan", str(tmp_path / "scores.json"), "--out", str(tmp_path / "plan.json"), *criteria, *arguments]
    with pytest.raises(UserError, match=message):
        app(command, standalone_mode=False)
    assert not (tmp_path / "plan.json").exists()
