"""Perplexity against loops that know nothing of batches, strides or segments."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.data.prepared import PreparedData
from llmprune.evaluation.losses import evaluate_losses
from llmprune.evaluation.perplexity import PerplexityConfig, check_streams, measure_perplexity, read_streams, segments
from llmprune.models.loading import load_tokenizer
from llmprune.utils.errors import UserError


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
    trained: PreTrainedModel, text: Tensor, segment: int, stride: int | None, mode: str
) -> None:
    text = text[:130]
    stream = ([0] if mode == "once" else []) + text.tolist()
    wanted, count = naive(trained, stream, segment, stride or segment, mode == "each")
    found = [
        measure_perplexity(trained, text, PerplexityConfig(segment, stride), mode, bos=0, batch_size=size)
        for size in (1, 4, 64)
    ]
    assert [f.tokens for f in found] == [count] * 3
    assert [f.value for f in found] == pytest.approx([wanted] * 3, rel=1e-5)


def test_exp_of_the_mean_not_the_mean_of_exps(trained: PreTrainedModel, text: Tensor) -> None:
    whole = measure_perplexity(trained, text, PerplexityConfig(64), "each", bos=0, batch_size=2)
    parts = [
        measure_perplexity(trained, part, PerplexityConfig(64), "each", bos=0, batch_size=2) for part in text.split(64)
    ]
    assert whole.loss == pytest.approx(sum(p.loss * p.tokens for p in parts) / sum(p.tokens for p in parts), rel=1e-6)
    assert whole.tokens == len(text)  # each token is counted, and nothing else


def test_prepared_data_cut_at_their_samples_give_the_losses_of_the_domains(
    trained: PreTrainedModel, data: Path
) -> None:
    losses = evaluate_losses(trained, PreparedData(data))
    config = PerplexityConfig(segment=32)
    streams = read_streams([str(data)], load_tokenizer(data / "tokenizer"), config)
    assert set(streams) == {"mds/letters", "mds/numbers"}
    for name, tokens in streams.items():
        found = measure_perplexity(trained, tokens, config, "none", bos=None, batch_size=3)
        assert found.loss == pytest.approx(losses.domains[name.removeprefix("mds/")], rel=1e-5)


def test_segments_reach_every_token_once() -> None:
    for length in range(1, 40):
        for stride in range(1, 12):
            scored = [t for part, skip in segments(torch.arange(length), 11, stride) for t in part[skip:].tolist()]
            assert scored == list(range(length))


@pytest.mark.parametrize(
    ("config", "bos", "message"),
    [
        (PerplexityConfig(128), 0, "segments of 128 tokens and the BOS before each are too long: the model takes 128"),
        (PerplexityConfig(129, bos=["once"]), 0, "segments of 129 tokens are too long"),
        (PerplexityConfig(64), None, "no BOS"),
    ],
)
def test_impossible(
    trained: PreTrainedModel, text: Tensor, config: PerplexityConfig, bos: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_streams({"text": text}, config, trained.config, bos)


def test_tokens_that_the_model_lacks(trained: PreTrainedModel) -> None:
    with pytest.raises(UserError, match="has the token 5000, but the model's vocabulary ends at"):
        check_streams({"text": torch.tensor([1, 5000])}, PerplexityConfig(8), trained.config, 0)


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
        (PerplexityConfig(1), "at least 2"),
        (PerplexityConfig(64, 65), "stride"),
        (PerplexityConfig(64, 0), "stride"),
        (PerplexityConfig(64, bos=["ones"]), "did you mean 'once'"),
        (PerplexityConfig(64, bos=[]), "at least one BOS mode"),
        (PerplexityConfig(samples_per_domain=0), "must be positive"),
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
