"""From the built-in model, SmolLM2-135M, to a model with three quarters of its parameters, recovered and measured."""

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path

from llmprune.conversion.from_gguf import from_gguf
from llmprune.jobs.prune.job import prune
from llmprune.jobs.prune.settings import PruneConfig
from llmprune.pruning.budgets.settings import BudgetConfig
from llmprune.utils.programs import run_program

PARAMS, MINUTES, TRIES = "0.75", 8.0, 6


def main() -> int:
    """Make the built-in model, and prune it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("runs/smollm2"), help="folder of the built-in model")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of all results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of recovery")
    parser.add_argument("--seed", type=int, default=17, help="of the samples and of the order of the data")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("composer").setLevel(logging.ERROR)
    start = time.perf_counter()
    if not arguments.model.exists():
        print(f"quickstart: {from_gguf(None, arguments.model):,} parameters in {arguments.model}", flush=True)
    budget = BudgetConfig(params=PARAMS, tries=TRIES)
    config = PruneConfig(budget, minutes=arguments.minutes, seed=arguments.seed)
    print(
        f"quickstart: llmprune prune {arguments.model} --params {PARAMS} --tries {TRIES} "
        f"--minutes {arguments.minutes:g} --seed {arguments.seed} --out {arguments.out}",
        flush=True,
    )
    outcome = prune(str(arguments.model), arguments.out, config)
    print(f"\n{outcome}\n\nquickstart: {(time.perf_counter() - start) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, "the same command goes on"))
