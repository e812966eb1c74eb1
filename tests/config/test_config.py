"""The YAML schema: overrides, and mistakes told in one line."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from llmprune.checkpoints.run_folder import Manifest
from llmprune.config.job_files import load_job, load_recorded, load_training_job, save_config
from llmprune.config.schema import Config, ScoringConfig
from llmprune.utils.errors import UserError

ROOT = Path(__file__).parents[2]
YAMLS = sorted((ROOT / "yamls").glob("*.yaml"))

MINIMAL = """
run: {name: x}
model: {path: somewhere}
data: {path: there}
train: {duration: 10ba, global_batch_size: 4}
"""


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_overrides_win_and_sections_appear_on_demand(yaml: Path) -> None:
    config = load_training_job(yaml, ["optimizer.lr=0.5", "l0_pruning.target.hidden=8", "data.weights.web=2"])
    assert config.optimizer.lr == 0.5 and config.run.folder == "runs/x"
    assert config.l0_pruning is not None and config.l0_pruning.target is not None
    assert config.l0_pruning.target.hidden == 8
    assert config.data.weights == {"web": 2.0}


def test_a_mapping_in_an_override_replaces_the_mapping(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + "l0_pruning: {target: {layers: 3, hidden: 20}, gate_lr: 0.5}\n")
    target = load_training_job(path, ["l0_pruning.target={layers: 2}"]).l0_pruning
    assert target is not None and target.target is not None
    assert (target.target.layers, target.target.hidden, target.gate_lr) == (2, None, 0.5)
    assert load_training_job(path, ["l0_pruning.target.layers=2"]).l0_pruning.target.hidden == 20  # type: ignore[union-attr]
    with pytest.raises(UserError, match="put quotes around the whole"):
        load_training_job(path, ["l0_pruning.target={layers:"])


def test_a_saved_config_loads_as_itself(yaml: Path, tmp_path: Path) -> None:
    config = load_training_job(yaml, ["l0_pruning.target.heads=4"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_training_job(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rate=1", "unknown key 'optimizer.learning_rate'"),
        ("trian.duration=3ba", "did you mean 'train'"),
        ("train.global_batchsize=3", "did you mean 'global_batch_size'"),
        ("l0_pruning.target.hiden=3", "did you mean 'hidden'"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("nonsense", "not of the form"),
    ],
)
def test_mistakes_name_the_key_and_the_nearest(yaml: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_training_job(yaml, [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {name: x", "can't be read"),
        ("- 1", "must hold sections"),
        ("run: {name: x}", "must be set"),
        (MINIMAL + "\nscheduler: {naem: cosine}", "did you mean 'name'"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_training_job(path)
    with pytest.raises(UserError, match="does not exist"):
        load_training_job(tmp_path / "missing.yaml")


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_shipped_yaml_loads(path: Path) -> None:
    job = load_job(path)
    data = job.layer_scoring.data if isinstance(job, ScoringConfig) else job.data
    assert job.run.name == path.stem and data.path == "runs/quickstart/data"


def test_a_scoring_job_has_its_own_keys(tmp_path: Path) -> None:
    path = tmp_path / "score.yaml"
    path.write_text("run: {name: x}\nmodel: {path: here}\njob: score\nlayer_scoring: {criteria: [tail]}\n")
    job = load_job(path, ["plan.remove=[2]", "layer_scoring.data.bos=each"])
    assert isinstance(job, ScoringConfig) and job.plan is not None and job.plan.remove == [2]
    save_config(job, tmp_path / "saved.yaml")
    assert load_job(tmp_path / "saved.yaml") == job
    with pytest.raises(UserError, match="unknown key 'layer_scoring.criterion'; did you mean 'criteria'"):
        load_job(path, ["layer_scoring.criterion=tail"])
    with pytest.raises(UserError, match="unknown key 'train"):
        load_job(path, ["train.duration=3ba"])


def test_a_base_is_laid_under(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(MINIMAL + "optimizer: {lr: 0.5, eps: 0.1}\n")
    (tmp_path / "over.yaml").write_text("base: base.yaml\nrun: {name: y}\noptimizer: {lr: 0.25}\n")
    config = load_training_job(tmp_path / "over.yaml")
    assert (config.run.name, config.optimizer.lr, config.optimizer.eps) == ("y", 0.25, 0.1)
    (tmp_path / "over.yaml").write_text("base: nowhere.yaml\n")
    with pytest.raises(UserError, match="nowhere.yaml does not exist"):
        load_training_job(tmp_path / "over.yaml")


SECRETS = (
    "s3://key:word@bucket/data",
    "https://host/data?X-Amz-Signature=abc",
    "https://host/data?X-Goog-Signature=abc",
    "https://host/data?a=b&access_token=abc",
    "https://host/data?api-key=abc",
    "https://host/data?sv=2020&sig=abc%3D",
    "https://host/data?Key=abc",
    "https://host/data?signature=abc",
    "https://host/data?client_secret=abc",
    "https://host/data#password=abc",
    "s3://b/AKIAIOSFODNN7EXAMPLE",
    "my-ASIAIOSFODNN7EXAMPLE-run",
    "hf_abcdefghijklmnopqrstuvwxyzabcdefgh",
    "run-hf_abcdefghijklmnopqrstuvwxyzabcdefgh",
    "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "x_ghs_abcdefghijklmnopqrstuvwxyz0123456789",
    "github_pat_11ABCDEFG0abcdefghijkl_mnopqrstuvwxyz",
    "https://ghp_abcdefghijklmnopqrstuvwxyz0123456789@github.com/a/b",
    "sk-abcdefghijklmnopqrstuvwxyz0123456789",
    "sk-proj-Ab-Cd_abcdefghijklmnopqrstuvwxyz0123456789",
    "sk-ant-api03-abcdefghijklmnopqrstuvwxyz0123456789",
    "0123456789abcdef0123456789abcdef01234567",
    "local-0123456789abcdef0123456789abcdef01234567",
    "AIzaSyA1234567890abcdefghijklmnopqrstuv",
    "Authorization: Bearer abcdefghijklmnop",
)
INNOCENT = (
    "/home/hub/models--a--b/snapshots/0123456789abcdef0123456789abcdef01234567",
    "azure://container@account/data",
    "s3://bucket/data?versionId=3sL4kqtJlcpXroDTDmJ",
    "https://host/data?tokens=100&tokenizer=gpt2&keyboard=de&max_tokens=5",
    "0123456789abcdef" * 4,
    "task-force",
    "risk-free-rates-in-an-internationalization-study",
    "disk-abcdefghijklmnopqrstuvwxyz0123456789",
    "sk-learn-tutorial-with-2-layers",
    "hf_internal_testing_tiny_random_llama_for_causal",
    "ghp_study",
    "C:/data;keys=none",
    "runs/token=5",
)


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_are_not_taken_and_not_shown(yaml: Path, secret: str) -> None:
    def refused(*overrides: str) -> None:
        with pytest.raises(UserError) as error:
            load_training_job(yaml, overrides)
        assert "looks like a password or a token" in str(error.value) and "in the environment" in str(error.value)
        assert secret not in str(error.value)

    for key in ("run.name", "data.path", "loggers.wandb.project", "model.config.a", "evaluation.texts", "no.such"):
        refused(f"{key}={secret!r}" if "#" in secret or ": " in secret else f"{key}={secret}")
    refused(secret)
    refused(f"evaluation.tasks=['{secret}']")
    refused(f"data.weights={{'{secret}': 1}}")
    for text in (f"  name: '{secret}'\n", f"  nme: '{secret}'\n", f"  seed: '{secret}'\n", f"  '{secret}': 1\n"):
        yaml.write_text(MINIMAL.replace("run: {name: x}\n", "") + f"run:\n{text}")
        refused()
    yaml.write_text(MINIMAL + f"run: '{secret}\n")  # no YAML
    with pytest.raises(UserError) as error:
        load_training_job(yaml)
    assert secret not in str(error.value)


@pytest.mark.parametrize("text", INNOCENT)
def test_what_looks_like_no_secret_is_taken(yaml: Path, text: str) -> None:
    assert load_training_job(yaml, [f"model.path={text}", f"run.name={text}"]).run.name == text


HOSTILE = {
    "itself": "base: run.yaml\n",
    "a circle": "base: other.yaml\n",
    "a number": "base: 5\n",
    "a list": "base: [x]\n",
    "a mapping": "base: {a: 1}\n",
    "NUL": 'base: "a\\0b"\n',
    "deep": "x: " + "[" * 5000 + "]" * 5000 + "\n",
    "deep fields": "x: " + "{a: " * 5000 + "1" + "}" * 5000 + "\n",
    "laughs": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghij")),
    "laughs in merges": "a: &a {x: 1}\n"
    + "".join(f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in pairwise("abcdefghij")),
    "part of itself": "a: &a [*a]\n",
    "digits": "seed: " + "9" * 6000 + "\n",
    "a date": "seed: 2001-99-99\n",
    "an odd key": "? [a]\n: b\n",
    "no key": "null: 3\n",
    "half an interpolation": "a: ${\n",
    "many": "a: [" + "1, " * 200_000 + "1]\n",
    "an object": "a: !!python/object/apply:os.system [id]\n",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_yaml_is_refused(yaml: Path, what: str) -> None:
    yaml.write_text(HOSTILE[what])
    (yaml.parent / "other.yaml").write_text("base: ./run.yaml\n")
    with pytest.raises(UserError) as error:
        load_job(yaml)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    with pytest.raises(UserError):
        load_recorded(yaml)


@pytest.mark.parametrize("value", ["[" * 300 + "]" * 300, "{a: &a [*a]}", "9" * 5000, "${", "[a"])
def test_hostile_overrides_are_refused(yaml: Path, value: str) -> None:
    for override in (f"data.path={value}", f"{value}=1"):
        with pytest.raises(UserError) as error:
            load_training_job(yaml, [override])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=1e38",
        "optimizer.weight_decay=inf",
        "optimizer.weight_decay=nan",
        "train.clip_norm=nan",
        "train.clip_norm=inf",
        "train.hang_timeout=1e300",
        "data.weights={a: .nan}",
        "model.config={a: [1, {b: .inf}]}",
        "data.shuffle_window=1" + "0" * 30,
        "l0_pruning.target.hidden=1" + "0" * 30,
    ],
)
def test_numbers_that_nothing_can_be_computed_with_are_refused(yaml: Path, override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=rf"^{key}\S* (is|has) .*must be") as error:
        load_training_job(yaml, [override])
    assert "\n" not in str(error.value)
    assert load_training_job(yaml, ["optimizer.lr=1e30"]).optimizer.lr == 1e30


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/very/secret")
    monkeypatch.setenv("WORD", "hunter2")
    monkeypatch.setenv("NUMBER", "5")
    monkeypatch.setenv("SECTION", "{a: very-secret}")


@pytest.mark.usefixtures("environment")
def test_texts_from_the_environment_are_kept_as_typed(yaml: Path, tmp_path: Path) -> None:
    typed = [
        "data.path=${oc.env:PLACE}/data",
        "run.name=a-${oc.env:WORD}",
        "loggers.wandb={tags: ['${oc.env:WORD}']}",
        "model.tokenizer=${oc.env:PLACE}",
        "run.seed=${oc.env:NUMBER}",
        "evaluation.texts=['${oc.env:PLACE}/b']",
    ]
    config = load_training_job(yaml, typed)
    assert (config.data.path, config.run.folder, config.run.seed) == ("/very/secret/data", "runs/a-hunter2", 5)
    save_config(config, tmp_path / "saved.yaml")
    text = (tmp_path / "saved.yaml").read_text()
    assert "secret" not in text and "hunter2" not in text and "path: ${oc.env:PLACE}/data" in text
    assert "folder: runs/${run.name}" in text and "seed: 5" in text
    recorded = load_recorded(tmp_path / "saved.yaml")
    assert isinstance(recorded, Config) and recorded.data.path == "${oc.env:PLACE}/data" and recorded.run.seed == 5
    assert load_training_job(tmp_path / "saved.yaml") == config
    config.model.path = "/very/secret/round-1"  # what jobs of several steps make of it
    save_config(config, tmp_path / "step.yaml")
    assert "secret" not in (tmp_path / "step.yaml").read_text()
    with pytest.raises(UserError, match="write out its keys"):
        load_training_job(yaml, ["model.config=${oc.create:${oc.env:SECTION}}"])


@pytest.mark.usefixtures("environment")
def test_nothing_is_looked_up_in_what_is_recorded(yaml: Path, tmp_path: Path) -> None:
    yaml.write_text(MINIMAL.replace("there", "'${oc.env:WORD}'").replace("somewhere", "'${run.name}'"))
    recorded = load_recorded(yaml)
    assert isinstance(recorded, Config)
    assert (recorded.data.path, recorded.model.path) == ("${oc.env:WORD}", "${run.name}")
    yaml.write_text(MINIMAL.replace("train: {", "train: {hang_timeout: '${oc.env:NUMBER}', "))
    with pytest.raises(UserError, match="hang_timeout"):
        load_recorded(yaml)
    values = {"family": "llama", "sections": {"l0_pruning": {"gates": ["${oc.env:WORD}"]}}, "source": "${oc.env:WORD}",
              "data": {"path": "a ${oc.env:PLACE} \\${x}"}, "seed": 1, "versions": {"a": "${oc.env:WORD}"},
              "git_commit": "${oc.env:WORD}"}  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    manifest = Manifest.load(tmp_path)
    assert manifest.source == manifest.git_commit == manifest.versions["a"] == "${oc.env:WORD}"
    assert manifest.data["path"] == "a ${oc.env:PLACE} \\${x}"
    assert manifest.sections["l0_pruning"]["gates"] == ["${oc.env:WORD}"]


FOUR = [f"plan-{criterion}-{count}.json" for criterion in ("tail", "taylor") for count in (1, 2)]


@pytest.mark.parametrize(
    ("plan", "files"),
    [
        ("{criterion: tail, remove: 2}", ["plan-2.json"]),
        ("{criterion: [tail, taylor], remove: [1, '2']}", FOUR),
        ("{criterion: tail, remove: []}", []),
        ("{shape: {hidden: 8}, unit_criterion: unit_taylor}", ["plan.json"]),
        ("{method: merge, remove: 2, threshold: 0.5}", ["plan-2.json"]),
    ],
)  # fmt: skip
def test_the_plans_of_a_scoring_job(plan: str, files: list[str], tmp_path: Path) -> None:
    yaml = tmp_path / "score.yaml"
    yaml.write_text(f"job: score\nrun: {{name: x}}\nmodel: {{path: y}}\nplan: {plan}\n")
    job = load_job(yaml)
    assert isinstance(job, ScoringConfig) and job.plan is not None and list(job.plan.each()) == files
    assert all(type(each.remove) in (int, type(None)) for each in job.plan.each().values())


@pytest.mark.parametrize(
    "wrong", ["remove=true", "remove=[1,null]", "remove=[x]", "criterion=[]", "criterion=[tail,3]"]
)
def test_plans_that_are_none(wrong: str, tmp_path: Path) -> None:
    yaml = tmp_path / "score.yaml"
    yaml.write_text("job: score\nrun: {name: x}\nmodel: {path: y}\nplan: {criterion: tail, remove: 1}\n")
    job = load_job(yaml, [f"plan.{wrong}"])
    assert isinstance(job, ScoringConfig) and job.plan is not None
    with pytest.raises(UserError, match="it must be a n"):
        job.plan.each()


def test_a_job_that_does_more_than_train_is_no_training_job(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        f"{MINIMAL}\njob: iterate\niterate: {{rounds: 1}}\nplan: {{shape: {{layers: 2}}, criterion: tail}}\n"
    )
    assert load_job(path).job == "iterate"
    with pytest.raises(UserError, match=r"is another kind of job \(iterate\): run it with `composer train.py`"):
        load_training_job(path)
    with pytest.raises(UserError, match="the section iterate belongs to another job: write job: iterate"):
        load_job(path, ["job=train"])
    with pytest.raises(UserError, match="there is no job 'itrate'; did you mean 'iterate'"):
        load_job(path, ['job="itrate"'])
    path.write_text(MINIMAL)
    with pytest.raises(UserError, match="job prune needs the section l0_pruning"):
        load_job(path, ["job=prune"])


@pytest.mark.parametrize("criterion", ["[]", "[tail, null]", "3"])
def test_criteria_of_plans_are_names(criterion: str, tmp_path: Path) -> None:
    path = tmp_path / "score.yaml"
    path.write_text("job: score\nrun: {name: x}\nmodel: {path: here}\n")
    job = load_job(path, [f"plan={{criterion: {criterion}, remove: [1]}}"])
    assert isinstance(job, ScoringConfig) and job.plan is not None
    with pytest.raises(UserError, match="it must be a name, or a list of names"):
        job.plan.each()
    assert list(load_job(path, ["plan={criterion: [tail, random], remove: [1]}"]).plan.each()) == [  # type: ignore[union-attr]
        "plan-tail-1.json",
        "plan-random-1.json",
    ]
