"""What it costs to train a replacement module."""

from collections.abc import Callable

import torch

from benchmarks.ratios import Ratio, in_fresh_process, interleaved, peak_of

LENGTH = 256


def replacement_steps(hidden: int, samples: int) -> tuple[Callable[[], None], Callable[[], None], str, int]:
    """A training step of a replacement module, the least that it could be, both in words, and its bytes."""
    from transformers import LlamaConfig

    from llmprune.models.block_hooks import blocks_of
    from llmprune.models.causal_lm import ComposerCausalLM
    from llmprune.models.loading import new_model
    from llmprune.pruning.replacements.modules import REPLACEMENTS, Site
    from llmprune.pruning.replacements.settings import BlockReplacementConfig
    from llmprune.pruning.replacements.span import Span
    from llmprune.pruning.replacements.streaming import Streaming

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=16,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    model, span = ComposerCausalLM(new_model(config, seed=0)), Span(6, 6)
    settings = BlockReplacementConfig(length=span.length)
    replacement = REPLACEMENTS["blocks"](Site(model.model, span, 0), settings)
    blocks = blocks_of(model.model)
    replacement.begin(blocks[span.start : span.end])
    model.requires_grad_(False)
    model.replacement = replacement.requires_grad_(True)
    model.objective = Streaming(model.model, replacement, span, settings.weights)
    tokens = torch.randint(config.vocab_size, (samples, LENGTH), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(replacement.parameters(), lr=1e-4)

    def step() -> None:
        batch = {"input_ids": tokens}
        optimizer.zero_grad(set_to_none=True)
        model.loss(model(batch), batch).backward()
        optimizer.step()

    positions = torch.arange(LENGTH)[None]
    rotary = model.model.model.rotary_emb(torch.zeros(1, LENGTH, config.hidden_size), positions)

    def ideal() -> None:
        """Prefix and span forward, replacement module forward and backward, and nothing else."""
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            states = model.model.get_input_embeddings()(tokens)
            for block in blocks[: span.start]:
                states = block(states, position_embeddings=rotary)
            after = states
            for block in blocks[span.start : span.end]:
                after = block(after, position_embeddings=rotary)
        own = replacement.get_submodule("blocks.0")(states, position_embeddings=rotary)
        (own - after).square().mean().backward()
        optimizer.step()

    size = sum(p.numel() for p in model.model.parameters())
    words = f"step of one block for blocks 6 to 11 of 16 ({size / 1e6:.1f} M) on {tokens.numel()} tokens / its ideal"
    trained = sum(p.numel() for p in replacement.parameters())
    return step, ideal, words, 4 * (size + 4 * trained)


def replacement_step(runs: int) -> Ratio:
    """A training step of a replacement module against its parts alone."""
    step, ideal, words, _ = replacement_steps(512, 8)
    return interleaved(step, ideal, runs, 1.15, words)


def replacement_memory(runs: int) -> Ratio:
    """Peak memory of training over what it must hold: the model, the module's training state, a batch's states."""
    (few, needed), (many, _) = (in_fresh_process(_peak_after, steps) for steps in (2, 40))
    words = (
        "peak memory / the model, the replacement module with gradients and moments, and what its backward pass keeps: "
        f"{few / 1e6:.0f} / {needed / 1e6:.0f} MB; after 20 times as many tokens {many / 1e6:.0f} MB"
    )
    low, high = sorted((few / needed, many / needed))
    return Ratio(high, low, high, 1.10, words)


def _peak_after(steps: int) -> tuple[int, int]:
    """By how many bytes a fresh process grows while it does some steps, and how many it needs."""
    needed = 0

    def work() -> None:
        nonlocal needed
        step, _, _, held = replacement_steps(1024, 2)
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            step()
        needed = held + sum(kept.values())
        for _ in range(steps - 1):
            step()

    # What the libraries take for themselves is not counted.
    from transformers import LlamaForCausalLM  # noqa: F401

    import llmprune.pruning.replacements.streaming  # noqa: F401

    layer = torch.nn.Linear(1024, 1024)
    layer(torch.ones(1024, 1024)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()
    return peak_of(work), needed
