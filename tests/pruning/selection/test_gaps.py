"""MLPs before removed blocks, corrected for what these blocks did."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune.conversion.commands import apply
from llmprune.conversion.verify import compare_models, open_for_comparison
from llmprune.data.calibration import calibration_samples
from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.jobs.score import score
from llmprune.models.block_hooks import blocks_of, hidden_states_in
from llmprune.models.families import family_of
from llmprune.models.least_squares import RIDGES
from llmprune.models.loading import load_tokenizer
from llmprune.models.placement import Placement
from llmprune.plans.plan import KeptBlock, Plan
from llmprune.pruning.planning import describe, make_plan
from llmprune.pruning.scoring.scores import Scores
from llmprune.pruning.scoring.settings import LayerScoringConfig
from llmprune.pruning.selection.correction import corrected
from llmprune.pruning.selection.gaps import gaps
from llmprune.pruning.selection.methods import ScoredModel
from llmprune.pruning.selection.settings import PlanConfig
from llmprune.utils.errors import UserError
from tests.conftest import random_model
from tests.models.families.test_conformance import CONFIGS

CPU = Placement("float32", "cpu")
CRITERIA = ["unit_activation_l2", "tail"]
SAMPLES = CalibrationConfig(samples=9, length=24)  # fitted on six


def scored(folder: Path, data: Path) -> Scores:
    return score(str(folder), LayerScoringConfig(replace(SAMPLES, path=str(data)), CRITERIA), CPU)


@pytest.fixture(scope="module")
def scores(trained_folder: Path, data: Path) -> Scores:
    return scored(trained_folder, data)


def without(scores: Scores, *gone: int, **settings: Any) -> Plan:
    drop = [str(number) for number in gone]
    return make_plan(scores, PlanConfig(method="list", drop=drop, correction="refit", force=True, **settings))


def read(model: PreTrainedModel, tokens: Tensor, outputs: list[nn.Module], inputs: list[nn.Module]) -> list[Tensor]:
    """The outputs and inputs of some modules in one forward pass, float64 [samples, length, size]."""
    found: dict[tuple[str, int], Tensor] = {}
    hooks = [
        module.register_forward_hook(
            lambda m, args, out, place=place: found.update({("out", place): hidden_states_in(out).double()})
        )
        for place, module in enumerate(outputs)
    ]
    hooks += [
        module.register_forward_pre_hook(lambda m, args, place=place: found.update({("in", place): args[0].double()}))
        for place, module in enumerate(inputs)
    ]
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return [found["out", place] for place in range(len(outputs))] + [found["in", place] for place in range(len(inputs))]


def tokens_of(scores: Scores, folder: Path) -> Tensor:
    return calibration_samples(CalibrationConfig(**scores.data), load_tokenizer(folder))


@pytest.mark.parametrize("shape", [None, {"intermediate": 30}], ids=["whole", "narrower"])
def test_the_least_squares_solution(
    scores: Scores, trained: PreTrainedModel, trained_folder: Path, shape: dict[str, int] | None
) -> None:
    """Blocks 2 and 3 go: block 1 takes over what is linear in its channels, by a solver of its own."""
    narrow = {} if shape is None else {"shape": shape, "unit_criterion": "unit_activation_l2"}
    plan = without(scores, 2, 3, **narrow)
    layers = trained.model.layers
    before, after, a = read(
        trained, tokens_of(scores, trained_folder), [layers[1], layers[3]], [layers[1].mlp.down_proj]
    )
    kept = plan.inputs(plan.blocks[1], "mlp")[0]
    a, y = a[..., kept], after - before
    x = a[:6].flatten(0, 1)

    def solved(share: float) -> Tensor:
        size = x.shape[1]
        ridge = (share * x.square().mean() * len(x)).sqrt() * torch.eye(size)  # as rows of their own
        wanted = torch.cat([y[:6].flatten(0, 1), torch.zeros(size, 32)])
        return torch.linalg.lstsq(torch.cat([x, ridge]), wanted).solution.T

    def error(matrix: Tensor) -> float:
        return (y[6:] - a[6:] @ matrix.T).square().sum().item()

    best = min([solved(share) for share in RIDGES], key=error)
    assert error(best) < error(torch.zeros_like(best))
    torch.testing.assert_close(plan.corrections["across.mlp.1"].double(), best, rtol=1e-3, atol=1e-4)
    assert ("linear.mlp.1" in plan.corrections) == (shape is not None)
    assert "MLPs corrected for the blocks after them: 1" in describe(plan)


@pytest.mark.parametrize("shape", [None, {"intermediate": 30, "hidden": 24}], ids=["whole", "narrower"])
def test_the_cut_model(scores: Scores, trained_folder: Path, tmp_path: Path, shape: dict[str, int] | None) -> None:
    narrow = {} if shape is None else {"shape": shape, "unit_criterion": "unit_activation_l2"}
    plan = without(scores, 1, 4, 5, **narrow)
    plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert {name for name in plan.corrections if name.startswith("across")} == {"across.mlp.0", "across.mlp.3"}
    apply(trained_folder, plan, tmp_path / "cut")
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    difference = compare_models(open_for_comparison(trained_folder, plan), cut)
    assert difference.max_abs < 1e-4
    if shape is None:  # by hand
        source = AutoModelForCausalLM.from_pretrained(trained_folder)
        for place, block in enumerate((0, 2, 3)):
            weight = source.model.layers[block].mlp.down_proj.weight
            added = plan.corrections.get(f"across.mlp.{block}", torch.zeros_like(weight))
            torch.testing.assert_close(cut.model.layers[place].mlp.down_proj.weight, weight + added)


def test_states_after_the_removed_blocks_are_nearer(
    scores: Scores, trained: PreTrainedModel, trained_folder: Path, tmp_path: Path
) -> None:
    tokens = tokens_of(scores, trained_folder)
    plan, errors = without(scores, 2, 3), []
    (wanted,) = read(trained, tokens, [trained.model.layers[3]], [])
    for name, one in (("plain", replace(plan, corrections={})), ("corrected", plan)):
        apply(trained_folder, one, tmp_path / name)
        cut = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        errors.append((read(cut, tokens, [cut.model.layers[1]], [])[0] - wanted).square().mean().item())
    assert errors[1] < 0.9 * errors[0]


def test_which_blocks_can_take_over() -> None:
    config = CONFIGS["llama-grouped-tied"]
    family = family_of(config)
    source = replace(family.shape(config), layers=9)

    def of(*blocks: KeptBlock, skipped: tuple[tuple[str, int], ...] = ()) -> dict[int, int]:
        return gaps(Plan(family.name, "", source, blocks, skipped=skipped), family)

    whole = KeptBlock.whole
    assert of(*map(whole, range(9))) == {}
    assert of(*map(whole, (2, 3, 6, 7))) == {3: 5, 7: 8}  # before the first there is none
    assert of(whole(0), KeptBlock(1, 3), whole(4), whole(8)) == {4: 7}  # MLP 3 is followed by block 4
    assert of(whole(0), whole(1), whole(8), skipped=(("mlp", 1),)) == {}
    merged = replace(whole(1), merge=((1, 0.5), (2, 0.5)))
    assert of(whole(0), merged, whole(8)) == {}


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "mixtral"])
def test_families_without_such_an_mlp(name: str, data: Path, tmp_path: Path) -> None:
    """A norm follows their MLPs, or experts have many output matrices."""
    random_model(CONFIGS[name]).save_pretrained(tmp_path / "model")
    load_tokenizer(data / "tokenizer").save_pretrained(tmp_path / "model")
    assert not without(scored(tmp_path / "model", data), 2).corrections


@pytest.mark.parametrize(
    "name", ["opt", "gpt_neox", "gpt_neox-sequential", "llama-biases", "mistral", "gemma", "phi3", "qwen2-sliding"]
)
def test_families_with_one(name: str, data: Path, tmp_path: Path) -> None:
    """What is fitted is a part of what block 2 added: the states are nearer to those after it."""
    model = random_model(CONFIGS[name])
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(data / "tokenizer").save_pretrained(tmp_path / "model")
    found = scored(tmp_path / "model", data)
    plan, tokens, errors = without(found, 2), tokens_of(found, tmp_path / "model"), []
    assert [*plan.corrections] == ["across.mlp.1"]
    (wanted,) = read(model, tokens, [blocks_of(model)[2]], [])
    for name, one in (("plain", replace(plan, corrections={})), ("corrected", plan)):
        apply(tmp_path / "model", one, tmp_path / name)
        cut = open_for_comparison(tmp_path / name)
        errors.append((read(cut, tokens, [blocks_of(cut)[1]], [])[0] - wanted).square().sum().item())
    assert errors[1] < errors[0]
    assert compare_models(open_for_comparison(tmp_path / "model", plan), cut).max_abs < 1e-4


def test_it_does_not_depend_on_the_batch(scores: Scores, trained_folder: Path) -> None:
    model, tokens = AutoModelForCausalLM.from_pretrained(trained_folder), tokens_of(scores, trained_folder)
    plan = replace(without(scores, 2, 3), corrections={})
    (one,), (other,) = (
        corrected(plan, "refit", ScoredModel(model, tokens, size)).corrections.values() for size in (2, 9)
    )
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_autocast(scores: Scores, trained_folder: Path) -> None:
    """Products within the model are in bfloat16; the fit is not."""
    model, tokens = AutoModelForCausalLM.from_pretrained(trained_folder), tokens_of(scores, trained_folder)
    plan = without(scores, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = corrected(plan, "refit", ScoredModel(model, tokens, 9)).corrections.values()
    (exact,) = plan.corrections.values()
    assert found.dtype == torch.float32 and (found - exact).norm() < 0.1 * exact.norm()


def test_sub_layers_go_first(scores: Scores) -> None:
    """An MLP that goes itself takes nothing over."""
    shape = {"layers": 4, "mlp_layers": 2}
    settings = PlanConfig(shape=shape, criterion="tail", correction="refit", force=True)
    plan = make_plan(scores, settings)
    gone = {number for name, number in plan.skipped if name == "mlp"}
    assert len(gone) == 2 and not {f"across.mlp.{number}" for number in gone} & set(plan.corrections)


def test_nothing_to_correct(scores: Scores, caplog: pytest.LogCaptureFixture) -> None:
    plan = without(scores, 0)  # the first block: no MLP comes before it
    assert not plan.corrections and len(plan.blocks) == 5
    assert "no removed block follows an MLP that can be corrected" in caplog.text
    with pytest.raises(UserError, match="nothing to correct: the plan takes no heads, no channels and"):
        make_plan(scores, PlanConfig(method="list", drop=["2"], correction="mean"))


def test_a_correction_that_does_not_help_is_left_out(scores: Scores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "llmprune.pruning.selection.gaps.least_squares", lambda xx, xy, ridge: torch.full_like(xy, 100.0)
    )
    assert not without(scores, 2, 3).corrections


def test_too_few_samples(trained_folder: Path, data: Path) -> None:
    few = LayerScoringConfig(CalibrationConfig(str(data), samples=3, length=24), ["unit_activation_l2"])
    with pytest.raises(UserError, match=r"fits 48 inputs on 48 calibration tokens"):
        without(score(str(trained_folder), few, CPU), 2)
