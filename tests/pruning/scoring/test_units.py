"""Scores of units against naive loops on trained weights, and what does not depend on how units are numbered."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from llmprune.pruning.scoring.criterion import ScoringJob
from llmprune.pruning.scoring.scorer import Scorer
from llmprune.pruning.scoring.settings import LayerScoringConfig
from llmprune.utils.errors import UserError
from tests.conftest import random_model
from tests.models.families.test_conformance import CONFIGS
from tests.pruning.scoring.test_criteria import CPU, gradients

NAMES = [
    "unit_activation_l2",
    "unit_activation_abs",
    "unit_magnitude_l1",
    "unit_magnitude_l2",
    "unit_taylor",
    "unit_taylor_entropy",
]


def units(model: PreTrainedModel, tokens: Tensor, *names: str, batch_size: int = 4, **settings: str) -> dict[str, Any]:
    """The section ``units``, with tensors [blocks, units]."""
    scorer = Scorer(model, names or NAMES, ScoringJob(model.config, CPU, **settings), batch_size=batch_size)
    for part in tokens.split(batch_size):
        scorer.update(part)
    return {
        name: {unit: torch.tensor(rows, dtype=torch.float64) for unit, rows in found.items()}
        for name, found in scorer.scores()["units"].items()
    }


def inputs_of(model: PreTrainedModel, tokens: Tensor) -> list[dict[str, Tensor]]:
    """What q_proj, o_proj, up_proj and down_proj of every block read, in double precision, [samples, length, size]."""
    seen: list[dict[str, Tensor]] = [{} for _ in model.model.layers]
    hooks = []
    for found, block in zip(seen, model.model.layers, strict=True):
        hooks += [
            block.get_submodule(name).register_forward_pre_hook(
                lambda module, args, found=found, name=name: found.update({name.split(".")[1]: args[0].double()})
            )
            for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
        ]
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return seen


AGGREGATE = {"mean": lambda x: x.mean(0), "l2": lambda x: x.square().mean(0).sqrt()}


@pytest.mark.parametrize("batch", AGGREGATE)
@pytest.mark.parametrize("sequence", AGGREGATE)
def test_activations(trained: PreTrainedModel, calibration: Tensor, sequence: str, batch: str) -> None:
    found = units(trained, calibration, sequence_aggregation=sequence, batch_aggregation=batch)

    def score(values: Tensor) -> Tensor:
        return AGGREGATE[batch](torch.stack([AGGREGATE[sequence](sample) for sample in values]))

    for i, seen in enumerate(inputs_of(trained, calibration)):
        heads = seen["o_proj"].unflatten(-1, (8, 8))
        for name, magnitude in (
            ("unit_activation_l2", heads.norm(dim=-1)),
            ("unit_activation_abs", heads.abs().mean(-1)),
        ):
            of_heads = score(magnitude)
            hidden = score(seen["q_proj"].abs()) + score(seen["up_proj"].abs())
            groups = torch.stack([of_heads[2 * group] + of_heads[2 * group + 1] for group in range(4)])
            for unit, expected in (
                ("heads", of_heads),
                ("kv_groups", groups),
                ("channels", score(seen["down_proj"].abs())),
                ("hidden", hidden),
            ):
                torch.testing.assert_close(found[name][unit][i], expected, rtol=1e-5, atol=0)


def of_weights(values: dict[str, Tensor], block: int, config: PretrainedConfig) -> dict[str, list[float]]:
    """Sums over each unit's rows and columns, one unit at a time; ``values`` is by parameter name."""
    own = {
        name.removeprefix(f"model.layers.{block}."): v.double() for name, v in values.items() if f".{block}." in name
    }
    q, k, v, o = (own[f"self_attn.{name}_proj.weight"] for name in "qkvo")
    gate, up, down = (own[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    norms = own["input_layernorm.weight"], own["post_attention_layernorm.weight"]
    size, per_group = 8, config.num_attention_heads // config.num_key_value_heads
    heads = [
        (q[h * size : (h + 1) * size].sum() + o[:, h * size : (h + 1) * size].sum()).item()
        for h in range(config.num_attention_heads)
    ]
    groups = [
        (k[g * size : (g + 1) * size].sum() + v[g * size : (g + 1) * size].sum()).item()
        + sum(heads[g * per_group : (g + 1) * per_group])
        for g in range(config.num_key_value_heads)
    ]
    channels = [(gate[c].sum() + up[c].sum() + down[:, c].sum()).item() for c in range(config.intermediate_size)]
    hidden = [
        sum(m[:, d].sum().item() for m in (q, k, v, gate, up))
        + sum(m[d].sum().item() for m in (o, down))
        + sum(norm[d].item() for norm in norms)
        for d in range(config.hidden_size)
    ]
    return {"heads": heads, "kv_groups": groups, "channels": channels, "hidden": hidden}


def test_weights_and_taylor(trained: PreTrainedModel, calibration: Tensor) -> None:
    found = units(trained, calibration)
    weights = {name: p.detach().double() for name, p in trained.named_parameters()}
    products, of_entropy = gradients(trained, calibration), gradients(trained, calibration, entropy=True)
    naive = {
        "unit_magnitude_l1": {name: p.abs() for name, p in weights.items()},
        "unit_magnitude_l2": {name: p.square() for name, p in weights.items()},
        "unit_taylor": {name: sum(sample[name].abs() for sample in products) for name in weights},
        "unit_taylor_entropy": {name: sum(sample[name].abs() for sample in of_entropy) for name in weights},
    }
    for criterion, values in naive.items():
        for block in range(6):
            for unit, expected in of_weights(values, block, trained.config).items():  # type: ignore[arg-type]
                wanted = torch.tensor(expected, dtype=torch.float64)
                torch.testing.assert_close(found[criterion][unit][block], wanted, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_any_batch_size_and_family(name: str, tokens: Tensor) -> None:
    model = random_model(CONFIGS[name])
    names = [n for n in LayerScoringConfig().names(model.config) if n.startswith(("unit_", "expert_"))]
    one, three = (units(model, tokens, *names, batch_size=size) for size in (1, 3))
    mixture = "mixtral" in name or "moe" in name
    for criterion in names:
        kinds = {"experts"} if criterion == "expert_frequency" else {"heads", "kv_groups", "hidden"}
        kinds |= {"experts"} if mixture else {"channels"}
        assert set(one[criterion]) == kinds
        for unit, scores in one[criterion].items():
            torch.testing.assert_close(scores, three[criterion][unit], rtol=1e-5, atol=1e-7)
            assert (scores >= 0).all() and scores.any()


def test_shuffled_channels_have_shuffled_scores(trained: PreTrainedModel, calibration: Tensor) -> None:
    before = units(trained, calibration)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mlp = trained.model.layers[2].mlp
        for module in (mlp.gate_proj, mlp.up_proj):
            module.weight.copy_(module.weight[order])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
    after = units(trained, calibration)
    for name in NAMES:
        torch.testing.assert_close(after[name]["channels"][2], before[name]["channels"][2][order], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(after[name]["heads"], before[name]["heads"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts(name: str, tokens: Tensor) -> None:
    model = random_model(CONFIGS[name])
    found = units(model, tokens, "expert_frequency", "unit_activation_l2", "unit_magnitude_l1")
    frequency = found["expert_frequency"]["experts"]
    torch.testing.assert_close(frequency.sum(1), torch.full((4,), 2.0, dtype=torch.float64))  # of each token, two
    with torch.no_grad():
        logits = model(input_ids=tokens, output_router_logits=True).router_logits
    for block, scores in enumerate(logits):
        chosen = scores.topk(2).indices
        for expert in range(4):
            share = (chosen == expert).any(-1).double().mean().item()
            assert frequency[block, expert].item() == pytest.approx(share, rel=1e-6)
    mlp = model.model.layers[1].block_sparse_moe if name == "mixtral" else model.model.layers[1].mlp
    own = [*mlp.experts[3].parameters(), mlp.gate.weight[3]]  # its row of the router too
    size = sum(p.detach().double().abs().sum().item() for p in own)
    assert found["unit_magnitude_l1"]["experts"][1, 3].item() == pytest.approx(size, rel=1e-6)
    assert found["unit_activation_l2"]["experts"][1, 3] > 0


def test_a_dense_model_has_no_experts(trained: PreTrainedModel, tokens: Tensor) -> None:
    with pytest.raises(UserError, match="no experts"):
        units(trained, tokens, "expert_frequency")
    with pytest.raises(UserError, match="no experts"):
        LayerScoringConfig(criteria=["expert_frequency"]).names(trained.config)
    with pytest.raises(UserError, match="sequence_aggregation 'max' is unknown"):
        LayerScoringConfig(sequence_aggregation="max").names(trained.config)
