"""The time per token of models of other shapes, from timings on this machine.

The table contains the time of a block for pairs of sizes, (hidden, key/value groups) and (hidden, channels or experts).
The times of attention and MLP add up, so that the time of a block of any three sizes follows from two pairs and their
common part. Each timing is the difference of two models with different numbers of blocks, so that the time outside the
blocks is known as well. The larger one has so many blocks that its weights come from memory, as those of the whole
model do, and not from a processor's cache.
"""

import math
import statistics
import time
from dataclasses import replace

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from llmprune.models.families import Shape
from llmprune.models.loading import unfilled_model
from llmprune.models.source import longest_input
from llmprune.pruning.budgets.shape_sizes import ShapeSizes, of_size, prunable_dimensions
from llmprune.utils.errors import UserError

FEW, MANY = 1, 5  # numbers of blocks of the two timed models; MANY at least
UNCACHED = 2**28  # bytes of weights that no processor's cache holds
STEPS, ROUNDS = 8, 5
SHORTEST = 1e-9  # seconds; differences of the times of tiny models may be zero


class LatencyTable:
    """Seconds to compute one token of every sequence in a batch, after a cache of a given length."""

    def __init__(
        self, config: PretrainedConfig, *, batch: int, context: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Create an empty table; it is filled when times are requested.

        Args:
            config: config of the source model.
            batch: number of sequences that are continued together.
            context: number of tokens in the cache before the timed one.
            device: device that runs the timed models.
            dtype: dtype of the weights.
        """
        _settle()
        self._sizes = ShapeSizes(config)
        self.source = self._sizes.source
        limit = longest_input(config)
        self._context = context if limit is None else min(context, limit - 1)  # minus the timed token
        self._batch, self._device, self._dtype = batch, device, dtype
        self._timed: dict[tuple[int, int, int], tuple[float, float]] = {}
        _, self._groups, self._inner = prunable_dimensions(config)

    def seconds(self, shape: Shape) -> float:
        """The time of one token in a model of ``shape``, in seconds."""
        hidden = shape.hidden
        full = hidden, self.source.kv_heads, self._of(self.source)
        groups, inner = shape.kv_heads, self._of(shape)
        outside, whole = self._time(*full)
        narrow_attention = self._time(hidden, groups, full[2])[1]
        narrow_inner = self._time(hidden, full[1], inner)[1]
        return max(outside + shape.layers * max(narrow_attention + narrow_inner - whole, 0.0), SHORTEST)

    def measured(self, shape: Shape, reference: Shape) -> float | None:
        """The measured time of one token in a model of ``shape``, divided by that in a model of ``reference``.

        None if there is not enough memory for both models.
        """
        if self._needed(shape) + self._needed(reference) > self._free():
            return None
        a, b = (self._decoder(s) for s in (shape, reference))
        ratios = []
        for _ in range(2 * ROUNDS):
            first, second = _seconds(a, self._device), _seconds(b, self._device)
            ratios.append(first / second)
        return statistics.median(ratios)

    def _of(self, shape: Shape) -> int:
        return int(getattr(shape, self._inner))

    def _time(self, hidden: int, groups: int, inner: int) -> tuple[float, float]:
        """The seconds outside the blocks, and the seconds of one block."""
        key = hidden, groups, inner
        if key not in self._timed:
            shape = of_size(self.source, {"hidden": hidden, "kv_heads": groups, self._inner: inner})
            most = self._many
            needed = sum(self._needed(replace(shape, layers=layers)) for layers in (FEW, most))
            if needed > self._free():
                raise UserError(
                    f"timing {most} blocks of this model takes {needed / 1e9:.1f} GB and {self._free() / 1e9:.1f} GB "
                    "are free: take a smaller --batch or --context"
                )
            few, many = (self._decoder(replace(shape, layers=layers)) for layers in (FEW, most))
            times = [(_seconds(few, self._device), _seconds(many, self._device)) for _ in range(ROUNDS)]
            block = max(statistics.median((b - a) / (most - FEW) for a, b in times), 0.0)
            outside = max(statistics.median(a for a, _ in times) - FEW * block, 0.0)
            self._timed[key] = outside, block
        return self._timed[key]

    @property
    def _many(self) -> int:
        """The number of blocks of the larger timed model: as many as no cache holds, or all of the source's."""
        one, two = (self._sizes.parameters(replace(self.source, layers=layers)) for layers in (1, 2))
        enough = math.ceil(UNCACHED / ((two - one) * self._dtype.itemsize))
        return max(MANY, min(enough, self.source.layers))

    def _needed(self, shape: Shape) -> float:
        """The bytes of a model of ``shape``, of its cache and of the tensors that the cache is filled from."""
        blocks = [block % self.source.layers for block in range(shape.layers)]
        cache = self._sizes.cache_bytes(
            shape, blocks, batch=self._batch, context=self._context, itemsize=self._dtype.itemsize
        )
        return self._sizes.parameters(shape) * self._dtype.itemsize + 2 * cache

    def _free(self) -> float:
        free = torch.cuda.mem_get_info()[0] if self._device.type == "cuda" else psutil.virtual_memory().available
        return 0.8 * float(free)

    def _decoder(self, shape: Shape) -> "_Decoder":
        """A model of ``shape`` that computes one token after a full cache."""
        blocks = [block % self.source.layers for block in range(shape.layers)]
        # Sizes are timed one by one, so hidden may not be a multiple of the heads.
        config = self._sizes.family.with_shape(self._sizes.config, _coupled(shape, self._sizes), blocks)
        model = _filled(config, self._dtype).to(self._device)  # type: ignore[arg-type]
        built = self._sizes.family.shape(config)
        size = self._batch, built.kv_heads, self._context, built.head_dim
        states = torch.full(size, 0.01, dtype=self._dtype, device=self._device)
        decoder = _Decoder(model, states, built.layers)
        decoder.fill()
        decoder.step()
        return decoder


class _Decoder:
    """A model with its key/value cache."""

    def __init__(self, model: PreTrainedModel, states: Tensor, layers: int) -> None:
        self._model, self._states, self._layers = model, states, layers
        self._token = torch.ones(len(states), 1, dtype=torch.int64, device=states.device)

    def fill(self) -> None:
        """Fill the cache with the tokens before the timed one."""
        self._cache = DynamicCache(config=self._model.config)
        for block in range(self._layers):
            self._cache.update(self._states, self._states, block)

    @torch.inference_mode()
    def step(self) -> Tensor:
        """The logits of one more token, [batch, 1, vocabulary]."""
        logits: Tensor = self._model(input_ids=self._token, past_key_values=self._cache, use_cache=True).logits
        return logits


def _settle() -> None:
    """Let glibc keep freed memory up to 32 MB, as it does by itself once a tensor of that size was freed.

    Until then it gives large tensors back to the system after each step and clears them again in the next: the shapes
    that are timed first would be several times slower than the others.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def _coupled(shape: Shape, sizes: ShapeSizes) -> Shape:
    """The nearest shape that a config of the family can have."""
    if sizes.family.keeps_whole_heads(sizes.config):
        return replace(shape, hidden=max(shape.hidden // shape.heads, 1) * shape.heads)
    if not sizes.family.head_size_is_derived(sizes.config):
        return shape
    groups = shape.hidden // shape.head_dim // sizes.source.heads_per_group
    return of_size(shape, {"kv_heads": groups})


def _filled(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model with arbitrary weights; they are written because memory that was never written is not really read."""
    model = unfilled_model(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    return model


def _seconds(decoder: _Decoder, device: torch.device) -> float:
    """The median time of one token, in seconds."""
    times = []
    for _ in range(STEPS):
        decoder.fill()
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        decoder.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
