"""Put jobs of every kind through faults, and see that each comes out as the undisturbed one, bit for bit.

Every kind of fault has numbers; what happens in a number is drawn from (seed, fault, job, number). OUT/faults.jsonl
gets a line for each as it finishes, and a later call goes on with those that are missing. A job survives if whatever it
ended with was one clear line and the same job, started again, ends in the same bytes (checkpoint, losses, exported
files).

Faults between processes (loader workers, ranks and launchers that are killed) are those of ``kill_campaign.py``.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmprune.checkpoints.metrics import read_lines
from llmprune.utils.files import write_text
from tests.harness.faults.cases import CASES, Bench


def carry_out(bench: Bench, fault: str, job: str, number: int, seed: int) -> dict[str, Any]:
    """Let a fault happen to a job; what came of it, ready for JSON."""
    start = time.monotonic()
    folder = bench.fresh(f"{fault}-{job}-{number}".replace(" ", "-"))
    lost = CASES[fault][0](bench, job, folder, random.Random(f"{seed} {fault} {job} {number}"))
    if lost is None:
        bench.fresh(folder.name)
    seconds = round(time.monotonic() - start, 1)
    return {"seed": seed, "fault": fault, "job": job, "number": number, "lost": lost, "seconds": seconds}


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Faults by jobs: tries that survived, of how many."""
    jobs = list(dict.fromkeys(job for _, jobs in CASES.values() for job in jobs))
    rows = [f"| fault | {' | '.join(jobs)} | tries | survived | lost |", "|---" * (len(jobs) + 4) + "|"]
    for fault in CASES:
        found = [line for line in lines if line["fault"] == fault]
        if not found:
            continue
        cells = []
        for job in jobs:
            own = [line["lost"] is None for line in found if line["job"] == job]
            cells.append(f"{sum(own)}/{len(own)}" if own else "")
        good = sum(line["lost"] is None for line in found)
        rows.append(f"| {fault} | {' | '.join(cells)} | {len(found)} | {good} | {len(found) - good} |")
    return "\n".join(rows) + "\n"


def main() -> int:
    """Carry out what is missing and print the table; 1 if anything was ever lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=30, help="of every fault and job, with those of earlier calls")
    parser.add_argument("--kills", type=int, default=None, help="the same for SIGKILL; default: as many")
    parser.add_argument("--only", nargs="*", choices=[*CASES], help="these faults")
    parser.add_argument("--jobs", nargs="*", help="these jobs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    arguments = parser.parse_args()
    bench = Bench(arguments.out.resolve())
    results = bench.out / "faults.jsonl"
    lines = read_lines(results)
    write_text(results, "".join(json.dumps(line) + "\n" for line in lines))  # without a torn last line
    done = {(line["fault"], line["job"], line["number"]) for line in lines if line["seed"] == arguments.seed}
    for number in range(max(arguments.tries, arguments.kills or 0)):
        for fault, (_, jobs) in CASES.items():
            tries = arguments.kills if fault == "SIGKILL" and arguments.kills is not None else arguments.tries
            skipped = number >= tries or (arguments.only and fault not in arguments.only)
            if skipped or (fault == "full disk" and not bench.can_mount):
                continue
            for job in jobs:
                if (fault, job, number) in done or (arguments.jobs and job not in arguments.jobs):
                    continue
                line = carry_out(bench, fault, job, number, arguments.seed)
                lines.append(line)
                with results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                verdict = "survived" if line["lost"] is None else f"LOST: {line['lost']}"
                print(f"{fault} {job} {number}: {verdict} ({line['seconds']} s)", flush=True)
    write_text(bench.out / "faults.md", table(lines))
    print("\n" + table(lines))
    return 0 if all(line["lost"] is None for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
