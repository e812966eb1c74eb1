"""Flash attention without its package: naive attention under Transformers' own code for flash attention.

Transformers decides what the kernels are given (which documents, which window); only the kernels themselves are acted.
An example, in a test:

    def test_flash(acted_flash: None) -> None:
        model = flashed(random_model(tiny_config()))
        logits_of(model, {"input_ids": tokens, "position_ids": positions})
"""

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from torch import Tensor
from transformers import PreTrainedModel


def flashed(model: PreTrainedModel) -> PreTrainedModel:
    """The model, with flash attention, which Transformers would refuse without the package."""
    model.config._attn_implementation = "flash_attention_2"
    return model


@pytest.fixture
def acted_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let models with flash attention run, in any number format and on any device."""
    monkeypatch.setattr(flash, "_flash_fn", attention)
    monkeypatch.setattr(flash, "_flash_varlen_fn", packed_attention)
    monkeypatch.setattr(flash, "_pad_fn", _padded)
    monkeypatch.setattr(flash, "_unpad_fn", _padded)
    monkeypatch.setattr(flash, "_process_flash_kwargs_fn", flash._lazy_define_process_function(packed_attention))


def attention(q: Tensor, k: Tensor, v: Tensor, **settings: object) -> Tensor:
    """As ``flash_attn.flash_attn_func``: [batch, length, heads, head size]."""
    samples, length = q.shape[:2]
    bounds = torch.arange(0, samples * length + 1, length, dtype=torch.int32, device=q.device)
    rows = (x.flatten(0, 1) for x in (q, k, v))
    return packed_attention(*rows, bounds, bounds, length, length, **settings).view_as(q)  # type: ignore[arg-type]


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """As ``flash_attn.flash_attn_varlen_func``: [tokens, heads, head size], document after document."""
    assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q is cu_seqlens_k and causal and dropout_p == 0
    bounds = getattr(cu_seqlens_q, "held", cu_seqlens_q)  # of the pretended device: checked without waiting for it
    assert bounds[0] == 0 and bounds[-1] == len(q) == len(k)
    assert bounds.diff().min() > 0 and bounds.diff().max() <= min(max_seqlen_q, max_seqlen_k)
    place = torch.arange(len(q), device=q.device)
    document = torch.bucketize(place, cu_seqlens_q, right=True)
    distance = place[:, None] - place
    seen = (document[:, None] == document) & (distance >= 0)
    if window_size[0] >= 0:
        seen &= distance <= window_size[0]
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def _padded(*_: object) -> None:
    raise AssertionError("nothing is ever padded")
