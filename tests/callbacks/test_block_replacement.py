"""Block replacement as a callback: its ranks, its state, what it keeps, what it refuses."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from composer.devices import DeviceCPU
from safetensors import safe_open

from llmprune.callbacks.block_replacement import _parted, check_fit
from llmprune.config.job_files import load_training_job
from llmprune.conversion.checkpoint import Checkpoint
from llmprune.conversion.commands import apply, convert
from llmprune.conversion.replaced import read_replaced
from llmprune.conversion.verify import compare_models, open_for_comparison
from llmprune.data.prepared import PreparedData
from llmprune.evaluation.perplexity import Segmentation, measure_perplexity, read_streams
from llmprune.evaluation.settings import PerplexityConfig
from llmprune.jobs.train import train
from llmprune.models.block_hooks import blocks_of
from llmprune.models.loading import load_model, load_tokenizer
from llmprune.models.stored_weights import StoredWeights
from llmprune.plans.plan import Plan
from llmprune.pruning.replacements.cache import CachedStates, StatesCache
from llmprune.pruning.replacements.settings import BlockReplacementConfig
from llmprune.pruning.scoring.hidden_states import one_minus_cosine
from llmprune.training.checks import check
from llmprune.training.loaders import first_batches
from llmprune.training.replaced_span import most_alike
from llmprune.training.trainer import build_trainer
from llmprune.utils.errors import UserError
from tests.callbacks import plain_runs

ROOT = Path(__file__).parents[2]
BATCHES = 20
CACHED = ["block_replacement.objectives={mse: 1.0}", "block_replacement.cache={samples: 16}", "train.duration=7ba"]


@pytest.fixture(scope="module")
def config(data: Path, trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replace")
    path = folder / "replace.yaml"
    path.write_text(f"""
run: {{name: test, folder: {folder}/one, seed: 3}}
model: {{path: {trained_folder}}}
data: {{path: {data}, eval_samples_per_domain: 2}}
block_replacement: {{start: 2, length: 3, objectives: {{mse: 1.0, kl: 0.5}}}}
optimizer: {{lr: 3.0e-3}}
scheduler: {{warmup: 3ba}}
train: {{duration: {BATCHES}ba, global_batch_size: 8, microbatch_size: 2, eval_interval: 10ba}}
checkpoint: {{interval: 10ba}}
loggers: {{console: false}}
""")
    return path


RUNS = {
    "parallel": "",
    "sharded": "sharding={};train.activation_checkpointing=true",
    "killed": "sharding={};train.activation_checkpointing=true;kill=13",
    "whole": "sharding.checkpoints=whole",
    "linear": "sharding={};block_replacement.kind=linear;train.duration=3ba",
    "cached-two": ";".join(CACHED),
    "cached-killed": ";".join(["sharding={}", *CACHED, "checkpoint.interval=4ba", "kill=5"]),
    "found": "block_replacement.start=null;block_replacement.score_samples=8;train.duration=1ba",
    "bfloat16": "model.dtype=bfloat16;train.duration=3ba",
    "swiglu": "sharding={};block_replacement.kind=swiglu;block_replacement.objectives={lm: 1.0};"
    "block_replacement.also=[final_norm, block.5];train.duration=3ba",
}


@pytest.fixture(scope="module")
def runs(config: Path) -> Path:
    """All runs on two ranks, one after the other, beside one on a single rank."""
    plain_runs.run(config)
    command = [str(Path(sys.executable).parent / "composer"), "-n", "2", "tests/callbacks/plain_runs.py", str(config)]
    arguments = [f"{name}={overrides}" for name, overrides in RUNS.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # a script finds its own folder only
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    plain_runs.run(config, f"run.folder={config.parent}/cached-alone", *CACHED)
    for name in ("linear", "swiglu"):
        plain_runs.run(
            config, f"run.folder={config.parent}/{name}-alone", *RUNS[name].removeprefix("sharding={};").split(";")
        )
    return config.parent


def metrics(run: Path, *names: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines for name in names if name in line]


@pytest.mark.parametrize("name", ["parallel", "sharded", "killed", "whole"])
def test_losses_equal_those_of_one_rank(runs: Path, name: str) -> None:
    wanted = ("loss/train/total", "metrics/eval/loss", "metrics/eval/loss/letters", "replacement/mse", "replacement/kl")
    one, two = metrics(runs / "one", *wanted), metrics(runs / name, *wanted)
    assert len(one) == len(two) == 3 * BATCHES + 2 * 2
    total, mse, kl = (metrics(runs / "one", part)[0] for part in (wanted[0], *wanted[3:]))
    assert total == pytest.approx(mse + 0.5 * kl, rel=1e-5)
    assert two == pytest.approx(one, rel=1e-5)
    assert one[0] > 2 * min(metrics(runs / "one", "loss/train/total"))  # it learns


@pytest.mark.parametrize("name", ["linear", "swiglu"])
def test_sharded_kinds_equal_those_of_one_rank(runs: Path, name: str) -> None:
    wanted = ("loss/train/total", "metrics/eval/loss")
    assert metrics(runs / name, *wanted) == pytest.approx(metrics(runs / f"{name}-alone", *wanted), rel=1e-4)


def test_a_killed_and_resumed_run_ends_as_the_undisturbed_one(runs: Path) -> None:
    whole, resumed = Checkpoint.open(runs / "sharded"), Checkpoint.open(runs / "killed")
    assert whole.path.name == resumed.path.name == f"ba{BATCHES}" and whole.path.is_dir()
    assert {name.split(".")[0] for name in whole.state} == {"model", "replacement"}
    assert all(torch.equal(whole.state[name], resumed.state[name]) for name in whole.state)
    assert metrics(runs / "sharded", "metrics/eval/loss") == metrics(runs / "killed", "metrics/eval/loss")


@pytest.mark.parametrize("name", ["one", *RUNS])
def test_what_is_frozen_stays_bit_for_bit(runs: Path, trained_folder: Path, name: str) -> None:
    stored, found = StoredWeights(trained_folder), Checkpoint.open(runs / name).weights
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    trained = ("model.norm.", "model.layers.5.") if name == "swiglu" else ()
    changed = [key for key in stored if key in list(found) and not torch.equal(stored[key].to(dtype), found[key])]
    assert all(key.startswith(trained) for key in changed) and bool(changed) == bool(trained)


def test_a_plan_with_a_replacement_module_is_a_record(runs: Path, trained_folder: Path, tmp_path: Path) -> None:
    """Without its weights it would silently make another model."""
    plan = convert(runs / "one", tmp_path / "out")
    stored = Plan.load(tmp_path / "out" / "llmprune" / "plan.json")
    assert stored.replacement == plan.replacement == "blocks for blocks 2 to 4"
    for model in (trained_folder, runs / "one"):
        with pytest.raises(UserError, match="use `llmprune convert RUN`"):
            apply(model, tmp_path / "out" / "llmprune" / "plan.json", tmp_path / "again")
    with pytest.raises(UserError, match="use `llmprune convert RUN`"):
        open_for_comparison(trained_folder, plan)


@pytest.mark.parametrize("name", ["one", *RUNS])
def test_every_run_converts_to_what_it_computed(runs: Path, name: str, tmp_path: Path) -> None:
    convert(runs / name, tmp_path / "out")
    assert compare_models(open_for_comparison(runs / name), open_for_comparison(tmp_path / "out")).max_rel <= 1e-5
    tokens = torch.arange(5)[None]
    assert open_for_comparison(tmp_path / "out")(input_ids=tokens).logits.dtype is torch.float32


def test_the_best_is_kept(config: Path, tmp_path: Path) -> None:
    """The learning rate is so high that it gets worse; ``convert`` takes the best, and the last if that is named."""
    run = tmp_path / "run"
    train(
        load_training_job(
            config, [f"run.folder={run}", "optimizer.lr=0.3", "train.eval_first=true", "checkpoint.keep=-1"]
        )
    )
    losses = metrics(run, "metrics/eval/loss")
    assert losses[-1] > min(losses)
    with safe_open(run / "checkpoints" / "best.safetensors", framework="pt") as file:
        loss, batch = float(file.metadata()["loss"]), int(file.metadata()["batch"])
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    assert (loss, batch) == (pytest.approx(min(losses)), 4 * losses.index(min(losses)))
    if batch:
        then = Checkpoint.open(run / "checkpoints" / f"ba{batch}-rank0.pt").state
        assert all(torch.equal(kept[name], then[name]) for name in kept)
    convert(run, tmp_path / "best")
    convert(Checkpoint.open(run).path, tmp_path / "last")
    best, last = (load_model(tmp_path / which).state_dict() for which in ("best", "last"))
    name = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(best[name], kept["replacement.blocks.0.mlp.down_proj.weight"])
    assert not torch.equal(best[name], last[name])


def test_microbatches_change_nothing(config: Path, tmp_path: Path) -> None:
    changes = ["train.duration=3ba", "block_replacement.objectives={mse: 1.0, cosine: 1.0, lm: 1.0, kl: 1.0}"]
    whole = plain_runs.run(config, f"run.folder={tmp_path}/a", *changes, "train.microbatch_size=8")
    pieces = plain_runs.run(config, f"run.folder={tmp_path}/b", *changes, "train.microbatch_size=1")
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("samples", [2, 5, 8, 9])
def test_the_number_of_samples_that_is_named_will_do(
    samples: int, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmprune.callbacks.block_replacement.LEAST", 11)  # about a dozen samples
    settings = [f"run.folder={tmp_path}/run", "train.duration=0ba", "block_replacement.kind=linear"]
    settings += ["block_replacement.force=true"]
    with pytest.raises(UserError, match="fit_samples=") as told:
        train(load_training_job(config, [*settings, f"block_replacement.fit_samples={samples}"]))
    named = str(told.value).rpartition(": set ")[2]
    assert int(named.rpartition("=")[2]) < 40
    train(load_training_job(config, [*settings, named, "run.overwrite=true"]))


def test_a_fit_on_too_few_tokens_is_refused_before_the_model_is_opened(config: Path, tmp_path: Path) -> None:
    """32 hidden dimensions need 64 tokens; a sample of 32 has 31 that predict; of two batches of two, one is fitted."""
    settings = [f"run.folder={tmp_path}/run", "train.duration=0ba"]

    def checked(kind: str, samples: int) -> None:
        check(
            load_training_job(
                config, [*settings, f"block_replacement={{length: 2, start: 2, kind: {kind}, fit_samples: {samples}}}"]
            )
        )

    for kind in ("linear", "closed_form"):
        with pytest.raises(
            UserError, match=r"32 hidden dimensions on 62 tokens, .* set block_replacement.fit_samples=5$"
        ):
            checked(kind, 3)
        checked(kind, 5)
    checked("mean", 2)


@pytest.mark.parametrize("ranks, microbatch", [(1, 1), (1, 4), (2, 1), (3, 2)])
def test_the_number_of_samples_for_a_fit(ranks: int, microbatch: int) -> None:
    """Against the batches that the ranks would have."""

    def fitted(samples: int) -> int:
        total = 0
        for _ in range(ranks):
            own = [{"input_ids": torch.zeros(1)}] * math.ceil(samples / ranks)
            batches = [{"input_ids": torch.zeros(len(own[i : i + microbatch]))} for i in range(0, len(own), microbatch)]
            total += sum(len(batch["input_ids"]) for batch in _parted(batches)[0])
        return total * 9

    def told(samples: int) -> str | None:
        try:
            check_fit(BlockReplacementConfig(kind="linear", fit_samples=samples), 50, 10, ranks, microbatch)
        except UserError as error:
            return str(error)
        return None

    for samples in range(2, 30):
        assert (told(samples) is None) == (fitted(samples) >= 100)
        if (message := told(samples)) is not None:
            named = int(message.rpartition("=")[2])
            assert fitted(named) >= 100 > fitted(named - 1)
            assert f"on {fitted(samples)} tokens" in message


def test_computed_replacement_modules_are_least_squares(config: Path, tmp_path: Path) -> None:
    """Against numpy, from all states stored."""
    settings = ["train.duration=0ba", "block_replacement.fit_samples=16", "block_replacement.ridge=0.0"]
    settings += ["block_replacement.force=true"]
    model = load_model(str(load_training_job(config).model.path)).eval()
    loaded = load_training_job(config, settings)
    batches = [b["input_ids"] for b in first_batches(loaded, PreparedData(loaded.data.path), 16)]
    tokens = torch.cat(batches)[:12]  # fitted on three quarters
    seen: dict[str, torch.Tensor] = {}
    blocks_of(model)[1].mlp.register_forward_hook(lambda m, i, o: seen.update(update=o))
    with torch.no_grad():
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states
    before, after, update = (x[:, :-1].flatten(0, 1).double() for x in (states[2], states[5], seen["update"]))
    found = {}
    for kind in ("mean", "linear", "closed_form"):
        train(load_training_job(config, [f"run.folder={tmp_path}/{kind}", f"block_replacement.kind={kind}", *settings]))
        replacement = read_replaced(Checkpoint.open(tmp_path / kind), best=True).replacement
        found[kind] = {name: value.double() for name, value in replacement.state_dict().items()}
    assert torch.allclose(found["mean"]["net.bias"], (after - before).mean(0), atol=1e-5)
    ones = torch.cat([before, torch.ones(len(before), 1)], 1)
    wanted = torch.linalg.lstsq(ones, after - before).solution
    reached = before @ found["linear"]["net.update.weight"].T + found["linear"]["net.update.bias"]
    assert torch.allclose(reached, ones @ wanted, atol=2e-3)
    wanted = torch.linalg.lstsq(update, after - before).solution
    assert torch.allclose(update @ found["closed_form"]["update"], update @ wanted, atol=2e-3)


def test_the_span_is_found_on_the_spot(config: Path, runs: Path, tmp_path: Path) -> None:
    """By one rank, and by two."""
    changes = ["block_replacement.start=null", "block_replacement.score_samples=8", "train.duration=1ba"]
    settings = load_training_job(config, [f"run.folder={tmp_path}/run", *changes])
    model = load_model(str(settings.model.path)).eval()
    batches = list(first_batches(settings, PreparedData(settings.data.path), 8))
    tokens = torch.cat([batch["input_ids"] for batch in batches])
    states = []
    for block in blocks_of(model):
        block.register_forward_pre_hook(lambda m, inputs: states.append(inputs[0]))
        block.register_forward_hook(lambda m, i, o: states.append(o))
    with torch.no_grad():
        model(input_ids=tokens)
    ends = [states[2 * place] for place in range(6)] + [states[-1]]
    distances = [one_minus_cosine(ends[start], ends[start + 3]).mean().item() for start in range(4)]
    start = distances.index(min(distances))
    assert most_alike(model, iter(batches), 3, DeviceCPU()).start == start
    train(settings)
    for run in (tmp_path / "run", runs / "found"):
        assert Checkpoint.open(run).manifest.sections["block_replacement"]["start"] == start
    again = load_training_job(
        config, [f"run.folder={tmp_path}/run", *changes[:2], "train.duration=2ba", "run.autoresume=true"]
    )
    trainer = train(again)
    assert trainer.state.timestamp.batch.value == 2


def test_a_plan_names_the_span(config: Path, tmp_path: Path, trained_folder: Path) -> None:
    from dataclasses import replace

    from llmprune.conversion.export import keep_everything
    from llmprune.models.loading import load_model_config
    from llmprune.models.stored_weights import fingerprint
    from llmprune.plans.plan import KeptBlock

    model_config = load_model_config(trained_folder)
    whole = keep_everything(model_config, fingerprint(StoredWeights(trained_folder), model_config))
    kept = tuple(KeptBlock.whole(block) for block in (0, 1, 4, 5))
    replace(whole, blocks=kept).save(tmp_path / "plan.json")
    named = [
        "block_replacement.start=null",
        "block_replacement.length=null",
        f"block_replacement.plan={tmp_path}/plan.json",
    ]
    build_trainer(load_training_job(config, [f"run.folder={tmp_path}/run", *named])).close()
    manifest = json.loads((tmp_path / "run/checkpoints/manifest.json").read_text())["sections"]["block_replacement"]
    assert (manifest["start"], manifest["length"]) == (2, 2)
    replace(whole, blocks=kept, model="0" * 64).save(tmp_path / "plan.json")
    with pytest.raises(UserError, match="made for a model with the hash 0000"):
        build_trainer(load_training_job(config, [f"run.folder={tmp_path}/other", *named]))
    replace(whole, blocks=tuple(KeptBlock.whole(block) for block in (0, 2, 4, 5))).save(tmp_path / "plan.json")
    with pytest.raises(UserError, match="does more than to remove neighbouring blocks"):
        build_trainer(load_training_job(config, [f"run.folder={tmp_path}/other", *named]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["block_replacement.start=4"], "does not lie within the model's blocks, 0 to 5"),
        (["block_replacement.length=0", "block_replacement.start=null"], "length is 0; it must be positive"),
        (["block_replacement.ridge=-1.0"], "must be zero or positive"),
        ([*CACHED, "block_replacement.kind=none"], "leave the cache out"),
        ([*CACHED, f"block_replacement.cache={{samples: 16, folder: {__file__}}}"], "is a file: name a folder"),
        (["block_replacement.start=0", "block_replacement.length=6"], "the whole model"),
        (["block_replacement.length=null"], "names no span"),
        (["block_replacement.plan=x.json"], "leave out start and length"),
        (["block_replacement.kind=bloks"], "did you mean 'blocks'"),
        (["block_replacement.blocks=4"], "4 blocks can't replace 3"),
        (["block_replacement.take=middle"], "take 'middle' is unknown; valid: first, last, spread, random"),
        (["block_replacement.objectives={mse: 0.0}"], "need a positive weight"),
        (["block_replacement.objectives={mse: -1.0}"], "mse is -1.0; it must be zero or positive"),
        (["block_replacement.objectives={msee: 1.0}"], "no objective 'msee'"),
        (["block_replacement.also=[final_norm]"], "the teacher's too"),
        (["block_replacement.also=[final_norm]", "block_replacement.objectives={mse: 1.0}"], "objective lm alone"),
        (["block_replacement.also=[block.1]", "block_replacement.objectives={lm: 1.0}"], "block.N with N from 5 to 5"),
        (["block_replacement.also=[output]", "block_replacement.objectives={lm: 1.0}"], "its embedding, too"),
        (["block_replacement.top_k=5", "block_replacement.objectives={lm: 1.0}"], "belongs to the objective kl"),
        (["block_replacement.temperature=2", "block_replacement.objectives={lm: 1.0}"], "belongs to the objective kl"),
        (["block_replacement.temperature=0", "block_replacement.objectives={kl: 1.0}"], "temperature is 0.0"),
        (["block_replacement.start=0", "block_replacement.kind=closed_form"], "can't begin at block 0"),
        (["block_replacement.intermediate=0"], "must be positive"),
        (["block_replacement.also=[block.5, block.5]", "block_replacement.objectives={lm: 1.0}"], "named twice"),
        (["l0_pruning.target={layers: 3}"], "not both"),
        (
            ["block_replacement.also=[final_norm]", "block_replacement.objectives={lm: 1.0}", "model.dtype=bfloat16"],
            "take model.dtype=float32",
        ),
        (["block_replacement.start=null", "block_replacement.length=6"], "the whole model"),
        (["block_replacement.start=null", "sharding={}"], "can't be found on a sharded model"),
    ],
)
def test_mistakes(config: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_trainer(load_training_job(config, [f"run.folder={tmp_path}/run", *overrides]))
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_its_replacement_module(config: Path, tmp_path: Path) -> None:
    base = [f"run.folder={tmp_path}/run", "train.duration=4ba"]
    train(load_training_job(config, base))
    for change, named in (
        ("kind=ffn", "kind blocks"),
        ("length=2", "length 3"),
        ("objectives={lm: 1.0}", "objectives"),
    ):
        with pytest.raises(UserError, match=f"block_replacement.{named}"):
            build_trainer(load_training_job(config, [*base, "run.autoresume=true", f"block_replacement.{change}"]))


def test_a_replacement_module_that_saves_nothing_is_an_alarm(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build_trainer(load_training_job(config, [f"run.folder={tmp_path}/run", "block_replacement.blocks=3"])).close()
    assert "blocks 2 to 4 has" in caplog.text and "nothing is saved" in caplog.text


def test_a_cache_gives_the_same_training(config: Path, tmp_path: Path) -> None:
    """Epochs over 16 samples: the states of the source, rounded to bfloat16, and no block of it runs before the end."""
    run = tmp_path / "run"
    trainer = build_trainer(load_training_job(config, [f"run.folder={run}", *CACHED, "train.eval_interval=0ba"]))
    model = trainer.state.model.model
    ran: list[int] = []
    for number, block in enumerate(blocks_of(model)):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    trainer.fit()
    trainer.close()
    assert ran == [0, 1, 5]  # the look at the model before it is saved
    assert json.loads((run / "states" / "states.json").read_text())["complete"]
    assert (run / "states" / "before").stat().st_size == 16 * 32 * 32 * 2
    settings = load_training_job(config)
    tokens = torch.cat([b["input_ids"] for b in first_batches(settings, PreparedData(settings.data.path), 16)])
    plain = load_model(str(settings.model.path)).eval()
    with torch.no_grad():
        states = plain(input_ids=tokens, output_hidden_states=True).hidden_states
    cache = StatesCache(run / "states", 16, 32, 32, {})
    with pytest.raises(UserError, match="of another model, span or data"):
        cache.check_room()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "labels").touch()
    with pytest.raises(UserError, match="holds something else"):
        StatesCache(tmp_path / "other", 16, 32, 32, {}).check_room()
    for place in range(16):
        stored = cache.read(place)
        assert torch.equal(stored["labels"], tokens[place])
        for end, number in (("before", 2), ("after", 5)):
            torch.testing.assert_close(stored[end].float(), states[number][place], rtol=2**-8, atol=1e-5)
    losses = metrics(run, "loss/train/total")
    assert len(losses) == 7 and losses[-1] < losses[0]


def test_a_cache_keeps_documents_apart(config: Path, tmp_path: Path) -> None:
    """Blocks that begin as the span itself reach its output, but for the rounding to bfloat16."""
    whole = ["block_replacement.length=2", "block_replacement.blocks=2", "optimizer.lr=0.0", "train.eval_interval=0ba"]
    for boundaries in (False, True):
        run = tmp_path / str(boundaries)
        documents = f"data.document_boundaries={str(boundaries).lower()}"
        train(load_training_job(config, [f"run.folder={run}", *CACHED, *whole, documents]))
        assert max(metrics(run, "replacement/mse")) < 1e-4


def test_a_cache_on_two_ranks_and_after_a_kill(runs: Path) -> None:
    alone, two, killed = (metrics(runs / f"cached-{kind}", "loss/train/total") for kind in ("alone", "two", "killed"))
    assert len(alone) == 7
    assert two == pytest.approx(alone, rel=1e-5) and killed == pytest.approx(alone, rel=1e-5)


def test_the_order_of_a_cache_is_new_in_every_epoch_and_the_same_for_all(tmp_path: Path) -> None:
    cache = StatesCache(tmp_path, 12, 4, 8, {})
    cache.read = lambda place: place  # type: ignore[method-assign,assignment]

    def slots(ranks: int, start: int = 0) -> list[int]:
        streams = []
        for rank in range(ranks):
            stream = CachedStates(cache, global_batch_size=4, seed=1, rank=rank, world_size=ranks)
            stream.load_state_dict({"slot": start})
            streams.append(iter(stream))
        return [next(streams[rank]) for _ in range(6) for rank in range(ranks) for _ in range(4 // ranks)]  # type: ignore[misc]

    whole = slots(1)
    assert sorted(whole[:12]) == sorted(whole[12:]) == list(range(12)) and whole[:12] != whole[12:]
    assert slots(2) == whole and slots(2, start=8)[:16] == whole[8:]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["block_replacement.objectives={lm: 1.0}"], "mse and cosine need"),
        (["block_replacement.cache={samples: 17}"], "multiple of the global batch"),
        (["block_replacement.cache={samples: 1000000000}"], "choose fewer"),
        (["block_replacement.kind=closed_form"], "leave the cache out"),
        (["dynamic_loading={references: {letters: 1.0, numbers: 1.0}}"], "take dynamic_loading=null"),
    ],
)
def test_mistakes_of_caches(config: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_trainer(load_training_job(config, [f"run.folder={tmp_path}/run", *CACHED, *overrides]))
    assert not (tmp_path / "run").exists()


def test_texts_are_measured_on_the_shortened_model(config: Path, corpus: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six " * 60)
    live = f"evaluation={{texts: ['{text}'], segment: 32, batch_size: 4}}"
    train(load_training_job(config, [f"run.folder={tmp_path}/run", "train.duration=4ba", live]))
    convert(tmp_path / "run", tmp_path / "out")
    model, tokenizer = load_model(tmp_path / "out").eval(), load_tokenizer(tmp_path / "out")
    tokens = read_streams([str(text)], tokenizer, PerplexityConfig())["text"]
    found = measure_perplexity(model, tokens, Segmentation(32, 32), "none", bos=None, batch_size=4)
    assert metrics(tmp_path / "run", "metrics/eval/perplexity/text")[-1] == pytest.approx(found.value, rel=1e-5)
