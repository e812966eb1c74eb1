"""Plans to a narrower shape, what they cut, and what output matrices make up for."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune.cli import app
from llmprune.conversion.commands import apply
from llmprune.conversion.verify import compare_models, open_for_comparison
from llmprune.data.calibration import calibration_samples
from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.jobs.score import score
from llmprune.models.families import Shape, family_of
from llmprune.models.least_squares import RIDGES
from llmprune.models.loading import load_model_config, load_tokenizer
from llmprune.models.placement import Placement
from llmprune.plans.plan import Plan
from llmprune.pruning.budgets.plan_losses import PlanLosses
from llmprune.pruning.planning import make_plan
from llmprune.pruning.scoring.all_criteria import CRITERIA
from llmprune.pruning.scoring.scores import Scores
from llmprune.pruning.scoring.settings import LayerScoringConfig
from llmprune.pruning.selection.correction import check_tokens, corrected
from llmprune.pruning.selection.methods import ScoredModel
from llmprune.pruning.selection.settings import PlanConfig
from llmprune.pruning.selection.width import whole
from llmprune.utils.errors import UserError
from tests.conftest import random_model, tiny_config
from tests.models.families.test_conformance import CONFIGS

CPU = Placement("float32", "cpu")


def run(*arguments: str) -> None:
    app(list(arguments), standalone_mode=False)


@pytest.fixture(scope="module")
def scores(trained_folder: Path, data: Path) -> Scores:
    config = LayerScoringConfig(CalibrationConfig(str(data), samples=9, length=24))
    return score(str(trained_folder), config, CPU)


def of(scores: Scores, **settings: Any) -> Plan:
    return make_plan(scores, PlanConfig(**settings))


def test_what_stays_has_the_highest_scores(scores: Scores) -> None:
    plan = of(
        scores,
        shape={"layers": 4, "hidden": 24, "heads": 6, "intermediate": 30},
        criterion="block_influence",
        unit_criterion="unit_taylor",
    )
    assert plan.shape == Shape(4, hidden=24, heads=6, kv_heads=3, head_dim=8, intermediate=30, vocabulary=300)
    found = scores.of_units("unit_taylor")
    for block in plan.blocks:
        channels, groups = found["channels"][block.mlp], found["kv_groups"][block.attention]
        assert block.channels is not None and block.heads is not None
        gone = set(range(48)) - set(block.channels)
        assert min(channels[c] for c in block.channels) >= max(channels[c] for c in gone)
        (gone_group,) = {0, 1, 2, 3} - {head // 2 for head in block.heads}
        assert groups[gone_group] == min(groups)
    kept = [block.attention for block in plan.blocks]
    totals = [sum(found["hidden"][block][d] for block in kept) for d in range(32)]
    assert plan.hidden == tuple(sorted(sorted(range(32), key=lambda d: -totals[d])[:24]))


def test_queries_within_groups(scores: Scores) -> None:
    plan = of(scores, shape={"heads": 4, "kv_heads": 4}, unit_criterion="unit_activation_l2")
    heads = scores.of_units("unit_activation_l2")["heads"]
    for block in plan.blocks:
        assert block.heads == tuple(max((2 * g, 2 * g + 1), key=lambda h: heads[block.attention][h]) for g in range(4))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_narrowed(name: str, data: Path, tmp_path: Path) -> None:
    """Score, plan, apply and verify; what comes out is loaded by Transformers alone and generates with a cache."""
    config = CONFIGS[name]
    random_model(config).save_pretrained(tmp_path / "model")
    load_tokenizer(data / "tokenizer").save_pretrained(tmp_path / "model")
    found = score(str(tmp_path / "model"), LayerScoringConfig(CalibrationConfig(str(data), samples=12, length=16)), CPU)
    family = family_of(config)
    source = family.shape(config)
    target = {"layers": 3, "hidden": 24, "kv_heads": max(source.kv_heads // 2, 1)}
    if family.head_size_is_derived(config):
        target["hidden"] = target["kv_heads"] * source.heads_per_group * source.head_dim
    target |= {"experts": 3} if source.experts else {"intermediate": 30}
    settings = PlanConfig(
        shape=target,
        criterion="block_influence",
        unit_criterion="unit_activation_l2",
        expert_criterion="expert_frequency" if source.experts else None,
        force=True,  # on random weights corrections help or not
    )
    plan = make_plan(found, settings)
    assert {key: getattr(plan.shape, key) for key in target} == target
    for kind in ("none", "refit", "mean"):
        biased = name.endswith("-biases") or family.norm.centred
        if kind == "mean" and (not biased or "no-biases" in name or "olmo2" in name):
            with pytest.raises(UserError, match="no biases"):
                make_plan(found, replace(settings, correction=kind))
            continue
        corrected = plan if kind == "none" else make_plan(found, replace(settings, correction=kind))
        corrected.save(tmp_path / "plan.json")
        apply(tmp_path / "model", tmp_path / "plan.json", tmp_path / "cut", overwrite=True)
        whole = open_for_comparison(tmp_path / "model", Plan.load(tmp_path / "plan.json"))
        assert compare_models(whole, open_for_comparison(tmp_path / "cut"), length=48).max_rel <= 1e-5
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    assert family.shape(smaller.config) == plan.shape
    prompt = torch.tensor([[5, 7, 11, 13]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        smaller.generate(prompt, use_cache=True, **options), smaller.generate(prompt, use_cache=False, **options)
    )


def test_units_that_give_nothing_go_first_and_are_not_missed(
    trained: PreTrainedModel, data: Path, tmp_path: Path, calibration: Tensor
) -> None:
    with torch.no_grad():
        for block in trained.model.layers:
            block.mlp.down_proj.weight[:, 5:17] = 0
            for matrix in (block.mlp.gate_proj, block.mlp.up_proj):
                matrix.weight[5:17] = 0
    trained.save_pretrained(tmp_path / "model")
    load_tokenizer(data / "tokenizer").save_pretrained(tmp_path / "model")
    found = score(str(tmp_path / "model"), LayerScoringConfig(CalibrationConfig(str(data), samples=4, length=24)), CPU)
    for criterion in found.units:
        if criterion == "unit_random":
            continue
        plan = make_plan(found, PlanConfig(shape={"intermediate": 36}, unit_criterion=criterion))
        assert all(block.channels == (*range(5), *range(17, 48)) for block in plan.blocks)
    apply(tmp_path / "model", plan, tmp_path / "cut")
    with torch.no_grad():
        cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()(input_ids=calibration).logits
        torch.testing.assert_close(cut, trained(input_ids=calibration).logits, rtol=1e-5, atol=1e-5)


def output_error(model: PreTrainedModel, plan: Plan, tokens: Tensor, folder: Path) -> float:
    """How far what block 2's MLP adds is from the whole model's, when only it is narrowed."""
    apply(folder, plan, folder.parent / "cut", overwrite=True)
    cut = AutoModelForCausalLM.from_pretrained(folder.parent / "cut").eval()
    outputs = []
    for each in (model, cut):
        hook = each.model.layers[0].mlp.register_forward_hook(lambda module, args, output: outputs.append(output))
        with torch.no_grad():
            each(input_ids=tokens)
        hook.remove()
    return (outputs[0] - outputs[1]).square().mean().item()


def test_a_refit_is_the_least_squares_solution(scores: Scores, trained: PreTrainedModel, trained_folder: Path) -> None:
    # So few samples may make a plan worse, which another test is about.
    changes = {"shape": {"intermediate": 12}, "unit_criterion": "unit_activation_l2", "correction": "refit"}
    plan = of(scores, **changes, force=True)
    block = plan.blocks[0]
    inputs: list[Tensor] = []
    hook = trained.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    samples = calibration_samples(CalibrationConfig(**scores.data), load_tokenizer(trained_folder))
    with torch.no_grad():
        trained(input_ids=samples)
    hook.remove()
    a, others = (part.flatten(0, 1).double() for part in (inputs[0][:6], inputs[0][6:]))  # fitted on 6 of 9 samples
    weight = trained.model.layers[0].mlp.down_proj.weight.detach().double()
    kept = list(block.channels or ())
    gone = [c for c in range(48) if c not in kept]
    x = a[:, kept]
    solved = []
    for share in RIDGES:
        ridge = (share * x.square().mean() * len(x)).sqrt() * torch.eye(12)  # as rows of their own
        own = torch.linalg.lstsq(torch.cat([x, ridge]), torch.cat([a[:, gone], torch.zeros(12, 36)])).solution.T
        solved.append(own)

    def error(linear: Tensor) -> float:
        matrix = weight[:, kept] + weight[:, gone] @ linear
        return (others @ weight.T - others[:, kept] @ matrix.T).square().mean().item()

    best = min(solved, key=error)
    torch.testing.assert_close(plan.corrections["linear.mlp.0"].double(), best, rtol=1e-3, atol=1e-4)
    assert error(best) < 0.2 * error(torch.zeros(36, 12, dtype=torch.float64))


def test_means_join_the_bias(data: Path, tmp_path: Path) -> None:
    model = random_model(tiny_config(attention_bias=True, mlp_bias=True))
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(data / "tokenizer").save_pretrained(tmp_path / "model")
    found = score(str(tmp_path / "model"), LayerScoringConfig(CalibrationConfig(str(data), samples=6, length=24)), CPU)
    settings = PlanConfig(shape={"intermediate": 24}, unit_criterion="unit_activation_l2", force=True)
    tokens = calibration_samples(CalibrationConfig(**found.data), load_tokenizer(tmp_path / "model"))
    errors = {}
    for kind in ("none", "mean", "refit"):
        plan = make_plan(found, replace(settings, correction=kind))
        errors[kind] = output_error(model, plan, tokens, tmp_path / "model")
    assert errors["refit"] < errors["mean"] < errors["none"]


def test_the_command(scores: Scores, trained_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores.save(tmp_path / "scores.json")
    assert Scores.load(tmp_path / "scores.json").units == scores.units
    path, plan = str(tmp_path / "scores.json"), str(tmp_path / "plan.json")
    shape = ("--shape", "layers=5, intermediate=24", "--unit-criterion", "unit_taylor")
    run("plan", path, *shape, "--criterion", "taylor", "--correction", "refit", "--out", plan)
    printed = capsys.readouterr()
    assert "5 of 6 blocks stay" in printed.out and "intermediate 24 of 48" in printed.out
    for criterion in ("taylor", "unit_taylor"):
        assert f"plan: {criterion}: {CRITERIA[criterion].caution}\n" in printed.err
    run("apply", str(trained_folder), plan, "--out", str(tmp_path / "cut"))
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (5, 24)


def test_a_refit_has_a_constant_where_there_is_a_bias(data: Path, tmp_path: Path) -> None:
    model = random_model(tiny_config(mlp_bias=True))
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(data / "tokenizer").save_pretrained(tmp_path / "model")
    found = score(str(tmp_path / "model"), LayerScoringConfig(CalibrationConfig(str(data), samples=9, length=24)), CPU)
    settings = PlanConfig(shape={"intermediate": 40}, unit_criterion="unit_taylor", correction="refit", force=True)
    plan = make_plan(found, settings)
    kept = list(plan.blocks[0].channels or ())
    gone = [channel for channel in range(48) if channel not in kept]
    inputs: list[Tensor] = []
    hook = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    with torch.no_grad():
        model(input_ids=calibration_samples(CalibrationConfig(**found.data), load_tokenizer(tmp_path / "model")))
    hook.remove()
    a = inputs[0][:6].flatten(0, 1).double()  # fitted on 6 of 9 samples
    linear, mean = (plan.corrections[f"{name}.mlp.0"].double() for name in ("linear", "mean"))
    x, wanted = a[:, kept] - a[:, kept].mean(0), a[:, gone] - a[:, gone].mean(0)
    solved = []
    for share in RIDGES:
        ridge = (share * x.square().mean() * len(x)).sqrt() * torch.eye(40)
        solved.append(torch.linalg.lstsq(torch.cat([x, ridge]), torch.cat([wanted, torch.zeros(40, 8)])).solution.T)
    assert min((linear - own).abs().max().item() for own in solved) < 1e-3
    torch.testing.assert_close(mean, a[:, gone].mean(0) - linear @ a[:, kept].mean(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "intermediate=24"], "name the criterion that ranks channels with --unit-criterion"),
        (["--shape", "width=24"], "a shape has no 'width'"),
        (["--shape", "hidden"], "'hidden' is no size: write"),
        (["--shape", "hidden=32", "--unit-criterion", "unit_taylor"], "nothing would go"),
        (["--shape", "layers=5,hidden=24", "--drop", "3"], "leave out --remove and --drop"),
        (["--shape", "", "--unit-criterion", "unit_taylor"], "the shape is empty"),
        (["--shape", "heads=4,heads=2", "--unit-criterion", "unit_taylor"], "'heads' is given twice"),
        (["--shape", "hidden=64"], "must lie between 1 and the source's 32"),
        (["--shape", "experts=2"], "this model has none"),
        (["--shape", "heads=3", "--unit-criterion", "unit_taylor"], "is not a multiple of the source's 2"),
        (["--shape", "hidden=24", "--unit-criterion", "taylor"], "no criterion 'taylor' of units"),
        (["--shape", "hidden=24", "--unit-criterion", "unit_tailor"], "did you mean 'unit_taylor'"),
        (["--shape", "layers=4", "--remove", "2", "--criterion", "tail"], "leave out --remove"),
        (["--shape", "hidden=24", "--unit-criterion", "unit_taylor", "--criterion", "tail"], "no blocks go"),
        (["--unit-criterion", "unit_taylor", "--remove", "1"], "goes with a shape"),
        (["--criterion", "unit_taylor", "--remove", "1"], "scores units, not blocks"),
        (["--shape", "hidden=24", "--unit-criterion", "unit_taylor", "--correction", "refit"], "nothing to correct"),
        (["--shape", "intermediate=24", "--unit-criterion", "unit_taylor", "--correction", "mean"], "no biases"),
        (["--method", "merge", "--correction", "refit"], "merged blocks have no matrices of their own to correct"),
        (["--compare", "--remove", "2", "--correction", "refit"], "leave out --correction"),
    ],
)
def test_mistakes(scores: Scores, tmp_path: Path, arguments: list[str], message: str) -> None:
    scores.save(tmp_path / "scores.json")
    with pytest.raises(UserError, match=message):
        run("plan", str(tmp_path / "scores.json"), "--out", str(tmp_path / "plan.json"), *arguments)
    assert not (tmp_path / "plan.json").exists()


def test_experts_of_a_token_stay(data: Path, tmp_path: Path) -> None:
    random_model(CONFIGS["mixtral"]).save_pretrained(tmp_path / "model")
    load_tokenizer(data / "tokenizer").save_pretrained(tmp_path / "model")
    found = score(str(tmp_path / "model"), LayerScoringConfig(criteria=["unit_magnitude_l1"]), CPU)
    assert load_model_config(tmp_path / "model").num_experts_per_tok == 2
    with pytest.raises(UserError, match="goes through 2 experts"):
        make_plan(found, PlanConfig(shape={"experts": 1}, unit_criterion="unit_magnitude_l1"))
    with pytest.raises(UserError, match="narrowed by its experts"):
        make_plan(found, PlanConfig(shape={"intermediate": 8}, unit_criterion="unit_magnitude_l1"))


def test_a_fit_on_too_few_tokens_is_refused(scores: Scores) -> None:
    few = replace(scores, data={**scores.data, "samples": 2, "length": 24})
    with pytest.raises(
        UserError, match="fits 30 inputs on 24 calibration tokens.*: score again with --samples 4 .of 24"
    ):
        of(few, shape={"intermediate": 30}, unit_criterion="unit_taylor", correction="refit")
    one = replace(scores, data={**scores.data, "samples": 1})
    with pytest.raises(UserError, match="score at least two"):
        of(one, shape={"intermediate": 30}, unit_criterion="unit_taylor", correction="refit")


@pytest.mark.parametrize("inputs", [12, 30, 100, 1088])
@pytest.mark.parametrize("length", [8, 24, 512])
def test_the_number_of_samples_that_is_named_is_the_least_that_will_do(inputs: int, length: int) -> None:
    for samples in range(2, 9):
        try:
            check_tokens(inputs, "refit", samples, length)
        except UserError as error:
            named = int(re.search(r"--samples (\d+)", str(error))[1])  # type: ignore[index]
            check_tokens(inputs, "refit", named, length)
            with pytest.raises(UserError):
                check_tokens(inputs, "refit", named - 1, length)


def test_a_matrix_that_a_fit_makes_worse_is_left_as_it_is(
    trained: PreTrainedModel, trained_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fitted on noise, as a fit on too few tokens is: on other tokens nothing is better than that."""
    samples = calibration_samples(CalibrationConfig(str(data), samples=8, length=24), load_tokenizer(trained_folder))
    plan = Plan("llama", "", family_of(trained.config).shape(trained.config), whole(6))
    plan = replace(plan, blocks=tuple(replace(block, channels=tuple(range(24))) for block in plan.blocks))
    opened = ScoredModel(trained, samples, 2)
    assert corrected(plan, "refit", opened).corrections
    noise = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        "llmprune.pruning.selection.correction.least_squares",
        lambda xx, xy, ridge: 3 * torch.randn(xy.shape, generator=noise, dtype=xy.dtype),
    )
    assert not corrected(plan, "refit", opened).corrections


def test_losses_of_a_plan_are_told_and_ruinous_ones_refused(
    scores: Scores, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores.save(tmp_path / "scores.json")
    command = ("plan", str(tmp_path / "scores.json"), "--unit-criterion", "unit_taylor", "--correction", "refit")
    out = ("--out", str(tmp_path / "plan.json"), "--overwrite")
    best = "llmprune.pruning.selection.correction._Tried.best"
    monkeypatch.setattr(best, lambda one: {"linear": torch.zeros(len(one._gone), len(one._kept))})
    run(*command, "--shape", "intermediate=24", *out)
    told = re.search(
        r"loss before recovery ([\d.]+), ([\d.]+) without its correction; the source has", capsys.readouterr().out
    )
    assert told is not None and float(told[1]) == float(told[2]) > 0
    monkeypatch.setattr(best, lambda one: {"linear": 50 * torch.ones(len(one._gone), len(one._kept))})
    with pytest.raises(UserError, match="the correction makes the plan worse: .*; leave it out, .* or pass --force"):
        run(*command, "--shape", "intermediate=24", *out)
    run(*command, "--shape", "intermediate=24", "--force", *out)


def test_a_plan_that_is_worse_than_guessing_is_refused() -> None:
    """Unless the source is, too: then a guess says nothing."""
    with pytest.raises(UserError, match="ruins the model: calibration loss 6.0000, a uniform guess has 5.7000"):
        PlanLosses(source=2.0, uncorrected=None, plan=6.0, uniform=5.7).refuse_ruinous()
    with pytest.raises(UserError, match="ruins the model"):
        PlanLosses(source=2.0, uncorrected=None, plan=float("nan"), uniform=5.7).refuse_ruinous()
    PlanLosses(source=5.9, uncorrected=None, plan=6.0, uniform=5.7).refuse_ruinous()
    PlanLosses(source=2.0, uncorrected=4.0, plan=3.9, uniform=5.7).refuse_ruinous()
