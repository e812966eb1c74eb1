"""What a training step costs in bfloat16 on a CPU."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.ratios import Ratio, interleaved

TOKENS = (2, 512)  # samples, length


def bf16_cpu(runs: int) -> Ratio:
    """A training step of the built-in model, products in bfloat16 / all in float32, optimizer included.

    On a processor with neither AVX512-BF16 nor AMX the ratio is far above the bar: ``auto`` is float32 there.
    """
    from llmprune.conversion.from_gguf import from_gguf
    from llmprune.models.causal_lm import ComposerCausalLM
    from llmprune.models.loading import load_model

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        from_gguf(None, path)
        loaded = load_model(str(path))
    tokens = torch.randint(loaded.config.vocab_size, TOKENS, generator=torch.Generator().manual_seed(0))
    model = ComposerCausalLM(loaded)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step(products: torch.dtype | None) -> Callable[[], None]:
        def run() -> None:
            model.products = products
            optimizer.zero_grad(set_to_none=True)
            model.loss(model({"input_ids": tokens}), {"input_ids": tokens}).backward()
            optimizer.step()

        return run

    size = sum(parameter.numel() for parameter in model.parameters())
    words = f"training step of SmolLM2 ({size / 1e6:.1f} M) on {tokens.numel()} tokens, bfloat16 / float32"
    return interleaved(step(torch.bfloat16), step(None), runs, 0.5, words)
