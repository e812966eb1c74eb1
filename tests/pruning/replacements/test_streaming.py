"""Objectives of replacement modules against one that stores everything, and their export, in every family."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune.conversion.export import export, keep_everything
from llmprune.conversion.replaced import Changed
from llmprune.models.block_hooks import blocks_of
from llmprune.models.families import family_of, richer_heads_of
from llmprune.models.loading import load_any_model, load_model_config
from llmprune.models.objectives import forward_kl
from llmprune.models.stored_weights import fingerprint
from llmprune.pruning.replacements.custom_block import Network
from llmprune.pruning.replacements.modules import REPLACEMENTS, ReplacementModule, Site
from llmprune.pruning.replacements.settings import BlockReplacementConfig
from llmprune.pruning.replacements.span import Span
from llmprune.pruning.replacements.streaming import Streaming
from llmprune.utils.errors import UserError
from tests.conftest import random_model
from tests.models.families.test_conformance import CONFIGS

OBJECTIVES = {"mse": 0.5, "cosine": 2.0, "lm": 1.0, "kl": 0.7}
SPAN = Span(1, 2)


def replacement_for(model: PreTrainedModel, span: Span = SPAN, **settings: object) -> ReplacementModule:
    """A replacement module none of whose parameters is zero."""
    config = BlockReplacementConfig(length=span.length, **settings)  # type: ignore[arg-type]
    made = REPLACEMENTS[config.kind](Site(model, span, 3), config)
    made.begin(blocks_of(model)[span.start : span.end])
    made.requires_grad_(True)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return made


def with_blocks(model: PreTrainedModel, blocks: list[nn.Module]) -> PreTrainedModel:
    """The model with other blocks, the naive way."""
    family = family_of(model.config)
    shell = copy.copy(model)
    parent, _, name = family.blocks.rpartition(".")
    shell = copy.deepcopy(model)
    setattr(shell.get_submodule(parent), name, nn.ModuleList(blocks))
    setattr(shell.config, family.fields["layers"], len(blocks))
    return shell


def logits_of(streaming: Streaming, tokens: torch.Tensor) -> torch.Tensor:
    """What the shortened model predicts."""
    states, head = streaming.final_states({"input_ids": tokens})
    return head.logits(states).view(*tokens.shape, -1)


def outputs(model: PreTrainedModel, block: int, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the output of one block."""
    seen = []
    handle = blocks_of(model)[block].register_forward_hook(
        lambda module, inputs, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    logits = model(input_ids=tokens, use_cache=False).logits
    handle.remove()
    return logits, seen[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_storing_everything(name: str, tokens: torch.Tensor) -> None:
    model = random_model(CONFIGS[name]).requires_grad_(False)
    replacement = replacement_for(model, kind="blocks", blocks=1, take="last")
    streaming = Streaming(model, replacement, SPAN, OBJECTIVES, temperature=2.0)
    batch = {"input_ids": tokens}
    loss = streaming.loss(batch)
    loss.backward()
    found = [parameter.grad for parameter in replacement.parameters()]

    block = copy.deepcopy(replacement.get_submodule("blocks.0"))
    block.zero_grad()
    blocks = list(copy.deepcopy(blocks_of(model)))
    short = with_blocks(model, [blocks[0], block, blocks[3]])
    teacher, target = outputs(model, SPAN.end - 1, tokens)
    logits, after = outputs(short, 1, tokens)
    after, target = after[:, :-1], target[:, :-1]  # the last position predicts nothing
    logs = logits[:, :-1].log_softmax(-1)
    softer, wanted = (x[:, :-1].div(2).log_softmax(-1) for x in (logits, teacher))
    parts = {
        "mse": ((after - target) ** 2).mean(),
        "cosine": (1 - (after * target).sum(-1) / after.norm(dim=-1) / target.norm(dim=-1)).mean(),
        "lm": -logs.gather(-1, tokens[:, 1:, None]).mean(),
        "kl": 4 * (wanted.exp() * (wanted - softer)).sum(-1).mean(),
    }
    naive = sum(weight * parts[name] for name, weight in OBJECTIVES.items())
    assert loss.item() == pytest.approx(float(naive), rel=1e-5)
    naive.backward()  # type: ignore[union-attr]
    trained = blocks_of(short)[1]
    for own, parameter in zip(found, trained.parameters(), strict=True):
        wanted = parameter.grad
        assert (own is None) == (wanted is None)
        if own is not None and wanted is not None:
            assert (own - wanted).abs().max() <= 1e-5 * max(wanted.abs().max().item(), 1e-3)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.allclose(logits_of(streaming, tokens), logits, atol=1e-5)


def test_only_what_is_needed_runs(tokens: torch.Tensor) -> None:
    """The prefix once; nothing behind the span for hidden states; no teacher for the next-token loss.

    Losses take the output layer's weight themselves.
    """
    model = random_model(CONFIGS["llama-grouped-untied"]).requires_grad_(False)
    ran: list[int] = []
    for number, block in enumerate(blocks_of(model)):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    wide = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: wide.append(output.shape[-1]))
    replacement = replacement_for(model, kind="ffn")
    for weights, blocks in (
        ({"mse": 1.0}, [0, 1, 2]),
        ({"lm": 1.0}, [0, 3]),
        ({"kl": 1.0}, [0, 1, 2, 3, 3]),
        ({"mse": 1.0, "lm": 1.0}, [0, 1, 2, 3]),
    ):
        streaming = Streaming(model, replacement, SPAN, weights)
        ran.clear()
        wide.clear()
        streaming.loss({"input_ids": tokens}).backward()
        assert (ran, wide) == (blocks, [32, 32])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_span_itself_begins_at_zero(name: str, tokens: torch.Tensor) -> None:
    model = random_model(CONFIGS[name]).requires_grad_(False)
    settings = BlockReplacementConfig(length=2, blocks=2)
    replacement = REPLACEMENTS["blocks"](Site(model, SPAN, 0), settings)
    replacement.begin(blocks_of(model)[1:3])
    streaming = Streaming(model, replacement, SPAN, {"mse": 1.0, "kl": 1.0})
    batch = {"input_ids": tokens}
    assert streaming.loss(batch).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("start", [0, 1, 2])
def test_spans_at_both_ends(start: int, tokens: torch.Tensor) -> None:
    model = random_model(CONFIGS["llama-grouped-tied"]).requires_grad_(False)
    span = Span(start, 2)
    streaming = Streaming(model, replacement_for(model, span, kind="linear"), span, {"mse": 1.0})
    source, short = streaming.forward({"input_ids": tokens})
    states = model(input_ids=tokens, output_hidden_states=True).hidden_states
    assert torch.allclose(source.before, states[start], atol=1e-5)
    assert source.after is not None and short.after.grad_fn is not None
    if span.end < 4:  # the last of Hugging Face's states is behind the final norm
        assert torch.allclose(source.after, states[span.end], atol=1e-5)


def test_documents_are_kept_apart(tokens: torch.Tensor) -> None:
    """What follows a boundary does not depend on what stands before it."""
    model = random_model(CONFIGS["opt"]).requires_grad_(False)
    streaming = Streaming(model, replacement_for(model, kind="blocks"), SPAN, {"mse": 1.0})
    positions = torch.cat([torch.arange(9), torch.arange(8)]).expand(3, -1)
    source, short = streaming.forward({"input_ids": tokens, "position_ids": positions})
    alone = tokens[:, 9:]
    only, shorter = streaming.forward({"input_ids": alone, "position_ids": torch.arange(8).expand(3, -1)})
    assert source.after is not None and only.after is not None
    assert torch.allclose(source.after[:, 9:], only.after, atol=1e-5)
    assert torch.allclose(short.after[:, 9:], shorter.after, atol=1e-5)


def exported(
    model: PreTrainedModel, replacement: ReplacementModule, kind: str, folder: Path, span: Span = SPAN
) -> None:
    """Write the model with the replacement module to ``folder``/out."""
    weights, network = dict(model.state_dict()), None
    changed = Changed(weights, replacement.changes(family_of(model.config), span, weights))
    whole = keep_everything(model.config, fingerprint(changed, model.config))
    plan = replace(whole, blocks=span.kept(4, replacement.offsets))
    if replacement.network is not None:
        network = Network(kind, replacement.network.settings, span.start, replacement.network.state_dict())  # type: ignore[arg-type]
    export(changed, model.config, plan, folder / "out", companions=folder, source="x", network=network)


KINDS = ["none", "mean", "linear", "closed_form", "ffn", "swiglu", "blocks"]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_exported_models_compute_the_same(name: str, kind: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = random_model(CONFIGS[name]).requires_grad_(False)
    if kind == "closed_form" and not family_of(model.config).ends_linearly:
        with pytest.raises(UserError, match="norm after the MLP"):
            replacement_for(model, kind=kind)
        return
    replacement = replacement_for(model, kind=kind)
    exported(model, replacement, kind, tmp_path)

    with torch.no_grad():
        wanted = logits_of(Streaming(model, replacement, SPAN, {}), tokens)
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
        found = reloaded(input_ids=tokens).logits
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
        cached = reloaded.generate(tokens, **settings, use_cache=True)
        assert torch.equal(cached, reloaded.generate(tokens, **settings, use_cache=False))
        own = load_any_model(tmp_path / "out")
        assert torch.equal(own(input_ids=tokens).logits, found)
    if replacement.network is None and richer_heads_of(model.config) is None:
        assert type(reloaded).__module__.startswith("transformers.models")


def test_a_replacement_module_before_the_first_block(tokens: torch.Tensor, tmp_path: Path) -> None:
    model = random_model(CONFIGS["opt"]).requires_grad_(False)
    span = Span(0, 1)
    replacement = replacement_for(model, span, kind="swiglu")
    exported(model, replacement, "swiglu", tmp_path, span)
    with torch.no_grad():
        wanted = logits_of(Streaming(model, replacement, span, {}), tokens)
        found = load_any_model(tmp_path / "out")(input_ids=tokens).logits
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_type_of_its_own(tmp_path: Path) -> None:
    """So that nothing takes such a model for a plain one."""
    model = random_model(CONFIGS["llama-grouped-tied"])
    replacement = replacement_for(model, kind="mean")
    exported(model, replacement, "mean", tmp_path)
    assert '"model_type": "llmprune_llama"' in (tmp_path / "out" / "config.json").read_text()
    with pytest.raises(UserError, match="neither pruned nor trained"):
        load_model_config(tmp_path / "out")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bfloat16_model_teaches_a_float32_replacement_module(name: str, tokens: torch.Tensor) -> None:
    """As with model.dtype=bfloat16 and amp_bf16: the same as in float32, but for rounding."""
    model = random_model(CONFIGS[name]).requires_grad_(False)
    exact, mixed = (replacement_for(model, kind="blocks"), replacement_for(model, kind="blocks"))
    batch, weights = {"input_ids": tokens}, {"mse": 1.0, "kl": 1.0}
    wanted = Streaming(model, exact, SPAN, weights)
    loss = wanted.loss(batch)
    loss.backward()
    found = Streaming(copy.deepcopy(model).bfloat16(), mixed, SPAN, weights)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = found.loss(batch)
    rounded.backward()
    assert rounded.item() == pytest.approx(loss.item(), rel=0.1)
    grads = [[p.grad.flatten() for p in one.parameters() if p.grad is not None] for one in (exact, mixed)]
    assert all(grad.dtype is torch.float32 for grad in grads[1])
    assert torch.cosine_similarity(torch.cat(grads[0]), torch.cat(grads[1]), 0) > 0.95


def test_operations_are_those_of_torchs_counter(tokens: torch.Tensor) -> None:
    """But for norms, softmax and the like."""
    config = CONFIGS["llama-grouped-untied"]
    model = random_model(config, attention="eager").requires_grad_(False)
    for kind in ("blocks", "swiglu"):
        replacement = replacement_for(model, kind=kind)
        for weights in ({"mse": 1.0}, {"lm": 1.0}, {"kl": 1.0}, {"mse": 1.0, "lm": 1.0}):
            streaming = Streaming(model, replacement, SPAN, weights)
            with FlopCounterMode(display=False) as counter:
                streaming.loss({"input_ids": tokens}).backward()
            counted = streaming.flops({"input_ids": tokens})
            assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_top_k_divergence() -> None:
    """All tokens: the whole divergence; fewer: never more than it, and by hand for one."""
    generator = torch.Generator().manual_seed(1)
    own, teacher = torch.randn(2, 3, 5, 11, generator=generator)
    whole = forward_kl(own, teacher)
    assert torch.allclose(forward_kl(own, teacher, 11), whole)
    p, q = teacher.softmax(-1), own.softmax(-1)
    best = p.argmax(-1, keepdim=True)
    a, b = p.gather(-1, best)[..., 0], q.gather(-1, best)[..., 0]
    assert torch.allclose(
        forward_kl(own, teacher, 1), a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log(), atol=1e-6
    )
    for k in (2, 5, 10):
        assert (forward_kl(own, teacher, k) <= whole + 1e-6).all()
