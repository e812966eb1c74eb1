"""What is fetched beforehand is found without a network, and what is missing is named."""

import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import boto3
import huggingface_hub
import pytest
import torch
from flask import Flask, Response, abort, jsonify, send_file
from werkzeug.serving import make_server

from llmprune.config.job_files import load_job
from llmprune.data.prepared import PreparedData
from llmprune.jobs.offline import Need, check_offline, fetch, need_named, needs_of
from llmprune.models.loading import load_model, load_tokenizer
from llmprune.utils.errors import UserError
from tests.evaluation.local_task import make_task

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def pickled(model_folder: Path, tmp_path: Path) -> Path:
    """A model whose weights are pickled alone, with companions, code and other formats beside them."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    for path in model_folder.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    torch.save(load_model(model_folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    for name in ("merges.txt", "modeling_foreign.py", "tf_model.h5", "model.gguf", "optimizer.bin"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def hub(model_folder: Path, pickled: Path) -> Iterator[str]:
    """A hub that knows two models, and one data set of the first one's files."""
    app = Flask("hub")
    folders = {"tiny": model_folder, "texts": model_folder, "pickled": pickled}

    @app.get("/api/<kind>/org/<name>/revision/main")
    def info(kind: str, name: str) -> Response:
        if name not in folders:
            abort(404)
        files = [{"rfilename": path.name} for path in folders[name].iterdir()]
        return jsonify(id=f"org/{name}", sha=COMMIT, siblings=[*files, {"rfilename": "pickle.bin"}])

    @app.route("/org/<model>/resolve/<revision>/<name>", methods=["GET", "HEAD"])
    @app.route("/datasets/org/<model>/resolve/<revision>/<name>", methods=["GET", "HEAD"])
    def file(model: str, revision: str, name: str) -> Response:
        assert name != "pickle.bin" or revision == COMMIT
        content = folders[model] / name
        if not content.is_file():
            return Response(b"junk", headers={"X-Repo-Commit": COMMIT, "ETag": '"junk"'})
        found = send_file(content.resolve(), conditional=False)
        found.headers["X-Repo-Commit"] = COMMIT
        found.headers["ETag"] = f'"{hashlib.sha256(content.read_bytes()).hexdigest()}"'
        return found

    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def job(data: Path, model_folder: Path, tmp_path: Path) -> Path:
    make_task(tmp_path / "tasks", questions=3)
    path = tmp_path / "job.yaml"
    path.write_text(f"""
run: {{name: test, folder: {tmp_path}/run, offline: true}}
model: {{path: org/tiny}}
data: {{path: {data}}}
evaluation: {{tasks: [counting], include_path: {tmp_path}/tasks}}
distillation: {{teacher: org/other}}
train: {{duration: 1ba, global_batch_size: 2}}
""")
    return path


def test_what_a_job_needs(job: Path, tmp_path: Path) -> None:
    needs = [*needs_of(load_job(job, ["data.path=s3://bucket/data"]))]
    task = Need("task", "counting", f"{tmp_path}/tasks")
    assert needs == [Need("data", "s3://bucket/data"), task, Need("model", "org/tiny"), Need("model", "org/other")]
    named = [need_named(name, ["arc_easy"]) for name in ("a/b", "dataset:a/b", "arc_easy", "sheared", "s3://a/b")]
    assert [need.kind for need in named] == ["model", "dataset", "task", "task", "data"]


def test_a_model_is_fetched_and_found_offline(
    hub: str, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    command = [str(Path(sys.executable).parent / "llmprune"), "download", "--out", str(home), "--for", str(job)]
    command += ["--set", "distillation=null", "dataset:org/texts", "model:org/pickled"]
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"model org/tiny: {home}/hub" in done.stdout and "dataset org/texts: " in done.stdout
    assert f"export HF_HOME={home}" in done.stdout
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    assert load_model("org/tiny").config.model_type == "llama"
    assert not [*home.rglob("models--*/**/pickle.bin")]
    for name, tensor in load_model("org/tiny").state_dict().items():
        assert torch.equal(load_model("org/pickled").state_dict()[name], tensor)
    messages = [{"role": "user", "content": "one"}]
    assert load_tokenizer("org/pickled").apply_chat_template(messages, tokenize=False) == "one!"
    suffixes = {path.suffix for path in home.rglob("models--org--pickled/**/*") if path.is_file() or path.is_symlink()}
    assert suffixes.isdisjoint({".py", ".h5", ".gguf"}) and not [*home.rglob("optimizer.bin")]
    assert [*home.rglob("models--org--pickled/llmprune/*/merges.txt")]
    with pytest.raises(UserError, match=r"these are not here: model org/other\. On a machine with a network run"):
        check_offline(load_job(job), str(job))
    check_offline(load_job(job, ["distillation=null"]), str(job))


def test_all_that_is_missing_is_named(job: Path) -> None:
    missing = r"data s3://b/d \(name the folder .*\), task nothing, model org/tiny, model org/other\."
    with pytest.raises(UserError, match=missing):
        check_offline(load_job(job, ["data.path=s3://b/d", "evaluation.tasks=[nothing]"]), str(job))
    with pytest.raises(UserError, match=r"but checkpoint.remote is a URL and loggers.wandb.offline is false"):
        check_offline(load_job(job, ["checkpoint.remote=s3://b/d", "loggers.wandb={project: p}"]), str(job))


def test_prepared_data_are_copied_and_compared(s3: str, data: Path, tmp_path: Path) -> None:
    client = boto3.client("s3", endpoint_url=s3)
    client.create_bucket(Bucket="texts")
    for path in data.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "texts", f"mds/{path.relative_to(data)}")
    need = Need("data", "s3://texts/mds")
    place = fetch(need, tmp_path)
    assert PreparedData(place).manifest == PreparedData(data).manifest and place == tmp_path / "data" / "mds"
    shard = next(place.rglob("*.mds"))
    shard.write_bytes(b"cut off")  # as a kill would leave it, had it been written in place
    with pytest.raises(UserError, match="did not arrive whole: run the same command again"):
        fetch(need, tmp_path)
    fetch(need, tmp_path)
    assert PreparedData(place).reader("letters", "train").read(0, 0)
    with pytest.raises(UserError, match="holds no prepared data"):
        fetch(Need("data", "s3://texts/nothing"), tmp_path)
    with pytest.raises(UserError, match="can't be listed"):
        fetch(Need("data", "s3://no-such-bucket/mds"), tmp_path)
