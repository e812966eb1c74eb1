"""What it costs to learn from a teacher, and what a large vocabulary does."""

from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.ratios import Ratio, in_fresh_process, interleaved, peak_of

VOCABULARY, HIDDEN, TOKENS = 128_256, 256, 1024


def distillation_step(runs: int) -> Ratio:
    """A step of distillation against the teacher's forward pass and the student's own step."""
    from transformers import LlamaConfig

    from llmprune.models.causal_lm import ComposerCausalLM
    from llmprune.models.loading import new_model
    from llmprune.recovery.distillation import Distilling
    from llmprune.recovery.teachers import ModelTeacher

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    smaller = LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 4})
    student, teacher = ComposerCausalLM(new_model(smaller, seed=0)), new_model(config, seed=1).requires_grad_(False)
    tokens = torch.randint(config.vocab_size, (8, 256), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens}
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    objective = Distilling(student, ModelTeacher(teacher), {"kl": 1.0})

    def step() -> None:
        student.objective = objective
        optimizer.zero_grad(set_to_none=True)
        student.loss(student(batch), batch).backward()
        optimizer.step()

    def reference() -> None:
        student.objective = None
        with torch.no_grad():
            teacher(input_ids=tokens, use_cache=False)
        optimizer.zero_grad(set_to_none=True)
        student.loss(student(batch), batch).backward()
        optimizer.step()

    sizes = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (teacher, student)]
    words = (
        f"forward KL to a teacher of {sizes[0]:.1f} M, student of {sizes[1]:.1f} M, {tokens.numel()} tokens / forward "
        "pass and step"
    )
    return interleaved(step, reference, runs, 1.10, words)


def vocabulary_step(chunked: bool) -> Callable[[], None]:
    """Loss and gradients over a vocabulary of 128 k, some tokens at a time or all."""
    from llmprune.models.objectives import next_token
    from llmprune.models.vocabulary import Head, mean_loss

    generator = torch.Generator().manual_seed(0)
    states = torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)

    def step() -> None:
        states.grad = weight.grad = None
        if chunked:
            mean_loss(states, Head(weight), next_token(targets), [1.0])[0].backward()
        else:
            torch.nn.functional.cross_entropy((states @ weight.t()).float(), targets).backward()

    return step


def vocabulary_loss(runs: int) -> Ratio:
    """The loss over a large vocabulary against the plain one: time; peak memory of each beside it."""
    ratio = interleaved(vocabulary_step(True), vocabulary_step(False), min(runs, 7), 1.10, "")
    plain, chunked = (in_fresh_process(_peak_memory, kind) for kind in (False, True))
    words = (
        f"next-token loss and gradients, vocabulary {VOCABULARY:,}, {TOKENS} tokens / all logits at a time; peak "
        f"{chunked / 1e6:.0f} / {plain / 1e6:.0f} MB"
    )
    return replace(ratio, work=words)


def _peak_memory(chunked: bool) -> int:
    """By how many bytes a fresh process grows that does it."""
    step = vocabulary_step(chunked)
    return peak_of(step)
