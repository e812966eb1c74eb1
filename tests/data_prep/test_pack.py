"""From documents to shards and back."""

import json
import random
from pathlib import Path

import pytest
from streaming import StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_prep.pack import prepare
from data_prep.recipe import PackSettings
from data_prep.split import rank_of, split_of
from data_prep.tokenizer import train_tokenizer
from llmprune.data.format import DataManifest
from llmprune.data.prepared import PreparedData
from llmprune.data.sources import Fields
from llmprune.utils.errors import UserError

TEXTS = [
    f"document {n}: " + " ".join(random.Random(n).choices(["tree", "house", "bird", "é", "</s>"], k=n))
    for n in range(90)
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    for number, domain in enumerate("ab"):
        lines = [json.dumps({"text": text}) for text in TEXTS[number::2]]
        (folder / domain / "x.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def tokenizer(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    train_tokenizer([source], folder, vocab_size=280)
    return folder


def samples(data: Path, domain: str, split: str) -> list[list[int]]:
    reader = PreparedData(data).reader(domain, split)
    return [
        reader.read(shard, i)["input_ids"].tolist()
        for shard, size in enumerate(reader.shard_sizes)
        for i in range(size)
    ]


@pytest.mark.parametrize("batch_characters", [250_000, 300])  # all in one batch; samples that span batches
def test_samples_are_the_documents_joined(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_characters: int
) -> None:
    monkeypatch.setattr("data_prep.reading._BATCH_CHARACTERS", batch_characters)
    settings = PackSettings(16, eval_fraction=0.3, bos=True)
    manifest = prepare([source], tokenizer, tmp_path / "out", settings, processes=1).manifest
    plain = AutoTokenizer.from_pretrained(tokenizer)
    plain.backend_tokenizer.encode_special_tokens = True
    for number, domain in enumerate("ab"):
        for split in ("train", "eval"):
            stream: list[int] = []
            count = 0
            for text in TEXTS[number::2]:
                if split_of(rank_of(text, settings.seed), 0.3, {}) == split:
                    ids = plain.backend_tokenizer.encode(text, add_special_tokens=False).ids
                    stream += [plain.bos_token_id, *ids, plain.eos_token_id]
                    count += 1
            naive = [stream[i : i + 16] for i in range(0, len(stream) - 15, 16)]
            assert samples(tmp_path / "out", domain, split) == naive
            counts = manifest.domains[domain][split]
            assert (counts.documents, counts.samples, counts.tokens) == (count, len(naive), 16 * len(naive))


def test_text_that_looks_like_a_special_token_is_text(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    prepare([source], tokenizer, tmp_path / "out", PackSettings(16, eval_fraction=0), processes=1)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    flat = [t for domain in "ab" for sample in samples(tmp_path / "out", domain, "train") for t in sample]
    assert abs(flat.count(loaded.eos_token_id) - len(TEXTS)) <= 2  # only the ends of documents
    assert "</s>" in loaded.decode([t for t in flat if t != loaded.eos_token_id])


def test_the_number_of_processes_changes_nothing(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.reading._BATCH_CHARACTERS", 500)
    for processes in (1, 2):
        prepare(
            [source], tokenizer, tmp_path / str(processes), PackSettings(16, eval_fraction=0.2), processes=processes
        )
    files = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*") if p.is_file()) for n in "12"]
    assert files[0] == files[1]
    for name in files[0]:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_shards_are_readable_by_streaming_itself(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    prepare([source], tokenizer, tmp_path / "out", PackSettings(16, eval_fraction=0), processes=1)
    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(tmp_path / "out" / "a"), split="train", batch_size=1)
    assert [list(dataset[i]["tokens"]) for i in range(len(dataset))] == samples(tmp_path / "out", "a", "train")
    del dataset
    clean_stale_shared_memory()


@pytest.mark.parametrize(("size", "dtype"), [(65_536, "uint16"), (70_000, "uint32")])
def test_large_vocabularies_get_wide_ids(size: int, dtype: str, tmp_path: Path) -> None:
    vocabulary = {f"w{n}": n for n in range(size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1").save_pretrained(tmp_path / "t")
    (tmp_path / "x.txt").write_text(f"w5 w{size - 1} w9 " * 40)
    manifest = prepare([tmp_path / "x.txt"], tmp_path / "t", tmp_path / "out", PackSettings(8, 0), processes=1).manifest
    assert manifest.dtype == dtype
    domain = next(iter(manifest.domains))
    assert samples(tmp_path / "out", domain, "train")[0][:3] == [5, size - 1, 9]


def test_ids_beyond_the_number_of_tokens_survive(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "near": 1, "far": 70_000}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[UNK]").save_pretrained(tmp_path / "t")
    (tmp_path / "x.txt").write_text("far near " * 40)
    manifest = prepare([tmp_path / "x.txt"], tmp_path / "t", tmp_path / "out", PackSettings(8, 0), processes=1).manifest
    assert (manifest.dtype, manifest.vocab_size) == ("uint32", 70_001)
    assert samples(tmp_path / "out", next(iter(manifest.domains)), "train")[0][:2] == [70_000, 1]


@pytest.mark.parametrize("held_tokens", [1 << 24, 200])  # split when all is known, and midway
def test_a_small_domain_has_samples_on_both_sides(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_tokens: int
) -> None:
    monkeypatch.setattr("data_prep.packer._HELD_TOKENS", held_tokens)
    monkeypatch.setattr("data_prep.reading._BATCH_CHARACTERS", 400)
    (tmp_path / "in").mkdir()
    texts = [f"{n}: " + "house tree " * 4 for n in range(20)] * 2  # every text comes twice, far apart
    (tmp_path / "in" / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    settings = PackSettings(32, eval_fraction=1e-9)
    manifest = prepare([tmp_path / "in"], tokenizer, tmp_path / "out", settings, processes=1).manifest
    counts = manifest.domains["in"]
    assert counts["train"].samples > counts["eval"].samples >= 1
    decode = AutoTokenizer.from_pretrained(tokenizer).decode
    names = {
        split: {
            text.split(":")[0]
            for row in samples(tmp_path / "out", "in", split)
            for text in decode(row).split("</s>")[1:]
            if ":" in text
        }
        for split in ("train", "eval")
    }
    assert names["train"] and not names["train"] & names["eval"]


def test_a_lone_document_is_for_training_whatever_its_rank(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.txt").write_text("house tree " * 40)
    settings = PackSettings(16, eval_fraction=0.999999)
    manifest = prepare([tmp_path / "in"], tokenizer, tmp_path / "out", settings, processes=1).manifest
    assert set(manifest.domains["in"]) == {"train"}


def test_too_many_bad_records_stop_the_job_and_leave_nothing(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    good = [json.dumps({"text": "fine words " * 20})] * 60
    (tmp_path / "in" / "x.jsonl").write_text("\n".join([*good, "{bad"]))
    settings = PackSettings(8, eval_fraction=0)
    with pytest.raises(UserError, match=r"1 of 61 records can't be used.*x.jsonl:61"):
        prepare([tmp_path / "in"], tokenizer, tmp_path / "out", settings, processes=1)
    assert {p.name for p in tmp_path.iterdir()} == {"in"}
    summary = prepare([tmp_path / "in"], tokenizer, tmp_path / "out", PackSettings(8, 0, max_bad=0.1), processes=1)
    assert [record.place.rpartition("/")[2] for record in summary.bad] == ["x.jsonl:61"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 1}, "choose 2 or more"),
        ({"sequence_length": 100_000}, "too little text for one training sample"),
        ({"eval_fraction": 1.5}, "must lie in"),
        ({"max_bad": -1}, "must lie in"),
        ({"seed": -1}, "must be zero or positive"),
        ({"seed": 10**70}, r"below 2\^63"),
    ],
)
def test_settings_that_cannot_work(
    source: Path, tokenizer: Path, tmp_path: Path, changes: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare([source], tokenizer, tmp_path / "out", PackSettings(**{"sequence_length": 16, **changes}), processes=1)
    assert not (tmp_path / "out").exists()


def test_an_output_never_replaces_what_is_read(source: Path, tokenizer: Path) -> None:
    for out in (source, source.parent, source / "a", source / "b" / "x.jsonl", tokenizer, tokenizer.parent):
        with pytest.raises(UserError, match="would delete the input"):
            prepare([source], tokenizer, out, PackSettings(16), processes=1, overwrite=True)
    assert len(list(source.rglob("x.jsonl"))) == 2 and (tokenizer / "tokenizer.json").exists()


def test_a_domain_of_another_script(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    prepare([source], tokenizer, tmp_path / "out", PackSettings(16), fields=Fields(domain="日本"), processes=1)
    assert samples(tmp_path / "out", "日本", "train")


def test_other_mistakes(source: Path, tokenizer: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--overwrite"):
        prepare([source], tokenizer, data, PackSettings(16))
    with pytest.raises(UserError, match="no usable tokenizer"):
        prepare([source], tmp_path, tmp_path / "out", PackSettings(16))
    with pytest.raises(UserError, match="no field|can't be used"):
        prepare([source], tokenizer, tmp_path / "out", PackSettings(16), fields=Fields(text="body"), processes=1)
    with pytest.raises(UserError, match="choose 1 or more"):
        prepare([source], tokenizer, tmp_path / "out", PackSettings(16), processes=0)
    with pytest.raises(UserError, match="a domain can't be named 'manifest.json'"):
        prepare([source], tokenizer, tmp_path / "out", PackSettings(16), fields=Fields(domain="manifest.json"))
    assert DataManifest.load(data).sequence_length == 32
    assert not list(tmp_path.iterdir())
