"""A package of somebody's own adds a criterion and a section, with the text of docs/extending.md."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
JOB = """
run: {{name: noisy, folder: {folder}/run}}
model: {{path: {model}}}
data: {{path: {data}, eval_samples_per_domain: 2}}
train: {{duration: 2ba, global_batch_size: 4, microbatch_size: 4, eval_interval: 0ba}}
weight_noise: {{scale: 0.001}}
loggers: {{console: false}}
"""


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python that has the page's package."""
    blocks = dict(re.findall(r"```(python|toml)\n(.*?)```", PAGE, re.DOTALL))
    (tmp_path / "extra.py").write_text(blocks["python"])
    groups = re.findall(r"\[project\.entry-points\.(\w+)\]\n(\w+) = \"(.+)\"", blocks["toml"])
    described = tmp_path / "extra-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("".join(f"[{group}]\n{name} = {at}\n" for group, name, at in groups))
    path = [str(tmp_path), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


# Imports take seconds: one process carries out several commands, and tells of each the exit code and what it printed.
CARRY_OUT = """
import contextlib, json, sys, tempfile
from llmprune import cli
import train
for command in json.loads(sys.argv[1]):
    told = tempfile.TemporaryFile("w+")
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            sys.argv = ["llmprune", *command]
            code = train.main(command[1:]) if command[0] == "train.py" else cli.main()
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([code or 0, (told.seek(0), told.read())[1]]))
"""


def carry_out(environment: dict[str, str], *commands: list[str]) -> list[tuple[int, str]]:
    command = [sys.executable, "-c", CARRY_OUT, json.dumps(commands)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [(code, told) for code, told in map(json.loads, done.stdout.splitlines())]


def test_a_package_of_ones_own(installed: dict[str, str], model_folder: Path, data: Path, tmp_path: Path) -> None:
    yaml, out = str(tmp_path / "job.yaml"), str(tmp_path / "scores.json")
    Path(yaml).write_text(JOB.format(folder=tmp_path, model=model_folder, data=data))
    names, scored, trained, resumed, mistake, exported = carry_out(
        installed,
        ["score", "--names", "x", "--out", "x.json"],
        ["score", str(model_folder), "--criteria", "middle", "--out", out],
        ["train.py", yaml],
        ["train.py", yaml, "run.autoresume=true", "weight_noise.scale=0.1"],
        ["train.py", yaml, "weight_noise.scal=1"],
        ["convert", str(tmp_path / "run"), "--out", str(tmp_path / "model")],
    )
    assert re.search(r"^middle +The blocks in the middle go first\.$", names[1], re.MULTILINE)
    assert scored[0] == trained[0] == exported[0] == 0
    assert json.loads(Path(out).read_text())["blocks"]["middle"] == [2, 1, 0, 1]
    assert "weight_noise:\n  scale: 0.001" in (tmp_path / "run/config.yaml").read_text()
    manifest = json.loads((tmp_path / "run/checkpoints/manifest.json").read_text())
    assert manifest["sections"] == {"weight_noise": {"scale": 0.001}}
    assert resumed[0] == 2 and "weight_noise.scale 0.001; the config asks for 0.1" in resumed[1]
    assert mistake[0] == 2 and "unknown key 'weight_noise.scal'; did you mean 'scale'" in mistake[1]
    alone = {**installed, "PYTHONPATH": installed["PYTHONPATH"].removeprefix(f"{tmp_path}{os.pathsep}")}
    ((code, told),) = carry_out(alone, ["convert", str(tmp_path / "run"), "--out", str(tmp_path / "other")])
    assert code == 2 and "the section 'weight_noise', which no installed package has" in told


KINDS = '''
"""One of every kind of plug-in."""

from dataclasses import dataclass, field, replace

import torch
from composer.core import Callback
from composer.loggers import LoggerDestination
from composer.optim import ConstantWithWarmupScheduler
from llmprune.config.jobs import Job
from llmprune.config.schema import FolderConfig
from llmprune.models.families import FAMILIES
from llmprune.pruning.replacements.modules import ReplacementModule
from llmprune.pruning.selection.methods import without

OLMO = replace(FAMILIES["llama"], name="olmo_like", model_types=("olmo",), description="Like a Llama")


def first(request):
    """The first blocks go."""
    return without(request.layers, range(request.remove))


class Skip(ReplacementModule):
    """Nothing takes the span's place."""

    def __init__(self, site, config):
        super().__init__()


def turned(measured, config, domains):
    """Weights are handed on to the next domain."""
    return [*measured.weights[1:], measured.weights[0]]


def sgd(parameters, config):
    """Plain descent."""
    return torch.optim.SGD(parameters, config.lr)


def flat(config):
    """The base learning rate."""
    return ConstantWithWarmupScheduler(t_warmup=config.warmup)


class Counting(Callback):
    """Counts batches."""

    def __init__(self, file):
        self.file = file

    def batch_end(self, state, logger):
        with open(self.file, "a") as file:
            file.write("batch ")


class Noting(LoggerDestination):
    """Notes the names of metrics."""

    def __init__(self, file):
        self.file = file

    def log_metrics(self, metrics, step=None):
        with open(self.file, "a") as file:
            file.write(" ".join(metrics) + " ")


@dataclass
class Hello:
    """A job.

    Attributes:
        job: hello.
        word: what is said.
    """

    job: str = "hello"
    run: FolderConfig = field(default_factory=FolderConfig)
    word: str = "hello"


def say(config):
    print("said", config.word)


HELLO = Job("Say a word.", Hello, "kinds:say", goes_on=False)
'''
GROUPS = {
    "families": "OLMO", "selections": "first", "replacements": "Skip", "updates": "turned", "optimizers": "sgd",
    "schedulers": "flat", "callbacks": "Counting", "loggers": "Noting", "jobs": "HELLO",
}  # fmt: skip


def test_one_of_every_kind(model_folder: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "kinds.py").write_text(KINDS)
    described = tmp_path / "kinds-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: kinds\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text(
        "".join(f"[llmprune_{group}]\nown_{name.lower()} = kinds:{name}\n" for group, name in GROUPS.items())
    )
    path = [str(tmp_path), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    yaml, replacing, hello = tmp_path / "job.yaml", tmp_path / "replace.yaml", tmp_path / "hello.yaml"
    plain = JOB.replace("weight_noise: {{scale: 0.001}}\n", "").format(folder=tmp_path, model=model_folder, data=data)
    yaml.write_text(
        plain.replace("eval_interval: 0ba", "eval_interval: 1ba").replace("loggers: {console: false}", "")
        + f"""
optimizer: {{name: own_sgd}}
scheduler: {{name: own_flat}}
dynamic_loading: {{update: own_turned, update_delay: 0}}
callbacks: {{own_counting: {{file: {tmp_path}/batches}}}}
loggers: {{console: false, others: {{own_noting: {{file: {tmp_path}/metrics}}}}}}
"""
    )
    replacing.write_text(
        plain.replace("/run}", "/replaced}").replace("duration: 2ba", "duration: 0ba")
        + "job: replace\nblock_replacement: {kind: own_skip, start: 1, length: 2}\n"
    )
    hello.write_text(f"job: own_hello\nrun: {{name: hello, folder: {tmp_path}/hello}}\n")
    scores, plan = str(tmp_path / "scores.json"), str(tmp_path / "plan.json")
    families, scored, planned, trained, replaced, said, unknown = carry_out(
        {**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        ["families"],
        ["score", str(model_folder), "--criteria", "tail", "--out", scores],
        ["plan", scores, "--method", "own_first", "--remove", "1", "--out", plan],
        ["train.py", str(yaml)],
        ["train.py", str(replacing)],
        ["train.py", str(hello), "word=hi"],
        ["train.py", str(yaml), "run.overwrite=true", "callbacks.own_counting={fil: x}"],
    )
    assert "own_olmo   Like a Llama (model_type olmo)" in families[1]
    assert [scored[0], planned[0], trained[0], replaced[0]] == [0, 0, 0, 0], (planned, trained, replaced)
    assert json.loads(Path(plan).read_text())["blocks"][0]["attention"] == 1
    assert (tmp_path / "batches").read_text() == "batch batch "
    assert "loss/train/total" in (tmp_path / "metrics").read_text()
    assert said == (0, "said hi\n")
    assert unknown[0] == 2 and "callback 'own_counting'" in unknown[1]
