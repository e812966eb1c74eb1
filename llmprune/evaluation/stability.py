"""Stability: agreement of a smaller model's answers with the original's (LLM-Streamline, arXiv:2403.19135).

For the questions of a subject, Σ_i w_i · 1[both models right or both wrong], with w = softmax over the questions of
σ_i, and σ_i the population standard deviation of the losses of question i's options under the original model: questions
for which the original prefers an option have more weight. An option's loss is the mean over its tokens, in nats per
token: OpenCompass's logs, which the paper's figures come from, call it ``PPL``. The overall figure is the mean over
subjects.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llmprune.utils.errors import UserError
from llmprune.utils.files import parse_json, read_json

_LINE = 2**26  # largest size of a sample in a log, in bytes


@dataclass(frozen=True)
class Answer:
    """A model's answer to a multiple-choice question.

    Attributes:
        correct: whether the choice was right.
        losses: loss of each option, in nats per token of the option; empty if only the choice is known.
    """

    correct: bool
    losses: Sequence[float]


Subjects = dict[str, dict[str, Answer]]
"""Answers by subject and question."""


@dataclass(frozen=True)
class Stability:
    """Agreement in percent: the mean over subjects, and the value of each subject."""

    overall: float
    subjects: dict[str, float]


def subject_stability(before: Sequence[Answer], after: Sequence[Answer]) -> float:
    """The stability of one subject, in [0, 1]; ``before`` and ``after`` answer the same questions in the same order."""
    spreads = np.array([np.std(answer.losses) for answer in before])
    weights = np.exp(spreads - spreads.max())
    agree = np.array([a.correct == b.correct for a, b in zip(before, after, strict=True)])
    return float((weights / weights.sum())[agree].sum())


def stability(before: Subjects, after: Subjects) -> Stability:
    """Compare two models' answers.

    Raises:
        UserError: the answers are to different questions.
    """
    if set(before) != set(after):
        odd = sorted(set(before) ^ set(after))
        raise UserError(f"the logs are of different subjects: only one of them has {', '.join(odd[:5])}")
    found = {}
    for subject, answers in sorted(before.items()):
        others = after[subject]
        if answers.keys() != others.keys():
            odd = sorted(answers.keys() ^ others.keys())
            raise UserError(
                f"the logs of {subject} are of different questions ({len(odd)} are in one of them only, among them "
                f"{odd[0][:80]}): evaluate both models on the same task with the same limit"
            )
        found[subject] = 100 * subject_stability(list(answers.values()), [others[question] for question in answers])
    return Stability(float(np.mean(list(found.values()))), found)


def read_answers(path: Path | str, tokenizer: PreTrainedTokenizerBase | None = None) -> Subjects:
    """Read the answers in a log: a file or folder of lm-eval's sample logs, or a folder of OpenCompass predictions.

    Args:
        path: path of the log.
        tokenizer: tokenizer of the model, to count the tokens of options in logs that lm-eval's own command wrote.

    Raises:
        UserError: there is no readable log, or it has no multiple-choice questions.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    logs = [path] if path.is_file() else sorted(path.rglob("samples_*.jsonl"))
    if not logs and path.is_dir():
        logs = sorted(file for file in path.rglob("*.json") if not file.name.startswith("results_"))
    subjects: Subjects = {}
    for log in logs:
        try:
            read = _read_lm_eval(log, tokenizer) if log.suffix == ".jsonl" else _read_opencompass(log)
            answers = dict(read)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(f"{log} is no log of answers ({type(error).__name__}: {error})") from None
        for question, answer in answers.items():
            if not np.isfinite(answer.losses).all():
                raise UserError(f"{log}: question {question} has options whose loss is no finite number")
        name = _subject(log)
        if answers and name in subjects:
            raise UserError(f"{path} has several logs of {name}: name a folder with one run")
        if answers:
            subjects[name] = answers
    if not subjects:
        raise UserError(
            f"{path} has no multiple-choice answers: name lm-eval's sample logs (samples_TASK.jsonl) or a folder of "
            "OpenCompass predictions"
        )
    return subjects


def _subject(log: Path) -> str:
    """The task or data set in a log's name; lm-eval's command appends the time to it."""
    name = log.stem.removeprefix("samples_")
    return re.sub(r"_\d{4}-\d\d-\d\dT[\d\-.]+$", "", name)


def _read_lm_eval(log: Path, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[tuple[str, Answer]]:
    with log.open("rb") as file:
        while line := file.readline(_LINE + 1):
            if len(line) > _LINE:
                raise UserError(f"{log} has a line of more than {_LINE:,} bytes: is it the right file?")
            sample = parse_json(line, finite=False)
            responses = sample["filtered_resps"]
            if "acc" not in sample or len(responses) < 2:
                continue
            likelihoods = [float(response[0]) for response in responses]
            counts = sample.get("option_tokens") or _count(sample, tokenizer, log)
            contexts = [argument["arg_0"] for argument in sample["arguments"].values()]
            half = len(contexts) // 2
            # log-likelihoods without the question (acc_mutual_info) follow those of the options
            options = range(half if contexts[0] and not any(contexts[half:]) else len(likelihoods))
            losses = [-likelihoods[i] / max(counts[i], 1) for i in options]
            yield sample.get("doc_hash") or str(sample["doc_id"]), Answer(sample["acc"] == 1, losses)


def _count(sample: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, log: Path) -> list[int]:
    if tokenizer is None:
        raise UserError(
            f"{log} does not say how many tokens the options have: pass --tokenizer MODEL (logs that `llmprune "
            "evaluate` writes say it themselves)"
        )
    counts = []
    for argument in sample["arguments"].values():
        context, option = argument["arg_0"], argument["arg_1"]
        tail = len(context) - len(context.rstrip())
        context, option = context[: len(context) - tail], context[len(context) - tail :] + option
        whole = tokenizer(context + option, verbose=False)["input_ids"]
        counts.append(len(whole) - len(tokenizer(context, verbose=False)["input_ids"]))
    return counts


def _read_opencompass(log: Path) -> Iterator[tuple[str, Answer]]:
    """Yield the answers in OpenCompass predictions, in which ``PPL`` is the mean loss per token of an option."""
    predictions = read_json(log)
    for number, entry in predictions.items():
        losses = {
            label.removeprefix("label: "): float(value["PPL"])
            for label, value in entry.items()
            if label.startswith("label: ")
        }
        if len(losses) < 2:
            continue
        if "gold" not in entry:
            raise UserError(f"{log} does not hold the right answers ('gold'): run OpenCompass with its PPL inferencer")
        gold = entry["gold"]
        chosen = entry.get("prediction", min(losses, key=lambda label: losses[label]))
        yield number, Answer(str(chosen) == str(gold), list(losses.values()))
