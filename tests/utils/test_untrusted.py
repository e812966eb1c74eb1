"""Folders that somebody else made: no code of theirs runs, no link leads out, and what is not there is named."""

import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import SecurityError
from safetensors.torch import load_file, save_file

from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.evaluation.continuations import read_prompts, write_continuations
from llmprune.evaluation.evaluate import evaluate
from llmprune.evaluation.settings import EvaluationConfig, GenerationConfig, PerplexityConfig
from llmprune.evaluation.tasks import language_model
from llmprune.jobs.score import score
from llmprune.models.loaded import open_model
from llmprune.models.loading import load_any_model, load_model, load_tokenizer
from llmprune.models.placement import Placement
from llmprune.models.source import read_config, resolve_model
from llmprune.pruning.scoring.settings import LayerScoringConfig
from llmprune.utils.checksums import record, verify_checksums
from llmprune.utils.errors import UserError
from llmprune.utils.untrusted import inspect, open_tokenizer

CPU = Placement(device="cpu")


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the small model, to be changed."""
    return shutil.copytree(model_folder, tmp_path / "model")


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


class Payload:
    """Leaves a file after when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


def code(proof: Path) -> str:
    return f"open({str(proof)!r}, 'w').close()\n"


def custom_generate(model: Path, proof: Path) -> None:
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(code(proof) + "def generate(model, **kwargs): ...\n")
    (model / "custom_generate" / "requirements.txt").write_text("")


def unknown_type(model: Path, proof: Path) -> None:
    for name in ("configuration_x.py", "modeling_x.py"):
        (model / name).write_text(code(proof))
    own = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}
    change(model / "config.json", model_type="x", auto_map=own)


def known_type(model: Path, proof: Path) -> None:
    unknown_type(model, proof)
    change(model / "config.json", model_type="llama")


def tokenizer_code(model: Path, proof: Path) -> None:
    (model / "tokenization_x.py").write_text(code(proof))
    change(model / "tokenizer_config.json", tokenizer_class="X", auto_map={"AutoTokenizer": ["tokenization_x.X", None]})


def pickled_weights(model: Path, proof: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(proof)))


def pickles_beside(model: Path, proof: Path) -> None:
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt"):
        (model / name).write_bytes(pickle.dumps(Payload(proof)))


PLACES: dict[str, Callable[[Path, Path], None]] = {
    "custom_generate": custom_generate,
    "code for an unknown type": unknown_type,
    "code for a known type": known_type,
    "code for the tokenizer": tokenizer_code,
    "pickled weights": pickled_weights,
    "pickles beside the weights": pickles_beside,
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_no_code_of_a_model_folder_runs(
    place: Callable[[Path, Path], None], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof = tmp_path / "proof"
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked on the terminal"))
    place(model, proof)
    for use in (read_config, load_tokenizer, load_any_model, load_model, lambda place: open_model(str(place), CPU)):
        with suppress(UserError):
            use(model)
        assert not proof.exists()


def test_pickled_weights_are_named(model: Path, tmp_path: Path) -> None:
    pickled_weights(model, tmp_path / "proof")
    with pytest.raises(UserError, match="has no safetensors weights; if it has .bin files"):
        load_any_model(model)


def test_chat_templates_run_in_a_sandbox(model: Path, tmp_path: Path) -> None:
    escape = "{{ cycler.__init__.__globals__.os.system('touch " + str(tmp_path / "proof") + "') }}"
    (model / "chat_template.jinja").write_text(escape)
    with pytest.raises(SecurityError):
        load_tokenizer(model).apply_chat_template([{"role": "user", "content": "hello"}])
    assert not (tmp_path / "proof").exists()


def test_a_model_with_custom_generate_is_used_without_it(model: Path, tmp_path: Path) -> None:
    custom_generate(model, tmp_path / "proof")
    loaded = load_any_model(model)
    assert loaded.generate.__func__ is type(loaded).generate
    assert not (tmp_path / "proof").exists()


def test_an_adapters_pickle_is_refused(model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    with pytest.raises(UserError, match="holds no PEFT adapter"):
        load_any_model(model, adapter=adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "proof")))
    with pytest.raises(UserError, match="has no adapter_model.safetensors"):
        load_any_model(model, adapter=adapter)
    save_file({}, adapter / "adapter_model.safetensors")
    change(adapter / "adapter_config.json", peft_type="SOMETHING")
    with pytest.raises(UserError, match="does not fit"):
        load_any_model(model, adapter=adapter)
    assert not (tmp_path / "proof").exists()


def test_links_out_of_a_folder_are_not_followed(model: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("password")
    for name in ("tokenizer_extra.json", "llmprune/plan.json"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).symlink_to(secret)
        for use in (resolve_model, load_tokenizer, load_any_model):
            with pytest.raises(UserError, match=f"{name} is a link out of"):
                use(model)
        (model / name).unlink()
    (model / "linked").symlink_to(tmp_path)
    with pytest.raises(UserError, match="is a link out of"):
        inspect(model)


def test_links_within_a_folder_and_into_the_hubs_cache_are_followed(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--a--b"
    (cache / "snapshots").mkdir(parents=True)
    blobs = shutil.copytree(model, cache / "blobs")
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    load_any_model(snapshot)
    (tmp_path / "link").symlink_to(model)
    (model / "tokenizer_copy.json").symlink_to("tokenizer.json")
    load_any_model(tmp_path / "link")
    assert open_tokenizer(tmp_path / "link").vocab_size


def test_pointers_of_git_lfs_are_called_so(model: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json"):
        before = (model / name).read_bytes()
        (model / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(UserError, match=f"{name} is a Git LFS pointer"):
            load_model(model)
        (model / name).write_bytes(before)


def test_what_is_wrong_with_weights_is_named(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    save_file({**weights, name: weights[name][:8].clone()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"'{name}' in .* has the shape \[8, 32\], but \[32, 32\] by its config.json"):
        load_model(model)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    fields = json.loads((model / "config.json").read_text())
    del fields["num_key_value_heads"]
    (model / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"k_proj.weight' .* which does not say num_key_value_heads"):
        load_model(model)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00002.safetensors")}
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="names the shard model-00001-of-00002.safetensors, which is missing"):
        load_model(model)


def test_weights_that_are_not_finite_are_named(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    for value in (float("nan"), float("inf")):
        broken = weights[name].clone()
        broken[3, 4] = value
        save_file({**weights, name: broken}, model / "model.safetensors", {"format": "pt"})
        for use in (load_model, load_any_model, lambda place: open_model(str(place), CPU)):
            with pytest.raises(UserError, match=f"not finite: '{name}'"):
                use(model)
    assert load_model(model, finite=False) is not None


def test_files_that_no_checksum_vouches_for_are_refused_when_asked(model: Path) -> None:
    record(model)
    for name in ("README.md", ".gitattributes", "images/loss.png"):  # what a hub or a reader may add
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("text")
    verify_checksums(model)
    for name in ("custom_generate/generate.py", "chat_template.jinja", "model-00002-of-00002.safetensors"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("text")
        with pytest.raises(UserError, match=f"{name} is not in checksums.json"):
            verify_checksums(model)
        (model / name).unlink()


def test_tokens_that_the_model_does_not_know_are_named(model: Path, tmp_path: Path) -> None:
    """Tokenizers may have more than their models: such a text would end in an IndexError, on a GPU in worse."""
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one <new> two\n")
    text = tmp_path / "text.txt"
    text.write_text("one <new> two " * 40)
    data = CalibrationConfig(str(text), samples=1, length=16)
    opened = open_model(str(model), CPU)
    model_of_harness = language_model(opened.model, opened.tokenizer, batch_size=1)
    for use in (
        lambda: write_continuations(opened, read_prompts(prompts), GenerationConfig(max_new_tokens=2)),
        lambda: score(str(model), LayerScoringConfig(data, ["block_influence"]), Placement("float32", "cpu")),
        lambda: evaluate([str(model)], EvaluationConfig([str(text)], PerplexityConfig(16, bos=("none",))), CPU),
        lambda: model_of_harness.tok_encode("one <new> two"),
        lambda: model_of_harness.tok_batch_encode(["one <new> two"]),
    ):
        with pytest.raises(UserError, match="has the token 300, but the model's vocabulary ends at 299"):
            use()
