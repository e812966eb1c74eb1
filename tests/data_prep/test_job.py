"""Jobs that are killed, that are spread over machines, and data that divide without sharing a document."""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer

from data_prep.builtin import build_corpus, reference
from data_prep.conversations import ConversationSettings
from data_prep.describe import lacking, table
from data_prep.job import PackingJob
from data_prep.join import Encoded
from data_prep.pack import merge_prepared, prepare
from data_prep.packer import Arrival, Layout, Packer
from data_prep.recipe import PackSettings
from data_prep.tokenizer import train_tokenizer
from llmprune.data.dataset import MixedDataset
from llmprune.data.format import DataManifest
from llmprune.data.prepared import PreparedData
from llmprune.data.records import Input
from llmprune.data.sources import Document, Fields, documents
from llmprune.utils.errors import UserError
from llmprune.utils.outputs import put_in_place

LENGTH = 32


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Six files in two domains, 40 documents each, all different but for one that both domains have."""
    draw = random.Random(1)
    for number in range(6):
        folder = tmp_path / "in" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        texts = [f"{number}.{n} " + " ".join(draw.choices(["tree", "house", "bird"], k=8 + n % 9)) for n in range(40)]
        lines = [json.dumps({"text": text}) for text in [*texts, "the same everywhere " * 5]]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    return tmp_path / "in"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tokens(data: Path, domain: str, split: str) -> list[int]:
    reader = PreparedData(data).reader(domain, split)
    places = [(shard, i) for shard, size in enumerate(reader.shard_sizes) for i in range(size)]
    return [token for place in places for token in reader.read(*place)["input_ids"].tolist()]


def texts(data: Path, *, split: str, domains: Sequence[str] = ("a", "b")) -> list[str]:
    """The documents of a split, but for the last ones of each domain."""
    prepared = PreparedData(data)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer)
    there = [domain for domain in domains if domain in prepared.domains_with(split)]
    return [text for domain in there for text in tokenizer.decode(tokens(data, domain, split)).split("</s>")[:-1]]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches, shards and intervals so small that all of them are crossed."""
    monkeypatch.setattr("data_prep.reading._BATCH_CHARACTERS", 600)
    monkeypatch.setattr("data_prep.pack._SAVE_SECONDS", 0.0)
    monkeypatch.setattr("data_prep.shards._SHARD_BYTES", 5 * LENGTH * 2)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_stopped_job_goes_on_to_the_same_files(
    many: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, compression: str | None
) -> None:
    """Stopped at three random documents, between and after times that it wrote itself down."""
    settings = PackSettings(LENGTH, eval_fraction=0.1, compression=compression)
    prepare([many], data / "tokenizer", tmp_path / "whole", settings, processes=1)
    draw = random.Random(seed)

    def stopping(*arguments: Any, **options: Any) -> Iterator[Any]:
        for number, item in enumerate(documents(*arguments, **options)):
            if number == stop_at:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr("data_prep.reading.documents", stopping)
    for _ in range(3):
        stop_at = draw.randrange(10, 90)
        with pytest.raises(KeyboardInterrupt):
            prepare([many], data / "tokenizer", tmp_path / "out", settings, processes=1)
        assert (tmp_path / ".out.partial").is_dir() and not (tmp_path / "out").exists()
    stop_at = -1
    prepare([many], data / "tokenizer", tmp_path / "out", settings, processes=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "whole"}


KILLED = """
import os, signal, sys
from data_prep import pack, reading, recipe
from data_prep.job import PackingJob

reading._BATCH_CHARACTERS, pack._SAVE_SECONDS = 600, 0.0
after, save, saved = int(sys.argv[4]), PackingJob.save, 0

def killed(self, packers, progress):
    global saved
    saved += 1
    if saved > after:  # in the midst of writing itself down
        next(iter(packers.values())).save(self.folder / "state-half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, packers, progress)

PackingJob.save = killed
pack.prepare([sys.argv[1]], sys.argv[2], sys.argv[3], recipe.PackSettings(32, eval_fraction=0.1), processes=2)
"""


def test_a_job_killed_outright_goes_on(many: Path, data: Path, tmp_path: Path) -> None:
    prepare([many], data / "tokenizer", tmp_path / "whole", PackSettings(LENGTH, eval_fraction=0.1), processes=1)
    arguments = [str(many), str(data / "tokenizer"), str(tmp_path / "out")]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments, "7"], timeout=120)
    assert killed.returncode == -signal.SIGKILL and PackingJob(tmp_path / ".out.partial").has_progress
    prepare([many], data / "tokenizer", tmp_path / "out", PackSettings(LENGTH, eval_fraction=0.1), processes=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_came_after_the_last_save_is_forgotten(tmp_path: Path) -> None:
    """Else a text that a later domain shares could not move to the evaluation split."""

    def documents_of(domain: str, ranks: Sequence[int]) -> list[Arrival]:
        content = [Encoded(np.arange(10, dtype=np.uint32) + rank, np.ones(10, bool)) for rank in ranks]
        return [Arrival(domain, rank << 61, one) for rank, one in zip(ranks, content, strict=True)]

    layout = Layout(8, "uint16", eval_fraction=1e-3, settle=True)
    stopped = Packer(tmp_path / "out", layout, tmp_path / "notes")
    stopped.add(documents_of("a", range(1, 6)))
    stopped.save(tmp_path / "state")
    stopped.add(documents_of("b", range(1, 3)))
    resumed = Packer(tmp_path / "out", layout, tmp_path / "notes")
    resumed.resume(tmp_path / "state")
    resumed.finish()
    alone = Packer(tmp_path / "alone", layout, tmp_path / "notes of alone")
    alone.add(documents_of("a", range(1, 6)))
    alone.finish()
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


@pytest.mark.usefixtures("small")
def test_a_stopped_job_goes_on_with_its_own_settings_only(
    many: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(*arguments: Any, **options: Any) -> Iterator[Any]:
        for number, item in enumerate(documents(*arguments, **options)):
            if number == 60:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr("data_prep.reading.documents", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare([many], data / "tokenizer", tmp_path / "out", PackSettings(LENGTH), processes=1)
    with pytest.raises(UserError, match=r"\.out\.partial is what is left of a job with other settings"):
        prepare([many], data / "tokenizer", tmp_path / "out", PackSettings(LENGTH, seed=3), processes=1)
    os.utime(many / "a" / "0.jsonl", (1, 1))
    with pytest.raises(UserError, match="other settings or inputs"):
        prepare([many], data / "tokenizer", tmp_path / "out", PackSettings(LENGTH), processes=1)


@pytest.mark.usefixtures("small")
def test_parts_merge_into_all_documents(many: Path, data: Path, tmp_path: Path) -> None:
    """Every token but those of the last, incomplete samples; the evaluation split is that of the whole."""
    settings = PackSettings(LENGTH, eval_fraction=0.2)
    whole = prepare([many], data / "tokenizer", tmp_path / "whole", settings, processes=1).manifest
    parts = [tmp_path / f"part{number}" for number in range(3)]
    for number, part in enumerate(parts):
        prepare([many], data / "tokenizer", part, settings, shard=(number, 3), processes=1)
        with pytest.raises(UserError, match="part of prepared data: join"):
            DataManifest.load(part)
    merged = merge_prepared([parts[2], parts[0], parts[1]], tmp_path / "out").manifest
    for domain in "ab":
        for split in ("train", "eval"):
            assert merged.domains[domain][split].documents == whole.domains[domain][split].documents
            assert merged.domains[domain][split].samples == whole.domains[domain][split].samples
            there, here = (Counter(tokens(tmp_path / name, domain, split)) for name in ("whole", "out"))
            assert (there - here).total() <= LENGTH  # the ends of streams
    assert all(part.exists() for part in parts)
    with pytest.raises(UserError, match="of 3 parts these are missing: 1"):
        merge_prepared([parts[0], parts[2]], tmp_path / "again")
    with pytest.raises(UserError, match="are the same part, 0 of 3"):
        merge_prepared([parts[0], parts[0]], tmp_path / "again")
    prepare([many], data / "tokenizer", tmp_path / "other", PackSettings(16), shard=(1, 3), processes=1)
    with pytest.raises(UserError, match="different settings"):
        merge_prepared([parts[0], tmp_path / "other", parts[2]], tmp_path / "again")
    with pytest.raises(UserError, match="fewer files than parts"):
        prepare([many], data / "tokenizer", tmp_path / "more", settings, shard=(6, 7), processes=1)


def test_documents_for_evaluation_are_left_out_of_training(many: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    taken = (many / "a" / "2.jsonl").read_text().splitlines()[:5]
    (tmp_path / "held" / "x.jsonl").write_text("\n".join([*taken, json.dumps({"text": "only here " * 30})]))
    made = prepare(
        [many], data / "tokenizer", tmp_path / "out", PackSettings(16), eval_inputs=[tmp_path / "held"], processes=1
    )
    counts = made.manifest.domains["a"]["train"]
    assert (counts.documents, counts.duplicates) == (3 * 41 - 5, 5)
    assert set(made.manifest.domains["held"]) == {"eval"} and "eval" not in made.manifest.domains["a"]
    held = {json.loads(line)["text"] for line in taken}
    assert held & set(texts(tmp_path / "out", split="eval", domains=["held"]))
    assert not held & set(texts(tmp_path / "out", split="train"))


def test_a_text_in_two_domains_is_never_on_both_sides(data: Path, tmp_path: Path) -> None:
    """The small domain must hold something out; what the large one trains on already it may not."""
    small = [f"{n} " + "a small domain " * 3 for n in range(12)]
    for domain, found in (("big", [*small[:11], *(f"{n} large " * 9 for n in range(80))]), ("small", small)):
        (tmp_path / "in" / domain).mkdir(parents=True)
        lines = "\n".join(json.dumps({"text": text}) for text in found)
        (tmp_path / "in" / domain / "x.jsonl").write_text(lines)
    settings = PackSettings(16, eval_fraction=1e-9)
    prepare([tmp_path / "in"], data / "tokenizer", tmp_path / "out", settings, processes=1)
    domains = ("big", "small")
    train = set(texts(tmp_path / "out", split="train", domains=domains))
    evaluated = set(texts(tmp_path / "out", split="eval", domains=domains))
    assert train and not train & evaluated


def test_sets_share_no_document(many: Path, data: Path, tmp_path: Path) -> None:
    sets = {"calibration": 0.2, "pruning": 0.3, "continuation": 0.5}
    made = prepare([many], data / "tokenizer", tmp_path / "out", PackSettings(LENGTH, 0.1, sets=sets), processes=1)
    found = {name: set(texts(tmp_path / "out" / name, split="train")) for name in sets}
    evaluated = [set(texts(tmp_path / "out" / name, split="eval")) for name in sets]
    assert evaluated[0] == evaluated[1] == evaluated[2] != set()
    names = list(sets)
    for i, name in enumerate(names):
        assert all(not found[name] & found[other] for other in names[i + 1 :]) and not found[name] & evaluated[0]
    counts = {n: sum(d["train"].documents for d in made.manifests[n].domains.values()) for n in sets}
    held = sum(d["eval"].documents for d in made.manifests["pruning"].domains.values())
    assert sum(counts.values()) + held == 6 * 41
    for name, share in sets.items():
        assert counts[name] / sum(counts.values()) == pytest.approx(share, abs=0.1)
    with pytest.raises(UserError, match="several prepared sets: name one of them, such as .*/calibration"):
        PreparedData(tmp_path / "out")
    with pytest.raises(UserError, match="take 1.1 of the documents"):
        prepare([many], data / "tokenizer", tmp_path / "x", PackSettings(16, sets={"a": 0.6, "b": 0.5}))
    with pytest.raises(UserError, match="a, A must not differ in upper and lower case alone"):
        prepare([many], data / "tokenizer", tmp_path / "x", PackSettings(16, sets={"a": 0.6, "A": 0.4}))
    with pytest.raises(UserError, match="a domain can't be named 'Tokenizer'"):
        prepare([many], data / "tokenizer", tmp_path / "x", PackSettings(16), fields=Fields(domain="Tokenizer"))


def test_compressed_data_give_the_same_samples(many: Path, data: Path, tmp_path: Path) -> None:
    for name, compression in (("plain", None), ("packed", "zstd:7")):
        prepare([many], data / "tokenizer", tmp_path / name, PackSettings(LENGTH, compression=compression), processes=1)
    assert not list((tmp_path / "packed").rglob("*.mds")) and list((tmp_path / "packed").rglob("*.mds.zstd"))
    assert texts(tmp_path / "packed", split="train") == texts(tmp_path / "plain", split="train")
    with pytest.raises(UserError, match="no compression 'rar'"):
        prepare([many], data / "tokenizer", tmp_path / "x", PackSettings(LENGTH, compression="rar"))


def test_samples_know_where_documents_begin(many: Path, data: Path, tmp_path: Path) -> None:
    prepare([many], data / "tokenizer", tmp_path / "out", PackSettings(LENGTH, eval_fraction=0), processes=1)
    eos = AutoTokenizer.from_pretrained(data / "tokenizer").eos_token_id
    reader = PreparedData(tmp_path / "out").reader("a", "train", boundaries=True)
    for index in range(reader.shard_sizes[0]):
        sample = reader.read(0, index)
        tokens, positions = sample["input_ids"].tolist(), sample["position_ids"].tolist()
        expected, place = [], 0
        for token in tokens:
            expected.append(place)
            place = 0 if token == eos else place + 1
        assert positions == expected
        labels = np.where(np.array(positions) == 0, -100, tokens)
        assert sample["labels"].tolist() == labels.tolist()


def test_only_one_process_writes_an_output(
    many: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*arguments: Any, **options: Any) -> Iterator[Document]:
        with pytest.raises(UserError, match="this process is writing"):
            prepare([many], data / "tokenizer", tmp_path / "out", PackSettings(LENGTH), processes=1)
        yield from ()

    monkeypatch.setattr("data_prep.reading.documents", again)
    with pytest.raises(UserError, match="hold no text"):
        prepare([many], data / "tokenizer", tmp_path / "out", PackSettings(LENGTH), processes=1)


def test_inputs_know_their_fields(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\nbad\n{"text": "three"}\n')
    found = list(documents([Input(str(tmp_path / "x.jsonl"), "a", 60)], Fields(), after=(0, 1)))
    assert [item.text for item in found if isinstance(item, Document)] == ["two", "three"]


@pytest.mark.usefixtures("small")
def test_bad_records_are_counted_once_however_often_a_job_stops(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.reading.EARLY_STOP", 3)  # batches end after a few bad records
    monkeypatch.setattr("data_prep.pack.EARLY_STOP", 1000)
    lines = [json.dumps({"text": f"{n} fine words " * 4}) if n % 3 else "{bad" for n in range(60)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.jsonl").write_text("\n".join(lines))

    def stopping(*arguments: Any, **options: Any) -> Iterator[Any]:
        for number, item in enumerate(documents(*arguments, **options)):
            if number == 25:
                raise KeyboardInterrupt
            yield item

    settings = PackSettings(LENGTH, eval_fraction=0, max_bad=1.0)
    monkeypatch.setattr("data_prep.reading.documents", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare([tmp_path / "in"], data / "tokenizer", tmp_path / "out", settings, processes=1)
    monkeypatch.setattr("data_prep.reading.documents", documents)
    made = prepare([tmp_path / "in"], data / "tokenizer", tmp_path / "out", settings, processes=1)
    places = [record.place.rpartition(":")[2] for record in made.bad]
    assert places == [str(n + 1) for n in range(60) if not n % 3]


@pytest.mark.usefixtures("small")
def test_parts_of_other_jobs_are_refused(many: Path, data: Path, tmp_path: Path) -> None:
    """Whichever texts one of them holds out, or which files one of them does not know."""
    settings = PackSettings(LENGTH)
    held = tmp_path / "held"
    held.mkdir()
    (held / "x.jsonl").write_text((many / "a" / "0.jsonl").read_text())
    prepare([many], data / "tokenizer", tmp_path / "p0", settings, shard=(0, 2), processes=1)
    prepare([many], data / "tokenizer", tmp_path / "e1", settings, shard=(1, 2), eval_inputs=[held], processes=1)
    (many / "a" / "more.txt").write_text("house " * 200)
    prepare([many], data / "tokenizer", tmp_path / "p1", settings, shard=(1, 2), processes=1)
    for other in ("e1", "p1"):
        with pytest.raises(UserError, match="different settings, tokenizers or inputs"):
            merge_prepared([tmp_path / "p0", tmp_path / other], tmp_path / "out")
    progress = tmp_path / "p1" / "progress.json"
    progress.write_text(progress.read_text().replace('"complete": true', '"complete": false'))
    with pytest.raises(UserError, match="p1 was stopped before its end"):
        merge_prepared([tmp_path / "p0", tmp_path / "p1"], tmp_path / "out")


@pytest.mark.usefixtures("small")
def test_names_that_clash_do_so_across_parts_and_stops(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``p q`` and ``p/q`` would both be the folder p_q."""
    source, settings = tmp_path / "in", PackSettings(LENGTH)
    source.mkdir()
    for number, domain in enumerate(("p q", "p/q")):
        lines = [json.dumps({"text": f"{number} {n} a house " * 5, "of": domain}) for n in range(30)]
        (source / f"{number}.jsonl").write_text("\n".join(lines))
    fields = Fields(domain_field="of")
    for number in range(2):
        part = tmp_path / f"p{number}"
        prepare(
            [source],
            data / "tokenizer",
            part,
            PackSettings(LENGTH),
            fields=fields,
            shard=(number, 2),
            processes=1,
        )
    with pytest.raises(UserError, match=r"'p q' and 'p/q' would both be named 'p_q'"):
        merge_prepared([tmp_path / "p0", tmp_path / "p1"], tmp_path / "out")

    def stopping(*arguments: Any, **options: Any) -> Iterator[Any]:
        for number, item in enumerate(documents(*arguments, **options)):
            if number == 29:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr("data_prep.reading.documents", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare([source], data / "tokenizer", tmp_path / "out", settings, fields=fields, processes=1)
    monkeypatch.setattr("data_prep.reading.documents", documents)
    with pytest.raises(UserError, match=r"would both be named 'p_q'"):
        prepare([source], data / "tokenizer", tmp_path / "out", settings, fields=fields, processes=1)


@pytest.mark.usefixtures("small")
def test_a_domain_without_a_sample_stays_in_the_counts(many: Path, data: Path, tmp_path: Path) -> None:
    """Be it too short, or kept for evaluation altogether."""
    (tmp_path / "held").mkdir()
    for number in (0, 2, 4):  # all of domain a
        (tmp_path / "held" / f"{number}.jsonl").write_text((many / "a" / f"{number}.jsonl").read_text())
    (many / "c").mkdir()
    (many / "c" / "x.txt").write_text("a tree")
    made = prepare(
        [many], data / "tokenizer", tmp_path / "out", PackSettings(LENGTH), eval_inputs=[tmp_path / "held"], processes=1
    ).manifest
    assert (made.domains["a"]["train"].duplicates, made.samples("a", "train")) == (123, 0)
    assert (made.domains["c"]["train"].documents, made.samples("c", "train")) == (1, 0)
    said = lacking(made)
    assert [line.split(maxsplit=1)[1] for line in said[:1] + said[2:]] == [
        "has no training sample: all its texts are kept for evaluation",
        "has no training sample: its 1 documents do not fill one",
    ]
    stream = MixedDataset(PreparedData(tmp_path / "out"), global_batch_size=4, weights=None, seed=1)
    assert stream.weights == {"a": 0.0, "b": 1.0, "c": 0.0, "held": 0.0}


@pytest.mark.usefixtures("small")
def test_a_job_that_can_come_to_nothing_leaves_nothing(many: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too little text"):
        prepare([many], data / "tokenizer", tmp_path / "out", PackSettings(1 << 20), processes=1)
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_a_text_without_tokens_is_named(data: Path, tmp_path: Path) -> None:
    changed = AutoTokenizer.from_pretrained(data / "tokenizer")
    changed.backend_tokenizer.normalizer = normalizers.Replace("gone", "")
    changed.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "x.jsonl").write_text('{"text": "gone"}\n' + '{"text": "one two three four"}\n' * 30)
    settings = PackSettings(16, eos=False, max_bad=0.5)
    made = prepare([tmp_path / "x.jsonl"], tmp_path / "tokenizer", tmp_path / "out", settings, processes=1)
    assert [record.reason for record in made.bad] == ["the tokenizer leaves nothing of it"]


@pytest.mark.usefixtures("small")
def test_empty_documents_are_counted(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By domain and split, in parts and after stops too; and they are no bad records."""
    for domain in ("few", "void"):
        (tmp_path / "in" / domain).mkdir(parents=True)
    empty = ("", " \n\t", "\u00a0")
    texts = [empty[n % 9 // 3] if n % 3 == 0 else f"{n} a house and a tree " * 3 for n in range(99)]
    (tmp_path / "in" / "few" / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for name in "ab":
        (tmp_path / "in" / "void" / f"{name}.txt").write_text(" \n")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "y.jsonl").write_text('{"text": "kept for evaluation, all of it"}\n{"text": ""}\n' * 9)

    def prepared(out: str, **options: Any) -> DataManifest:
        held = [tmp_path / "held"]
        settings = PackSettings(LENGTH, max_bad=0)
        made = prepare(
            [tmp_path / "in"], data / "tokenizer", tmp_path / out, settings, eval_inputs=held, processes=1, **options
        )
        assert not made.bad
        return made.manifest

    def counted(manifest: DataManifest) -> list[int]:
        domains = manifest.domains
        return [domains["few"]["train"].empty, domains["void"]["train"].empty, domains["held"]["eval"].empty]

    whole = prepared("whole")
    assert counted(whole) == [33, 2, 9] and whole.domains["few"]["train"].documents == 66
    assert lacking(whole)[0] == "44 empty documents are left out"
    assert "has no training sample: its 2 documents are empty" in lacking(whole)[-1]
    assert table(whole)[1].split()[-1] == "33"
    assert DataManifest.load(tmp_path / "whole") == whole

    def stopping(*arguments: Any, **options: Any) -> Iterator[Any]:
        for number, item in enumerate(documents(*arguments, **options)):
            if number == 70:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr("data_prep.reading.documents", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepared("out")
    monkeypatch.setattr("data_prep.reading.documents", documents)
    assert prepared("out") == whole
    for number in range(2):
        settings = PackSettings(LENGTH)
        prepare(
            [tmp_path / "in"], data / "tokenizer", tmp_path / f"p{number}", settings, shard=(number, 2), processes=1
        )
    merged = merge_prepared([tmp_path / "p0", tmp_path / "p1"], tmp_path / "merged").manifest
    assert [merged.domains[domain]["train"].empty for domain in ("few", "void")] == [33, 2]
    with pytest.raises(UserError, match="the inputs hold no text"):
        prepare([tmp_path / "in" / "void"], data / "tokenizer", tmp_path / "none", PackSettings(LENGTH), processes=1)


@pytest.mark.parametrize("command", ["tokenizer", "corpus", "merge", "conversations"])
def test_of_two_writers_of_an_output_one_is_told(
    many: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The second comes while the first is at its last step."""
    out = tmp_path / "out"
    monkeypatch.setattr("data_prep.builtin.DOMAINS", {"reference": reference})
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"prompt": "one two", "response": "three four five six"}\n' * 30)
    if command == "merge":
        prepare([many], data / "tokenizer", tmp_path / "part", PackSettings(LENGTH), shard=(0, 1), processes=1)
    talk = PackSettings(LENGTH, eval_fraction=0, conversations=ConversationSettings("none"))
    calls: dict[str, Callable[[], Any]] = {
        "tokenizer": lambda: train_tokenizer([many], out, vocab_size=280),
        "corpus": lambda: build_corpus(out, megabytes=0.01),
        "merge": lambda: merge_prepared([tmp_path / "part"], out),
        "conversations": lambda: prepare([chats], data / "tokenizer", out, talk, processes=1),
    }
    told: list[str] = []

    def during(place: Callable[..., Any]) -> Callable[..., Any]:
        def placed(*arguments: Any, **options: Any) -> None:
            if not told:
                told.append("")
                with pytest.raises(UserError, match="^this process is writing") as error:
                    calls[command]()
                told.append(str(error.value))
            place(*arguments, **options)

        return placed

    monkeypatch.setattr("llmprune.utils.outputs.put_in_place", during(put_in_place))
    monkeypatch.setattr("data_prep.pack.put_in_place", during(put_in_place))
    calls[command]()
    assert str(out) in told[1] and out.is_dir()
    assert not list(tmp_path.glob(".out*"))
    with pytest.raises(UserError, match="exists already"):
        calls[command]()
