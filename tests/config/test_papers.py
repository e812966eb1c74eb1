"""The papers' recipes: each loads, and what it asks for can be built (without memory) and has the published size."""

import copy
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from llmprune.config.job_files import load_job, load_training_job
from llmprune.config.schema import Config, ScoringConfig
from llmprune.data.sources import clean_name
from llmprune.data.weight_updates import check_updates
from llmprune.models.families import family_of
from llmprune.models.loading import load_tokenizer
from llmprune.models.parameters import parameter_names_of
from llmprune.plans.plan import Plan
from llmprune.plans.surgery import Surgery
from llmprune.pruning.gates.gate_set import GateSet
from llmprune.pruning.gates.settings import make_goal
from llmprune.pruning.replacements.span import Span
from llmprune.pruning.scoring.all_criteria import CRITERIA
from llmprune.pruning.scoring.scores import Scores
from llmprune.pruning.selection.methods import Request, select
from llmprune.pruning.selection.settings import PlanConfig
from llmprune.recovery.lora import lora_targets
from llmprune.recovery.trainable import phases
from llmprune.training.checks import check
from llmprune.training.replaced_span import check_replacement

PAPERS = Path(__file__).parents[2] / "yamls" / "papers"
LINES = {  # of docs/papers.md: the file and the overrides, by the name of the run
    words[-1]: (line.split()[4], shlex.split(line)[5:])
    for line in (PAPERS.parents[1] / "docs" / "papers.md").read_text(encoding="utf-8").splitlines()
    if (words := re.findall(r"^composer .* run\.name=(\S+)", line))
}

# The published configs.
LLAMA_7B = LlamaConfig(max_position_embeddings=4096, rms_norm_eps=1e-5)
LLAMA_13B = LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
LLAMA_8B = LlamaConfig(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8)
PYTHIA_410M = GPTNeoXConfig(
    vocab_size=50304, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
)
MODELS: dict[str, PretrainedConfig] = {
    "meta-llama/Llama-2-7b-hf": LLAMA_7B,
    "huggyllama/llama-7b": LLAMA_7B,
    "lmsys/vicuna-7b-v1.3": LLAMA_7B,
    "lmsys/vicuna-7b-v1.5": LLAMA_7B,
    "lmsys/vicuna-13b-v1.3": LLAMA_13B,
    "meta-llama/Meta-Llama-3-8B": LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_8B,
    "mistralai/Mistral-7B-v0.1": MistralConfig(),
    "google/gemma-2b": GemmaConfig(
        hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1
    ),
    "google/gemma-7b": GemmaConfig(),
    "google/gemma-2-2b-it": Gemma2Config(
        hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4
    ),
    "Qwen/Qwen1.5-7B": Qwen2Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    ),
    "EleutherAI/pythia-410m": PYTHIA_410M,
    "meta-llama/Llama-3.1-8B": LLAMA_8B,
    "facebook/opt-1.3b": OPTConfig(
        hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32, word_embed_proj_dim=2048
    ),
}
SCORING = sorted(path for path in PAPERS.glob("*.yaml") if "\nplan:\n  criterion: [" in path.read_text())
# Blocks that go in Shortened LLaMA, by the number that there are.
SHORTENED = {32: [6, 9, 11], 40: [8, 11, 15], 18: [4], 28: [5]}


def recipe(name: str, *overrides: str) -> Config:
    """The job of a file, or of a line in docs/papers.md."""
    file, line = LINES.get(name, (f"yamls/papers/{name}.yaml", []))
    job = load_training_job(PAPERS.parents[1] / file, [*line, "data.path=somewhere", *overrides])
    assert job.run.name == name
    return job


def built(config: PretrainedConfig, plan: Plan) -> PreTrainedModel:
    return on_meta(Surgery(config, plan).config)


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def billions(config: PretrainedConfig) -> float:
    return round(parameters(on_meta(config)) / 1e9, 1)


# Sheared-LLaMA's published sizes.
SHEARED = {"370m": 373_867_520, "1.3b": 1_345_423_360, "2.7b": 2_701_560_320}


@pytest.mark.parametrize("size", SHEARED)
def test_sheared_llama(size: str) -> None:
    prune = recipe(f"sheared_llama_{size}_prune")
    for job in (prune, recipe(f"sheared_llama_{size}_continue")):
        assert job.dynamic_loading is not None and job.data.weights is not None
        domains = list(job.data.weights)
        check_updates(job.dynamic_loading, domains, job.data.weights, domains)
        assert job.data.document_boundaries is False
        assert job.data.workers * job.data.prefetch <= job.dynamic_loading.update_delay
        assert sum(job.data.weights.values()) == pytest.approx(1, abs=2e-3)
    assert prune.l0_pruning is not None and prune.sharding is not None and prune.train.activation_checkpointing
    tokens = 4096 * prune.train.global_batch_size * int(prune.train.duration.removesuffix("ba"))
    assert tokens == pytest.approx(0.4e9, rel=0.05) and prune.l0_pruning.lagrangian_warmup == "640ba"
    source = MODELS[prune.model.path or ""]
    plan = GateSet(family_of(source).shape(source), make_goal(source, prune.l0_pruning)).plan("llama", "")
    assert parameters(built(source, plan)) == SHEARED[size]

    continued = recipe(f"sheared_llama_{size}_continue")
    tokens = 4096 * continued.train.global_batch_size * int(continued.train.duration.removesuffix("ba"))
    assert tokens == pytest.approx(50e9, rel=0.01) and continued.l0_pruning is None and continued.sharding is not None
    assert continued.model.path == f"runs/sheared_llama_{size}_pruned"
    for config in (prune, continued):
        assert config.data.weights is not None and sum(config.data.weights.values()) == pytest.approx(1)
        assert (config.optimizer.lr, config.optimizer.betas, config.train.precision) == (1e-4, [0.9, 0.95], "amp_bf16")


def test_sheared_pythia() -> None:
    prune = recipe("sheared_pythia_160m_prune")
    assert prune.l0_pruning is not None and prune.data.weights is None and prune.model.path == "EleutherAI/pythia-410m"
    shape = family_of(PYTHIA_410M).shape(PYTHIA_410M)
    plan = GateSet(shape, make_goal(PYTHIA_410M, prune.l0_pruning)).plan("gpt_neox", "")
    assert parameters(built(PYTHIA_410M, plan)) == 162_322_944  # Pythia-160M's own
    continued = recipe("sheared_pythia_160m_continue")
    assert continued.model.path == "runs/sheared_pythia_160m_pruned" and continued.data.weights is None


def test_all_models_and_criteria_are_there() -> None:
    assert len(SCORING) == 8 + 4


@pytest.mark.parametrize("path", SCORING, ids=lambda path: path.stem)
def test_scoring_recipes(path: Path) -> None:
    job = load_job(path, ["layer_scoring.data.path=somewhere"])
    assert isinstance(job, ScoringConfig) and job.plan is not None and job.run.name == path.stem
    config = MODELS[job.model.path]
    family, layers = family_of(config), config.num_hidden_layers
    names = job.layer_scoring.names(config)
    assert names == job.plan.criterion and set(names) <= set(CRITERIA)
    assert (job.layer_scoring.data.samples, job.layer_scoring.data.length) == (10, 128)
    assert job.layer_scoring.data.bos == ("each" if family.name.startswith("gemma") else "none")
    shortened = path.stem.startswith("shortened")
    assert len(names) == (3 if shortened else 6)
    wanted = SHORTENED[layers] if shortened else [layers // 4]
    assert job.plan.remove[: len(wanted)] == wanted
    worst_first = [float(block) for block in range(layers)]  # the first blocks would go first
    blocks = dict.fromkeys(names, worst_first)
    scores = Scores("", family.name, "", family.shape(config), {}, {}, None, blocks=blocks)
    assert len(job.plan.each()) == len(names) * len(job.plan.remove)
    for file, settings in job.plan.each().items():
        assert file == f"plan-{settings.criterion}-{settings.remove}.json"
        count = settings.remove
        assert count is not None
        request = Request(scores, settings, lambda: pytest.fail("no need to open a model"), False, pytest.fail)
        plan = select(request)
        assert built(config, plan).config.num_hidden_layers == layers - count
        kept = {block.attention for block in plan.blocks}
        if shortened:
            assert kept >= {0, 1, 2, 3, layers - 2, layers - 1} and not kept & set(range(4, 4 + count))
        else:
            assert not kept & set(range(count))


def test_llm_streamlines_mix() -> None:
    job = load_training_job(PAPERS / "llm_streamline.yaml", ["data.path=x", "run.name=x", "train.duration=1ba"])
    assert job.data.weights is not None and sum(job.data.weights.values()) == pytest.approx(1)
    assert max(job.data.weights, key=job.data.weights.__getitem__) == "RedPajamaC4"
    assert all(clean_name(name) == name for name in job.data.weights) and job.data.document_boundaries is False


# Published parameters (in billions) and what the spans come to; OPT's is ours.
STREAMLINE = {"llama2_4.7b": 4.7, "llama3.1_5.4b": 5.4, "opt_1.3b": 1.0}


@pytest.mark.parametrize("loss", ["mse", "lm"])
@pytest.mark.parametrize("name", STREAMLINE)
def test_llm_streamline(name: str, loss: str) -> None:
    job = recipe(f"streamline_{name}_{loss}")
    settings = job.block_replacement
    assert settings is not None and settings.weights == {loss: 1.0} and settings.length is not None
    settings.check()
    config, span = MODELS[str(job.model.path)], Span(5, settings.length)
    check_replacement(settings, config, span)
    family = family_of(config)
    layers = family.shape(config).layers
    offsets = tuple(range(settings.blocks))
    plan = Plan(family.name, "", family.shape(config), span.kept(layers, offsets))
    assert round(parameters(built(config, plan)) / 1e9, 1) == STREAMLINE[name]
    assert (job.train.global_batch_size, job.train.clip_norm) == (128, {"mse": 5.0, "lm": 1.0}[loss])
    assert job.optimizer.lr * job.scheduler.final == pytest.approx(5e-5)


def shorter(model: str, removed: int) -> PretrainedConfig:
    """What is left of a model without some blocks."""
    config = copy.deepcopy(MODELS[model])
    config.num_hidden_layers -= removed
    return config


def sheared(size: str) -> PretrainedConfig:
    """What Sheared-LLaMA's pruning leaves of Llama-2-7B."""
    pruning = recipe(f"sheared_llama_{size}_prune").l0_pruning
    assert pruning is not None
    gates = GateSet(family_of(LLAMA_7B).shape(LLAMA_7B), make_goal(LLAMA_7B, pruning))
    return Surgery(LLAMA_7B, gates.plan("llama", "")).config


def minitron(kind: str) -> Plan:
    """The plan that the commands in a recipe's head lead to; of scores, the first units have the highest."""
    shape = family_of(LLAMA_8B).shape(LLAMA_8B)
    head = (PAPERS / f"minitron_llama3.1_4.5b_{kind}.yaml").read_text()
    if kind == "depth":
        (dropped,) = re.findall(r"--drop (\S+)", head)
        settings = PlanConfig("list", drop=dropped.split(","))
    else:
        ((sizes, criterion),) = re.findall(r"--shape (\S+) --unit-criterion (\S+)", head)
        settings = PlanConfig(
            shape={name: int(size) for name, size in (one.split("=") for one in sizes.split(","))},
            unit_criterion=criterion,
        )
    units = {
        name: [[-float(place) for place in range(count)]] * shape.layers
        for name, count in (("hidden", shape.hidden), ("channels", shape.intermediate))
    }
    scores = Scores("", "llama", "", shape, {}, {}, None, units={"unit_activation_l2": units})
    return select(Request(scores, settings, lambda: pytest.fail("no need to open a model"), False, pytest.fail))


# Published sizes of Vicuna (in billions) by the blocks that go, and the tokens (in billions) of continued pretraining.
SHORTENED_LORA = {"7b": {6: 5.5, 9: 4.9, 11: 4.5}, "13b": {8: 10.5, 11: 9.5, 15: 8.3}}
SHORTENED_CONTINUE = {6: (5.5, 37), 15: (3.7, 74), 20: (2.7, 150), 26: (1.5, 271)}
PARTS = {"lm_head": 0, "last_1": 1, "last_2": 2, "last_3": 3}
MINITRON = ["width", "depth"]
RECOVERIES = [
    *(f"reassessing_{name}" for name in ("lora", "qlora", *PARTS)),
    *(f"shortened_lora_vicuna_{size}_{count}" for size, counts in SHORTENED_LORA.items() for count in counts),
    *(f"shortened_continue_vicuna_7b_{count}" for count in SHORTENED_CONTINUE),
    *(f"sheared_sharegpt_{size}" for size in ("1.3b", "2.7b")),
    *(f"minitron_llama3.1_4.5b_{kind}" for kind in MINITRON),
]
SEVEN = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{letter}_proj" for letter in "koqv")]


def recovered(name: str) -> PretrainedConfig:
    """The config of the pruned model that a recipe trains."""
    paper, _, rest = name.partition("_")
    if paper == "reassessing":
        return shorter("meta-llama/Llama-3.1-8B-Instruct", 8)
    if paper == "shortened":
        _, _, size, count = rest.split("_")
        return shorter(f"lmsys/vicuna-{size}-v1.3", int(count))
    last = rest.rpartition("_")[2]
    return sheared(last) if paper == "sheared" else Surgery(LLAMA_8B, minitron(last)).config


@pytest.mark.parametrize("name", RECOVERIES)
def test_recoveries_pass_the_checks_before_a_run(name: str, data: Path, tmp_path: Path) -> None:
    config = recovered(name)
    for folder, saved in (("pruned", config), ("source", LLAMA_8B)):
        saved.save_pretrained(tmp_path / folder)
        load_tokenizer(data / "tokenizer").save_pretrained(tmp_path / folder)
    job = recipe(name, f"data.path={data}", f"model.path={tmp_path}/pruned", "train.precision=fp32")
    job.train.global_batch_size = job.train.microbatch_size = 1  # the data have few samples
    if job.distillation is not None:
        assert job.distillation.teacher == "meta-llama/Llama-3.1-8B"
        job.distillation.teacher = str(tmp_path / "source")
    assert check(job).model_config.num_hidden_layers == config.num_hidden_layers
    assert recipe(name).train.precision == "amp_bf16"


@pytest.mark.parametrize("name", [name for name in RECOVERIES if name.split("_")[0] in ("reassessing", "shortened")])
def test_depth_is_recovered_from_what_scoring_leads_to(name: str) -> None:
    scored, _, pruned = (recipe(name).model.path or "").removeprefix("runs/").partition("/")
    job = load_job(PAPERS / f"{scored}.yaml", ["layer_scoring.data.path=somewhere"])
    assert isinstance(job, ScoringConfig) and job.plan is not None
    removed = int(pruned.removeprefix("pruned-"))
    criterion = "tail" if name.startswith("reassessing") else "perplexity"
    assert f"plan-{criterion}-{removed}.json" in job.plan.each()
    assert MODELS[job.model.path].num_hidden_layers - removed == recovered(name).num_hidden_layers


@pytest.mark.parametrize("name", [name for name in RECOVERIES if "lora" in name or name.startswith("reassessing")])
def test_two_epochs_of_alpaca(name: str) -> None:
    job = recipe(name)
    train, optimizer, scheduler = job.train, job.optimizer, job.scheduler
    assert (train.duration, train.global_batch_size) == (f"{2 * (51_760 - 2_000) // 64}ba", 64)
    assert (scheduler.name, scheduler.warmup, scheduler.final) == ("linear", "100ba", 0.0)
    assert optimizer.lr == {"reassessing": 1e-5, "shortened": 1e-4}[name.split("_")[0]]
    assert (optimizer.name, optimizer.betas, optimizer.weight_decay) == ("adamw", [0.9, 0.999], 0.0)


@pytest.mark.parametrize("name", [name for name in RECOVERIES if "lora" in name])
def test_adapters(name: str) -> None:
    job = recipe(name)
    lora, config = job.lora, recovered(name)
    assert lora is not None and job.trainable is None and job.model.dtype == "bfloat16"
    assert (lora.rank, lora.alpha, lora.dropout) == (8, 16, 0.05)
    assert lora_targets(config, lora.targets) == SEVEN
    assert lora.quantize == ("nf4" if "qlora" in name else None)


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_train(name: str) -> None:
    job, model = recipe(f"reassessing_{name}"), on_meta(recovered(f"reassessing_{name}"))
    assert job.trainable is not None and job.lora is None and job.model.dtype == "float32"
    (phase,) = phases(model, job.trainable.parameters, job.trainable.later)
    kept = tuple(f"model.layers.{block}." for block in range(24 - PARTS[name], 24))
    wanted = {n for n, _ in model.named_parameters() if n in ("lm_head.weight", "model.norm.weight")}
    wanted |= {n for n, _ in model.named_parameters() if n.startswith(kept)} if kept else set()
    assert phase.names == set(parameter_names_of(model, job.trainable.parameters)) == wanted
    assert len(wanted) == 2 + 9 * PARTS[name]
    if name == "last_3":
        assert round(sum(model.get_parameter(n).numel() for n in wanted) / 1e9, 2) == 1.18  # published


def test_sizes_of_shortened_models() -> None:
    for size, counts in SHORTENED_LORA.items():
        assert {n: billions(shorter(f"lmsys/vicuna-{size}-v1.3", n)) for n in counts} == counts
    for count, (wanted, _) in SHORTENED_CONTINUE.items():
        assert billions(shorter("lmsys/vicuna-7b-v1.3", count)) == wanted


@pytest.mark.parametrize("count", SHORTENED_CONTINUE)
def test_continued_pretraining_of_shortened_models(count: int) -> None:
    job = recipe(f"shortened_continue_vicuna_7b_{count}")
    assert job.train.duration == f"{SHORTENED_CONTINUE[count][1]}{'0' * 9}tok" and job.train.global_batch_size == 512
    assert (job.optimizer.lr, job.optimizer.betas, job.optimizer.weight_decay) == (1e-4, [0.9, 0.95], 0.1)
    assert job.sharding is not None and job.lora is None and job.trainable is None and job.data.weights is None
    assert job.data.document_boundaries is False and job.model.dtype == "float32"


@pytest.mark.parametrize("size", ["1.3b", "2.7b"])
def test_instruction_tuning_of_sheared_llama(size: str) -> None:
    job = recipe(f"sheared_sharegpt_{size}")
    train, optimizer, scheduler = job.train, job.optimizer, job.scheduler
    assert job.model.path == f"runs/sheared_llama_{size}_final" and job.run.seed == 42 and job.sharding is not None
    assert (train.global_batch_size, train.microbatch_size) == (8 * 16, 16)
    assert train.duration == f"{2 * 10_000 // 128}ba"
    assert (optimizer.lr, optimizer.weight_decay) == (5e-5, 0.0)
    assert (scheduler.name, scheduler.warmup, scheduler.final) == ("cosine", "0.03dur", 0.0)


@pytest.mark.parametrize("kind", MINITRON)
def test_minitron(kind: str) -> None:
    job, plan = recipe(f"minitron_llama3.1_4.5b_{kind}"), minitron(kind)
    config = Surgery(LLAMA_8B, plan).config
    assert billions(config) == 4.5
    if kind == "depth":
        assert [block.attention for block in plan.blocks] == [*range(15), 31]
    else:
        assert (config.hidden_size, config.intermediate_size, config.num_attention_heads) == (3072, 9216, 32)
        assert (config.num_hidden_layers, config.num_key_value_heads) == (32, 8)
    assert job.distillation is not None and job.distillation.names == {"kl"}
    assert (job.distillation.temperature, job.distillation.top_k) == (1.0, None)
    batches = int(job.train.duration.removesuffix("ba"))
    assert 8192 * job.train.global_batch_size * batches == pytest.approx(94e9, rel=1e-3)
    assert (job.optimizer.lr, job.train.global_batch_size, job.scheduler.warmup) == (1e-4, 1152, "40ba")
    assert job.scheduler.name == "cosine" and job.optimizer.lr * job.scheduler.final == pytest.approx(1e-5)
    assert job.sharding is not None and job.model.path == f"runs/minitron_llama3.1_4.5b_{kind}_pruned"


def test_every_recipe_is_tested() -> None:
    tested = {path.stem for path in SCORING} | set(RECOVERIES) | {"llm_streamline"}
    tested |= {f"sheared_llama_{size}_{step}" for size in SHEARED for step in ("prune", "continue")}
    tested |= {f"sheared_pythia_160m_{step}" for step in ("prune", "continue")}
    tested |= {f"streamline_{name}_{loss}" for name in STREAMLINE for loss in ("mse", "lm")}
    bases, found = set(tested), tested
    while found:  # what they are laid over counts, too
        found = {Path(base).stem for name in found if (base := _base(name)) is not None} - bases
        bases |= found
    assert bases == {path.stem for path in PAPERS.glob("*.yaml")} | set(LINES)


def _base(name: str) -> str | None:
    if name in LINES:
        return LINES[name][0]
    return yaml.safe_load((PAPERS / f"{name}.yaml").read_text()).get("base")
