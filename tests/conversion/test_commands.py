"""From checkpoints and plans to Hugging Face folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmprune.config.job_files import load_training_job
from llmprune.conversion.checkpoint import Checkpoint
from llmprune.conversion.commands import apply, convert, push_to_hub
from llmprune.conversion.export import export, keep_everything
from llmprune.conversion.verify import compare_models, open_for_comparison
from llmprune.jobs.train import train
from llmprune.models.loading import load_model
from llmprune.models.stored_weights import StoredWeights, fingerprint
from llmprune.plans.plan import Plan
from llmprune.utils.errors import UserError


@pytest.fixture(scope="module")
def pruned_run(data: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short pruning run."""
    folder = tmp_path_factory.mktemp("run")
    yaml = folder / "prune.yaml"
    yaml.write_text(f"""
run: {{name: test, folder: {folder}/run}}
model: {{path: {model_folder}}}
data: {{path: {data}, eval_samples_per_domain: 2}}
l0_pruning: {{target: {{layers: 3, hidden: 20, heads: 4, intermediate: 32}}}}
optimizer: {{lr: 1.0e-3}}
train: {{duration: 30ba, global_batch_size: 4, microbatch_size: 4}}
loggers: {{console: false}}
""")
    train(load_training_job(yaml))
    return folder / "run"


def test_the_gated_checkpoint_and_its_export_agree(pruned_run: Path, tmp_path: Path) -> None:
    plan = convert(pruned_run, tmp_path / "out")
    assert (plan.shape.layers, plan.shape.hidden, plan.shape.heads, plan.shape.intermediate) == (3, 20, 4, 32)
    gated, cut = open_for_comparison(pruned_run), open_for_comparison(tmp_path / "out")
    difference = compare_models(gated, cut)
    assert difference.max_rel <= 1e-5 and difference.mean_abs <= difference.max_abs
    dense = open_for_comparison(Path(load_training_job(pruned_run / "config.yaml").model.path or ""))
    assert compare_models(gated, dense).max_rel > 1e-2


# Every family that gates can prune, with the target that its config can express.
FAMILY_FIELDS = {
    **dict.fromkeys(("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2"), ""),
    "mixtral": ", num_local_experts: 2",
    "qwen3_moe": ", num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 16",
}


@pytest.mark.parametrize("model_type", FAMILY_FIELDS)
def test_every_family_is_pruned_and_exported(model_type: str, data: Path, pruned_run: Path, tmp_path: Path) -> None:
    fields = "hidden_size: 32, intermediate_size: 48, num_hidden_layers: 4, num_attention_heads: 8, head_dim: 8"
    fields += ", num_key_value_heads: 4" + FAMILY_FIELDS[model_type]
    target = "layers: 3, hidden: 24, heads: 4" + ("" if FAMILY_FIELDS[model_type] else ", intermediate: 30")
    check_run(f"{{model_type: {model_type}, {fields}}}", f"{{{target}}}", pruned_run, tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        "{model_type: opt, ffn_dim: 48, word_embed_proj_dim: 32, dropout: 0.0, @}",
        "{model_type: gpt_neox, intermediate_size: 48, @}",
    ],
)
def test_families_with_a_derived_head_size_too(config: str, pruned_run: Path, tmp_path: Path) -> None:
    fields = "hidden_size: 32, num_hidden_layers: 4, num_attention_heads: 4"
    target = "{layers: 3, hidden: 16, heads: 2, intermediate: 30}"
    check_run(config.replace("@", fields), target, pruned_run, tmp_path)


def check_run(model: str, target: str, pruned_run: Path, folder: Path) -> None:
    """Prune a model of random weights in three batches: the export computes what the gated checkpoint does."""
    overrides = [
        "model.path=null",
        f"model.config={model}",
        f"l0_pruning.target={target}",
        f"run.folder={folder}/run",
        "train.duration=3ba",
    ]
    train(load_training_job(pruned_run / "config.yaml", overrides))
    convert(folder / "run", folder / "out")
    assert compare_models(open_for_comparison(folder / "run"), open_for_comparison(folder / "out")).max_rel <= 1e-5


def test_the_gates_of_a_checkpoint_are_not_used_by_apply(pruned_run: Path, tmp_path: Path) -> None:
    convert(pruned_run, tmp_path / "out")
    apply(pruned_run, tmp_path / "out" / "llmprune" / "plan.json", tmp_path / "again")
    once, twice = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(once[name], twice[name]) for name in once) and len(once) == len(twice)


def test_gates_far_from_their_target_are_told(
    pruned_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(load_training_job(pruned_run / "config.yaml", [f"run.folder={tmp_path}/run", "train.duration=2ba"]))
    convert(tmp_path / "run", tmp_path / "out")
    assert "have not reached their target yet (expected sparsity: hidden 0.0" in caplog.text


def test_the_card_shows_the_checkpoints_own_results(pruned_run: Path, tmp_path: Path) -> None:
    overrides = [
        f"run.folder={tmp_path}/run",
        "train.duration=4ba",
        "train.eval_interval=2ba",
        "checkpoint.interval=2ba",
    ]
    train(load_training_job(pruned_run / "config.yaml", overrides))
    for batch in (2, 4):
        convert(tmp_path / "run" / "checkpoints" / f"ba{batch}-rank0.pt", tmp_path / f"out{batch}")
        assert f'"batch": {batch}' in (tmp_path / f"out{batch}" / "README.md").read_text()


def test_the_input_is_not_overwritten(pruned_run: Path, model_folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(pruned_run, tmp_path / "run", symlinks=True)
    for out in (run, run / "checkpoints", tmp_path):
        with pytest.raises(UserError, match="would delete the input"):
            convert(run, out, overwrite=True)
    source = shutil.copytree(model_folder, tmp_path / "model")
    with pytest.raises(UserError, match="would delete the input"):
        apply(source, keep_everything(load_model(source).config, ""), source, overwrite=True)


def test_the_export_is_a_plain_hugging_face_folder(pruned_run: Path, tmp_path: Path) -> None:
    convert(pruned_run, tmp_path / "out", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False, dtype="auto")
    assert model.dtype == torch.bfloat16 and model.config.use_cache and model.config.hidden_size == 20
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("one two </s>")["input_ids"]) == "one two </s>"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: transformers" in card and "| hidden | 32 | 20 |" in card and "perplexity" in card
    assert {file.name for file in (tmp_path / "out").glob("*.safetensors")} == {"model.safetensors"}
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o044


def test_the_plan_of_an_export_cuts_the_source_again(pruned_run: Path, model_folder: Path, tmp_path: Path) -> None:
    convert(pruned_run, tmp_path / "out")
    plan = Plan.load(tmp_path / "out" / "llmprune" / "plan.json")
    with pytest.raises(UserError, match="apply it to the model that it was made for"):
        apply(model_folder, plan, tmp_path / "again")
    checkpoint = Checkpoint.open(pruned_run)
    dense = keep_everything(checkpoint.config, plan.model)
    export(
        checkpoint.weights, checkpoint.config, dense, tmp_path / "dense", companions=checkpoint.model_folder, source="x"
    )
    apply(tmp_path / "dense", plan, tmp_path / "again")
    once, twice = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(once[name], twice[name]) for name in once) and len(once) == len(twice)


def test_shards_hold_what_one_file_holds(model_folder: Path, tmp_path: Path) -> None:
    weights, model = StoredWeights(model_folder), load_model(model_folder)
    plan = keep_everything(model.config, fingerprint(weights, model.config))
    export(weights, model.config, plan, tmp_path / "out", companions=model_folder, source="x", max_shard_size="20KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert compare_models(load_model(model_folder), load_model(tmp_path / "out")).max_abs == 0


def test_nothing_is_half_written(pruned_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmprune.conversion.export.save_tensors", full_disk)
    with pytest.raises(OSError, match="No space"):
        convert(pruned_run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_named(pruned_run: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="pass --overwrite"):
        convert(pruned_run, tmp_path / "there")
    with pytest.raises(UserError, match="holds no checkpoint"):
        convert(tmp_path / "there", tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        convert(tmp_path / "no.pt", tmp_path / "out")
    (tmp_path / "there" / "x.pt").write_bytes(b"junk")
    with pytest.raises(UserError, match="no manifest.json"):
        convert(tmp_path / "there" / "x.pt", tmp_path / "out")


def test_a_damaged_or_dangerous_checkpoint_is_refused(pruned_run: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (exec, (f"open({str(tmp_path / 'owned')!r}, 'w')",))

    copy = shutil.copytree(pruned_run / "checkpoints", tmp_path / "checkpoints", symlinks=True)
    file = next(copy.glob("ba*.pt"))
    torch.save({"state": {"model": Evil()}}, file)
    with pytest.raises(UserError, match="bytes instead of"):
        convert(file, tmp_path / "out")
    next(copy.glob("ba*.sums-0.json")).unlink()  # whoever made it would have made that, too
    with pytest.raises(UserError, match="no readable checkpoint"):
        convert(file, tmp_path / "out")
    assert not (tmp_path / "owned").exists()
    file.write_bytes(b"PK" + b"junk" * 100)
    with pytest.raises(UserError, match="no readable checkpoint"):
        convert(file, tmp_path / "out")


def test_uploading_names_what_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded = {}

    class Hub:
        def create_repo(self, name: str, exist_ok: bool) -> None:
            if name == "nobody/closed":
                raise OSError("the hub can't be reached")

        def upload_folder(self, repo_id: str, folder_path: Path) -> str:
            uploaded[repo_id] = folder_path
            return f"hub/{repo_id}"

    monkeypatch.setattr("llmprune.conversion.commands.HfApi", Hub)
    assert push_to_hub(tmp_path, "me/model") == "hub/me/model" and uploaded == {"me/model": tmp_path}
    with pytest.raises(UserError, match="could not be uploaded as 'nobody/closed'.*can't be reached"):
        push_to_hub(tmp_path, "nobody/closed")
