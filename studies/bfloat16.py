"""Scores of a model in bfloat16 and in float32: do the criteria order the blocks alike?

    python studies/bfloat16.py runs/smollm2 runs/quickstart/data [--samples 32]

The table has, for each criterion of blocks: whether the order is the same; the largest number of blocks N for which the
N lowest are the same set in both, up to half of the blocks, if all smaller N are too; the rank correlation.
"""

import argparse
import time
from pathlib import Path

from scipy.stats import spearmanr

import llmprune
from llmprune.utils.files import write_json


def agreement(a: list[float], b: list[float]) -> dict[str, float]:
    """How far two lists of scores order the blocks alike."""
    first, second = (sorted(range(len(scores)), key=scores.__getitem__) for scores in (a, b))
    same = 0
    while same < len(a) // 2 and {*first[: same + 1]} == {*second[: same + 1]}:
        same += 1
    return {"equal": first == second, "same_lowest": same, "rank_correlation": float(spearmanr(a, b)[0])}


def main() -> None:
    """Score twice, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("runs/bfloat16.json"))
    arguments = parser.parse_args()
    scores, seconds = {}, {}
    for dtype in ("float32", "auto", "bfloat16"):
        start = time.perf_counter()
        scores[dtype] = llmprune.score(arguments.model, arguments.data, samples=arguments.samples, dtype=dtype)
        seconds[dtype] = time.perf_counter() - start
        print(f"{dtype}: {seconds[dtype]:.0f} s, perplexity {scores[dtype].perplexity:.3f}", flush=True)
    found = {}
    for dtype in ("auto", "bfloat16"):
        for section in ("blocks", "subblocks"):
            for name, exact in getattr(scores["float32"], section).items():
                found[f"{name}, {dtype}"] = row = agreement(exact, getattr(scores[dtype], section)[name])
                print(f"{name:30}{dtype:10}{row['equal']!s:6}{row['same_lowest']:4}{row['rank_correlation']:9.4f}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, {"schema": 1, "seconds": seconds, "criteria": found})


if __name__ == "__main__":
    main()
