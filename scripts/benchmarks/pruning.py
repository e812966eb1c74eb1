"""What gates cost a training step."""

import resource
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.ratios import Ratio, in_fresh_process, interleaved


def training_step(gated: bool) -> tuple[Callable[[], None], str]:
    """A training step of a Llama, with all gates or with none, and what it is in words."""
    from transformers import LlamaConfig

    from llmprune.models.causal_lm import ComposerCausalLM
    from llmprune.models.families import FAMILIES, target_shape
    from llmprune.models.loading import new_model
    from llmprune.pruning.gates.attach import attach
    from llmprune.pruning.gates.gate_set import GateSet
    from llmprune.pruning.gates.goals import ShapeGoal

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    target = {"layers": 4, "hidden": 384, "heads": 4, "kv_heads": 2, "intermediate": 1024}
    tokens = torch.randint(config.vocab_size, (8, 256), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens}
    model = ComposerCausalLM(new_model(config, seed=0))
    size = sum(p.numel() for p in model.parameters())
    words = f"training step of a {size / 1e6:.1f} M Llama on {tokens.numel()} tokens, all gates / none"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def dense_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model.loss(model(batch), batch).backward()
        optimizer.step()

    if not gated:
        return dense_step, words

    family = FAMILIES["llama"]
    source = family.shape(config)
    gates = GateSet(source, ShapeGoal(source, target_shape(source, target)))
    with torch.no_grad():
        for log_alpha in gates.log_alpha.values():  # where samples lie between zero and one
            log_alpha.copy_(torch.randn(log_alpha.shape))
    gate_optimizer = torch.optim.Adam(gates.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    slot = attach(model.model, family, set(gates.factors(gates.at_target()).trainable()))

    def gated_step() -> None:
        factors = gates.factors(gates.sample(generator))
        leaves = slot.factors = factors.detached()
        optimizer.zero_grad(set_to_none=True)
        gate_optimizer.zero_grad(set_to_none=True)
        model.loss(model(batch), batch).backward()
        grads = [leaf.grad for leaf in leaves.trainable().values() if leaf.grad is not None]
        torch.autograd.backward(list(factors.trainable().values()), grads)
        gates.constraint(gates.targets(0.0, 1.0)).backward()
        gate_optimizer.step()
        gates.clamp()
        optimizer.step()

    return gated_step, words


def gated_step(runs: int) -> Ratio:
    """A training step with all gates against a dense step of the same model; peak memory of each beside it."""
    dense, words = training_step(False)
    gated, _ = training_step(True)
    ratio = interleaved(gated, dense, runs, 1.05, words)
    dense_mb, gated_mb = (in_fresh_process(peak_memory, kind) for kind in (False, True))
    return replace(ratio, work=f"{words}; peak memory {gated_mb:.0f} / {dense_mb:.0f} MB")


def peak_memory(gated: bool) -> float:
    """Peak memory in MB of a fresh process that does a few training steps."""
    step, _ = training_step(gated)
    for _ in range(3):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
