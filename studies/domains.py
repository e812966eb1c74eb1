"""What many domains cost: seconds of a run of three batches and one evaluation, from its start to its end."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LENGTH = 32
JOB = """
run: {{name: study, folder: {folder}/run}}
model: {{config: {{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2}}}}
data: {{path: {folder}/data, eval_samples_per_domain: 1}}
dynamic_loading: {{update: constant}}
train: {{duration: 3ba, global_batch_size: 8, microbatch_size: 8, eval_interval: 3ba}}
loggers: {{console: false}}
"""


def make(folder: Path, domains: int) -> None:
    """Prepared data of so many domains, all of which are the same files."""
    from data_prep.pack import prepare
    from data_prep.recipe import PackSettings
    from data_prep.tokenizer import train_tokenizer

    lines = [json.dumps({"text": f"{number} one two three four five " * 4}) for number in range(20)]
    (folder / "one.jsonl").write_text("\n".join(lines))
    train_tokenizer([folder / "one.jsonl"], folder / "tokenizer", vocab_size=300)
    settings = PackSettings(LENGTH, eval_fraction=0.2)
    made = prepare([folder / "one.jsonl"], folder / "tokenizer", folder / "data", settings, processes=1)
    ((name, counts),) = made.manifest.domains.items()
    names = [f"domain{number:05}" for number in range(domains)]
    for one in names:
        shutil.copytree(folder / "data" / name, folder / "data" / one, copy_function=os.link)
    made.manifest.domains = dict.fromkeys(names, counts)
    made.manifest.save(folder / "data")


def run(folder: Path) -> None:
    """Train in this process and print what it took beyond the imports: seconds until the trainer stands, and in all."""
    from composer import Callback

    from llmprune.config.job_files import load_training_job
    from llmprune.jobs.train import train

    (folder / "job.yaml").write_text(JOB.format(folder=folder))
    config = load_training_job(folder / "job.yaml")
    start = time.perf_counter()
    stands: list[float] = []

    class Stands(Callback):
        def fit_start(self, state: object, logger: object) -> None:
            stands.append(time.perf_counter() - start)

    train(config, [Stands()])
    print(f"\n{stands[0]:.1f} {time.perf_counter() - start:.1f}", flush=True)


def main() -> None:
    """Print a line for each number of domains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domains", type=int, nargs="+", default=[500, 1000, 2000, 5000])
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.run is not None:
        run(chosen.run)
        return
    print("| domains | seconds until training begins | seconds in all |\n|---|---|---|")
    for domains in chosen.domains:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), domains)
            command = [sys.executable, __file__, "--run", folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        first, whole = done.stdout.split()[-2:]
        print(f"| {domains:,} | {first} | {whole} |", flush=True)


if __name__ == "__main__":
    main()
