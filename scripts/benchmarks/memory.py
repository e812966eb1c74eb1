"""How much memory it takes to handle models larger than it."""

import resource
import tempfile
from pathlib import Path

import torch

from benchmarks.ratios import Ratio, in_fresh_process, peak_of
from llmprune.utils.files import write_json

ROOT = Path(__file__).resolve().parents[2]


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
    from llmprune.config.job_files import load_training_job
    from llmprune.jobs.train import train

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
        "l0_pruning={target: {layers: 18, hidden: 960, heads: 14, intermediate: 2560}}",
        "train.duration=1ba",
        "train.global_batch_size=1",
        "train.microbatch_size=1",
        "train.eval_interval=0ba",
        f"sharding={{checkpoints: {kind}}}",
    ]
    trainer = train(load_training_job(ROOT / "yamls" / "prune.yaml", overrides))
    return sum(p.numel() * p.element_size() for p in trainer.state.model.parameters())


def _peak_of_converting(folder: Path, kind: str) -> int:
    """How many bytes more than before are resident at the peak, mapped files included."""
    from llmprune.conversion.commands import convert

    return peak_of(lambda: convert(folder / kind, folder / f"{kind}-cut"))


def apply_memory(runs: int) -> Ratio:
    """Peak memory of ``apply`` over the bytes of the model that it cuts."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, _, _ = in_fresh_process(_model_of_gigabytes, folder / "model")
        peak = in_fresh_process(_peak_of_applying, folder)
    words = f"peak memory of apply to a plan of 7/8 of the width / the model's {model / 1e9:.2f} GB"
    return Ratio(peak / model, peak / model, peak / model, 1.25, words)


def _peak_of_applying(folder: Path) -> int:
    from llmprune.conversion.commands import apply
    from llmprune.models.families import family_of, target_shape
    from llmprune.models.loading import load_model_config
    from llmprune.models.stored_weights import StoredWeights, fingerprint
    from llmprune.plans.plan import KeptBlock, Plan

    config = load_model_config(folder / "model")
    source = family_of(config).shape(config)
    target = target_shape(source, {"hidden": 3584, "heads": 28, "intermediate": 9632})
    kept = {"heads": tuple(range(target.heads)), "channels": tuple(range(target.intermediate))}
    blocks = tuple(KeptBlock.whole(block, **kept) for block in range(source.layers))
    weights = fingerprint(StoredWeights(folder / "model"), config)
    plan = Plan("llama", weights, source, blocks, hidden=tuple(range(target.hidden)))
    return peak_of(lambda: apply(folder / "model", plan, folder / "cut"))


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
    from llmprune.pruning.scoring.criterion import ScoringJob
    from llmprune.pruning.scoring.scorer import Scorer

    limit = 3 * 2**30
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    tokens = torch.randint(4096, (samples, length), generator=torch.Generator().manual_seed(0))

    def work() -> None:
        device = torch.device("cpu")
        offloaded = OffloadedModel(folder, dtype=torch.bfloat16, device=device)
        job = ScoringJob(offloaded.model.config, device)
        scorer = Scorer(offloaded.model, ["perplexity", "block_influence"], job, batch_size=4, loaded=offloaded.loaded)
        scorer.update(tokens)
        scorer.scores()

    return peak_of(work), limit
