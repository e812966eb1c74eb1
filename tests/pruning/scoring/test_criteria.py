"""Every criterion against a naive computation on a trained model, and against answers known beforehand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from transformers import PreTrainedModel

from llmprune.pruning.scoring.all_criteria import CRITERIA
from llmprune.pruning.scoring.criterion import BlockStep, ScoringJob
from llmprune.pruning.scoring.scorer import Scorer, block_passes
from llmprune.pruning.scoring.settings import LayerScoringConfig
from llmprune.utils.errors import UserError
from tests.conftest import random_model, tiny_config

CPU = torch.device("cpu")


def score(model: PreTrainedModel, tokens: Tensor, *names: str, batch_size: int = 4, **settings: str) -> dict[str, Any]:
    """All sections in one mapping."""
    names = names or tuple(LayerScoringConfig().names(model.config))
    scorer = Scorer(model, names, ScoringJob(model.config, CPU, **settings), batch_size=batch_size)
    for part in tokens.split(batch_size):
        scorer.update(part)
    return {name: value for section in scorer.scores().values() for name, value in section.items()}


def streams(model: PreTrainedModel, tokens: Tensor) -> list[Tensor]:
    """The residual stream before every block and after the last one, in double precision, by Hugging Face's output."""
    last: list[Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(lambda module, inputs, output: last.append(output))
    with torch.no_grad():
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states
    hook.remove()
    return [x.double() for x in (*states[:-1], last[0])]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / (a.square().sum(-1).sqrt() * b.square().sum(-1).sqrt())


def test_influence_and_magnitude_of_blocks(trained: PreTrainedModel, calibration: Tensor) -> None:
    x = streams(trained, calibration)
    found = score(trained, calibration, "block_influence", "relative_magnitude")
    for i in range(6):
        expected = 1 - cosine(x[i], x[i + 1]).mean().item()
        assert found["block_influence"][i] == pytest.approx(expected, rel=1e-5)
        ratio = (x[i + 1] - x[i]).norm(dim=-1) / x[i + 1].norm(dim=-1)
        assert found["relative_magnitude"][i] == pytest.approx(ratio.mean().item(), rel=1e-5)


def test_influence_of_sublayers(trained: PreTrainedModel, calibration: Tensor) -> None:
    x = streams(trained, calibration)
    found = score(trained, calibration, "attention", "mlp")
    for i, block in enumerate(trained.model.layers):
        middle: list[Tensor] = []
        hook = block.post_attention_layernorm.register_forward_pre_hook(
            lambda module, args, middle=middle: middle.append(args[0].double())
        )
        with torch.no_grad():
            trained(input_ids=calibration)
        hook.remove()
        assert found["attention"][i] == pytest.approx(1 - cosine(x[i], middle[0]).mean().item(), rel=1e-5)
        assert found["mlp"][i] == pytest.approx(1 - cosine(middle[0], x[i + 1]).mean().item(), rel=1e-5)


def test_spans(trained: PreTrainedModel, calibration: Tensor) -> None:
    x = streams(trained, calibration)
    found = score(trained, calibration, "cosine", "angular")
    for n in range(1, 7):
        assert len(found["cosine"][str(n)]) == len(found["angular"][str(n)]) == 7 - n
        for j in range(7 - n):
            assert found["cosine"][str(n)][j] == pytest.approx(cosine(x[j], x[j + n]).mean().item(), abs=1e-6)
            angle = torch.arccos(cosine(x[j][:, -1], x[j + n][:, -1])) / math.pi
            assert found["angular"][str(n)][j] == pytest.approx(angle.mean().item(), rel=1e-5)


def naive_hsic(k: np.ndarray, m: np.ndarray) -> float:
    """The unbiased estimator as Song et al. (2012), equation 5, write it."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    ones = np.ones(n)
    value = np.trace(k @ m) + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return (value - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))


def naive_standardised(states: np.ndarray) -> np.ndarray:
    rows = np.array([row / np.sqrt((row**2).sum()) for row in states])
    return np.array([(column - column.mean()) / column.std() for column in rows.T]).T


def cka_of(*places: Tensor) -> np.ndarray:
    """The CKA of hand-made states, each [samples, tokens, hidden], as if they were the outputs of blocks."""
    criterion = CRITERIA["cka"](ScoringJob(tiny_config(num_hidden_layers=len(places)), CPU))
    for first in range(len(places[0])):
        for block, states in enumerate(places):
            part = states[first : first + 1]
            criterion.observe(BlockStep(block, first, part, part, {}, parallel=False))
    return np.array(criterion.result())


def test_massive_activations_do_not_decide_cka() -> None:
    """The first token is thousands of times as long as the others, along one dimension, as in trained models."""
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(8, 128, 64, generator=draw) for _ in range(2))
    plain = cka_of(one, other, one + 0.5 * other)
    massive = [states.clone() for states in (one, other, one + 0.5 * other)]
    for states, value in zip(massive, (3000.0, 5000.0, -2000.0), strict=True):
        states[:, 0, 7] += value
    found = cka_of(*massive)
    assert abs(plain[0, 1]) < 0.05 and plain[0, 2] > 0.6
    assert np.abs(found - plain).max() < 0.05


def test_what_cka_is_invariant_to() -> None:
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(4, 40, 16, generator=draw)
    lengths, signs = 1 + 9 * torch.rand(4, 40, 1, generator=draw), torch.tensor([1.0, -1.0]).repeat(8)
    turned, _ = torch.linalg.qr(torch.randn(16, 16, generator=draw))
    found = cka_of(states, lengths * states, (signs * states)[..., torch.randperm(16, generator=draw)], states @ turned)
    assert np.allclose(found, found.T) and np.allclose(np.diag(found), 1)
    assert np.allclose(found[:3, :3], 1, atol=1e-6)
    assert 0.5 < found[0, 3] < 0.9999  # scaling each dimension depends on the axes


def test_samples_that_are_too_short_for_cka(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="at least 4 tokens; these have 3: raise --seq-len"):
        CRITERIA["cka"].check_samples(8, 3)
    CRITERIA["cka"].check_samples(8, 31)
    assert "31 tokens are few" in caplog.text
    caplog.clear()
    CRITERIA["cka"].check_samples(8, 32)
    assert not caplog.text


def test_cka(trained: PreTrainedModel, calibration: Tensor) -> None:
    outputs = [[naive_standardised(sample.numpy()) for sample in x] for x in streams(trained, calibration)[1:]]
    kernels = [[s @ s.T for s in x] for x in outputs]
    hsic = [[sum(naive_hsic(a, b) for a, b in zip(p, q, strict=True)) for q in kernels] for p in kernels]
    found = score(trained, calibration, "cka")["cka"]
    for i in range(6):
        for j in range(6):
            assert found[i][j] == pytest.approx(hsic[i][j] / math.sqrt(hsic[i][i] * hsic[j][j]), abs=1e-5)


def test_perplexity_of_removals(trained: PreTrainedModel, calibration: Tensor) -> None:
    found = score(trained, calibration, "perplexity")["perplexity"]
    blocks = list(trained.model.layers)
    for i in range(6):
        trained.model.layers = nn.ModuleList(block for j, block in enumerate(blocks) if j != i)
        with torch.no_grad():
            losses = [trained(input_ids=sample[None], labels=sample[None]).loss.double() for sample in calibration]
        assert found[i] == pytest.approx(math.exp(torch.stack(losses).mean().item()), rel=1e-5)
    trained.model.layers = nn.ModuleList(blocks)


def gradients(model: PreTrainedModel, tokens: Tensor, *, entropy: bool = False) -> list[dict[str, Tensor]]:
    """W ∘ ∂L/∂W of every sample's mean loss, or of its predictions' mean entropy, by parameter name."""
    found = []
    for sample in tokens:
        model.zero_grad()
        out = model(input_ids=sample[None], labels=sample[None])
        (Categorical(logits=out.logits[0, :-1]).entropy().mean() if entropy else out.loss).backward()
        found.append({name: (p * p.grad).detach().double() for name, p in model.named_parameters()})
    model.zero_grad()
    return found


def test_taylor(trained: PreTrainedModel, calibration: Tensor) -> None:
    products, of_entropy = gradients(trained, calibration), gradients(trained, calibration, entropy=True)
    found = score(trained, calibration, "taylor", "taylor_entropy", "taylor_signed")
    for i in range(6):
        names = [name for name in products[0] if name.startswith(f"model.layers.{i}.")]
        absolute = sum(sample[name].abs().sum().item() for sample in products for name in names)
        signed = sum(torch.stack([sample[name] for sample in products]).sum(0).abs().sum().item() for name in names)
        assert found["taylor"][i] == pytest.approx(absolute, rel=1e-5)
        assert found["taylor_signed"][i] == pytest.approx(signed, rel=1e-5)
        unlabelled = sum(sample[name].abs().sum().item() for sample in of_entropy for name in names)
        assert found["taylor_entropy"][i] == pytest.approx(unlabelled, rel=1e-5)
        assert signed < absolute
    assert score(trained, calibration, "taylor_entropy")["taylor_entropy"] == found["taylor_entropy"]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in trained.parameters())


REDUCE = {"sum": np.sum, "mean": np.mean, "max": np.max, "prod": np.prod}


@pytest.mark.parametrize("matrices", REDUCE)
@pytest.mark.parametrize("rows", REDUCE)
def test_magnitudes_and_reductions(trained: PreTrainedModel, calibration: Tensor, rows: str, matrices: str) -> None:
    settings = {"row_reduction": rows, "matrix_reduction": matrices}
    found = score(trained, calibration, "magnitude_l1", "magnitude_l2", **settings)
    for name, power in (("magnitude_l1", 1), ("magnitude_l2", 2)):
        for i, block in enumerate(trained.model.layers):
            values = []
            for weight in block.parameters():
                elements = weight.detach().double().abs().pow(power).numpy().astype(np.longdouble)
                values.append(REDUCE[rows](elements.sum(1) if elements.ndim == 2 else elements))
            expected = REDUCE[matrices](np.array(values))  # its exponents reach further than a double's
            if "prod" in (rows, matrices):
                expected = np.log(expected)
            assert found[name][i] == pytest.approx(float(expected), rel=1e-5)


def test_biases_do_not_count(calibration: Tensor) -> None:
    model = random_model(tiny_config(attention_bias=True, mlp_bias=True))
    weights = [p.abs().sum().item() for name, p in model.model.layers[0].named_parameters() if name.endswith(".weight")]
    found = score(model, calibration[:1], "magnitude_l1")["magnitude_l1"]
    assert found[0] == pytest.approx(sum(weights), rel=1e-5)


def test_orders(trained: PreTrainedModel, calibration: Tensor) -> None:
    found = score(trained, calibration, "tail", "random")
    assert sorted(range(6), key=lambda block: found["tail"][block]) == [5, 4, 3, 2, 1, 0]
    assert len(set(found["random"])) == 6
    assert found["random"] == score(trained, calibration, "random")["random"]


def test_a_block_that_is_the_identity(trained: PreTrainedModel, calibration: Tensor) -> None:
    with torch.no_grad():
        trained.model.layers[3].self_attn.o_proj.weight.zero_()
        trained.model.layers[3].mlp.down_proj.weight.zero_()
    found = score(trained, calibration)
    with torch.no_grad():
        losses = [trained(input_ids=sample[None], labels=sample[None]).loss.double() for sample in calibration]
    assert found["block_influence"][3] == found["relative_magnitude"][3] == 0
    assert found["attention"][3] == found["mlp"][3] == 0
    assert found["perplexity"][3] == pytest.approx(math.exp(torch.stack(losses).mean().item()), rel=1e-6)
    for name in ("block_influence", "relative_magnitude", "attention", "mlp"):
        assert min(range(6), key=lambda block: found[name][block]) == 3
    assert max(range(6), key=lambda j: found["cosine"]["1"][j]) == 3
    assert min(range(6), key=lambda j: found["angular"]["1"][j]) == 3
    assert found["cka"][2][3] == pytest.approx(1, abs=1e-6)


def flat(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in flat(item)]
    return [number for item in value for number in flat(item)] if isinstance(value, list) else [value]


def test_any_batch_size_gives_the_same(trained: PreTrainedModel, calibration: Tensor) -> None:
    reference = score(trained, calibration, batch_size=1)
    for batch_size in (3, 10, 64):
        assert flat(score(trained, calibration, batch_size=batch_size)) == pytest.approx(flat(reference), rel=1e-5)


def test_memory_of_states_is_given_back(trained: PreTrainedModel, calibration: Tensor) -> None:
    scorer = Scorer(trained, LayerScoringConfig().names(trained.config), ScoringJob(trained.config, CPU), batch_size=4)
    scorer.update(calibration)
    held = [vars(criterion).get("_seen") for criterion in scorer.criteria.values()]
    assert not any(held) and {} in held
    assert not scorer._removals._states


@pytest.mark.parametrize("names", [("perplexity",), ("block_influence", "cosine"), ("taylor",)])
def test_the_model_is_left_as_it_was(trained: PreTrainedModel, calibration: Tensor, names: tuple[str, ...]) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    with torch.no_grad():
        logits = trained(input_ids=calibration).logits
    score(trained, calibration, *names)
    with torch.no_grad():
        assert torch.equal(trained(input_ids=calibration).logits, logits)
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())


def test_block_evaluations_of_all_removals(trained: PreTrainedModel, calibration: Tensor) -> None:
    """N(N + 1)/2 of them: the whole model's N and every variant's from its block on."""
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    hooks = [block.register_forward_hook(counted) for block in trained.model.layers]
    score(trained, calibration[:4], "perplexity")
    assert count == 6 * 7 // 2
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("names", [("perplexity", "cka"), ("block_influence",), ("taylor", "perplexity")])
def test_the_passes_that_are_told(trained: PreTrainedModel, calibration: Tensor, names: tuple[str, ...]) -> None:
    told: list[int] = []
    scorer = Scorer(trained, names, ScoringJob(trained.config, CPU), batch_size=4, told=told.append)
    for part in calibration.split(4):
        scorer.update(part)
    assert sum(told) == len(calibration) * block_passes(names, 6)
    assert block_passes(("perplexity",), 6) == 6 * 7 // 2


def test_unknown_criteria_are_named(trained: PreTrainedModel) -> None:
    with pytest.raises(UserError, match="no criterion 'taylr'; did you mean 'taylor'"):
        Scorer(trained, ["taylr"], ScoringJob(trained.config, CPU), batch_size=1)
