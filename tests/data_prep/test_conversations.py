"""Prompts and responses: what is learned, how they fill samples, and training on them."""

import gc
import json
import multiprocessing
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_prep.conversations import ConversationSettings, renderer
from data_prep.describe import show_samples
from data_prep.pack import prepare
from data_prep.recipe import PackSettings
from llmprune.config.job_files import load_training_job
from llmprune.data.dataset import EvalDataset
from llmprune.data.prepared import PreparedData
from llmprune.data.reader import NO_LOSS
from llmprune.evaluation.losses import evaluate_losses
from llmprune.jobs.train import train
from llmprune.models.loading import load_model
from llmprune.utils.errors import UserError

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TURNS = [
    {"role": "system", "content": "be brief"},
    {"from": "human", "value": "one two"},
    {"from": "gpt", "value": "three"},
    {"role": "user", "content": "four"},
    {"role": "assistant", "content": "five six"},
]


@pytest.fixture(autouse=True)
def _no_processes() -> Iterator[None]:
    """The processes of templates end with what holds them, be it an error's traceback."""
    yield
    gc.collect()
    assert not [child for child in multiprocessing.active_children() if child.daemon]


@pytest.fixture
def chat(data: Path) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    tokenizer.chat_template = CHAT
    return tokenizer


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def shown(data: Path, domain: str | None = None) -> str:
    return "\n".join(one.text for one in show_samples(PreparedData(data), 100, domain=domain) if one.split == "train")


def test_every_response_of_a_chat_is_learned(chat: PreTrainedTokenizerFast) -> None:
    pieces = renderer(ConversationSettings(), chat)({"messages": TURNS})
    assert pieces == (
        ("<s>[system] be brief\n[user] one two\n[assistant] ", False),
        ("three</s>\n", True),
        ("[user] four\n[assistant] ", False),
        ("five six</s>\n", True),
    )
    alone = renderer(ConversationSettings(), chat)({"prompt": "one", "input": "two", "response": "three"})
    assert alone == (("<s>[user] one\n\ntwo\n[assistant] ", False), ("three</s>\n", True))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, "there is no response: no message of the role 'assistant'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "there is no response"),
        ({"messages": [{"content": "x"}]}, "a message has no role"),
        ({"messages": [{"role": "user", "content": None}]}, "a message of the role 'user' has no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "part of the type 'image'"),
        ({"messages": "x"}, "no list of messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "there is no response"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]},
            "a response is empty",
        ),
        ({"messages": [{"role": "user", "content": "a</s>b"}, {"role": "assistant", "content": "c"}]}, "special token"),
        ({"prompt": "x"}, "no field 'messages', and no field 'response'"),
    ],
)
def test_records_that_are_no_conversations(chat: PreTrainedTokenizerFast, record: dict[str, Any], reason: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError), match=reason):
        renderer(ConversationSettings(), chat)(record)


USER, ANSWER = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}
TOOL = {"role": "tool", "content": "42", "tool_call_id": "1"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {}}}]}


def test_parts_of_a_message_are_joined(chat: PreTrainedTokenizerFast) -> None:
    parts = [{"type": "text", "text": "on", "image": None}, {"type": "text", "text": "e"}]
    render = renderer(ConversationSettings(), chat)
    assert render({"messages": [{"role": "user", "content": parts}, ANSWER]}) == render({"messages": [USER, ANSWER]})


def test_an_assistant_who_begins_answers_nothing(chat: PreTrainedTokenizerFast) -> None:
    hello = {"role": "assistant", "content": "hello"}
    pieces = renderer(ConversationSettings(), chat)({"messages": [hello, USER, ANSWER]})
    assert pieces == (("<s>[assistant] hello</s>\n[user] one\n[assistant] ", False), ("two</s>\n", True))
    chat.chat_template = "{% if messages[0].role != 'user' %}{{ raise_exception('start with the user') }}{% endif %}x"
    words = "it begins with the assistant, and the chat template refuses it: start with the user"
    with pytest.raises(ValueError, match=words):
        renderer(ConversationSettings(), chat)({"messages": [hello, USER, ANSWER]})


def test_tools_are_for_templates_that_take_them(chat: PreTrainedTokenizerFast) -> None:
    taken = "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}(){% endif %}{{ m['content'] }}"
    chat.chat_template = CHAT.replace("{{ m['content'] }}", taken)
    pieces = renderer(ConversationSettings(), chat)({"messages": [USER, CALL, TOOL, ANSWER]})
    assert [text for text, learned in pieces if learned] == ["f()</s>\n", "two</s>\n"]
    assert pieces[2] == ("[tool] 42\n[assistant] ", False)
    record = {"messages": [USER, ANSWER, TOOL, ANSWER]}
    chat.chat_template = CHAT.replace("%}[{{", "if m.role != 'tool' %}[{{")
    with pytest.raises(ValueError, match="leaves out messages of the role 'tool'"):
        renderer(ConversationSettings(), chat)(record)
    chat.chat_template = CHAT.replace(
        "%}[{{", "%}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}[{{"
    )
    with pytest.raises(ValueError, match="the chat template refuses it: no tools"):
        renderer(ConversationSettings(), chat)(record)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for i in range(1000000) %}x{% endfor %}", "Range too big"),  # the sandbox's own limit is 100,000
        ("{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}", "longer than 1 seconds"),
        ("{{ messages|length ** (9 ** (9 ** 9)) }}", "longer than 1 seconds|Exceeds the limit"),
        ("{{ 'x' * (messages|length * 65 * 2 ** 20) }}", "makes more than 64 MiB"),
        ("{{ 'x' * (messages|length * 2 ** 40) }}", "more than 256 MiB of memory"),
        (
            "{% set n = namespace(t='x') %}{% for i in range(40) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}",
            "memory",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('touch PATH') }}", "unsafe"),
        ("{{ raise_exception.__globals__['open']('PATH', 'w') }}", "unsafe"),
        ("{{ messages.append(messages) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'os' as os %}{{ os.system('touch PATH') }}", "no loader"),
        ("{{ raise_exception('no\nmore') }}", "refuses it: no$"),
    ],
)
def test_hostile_chat_templates(
    chat: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, reason: str
) -> None:
    """They execute nothing, end soon, and cost one record or, if no conversation can be rendered, the job."""
    if "longer" in reason:
        monkeypatch.setattr("data_prep.confined.SECONDS", 1.0)
    monkeypatch.setattr("data_prep.confined.MEMORY", 1 << 28)
    chat.chat_template = template.replace("PATH", str(tmp_path / "executed"))
    with pytest.raises((ValueError, UserError), match=reason) as refused:
        renderer(ConversationSettings(), chat)({"messages": [USER, ANSWER]})
    assert "\n" not in str(refused.value) and not (tmp_path / "executed").exists()
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_a_record_over_which_a_template_loops_costs_itself_alone(
    chat: PreTrainedTokenizerFast, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.confined.SECONDS", 3.0)
    loop = "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}"
    chat.chat_template = "{% if messages[0]['content'] == '7' %}" + loop + "{% endif %}" + CHAT
    chat.save_pretrained(tmp_path / "tokenizer")
    source = write(tmp_path / "in" / "x.jsonl", [{"prompt": str(n), "response": "two " * 9} for n in range(20)])
    settings = PackSettings(32, eval_fraction=0, max_bad=0.1, conversations=ConversationSettings())
    made = prepare([source], tmp_path / "tokenizer", tmp_path / "out", settings, processes=1)
    assert [record.reason for record in made.bad] == ["the chat template takes longer than 3 seconds for it"]
    assert not multiprocessing.active_children()  # the template's process ends with the job
    assert made.bad[0].place.endswith("x.jsonl:8") and made.manifest.domains["in"]["train"].documents == 19


def test_templates(chat: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def prompt(template: str, **record: str) -> str:
        return renderer(ConversationSettings(template), chat)({"prompt": "{input} it", "response": "r", **record})[0][0]

    assert prompt("alpaca").endswith("### Instruction:\n{input} it\n\n### Response:\n")
    assert "further context" in prompt("alpaca", input="i") and "### Input:\ni\n\n### Resp" in prompt(
        "alpaca", input="i"
    )
    assert (prompt("none"), prompt("none", input="i")) == ("{input} it", "{input} it\ni")
    nested = ConversationSettings("none", "a.p", "a.i", "a.r")
    assert renderer(nested, chat)({"a": {"p": "x", "i": "y", "r": "z"}}) == (("x\ny", False), ("z", True))
    turns = renderer(ConversationSettings("none"), chat)({"messages": TURNS[1:3]})
    assert turns == (("one two", False), ("three", True))
    with pytest.raises(ValueError, match="one prompt and one response"):
        renderer(ConversationSettings("none"), chat)({"messages": TURNS})
    with pytest.raises(KeyError, match="no field"):
        renderer(ConversationSettings("none"), chat)([1])  # type: ignore[arg-type]
    (tmp_path / "own").write_text("Q: {prompt} ({input})\nA:")
    assert prompt(str(tmp_path / "own"), input="i") == "Q: {input} it (i)\nA:"
    (tmp_path / "own").write_text("Q:")
    for template, message in ((str(tmp_path / "own"), "has no {prompt}"), ("alpacca", "choose chat, alpaca, none")):
        with pytest.raises(UserError, match=message):
            prompt(template)
    (tmp_path / "own").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="own can't be read as a template"):
        prompt(str(tmp_path / "own"))
    chat.chat_template = "{% if %}"
    with pytest.raises(UserError, match="chat template is no valid one"):
        renderer(ConversationSettings(), chat)
    chat.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(ValueError, match="the chat template refuses it: division by zero"):
        renderer(ConversationSettings(), chat)({"prompt": "one", "response": "two"})
    chat.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        renderer(ConversationSettings(), chat)


def test_samples_hold_whole_conversations(data: Path, tmp_path: Path) -> None:
    records = [{"prompt": f"{n}: " + "one " * (n % 7), "response": "two " * (1 + n % 5)} for n in range(60)]
    source = write(tmp_path / "in" / "x.jsonl", records)
    settings = PackSettings(32, eval_fraction=0, bos=True, conversations=ConversationSettings("none"))
    made = prepare([source], data / "tokenizer", tmp_path / "out", settings, processes=1)
    assert made.manifest.conversations and made.manifest.domains["in"]["train"].documents == 60
    reader = PreparedData(tmp_path / "out").reader("in", "train")
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    found, padding = [], 0
    for index in range(reader.shard_sizes[0]):
        sample = {name: values.tolist() for name, values in reader.read(0, index).items()}
        begins = [place for place, position in enumerate(sample["position_ids"]) if position == 0]
        for begin, end in zip(begins, [*begins[1:], 32], strict=True):
            ids, labels = sample["input_ids"][begin:end], sample["labels"][begin:end]
            learned = [token for token, label in zip(ids, labels, strict=True) if label != NO_LOSS]
            if not learned:
                padding += len(ids)
                continue
            assert ids[0] == tokenizer.bos_token_id and learned[-1] == tokenizer.eos_token_id
            assert ids[-len(learned) :] == learned  # the response comes last
            found.append((tokenizer.decode(ids[1 : -len(learned)]), tokenizer.decode(learned[:-1])))
    assert sorted(found) == sorted((record["prompt"], record["response"]) for record in records)
    assert padding < 0.15 * 32 * reader.shard_sizes[0]
    assert "⟦<s>3: one one one ⟧two two two two </s>" in shown(tmp_path / "out").replace("⟧⟦", "")


def test_what_is_too_long_is_cut_or_left_out(data: Path, tmp_path: Path) -> None:
    records = [{"prompt": "one", "response": "two " * 50}, {"prompt": "one " * 50, "response": "two"}]
    source = write(tmp_path / "in" / "x.jsonl", records)
    settings = PackSettings(16, eval_fraction=0, max_bad=0.5, conversations=ConversationSettings("none"))
    made = prepare([source], data / "tokenizer", tmp_path / "out", settings, processes=1)
    assert made.manifest.domains["in"]["train"].samples == 1
    assert [(r.place.rpartition("/")[2], r.reason) for r in made.bad] == [
        ("x.jsonl:2", "its prompt alone fills a sample")
    ]


def test_training_weighs_every_learned_token_alike(data: Path, model_folder: Path, tmp_path: Path) -> None:
    """However a batch is cut into microbatches, with few learned tokens in one and many in another."""
    records = [{"prompt": f"{n} one", "response": "two three " * (1 + 5 * (n % 3))} for n in range(80)]
    source = write(tmp_path / "in" / "x.jsonl", records)
    settings = PackSettings(64, eval_fraction=0.2, conversations=ConversationSettings("none"))
    prepare([source], data / "tokenizer", tmp_path / "data", settings, processes=1)
    (tmp_path / "run.yaml").write_text(f"""
run: {{name: test, folder: {tmp_path}/run}}
model: {{path: {model_folder}, config: null}}
data: {{path: {tmp_path}/data}}
optimizer: {{lr: 1.0e-3}}
train: {{duration: 3ba, global_batch_size: 4, eval_interval: 3ba}}
loggers: {{console: false}}
""")
    losses = []
    for size in (1, 4):
        overrides = [f"train.microbatch_size={size}", f"run.folder={tmp_path}/run{size}"]
        trainer = train(load_training_job(tmp_path / "run.yaml", overrides))
        losses.append(float(trainer.state.eval_metric_values["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    evaluated = evaluate_losses(load_model(model_folder), PreparedData(tmp_path / "data"))
    sample = EvalDataset(PreparedData(tmp_path / "data"))[0]
    assert set(sample) == {"input_ids", "position_ids", "labels", "domain"} and losses[0] < evaluated.loss
