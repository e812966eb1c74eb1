"""Peak memory of training the built-in model: all weights, and adapters beside frozen ones.

    python studies/memory.py runs/smollm2 --text TEXT [--length 256] [--samples 2]

Each job trains four batches in a process of its own. ``own`` is memory that only this process can give back (Linux's
RssAnon); ``resident`` includes pages of files, such as libraries and the stored weights, which the system may drop.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import llmprune
from data_prep.pack import prepare
from data_prep.recipe import PackSettings

ROOT = Path(__file__).resolve().parents[1]
JOBS = {
    "all weights": ("continue",),
    "LoRA": ("finetune",),
    "LoRA, frozen weights in bfloat16": ("finetune", "model.dtype=bfloat16"),
    "LoRA on four bits": ("finetune", "lora.quantize=nf4"),
}
KINDS = {"own": "RssAnon", "resident": "VmRSS"}


def in_use() -> dict[str, float]:
    """Megabytes of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(status[key].split()[0]) / 1e3 for name, key in KINDS.items()}


def peak_of(yaml: str, overrides: list[str]) -> dict[str, float]:
    """The largest numbers of megabytes while a job runs, looked at every 5 milliseconds."""
    peaks, ended = in_use(), threading.Event()

    def look() -> None:
        while not ended.is_set():
            for name, now in in_use().items():
                peaks[name] = max(peaks[name], now)
            time.sleep(0.005)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        llmprune.train(ROOT / "yamls" / f"{yaml}.yaml", overrides)
    finally:
        ended.set()
        thread.join()
    return peaks


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="folder or file with text")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--samples", type=int, default=2, help="of a batch")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(peak_of(arguments.one[0], arguments.one[1:])))
        return
    with tempfile.TemporaryDirectory() as place:
        folder, first = Path(place), None
        prepare([arguments.text], arguments.model, folder / "data", PackSettings(arguments.length, eval_fraction=0.1))
        print("| job | own, MB | resident, MB | own, of all weights' |\n|---|---|---|---|")
        for name, (yaml, *changes) in JOBS.items():
            overrides = [
                f"model.path={arguments.model}", f"data.path={folder / 'data'}", f"run.folder={folder / 'run'}",
                "run.overwrite=true", "train.duration=4ba", f"train.global_batch_size={arguments.samples}",
                f"train.global_batch_tokens={arguments.samples * arguments.length}", "train.eval_interval=0ba",
                "scheduler.warmup=0ba", "checkpoint.interval=4ba", *changes,
            ]  # fmt: skip
            command = [sys.executable, __file__, arguments.model, "--text", arguments.text, "--one", yaml, *overrides]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=1800)
            found = json.loads(done.stdout.splitlines()[-1])
            first = first or found
            print(f"| {name} | {found['own']:.0f} | {found['resident']:.0f} | {found['own'] / first['own']:.2f} |")


if __name__ == "__main__":
    main()
