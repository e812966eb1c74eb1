"""Scoring as users start it: the command, the YAML on two ranks, offloaded; and what it refuses."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from llmprune.cli import app
from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.jobs.score import save_scores, score, share
from llmprune.models import number_formats
from llmprune.models.loading import load_model_config, load_tokenizer
from llmprune.models.placement import Placement
from llmprune.plans.plan import Plan
from llmprune.pruning.planning import make_plan, rehearse
from llmprune.pruning.scoring.all_criteria import CRITERIA
from llmprune.pruning.scoring.criterion import Criterion
from llmprune.pruning.scoring.scores import Scores
from llmprune.pruning.scoring.settings import LayerScoringConfig
from llmprune.pruning.selection.settings import PlanConfig
from llmprune.utils.errors import UserError
from tests.conftest import random_model, tiny_config
from tests.models.families.test_conformance import CONFIGS

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("blocks", "subblocks", "spans", "pairs", "units")


def settings(data: Path, **changes: Any) -> LayerScoringConfig:
    return LayerScoringConfig(CalibrationConfig(str(data), samples=7, length=24), **changes)


def flat(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for name in sorted(value) for number in flat(value[name])]
    return [number for item in value for number in flat(item)] if isinstance(value, list) else [value]


def numbers(scores: Scores) -> list[float]:
    return [number for section in SECTIONS for number in flat(scores.as_dict()[section])]


@pytest.fixture(scope="module")
def scores(trained_folder: Path, data: Path) -> Scores:
    return score(str(trained_folder), settings(data), Placement("float32", "cpu"))


def test_everything_is_there(scores: Scores, tmp_path: Path) -> None:
    values = scores.as_dict()
    assert set(values["blocks"]) == {
        "block_influence", "relative_magnitude", "magnitude_l1", "magnitude_l2", "taylor", "taylor_signed",
        "perplexity", "tail", "random",
    }  # fmt: skip
    assert set(values["subblocks"]) == {"attention", "mlp"}
    assert set(values["spans"]) == {"cosine", "angular"} and set(values["pairs"]) == {"cka"}
    assert {unit: (len(rows), len(rows[0])) for unit, rows in values["units"]["unit_taylor"].items()} == {
        "heads": (6, 8), "kv_groups": (6, 4), "channels": (6, 48), "hidden": (6, 32),
    }  # fmt: skip
    assert (values["schema"], values["num_blocks"]) == (1, 6)
    files = save_scores(scores, tmp_path / "scores.json")
    assert [file.name for file in files] == ["scores.json", "scores.png", "scores.spans.png", "scores.cka.png"]
    assert all(file.stat().st_size > 1000 for file in files)
    assert Scores.load(tmp_path / "scores.json") == scores


def test_offloaded_gives_the_same(scores: Scores, trained_folder: Path, data: Path) -> None:
    offloaded = score(str(trained_folder), settings(data, batch_size=3), offload=True)
    assert set(offloaded.blocks) == {name for name in scores.blocks if not name.startswith("taylor")}
    for section in SECTIONS:
        for name, found in offloaded.as_dict()[section].items():
            assert flat(found) == pytest.approx(flat(scores.as_dict()[section][name]), rel=1e-5), name
    assert offloaded.perplexity == pytest.approx(scores.perplexity, rel=1e-6)
    with pytest.raises(UserError, match="taylor: there are no gradients when blocks are offloaded"):
        score(str(trained_folder), settings(data, criteria=["taylor"]), offload=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_can_be_offloaded(name: str, data: Path, tmp_path: Path) -> None:
    random_model(CONFIGS[name]).save_pretrained(tmp_path)
    load_tokenizer(data / "tokenizer").save_pretrained(tmp_path)
    criteria = ["perplexity", "block_influence", "attention", "mlp", "magnitude_l1", "unit_activation_l2"]
    plain, offloaded = (score(str(tmp_path), settings(data, criteria=criteria), offload=o) for o in (False, True))
    assert numbers(offloaded) == pytest.approx(numbers(plain), rel=1e-5)


def test_offloaded_blocks_come_and_go(trained_folder: Path) -> None:
    from llmprune.models.offloading import OffloadedModel

    offloaded = OffloadedModel(trained_folder, dtype=torch.float32, device=torch.device("cpu"))
    blocks = offloaded.model.model.layers
    for number in range(6):
        with offloaded.loaded(number):
            assert [b.mlp.up_proj.weight.device.type for b in blocks].count("cpu") == 1
            assert blocks[number].mlp.up_proj.weight.device.type == "cpu"
    assert all(parameter.device.type == "meta" for parameter in blocks.parameters())


@pytest.mark.parametrize("offload", [False, True])
def test_only_matrix_products_are_in_bfloat16(
    scores: Scores, trained_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, offload: bool
) -> None:
    """The criteria's sums are computed in full precision, and the scores are near those in float32."""
    called: set[str] = set()

    def checked(cls: type[Criterion], name: str) -> None:
        method = vars(cls)[name]

        def call(*arguments: Any) -> Any:
            called.add(name)
            assert not torch.is_autocast_enabled("cpu"), f"{cls.__name__}.{name}"
            return method(*arguments)

        monkeypatch.setattr(cls, name, call)

    classes = {base for name in CRITERIA for base in CRITERIA[name].__mro__ if issubclass(base, Criterion)}
    methods = ("observe", "read", "weigh", "gradient", "losses")
    for cls in classes - {Criterion}:
        for name in methods:
            if name in vars(cls):
                checked(cls, name)
    monkeypatch.setattr(number_formats, "bfloat16_is_fast", lambda *, on_gpu: True)
    found = score(str(trained_folder), settings(data), Placement("auto", "cpu"), offload=offload)
    assert called == set(methods) - ({"gradient"} if offload else set())
    for name, values in found.as_dict()["blocks"].items():
        exact = scores.as_dict()["blocks"][name]
        assert values == pytest.approx(exact, rel=0.3, abs=0.05)
        assert (values == exact) == (name in ("magnitude_l1", "magnitude_l2", "tail", "random")), name


def test_two_ranks_give_the_same(scores: Scores, trained_folder: Path, data: Path, tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).parent / "composer"), "-n", "2", "train.py", "yamls/score.yaml",
        f"model.path={trained_folder}", f"layer_scoring.data.path={data}", "layer_scoring.data.samples=7",
        "layer_scoring.data.length=24", f"run.folder={tmp_path}/run", "plan.criterion=taylor", "plan.remove=[2]",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = Scores.load(tmp_path / "run" / "scores.json")
    assert numbers(found) == pytest.approx(numbers(scores), rel=1e-5)
    kept = {block["attention"] for block in json.loads((tmp_path / "run" / "plan-2.json").read_text())["blocks"]}
    taylor = scores.blocks["taylor"]
    assert set(range(6)) - kept == set(sorted(range(6), key=taylor.__getitem__)[:2])


def run(*arguments: str) -> None:
    app(list(arguments), standalone_mode=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_score_plan_apply_verify_and_generate(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(data / "tokenizer")
    random_model(CONFIGS[name]).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model, plan, cut = (str(tmp_path / part) for part in ("model", "plan.json", "cut"))
    run("score", model, "--data", str(data), "--samples", "3", "--seq-len", "16", "--out", str(tmp_path / "s.json"))
    run("plan", str(tmp_path / "s.json"), "--criterion", "block_influence", "--remove", "2", "--out", plan)
    run("apply", model, plan, "--out", cut)
    capsys.readouterr()
    run("verify", model, cut, "--plan", plan, "--json")
    assert json.loads(capsys.readouterr().out)["max_rel"] <= 1e-5
    smaller = AutoModelForCausalLM.from_pretrained(cut).eval()
    assert smaller.config.num_hidden_layers == 2
    prompt = tokenizer("one two three", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with_cache = smaller.generate(prompt, use_cache=True, **options)
    assert torch.equal(with_cache, smaller.generate(prompt, use_cache=False, **options))


def refused(message: str, *arguments: str) -> None:
    with pytest.raises(UserError, match=message):
        run(*arguments)


def test_mistakes(scores: Scores, trained_folder: Path, model_folder: Path, data: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "scores.json", str(tmp_path / "plan.json")
    scores.save(path)
    plan = ("plan", str(path), "--out", out)
    refused("6 of 6 blocks can't be removed: choose 1 to 5", *plan, "--criterion", "taylor", "--remove", "6")
    refused("'cosine' scores spans: pass --span", *plan, "--criterion", "cosine", "--remove", "2")
    refused("choose one way to select, not greedy and span", *plan, "--method", "greedy", "--span")
    refused(
        "no span of 5|only 4 of 6", *plan, "--criterion", "cosine", "--span", "--remove", "5", "--protect-first", "2"
    )
    refused("name the plan to write", "plan", str(path), "--criterion", "taylor", "--remove", "1")
    refused("does not exist", "plan", str(tmp_path / "none.json"), "--out", out)
    refused("exists already", "plan", str(path), "--out", str(path), "--criterion", "taylor", "--remove", "1")
    greedy = ("--method", "greedy", "--remove", "1")
    refused(
        "would delete the input",
        "plan",
        str(path),
        "--out",
        str(path),
        "--overwrite",
        "--criterion",
        "tail",
        "--remove",
        "1",
    )
    damaged = scores.as_dict() | {"settings": {"dtype": "float32"}}
    (tmp_path / "damaged.json").write_text(json.dumps(damaged))
    refused("do not say how they were made", "plan", str(tmp_path / "damaged.json"), "--out", out, *greedy)
    refused("the scores are of a model with the hash", *plan, *greedy, "--model", str(model_folder))
    refused("no criterion 'bi'", "score", str(trained_folder), "--data", str(data), "--out", out, "--criteria", "bi")
    refused("seed is -1", "score", str(trained_folder), "--data", str(data), "--out", out, "--seed", "-1")
    refused("can't be read: Is a directory", "plan", str(tmp_path), "--out", out)
    refused("can't write /proc", "score", str(trained_folder), "--data", str(data), "--out", "/proc/a.json")
    refused("need calibration text", "score", str(trained_folder), "--out", out)
    refused("9 of 6 blocks can't be removed", "plan", str(path), "--compare", "--remove", "9")
    refused("the model takes 128", "score", str(trained_folder), "--data", str(data), "--out", out, "--seq-len", "129")
    refused("must be a file whose name ends in .json", "score", str(trained_folder), "--out", str(tmp_path / "x.txt"))
    run(*plan, "--criterion", "taylor", "--remove", "1")
    refused("the plan was made for a model", "apply", str(model_folder), out, "--out", str(tmp_path / "cut"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "not valid JSON"),
        (lambda text: json.dumps({**json.loads(text), "num_blocks": 5}), "is damaged"),
        (lambda text: text.replace('"taylor": [', '"taylor": [1.0, '), "is damaged"),
        (lambda text: text.replace('"mlp": [', '"mlp": [NaN, '), "NaN is no number"),
        (lambda text: json.dumps({"schema": 1}), "holds no scores"),
        (lambda text: json.dumps({**json.loads(text), "schema": 2}), "has schema 2"),
    ],
)
def test_damaged_scores(scores: Scores, tmp_path: Path, damage: Any, message: str) -> None:
    scores.save(tmp_path / "scores.json")
    (tmp_path / "scores.json").write_text(damage((tmp_path / "scores.json").read_text()))
    with pytest.raises(UserError, match=message):
        Scores.load(tmp_path / "scores.json")


def test_criteria_on_weights_need_no_text(trained_folder: Path, scores: Scores, tmp_path: Path) -> None:
    run("score", str(trained_folder), "--criteria", "magnitude_l1,tail", "--out", str(tmp_path / "s.json"))
    found = Scores.load(tmp_path / "s.json")
    assert found.blocks["magnitude_l1"] == pytest.approx(scores.blocks["magnitude_l1"]) and not found.spans


def test_comparison(scores: Scores, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores.save(tmp_path / "scores.json")
    run("plan", str(tmp_path / "scores.json"), "--compare", "--remove", "2", "--json")
    gone = json.loads(capsys.readouterr().out)
    assert gone["tail"] == [4, 5] and all(len(blocks) == 2 for blocks in gone.values())
    run("plan", str(tmp_path / "scores.json"), "--compare", "--remove", "2")
    table = capsys.readouterr().out.splitlines()
    assert len(table) == len(gone) + 2 and table[-1].split()[0] == "votes"
    voting = [blocks for name, blocks in gone.items() if name not in ("tail", "random")]
    votes = [sum(block in blocks for blocks in voting) for block in range(scores.layers)]
    assert table[-1].split()[1:] == [str(count or ".") for count in votes]


def test_choices_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    run("plan", "--methods")
    assert capsys.readouterr().out.startswith("lowest ")
    run("score", "--names")
    assert len(capsys.readouterr().out.splitlines()) == 23


def test_families_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    run("families", "--json")
    listed = json.loads(capsys.readouterr().out)
    assert {"llama", "gemma3", "opt", "gpt_neox", "phi3", "olmo2", "mixtral", "qwen3_moe"} <= set(listed)
    assert "intermediate" not in listed["mixtral"]["gates"] and listed["opt"]["notes"]


def test_a_model_that_is_no_longer_one(trained_folder: Path, data: Path, tmp_path: Path) -> None:
    from llmprune.models.loading import load_model

    model = load_model(trained_folder)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(data / "tokenizer").save_pretrained(tmp_path / "model")
    refused(
        "not finite",
        "score",
        str(tmp_path / "model"),
        "--data",
        str(data),
        "--seq-len",
        "16",
        "--out",
        str(tmp_path / "s.json"),
    )
    assert not (tmp_path / "s.json").exists()


def test_a_model_larger_than_memory(trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    free = type(psutil.virtual_memory())(*[1000] * len(psutil.virtual_memory()))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    arguments = (
        "score",
        str(trained_folder),
        "--device",
        "cpu",
        "--criteria",
        "tail",
        "--out",
        str(tmp_path / "s.json"),
    )
    refused("hold one block at a time with --offload", *arguments)
    run(*arguments, "--offload")
    assert Scores.load(tmp_path / "s.json").blocks["tail"] == [6, 5, 4, 3, 2, 1]


def test_iterative_without_text(trained_folder: Path, tmp_path: Path) -> None:
    scores, out = str(tmp_path / "s.json"), str(tmp_path / "plan.json")
    run("score", str(trained_folder), "--criteria", "magnitude_l1", "--out", scores)
    run("plan", scores, "--method", "iterative", "--criterion", "magnitude_l1", "--remove", "2", "--out", out)
    assert Plan.load(out).shape.layers == 4
    refused(
        "score again with --data", "plan", scores, "--method", "greedy", "--remove", "2", "--out", out, "--overwrite"
    )


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_every_rank_has_as_many_batches(batch_size: int) -> None:
    """Composer stops all ranks when one has no more; that must lose nothing."""
    for ranks in (1, 2, 3, 4, 8):
        for samples in range(ranks, 40):
            tokens = torch.arange(samples)[:, None]
            shares = [share(tokens, rank, ranks, batch_size) for rank in range(ranks)]
            assert len({len(batches) for batches in shares}) == 1
            assert all(0 < len(batch) <= batch_size + 1 for batches in shares for batch in batches)
            assert sorted(torch.cat([batch for batches in shares for batch in batches]).flatten().tolist()) == list(
                range(samples)
            )


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (PlanConfig("lowest", None, 1), "name the criterion"),
        (PlanConfig("lowest", "cosine", 1), "scores spans: pass --span"),
        (PlanConfig("lowest", "taylor", 1), "no criterion 'taylor'"),
        (PlanConfig("lowest", "tail", 6), "6 of 6 blocks"),
        (PlanConfig("lowest", "tail", 1, protect_first=-1), "protect_first is -1; it must be zero or positive"),
        (PlanConfig("greedy", None, 5), "only 4 of 6 can go"),
        (PlanConfig("sublayers", None, 1), "no influence of sub-layers"),
        (PlanConfig("list", None, 1), "--drop"),
        (PlanConfig("merge", None, 1), None),
        (PlanConfig("span", "cosine", 2), None),
        (PlanConfig("iterative", "block_influence", 2), None),
    ],
)
def test_a_plan_is_rehearsed_before_scoring(trained_folder: Path, plan: PlanConfig, message: str | None) -> None:
    criteria = ["tail", "cosine", "block_influence"]
    if message is None:
        rehearse(plan, criteria, load_model_config(trained_folder), CalibrationConfig())
        return
    with pytest.raises(UserError, match=message):
        rehearse(plan, criteria, load_model_config(trained_folder), CalibrationConfig())


def test_a_merge_needs_text(trained_folder: Path) -> None:
    with pytest.raises(UserError, match="needs calibration text"):
        rehearse(PlanConfig("merge", None, 1), ["tail"], load_model_config(trained_folder), CalibrationConfig())


def test_a_token_outside_the_vocabulary(trained_folder: Path, data: Path, tmp_path: Path) -> None:
    model = random_model(tiny_config(vocab_size=20))
    model.save_pretrained(tmp_path)
    load_tokenizer(data / "tokenizer").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the model's vocabulary ends at 19"):
        score(str(tmp_path), settings(data, criteria=["perplexity"]), Placement("float32", "cpu"))


def test_pictures_of_other_scores_do_not_stay(scores: Scores, tmp_path: Path) -> None:
    save_scores(scores, tmp_path / "s.json")
    save_scores(replace(scores, spans={}, pairs={}), tmp_path / "s.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.json", "s.png"]


def test_changed_text_is_noticed(trained_folder: Path, corpus: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    shutil.copy(corpus / "numbers/part.jsonl", text)
    found = score(str(trained_folder), settings(text, criteria=["perplexity"]), Placement("float32", "cpu"))
    assert make_plan(found, PlanConfig("greedy", remove=1)).shape.layers == 5
    text.write_text("\n".join(reversed(text.read_text().splitlines())))
    with pytest.raises(UserError, match="has changed since the scores were made"):
        make_plan(found, PlanConfig("greedy", remove=1))


def test_scores_are_not_written_into_a_model(trained_folder: Path, data: Path) -> None:
    refused(
        "is a model's folder",
        "score",
        str(trained_folder),
        "--data",
        str(data),
        "--out",
        f"{trained_folder}/config2.json",
    )
