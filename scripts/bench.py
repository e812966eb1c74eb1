"""Cost ratios of llmprune to the same work without it, from interleaved runs in one process.

The value of a ratio is the median over pairs of runs; its interval is from the 10th to the 90th percentile.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks.data import data_prep, mixed_loading
from benchmarks.distilling import distillation_step, vocabulary_loss
from benchmarks.estimates import estimate_memory
from benchmarks.heads import richer_block, richer_step
from benchmarks.memory import apply_memory, convert_memory, offload_memory
from benchmarks.precision import bf16_cpu
from benchmarks.pruning import gated_step
from benchmarks.ratios import Ratio
from benchmarks.replacing import replacement_memory, replacement_step
from benchmarks.scoring import all_criteria, removal_perplexity, unit_scores

from llmprune.utils.files import write_json

BENCHMARKS: dict[str, Callable[[int], Ratio]] = {
    "gated_step": gated_step,
    "bf16_cpu": bf16_cpu,
    "replacement_step": replacement_step,
    "replacement_memory": replacement_memory,
    "distillation_step": distillation_step,
    "vocabulary_loss": vocabulary_loss,
    "richer_block": richer_block,
    "richer_step": richer_step,
    "data_prep": data_prep,
    "mixed_loading": mixed_loading,
    "convert_memory": convert_memory,
    "apply_memory": apply_memory,
    "removal_perplexity": removal_perplexity,
    "all_criteria": all_criteria,
    "unit_scores": unit_scores,
    "offload_memory": offload_memory,
    "estimate_memory": estimate_memory,
}


def main() -> int:
    """Run the benchmarks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--runs", type=int, default=15, help="pairs of runs of each")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/bench.json"))
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(BENCHMARKS)
    results = {}
    print(f"{'name':20}{'median':>8}{'10 %':>8}{'90 %':>8}{'bar':>8}   work", flush=True)
    for name in names:
        ratio = BENCHMARKS[name](arguments.runs)
        results[name] = asdict(ratio)
        verdict = "" if ratio.met else "  MISSED"
        print(
            f"{name:20}{ratio.median:8.3f}{ratio.p10:8.3f}{ratio.p90:8.3f}{ratio.bar:8.2f}   {ratio.work}{verdict}",
            flush=True,
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, {"schema": 1, "benchmarks": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
