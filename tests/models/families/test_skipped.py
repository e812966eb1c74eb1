"""Blocks without attention or MLP: they compute as if the sub-layer added nothing, everywhere that a model goes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmprune.config.job_files import load_training_job
from llmprune.conversion.commands import apply, convert
from llmprune.conversion.verify import compare_models, open_for_comparison
from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.jobs.score import score
from llmprune.jobs.train import train
from llmprune.models.families import family_of, skipped_of
from llmprune.models.flops import macs
from llmprune.models.loading import count_parameters, load_model, load_model_config, load_tokenizer
from llmprune.models.placement import Placement
from llmprune.models.stored_weights import StoredWeights, fingerprint
from llmprune.plans.plan import KeptBlock, Plan
from llmprune.pruning.budgets.trial import Trial
from llmprune.pruning.planning import describe, make_plan, open_scored
from llmprune.pruning.scoring.scores import Scores
from llmprune.pruning.scoring.settings import LayerScoringConfig
from llmprune.pruning.selection.settings import PlanConfig
from llmprune.utils.errors import UserError
from tests.conftest import random_model
from tests.models.families.test_conformance import CONFIGS, logits, relative

PLAIN = [name for name in CONFIGS if "richer" not in name]
MIXTURES = [name for name in PLAIN if family_of(CONFIGS[name]).expert_modules is not None]


def plan_for(folder: Path, skipped: tuple[tuple[str, int], ...], keep: tuple[int, ...] | None = None) -> Plan:
    config = load_model_config(folder)
    family = family_of(config)
    source = family.shape(config)
    blocks = tuple(KeptBlock.whole(number) for number in keep or range(source.layers))
    return Plan(family.name, fingerprint(StoredWeights(folder), config), source, blocks, skipped=skipped)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_a_block_without_a_part_adds_nothing(name: str, first: bool, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = random_model(CONFIGS[name])
    model.save_pretrained(tmp_path / "source")
    mlp = () if name in MIXTURES else (("mlp", 2),)
    plan = plan_for(tmp_path / "source", (("attention", 0 if first else 1), *mlp))
    apply(tmp_path / "source", plan, tmp_path / "cut")
    whole, cut = open_for_comparison(tmp_path / "source", plan), open_for_comparison(tmp_path / "cut")
    assert compare_models(whole, cut).max_rel <= 1e-5  # gated with zero = removed
    assert relative(logits(model, tokens), logits(cut, tokens)) > 1e-3
    assert count_parameters(cut.config) < count_parameters(model.config)
    assert macs(cut.config, 8).forward < macs(model.config, 8).forward
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with_cache = cut.generate(tokens, use_cache=True, **options)
    without = cut.generate(tokens, use_cache=False, **options)
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(torch.stack(with_cache.logits), torch.stack(without.logits), rtol=1e-4, atol=1e-4)


def test_it_loads_where_llmprune_is_not_installed(trained_folder: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    apply(trained_folder, plan_for(trained_folder, (("attention", 2), ("mlp", 4))), tmp_path / "cut")
    torch.save((tokens, logits(load_model(tmp_path / "cut"), tokens)), tmp_path / "wanted.pt")
    program = f"""
import sys, torch
sys.modules["llmprune"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{tmp_path}/cut", trust_remote_code=True).eval()
tokens, wanted = torch.load("{tmp_path}/wanted.pt", weights_only=True)
with torch.no_grad():
    assert torch.allclose(model(tokens).logits, wanted, atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


def test_it_can_be_cut_again(trained_folder: Path, tmp_path: Path) -> None:
    source = trained_folder
    apply(source, plan_for(source, (("attention", 2), ("mlp", 4))), tmp_path / "once")
    apply(tmp_path / "once", plan_for(tmp_path / "once", (("attention", 5),), (1, 2, 5)), tmp_path / "twice")
    apply(source, plan_for(source, (("attention", 2), ("attention", 5)), (1, 2, 5)), tmp_path / "direct")
    assert skipped_of(load_model_config(tmp_path / "twice")) == {"attention": (1, 2)}
    assert compare_models(load_model(tmp_path / "twice"), load_model(tmp_path / "direct")).max_abs == 0
    apply(tmp_path / "once", plan_for(tmp_path / "once", (), (0, 1, 3)), tmp_path / "plain")
    plain = load_model_config(tmp_path / "plain")
    assert plain.model_type == "llama" and not skipped_of(plain)  # no code is needed any more
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain")


def test_it_can_be_trained_and_converted(trained_folder: Path, data: Path, tmp_path: Path) -> None:
    apply(trained_folder, plan_for(trained_folder, (("attention", 2), ("mlp", 4))), tmp_path / "cut")
    (tmp_path / "job.yaml").write_text(f"""
run: {{name: test, folder: {tmp_path / "run"}}}
model: {{path: {tmp_path / "cut"}}}
data: {{path: {data}, eval_samples_per_domain: 2}}
distillation: {{teacher: {trained_folder}, objectives: {{kl: 1.0, local: 1.0}}, dtype: float32}}
train: {{duration: 8ba, global_batch_size: 8, microbatch_size: 4, eval_interval: 1dur}}
loggers: {{console: false}}
""")
    train(load_training_job(tmp_path / "job.yaml"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    kl = [line["distillation/kl"] for line in lines if "distillation/kl" in line]
    assert kl[-1] < kl[0]
    convert(tmp_path / "run", tmp_path / "out")
    assert skipped_of(load_model_config(tmp_path / "out")) == {"attention": (2,), "mlp": (4,)}
    assert compare_models(open_for_comparison(tmp_path / "run"), load_model(tmp_path / "out")).max_rel <= 1e-6


@pytest.fixture(scope="module")
def scores(trained_folder: Path, data: Path) -> Scores:
    settings = LayerScoringConfig(CalibrationConfig(str(data), samples=8, length=24), ["unit_activation_l2"])
    return score(str(trained_folder), settings, Placement("float32", "cpu"))


def test_the_part_that_is_missed_least_goes_first(scores: Scores, trained_folder: Path, tmp_path: Path) -> None:
    source = trained_folder
    plan = make_plan(scores, PlanConfig(shape={"attention_layers": 4, "mlp_layers": 5}), model=str(source))
    trial = Trial(open_scored(scores, str(source)))
    samples = trial.scored.tokens
    expected: tuple[tuple[str, int], ...] = ()
    for sublayer in ("attention", "attention", "mlp"):
        other = "mlp" if sublayer == "attention" else "attention"
        free = [n for n in range(6) if (sublayer, n) not in expected and (other, n) not in expected]
        losses = {n: trial.loss(replace(plan, skipped=(*expected, (sublayer, n))), samples) for n in free}
        expected = (*expected, (sublayer, min(losses, key=lambda n: losses[n])))
    assert plan.skipped == expected
    assert describe(plan).startswith("6 of 6 blocks stay; without attention:")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    apply(source, plan, tmp_path / "cut")
    model = load_model(tmp_path / "cut")
    with torch.no_grad():
        loss = model(input_ids=samples, labels=samples).loss.item()
    assert trial.loss(plan, samples) == pytest.approx(loss, rel=1e-4)
    assert len(load_tokenizer(tmp_path / "cut")) == len(load_tokenizer(source))


@pytest.mark.parametrize(
    ("skipped", "message"),
    [
        ((("attention", 1), ("mlp", 1)), "both parts of block 1"),
        ((("attention", 6),), "of a block that does not stay"),
        ((("heads", 1),), "neither attention.N nor mlp.N"),
        ((("mlp", 1), ("mlp", 1)), "twice"),
    ],
)
def test_impossible_plans(trained_folder: Path, skipped: tuple[tuple[str, int], ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_for(trained_folder, skipped)


def test_what_is_not_possible_is_told(trained_folder: Path, data: Path, scores: Scores, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="7 attention_layers can't stay"):
        make_plan(scores, PlanConfig(shape={"attention_layers": 7}), model=str(trained_folder))
    with pytest.raises(UserError, match="does not see the tokens before"):
        apply(trained_folder, plan_for(trained_folder, tuple(("attention", n) for n in range(6))), tmp_path / "none")
    apply(trained_folder, plan_for(trained_folder, (("attention", 2),)), tmp_path / "cut")
    settings = LayerScoringConfig(CalibrationConfig(str(data), samples=2, length=24))
    with pytest.raises(UserError, match="but not scored"):
        score(str(tmp_path / "cut"), settings, Placement())
    windowed = random_model(CONFIGS["gemma3"])
    windowed.save_pretrained(tmp_path / "windows")
    kinds = windowed.config.layer_types
    first = tuple(("attention", number) for number, kind in enumerate(kinds) if kind == kinds[0])
    if len(first) < len(kinds):
        with pytest.raises(UserError, match="which the key/value cache begins with"):
            apply(tmp_path / "windows", plan_for(tmp_path / "windows", first), tmp_path / "other")
    random_model(CONFIGS[MIXTURES[0]]).save_pretrained(tmp_path / "mixture")
    with pytest.raises(UserError, match="not possible for mixtures of experts"):
        apply(tmp_path / "mixture", plan_for(tmp_path / "mixture", (("mlp", 1),)), tmp_path / "other")
