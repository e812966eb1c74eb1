"""How commands end whose paths can't be used, or that are stopped: one line, and nothing half-written."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import train
from data_prep import __main__ as data_prep
from llmprune import cli
from llmprune.config.job_files import load_job
from llmprune.conversion.export import keep_everything
from llmprune.jobs.train import train as fit
from llmprune.models.loading import load_model_config
from llmprune.models.stored_weights import StoredWeights, fingerprint
from llmprune.pruning.scoring.scores import Scores
from llmprune.utils import outputs
from llmprune.utils.errors import UserError, check_surroundings, one_line
from llmprune.utils.files import write_text
from llmprune.utils.outputs import check_output
from llmprune.utils.processes import Termination
from llmprune.utils.programs import SAVED_AND_LEFT

NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def inputs(data: Path, corpus: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything that commands read."""
    folder = tmp_path_factory.mktemp("inputs")
    config = load_model_config(model_folder)
    plan = keep_everything(config, fingerprint(StoredWeights(model_folder), config))
    plan.save(folder / "plan.json")
    scores = Scores("m", plan.family, plan.model, plan.source, {}, {}, None, {"block_influence": [1.0, 2.0, 3.0, 4.0]})
    scores.save(folder / "scores.json")
    (folder / "prompts.txt").write_text("one two\n")
    (folder / "results.json").write_text('{"schema": 1, "models": {"a": {}}}')
    for name, place in (("model", model_folder), ("data", data), ("corpus", corpus)):
        (folder / name).symlink_to(place)
    (folder / "job.yaml").write_text(f"""
run: {{name: test}}
model: {{path: {model_folder}}}
data: {{path: {data}, eval_samples_per_domain: 2}}
train: {{duration: 1ba, global_batch_size: 2, microbatch_size: 2}}
loggers: {{console: false}}
""")
    return folder


# the command, and the suffix of its output
COMMANDS: dict[str, tuple[str, str]] = {
    "plan": ("llmprune plan scores.json --criterion block_influence --remove 1 --out OUT", ".json"),
    "apply": ("llmprune apply model plan.json --out OUT", ""),
    "score": ("llmprune score model --criteria magnitude_l1 --out OUT", ".json"),
    "convert": ("llmprune convert nowhere --out OUT", ""),
    "evaluate": ("llmprune evaluate model --texts prompts.txt --out OUT", ".json"),
    "report": ("llmprune report results.json --out OUT", ".html"),
    "plots": ("llmprune report results.json --out r.html --plots OUT", ""),
    "generate": ("llmprune generate model --prompts prompts.txt --out OUT", ".jsonl"),
    "measure": ("llmprune measure model --out OUT", ".json"),
    "corpus": ("data_prep corpus --megabytes 0.1 --out OUT", ""),
    "tokenizer": ("data_prep tokenizer corpus --vocab-size 300 --out OUT", ""),
    "tokenize": ("data_prep tokenize corpus --tokenizer data/tokenizer --sequence-length 32 --out OUT", ""),
    "train": ("train.py job.yaml run.folder=OUT", ""),
}


def run(command: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command in this process."""
    program, *arguments = command
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    main: dict[str, Callable[[], object]] = {
        "llmprune": cli.main,
        "data_prep": data_prep.main,
        "train.py": lambda: sys.exit(train.main(arguments)),
    }
    with pytest.raises(SystemExit) as ended:
        main[program]()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("name", COMMANDS)
def test_outputs_that_no_file_system_takes(
    name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.chdir(inputs)
    (tmp_path / "loop").symlink_to("loop")
    text, suffix = COMMANDS[name]
    loops = [f"loop/x{suffix}", f"loop/y/x{suffix}", *(["loop"] if not suffix else [])]
    for out in (*loops, "x" * 300 + suffix, f"{'x' * 300}/x{suffix}", NOT_UTF8 + suffix):
        command = [part.replace("OUT", str(tmp_path / out)) for part in text.split()]
        code = run(command, monkeypatch)
        error = capsys.readouterr().err
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, (out, error)
        assert [path.name for path in tmp_path.iterdir()] == ["loop"]
    if name not in ("plots", "train"):
        assert "r.html" not in os.listdir(inputs)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_deleted_working_directory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run(COMMANDS[name][0].replace("OUT", f"x{COMMANDS[name][1]}").split(), monkeypatch) == 2
    assert capsys.readouterr().err == "error: the working directory is gone: cd to another one\n"


def test_inputs_in_other_encodings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["llmprune", "apply", NOT_UTF8, "p"], ["data_prep", "tokenizer", NOT_UTF8], ["train.py", NOT_UTF8]):
        assert run(command, monkeypatch) == 2
        assert capsys.readouterr().err == "error: 'caf\\xe9' is not UTF-8: rename the file or folder\n"
    check_surroundings(["é", "a\nb", "x" * 1000])


def raised(act: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as found:
        act()
    return found.value


def test_errors_of_paths_are_told(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for act, words in (
        (lambda: (tmp_path / "loop").read_text(), f"{tmp_path}/loop: its symbolic links lead in a circle"),
        (lambda: (tmp_path / "loop/x").resolve(), "its symbolic links lead in a circle"),
        (lambda: (tmp_path / ("x" * 300)).read_text(), "longer than the file system takes"),
        (lambda: (tmp_path / "file/x").write_text(""), "there is a file in place of a folder"),
        (lambda: write_text(tmp_path / "x", NOT_UTF8), "holds what is not UTF-8"),
        (lambda: check_output(tmp_path / "loop/x.json", ".json", False), "can't write .*circle"),
    ):
        error = raised(act)
        told = one_line(error)
        assert told is not None and "\n" not in told and len(told) < 400
        assert words in told or isinstance(error, UserError)
    assert one_line(ValueError("our own")) is None and one_line(FileNotFoundError(2, "x")) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("composer", [False, True], ids=["own handler", "handler of Composer"])
@pytest.mark.parametrize(("name", "inside"), [
    ("apply", "llmprune.conversion.export.save_tensors"),
    ("plan", "llmprune.utils.files.os.replace"),
    ("tokenizer", "llmprune.utils.outputs.put_in_place"),
    ("corpus", "data_prep.builtin.json.dumps"),
])  # fmt: skip
def test_a_stopped_command_leaves_nothing(
    name: str, inside: str, composer: bool, number: signal.Signals, code: int, inputs: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from composer.core.engine import sigterm_handler

    def stop(*arguments: object, **options: object) -> None:
        if composer:
            signal.signal(number, sigterm_handler)
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(inside, stop)
    monkeypatch.chdir(inputs)
    text, suffix = COMMANDS[name]
    assert run([part.replace("OUT", str(tmp_path / f"out{suffix}")) for part in text.split()], monkeypatch) == code
    error = capsys.readouterr().err
    assert error.strip().startswith("error: stopped") and error.strip().count("\n") == 0
    outputs._PROCESS.close()  # as at the end of a process of its own
    assert [*tmp_path.iterdir()] == []


SLOW = """
import importlib, sys, time
module, name = sys.argv.pop(1).rsplit(".", 1)
def wait(*arguments, **options):
    print("ready", flush=True)
    time.sleep(100)
setattr(importlib.import_module(module), name, wait)
if sys.argv[1] == "train.py":
    import train
    sys.exit(train.main(sys.argv[2:]))
from llmprune.cli import main
main()
"""


@pytest.mark.parametrize(
    ("number", "job", "inside"),
    [
        (signal.SIGTERM, "score.yaml", "llmprune.jobs.score.score"),
        (signal.SIGINT, "job.yaml", "llmprune.training.trainer.build_trainer"),
    ],
)
def test_a_stopped_job(number: signal.Signals, job: str, inside: str, inputs: Path, tmp_path: Path) -> None:
    if not (inputs / "score.yaml").exists():
        (inputs / "score.yaml").write_text(
            f"job: score\nrun: {{name: test}}\nmodel: {{path: {inputs}/model}}\n"
            "layer_scoring: {criteria: [magnitude_l1]}\n"
        )
    code, error = stopped(number, inside, ["train.py", job, f"run.folder={tmp_path}/run"], inputs)
    assert code == 128 + number
    assert error.strip().splitlines()[-1].startswith("error: stopped; what was complete") and "Traceback" not in error


@pytest.mark.parametrize(
    ("kind", "section", "inside"),
    [
        (
            "iterate",
            "job: iterate\niterate: {rounds: 1}\nplan: {shape: {layers: 3}, criterion: tail}\n"
            "layer_scoring: {data: CALIBRATION}",
            "jobs.stages.score",
        ),
        (
            "search",
            "job: search\nsearch: {criteria: [tail], remove: [1], budget: {params: '0.9'}}\n"
            "layer_scoring: {data: CALIBRATION}",
            "jobs.search.open_scored",
        ),
    ],
)
def test_a_job_of_steps_that_is_asked_to_end_leaves_at_once(
    kind: str, section: str, inside: str, inputs: Path, tmp_path: Path
) -> None:
    yaml = inputs / f"{kind}.yaml"
    yaml.write_text(
        (inputs / "job.yaml").read_text() + section.replace("CALIBRATION", "{samples: 2, length: 32}") + "\n"
    )
    arguments = ["train.py", str(yaml), f"run.folder={tmp_path}/run"]
    code, error = stopped(signal.SIGTERM, f"llmprune.{inside}", arguments, inputs)
    assert code == SAVED_AND_LEFT and "Traceback" not in error
    assert error.strip().splitlines()[-1] == (
        "asked to end: the steps that are done are kept; run.autoresume=true resumes it"
    )


def test_only_what_saves_itself_notes_that_it_is_asked_to_end() -> None:
    termination = Termination()
    came: list[str] = []

    def work() -> None:
        with termination.ending(KeyError):
            came.append("begun")
            with termination.noted():
                os.kill(os.getpid(), signal.SIGTERM)
            came.append("saved")
            os.kill(os.getpid(), signal.SIGTERM)
            came.append("went on")

    for _ in range(2):
        with pytest.raises(KeyError):
            work()
    assert termination.asked and came == ["begun", "saved"]


def stopped(
    number: signal.Signals, inside: str, arguments: list[str], folder: Path, before: Callable[[], object] = lambda: None
) -> tuple[int, str]:
    """The exit code and the words of a process that gets a signal when it has come to ``inside``."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, inside, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert any("ready" in line for line in process.stdout)
    before()
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    return process.returncode, error


@pytest.mark.parametrize(
    ("number", "command", "inside"),
    [
        (signal.SIGTERM, "score model --criteria magnitude_l1 --out OUT.json", "llmprune.jobs.score.save_scores"),
        (signal.SIGINT, "convert run --out OUT", "llmprune.conversion.export.save_tensors"),
    ],
)
def test_a_stopped_process(number: signal.Signals, command: str, inside: str, inputs: Path, tmp_path: Path) -> None:
    if "convert" in command and not (inputs / "run").exists():
        fit(load_job(inputs / "job.yaml", [f"run.folder={inputs}/run"]))  # type: ignore[arg-type]
    arguments = command.replace("OUT", str(tmp_path / "out")).split()

    def unfinished() -> None:
        assert len([*tmp_path.iterdir()]) == 1 + ("convert" in command)  # the lock, and the unfinished folder

    code, error = stopped(number, inside, arguments, inputs, unfinished)
    assert code == 128 + number
    assert error.strip().splitlines()[-1] == "error: stopped; nothing unfinished is left" and "Traceback" not in error
    assert [*tmp_path.iterdir()] == []
