"""Kill training runs at random points, resume them, and see that nothing differs and nothing is left behind.

A tiny Llama trains on two ranks under Composer's launcher, with loader workers, changing weights of domains, frequent
evaluations and checkpoints. Number k, drawn from (seed, k), kills a loader worker, a rank or the launcher by SIGKILL
while the run starts, trains, evaluates or writes a checkpoint; the run then goes on with ``run.autoresume=true``, on
another number of ranks and workers perhaps, where it may be killed once more. Its samples must be those of the
undisturbed run, one by one, and its final loss the same to 1e-5.

OUT/kills.jsonl gets a line for each number as it finishes; a later call goes on with those that are missing.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from llmprune.checkpoints.metrics import read_lines, read_metrics
from llmprune.checkpoints.run_folder import RunFolder
from llmprune.utils.files import read_json, write_json, write_text
from llmprune.utils.outputs import remove

ROOT = Path(__file__).resolve().parents[2]
VICTIMS = ("worker", "rank", "launcher")
EVENTS = ("start", "batch", "evaluation", "checkpoint")
BATCHES = 60
LAST_STRIKE = 40  # the batch by which kills are due
CHECKPOINTS = 5  # batches from one to the next
PATIENCE = 60.0  # seconds for a killed run to be gone; Composer's launcher gives ranks 30 to end by themselves
LIMIT = 300.0  # seconds for a run to reach a point, or its end
MARK = "LLMPRUNE_KILL_CAMPAIGN"  # the variable by which processes of a run are found, wherever they have gone
SHARED_MEMORY = Path("/dev/shm")
CONFIG = """
run: {{name: kills, folder: {out}/run, seed: 3}}
model:
  config: {{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4}}
data: {{path: {out}/data, eval_samples_per_domain: 4, workers: 2, prefetch: 2}}
dynamic_loading: {{references: {{animals: 1.0, letters: 3.0, numbers: 2.0}}, eta: 0.1, update_delay: 4}}
optimizer: {{lr: 1.0e-3}}
scheduler: {{name: constant, warmup: 0ba}}
train: {{duration: {batches}ba, global_batch_size: 8, microbatch_size: 4, eval_interval: 6ba}}
checkpoint: {{interval: {checkpoints}ba}}
loggers: {{console_interval: {batches}ba}}
"""
WORDS = {"animals": ("ant", "bee", "cow"), "letters": ("alpha", "beta", "gamma"), "numbers": ("one", "two", "three")}


@dataclass(frozen=True)
class Strike:
    """One kill.

    Attributes:
        victim: one of ``VICTIMS``.
        event: what the run is about, one of ``EVENTS``.
        batch: the first such event at or after this batch.
        delay: seconds from then to the kill; for ``start``, from the launch.
        ranks: of the run that is killed.
        workers: loader workers of each of its ranks.
    """

    victim: str
    event: str
    batch: int
    delay: float
    ranks: int = 2
    workers: int = 2


@dataclass(frozen=True)
class Case:
    """One number of the campaign: a run that is killed once or twice.

    Attributes:
        sharded: whether the ranks share parameters (FSDP2) or each hold all.
        strikes: the kills, one after the other.
        ranks: of the run that goes on to the end.
        workers: loader workers of each of its ranks.
    """

    sharded: bool
    strikes: tuple[Strike, ...]
    ranks: int
    workers: int


@dataclass(frozen=True)
class Aftermath:
    """What a kill left.

    Attributes:
        hit: whether the victim was there.
        seconds: from the kill until no process of the run was alive; ``PATIENCE`` if some had to be killed.
        processes: those.
        shared_memory: names in /dev/shm that were not there before the run and that nobody uses.
    """

    hit: bool
    seconds: float
    processes: list[str]
    shared_memory: list[str]

    @property
    def clean(self) -> bool:
        """Whether the victim was killed and nothing is left."""
        return self.hit and not self.processes and not self.shared_memory


def draw(seed: int, number: int, start_seconds: float) -> Case:
    """The case of a number.

    Args:
        seed: of the campaign.
        number: of the case.
        start_seconds: how long an undisturbed run takes to its first batch.
    """
    chance = random.Random(f"{seed} {number}")
    strikes = []
    for place in range(2 if chance.random() < 0.3 else 1):
        ranks, workers = (chance.choice((1, 2)), chance.choice((0, 1, 2))) if place else (2, 2)
        victim = chance.choice(VICTIMS if workers else VICTIMS[1:])
        event = chance.choice(EVENTS[1:] if victim == "worker" else EVENTS)  # there are no workers at the start
        delay = chance.uniform(0, start_seconds if event == "start" else 0.05)
        strikes.append(Strike(victim, event, chance.randrange(LAST_STRIKE), delay, ranks, workers))
    return Case(chance.random() < 0.5, tuple(strikes), chance.choice((1, 2)), chance.choice((0, 1, 2)))


def prepare(out: Path) -> Path:
    """Make a corpus of three domains, data and the YAML of the runs in ``out``, unless they are there; the YAML."""
    from data_prep.pack import prepare as prepare_data
    from data_prep.recipe import PackSettings
    from data_prep.tokenizer import train_tokenizer

    yaml = out / "kills.yaml"
    if not yaml.exists():
        for domain, words in WORDS.items():
            texts = (  # no sample is like another
                " ".join(f"{word} {number}.{place}" for place in range(5) for word in words) for number in range(200)
            )
            (out / "corpus" / domain).mkdir(parents=True, exist_ok=True)
            write_text(out / "corpus" / domain / "part.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts))
        train_tokenizer([out / "corpus"], out / "tokenizer", vocab_size=300)
        settings = PackSettings(32, eval_fraction=0.1)
        prepare_data([out / "corpus"], out / "tokenizer", out / "data", settings, processes=1, overwrite=True)
        write_text(yaml, CONFIG.format(out=out, batches=BATCHES, checkpoints=CHECKPOINTS))
    return yaml


class Run:
    """A run under Composer's launcher, in a folder that holds its attempts and, in ``run``, what it trains."""

    def __init__(self, folder: Path, yaml: Path, *, sharded: bool = False) -> None:
        """Describe the run; nothing is started."""
        self.folder, self._yaml = folder, yaml
        self._settings = [f"run.folder={folder}/run", "run.autoresume=true", *(["sharding={}"] if sharded else [])]

    @contextmanager
    def _attempt(self, ranks: int, workers: int, *more: str) -> "Iterator[_Attempt]":
        """Start it, or go on with it; however the block ends, no process stays."""
        record = self.folder / f"attempt-{len([*self.folder.glob('attempt-*')])}"
        record.mkdir(parents=True)
        launcher = [str(Path(sys.executable).parent / "composer"), "-n", str(ranks)]
        script = [str(ROOT / "tests" / "harness" / "recorded_run.py"), str(record), str(self._yaml)]
        with tempfile.TemporaryDirectory() as temporary, (record / "log").open("w") as log:
            mark = uuid.uuid4().hex
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            process = subprocess.Popen(
                [*launcher, *script, *self._settings, f"data.workers={workers}", *more],
                env={**os.environ, "PYTHONPATH": path, "TMPDIR": temporary, MARK: mark},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            attempt = _Attempt(process, mark, record)
            try:
                yield attempt
            finally:
                attempt.end()

    def strike(self, strike: Strike, chance: random.Random) -> Aftermath:
        """Start the run, or go on with it, and kill the victim when the time has come.

        Args:
            strike: what is killed when.
            chance: chooses among several ranks or workers.
        """
        before = shared_memory()
        # Without end, so that what a kill leaves running does not end by itself while that is waited for.
        with self._attempt(strike.ranks, strike.workers, "train.duration=1000000ba") as attempt:
            if strike.event != "start":
                attempt.reach(strike.event, strike.batch)
            time.sleep(strike.delay)
            if victims := attempt.find(strike.victim):
                chance.choice(victims).kill()
            killed = time.monotonic()
            while (left := attempt.alive()) and time.monotonic() - killed < PATIENCE:
                attempt.process.poll()
                time.sleep(0.02)
            seconds = time.monotonic() - killed
        names = [str(process) for process in left]
        return Aftermath(bool(victims), round(seconds, 2), names, sorted(shared_memory() - before))

    def finish(self, ranks: int, workers: int) -> float:
        """Let it run to its end.

        Returns:
            Seconds from the start to the first event.

        Raises:
            RuntimeError: it ended with an error.
        """
        with self._attempt(ranks, workers) as attempt:
            start = time.monotonic()
            attempt.reach("batch", 0)
            seconds = time.monotonic() - start
            if code := attempt.process.wait(LIMIT):
                raise RuntimeError(f"exit code {code}: see {attempt.record}/log")
        return seconds

    def samples(self) -> dict[int, list[str]]:
        """Digests of the samples of every batch, of all ranks one after the other.

        Of a batch that was done several times, what the last attempt did.
        """
        found: dict[int, list[str]] = {}
        for attempt in sorted(self.folder.glob("attempt-*")):
            batches: dict[int, list[str]] = {}
            for path in sorted(attempt.glob("rank-*.jsonl")):
                for line in read_lines(path):
                    if line["event"] == "batch":
                        batches.setdefault(line["batch"], []).extend(line["samples"])
            found |= batches
        return dict(sorted(found.items()))

    def loss(self) -> float:
        """The last evaluation loss."""
        lines = read_metrics(RunFolder(self.folder / "run").metrics)
        return next(float(line["metrics/eval/loss"]) for line in reversed(lines) if "metrics/eval/loss" in line)


class _Attempt:
    """One start of a run."""

    def __init__(self, process: "subprocess.Popen[bytes]", mark: str, record: Path) -> None:
        self.process, self.record = process, record
        self._mark = mark

    def reach(self, event: str, batch: int) -> None:
        """Wait for an event at or after a batch, or for the run's end."""
        path, until = self.record / "rank-0.jsonl", time.monotonic() + LIMIT
        while self.process.poll() is None and time.monotonic() < until:
            passed = (line["batch"] for line in read_lines(path) if line["event"] == event)
            if any(now >= batch and (event != "checkpoint" or now % CHECKPOINTS == 0) for now in passed):
                return
            time.sleep(0.005)

    def find(self, victim: str) -> list[psutil.Process]:
        """Wait for processes of a kind; none if the run ends without."""
        found: list[psutil.Process] = []
        until = time.monotonic() + LIMIT
        while not found and self.process.poll() is None and time.monotonic() < until:
            with suppress(psutil.Error):  # one of them has just ended
                found = self._find(victim)
            time.sleep(0.005)
        return found

    def _find(self, victim: str) -> list[psutil.Process]:
        launcher = psutil.Process(self.process.pid)
        if victim == "launcher":
            return [launcher]
        ranks = [child for child in launcher.children() if "LOCAL_RANK" in child.environ()]
        if victim == "rank":
            return ranks
        # Workers are forked from their rank and have its command line, which helpers of Python's do not.
        return [child for rank in ranks for child in rank.children() if child.cmdline() == rank.cmdline()]

    def alive(self) -> list[psutil.Process]:
        """Every process that was started by this attempt, directly or not, and has not ended."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark:
                    found.append(process)
            except psutil.Error:  # it ended just now, or is not ours
                continue
        return found

    def end(self) -> None:
        """Kill what is alive."""
        while left := self.alive():
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.poll()
        self.process.wait()


def shared_memory() -> set[str]:
    """Names of shared memory that no process has mapped: what others are at is held by them.

    Semaphores of loky are left out: libraries of other tests make them, and nothing that is tested here does.
    """
    held = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # it ended just now, or is not ours
            held |= {line.rpartition(f"{SHARED_MEMORY}/")[2] for line in maps.read_text().splitlines()}
    return {path.name for path in SHARED_MEMORY.iterdir() if not path.name.startswith("sem.loky-")} - held


def undisturbed(out: Path, sharded: bool) -> dict[str, Any]:
    """Samples, final loss and seconds to the first batch of a run that nothing happens to; kept in ``out``."""
    name = f"undisturbed-{'sharded' if sharded else 'parallel'}"
    path = out / f"{name}.json"
    if not path.exists():
        remove(out / name)
        run = Run(out / name, prepare(out), sharded=sharded)
        start = run.finish(ranks=2, workers=2)
        write_json(path, {"samples": [*run.samples().values()], "loss": run.loss(), "start_seconds": start})
    found = read_json(path)
    assert isinstance(found, dict) and len(found["samples"]) == BATCHES
    return found


def carry_out(out: Path, seed: int, number: int) -> dict[str, Any]:
    """Kill and resume as the number says; what happened, ready for JSON."""
    began = time.monotonic()
    case = draw(seed, number, undisturbed(out, False)["start_seconds"])
    expected = undisturbed(out, case.sharded)
    folder = out / f"kill-{seed}-{number}"
    remove(folder)
    run, chance = Run(folder, prepare(out), sharded=case.sharded), random.Random(f"{seed} {number} victims")
    aftermaths = [run.strike(strike, chance) for strike in case.strikes]
    same, loss_error, error = False, None, None
    try:
        run.finish(case.ranks, case.workers)
        samples = run.samples()
        same = [*samples] == [*range(BATCHES)] and [*samples.values()] == expected["samples"]
        loss_error = abs(run.loss() / expected["loss"] - 1)
    except (RuntimeError, StopIteration, subprocess.TimeoutExpired) as problem:
        error = str(problem)
    passed = same and loss_error is not None and loss_error <= 1e-5 and all(left.clean for left in aftermaths)
    if passed:
        remove(folder)
    return {
        "seed": seed,
        "number": number,
        **asdict(case),
        "aftermaths": [asdict(aftermath) for aftermath in aftermaths],
        "same_samples": same,
        "loss_error": loss_error,
        "error": error,
        "passed": passed,
        "seconds": round(time.monotonic() - began, 1),
    }


def table(lines: Sequence[dict[str, Any]]) -> str:
    """All kills so far by victim, as Markdown."""
    titles = ("killed", "kills", "resumed to the same samples", "processes left", "shared memory left", "longest end")
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, victims in (*((victim, (victim,)) for victim in VICTIMS), ("all", VICTIMS)):
        kills = [
            (line, aftermath)
            for line in lines
            for strike, aftermath in zip(line["strikes"], line["aftermaths"], strict=True)
            if strike["victim"] in victims and aftermath["hit"]
        ]
        same = sum(line["same_samples"] for line, _ in kills)
        left, shared = (sum(len(after[key]) for _, after in kills) for key in ("processes", "shared_memory"))
        longest = max((after["seconds"] for _, after in kills), default=0.0)
        rows.append(f"| {name} | {len(kills)} | {same} | {left} | {shared} | {longest:.1f} s |")
    return "\n".join(rows) + "\n"


def main() -> int:
    """Carry out what is missing and print the table; 1 if anything ever failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="numbers in all, with those of earlier calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    arguments = parser.parse_args()
    out, seed = arguments.out.resolve(), arguments.seed
    out.mkdir(parents=True, exist_ok=True)
    results = out / "kills.jsonl"
    lines = read_lines(results)
    write_text(results, "".join(json.dumps(line) + "\n" for line in lines))  # without a torn last line
    done = {line["number"] for line in lines if line["seed"] == seed}
    for number in sorted(set(range(arguments.kills)) - done):
        line = carry_out(out, seed, number)
        lines.append(line)
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        strikes = ", ".join(f"{strike['victim']} at {strike['event']}" for strike in line["strikes"])
        print(f"{number}: {strikes}: {'passed' if line['passed'] else 'FAILED'} ({line['seconds']} s)", flush=True)
    write_text(out / "kills.md", table(lines))
    print("\n" + table(lines))
    return 0 if all(line["passed"] for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
