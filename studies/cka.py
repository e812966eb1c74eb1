"""What decides the CKA of a real model's blocks: how far it changes without the first token and the largest dimensions.

    python studies/cka.py MODEL --data TEXT --out OUT

Forms of the states before the linear kernel are compared; ``standardised`` is what the criterion ``cka`` computes. What
comes out is OUT/table.md.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.data.calibration import calibration_samples
from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.models.block_hooks import RunBlock, hooked_blocks
from llmprune.models.loading import load_model, load_tokenizer
from llmprune.pruning.scoring.hidden_states import CKA_POSITIONS, centred_kernel, standardised
from llmprune.utils.files import write_text
from llmprune.utils.progress import Progress

LARGEST = 6  # dimensions that are left out


def scaled(states: Tensor) -> Tensor:
    """Every dimension of [1, tokens, hidden] to mean 0 and variance 1."""
    states = states - states.mean(1, keepdim=True)
    return states / states.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda states: states,
    "each token to length 1": lambda states: F.normalize(states, dim=-1),
    "each dimension to variance 1": scaled,
    "standardised (both)": standardised,
}


@torch.no_grad()
def outputs(model: str, data: CalibrationConfig) -> Tensor:
    """The outputs of all blocks, [blocks, samples, tokens, hidden]."""
    tokens = calibration_samples(data, load_tokenizer(model))
    loaded = load_model(model).eval()
    found: list[Tensor] = []
    for sample in Progress(tokens.split(1), desc="running the model", unit="samples"):
        kept: list[Tensor] = []

        def visit(number: int, run: RunBlock, states: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(after := run(states))
            return after

        with hooked_blocks(loaded, visit):
            loaded(input_ids=sample, use_cache=False)
        found.append(torch.stack(kept))
    return torch.cat(found, dim=1)


def cka(states: Tensor, form: Callable[[Tensor], Tensor]) -> Tensor:
    """The CKA of every two blocks, from [blocks, samples, tokens, hidden]."""
    length = states.shape[2]
    take = min(length, CKA_POSITIONS)
    positions = torch.arange(take) * length // take
    total = torch.zeros(len(states), len(states), dtype=torch.float64)
    for sample in range(states.shape[1]):
        formed = [form(block[sample, positions].double()[None]) for block in states]
        kernels = torch.cat([centred_kernel(one @ one.transpose(1, 2)).flatten(1) for one in formed])
        total += kernels @ kernels.T
    own = total.diagonal().sqrt()
    return total / (own[:, None] * own)


def main() -> None:
    """Compare all forms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="calibration text or prepared data")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    states = outputs(arguments.model, CalibrationConfig(arguments.data, arguments.samples, 512))
    largest = states.abs().amax(dim=(0, 1, 2)).topk(LARGEST).indices
    others = torch.ones(states.shape[-1], dtype=torch.bool)
    others[largest] = False
    apart = ~torch.eye(len(states), dtype=torch.bool)
    lines = [
        f"| states before the kernel | CKA of two blocks: lowest, median, highest | change without the first token | "
        f"without {LARGEST} of {len(others)} dimensions |",
        "|---|---|---|---|",
    ]
    for name, form in Progress(FORMS.items(), desc="comparing", unit="forms"):
        whole = cka(states, form)
        changes = [(whole - cka(part, form)).abs().max() for part in (states[:, :, 1:], states[..., others])]
        values = f"{whole[apart].min():.3f}, {whole[apart].median():.3f}, {whole[apart].max():.3f}"
        lines.append(f"| {name} | {values} | {changes[0]:.3f} | {changes[1]:.3f} |")
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out / "table.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
