"""Ratios of what llmprune does to the same work without it, from interleaved runs in one process.

A ratio's value is the median over pairs of runs; its interval is from the 10th to the 90th percentile.
"""

import argparse
import gc
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from llmprune.files import write_json

ROOT = Path(__file__).resolve().parents[1]
T = TypeVar("T")


@dataclass(frozen=True)
class Ratio:
    """One line of the table.

    Attributes:
        median: of the ratios of all pairs of runs (of memory: the one measured).
        p10: 10th percentile.
        p90: 90th percentile.
        bar: the most it may be.
        work: what was measured, in words.
        least: whether ``bar`` is the least that it may be instead.
    """

    median: float
    p10: float
    p90: float
    bar: float
    work: str
    least: bool = False

    @property
    def met(self) -> bool:
        """Whether the median keeps to the bar."""
        return self.median >= self.bar if self.least else self.median <= self.bar


def interleaved(measured: Callable[[], None], reference: Callable[[], None], runs: int, bar: float, work: str) -> Ratio:
    """Time the two in turn, after one warm-up of each."""
    ratios = []
    for number in range(runs + 1):
        seconds = []
        order = (measured, reference) if number % 2 else (reference, measured)
        for run in order:
            gc.collect()
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        took = dict(zip(order, seconds, strict=True))
        if number:
            ratios.append(took[measured] / took[reference])
    tenths = statistics.quantiles(ratios, n=10, method="inclusive")
    return Ratio(statistics.median(ratios), tenths[0], tenths[-1], bar, work)


def training_step(gated: bool) -> tuple[Callable[[], None], str]:
    """A training step of a Llama, with all gates or with none, and what it is in words."""
    from transformers import LlamaConfig

    from llmprune.families import FAMILIES, target_shape
    from llmprune.gates.attach import attach
    from llmprune.gates.gate_set import GateSet
    from llmprune.gates.goals import ShapeGoal
    from llmprune.models.causal_lm import ComposerCausalLM
    from llmprune.models.loading import new_model

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    target = {"layers": 4, "hidden": 384, "heads": 4, "kv_heads": 2, "intermediate": 1024}
    tokens = torch.randint(config.vocab_size, (8, 256), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens}
    model = ComposerCausalLM(new_model(config, seed=0))
    size = sum(p.numel() for p in model.parameters())
    words = f"training step of a {size / 1e6:.1f} M Llama on {tokens.numel()} tokens, all gates / none"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def dense_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model.loss(model(batch), batch).backward()
        optimizer.step()

    if not gated:
        return dense_step, words

    family = FAMILIES["llama"]
    source = family.shape(config)
    gates = GateSet(source, ShapeGoal(source, target_shape(source, target)))
    with torch.no_grad():
        for log_alpha in gates.log_alpha.values():  # where samples lie between zero and one
            log_alpha.copy_(torch.randn(log_alpha.shape))
    gate_optimizer = torch.optim.Adam(gates.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    slot = attach(model.model, family, set(gates.factors(gates.at_target()).trainable()))

    def gated_step() -> None:
        factors = gates.factors(gates.sample(generator))
        leaves = slot.factors = factors.detached()
        optimizer.zero_grad(set_to_none=True)
        gate_optimizer.zero_grad(set_to_none=True)
        model.loss(model(batch), batch).backward()
        grads = [leaf.grad for leaf in leaves.trainable().values() if leaf.grad is not None]
        torch.autograd.backward(list(factors.trainable().values()), grads)
        gates.constraint(gates.targets(0.0, 1.0)).backward()
        gate_optimizer.step()
        gates.clamp()
        optimizer.step()

    return gated_step, words


def gated_step(runs: int) -> Ratio:
    """A training step with all gates against a dense step of the same model; peak memory of each beside it."""
    dense, words = training_step(False)
    gated, _ = training_step(True)
    ratio = interleaved(gated, dense, runs, 1.05, words)
    dense_mb, gated_mb = (in_fresh_process(peak_memory, kind) for kind in (False, True))
    return replace(ratio, work=f"{words}; peak memory {gated_mb:.0f} / {dense_mb:.0f} MB")


def in_fresh_process(work: Callable[..., T], *arguments: Any) -> T:
    """Do ``work`` in a process of its own, whose peak memory is its own too."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def peak_memory(gated: bool) -> float:
    """Peak memory in MB of a fresh process that does a few training steps."""
    step, _ = training_step(gated)
    for _ in range(3):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def data_prep(runs: int) -> Ratio:
    """Tokenising, packing and writing MDS against bare batch tokenisation of the same text on the same cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # the reference uses all cores
    from tokenizers import Tokenizer

    from data_prep.builtin import build_corpus
    from data_prep.pack import prepare
    from data_prep.recipe import PackSettings
    from data_prep.tokenizer import train_tokenizer
    from llmprune.data.records import find_inputs
    from llmprune.data.sources import Document, Fields, documents

    with tempfile.TemporaryDirectory() as folder:
        corpus, out = Path(folder) / "corpus", Path(folder) / "out"
        build_corpus(corpus, megabytes=24)
        tokenizer = train_tokenizer([corpus], Path(folder) / "tokenizer", vocab_size=8192, megabytes=8)
        texts = [d.text for d in documents(find_inputs([corpus]), Fields()) if isinstance(d, Document)]
        backend: Tokenizer = tokenizer.backend_tokenizer

        def bare() -> None:
            for start in range(0, len(texts), 100):
                for encoding in backend.encode_batch_fast(texts[start : start + 100], add_special_tokens=False):
                    encoding.ids  # noqa: B018 (a tokenisation whose ids nobody reads is none)

        def whole() -> None:
            prepare([corpus], Path(folder) / "tokenizer", out, PackSettings(1024), overwrite=True)

        size = sum(map(len, texts)) / 1e6
        return interleaved(whole, bare, runs, 1.35, f"{size:.0f} MB of text into MDS / bare batch tokenisation")


def mixed_loading(runs: int) -> Ratio:
    """Samples per second from four domains whose weights keep changing, over those of a plain StreamingDataset."""
    from streaming import Stream, StreamingDataset
    from torch.utils.data import DataLoader, default_collate

    from data_prep.builtin import build_corpus
    from data_prep.pack import prepare
    from data_prep.recipe import PackSettings
    from data_prep.tokenizer import train_tokenizer
    from llmprune.data.dataset import MixedDataset
    from llmprune.data.format import TOKENS
    from llmprune.data.mixing import integer_weights
    from llmprune.data.prepared import PreparedData

    batch, batches, workers, delay = 32, 300, 2, 8
    with tempfile.TemporaryDirectory() as folder:
        corpus, data = Path(folder) / "corpus", Path(folder) / "data"
        build_corpus(corpus, megabytes=24)
        train_tokenizer([corpus], Path(folder) / "tokenizer", vocab_size=8192, megabytes=8)
        prepare([corpus], Path(folder) / "tokenizer", data, PackSettings(512))
        mixed = MixedDataset(PreparedData(data), global_batch_size=batch, weights=None, seed=1)
        parts = [Stream(local=str(data / domain), split="train") for domain in mixed.domains]
        plain = StreamingDataset(streams=parts, batch_size=batch, shuffle=True)
        mixed_loader = DataLoader(mixed, batch_size=batch, num_workers=workers)

        def tokens_only(rows: list[dict[str, Any]]) -> Any:  # where documents begin differs in length
            return default_collate([row[TOKENS] for row in rows])

        plain_loader = DataLoader(
            plain, batch_size=batch, num_workers=workers, persistent_workers=True, collate_fn=tokens_only
        )

        def forever() -> Iterator[Any]:
            while True:
                yield from plain_loader

        ours, theirs, taken = iter(mixed_loader), forever(), 0

        def changing() -> None:
            nonlocal taken
            for _ in range(batches):
                if taken % 20 == 0:
                    shares = [1 + (taken // 20 + place) % 4 for place in range(len(mixed.domains))]
                    mixed.change_weights(integer_weights(shares), taken + delay)
                next(ours)
                taken += 1

        def steady() -> None:
            for _ in range(batches):
                next(theirs)

        work = f"samples/s of a changing mix of {len(parts)} domains / of a plain StreamingDataset, {workers} workers"
        return replace(interleaved(steady, changing, runs, 0.95, work), least=True)


def convert_memory(runs: int) -> Ratio:
    """Peak memory of converting a pruning run's checkpoint (whole and sharded) over the bytes of the model in it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ratios, size = {}, 0
        for kind in ("whole", "sharded"):
            size = in_fresh_process(_pruning_run, folder, kind)
            ratios[kind] = in_fresh_process(_peak_of_converting, folder, kind) / size
    largest = max(ratios.values())
    each = ", ".join(f"{kind} {ratio:.3f}" for kind, ratio in ratios.items())
    words = f"peak memory of convert / the model's {size / 1e9:.2f} GB ({each})"
    return Ratio(largest, largest, largest, 1.25, words)


def _pruning_run(folder: Path, kind: str) -> int:
    """One batch of pruning a model of a gigabyte, with its checkpoint; returns the model's bytes."""
    from data_prep.builtin import build_corpus
    from data_prep.pack import prepare
    from data_prep.recipe import PackSettings
    from data_prep.tokenizer import train_tokenizer
    from llmprune.config import load_config
    from llmprune.training import train

    if not (folder / "data").exists():
        build_corpus(folder / "corpus", megabytes=1)
        train_tokenizer([folder / "corpus"], folder / "tokenizer", vocab_size=4096)
        prepare([folder / "corpus"], folder / "tokenizer", folder / "data", PackSettings(64))
    model = "model_type: llama, hidden_size: 1024, num_hidden_layers: 20, num_attention_heads: 16"
    overrides = [
        f"run.folder={folder}/{kind}",
        f"data.path={folder}/data",
        "model.path=null",
        f"model.config={{{model}, intermediate_size: 2816}}",
        "l0_pruning.target={layers: 18, hidden: 960, heads: 14, intermediate: 2560}",
        "train.duration=1ba",
        "train.global_batch_size=1",
        "train.microbatch_size=1",
        "train.eval_interval=0ba",
        f"sharding={{checkpoints: {kind}}}",
    ]
    trainer = train(load_config(ROOT / "yamls" / "prune.yaml", overrides))
    return sum(p.numel() * p.element_size() for p in trainer.state.model.parameters())


def _peak_of_converting(folder: Path, kind: str) -> int:
    """How many bytes more than before are resident at the peak, mapped files included."""
    from llmprune.convert.commands import convert

    return _peak_of(lambda: convert(folder / kind, folder / f"{kind}-cut"))


def _peak_of(work: Callable[[], object]) -> int:
    """How many bytes more than before are resident at the peak of some work, mapped files included."""
    stop, peak = threading.Event(), [0]

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], _resident())

    before, watcher = _resident(), threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        stop.set()
        watcher.join()
    return peak[0] - before


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def scoring_model() -> tuple[PreTrainedModel, torch.Tensor, str]:
    """A Llama of 32 blocks, calibration samples for it, and what they are in words."""
    from transformers import LlamaConfig

    from llmprune.models.loading import new_model

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=32,
        num_attention_heads=6,
        tie_word_embeddings=True,
    )
    model = new_model(config, seed=0).eval()
    tokens = torch.randint(config.vocab_size, (4, 256), generator=torch.Generator().manual_seed(0))
    size = sum(p.numel() for p in model.parameters())
    return model, tokens, f"{config.num_hidden_layers} blocks, {size / 1e6:.1f} M parameters, 4 samples of 256 tokens"


def score_by(model: PreTrainedModel, tokens: torch.Tensor, names: Sequence[str]) -> None:
    """Score a model by some criteria."""
    from llmprune.scoring.criterion import ScoringJob
    from llmprune.scoring.scorer import Scorer

    job = ScoringJob(model.config.num_hidden_layers, torch.device("cpu"))
    scorer = Scorer(model, names, job, batch_size=len(tokens))
    scorer.update(tokens)
    scorer.scores()


def removal_perplexity(runs: int) -> Ratio:
    """Perplexity of every single removal, together, over one pass for each with its block skipped."""
    from llmprune.models.causal_lm import token_losses
    from llmprune.models.walking import shortened

    model, tokens, words = scoring_model()
    layers = model.config.num_hidden_layers

    @torch.no_grad()
    def one_by_one() -> None:
        for block in range(layers):
            with shortened(model, [other for other in range(layers) if other != block]):
                loss, count = token_losses(model(input_ids=tokens, use_cache=False).logits, tokens)
            (loss.sum() / count.sum()).exp().item()

    def together() -> None:
        score_by(model, tokens, ["perplexity"])

    return interleaved(together, one_by_one, runs, 0.60, f"perplexity of all removals / one pass each ({words})")


def all_criteria(runs: int) -> Ratio:
    """All criteria at once over the dearest alone."""
    from llmprune.scoring.criteria import CRITERIA

    model, tokens, words = scoring_model()
    return interleaved(
        lambda: score_by(model, tokens, CRITERIA.names()),
        lambda: score_by(model, tokens, ["perplexity"]),
        runs,
        1.25,
        f"all {len(CRITERIA.names())} criteria / perplexity of all removals alone ({words})",
    )


def offload_memory(runs: int) -> Ratio:
    """Peak memory of ``score --offload`` over what it may hold, under a limit smaller than the model."""
    with tempfile.TemporaryDirectory() as temporary:
        model, block, outside = in_fresh_process(_model_of_gigabytes, Path(temporary))
        samples, length, layers, hidden = 4, 64, 10, 4096
        states = samples * length * hidden * 2 * (layers + 3)  # every variant's, and a block's input and output
        allowed = 2 * block + outside + states
        peak, limit = in_fresh_process(_peak_of_offloading, Path(temporary), samples, length)
        words = (
            f"peak memory of score --offload / 2 blocks, what is outside them and the states: {peak / 1e9:.2f} of "
            f"{allowed / 1e9:.2f} GB; model {model / 1e9:.2f} GB, the process limited to {limit / 1e9:.2f} GB of data"
        )
        ratio = peak / allowed
        return Ratio(ratio, ratio, ratio, 1.0, words)


def _model_of_gigabytes(folder: Path) -> tuple[int, int, int]:
    """Write a random Llama in bfloat16, block by block; the bytes of all of it, of a block, and of the rest."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    from llmprune.files import write_json

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=10,
        num_attention_heads=32,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        group = name.split(".")[2] if ".layers." in name else "outside"
        groups.setdefault(group, {})[name] = parameter
    sizes = {}
    places: dict[str, str] = {}
    for group, parameters in groups.items():
        tensors = {name: torch.empty(p.shape, dtype=p.dtype).normal_(std=0.02) for name, p in parameters.items()}
        save_file(tensors, folder / f"model-{group}.safetensors", metadata={"format": "pt"})
        sizes[group] = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        places |= dict.fromkeys(tensors, f"model-{group}.safetensors")
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    return sum(sizes.values()), sizes["0"], sizes["outside"]


def _peak_of_offloading(folder: Path, samples: int, length: int) -> tuple[int, int]:
    """The peak of scoring by perplexity and block influence, and the limit on the process's data meanwhile."""
    from llmprune.models.offloading import OffloadedModel
    from llmprune.scoring.criterion import ScoringJob
    from llmprune.scoring.scorer import Scorer

    limit = 3 * 2**30
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    tokens = torch.randint(4096, (samples, length), generator=torch.Generator().manual_seed(0))

    def work() -> None:
        device = torch.device("cpu")
        offloaded = OffloadedModel(folder, dtype=torch.bfloat16, device=device)
        job = ScoringJob(offloaded.model.config.num_hidden_layers, device)
        scorer = Scorer(offloaded.model, ["perplexity", "block_influence"], job, batch_size=4, loaded=offloaded.loaded)
        scorer.update(tokens)
        scorer.scores()

    return _peak_of(work), limit


BENCHMARKS: dict[str, Callable[[int], Ratio]] = {
    "gated_step": gated_step,
    "data_prep": data_prep,
    "mixed_loading": mixed_loading,
    "convert_memory": convert_memory,
    "removal_perplexity": removal_perplexity,
    "all_criteria": all_criteria,
    "offload_memory": offload_memory,
}


def main() -> int:
    """Run the benchmarks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--runs", type=int, default=15, help="pairs of runs of each")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/bench.json"))
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(BENCHMARKS)
    results = {}
    print(f"{'name':16}{'median':>8}{'10 %':>8}{'90 %':>8}{'bar':>8}   work", flush=True)
    for name in names:
        ratio = BENCHMARKS[name](arguments.runs)
        results[name] = asdict(ratio)
        verdict = "" if ratio.met else "  MISSED"
        print(
            f"{name:16}{ratio.median:8.3f}{ratio.p10:8.3f}{ratio.p90:8.3f}{ratio.bar:8.2f}   {ratio.work}{verdict}",
            flush=True,
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, {"schema": 1, "benchmarks": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
