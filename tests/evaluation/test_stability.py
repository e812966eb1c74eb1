"""Stability by hand, its invariances, and the logs it is read from."""

import json
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from llmprune.evaluation.stability import Answer, read_answers, stability, subject_stability
from llmprune.utils.errors import UserError


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
    flipped = [Answer(not a.correct, a.losses) for a in before]
    assert subject_stability(before, flipped) == 0
    after = answers((True, []), (True, []), (False, []))
    shifted = [Answer(a.correct, [loss + 7 for loss in a.losses]) for a in before]
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
    assert before["arc"]["q1"].losses == [1, 2]
    found = stability(before, read_answers(tmp_path / "after"))
    sigma = [(2 - 1) / 2, (3 - 0.5) / 2]
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
    found = read_answers(tmp_path / "before", tokenizer)["arc"]["q1"].losses
    assert found == pytest.approx([2 / number, 4 / number])


def test_likelihoods_without_the_question_do_not_count(tmp_path: Path) -> None:
    line = {
        "doc_hash": "q", "acc": 1.0, "option_tokens": [1, 1, 1, 1],
        "filtered_resps": [[-1.0, False], [-2.0, False], [-9.0, False], [-5.0, False]],
        "arguments": {f"gen_args_{i}": {"arg_0": "a" if i < 2 else "", "arg_1": "c"} for i in range(4)},
    }  # fmt: skip
    (tmp_path / "samples_arc.jsonl").write_text(json.dumps(line) + "\n")
    assert len(read_answers(tmp_path)["arc"]["q"].losses) == 2


# Six questions: the options' losses in nats per token under the original, and whether each model was right.
SIX = [
    ([1.0, 2.5, 3.0], True, True),
    ([2.0, 2.1, 2.2], False, True),
    ([0.5, 4.0, 4.5], True, False),
    ([3.0, 1.0, 2.0], False, False),
    ([1.5, 1.6, 5.0], True, True),
    ([2.7, 2.6, 2.5], True, False),
]


def naive() -> float:
    """The figure in percent, line by line."""
    weights = []
    for losses, _, _ in SIX:
        mean = sum(losses) / len(losses)
        sigma = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / len(losses))
        weights.append(math.exp(sigma))
    agreeing = 0.0
    for weight, (_, before, after) in zip(weights, SIX, strict=True):
        if before == after:
            agreeing += weight
    return 100 * agreeing / sum(weights)


def write_opencompass(folder: Path, right: list[bool]) -> None:
    """Its ``PPL`` is the mean loss per token."""
    (folder / "model").mkdir(parents=True)
    predictions = {
        str(i): {
            **{f"label: {letter}": {"PPL": loss} for letter, loss in zip("ABC", losses, strict=True)},
            "prediction": "A" if right[i] else "B",
            "gold": "A",
        }
        for i, (losses, _, _) in enumerate(SIX)
    }
    (folder / "model" / "ceval.json").write_text(json.dumps(predictions))


def write_lm_eval(folder: Path, right: list[bool]) -> None:
    """Its logs hold the sum of the log-likelihoods of an option's tokens, here two of each."""
    log(folder, "samples_ceval.jsonl", [(f"q{i}", right[i], [-2 * loss for loss in SIX[i][0]]) for i in range(6)])


@pytest.mark.parametrize("write", [write_opencompass, write_lm_eval])
def test_six_questions(tmp_path: Path, write: Callable[[Path, list[bool]], None]) -> None:
    write(tmp_path / "before", [before for _, before, _ in SIX])
    write(tmp_path / "after", [after for _, _, after in SIX])
    found = stability(read_answers(tmp_path / "before"), read_answers(tmp_path / "after"))
    assert found.overall == pytest.approx(naive())


def test_no_question_decides_alone() -> None:
    """Of a thousand questions with losses as models have them, hundreds count."""
    draw = random.Random(1)
    before = [Answer(True, [draw.gauss(3, 0.5) for _ in range(4)]) for _ in range(1000)]
    heaviest = max(range(1000), key=lambda i: statistics.pstdev(before[i].losses))
    after = [Answer(i != heaviest, []) for i in range(1000)]
    assert 0.99 < subject_stability(before, after) < 0.999  # 1 − its weight


def test_mistakes(tmp_path: Path) -> None:
    log(tmp_path / "before", "samples_arc.jsonl", [("q1", True, [-2.0, -4.0])])
    log(tmp_path / "other", "samples_arc.jsonl", [("q2", True, [-2.0, -4.0])])
    log(tmp_path / "nan", "samples_arc.jsonl", [("q1", True, [math.nan, -4.0])])
    with pytest.raises(UserError, match="samples_arc.jsonl: question q1 has options whose loss is no finite number"):
        read_answers(tmp_path / "nan")
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
