"""A teacher's predictions beside the tokens: those that it gives on the spot, whoever wrote them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data_prep import teach as module
from data_prep.teach import TeachConfig, teach
from data_prep.tokenizer import train_tokenizer
from llmprune.config.job_files import load_training_job
from llmprune.data.format import EVAL, TRAIN
from llmprune.data.prepared import PreparedData
from llmprune.jobs.train import train
from llmprune.models.loading import load_model, load_tokenizer
from llmprune.training.trainer import build_trainer
from llmprune.utils.errors import UserError
from tests.callbacks.test_block_replacement import metrics

CONFIG = TeachConfig(top_k=7, batch_size=5, dtype="float32")


@pytest.fixture(scope="module")
def taught(data: Path, trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("taught") / "data"
    teach(str(data), str(trained_folder), out, CONFIG)
    return out


def samples(data: PreparedData, domain: str, split: str) -> list[dict[str, torch.Tensor]]:
    reader = data.reader(domain, split)
    return [reader.read(shard, i) for shard, size in enumerate(reader.shard_sizes) for i in range(size)]


def test_predictions_are_the_teachers(data: Path, taught: Path, trained_folder: Path) -> None:
    before, after = PreparedData(data), PreparedData(taught)
    assert after.manifest.teacher == {
        "data": before.manifest.fingerprint(),
        "model": str(trained_folder),
        "vocab_size": 300,
        "top_k": 7,
        "temperature": 1.0,
        "boundaries": False,
        "dtype": "float32",
    }
    model = load_model(trained_folder).eval()
    for domain in before.domains_with(TRAIN):
        for split in (TRAIN, EVAL):
            pairs = list(zip(samples(before, domain, split), samples(after, domain, split), strict=True))
            assert all(torch.equal(one["input_ids"], two["input_ids"]) for one, two in pairs)
            if split == EVAL:
                assert all("teacher_tokens" not in two for _, two in pairs)
                continue
            one, two = pairs[-1]
            with torch.no_grad():
                logs = model(input_ids=one["input_ids"][None]).logits[0].log_softmax(-1)
            for place in range(len(logs)):
                wanted = sorted(range(len(logs[place])), key=lambda i, row=logs[place]: -row[i].item())[:7]
                assert two["teacher_tokens"][place].tolist() == wanted
                torch.testing.assert_close(two["teacher_logs"][place], logs[place][wanted], rtol=1e-5, atol=1e-5)


def yaml_for(folder: Path, data: Path, model: Path) -> Path:
    path = folder / "recover.yaml"
    path.write_text(f"""
run: {{name: test, folder: {folder}/run, seed: 3}}
model: {{path: {model}}}
data: {{path: {data}, eval_samples_per_domain: 2}}
optimizer: {{lr: 3.0e-3}}
train: {{duration: 6ba, global_batch_size: 8, microbatch_size: 4, eval_interval: 6ba}}
loggers: {{console: false}}
""")
    return path


def test_from_disk_is_as_on_the_fly(taught: Path, trained_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    config = yaml_for(tmp_path, taught, model_folder)
    for name, teacher in (("disk", "null"), ("model", f"{trained_folder}, dtype: float32")):
        change = f"distillation={{teacher: {teacher}, top_k: 5, objectives: {{kl: 1.0, lm: 0.5}}}}"
        train(load_training_job(config, [f"run.folder={tmp_path}/{name}", change]))
    for name in ("distillation/kl", "loss/train/total", "metrics/eval/loss"):
        disk, model = (metrics(tmp_path / run, name) for run in ("disk", "model"))
        assert len(disk) in (1, 6) and disk == pytest.approx(model, rel=1e-5)


def test_several_processes_and_a_kill_write_the_same(
    data: Path, taught: Path, trained_folder: Path, tmp_path: Path
) -> None:
    """One is killed when it has begun; two others share what is left."""
    script = tmp_path / "teach_some.py"
    script.write_text(f"""
import sys
from pathlib import Path
from data_prep import shared_job, teach
teach._PIECE_BYTES, shared_job.WAIT = 3 * 32 * 64, 0.1
if __name__ == "__main__":
    config = teach.TeachConfig(7, 1.0, None, 1, "float32")
    teach.teach({str(data)!r}, {str(trained_folder)!r}, Path(sys.argv[1]), config)
""")
    out = tmp_path / "data"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(out)]
    first = subprocess.Popen(command, env=environment)
    done = out.with_name(".data.teach") / "done"
    deadline = time.monotonic() + 120
    while not list(done.glob("*/*/*.json")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not out.exists()
    others = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait(timeout=240) for process in others] == [0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"teach_some.py", "data"}
    one, two = PreparedData(taught), PreparedData(out)
    for domain in one.domains_with(TRAIN):
        found = [samples(prepared, domain, TRAIN) for prepared in (one, two)]
        for a, b in zip(*found, strict=True):
            assert torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(a["teacher_tokens"], b["teacher_tokens"])
            torch.testing.assert_close(a["teacher_logs"], b["teacher_logs"], rtol=1e-5, atol=1e-5)
    assert len(two.reader(one.domains_with(TRAIN)[0], TRAIN).shard_sizes) > 1


def test_a_job_of_other_settings_is_not_taken_over(
    data: Path, taught: Path, trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Work, "_rows", stop)
    teach(str(data), str(trained_folder), taught, CONFIG)  # which is there
    with pytest.raises(UserError, match="exists already"):
        teach(str(data), str(trained_folder), taught, TeachConfig(top_k=3))
    with pytest.raises(KeyboardInterrupt):
        teach(str(data), str(trained_folder), tmp_path / "out", CONFIG)
    with pytest.raises(UserError, match="other settings or data"):
        teach(str(data), str(trained_folder), tmp_path / "out", TeachConfig(top_k=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("{top_k: 8}", "only 7 were kept"),
        ("{temperature: 2.0}", "temperature 1.0, the config asks for 2.0"),
        ("{objectives: {kl: 1.0, mse: 1.0}}", "hold no states"),
    ],
)
def test_what_was_not_kept_is_refused(
    taught: Path, model_folder: Path, tmp_path: Path, changes: str, message: str
) -> None:
    config = yaml_for(tmp_path, taught, model_folder)
    with pytest.raises(UserError, match=message):
        build_trainer(load_training_job(config, [f"distillation={changes}"]))
    with pytest.raises(UserError, match="document_boundaries False, the config asks for True"):
        build_trainer(load_training_job(config, ["distillation={}", "data.document_boundaries=true"]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TeachConfig(top_k=0), "--top-k is 0"),
        (TeachConfig(top_k=300), "--top-k is 300"),
        (TeachConfig(temperature=-1), "temperature is -1"),
        (TeachConfig(batch_size=0), "batch_size is 0"),
        (TeachConfig(dtype="int8"), "dtype 'int8' is unknown"),
    ],
)
def test_mistakes(data: Path, trained_folder: Path, tmp_path: Path, config: TeachConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        teach(str(data), str(trained_folder), tmp_path / "out", config)
    assert not list(tmp_path.iterdir())


def test_other_tokenizers_and_taught_data_are_refused(
    data: Path, corpus: Path, taught: Path, trained_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="predictions already"):
        teach(str(taught), str(trained_folder), tmp_path / "out", CONFIG)
    other = tmp_path / "other"
    shutil.copytree(trained_folder, other)
    train_tokenizer([corpus / "letters"], tmp_path / "tokenizer", vocab_size=290)
    load_tokenizer(tmp_path / "tokenizer").save_pretrained(other)
    with pytest.raises(UserError, match="did not make the data"):
        teach(str(data), str(other), tmp_path / "out", CONFIG)
