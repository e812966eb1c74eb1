"""Shared fixtures: small models, and prepared data with a tokenizer, all made on the spot."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"  # so that ``auto`` is float32, whatever the processor
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # ranks would each start processes that compile nothing

import pytest
import torch
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from data_prep.pack import prepare
from data_prep.recipe import PackSettings
from data_prep.tokenizer import train_tokenizer
from llmprune.models.loading import new_model
from tests.harness.flash import acted_flash as acted_flash  # a fixture

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

VOCABULARY = 300
SEQUENCE_LENGTH = 32


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no worker is left alone with it."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


def tiny_config(model_type: str = "llama", **changes: object) -> PretrainedConfig:
    """A model of four blocks with grouped queries, a Llama unless told otherwise."""
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return CONFIG_MAPPING[model_type](**{**fields, **changes})


def random_model(config: PretrainedConfig, seed: int = 0, attention: str = "sdpa") -> PreTrainedModel:
    """A model in which every parameter is random, norms and biases too, and large enough to matter."""
    model = new_model(config, seed=seed, attention=attention).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    """Random token ids, [3, 17]."""
    return torch.randint(VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small domains of text: counting and letters."""
    folder = tmp_path_factory.mktemp("corpus")
    for domain, text in (("numbers", "one two three four five six "), ("letters", "alpha beta gamma delta ")):
        (folder / domain).mkdir()
        with (folder / domain / "part.jsonl").open("w") as file:
            for number in range(60):
                file.write(json.dumps({"text": f"{number}: " + text * (5 + number % 7)}) + "\n")
    return folder


@pytest.fixture(scope="session")
def data(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus, prepared with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("data")
    train_tokenizer([corpus], folder / "tokenizer", vocab_size=VOCABULARY)
    settings = PackSettings(SEQUENCE_LENGTH, eval_fraction=0.2)
    prepare([corpus], folder / "tokenizer", folder / "mds", settings, processes=1)
    return folder / "mds"


@pytest.fixture(scope="session")
def _server() -> Iterator[str]:
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An S3-compatible server that this process and its children know; its address."""
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "very-secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_MAX_ATTEMPTS", "1"),
        ("S3_ENDPOINT_URL", _server),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("llmprune.utils.object_store.WAIT", 0.01)
    return _server


@pytest.fixture(scope="session")
def builtin_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder."""
    from llmprune.conversion.from_gguf import from_gguf

    folder = tmp_path_factory.mktemp("builtin") / "model"
    from_gguf(None, folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with random weights, saved with the data's tokenizer."""
    from llmprune.models.loading import load_tokenizer

    folder = tmp_path_factory.mktemp("model")
    random_model(tiny_config()).save_pretrained(folder)
    load_tokenizer(data / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def trained_folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama of six blocks that has learned the corpus, saved with its tokenizer."""
    from llmprune.data.dataset import MixedDataset
    from llmprune.data.prepared import PreparedData
    from llmprune.models.loading import load_tokenizer

    torch.manual_seed(0)
    model = new_model(tiny_config(num_hidden_layers=6), seed=3).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    stream = iter(MixedDataset(PreparedData(data), global_batch_size=8, weights=None, seed=1))
    for _ in range(60):
        tokens = torch.stack([next(stream)["input_ids"] for _ in range(8)])
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 3  # it began at log 300 = 5.7
    folder = tmp_path_factory.mktemp("trained")
    model.save_pretrained(folder)
    load_tokenizer(data / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture
def trained(trained_folder: Path) -> PreTrainedModel:
    """The trained model in memory."""
    from llmprune.models.loading import load_model

    return load_model(trained_folder).eval()


@pytest.fixture(scope="session")
def calibration(data: Path) -> torch.Tensor:
    """Ten calibration samples of real text, [10, 32]."""
    from llmprune.data.dataset import EvalDataset
    from llmprune.data.prepared import PreparedData

    samples = EvalDataset(PreparedData(data))
    return torch.stack([samples[place]["input_ids"] for place in range(10)])
