"""The whole way, on a tiny model: what it writes, that it goes on, and what it refuses."""

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from composer import Callback
from composer.core import State
from composer.loggers import Logger
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data_prep.pack import prepare
from data_prep.recipe import PackSettings
from llmprune.cli import app
from llmprune.config.job_files import load_job, load_training_job
from llmprune.data.dataset import EvalDataset
from llmprune.data.prepared import PreparedData
from llmprune.evaluation.settings import GenerationConfig
from llmprune.jobs.prune import comparison, job, recipe, training
from llmprune.jobs.prune.job import prune
from llmprune.jobs.prune.outcome import Measured, Outcome
from llmprune.jobs.prune.recipe import DataSize, batch_samples, batch_tokens, calibration_samples
from llmprune.jobs.prune.settings import PruneConfig
from llmprune.jobs.prune.steps import Steps
from llmprune.jobs.train import train
from llmprune.measurement.measure import MeasureConfig
from llmprune.models.families import family_of
from llmprune.models.loading import count_parameters, load_model, load_model_config, load_tokenizer
from llmprune.models.stored_weights import StoredWeights
from llmprune.plans.plan import KeptBlock, Plan
from llmprune.pruning.budgets.settings import BudgetConfig
from llmprune.pruning.selection.correction import check_tokens
from llmprune.pruning.selection.methods import ScoredModel
from llmprune.recovery.distillation import DistillationConfig
from llmprune.training.sections.distillation import token_map_of
from llmprune.utils.errors import UserError
from llmprune.utils.files import read_json, write_json
from llmprune.utils.processes import TERMINATION, Preempted
from tests.conftest import random_model, tiny_config

SMALL = BudgetConfig(params="0.75", tries=4)


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Speed and continuations of a few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "SPEED", MeasureConfig((1,), output_tokens=(4,), warmups=0, repeats=2))
        patch.setattr(job, "_GENERATION", GenerationConfig(max_new_tokens=4))
        yield


@pytest.fixture(scope="module")
def source(trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in bfloat16."""
    folder = tmp_path_factory.mktemp("source") / "model"
    AutoModelForCausalLM.from_pretrained(trained_folder, dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer(trained_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pruned(source: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The model pruned to three quarters."""
    out = tmp_path_factory.mktemp("prune") / "out"
    return out, prune(str(source), out, PruneConfig(SMALL, data=str(data), tokens="4K"))


def test_the_result_is_a_smaller_model_with_everything_about_it(pruned: tuple[Path, Outcome], source: Path) -> None:
    out, outcome = pruned
    before, after = (count_parameters(load_model_config(folder)) for folder in (source, out / "model"))
    assert after <= 0.75 * before
    assert [one.parameters for one in outcome.models] == [before, after, after]
    assert {*StoredWeights(out / "model").dtypes().values()} == {"BF16"}  # like the source
    rows = json.loads((out / "candidates.json").read_text())
    losses = {name: row["held_out_loss"] for name, row in rows["candidates"].items() if "held_out_loss" in row}
    assert {"depth", "width", "both"} <= {*rows["candidates"]}
    assert losses[rows["chosen"]] == min(losses.values())
    for name in ("report.html", "speed.json", "results.json", "continuations/model.jsonl"):
        assert (out / name).exists(), name
    cut, trained = (Plan.load(place) for place in (out / "plan.json", out / "model" / "llmprune" / "cut.json"))
    assert (trained.blocks, trained.hidden, trained.model) == (cut.blocks, cut.hidden, cut.model)
    assert f"| intermediate | {cut.source.intermediate} | {cut.shape.intermediate} |" in (
        out / "model" / "README.md"
    ).read_text(encoding="utf-8")
    text = str(outcome)
    assert "nan" not in text.lower() and "None" not in text
    assert "recovered" in text and str(out / "model") in text


def test_the_yamls_are_jobs(pruned: tuple[Path, Outcome]) -> None:
    out, _ = pruned
    for name, kind in (("score", "score"), ("recover", "train")):
        assert f"composer train.py {out}/{name}.yaml" in (out / f"{name}.yaml").read_text()
        assert load_job(out / f"{name}.yaml").job == kind


def test_a_finished_command_does_nothing_again(
    pruned: tuple[Path, Outcome], source: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, outcome = pruned
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = prune(str(source), out, PruneConfig(SMALL, data=str(data), tokens="4K"))
    assert again.models == outcome.models
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before
    assert "…" not in capsys.readouterr().err


def test_it_does_not_matter_how_a_path_is_written(
    pruned: tuple[Path, Outcome], source: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, outcome = pruned
    monkeypatch.chdir(source)
    model = f"../{source.name}/"
    again = prune(model, out / ".." / out.name, PruneConfig(SMALL, data=os.path.relpath(data), tokens="4K"))
    assert again.models == outcome.models


def test_a_folder_from_before_a_setting_came_goes_on(pruned: tuple[Path, Outcome], source: Path, data: Path) -> None:
    out, outcome = pruned
    record = read_json(out / "prune.json")
    del record["settings"]["prompts"], record["settings"]["budget"]["vocabulary"]
    write_json(out / "prune.json", record)
    again = prune(str(source), out, PruneConfig(SMALL, data=str(data), tokens="4K"))
    assert again.models == outcome.models


def test_other_settings_are_refused(pruned: tuple[Path, Outcome], source: Path, data: Path) -> None:
    out, _ = pruned
    with pytest.raises(UserError, match="begun with tokens = 4K"):
        prune(str(source), out, PruneConfig(SMALL, data=str(data), tokens="5K"))
    assert (out / "model").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PruneConfig(), "say how small"),
        (PruneConfig(SMALL, tokens="1M", minutes=3), "give one"),
        (PruneConfig(SMALL, tokens="much"), "is no number of tokens"),
        (PruneConfig(SMALL, tokens="1.5"), "less than a batch of 2,048: write 1.5M"),
        (PruneConfig(SMALL, data="nowhere"), "nowhere does not exist"),
        (PruneConfig(SMALL, seq_len=100_000), "are too long"),
        (PruneConfig(BudgetConfig(latency="0.5"), method="gates"), "gates prune to a number of parameters"),
        (PruneConfig(BudgetConfig("0.5", depth_share=0.3), method="width"), "it goes with --method both"),
        (PruneConfig(BudgetConfig(params="0.9K apples")), "is no budget"),
        (PruneConfig(SMALL, prompts="nowhere.txt"), "nowhere.txt"),
        (PruneConfig(BudgetConfig(params="75")), "'75' is no budget of params, because a share is at most 1"),
        (PruneConfig(BudgetConfig(memory="8")), "'8' is no budget of memory, because a share is at most 1"),
        (PruneConfig(BudgetConfig(params="2K"), method="gates"), "gates do not remove"),
    ],
)
def test_what_is_impossible_is_told_before_work(
    config: PruneConfig, message: str, trained_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        prune(str(trained_folder), tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_what_failed_before_anything_was_done_is_begun_anew(source: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.txt").write_text("one short document " * 200)
    (tmp_path / "damaged.txt").write_bytes(b"\xff\xfe\xfa")
    for name, what in (("empty", "no"), ("one.txt", "no evaluation samples"), ("damaged.txt", "damaged.txt:1: ")):
        with pytest.raises(UserError, match=what):
            prune(str(source), tmp_path / "out", PruneConfig(SMALL, data=str(tmp_path / name), tokens="4K"))
    config = PruneConfig(SMALL, data=str(data), tokens="4K")
    job.check(str(source), tmp_path / "out", config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job._Prune, "run", lambda self: None)
        prune(str(source), tmp_path / "out", config)
    assert read_json(tmp_path / "out" / "prune.json")["inputs"]


def test_what_a_stopped_command_has_written_is_not_lost_by_another(source: Path, data: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job._Prune, "run", lambda self: (self._out / "text").mkdir())
        prune(str(source), tmp_path, PruneConfig(SMALL, data="self", tokens="4K"))
    with pytest.raises(UserError, match="was begun with .*pass --overwrite to begin anew"):
        prune(str(source), tmp_path, PruneConfig(SMALL, data=str(data), tokens="4K"))
    assert (tmp_path / "text").exists()


def test_a_folder_of_something_else_is_left_alone(trained_folder: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="did not make"):
        prune(str(trained_folder), tmp_path, PruneConfig(SMALL, data=str(data), tokens="4K"), overwrite=True)
    assert (tmp_path / "diary.txt").read_text() == "mine"


def test_a_stopped_command_goes_on_from_its_own_text_by_gates_for_minutes(
    trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PruneConfig(SMALL, method="gates", data="self", minutes=0.05, seq_len=32)
    out = tmp_path / "out"
    monkeypatch.setattr(recipe, "FEW_WRITTEN", 4000)

    def stop(*_: object, **__: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(training, "convert", stop)
        with pytest.raises(RuntimeError, match="killed"):
            prune(str(trained_folder), out, config)
    trained = {path: path.stat().st_mtime_ns for path in (out / "gates" / "checkpoints").glob("ba*.pt")}
    outcome = prune(str(trained_folder), out, config)
    assert trained == {path: path.stat().st_mtime_ns for path in (out / "gates" / "checkpoints").glob("ba*.pt")}
    assert trained
    assert outcome.models[-1].parameters <= 0.8 * outcome.models[0].parameters
    config_of_result = load_model_config(out / "model")
    assert Plan.load(out / "plan.json").shape == family_of(config_of_result).shape(config_of_result)
    assert not (out / "pace").exists()


def test_with_fewer_tokens(source: Path, data: Path, tmp_path: Path) -> None:
    budget = BudgetConfig(params="0.75", vocabulary=298, tries=4)
    outcome = prune(str(source), tmp_path / "out", PruneConfig(budget, data=str(data), tokens="4K"))
    assert load_model_config(tmp_path / "out" / "model").vocab_size == 298
    assert len(load_tokenizer(tmp_path / "out" / "model")) == 298
    assert outcome.models[-1].parameters <= 0.75 * outcome.models[0].parameters
    # The recovered model can learn from the source further: its folder says which tokens stayed.
    config = load_training_job(tmp_path / "out" / "recover.yaml", [f"model.path={tmp_path / 'out' / 'model'}"])
    distillation = config.section(DistillationConfig)
    assert distillation is not None
    manifest = PreparedData(tmp_path / "out" / "retold").manifest
    assert token_map_of(config, distillation, load_model_config(tmp_path / "out" / "model"), manifest) is not None
    # Perplexities are per token of the source's, so the recovered model's can be compared with the source's.
    model, dataset = load_model(tmp_path / "out" / "model"), EvalDataset(PreparedData(data), job.HELD_OUT)
    cut, whole = load_tokenizer(tmp_path / "out" / "model"), load_tokenizer(source)
    known, split = cut.get_vocab(), cut.backend_tokenizer.model.tokenize
    nats = tokens = 0.0
    for place in range(len(dataset)):
        sample = dataset[place]["input_ids"]
        words = whole.convert_ids_to_tokens(sample.tolist())
        spelt = [[known[word]] if word in known else [piece.id for piece in split(word)] for word in words]
        flat = torch.tensor([[piece for group in spelt for piece in group]])
        losses = -model(flat).logits[0, :-1].log_softmax(-1).gather(1, flat[0, 1:, None])
        nats, tokens = nats + losses[len(spelt[0]) - 1 :].sum().item(), tokens + len(sample) - 1
    assert outcome.models[-1].perplexity[""] == pytest.approx(math.exp(nats / tokens), rel=0.02)


def test_fewer_tokens_are_suggested_where_they_are_much_of_the_model(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_model_config(source)
    rows = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    share = rows / count_parameters(config)
    assert share > job.MANY_TOKENS
    for budget, hint in (
        (
            BudgetConfig(params="0.75"),
            f"{share:.0%} of the parameters belong to tokens; with --vocabulary 150 those go",
        ),
        (BudgetConfig(params="0.75", vocabulary=290), ""),
        (BudgetConfig(latency="0.75"), ""),
    ):
        job._Prune(str(source), tmp_path / "out", PruneConfig(budget))._suggest_fewer_tokens()
        text = capsys.readouterr().err
        assert hint in text and (hint or not text)
    monkeypatch.setattr(job, "MANY_TOKENS", 1.01 * share)
    job._Prune(str(source), tmp_path / "out", PruneConfig(BudgetConfig(params="0.75")))._suggest_fewer_tokens()
    assert not capsys.readouterr().err


class _Asking(Callback):
    """Somebody sends SIGTERM during a batch."""

    def __init__(self, batch: int) -> None:
        self._batch = batch

    def after_train_batch(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == self._batch - 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("batch", [1, 2])  # of two
def test_a_command_that_is_asked_to_end_comes_to_the_same(
    pruned: tuple[Path, Outcome], source: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    config, out = PruneConfig(SMALL, data=str(data), tokens="4K"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(training, "train", lambda job: train(job, [_Asking(batch)]))
        with pytest.raises(Preempted, match="asked to end: what is done is kept; the same command goes on"):
            prune(str(source), out, config)
    TERMINATION.asked = False  # as in another process
    assert [path.name for path in (out / "recover" / "checkpoints").glob("ba*.pt")][-1:] == [f"ba{batch}-rank0.pt"]
    assert not (out / "model").exists()
    prune(str(source), out, config)
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (pruned[0], out))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_share_won_back_is_of_nats() -> None:
    def measured(name: str, loss: float) -> Measured:
        return Measured(name, 10, 40, 50, {"": math.exp(loss)}, {1: 10.0 / loss}, {1: 0.8})

    outcome = Outcome(
        Path("out"), [measured("source", 2.0), measured("pruned", 4.0), measured("recovered", 2.5)], {}, {}
    )
    assert outcome.won_back == pytest.approx(0.75)
    assert outcome.faster == {1: pytest.approx(0.8)}
    assert "75%" in str(outcome)


@pytest.mark.parametrize(("tokens", "batch"), [(1, 2048), (250_000, 2048), (1e6, 8192), (50e9, 2**20)])
def test_a_batch_is_about_a_hundredth_of_the_tokens(tokens: float, batch: int) -> None:
    assert batch_tokens(tokens) == batch


def test_a_dry_run_tells_the_steps_and_does_nothing(
    trained_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "prune",
        str(trained_folder),
        "--params",
        "0.5",
        "--out",
        str(tmp_path / "out"),
        "--tokens",
        "1M",
        "--dry-run",
    ]
    app(command, standalone_mode=False)
    text = capsys.readouterr().out
    assert "1,000,000 tokens in batches of 8,192" in text
    with pytest.raises(UserError, match="nowhere does not exist"):
        app([*command, "--dry-run", "--data", "nowhere"], standalone_mode=False)
    assert not (tmp_path / "out").exists()


def test_wide_models_are_calibrated_on_more() -> None:
    wide = tiny_config(intermediate_size=14_336)
    assert calibration_samples(tiny_config(), 512) == 32  # at least
    assert calibration_samples(tiny_config(intermediate_size=1536), 512) == 128  # 32 tokens for an input
    assert calibration_samples(wide, 512) == 256  # at most
    samples = calibration_samples(wide, 64)  # unless fewer could not be fitted
    check_tokens(14_336, "refit", samples, 64)
    with pytest.raises(UserError, match=f"--samples {samples}"):
        check_tokens(14_336, "refit", samples - 1, 64)
    assert calibration_samples(wide, 512, available=20) == 20


def test_a_single_document_is_not_enough(trained_folder: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "book.jsonl").write_text(json.dumps({"text": "It was the best of times. " * 4000}))
    with pytest.raises(UserError, match="has no evaluation samples: give more text, in several files or records"):
        prune(str(trained_folder), tmp_path / "out", PruneConfig(SMALL, data=str(tmp_path / "book.jsonl"), seq_len=32))
    with pytest.raises(UserError, match="lies in the data"):
        prune(str(trained_folder), corpus / "out", PruneConfig(SMALL, data=str(corpus)))


def test_a_single_file_of_text_is_divided(source: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It was the best of times.\n\nIt was the worst of times.\n" * 2000)
    made = job._Prune(str(source), tmp_path / "out", PruneConfig(SMALL, data=str(tmp_path / "book.txt"), seq_len=32))
    data = PreparedData(made._prepare(Steps(tmp_path / "out")))
    assert data.domains_with("train") == data.domains_with("eval") == ["book"]
    splits = read_json(tmp_path / "out" / "data" / "manifest.json")["domains"]["book"].values()
    assert sum(split["documents"] for split in splits) == 20
    assert not (tmp_path / "out" / "parts").exists()


def test_a_batch_has_no_more_samples_than_there_are() -> None:
    assert batch_samples(200e6, DataSize(512, samples=440)) == 440
    assert batch_samples(200e6, DataSize(512, samples=10_000)) == 2048
    assert batch_samples(10, DataSize(512, samples=440)) == 4


def test_the_seconds_of_a_batch_count_one_step_of_the_optimiser() -> None:
    """Four batches of one microbatch of 2 samples: 1 s forward and backward, 0.5 s for the optimiser."""
    times = training.Times([9.0, 1.5, 1.5, 1.5], [8.0, 1.0, 1.0, 1.0])
    size = DataSize(512, samples=10_000)
    small, large = (training.speed_of(times, 2, size, minutes) for minutes in (0.1, 1e4))
    assert small == pytest.approx(2048 / 2.5)  # batches of 4 samples
    assert large == pytest.approx(1024, rel=0.01)  # of many


def test_minutes_include_the_evaluations() -> None:
    assert training.tokens_in(8, 300, DataSize(512, samples=10_000)) == 144_000
    assert training.tokens_in(8, 300, DataSize(512, 10_000, evaluated=30)) == 144_000 - 2 * 30 * 512 / 3
    assert training.tokens_in(1, 10, DataSize(512, 10_000, evaluated=30)) == 300


def test_data_without_evaluation_samples_are_refused_before_work(
    trained_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    prepare([corpus], trained_folder, tmp_path / "data", PackSettings(32, eval_fraction=0.0), processes=1)
    with pytest.raises(UserError, match="has no evaluation samples"):
        prune(str(trained_folder), tmp_path / "out", PruneConfig(SMALL, data=str(tmp_path / "data")))
    assert not (tmp_path / "out").exists()


def test_a_model_that_did_not_fit_into_memory_has_empty_cells() -> None:
    losses = {"source": 2.0, "pruned": 4.0, "recovered": 2.5}
    models = [Measured(name, 10, 40, None, {"": math.exp(loss)}, {}, {}) for name, loss in losses.items()]
    assert "None" not in str(Outcome(Path("out"), models, {}, {}))


def test_a_fit_without_memory_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fit(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = random_model(tiny_config())
    monkeypatch.setattr(comparison, "corrected", fit)
    shape = family_of(model.config).shape(model.config)
    plan = Plan("llama", "", shape, tuple(KeptBlock.whole(block) for block in (0, 1, 3)))
    assert comparison._refitted(plan, ScoredModel(model, None, 1)) is None
    assert "without refit: CUDA out of memory" in capsys.readouterr().err
