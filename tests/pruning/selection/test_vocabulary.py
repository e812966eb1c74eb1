"""Tokens that go: from the use of tokens in text to a model and a tokenizer without them."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llmprune.conversion.commands import apply
from llmprune.conversion.verify import compare_models, open_for_comparison
from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.data.dataset import EvalDataset
from llmprune.data.prepared import PreparedData
from llmprune.data.token_counts import count_tokens
from llmprune.jobs.score import score
from llmprune.models.loading import count_parameters, load_model, load_model_config, load_tokenizer
from llmprune.models.placement import Placement
from llmprune.models.smaller_tokenizer import Vocabulary
from llmprune.plans.plan import Plan
from llmprune.pruning.budgets.settings import BudgetConfig
from llmprune.pruning.budgets.trial import Trial
from llmprune.pruning.planning import choose_plan, make_plan, open_scored
from llmprune.pruning.scoring.scores import Scores
from llmprune.pruning.scoring.settings import LayerScoringConfig
from llmprune.pruning.selection.settings import PlanConfig
from llmprune.pruning.selection.vocabulary import expected_uses
from llmprune.utils.errors import UserError

SIZE = 280  # of 300 tokens, of which 256 are bytes


@pytest.fixture(scope="module")
def scores(trained_folder: Path, data: Path) -> Scores:
    settings = LayerScoringConfig(CalibrationConfig(str(data), samples=8, length=24), ["unit_activation_l2"])
    return score(str(trained_folder), settings, Placement("float32", "cpu"))


@pytest.fixture(scope="module")
def plan(scores: Scores) -> Plan:
    return make_plan(scores, PlanConfig(shape={"vocabulary": SIZE}))


def test_uses_are_counted_in_prepared_data_and_in_text(corpus: Path, data: Path) -> None:
    tokenizer, prepared = load_tokenizer(data / "tokenizer"), PreparedData(data)
    found = count_tokens(CalibrationConfig(str(data)), tokenizer)
    expected: Counter[int] = Counter()
    for domain in prepared.manifest.domains:
        reader = prepared.reader(domain, "train")
        for shard, samples in enumerate(reader.shard_sizes):
            for place in range(samples):
                expected.update(reader.read(shard, place)["input_ids"].tolist())
    assert found == expected
    length = prepared.manifest.sequence_length
    assert count_tokens(CalibrationConfig(str(data)), tokenizer, most=3 * length).total() == 3 * length
    assert count_tokens(CalibrationConfig(str(corpus)), tokenizer).keys() == expected.keys() - {tokenizer.eos_token_id}
    with pytest.raises(UserError, match="score again with --data"):
        count_tokens(CalibrationConfig(), tokenizer)


def test_text_in_general_counts_too() -> None:
    assert expected_uses({3: 5}, 4, weight=0.0) == {0: 0, 1: 0, 2: 0, 3: 5}
    found = expected_uses({3: 25}, 4, weight=1.0)  # 25 tokens, shared out as 1 : 1/2 : 1/3 : 1/4
    assert found == pytest.approx({0: 12, 1: 6, 2: 4, 3: 28})


def test_the_cut_model_computes_the_same_of_the_tokens_that_stay(
    plan: Plan, trained_folder: Path, tmp_path: Path, corpus: Path
) -> None:
    apply(trained_folder, plan, tmp_path / "cut")
    whole, cut = open_for_comparison(trained_folder, plan), open_for_comparison(tmp_path / "cut")
    assert cut.config.vocab_size == SIZE == plan.shape.vocabulary
    assert compare_models(whole, cut, vocabulary=plan.vocabulary).max_rel <= 1e-6
    before, after = load_tokenizer(trained_folder), AutoTokenizer.from_pretrained(tmp_path / "cut")
    assert len(after) == SIZE
    assert plan.vocabulary is not None
    assert plan.vocabulary[after.eos_token_id] == before.eos_token_id == plan.vocabulary[cut.config.eos_token_id]
    assert GenerationConfig.from_pretrained(tmp_path / "cut").eos_token_id == after.eos_token_id
    text = (corpus / "letters" / "part.jsonl").read_text() + "für 東京 🙂\x00"
    assert after.decode(after(text)["input_ids"]) == text
    assert len(after(text)["input_ids"]) > len(before(text)["input_ids"])
    again = Plan.load(tmp_path / "cut" / "llmprune" / "plan.json")
    assert again.vocabulary == plan.vocabulary and again.shape == plan.shape
    AutoModelForCausalLM.from_pretrained(tmp_path / "cut").generate(torch.tensor([[1, 2]]), max_new_tokens=2)


def test_a_trial_has_the_loss_of_the_cut_model_by_the_tokens_of_the_source(
    plan: Plan, scores: Scores, trained_folder: Path, data: Path, tmp_path: Path
) -> None:
    apply(trained_folder, plan, tmp_path / "cut")
    cut, scored = load_model(tmp_path / "cut"), open_scored(scores, str(trained_folder))
    assert scored.tokenizer is not None and scored.samples is not None and plan.vocabulary is not None
    pieces = Vocabulary(scored.tokenizer).pieces(plan.vocabulary)
    total, count = 0.0, 0
    for sample in scored.samples.tolist():
        spelt = [list(pieces.get(token, (token,))) for token in sample]
        flat = torch.tensor([[plan.vocabulary.index(piece) for group in spelt for piece in group]])
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(cut(flat).logits[0, :-1], flat[0, 1:], reduction="none")
        total += losses[len(spelt[0]) - 1 :].sum().item()  # the sample's first token has no prediction
        count += len(sample) - 1
    trial = Trial(scored)
    assert trial.loss(plan) == pytest.approx(total / count, rel=1e-5)
    assert any(token in pieces for token in scored.samples.flatten().tolist())
    held_out = EvalDataset(PreparedData(data), 2)
    batch = {"input_ids": torch.stack([held_out[place]["input_ids"] for place in range(len(held_out))])}
    assert trial.loss(plan, batch) != trial.loss(plan)


def test_depth_and_tokens_go_together(scores: Scores, trained_folder: Path, tmp_path: Path) -> None:
    config = PlanConfig(shape={"vocabulary": SIZE, "intermediate": 40}, unit_criterion="unit_activation_l2")
    plan = make_plan(scores, config, model=str(trained_folder))
    apply(trained_folder, plan, tmp_path / "cut")
    whole, cut = open_for_comparison(trained_folder, plan), open_for_comparison(tmp_path / "cut")
    assert (cut.config.vocab_size, cut.config.intermediate_size) == (SIZE, 40)
    assert compare_models(whole, cut, vocabulary=plan.vocabulary).max_rel <= 1e-5


def test_a_budget_with_fewer_tokens(scores: Scores, trained_folder: Path, tmp_path: Path) -> None:
    config = PlanConfig(unit_criterion="unit_activation_l2", force=True)  # the tiny model needs all of its tokens
    whole, choice = choose_plan(scores, config, BudgetConfig(params="0.7", tries=3))
    plan, fewer = choose_plan(scores, config, BudgetConfig(params="0.7", vocabulary=SIZE, tries=3))
    apply(trained_folder, plan, tmp_path / "cut")
    counts = [count_parameters(load_model_config(folder)) for folder in (trained_folder, tmp_path / "cut")]
    assert fewer.costs["params"] == counts[1] <= 0.7 * counts[0]
    assert plan.shape.vocabulary == SIZE and whole.vocabulary is None
    assert plan.shape.intermediate > whole.shape.intermediate  # what the tokens took is left to the channels
    assert fewer.losses is not None and choice.losses is not None
    assert fewer.losses.source == choice.losses.source  # of the source with all tokens
    assert fewer.losses.plan == pytest.approx(Trial(open_scored(scores, str(trained_folder))).loss(plan), rel=0.2)


def test_plans_and_scores_of_before_know_no_vocabulary(scores: Scores, trained_folder: Path, tmp_path: Path) -> None:
    config = PlanConfig(shape={"intermediate": 40}, unit_criterion="unit_activation_l2")
    make_plan(scores, config).save(tmp_path / "plan.json")
    scores.save(tmp_path / "scores.json")
    for name in ("plan", "scores"):
        values = json.loads((tmp_path / f"{name}.json").read_text())
        del values["source"]["vocabulary"]
        values.pop("vocabulary", None)
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    old = Plan.load(tmp_path / "plan.json")
    assert old.source.vocabulary is None and old.source.agrees(scores.source) and old.source != scores.source
    apply(trained_folder, old, tmp_path / "cut")
    assert load_model_config(tmp_path / "cut").vocab_size == 300
    before = Scores.load(tmp_path / "scores.json")
    assert make_plan(before, config).blocks == old.blocks
    with pytest.raises(UserError, match="score again"):
        make_plan(before, PlanConfig(shape={"vocabulary": SIZE}))
    budget = BudgetConfig(params="0.7", tries=2)
    assert (
        choose_plan(before, PlanConfig(unit_criterion="unit_activation_l2", force=True), budget)[1].costs["params"] > 0
    )


@pytest.mark.parametrize(
    ("size", "message"),
    [(100, "a vocabulary of 100 is too small"), (301, "between 1 and the source's 300"), (300, "the model's own")],
)
def test_impossible_sizes(scores: Scores, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(scores, PlanConfig(shape={"vocabulary": size}))
