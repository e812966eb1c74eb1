"""Plans to a narrower shape, what they cut, and what output matrices make up for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune.cli import app
from llmprune.convert.commands import apply
from llmprune.data.calibration import CalibrationConfig, calibration_samples
from llmprune.errors import UserError
from llmprune.evaluation.verify import compare, open_for_comparison
from llmprune.families import Shape, family_of
from llmprune.models.loading import load_config, load_tokenizer
from llmprune.models.placement import Placement
from llmprune.planning import make_plan
from llmprune.plans import Plan
from llmprune.score import score
from llmprune.scoring.scores import Scores
from llmprune.scoring.selection import PlanConfig
from llmprune.scoring.settings import LayerScoringConfig
from tests.conftest import random_model, tiny_config
from tests.families.test_conformance import CONFIGS

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
        shape={"layers": 4, "hidden": 20, "heads": 6, "intermediate": 30},
        criterion="block_influence",
        unit_criterion="unit_taylor",
    )
    assert plan.shape == Shape(layers=4, hidden=20, heads=6, kv_heads=3, head_dim=8, intermediate=30)
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
    assert plan.hidden == tuple(sorted(sorted(range(32), key=lambda d: -totals[d])[:20]))


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
    found = score(str(tmp_path / "model"), LayerScoringConfig(CalibrationConfig(str(data), samples=3, length=16)), CPU)
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
        assert compare(whole, open_for_comparison(tmp_path / "cut"), length=48).max_rel <= 1e-5
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
    plan = of(scores, shape={"intermediate": 12}, unit_criterion="unit_activation_l2", correction="refit")
    block = plan.blocks[0]
    inputs: list[Tensor] = []
    hook = trained.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    samples = calibration_samples(CalibrationConfig(**scores.data), load_tokenizer(trained_folder))
    with torch.no_grad():
        trained(input_ids=samples)
    hook.remove()
    a = inputs[0].flatten(0, 1).double()
    weight = trained.model.layers[0].mlp.down_proj.weight.detach().double()
    kept = list(block.channels or ())
    gone = [c for c in range(48) if c not in kept]
    x = a[:, kept]
    ridge = (1e-4 * x.square().mean() * len(x)).sqrt() * torch.eye(12)  # as rows of their own
    own = torch.linalg.lstsq(torch.cat([x, ridge]), torch.cat([a[:, gone], torch.zeros(12, 36)])).solution.T
    torch.testing.assert_close(plan.corrections["linear.mlp.0"].double(), own, rtol=1e-3, atol=1e-4)
    ours = weight[:, kept] + weight[:, gone] @ plan.corrections["linear.mlp.0"].double()

    def error(matrix: Tensor) -> float:
        return (a @ weight.T - x @ matrix.T).square().mean().item()

    assert error(ours) < 0.1 * error(weight[:, kept])


def test_means_join_the_bias(data: Path, tmp_path: Path) -> None:
    model = random_model(tiny_config(attention_bias=True, mlp_bias=True))
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(data / "tokenizer").save_pretrained(tmp_path / "model")
    found = score(str(tmp_path / "model"), LayerScoringConfig(CalibrationConfig(str(data), samples=6, length=24)), CPU)
    settings = PlanConfig(shape={"intermediate": 24}, unit_criterion="unit_activation_l2")
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
    assert "5 of 6 blocks stay" in (printed := capsys.readouterr().out) and "intermediate 24 of 48" in printed
    run("apply", str(trained_folder), plan, "--out", str(tmp_path / "cut"))
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (5, 24)


def test_a_refit_has_a_constant_where_there_is_a_bias(data: Path, tmp_path: Path) -> None:
    model = random_model(tiny_config(mlp_bias=True))
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(data / "tokenizer").save_pretrained(tmp_path / "model")
    found = score(str(tmp_path / "model"), LayerScoringConfig(CalibrationConfig(str(data), samples=9, length=24)), CPU)
    plan = make_plan(found, PlanConfig(shape={"intermediate": 40}, unit_criterion="unit_taylor", correction="refit"))
    kept = list(plan.blocks[0].channels or ())
    gone = [channel for channel in range(48) if channel not in kept]
    inputs: list[Tensor] = []
    hook = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    with torch.no_grad():
        model(input_ids=calibration_samples(CalibrationConfig(**found.data), load_tokenizer(tmp_path / "model")))
    hook.remove()
    a = inputs[0].flatten(0, 1).double()
    x, wanted = torch.cat([a[:, kept], torch.ones(len(a), 1)], dim=1), a[:, gone]
    best = (wanted - x @ torch.linalg.lstsq(x, wanted).solution).square().mean().item()
    linear, mean = (plan.corrections[f"{name}.mlp.0"].double() for name in ("linear", "mean"))
    ours = (wanted - a[:, kept] @ linear.T - mean).square().mean().item()
    uncentred = (wanted - a[:, kept] @ torch.linalg.lstsq(a[:, kept], wanted).solution).square().mean().item()
    assert best <= ours < 1.001 * best < uncentred


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "intermediate=24"], "name the criterion that ranks channels with --unit-criterion"),
        (["--shape", "width=24"], "a shape has no 'width'"),
        (["--shape", "hidden"], "'hidden' is no size: write"),
        (["--shape", "hidden=32", "--unit-criterion", "unit_taylor"], "nothing would go"),
        (["--shape", "layers=5,hidden=24", "--drop", "3"], "leave out --remove and --drop"),
        (["--shape", "", "--unit-criterion", "unit_taylor"], "the shape is empty"),
        (["--shape", "heads=4,heads=2", "--unit-criterion", "unit_taylor"], "'heads' stands twice"),
        (["--shape", "hidden=64"], "must lie between 1 and the source's 32"),
        (["--shape", "experts=2"], "this model has none"),
        (["--shape", "heads=3", "--unit-criterion", "unit_taylor"], "is not a multiple of the source's 2"),
        (["--shape", "hidden=24", "--unit-criterion", "taylor"], "no criterion 'taylor' of units"),
        (["--shape", "hidden=24", "--unit-criterion", "unit_tailor"], "did you mean 'unit_taylor'"),
        (["--shape", "layers=4", "--remove", "2", "--criterion", "tail"], "leave out --remove"),
        (["--shape", "hidden=24", "--unit-criterion", "unit_taylor", "--criterion", "tail"], "no blocks go"),
        (["--unit-criterion", "unit_taylor", "--remove", "1"], "go with a shape"),
        (["--criterion", "unit_taylor", "--remove", "1"], "scores units, not blocks"),
        (["--shape", "hidden=24", "--unit-criterion", "unit_taylor", "--correction", "refit"], "nothing to correct"),
        (["--shape", "hidden=24", "--unit-criterion", "unit_taylor", "--correction", "fit"], "no correction 'fit'"),
        (["--shape", "intermediate=24", "--unit-criterion", "unit_taylor", "--correction", "mean"], "no biases"),
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
    assert load_config(tmp_path / "model").num_experts_per_tok == 2
    with pytest.raises(UserError, match="goes through 2 experts"):
        make_plan(found, PlanConfig(shape={"experts": 1}, unit_criterion="unit_magnitude_l1"))
    with pytest.raises(UserError, match="narrowed by its experts"):
        make_plan(found, PlanConfig(shape={"intermediate": 8}, unit_criterion="unit_magnitude_l1"))
