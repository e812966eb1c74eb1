"""Richer heads: their formula, gradients, the identity at the start, saving and loading, kernels, sizes."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from llmprune.conversion.commands import enrich
from llmprune.conversion.verify import compare_models, open_for_comparison
from llmprune.models.block_hooks import blocks_of
from llmprune.models.families import RicherHeadsConfig, family_of, module_name
from llmprune.models.loading import count_parameters, load_model, load_model_config, new_model
from llmprune.models.modeling_llmprune import RicherHeads
from llmprune.models.own_model_types import with_richer_heads
from llmprune.plans.plan import Plan
from llmprune.utils.errors import UserError
from tests.conftest import random_model, tiny_config
from tests.models.families.test_conformance import CONFIGS, logits, relative

HEADS, SIZE = 4, 6
ACTIVATIONS = {"silu": nn.SiLU(), "gelu": nn.GELU(), "tanh": nn.Tanh(), "relu": nn.ReLU()}


def filled(shared: bool, activation: str = "silu", residual: bool = False) -> RicherHeads:
    layer = RicherHeads(HEADS, SIZE, shared=shared, activation=activation, residual=residual, std=0.5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shared", [True, False])
def test_a_naive_loop_over_heads(shared: bool, activation: str, residual: bool) -> None:
    layer = filled(shared, activation, residual)
    x = torch.randn(2, 5, HEADS * SIZE, generator=torch.Generator().manual_seed(2))
    wanted = torch.zeros_like(x)
    for head in range(HEADS):
        own = slice(head * SIZE, (head + 1) * SIZE)
        rows = slice(0, SIZE) if shared else own
        for sample in range(2):
            for place in range(5):
                o = x[sample, place, own]
                y = ACTIVATIONS[activation](layer.weight[rows] @ o + layer.bias[rows])
                wanted[sample, place, own] = o + y if residual else y
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shared", [True, False])
def test_gradients_by_finite_differences(shared: bool, residual: bool) -> None:
    layer = filled(shared, residual=residual).double()
    x = torch.randn(1, 3, HEADS * SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    inputs = [x, *(parameter.detach() for parameter in layer.parameters())]
    assert torch.autograd.gradcheck(function, [tensor.clone().requires_grad_() for tensor in inputs])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", [name for name in CONFIGS if "richer" not in name])
def test_any_family_begins_as_it_was(name: str, shared: bool, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = random_model(CONFIGS[name])
    model.save_pretrained(tmp_path / "plain")
    enrich(tmp_path / "plain", RicherHeadsConfig(shared, residual=True), tmp_path / "richer")
    richer = load_model(tmp_path / "richer")
    assert relative(logits(model, tokens), logits(richer, tokens)) <= 1e-6
    shape = family_of(model.config).shape(model.config)
    layers = 1 if shared else shape.heads
    added = shape.layers * layers * (shape.head_dim**2 + shape.head_dim)
    assert count_parameters(richer.config) == count_parameters(model.config) + added

    # It learns from the first step on: every new parameter has a gradient.
    richer(input_ids=tokens, labels=tokens).loss.backward()
    name = module_name(family_of(richer.config))
    for block in blocks_of(richer):
        assert all(p.grad.abs().sum() > 0 for p in block.get_submodule(name).parameters())  # type: ignore[union-attr]


def test_the_attention_itself_is_that_of_a_naive_model(tokens: torch.Tensor) -> None:
    """A Llama whose output matrices are replaced by modules that loop over heads."""
    model = random_model(with_richer_heads(tiny_config(), RicherHeadsConfig(shared=False)))
    naive = random_model(tiny_config())
    naive.load_state_dict({name: t for name, t in model.state_dict().items() if "richer" not in name})

    class Looping(nn.Module):
        def __init__(self, matrix: nn.Linear, weight: torch.Tensor, bias: torch.Tensor) -> None:
            super().__init__()
            self.matrix, self.weights, self.biases = matrix, weight.view(8, 8, 8), bias.view(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = [x[..., 8 * h : 8 * h + 8] @ self.weights[h].t() + self.biases[h] for h in range(8)]
            return self.matrix(torch.cat([h * torch.sigmoid(h) for h in heads], -1))

    for block, other in zip(blocks_of(naive), blocks_of(model), strict=True):
        heads = other.self_attn.richer_heads
        block.self_attn.o_proj = Looping(block.self_attn.o_proj, heads.weight, heads.bias)
    assert relative(logits(model, tokens), logits(naive, tokens)) <= 1e-6


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_adapters_and_four_bits_keep_the_heads(quantize: str | None, tokens: torch.Tensor, tmp_path: Path) -> None:
    """Whatever takes the output matrix's place: the layer is computed once, before it."""
    from peft import LoraConfig, get_peft_model

    from llmprune.recovery.four_bits import quantization
    from llmprune.recovery.lora import AdaptedWeights, LoRAConfig, add_adapters

    config = with_richer_heads(tiny_config(), RicherHeadsConfig(shared=False))
    random_model(config).save_pretrained(tmp_path / "richer")
    packed = None if quantize is None else quantization(config, torch.float32)
    model = load_model(tmp_path / "richer", quantization=packed)
    counts: list[int] = []
    layer = blocks_of(model)[0].self_attn.richer_heads
    layer.register_forward_hook(lambda *_: counts.append(1))
    settings = LoRAConfig(rank=2, dropout=0.0)
    adapters = add_adapters(model, settings, seed=0)
    with torch.no_grad():
        for place, parameter in enumerate(adapters):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place))
    adapted = logits(model, tokens)
    assert counts == [1]
    merged = AdaptedWeights(dict(model.state_dict()), settings)
    plain = random_model(config)
    plain.load_state_dict({name: merged[name] for name in merged}, strict=False)
    assert relative(adapted, logits(plain, tokens)) <= 1e-5
    without = random_model(config)
    with torch.no_grad():
        for block in blocks_of(without):
            block.self_attn.richer_heads.weight.zero_()
    assert relative(adapted, logits(without, tokens)) > 1e-2
    if quantize is None:  # PEFT itself, which knows nothing of us
        alone = get_peft_model(load_model(tmp_path / "richer"), LoraConfig(r=2, target_modules=["o_proj"]))
        before = logits(load_model(tmp_path / "richer"), tokens)
        assert relative(before, logits(alone, tokens)) <= 1e-6
        for name, parameter in alone.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        changed = logits(alone, tokens)
        assert relative(before, changed) > 1e-3
        assert relative(changed, logits(alone.merge_and_unload(), tokens)) <= 1e-5


def test_what_it_is_saved_with(tokens: torch.Tensor, tmp_path: Path) -> None:
    model = random_model(CONFIGS["llama-richer"])
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "modeling_llmprune.py").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True).eval()
    assert torch.equal(logits(model, tokens), logits(again, tokens))


@pytest.mark.parametrize("shared", [True, False])
def test_products_stay_in_the_format_of_autocast(shared: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert filled(shared)(torch.randn(2, HEADS * SIZE).bfloat16()).dtype == torch.bfloat16


def test_a_copy_is_on_its_own(tokens: torch.Tensor) -> None:
    model = random_model(CONFIGS["llama-richer"])
    copied, before = copy.deepcopy(model), logits(model, tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(copied, tokens), before)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_kernels_agree_and_a_cache_changes_nothing(attention: str, tokens: torch.Tensor) -> None:
    model, reference = (random_model(CONFIGS["llama-richer"], attention=a) for a in (attention, "eager"))
    assert relative(logits(reference, tokens), logits(model, tokens)) <= 1e-5
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with_cache = model.generate(tokens, use_cache=True, **options)
    without = model.generate(tokens, use_cache=False, **options)
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(torch.stack(with_cache.logits), torch.stack(without.logits), rtol=1e-4, atol=1e-4)


def test_it_loads_where_llmprune_is_not_installed(tmp_path: Path, tokens: torch.Tensor) -> None:
    model = random_model(tiny_config())
    model.save_pretrained(tmp_path / "plain")
    enrich(tmp_path / "plain", RicherHeadsConfig(residual=True), tmp_path / "richer")
    torch.save((tokens, logits(model, tokens)), tmp_path / "wanted.pt")
    program = f"""
import sys, torch
sys.modules["llmprune"] = None
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{tmp_path}/richer", trust_remote_code=True).eval()
tokens, wanted = torch.load("{tmp_path}/wanted.pt", weights_only=True)
with torch.no_grad():
    assert torch.allclose(model(tokens).logits, wanted, atol=1e-5)
model.save_pretrained("{tmp_path}/again")
again = AutoModelForCausalLM.from_pretrained("{tmp_path}/again", trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.allclose(again(tokens).logits, wanted, atol=1e-5)
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        compare_models(open_for_comparison(tmp_path / "plain"), open_for_comparison(tmp_path / "again")).max_rel <= 1e-6
    )


# The published study: d 1024, 8 heads, FFN 2752, 32k vocabulary, untied; parameters in millions of the plain models.
PUBLISHED = {5: 128.79, 6: 141.44, 7: 154.09, 8: 166.74}


@pytest.mark.parametrize("layers", PUBLISHED)
def test_published_sizes(layers: int) -> None:
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2752,
        num_hidden_layers=layers,
        num_attention_heads=8,
        tie_word_embeddings=False,
    )
    plain = count_parameters(config)
    assert round(plain / 1e6, 2) == PUBLISHED[layers]
    assert count_parameters(with_richer_heads(config, RicherHeadsConfig())) == plain + 16_512 * layers
    assert count_parameters(with_richer_heads(config, RicherHeadsConfig(shared=False))) == plain + 132_096 * layers


def test_a_new_model_is_not_the_identity() -> None:
    model = new_model(with_richer_heads(tiny_config(), RicherHeadsConfig()), seed=0)
    weight = blocks_of(model)[0].self_attn.richer_heads.weight
    assert weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.3)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert norms and all(bool((p == 1).all()) for p in norms)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (RicherHeadsConfig(activation="silo", residual=True), "valid: silu, gelu, tanh, relu"),
        (RicherHeadsConfig(activation="relu", residual=True), "would never learn"),
        (RicherHeadsConfig(), "must be residual"),
    ],
)
def test_mistakes(model_folder: Path, tmp_path: Path, heads: RicherHeadsConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        enrich(model_folder, heads, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_heads_are_made_richer_once(model_folder: Path, tmp_path: Path) -> None:
    enrich(model_folder, RicherHeadsConfig(residual=True), tmp_path / "richer")
    assert Plan.load(tmp_path / "richer" / "llmprune" / "plan.json").richer_heads == RicherHeadsConfig(residual=True)
    with pytest.raises(UserError, match="richer already"):
        enrich(tmp_path / "richer", RicherHeadsConfig(residual=True), tmp_path / "again")
    assert load_model_config(tmp_path / "richer").model_type == "llmprune_llama"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "richer").config.llmprune_replacement is None
