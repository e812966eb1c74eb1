"""A page on which several models answer the same prompt side by side."""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llmprune.evaluation.continuations import Prompt, write_continuations
from llmprune.evaluation.settings import GenerationConfig
from llmprune.measurement.measure import weights_bytes
from llmprune.measurement.monitor import peak_memory
from llmprune.models.loaded import LoadedModel, open_model
from llmprune.models.placement import Placement
from llmprune.reporting.names import short_names
from llmprune.utils.errors import UserError

EXAMPLES = ("The function returns", "Once upon a time", "def main(", "The capital of France is")
QUESTIONS = (
    "What is the capital of France?",
    "Explain in one sentence what a prime number is.",
    "Write a Python function that reverses a string.",
    "Tell me a short story about a lighthouse.",
)
WAITING = "…"
MOST = {"output tokens": 512, "batch": 64, "top k": 200, "top p": 1, "temperature": 2, "seed": 2**32 - 1}
LONGEST = 20_000  # largest number of characters of a prompt
QUEUE = 16  # largest number of waiting requests


@dataclass(frozen=True)
class Generated:
    """The texts that a model generated, and their cost.

    Attributes:
        texts: one text per sequence of the batch.
        seconds: time for all texts.
        tokens: number of generated tokens.
        memory: memory of the weights and of the generation, in bytes.
    """

    texts: list[str]
    seconds: float
    tokens: int
    memory: int

    def describe(self, parameters: int) -> str:
        """The cost as one line of text."""
        return (
            f"{parameters / 1e6:,.1f} M parameters · {self.seconds:.2f} s · {self.tokens / self.seconds:,.1f} tokens/s "
            f"· {self.memory / 1e6:,.0f} MB"
        )


def answer(loaded: LoadedModel, prompt: str, config: GenerationConfig, *, chat: bool = False) -> Generated:
    """Generate ``config.batch_size`` continuations of a prompt in one batch; with ``chat``, answers to it.

    Raises:
        UserError: the prompt is empty or too long, or the model has no chat template.
    """
    prompts = [Prompt(prompt, chat=chat)] * config.batch_size
    with peak_memory(loaded.model.device) as peak:
        start = time.perf_counter()
        records = write_continuations(loaded, prompts, config)
        seconds = time.perf_counter() - start
    texts = [record["output"] for record in records]
    tokens = sum(len(ids) for ids in loaded.tokenizer(texts, add_special_tokens=False)["input_ids"])
    return Generated(texts, seconds, tokens, weights_bytes(loaded) + peak.added)


def check_request(prompt: str, **settings: float | None) -> None:
    """Refuse settings that the page does not offer: anyone who can connect to the port can send any values.

    Raises:
        UserError: the prompt is too long, or a setting is missing or out of its range.
    """
    if len(prompt) > LONGEST:
        raise UserError(f"the prompt has {len(prompt):,} characters; {LONGEST:,} are taken")
    for name, value in settings.items():
        label = name.replace("_", " ")
        if value is None:
            raise UserError("every setting needs a number")
        if not 0 <= value <= MOST[label]:
            raise UserError(f"{label} must lie between 0 and {MOST[label]}, not at {value}")


def build(models: Sequence[LoadedModel]) -> Any:
    """Build the page, as a Gradio app."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr

    sizes = [loaded.parameters for loaded in models]
    chats = all(loaded.tokenizer.chat_template for loaded in models)
    examples = QUESTIONS if chats else EXAMPLES

    def run(
        prompt: str,
        tokens: float,
        batch: float,
        seed: float,
        temperature: float,
        top_k: float,
        top_p: float,
        chat: bool,
    ) -> Iterator[list[str]]:
        shown = [WAITING, ""] * len(models)
        yield shown
        try:
            check_request(
                prompt, output_tokens=tokens, batch=batch, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p
            )
        except UserError as error:
            raise gr.Error(str(error)) from None
        config = GenerationConfig(
            max_new_tokens=int(tokens),
            temperature=temperature,
            top_p=top_p,
            top_k=int(top_k),
            seed=int(seed),
            batch_size=int(batch),
        )
        for number, loaded in enumerate(models):
            try:
                found = answer(loaded, prompt, config, chat=chat)
            except UserError as error:
                raise gr.Error(str(error)) from None
            shown[2 * number : 2 * number + 2] = ["\n\n———\n\n".join(found.texts), found.describe(sizes[number])]
            yield shown

    with gr.Blocks(title="llmprune") as page:
        gr.Markdown("# Models side by side\nEvery model gets the same prompt, one after the other.")
        prompt = gr.Textbox(label="Prompt", lines=3, value=examples[0], max_length=LONGEST)
        chat = gr.Checkbox(
            chats,
            label="As a chat",
            info="Each model answers in its own chat template."
            if chats
            else "Only for models that all have a chat template.",
            interactive=chats,
        )
        gr.Examples([[example] for example in examples], prompt)
        with gr.Row():
            tokens = gr.Slider(1, MOST["output tokens"], 64, step=1, label="Output tokens")
            batch = gr.Slider(1, MOST["batch"], 1, step=1, label="Batch")
            seed = gr.Number(17, precision=0, label="Seed")
        with gr.Row():
            temperature = gr.Slider(0, MOST["temperature"], 0.6, step=0.05, label="Temperature (0 = greedy)")
            top_k = gr.Slider(0, MOST["top k"], 0, step=1, label="Top-k (0 = all)")
            top_p = gr.Slider(0.05, 1, 0.9, step=0.05, label="Top-p")
        button = gr.Button("Generate", variant="primary")
        outputs = []
        with gr.Row():
            for label in short_names([loaded.name for loaded in models]):
                with gr.Column(min_width=260):
                    outputs += [gr.Textbox(label=label, lines=10), gr.Markdown()]
        inputs = [prompt, tokens, batch, seed, temperature, top_k, top_p, chat]
        button.click(run, inputs, outputs, api_name="generate", concurrency_limit=1)
        prompt.submit(run, inputs, outputs, api_name=False, concurrency_limit=1)
    return page


def _check_address(host: str, port: int) -> None:
    """Check, before models are opened, that the address is available."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family):
            pass
    except OSError as error:
        raise UserError(
            f"{host}:{port} can't be served ({error.strerror}): choose another with --host or --port"
        ) from None


def serve(models: Sequence[str], placement: Placement, *, host: str, port: int, wait: bool = True) -> Any:
    """Open the models and serve the page.

    Args:
        models: folders or hub names of the models.
        placement: device and dtype of the models; all of them are in memory at the same time.
        host: address to listen on.
        port: port to listen on; 0 = any free port.
        wait: whether to serve until interrupted; otherwise the running app is returned.

    Raises:
        UserError: Gradio is not installed, a model can't be opened, or the port is in use.
    """
    try:
        import gradio as gr
    except ImportError:
        raise UserError("the package gradio is not installed: pip install -e '.[demo]'") from None
    if not 0 <= port < 65536:
        raise UserError(f"there is no port {port}")
    _check_address(host, port)
    page = build([open_model(name, placement) for name in models])
    fonts = ["system-ui", "sans-serif"]
    try:
        page.queue(max_size=QUEUE).launch(
            server_name=host,
            server_port=port or None,
            theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
        )
    except OSError as error:
        raise UserError(f"{host}:{port} can't be served: {error}") from None
    if wait:
        print(f"{', '.join(models)} on {page.local_url} (Ctrl-C ends it)", flush=True)
        page.block_thread()
    return page
