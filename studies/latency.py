"""How well the table of block timings, on which a budget of latency rests, predicts models that are built.

python studies/latency.py MODEL [--batch 4] [--context 512]
"""

import argparse

import torch

from llmprune.models.loading import load_model_config
from llmprune.models.number_formats import dtype_for_inference
from llmprune.pruning.budgets.latency import LatencyTable
from llmprune.pruning.budgets.shape_sizes import of_size
from llmprune.pruning.planning import default_device


def main() -> None:
    """Print predicted and measured times of some shapes, as shares of the source's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--context", type=int, default=512, help="tokens before the timed one")
    arguments = parser.parse_args()
    device = default_device()
    table = LatencyTable(
        load_model_config(arguments.model),
        batch=arguments.batch,
        context=arguments.context,
        device=device,
        dtype=dtype_for_inference("auto", on_gpu=device.type == "cuda"),
    )
    source = table.source
    parts = {"layers": 1, "intermediate": 1, "kv_heads": 1, "hidden": source.heads}  # and what they are multiples of

    def smaller(share: float, *names: str) -> dict[str, int]:
        return {name: max(round(getattr(source, name) * share / parts[name]), 1) * parts[name] for name in names}

    shapes = {
        "half of the layers": smaller(0.5, "layers"),
        "half of the channels": smaller(0.5, "intermediate"),
        "two thirds of the key/value groups": smaller(2 / 3, "kv_heads"),
        "three quarters of the hidden dimensions": smaller(0.75, "hidden"),
        "three quarters of layers and channels": smaller(0.75, "layers", "intermediate"),
        "half of layers, channels and hidden dimensions": smaller(0.5, "layers", "intermediate", "hidden"),
    }
    print(f"| what stays ({torch.get_num_threads()} threads) | predicted | measured |\n|---|---|---|")
    for words, sizes in shapes.items():
        shape = of_size(source, sizes)
        predicted = table.seconds(shape) / table.seconds(source)
        print(f"| {words} | {predicted:.3f} | {table.measured(shape, source):.3f} |", flush=True)


if __name__ == "__main__":
    main()
