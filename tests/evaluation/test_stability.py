"""Stability by hand, its invariances, and the logs it is read from."""

import json
import math
from pathlib import Path

import pytest

from llmprune.errors import UserError
from llmprune.evaluation.stability import Answer, read_answers, stability, subject_stability


def answers(*given: tuple[bool, list[float]]) -> list[Answer]:
    return [Answer(*one) for one in given]


def test_by_hand() -> None:
    """σ = 0, 1 and 2, so the weights are 1, e and e² over their sum; the models differ on the second question."""
    before = answers((True, [3.0, 3.0]), (False, [2.0, 4.0]), (True, [1.0, 5.0]))
    after = answers((True, [9.0, 1.0]), (True, [1.0, 2.0]), (True, [1.0, 1.0]))
    e = math.e
    assert subject_stability(before, after) == pytest.approx((1 + e**2) / (1 + e + e**2))


def test_invariances() -> None:
    before = answers((True, [3.0, 8.0]), (False, [2.0, 4.5]), (True, [900.0, 5.0]))
    assert subject_stability(before, before) == pytest.approx(1)
    flipped = [Answer(not a.correct, a.perplexities) for a in before]
    assert subject_stability(before, flipped) == 0
    after = answers((True, []), (True, []), (False, []))
    shifted = [Answer(a.correct, [p + 7 for p in a.perplexities]) for a in before]
    assert subject_stability(before, after) == pytest.approx(subject_stability(shifted, after))
    order = [2, 0, 1]
    assert subject_stability([before[i] for i in order], [after[i] for i in order]) == pytest.approx(
        subject_stability(before, after)
    )


def log(folder: Path, name: str, questions: list[tuple[str, bool, list[float]]], tokens: bool = True) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / name).open("w") as file:
        for question, correct, likelihoods in questions:
            line = {
                "doc_hash": question,
                "filtered_resps": [[str(value), "False"] for value in likelihoods],
                "arguments": {f"gen_args_{i}": {"arg_0": "a b ", "arg_1": "c d"} for i in range(len(likelihoods))},
                "acc": float(correct),
            }
            file.write(json.dumps({**line, **({"option_tokens": [2] * len(likelihoods)} if tokens else {})}) + "\n")


def test_lm_eval_logs(tmp_path: Path) -> None:
    questions = [("q1", True, [-2.0, -4.0]), ("q2", False, [-6.0, -1.0])]
    log(tmp_path / "before", "samples_arc_2025-01-02T03-04-05.123.jsonl", questions)
    log(tmp_path / "before", "samples_boolq.jsonl", questions)
    log(tmp_path / "after", "samples_arc.jsonl", list(reversed(questions)))
    log(tmp_path / "after", "samples_boolq.jsonl", [("q1", False, [-1.0, -1.0]), ("q2", False, [-1.0, -1.0])])
    before = read_answers(tmp_path / "before")
    assert before["arc"]["q1"].perplexities == pytest.approx([math.exp(1), math.exp(2)])
    found = stability(before, read_answers(tmp_path / "after"))
    sigma = [(math.exp(2) - math.exp(1)) / 2, (math.exp(3) - math.exp(0.5)) / 2]
    weights = [math.exp(s) for s in sigma]
    assert found.subjects == pytest.approx({"arc": 100, "boolq": 100 * weights[1] / sum(weights)})
    assert found.overall == pytest.approx((found.subjects["arc"] + found.subjects["boolq"]) / 2)


def test_tokens_of_options_are_counted(tmp_path: Path, model_folder: Path) -> None:
    from llmprune.models.loading import load_tokenizer

    log(tmp_path / "before", "samples_arc.jsonl", [("q1", True, [-2.0, -4.0])], tokens=False)
    with pytest.raises(UserError, match="--tokenizer"):
        read_answers(tmp_path / "before")
    tokenizer = load_tokenizer(model_folder)
    number = len(tokenizer("a b c d")["input_ids"]) - len(tokenizer("a b")["input_ids"])
    found = read_answers(tmp_path / "before", tokenizer)["arc"]["q1"].perplexities
    assert found == pytest.approx([math.exp(2 / number), math.exp(4 / number)])


def test_likelihoods_without_the_question_do_not_count(tmp_path: Path) -> None:
    line = {
        "doc_hash": "q", "acc": 1.0, "option_tokens": [1, 1, 1, 1],
        "filtered_resps": [[-1.0, False], [-2.0, False], [-9.0, False], [-5.0, False]],
        "arguments": {f"gen_args_{i}": {"arg_0": "a" if i < 2 else "", "arg_1": "c"} for i in range(4)},
    }  # fmt: skip
    (tmp_path / "samples_arc.jsonl").write_text(json.dumps(line) + "\n")
    assert len(read_answers(tmp_path)["arc"]["q"].perplexities) == 2


def test_opencompass(tmp_path: Path) -> None:
    """Its ``PPL`` is the mean loss per token."""
    for folder, second in (("before", "A"), ("after", "B")):
        (tmp_path / folder / "model").mkdir(parents=True)
        options = {"label: A": {"PPL": 1.0}, "label: B": {"PPL": 2.0}}
        predictions = {
            "0": {**options, "prediction": "A", "gold": "A"},
            "1": {**options, "label: B": {"PPL": 1.5}, "prediction": second, "gold": "A"},
        }
        (tmp_path / folder / "model" / "ceval.json").write_text(json.dumps(predictions))
    sigma = [(math.e**2 - math.e) / 2, (math.e**1.5 - math.e) / 2]
    found = stability(read_answers(tmp_path / "before"), read_answers(tmp_path / "after"))
    assert found.overall == pytest.approx(100 / (1 + math.exp(sigma[1] - sigma[0])))


def test_mistakes(tmp_path: Path) -> None:
    log(tmp_path / "before", "samples_arc.jsonl", [("q1", True, [-2.0, -4.0])])
    log(tmp_path / "other", "samples_arc.jsonl", [("q2", True, [-2.0, -4.0])])
    log(tmp_path / "task", "samples_piqa.jsonl", [("q1", True, [-2.0, -4.0])])
    before = read_answers(tmp_path / "before")
    for folder, message in (("other", "different questions"), ("task", "different subjects")):
        with pytest.raises(UserError, match=message):
            stability(before, read_answers(tmp_path / folder))
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.jsonl").write_text("{'a'\n")
    (tmp_path / "junk.json").write_text("[1, 2]")
    for name, message in (
        ("none", "does not exist"), ("empty", "no multiple-choice"), ("junk.jsonl", "no log"), ("junk.json", "no log")
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            read_answers(tmp_path / name)
