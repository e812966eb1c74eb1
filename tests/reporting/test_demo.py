"""The demo, used in a browser as a person would."""

import re
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import Page

from llmprune.evaluation.continuations import Prompt, write_continuations
from llmprune.evaluation.settings import GenerationConfig
from llmprune.models.loaded import open_model
from llmprune.models.placement import Placement
from llmprune.reporting.demo import answer, build, check_request, serve
from llmprune.utils.errors import UserError
from tests.harness.browser import chromium

HERE = Placement(device="cpu")


def ask(view: Page, prompt: str, settings: dict[str, str]) -> None:
    """Fill the page in and press the button; anew if the page, still being built, did not take what was typed."""
    for _ in range(5):
        for label, value in settings.items():
            field = view.get_by_label(f"number input for {label}")
            field.fill(value)
            field.press("Tab")  # takes effect when the field is left
        view.get_by_label("Prompt", exact=True).fill(prompt)
        with view.expect_request(lambda request: "/queue/join" in request.url) as sent:
            view.get_by_role("button", name="Generate").click()
        taken = sent.value.post_data_json["data"]
        if taken[0] == prompt and all(float(value) in taken[1:] for value in settings.values()):
            return
        view.reload(wait_until="networkidle")
    raise AssertionError(f"the page sent {taken}")


def test_start_use_and_stop(trained_folder: Path, model_folder: Path) -> None:
    page = serve([str(trained_folder), str(model_folder)], HERE, host="127.0.0.1", port=0, wait=False)
    address = page.local_url
    assert re.match(r"http://127\.0\.0\.1:\d+/", address)
    try:
        with chromium() as browser:
            view = browser.new_page(viewport={"width": 1200, "height": 900})
            view.goto(address, wait_until="networkidle")
            ask(view, "3: one two", {"Temperature (0 = greedy)": "0", "Output tokens": "5"})
            view.get_by_text("tokens/s").nth(1).wait_for(timeout=30_000)
            config = GenerationConfig(max_new_tokens=5, temperature=0, batch_size=1)
            for folder in (trained_folder, model_folder):
                shown = view.get_by_label(folder.name, exact=True).input_value()
                wanted = write_continuations(open_model(str(folder), HERE), [Prompt("3: one two")], config)
                assert shown == wanted[0]["output"]
            assert view.get_by_label("As a chat").is_disabled()  # the models have no template
            lines = view.get_by_text("tokens/s").all_text_contents()
            assert re.match(r"0\.\d M parameters · [\d.]+ s · [\d.]+ tokens/s · \d+ MB", lines[0])
            ask(view, "", {})
            view.get_by_text("must have between 1 and").first.wait_for(timeout=30_000)
            view.set_viewport_size({"width": 400, "height": 900})
            assert view.evaluate("document.documentElement.scrollWidth") <= 400
        with pytest.raises(UserError, match=r"can't be served .*--port"):
            serve([str(trained_folder)], HERE, host="127.0.0.1", port=int(address.split(":")[2].strip("/")), wait=False)
    finally:
        page.close()
    with pytest.raises(OSError):
        urllib.request.urlopen(address, timeout=3)


def test_a_batch_is_several_answers(trained_folder: Path) -> None:
    opened = open_model(str(trained_folder), HERE)
    found = answer(opened, "3: one", GenerationConfig(max_new_tokens=6, temperature=1.0, batch_size=3))
    assert len(found.texts) == 3 and len(set(found.texts)) > 1
    assert 0 < found.tokens <= 3 * 6 + 3 and found.seconds > 0


def test_chat_models_answer_in_their_template(trained_folder: Path, model_folder: Path) -> None:
    import gradio as gr

    models = [open_model(str(folder), HERE) for folder in (trained_folder, model_folder)]

    def offered() -> tuple[bool, bool]:
        (box,) = (block for block in build(models).blocks.values() if isinstance(block, gr.Checkbox))
        return box.value, box.interactive

    assert offered() == (False, False)
    models[0].tokenizer.chat_template = "3: {{ messages[0].content }} two"
    assert offered() == (False, False)  # the other model has none
    models[1].tokenizer.chat_template = "{{ messages[0].content }}"
    assert offered() == (True, True)
    config = GenerationConfig(max_new_tokens=5, temperature=0, batch_size=1)
    found = answer(models[0], "one", config, chat=True).texts
    assert found == answer(models[0], "3: one two", config).texts != answer(models[0], "one", config).texts


def test_mistakes(trained_folder: Path) -> None:
    with pytest.raises(UserError, match="no port 70000"):
        serve([str(trained_folder)], HERE, host="127.0.0.1", port=70000, wait=False)
    with pytest.raises(UserError, match="192.0.2.1:0 can't be served .*assign"):  # an address of no machine
        serve([str(trained_folder)], HERE, host="192.0.2.1", port=0, wait=False)
    with pytest.raises(UserError, match="no folder"):
        serve(["not/a/model"], HERE, host="127.0.0.1", port=0, wait=False)


@pytest.mark.parametrize(
    "prompt, changes, words",
    [
        ("a" * 20_001, {}, "20,001 characters; 20,000 are taken"),
        ("a", {"output_tokens": 10**9}, "output tokens must lie between 0 and 512"),
        ("a", {"batch": 65}, "batch must lie between 0 and 64"),
        ("a", {"temperature": -1.0}, "temperature must lie between 0 and 2"),
        ("a", {"top_p": float("nan")}, "top p must lie between 0 and 1"),
        ("a", {"seed": None}, "every setting needs a number"),
    ],
)
def test_requests_that_the_page_does_not_offer(prompt: str, changes: dict[str, float | None], words: str) -> None:
    usual = {"output_tokens": 5, "batch": 1, "seed": 17, "temperature": 0.6, "top_k": 0, "top_p": 0.9}
    check_request("a", **usual)
    with pytest.raises(UserError, match=words):
        check_request(prompt, **{**usual, **changes})
