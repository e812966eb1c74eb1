"""Perplexity against loops that know nothing of batches, strides or segments."""

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.data.prepared import PreparedData
from llmprune.evaluation.losses import evaluate_losses
from llmprune.evaluation.perplexity import (
    Segmentation,
    adds_bos,
    check_streams,
    measure_perplexity,
    read_streams,
    segmentations,
    segments,
)
from llmprune.evaluation.settings import BosMode, PerplexityConfig
from llmprune.models.loading import load_tokenizer
from llmprune.utils.errors import UserError
from tests.conftest import tiny_config


@pytest.fixture
def text(trained_folder: Path, corpus: Path) -> Tensor:
    ids = load_tokenizer(trained_folder)((corpus / "numbers/part.jsonl").read_text()[:1500])["input_ids"]
    return torch.tensor(ids[:333])


@torch.no_grad()
def likelihood(model: PreTrainedModel, context: list[int], token: int) -> float:
    return model(torch.tensor([context])).logits[0, -1].double().log_softmax(-1)[token].item()


def naive(model: PreTrainedModel, stream: list[int], segment: int, stride: int, each: bool) -> tuple[float, int]:
    """Every token is predicted from what stands before it in the first segment that has it."""
    total, count, done = 0.0, 0, set()
    for start in range(0, len(stream), stride):
        for place in range(start, min(start + segment, len(stream))):
            context = ([0] if each else []) + stream[start:place]
            if context and place not in done:
                total, count = total - likelihood(model, context, stream[place]), count + 1
            done.add(place)
        if start + segment >= len(stream):
            break
    return math.exp(total / count), count


@pytest.mark.parametrize("mode", ["none", "once", "each"])
@pytest.mark.parametrize(("segment", "stride"), [(20, None), (20, 7), (50, 50), (100, 1)])
def test_against_a_naive_loop(
    trained: PreTrainedModel, text: Tensor, segment: int, stride: int | None, mode: BosMode
) -> None:
    text = text[:130]
    stream = ([0] if mode == "once" else []) + text.tolist()
    wanted, count = naive(trained, stream, segment, stride or segment, mode == "each")
    found = [
        measure_perplexity(trained, text, Segmentation(segment, stride or segment), mode, bos=0, batch_size=size)
        for size in (1, 4, 64)
    ]
    assert [f.tokens for f in found] == [count] * 3
    assert [f.value for f in found] == pytest.approx([wanted] * 3, rel=1e-5)


def test_exp_of_the_mean_not_the_mean_of_exps(trained: PreTrainedModel, text: Tensor) -> None:
    whole = measure_perplexity(trained, text, Segmentation(64, 64), "each", bos=0, batch_size=2)
    parts = [
        measure_perplexity(trained, part, Segmentation(64, 64), "each", bos=0, batch_size=2) for part in text.split(64)
    ]
    assert whole.loss == pytest.approx(sum(p.loss * p.tokens for p in parts) / sum(p.tokens for p in parts), rel=1e-6)
    assert whole.tokens == len(text)  # each token is counted, and nothing else


def test_prepared_data_cut_at_their_samples_give_the_losses_of_the_domains(
    trained: PreTrainedModel, data: Path
) -> None:
    losses = evaluate_losses(trained, PreparedData(data))
    streams = read_streams([str(data)], load_tokenizer(data / "tokenizer"), PerplexityConfig())
    assert set(streams) == {"mds/letters", "mds/numbers"}
    for name, tokens in streams.items():
        found = measure_perplexity(trained, tokens, Segmentation(32, 32), "none", bos=None, batch_size=3)
        assert found.loss == pytest.approx(losses.domains[name.removeprefix("mds/")], rel=1e-5)


def test_segments_reach_every_token_once() -> None:
    for length in range(1, 40):
        for stride in range(1, 12):
            parts = segments(torch.arange(length), Segmentation(11, stride))
            scored = [t for part, skip in parts for t in part[skip:].tolist()]
            assert scored == list(range(length))


def test_like_shortened_is_a_loop_over_the_whole_segments_of_the_joined_lines(
    trained: PreTrainedModel, trained_folder: Path, tmp_path: Path
) -> None:
    """The rows of WikiText-2 (raw) are the lines with their ends, and empty texts; joined, cut and averaged by hand."""
    tokenizer = load_tokenizer(trained_folder)
    (tmp_path / "wiki.txt").write_bytes(b" \n = One = \r\n \n one two three four\nfive six seven one two three " * 3)
    rows = ["", " = One = \n", "", " one two three four\n"]
    rows += ["five six seven one two three  \n", *rows[1:]] * 2 + ["five six seven one two three "]
    (tmp_path / "wiki.jsonl").write_text("".join(json.dumps({"sentence": row}) + "\n" for row in rows))
    config = PerplexityConfig(20, like="shortened", text_field="sentence")
    ids = tokenizer("\n\n".join(rows), add_special_tokens=False)["input_ids"]
    assert len(ids) % 20 and (len(ids) + 1) % 20  # there is a rest in both modes
    for name in ("wiki.txt", "wiki.jsonl"):
        (found,) = read_streams([str(tmp_path / name)], tokenizer, config).values()
        assert found.tolist() == ids
    (segmentation,) = segmentations(config, [(trained.config, tokenizer)])
    assert tuple(segmentation.bos) == ("once", "each")
    for mode in segmentation.bos:
        stream = ([0] if mode == "once" else []) + ids
        losses: list[float] = []
        for start in range(0, len(stream) - 19, 20):
            part = ([0] if mode == "each" else []) + stream[start : start + 20]
            with torch.no_grad():
                logits = trained(torch.tensor([part])).logits[0].double()
            losses += [-logits[place - 1].log_softmax(-1)[part[place]].item() for place in range(1, len(part))]
        measured = measure_perplexity(trained, found, segmentation, mode, bos=0, batch_size=3)
        assert measured.tokens == len(losses)
        assert measured.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_text_is_read_as_it_is(trained_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(trained_folder)
    (tmp_path / "a.txt").write_text("one\n\n two\n")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    paths = [str(tmp_path / name) for name in ("a.txt", "b.jsonl")]
    streams = read_streams(paths, tokenizer, PerplexityConfig())
    assert tokenizer.decode(streams["a"]) == "one\n\n two\n"
    assert tokenizer.decode(streams["b"]) == f"one{tokenizer.eos_token}two"


def test_the_first_tokens_of_each_stream(trained_folder: Path, data: Path, corpus: Path) -> None:
    tokenizer, paths = load_tokenizer(trained_folder), [str(data), str(corpus / "numbers/part.jsonl")]
    whole = read_streams(paths, tokenizer, PerplexityConfig())
    first = read_streams(paths, tokenizer, PerplexityConfig(tokens=70))
    assert {name: tokens.tolist() for name, tokens in first.items()} == {
        name: tokens[:70].tolist() for name, tokens in whole.items()
    }


def test_the_tokenizer_says_where_a_bos_is(trained: PreTrainedModel, trained_folder: Path) -> None:
    plain, adding = load_tokenizer(trained_folder), load_tokenizer(trained_folder)
    bos = adding.bos_token
    adding._tokenizer.post_processor = TemplateProcessing(f"{bos} $A", special_tokens=[(bos, adding.bos_token_id)])
    ending = load_tokenizer(trained_folder)
    eos = ending.eos_token
    ending._tokenizer.post_processor = TemplateProcessing(f"$A {eos}", special_tokens=[(eos, ending.eos_token_id)])
    assert [adds_bos(tokenizer) for tokenizer in (plain, adding, ending)] == [False, True, False]
    cuts = segmentations(PerplexityConfig(), [(trained.config, tokenizer) for tokenizer in (plain, adding)])
    assert [tuple(cut.bos) for cut in cuts] == [("none",), ("once",)]


@pytest.mark.parametrize(
    ("limits", "config", "length"),
    [
        ([128], PerplexityConfig(), 128),
        ([128, 96, None], PerplexityConfig(), 96),
        ([96, 128], PerplexityConfig(bos=["none", "each"]), 95),
        ([131072], PerplexityConfig(bos=["each"]), 2048),
        ([None], PerplexityConfig(), 2048),
        ([2048], PerplexityConfig(like="shortened"), 128),
        ([128], PerplexityConfig(like="shortened"), 127),
        ([128, 96], PerplexityConfig(40, 10), 40),
    ],
)
def test_one_length_fits_all_models(
    trained_folder: Path, limits: list[int | None], config: PerplexityConfig, length: int
) -> None:
    tokenizer = load_tokenizer(trained_folder)
    models = [tiny_config(max_position_embeddings=limit) for limit in limits]
    cuts = segmentations(config, [(model, tokenizer) for model in models])
    assert [(cut.length, cut.stride) for cut in cuts] == [(length, config.stride or length)] * len(limits)
    for model, cut in zip(models, cuts, strict=True):
        check_streams({"text": torch.zeros(3000, dtype=torch.int64)}, cut, model, 0)


def test_a_stride_longer_than_the_models_segment(trained: PreTrainedModel, trained_folder: Path) -> None:
    with pytest.raises(UserError, match="at most the segment's 128 tokens; got 129"):
        segmentations(PerplexityConfig(stride=129), [(trained.config, load_tokenizer(trained_folder))])


@pytest.mark.parametrize(
    ("segmentation", "bos", "message"),
    [
        (Segmentation(128, 128, ["each"]), 0, "segments of 128 tokens and the BOS before each are too long: the model"),
        (Segmentation(129, 129, ["once"]), 0, "segments of 129 tokens are too long: the model takes 128"),
        (Segmentation(64, 64, ["none", "once"]), None, "no BOS"),
        (Segmentation(128, 128, whole=True), 0, "text has 100 tokens, which make no whole segment of 128"),
    ],
)
def test_impossible(
    trained: PreTrainedModel, text: Tensor, segmentation: Segmentation, bos: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_streams({"text": text[:100]}, segmentation, trained.config, bos)


def test_tokens_that_the_model_lacks(trained: PreTrainedModel) -> None:
    with pytest.raises(UserError, match="has the token 5000, but the model's vocabulary ends at"):
        check_streams({"text": torch.tensor([1, 5000])}, Segmentation(8, 8), trained.config, 0)


def test_names_of_streams(data: Path, tmp_path: Path) -> None:
    """Texts of one name in two places are two texts."""
    tokenizer = load_tokenizer(data / "tokenizer")
    for folder, name, text in (("a", "wiki.txt", "one two"), ("b", "wiki.txt", "three four"), ("b", "x.y.txt", "five")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(text)
    paths = [str(tmp_path / place) for place in ("a/wiki.txt", "b/wiki.txt", "b/x.y.txt")]
    streams = read_streams(paths, tokenizer, PerplexityConfig())
    assert list(streams) == [*paths[:2], "x.y"]
    assert [tokenizer.decode(s) for s in streams.values()] == ["one two", "three four", "five"]
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(UserError, match=r"no text in .*empty\.txt"):
        read_streams([str(tmp_path / "empty.txt")], tokenizer, PerplexityConfig())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PerplexityConfig(1), "segment is 1; it must be at least 2"),
        (PerplexityConfig(64, 65), "stride"),
        (PerplexityConfig(64, 0), "stride"),
        (PerplexityConfig(64, bos=["ones"]), "'ones' is unknown; valid: none, once, each"),
        (PerplexityConfig(64, bos=[]), "bos names no mode"),
        (PerplexityConfig(samples_per_domain=0), "samples_per_domain is 0; it must be positive"),
        (PerplexityConfig(tokens=1), "tokens is 1; it must be at least 2"),
        (PerplexityConfig(like="shorter"), "'shorter' is unknown; valid: shortened"),  # type: ignore[arg-type]
    ],
)
def test_bad_settings(config: PerplexityConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.check()


def test_data_of_another_tokenizer(data: Path, tmp_path: Path, corpus: Path) -> None:
    from data_prep.tokenizer import train_tokenizer

    train_tokenizer([corpus], tmp_path / "other", vocab_size=280)
    with pytest.raises(UserError, match="tokenizer did not make the data"):
        read_streams([str(data)], load_tokenizer(tmp_path / "other"), PerplexityConfig())


def test_prepared_data_have_no_lines_to_join(data: Path) -> None:
    with pytest.raises(UserError, match="give the text itself"):
        read_streams([str(data)], load_tokenizer(data / "tokenizer"), PerplexityConfig(like="shortened"))
