"""A multiple-choice task whose questions lie in a local file."""

import json
from pathlib import Path

WORDS = ["one", "two", "three", "four", "five", "six"]


def make_task(folder: Path, name: str = "counting", questions: int = 12) -> str:
    """Write a task in which the next number word is asked for; returns its name."""
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.jsonl").open("w") as file:
        for number in range(questions):
            after = (number + 2) % 6
            choices = [WORDS[(after + shift) % 6] for shift in (0, 1, 3)]
            order = [(i + number) % 3 for i in range(3)]
            line = {
                "question": f"{WORDS[number % 6]} {WORDS[(number + 1) % 6]}",
                "choices": [choices[i] for i in order],
                "answer": order.index(0),
            }
            file.write(json.dumps(line) + "\n")
    (folder / f"{name}.yaml").write_text(
        f"""task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/{name}.jsonl
    validation: {folder}/{name}.jsonl
output_type: multiple_choice
test_split: test
fewshot_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
    )
    return name
