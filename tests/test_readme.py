"""The quickstart in miniature, and every command of the README and the docs on what it leaves."""

import json
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from transformers import LlamaConfig

from data_prep.builtin import build_corpus
from data_prep.tokenizer import train_tokenizer
from llmprune.jobs.prune import job, recipe
from llmprune.jobs.prune.settings import PruneConfig
from llmprune.measurement.measure import MeasureConfig
from llmprune.models.loading import new_model
from tests.harness.forked import carry_out, is_one_command

ROOT = Path(__file__).parents[1]
LENGTH = 128  # tokens of a sample
BIN = Path(sys.executable).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)]
COMMANDS = [
    line.removeprefix(".venv/bin/")
    for block in BLOCKS
    for line in block.splitlines()
    if not line.startswith(("git ", "pip ", "bash scripts/"))
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout, in which the quickstart has run on a stand-in for the built-in model.

    The stand-in has as many blocks, heads and groups, and an eighth of the other sizes.
    """
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "train.py").symlink_to(ROOT / "train.py")
    (folder / "README.md").symlink_to(ROOT / "README.md")
    (folder / "yamls").symlink_to(ROOT / "yamls")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        build_corpus(folder / "some-text", megabytes=0.5)
        tokenizer = train_tokenizer([folder / "some-text"], folder / "tokenizer", vocab_size=600)
        config = LlamaConfig(
            vocab_size=600,
            hidden_size=72,
            intermediate_size=192,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new_model(config, seed=0).save_pretrained("runs/smollm2")
        tokenizer.save_pretrained("runs/smollm2")
        patch.setattr(job, "MEGABYTES", 1.0)
        patch.setattr(recipe, "SAMPLES", 4)
        patch.setattr(recipe, "EVALUATED", 1)
        for name in ("HELD_OUT", "JUDGED"):
            patch.setattr(job, name, 1)
        patch.setattr(job, "SPEED", MeasureConfig((1,), output_tokens=(2,), warmups=0, repeats=1))
        patch.setattr(sys, "argv", ["quickstart.py", "--minutes", "0.02"])
        main = runpy.run_path(str(ROOT / "scripts" / "quickstart.py"), {"__name__": "quickstart"})["main"]
        main.__globals__.update(TRIES=2, PruneConfig=partial(PruneConfig, seq_len=LENGTH))
        assert main() == 0
    return folder


def test_the_quickstart_ends_with_three_models_and_a_report(workplace: Path) -> None:
    out = workplace / "runs/quickstart"
    speed = json.loads((out / "speed.json").read_text())["models"]
    assert [*speed] == [str(workplace / "runs" / name) for name in ("smollm2", "quickstart/pruned", "quickstart/model")]
    source, _, model = (one["parameters"] for one in speed.values())
    assert model <= 0.75 * source
    assert "runs/quickstart" in (out / "report.html").read_text()


def _an_eighth(size: "re.Match[str]") -> str:
    return f"{size[1]}{size[2]}{int(size[3]) // 8}"


def test_every_command_of_the_pages_works(workplace: Path, tmp_path: Path) -> None:
    assert len(COMMANDS) >= 25
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    log = tmp_path / "log"
    seen: set[str] = set()
    for command in COMMANDS:
        shortened = re.sub(r"\b(hidden|intermediate|group-size)([=: ]+)(\d+)", _an_eighth, command)
        shortened = re.sub(r"(vocabulary[= ])\d+", r"\g<1>500", shortened)
        if re.match(r"composer|for node|llmprune search", command) and "score.yaml" not in command:
            sizes = "train.duration=4ba train.global_batch_size=4 train.microbatch_size=4 train.eval_interval=4ba"
            here = f" {sizes} data.eval_samples_per_domain=1"
            shortened = shortened.replace(".yaml", f".yaml{here}", 1)
        shortened = shortened.replace("--sequence-length 512", f"--sequence-length {LENGTH}")
        if command.startswith("llmprune score") and "--samples" not in command:
            shortened += " --samples 4"
        if "--correction" in command or "--budget" in command:
            shortened += " --force"  # the stand-in is not trained: what pruning does to it is chance
        program = command.split()[0]
        if program in seen and is_one_command(shortened):
            code = carry_out(shortened, workplace, log, timeout=300)
        else:  # every program is started by a shell at least once
            with log.open("w") as file:
                done = subprocess.run(
                    ["bash", "-c", shortened], cwd=workplace, env=environment, stdout=file, stderr=file, timeout=300
                )
            code = done.returncode
        seen.add(program)
        assert code == 0, f"{command}\n{log.read_text()[-5000:]}"
