"""What richer heads cost, at the size of the published study."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.ratios import Ratio, interleaved

HIDDEN, HEADS, INTERMEDIATE, LENGTH, SAMPLES = 1024, 8, 2752, 512, 2


def _blocks(shared: bool) -> tuple[nn.Module, nn.Module, dict[str, Tensor], Tensor]:
    """A richer block and a plain one, what they are called with, and states."""
    from transformers import LlamaConfig

    from llmprune.models.block_hooks import blocks_of
    from llmprune.models.families import RicherHeadsConfig
    from llmprune.models.loading import new_model
    from llmprune.models.own_model_types import with_richer_heads

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
    )
    plain = new_model(config, seed=0)
    richer = new_model(with_richer_heads(config, RicherHeadsConfig(shared)), seed=0)
    states = torch.randn(SAMPLES, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(0))
    rotary = plain.model.rotary_emb(states, torch.arange(LENGTH)[None])
    return blocks_of(richer)[0], blocks_of(plain)[0], {"position_embeddings": rotary}, states


def _forward(block: nn.Module, arguments: dict[str, Tensor], states: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            block(states, **arguments)

    return run


def _step(block: nn.Module, arguments: dict[str, Tensor], states: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-4)
    inputs = states.clone().requires_grad_()

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        found = block(inputs, **arguments)
        (found[0] if isinstance(found, tuple) else found).square().mean().backward()
        optimizer.step()

    return run


def _compared(kind: Callable[..., Callable[[], None]], runs: int, bar: float, words: str) -> Ratio:
    """The dearer of both ways to share the layer."""
    found = []
    for shared in (True, False):
        richer, plain, arguments, states = _blocks(shared)
        what = f"{words}, hidden {HIDDEN}, {HEADS} heads, {SAMPLES} × {LENGTH} tokens, "
        what += "one layer for all heads" if shared else "a layer for each head"
        found.append(interleaved(kind(richer, arguments, states), kind(plain, arguments, states), runs, bar, what))
    return max(found, key=lambda ratio: ratio.median)


def richer_block(runs: int) -> Ratio:
    """Forward pass of a block with richer heads over that of a plain one."""
    return _compared(_forward, runs, 1.10, "forward pass of a richer block / of a plain one")


def richer_step(runs: int) -> Ratio:
    """Training step of a block with richer heads over that of a plain one."""
    return _compared(_step, runs, 1.12, "training step of a richer block / of a plain one")
