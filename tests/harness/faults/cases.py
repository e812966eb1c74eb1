"""What happens to a job, and whether it comes out as the undisturbed one."""

import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llmprune.utils.checksums import verify_checksums
from tests.harness.faults.attempts import TOLD, Attempts, Fault, log_of
from tests.harness.faults.jobs import BATCHES, JOBS, prepare

Verdict = str | None  # what was lost; None = nothing


@dataclass
class Bench:
    """Where cases are carried out.

    Attributes:
        out: folder for everything.
    """

    out: Path

    def __post_init__(self) -> None:
        """Make the inputs."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.inputs = self.out / "inputs"
        prepare(self.inputs)
        self.attempts = Attempts(self.inputs)
        self._whole: dict[str, tuple[str, float]] = {}

    def undisturbed(self, job: str) -> tuple[str, float]:
        """What a job comes to that nothing happens to, and how many seconds it takes."""
        if job not in self._whole:
            folder = self.fresh(f"undisturbed-{job}")
            start = time.monotonic()
            if code := self.attempts.finish(job, folder):
                raise RuntimeError(f"{job} ended with {code}: see {log_of(folder)}")
            self._whole[job] = JOBS[job].digest(folder), time.monotonic() - start
        return self._whole[job]

    def fresh(self, name: str) -> Path:
        """An empty place."""
        folder = self.out / name
        shutil.rmtree(folder, ignore_errors=True)
        log_of(folder).unlink(missing_ok=True)
        return folder

    @cached_property
    def can_mount(self) -> bool:
        """Whether small file systems can be made here."""
        place = self.out / "probe"
        place.mkdir(exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            return False
        subprocess.run(["umount", str(place)], check=True)
        return True

    def same(self, job: str, folder: Path, *more: str) -> Verdict:
        """Let a job go on to its end, and compare."""
        if code := self.attempts.finish(job, folder, *more):
            return f"going on ended with {code}: {_last(folder)}"
        return None if JOBS[job].digest(folder) == self.undisturbed(job)[0] else "what comes out is another"


def _last(folder: Path) -> str:
    lines = log_of(folder).read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


def _told(bench: Bench, code: int | None, folder: Path, *words: str) -> Verdict:
    """Whether an attempt ended with one clear line."""
    if code != TOLD:
        return f"ended with {code} instead of a clear line: {_last(folder)}"
    told = re.findall(r"error: .*", log_of(folder).read_text(errors="replace"))
    return None if told and any(word in told[-1] for word in words) else f"another line: {told[-1:]}"


def killed(bench: Bench, job: str, folder: Path, chance: random.Random) -> Verdict:
    """SIGKILL at any moment, once or twice."""
    seconds = bench.undisturbed(job)[1]
    for _ in range(2 if chance.random() < 0.3 else 1):
        bench.attempts.kill_after(chance.uniform(0, seconds), job, folder)
    return bench.same(job, folder)


def large_file(bench: Bench, job: str, folder: Path, chance: random.Random) -> Verdict:
    """Writing a file fails at some byte of it."""
    limit = round(2 ** chance.uniform(14, 20))
    code = bench.attempts.finish(job, folder, fault=Fault(largest_file=limit))
    if code and (
        lost := _told(
            bench, code, folder, "larger than may be written", "disk", "can't", "File too large", "shared memory"
        )
    ):
        return lost
    return bench.same(job, folder)


def full_disk(bench: Bench, job: str, folder: Path, chance: random.Random) -> Verdict:
    """A small file system fills up; room is made then."""
    disk = folder / "disk"  # its log lies beside it, where there is room
    disk.mkdir(parents=True)
    size = round(2 ** chance.uniform(15, 21))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
    try:
        code = bench.attempts.finish(job, disk)
        if code and (lost := _told(bench, code, disk, "full", "No space", "can't", "takes no more")):
            return lost
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        return bench.same(job, disk)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def damaged_checkpoint(bench: Bench, job: str, folder: Path, chance: random.Random) -> Verdict:
    """A bit flips in the newest checkpoint, or its end is lost."""
    if code := bench.attempts.finish(job, folder):
        return f"ended with {code}"
    damage(max((folder / "checkpoints").glob("ba*.pt"), key=lambda path: path.stat().st_mtime), chance)
    lost = bench.same(job, folder)
    return lost or (None if "is passed over" in log_of(folder).read_text() else "nothing was said")


def damaged_output(bench: Bench, job: str, folder: Path, chance: random.Random) -> Verdict:
    """A bit flips in what a finished job has written, or its end is lost."""
    from llmprune.utils.errors import UserError

    if code := bench.attempts.finish(job, folder):
        return f"ended with {code}"
    damage(chance.choice(sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.mds")])), chance)
    try:
        read_everything(folder)
    except UserError:
        return None
    return "the damage was not noticed"


def read_everything(folder: Path) -> None:
    """Read a model or data with their checksums."""
    from llmprune.data.prepared import PreparedData

    if (folder / "model").is_dir():
        return verify_checksums(folder / "model")
    data = PreparedData(folder / "data")
    for domain, splits in data.manifest.domains.items():
        for split in splits:
            reader = data.reader(domain, split)
            for shard in range(len(reader.shard_sizes)):
                reader.read(shard, 0)


def damage(path: Path, chance: random.Random) -> None:
    """Flip a bit of a file, or cut it off."""
    content = bytearray(path.read_bytes())
    place = chance.randrange(len(content))
    if chance.random() < 0.5:
        content[place] ^= 1 << chance.randrange(8)
    else:
        del content[place:]
    path.write_bytes(content)


def damaged_data(bench: Bench, job: str, folder: Path, chance: random.Random) -> Verdict:
    """A shard of the data is damaged, and put back."""
    inputs = folder.with_name(f"{folder.name}-inputs")
    shutil.rmtree(inputs, ignore_errors=True)
    shutil.copytree(bench.inputs, inputs)
    for shard in (inputs / "data").rglob("train/*.mds"):  # whichever is read first
        damage(shard, chance)
    code = bench.attempts.finish(job, folder, f"data.path={inputs}/data")
    lost = _told(bench, code, folder, "is damaged", "cut short")
    shutil.rmtree(inputs)
    return lost or bench.same(job, folder)


def no_number(bench: Bench, job: str, folder: Path, chance: random.Random) -> Verdict:
    """The loss of a batch is NaN, once."""
    batch = chance.randrange(BATCHES)
    code = bench.attempts.finish(job, folder, fault=Fault(nan_at=batch))
    return _told(bench, code, folder, f"the loss is nan at batch {batch} ") or bench.same(job, folder)


def jumping_clock(bench: Bench, job: str, folder: Path, chance: random.Random) -> Verdict:
    """The wall clock jumps back and forth all the time."""
    if code := bench.attempts.finish(job, folder, fault=Fault(clock=True, seed=chance.randrange(10**6))):
        return f"ended with {code}: {_last(folder)}"
    return bench.same(job, folder)


def failing_remote(bench: Bench, job: str, folder: Path, chance: random.Random) -> Verdict:
    """Copies of checkpoints fail now and then, and the machine is lost with its disk."""
    remote = folder.with_name(f"{folder.name}-remote")
    shutil.rmtree(remote, ignore_errors=True)
    share = chance.uniform(0.2, 0.7)
    fault = Fault(remote=share, seed=chance.randrange(10**6))
    code = bench.attempts.finish(job, folder, f"checkpoint.remote={remote}", fault=fault)
    if code and (lost := _told(bench, code, folder, "the newest checkpoint is in")):
        return lost
    shutil.rmtree(folder)
    lost = bench.same(job, folder, f"checkpoint.remote={remote}")
    shutil.rmtree(remote, ignore_errors=True)
    return lost


Case = Callable[[Bench, str, Path, random.Random], Verdict]
TRAINED = [name for name, job in JOBS.items() if job.trains]
OTHERS = [name for name, job in JOBS.items() if not job.trains]
CASES: dict[str, tuple[Case, list[str]]] = {
    "SIGKILL": (killed, [*JOBS]),
    "file cut off by a limit": (large_file, [*JOBS]),
    "full disk": (full_disk, [*JOBS]),
    "damaged checkpoint": (damaged_checkpoint, TRAINED),
    "damaged model or shard": (damaged_output, ["export", "shards"]),
    "damaged data": (damaged_data, TRAINED),
    "NaN": (no_number, [job for job in TRAINED if job != "replace"]),
    "jumping clock": (jumping_clock, [*JOBS]),
    "failing remote": (failing_remote, TRAINED),
}
