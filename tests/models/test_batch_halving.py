"""Evaluation when memory runs out: smaller batches, the same losses."""

import pytest
import torch

from llmprune.models.batch_halving import Halving
from llmprune.models.causal_lm import Batch, ComposerCausalLM
from tests.conftest import random_model, tiny_config


class Small(ComposerCausalLM):
    """A model whose device holds so many samples only."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__(random_model(tiny_config(num_hidden_layers=1)))
        self.most, self.error, self.tried = most, error, list[int]()

    def _measured(self, batch: Batch) -> dict[str, torch.Tensor]:
        self.tried.append(len(batch["input_ids"]))
        if self.tried[-1] > self.most:
            raise self.error
        return super()._measured(batch)


OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def batch_of(samples: int) -> Batch:
    tokens = torch.randint(300, (samples, 9), generator=torch.Generator().manual_seed(samples))
    return {"input_ids": tokens, "domain": torch.arange(samples)}


@pytest.mark.parametrize("error", [OUT, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 12")])
def test_batches_are_halved_until_they_fit_and_stay_small(error: Exception) -> None:
    model = Small(3, error)
    wanted = [ComposerCausalLM(model.model).eval_forward(batch_of(samples)) for samples in (10, 4, 2)]
    model.halving = Halving()
    for expected, samples, tried in zip(wanted, (10, 4, 2), ([10, 5, 3, 3, 3, 1], [3, 1], [2]), strict=True):
        model.tried.clear()
        found = model.eval_forward(batch_of(samples))
        assert model.tried == tried and found.keys() == expected.keys() == {"loss", "tokens", "domain"}
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


def test_a_sample_that_does_not_fit_and_other_errors_are_raised() -> None:
    for most, error, tried in ((0, OUT, [4, 2, 1]), (2, RuntimeError("shapes differ"), [4])):
        model = Small(most, error)
        model.halving = Halving()
        with pytest.raises(RuntimeError) as raised:
            model.eval_forward(batch_of(4))
        assert raised.value is error and model.tried == tried


def test_unasked_memory_may_run_out() -> None:
    """Sharded ranks wait for each other: none may run other passes than the rest."""
    with pytest.raises(torch.OutOfMemoryError):
        Small(2, OUT).eval_forward(batch_of(4))
