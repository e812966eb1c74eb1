"""Writing continuations and scoring them."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from llmprune.cli import app
from llmprune.evaluation.continuations import (
    Prompt,
    continuation_scores,
    encode_prompts,
    read_continuations,
    read_prompts,
    save_continuations,
    write_continuations,
)
from llmprune.evaluation.settings import GenerationConfig
from llmprune.models.loaded import LoadedModel, open_model
from llmprune.models.placement import Placement
from llmprune.utils.errors import UserError


@pytest.fixture(scope="module")
def opened(trained_folder: Path) -> LoadedModel:
    return open_model(str(trained_folder), Placement(device="cpu"))


def test_known_scores() -> None:
    same = continuation_scores([{"output": "the cat sat on the mat", "reference": "the cat sat on the mat"}])
    assert all(same[name] == pytest.approx(100) for name in ("bleu", "chrf", "rouge1", "rouge2", "rougeL"))
    assert same["edit_similarity"] == 100
    # four of the six characters of "kitten" stay on the way to "sitting", which has seven: 1 - 3/7
    assert continuation_scores([{"output": "kitten", "reference": "sitting"}])["edit_similarity"] == pytest.approx(
        400 / 7
    )
    # unigrams in common: a, c of two and four: precision 1, recall 1/2
    found = continuation_scores([{"output": "a c", "reference": "a b c d"}, {"output": "x", "reference": None}])
    assert found["rouge1"] == pytest.approx(200 / 3) and found["outputs"] == 1
    with pytest.raises(UserError, match="no references"):
        continuation_scores([{"output": "x", "reference": None}])


def test_a_chat_is_what_the_template_writes(opened: LoadedModel) -> None:
    tokenizer, config = copy.deepcopy(opened.tokenizer), opened.model.config
    with pytest.raises(UserError, match="no chat template"):
        encode_prompts([Prompt("one", chat=True)], tokenizer, 4, config)
    start = tokenizer.bos_token or tokenizer.eos_token
    special = [(start, tokenizer.convert_tokens_to_ids(start))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{start} $A", special_tokens=special)
    assert tokenizer.decode(tokenizer("one")["input_ids"]).startswith(start)
    tokenizer.chat_template = (
        f"{start}{{% for m in messages %}}{{{{ m.role }}}}: {{{{ m.content }}}} {{% endfor %}}"
        "{% if add_generation_prompt %}answer: {% endif %}"
    )
    (ids,) = encode_prompts([Prompt("one two", chat=True)], tokenizer, 4, config)
    assert tokenizer.decode(ids) == f"{start}user: one two answer: "  # nothing is put before or after it
    tokenizer.chat_template = "{{ raise_exception('not this') }}"
    with pytest.raises(UserError, match="chat template fails: not this"):
        encode_prompts([Prompt("one", chat=True)], tokenizer, 4, config)


def test_greedy_is_the_likeliest_token_whatever_the_batch(opened: LoadedModel) -> None:
    prompts = [Prompt("3: one two"), Prompt("7: alpha beta gamma delta alpha"), Prompt("1")]
    config = GenerationConfig(max_new_tokens=8, temperature=0, batch_size=3)
    together = write_continuations(opened, prompts, config)
    for prompt, record in zip(prompts, together, strict=True):
        ids = opened.tokenizer(prompt.prompt)["input_ids"]
        start = len(ids)
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(opened.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == opened.tokenizer.eos_token_id:
                break
        assert record["output"] == opened.tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_odd_line_ends_are_text(tmp_path: Path) -> None:
    records = [{"prompt": "a", "output": "one\u2028two\x85three", "reference": None}]
    save_continuations(records, tmp_path / "o.jsonl")
    assert read_continuations(tmp_path / "o.jsonl") == records


def test_seeds(opened: LoadedModel) -> None:
    prompts = [Prompt("3: one two", "three")]
    config = GenerationConfig(max_new_tokens=12, temperature=1.0, per_prompt=3, seed=1)
    first, again = (write_continuations(opened, prompts, config) for _ in range(2))
    other = write_continuations(opened, prompts, GenerationConfig(12, 1.0, per_prompt=3, seed=2))
    assert first == again != other and len(first) == 3
    assert len({record["output"] for record in first}) > 1


def test_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three four five\n\nsix seven\n")
    assert read_prompts(tmp_path / "a.txt") == [Prompt("one two three four five"), Prompt("six seven")]
    assert read_prompts(tmp_path / "a.txt", 0.4)[0] == Prompt("one two", " three four five")
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "reference": "r"}\n{"prompt": "q"}\n')
    assert read_prompts(tmp_path / "b.jsonl") == [Prompt("p", "r"), Prompt("q")]
    (tmp_path / "c.jsonl").write_text('{"text": "p"}\n')
    (tmp_path / "d.jsonl").write_text("junk\n")
    (tmp_path / "e.txt").write_text("\n")
    for name, message in (
        ("c.jsonl", "no field 'prompt'"),
        ("d.jsonl", ":1 is no JSON"),
        ("e.txt", "no prompts"),
        ("f", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            read_prompts(tmp_path / name)


def test_commands(trained_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "3: one two", "reference": " three four"}\n')
    common = ("--prompts", str(tmp_path / "p.jsonl"), "--max-new-tokens", "6", "--seed", "5")
    app(["generate", str(trained_folder), *common, "--out", str(tmp_path / "o.jsonl")], standalone_mode=False)
    record = json.loads((tmp_path / "o.jsonl").read_text())
    assert set(record) == {"prompt", "output", "reference"}
    results = tmp_path / "results.json"
    arguments = [
        "evaluate",
        str(trained_folder),
        *common,
        "--generated",
        str(tmp_path / "o.jsonl"),
        "--out",
        str(results),
    ]
    app(arguments, standalone_mode=False)
    found = json.loads(results.read_text())
    scored = found["models"][str(trained_folder)]["continuations"]["p"]
    assert scored == found["generated"][str(tmp_path / "o.jsonl")]["continuations"]["o"]
    logs = list((tmp_path / "results.samples").rglob("continuations.jsonl"))
    assert len(logs) == 1 and json.loads(logs[0].read_text()) == record


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GenerationConfig(seed=-1), "seed is -1"),
        (GenerationConfig(temperature=1e-30), "at least 0.01"),
        (GenerationConfig(temperature=-1), "temperature is -1"),
        (GenerationConfig(top_p=0), "top_p"),
        (GenerationConfig(temperature=0, per_prompt=2), "all be the same"),
        (GenerationConfig(max_new_tokens=0), "max_new_tokens is 0"),
    ],
)
def test_bad_settings(config: GenerationConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.check()


def test_a_prompt_too_long(opened: LoadedModel) -> None:
    with pytest.raises(UserError, match="must have between 1 and 128"):
        write_continuations(opened, [Prompt("one " * 100)], GenerationConfig(max_new_tokens=100))


def test_every_text_has_a_prompt_and_a_reference(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes("\ufeffhello\none two\nthe quick brown\n".encode())
    prompts = read_prompts(file, 0.9)
    assert [(p.prompt, p.reference) for p in prompts] == [("one", " two"), ("the quick", " brown")]
    assert read_prompts(file)[0].prompt == "hello"  # without the mark that some editors put in front


def test_references_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "reference": ["b"]}\n')
    with pytest.raises(UserError, match=r"prompts\.jsonl:1: its reference is no text"):
        read_prompts(file)


def test_a_broken_model(opened: LoadedModel) -> None:
    broken = dataclasses.replace(opened, model=copy.deepcopy(opened.model))
    with torch.no_grad():
        next(broken.model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="are no numbers"):
        write_continuations(broken, [Prompt("a")], GenerationConfig(4))
