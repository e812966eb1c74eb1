"""The public Python API: its examples, its page, and what importing it costs."""

import doctest
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llmprune
from llmprune.api import functions
from llmprune.utils import registry

ROOT = Path(__file__).parents[2]
JOB = """
run: {name: continue}
model: {path: base}
data: {path: data, eval_samples_per_domain: 2}
train: {duration: 4ba, global_batch_size: 4, microbatch_size: 4, eval_interval: 4ba}
loggers: {console: false}
"""


@pytest.fixture
def folder(trained_folder: Path, corpus: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the examples name: a model, text, prepared data and a job."""
    for name, place in (("base", trained_folder), ("text", corpus), ("data", data)):
        shutil.copytree(place, tmp_path / name)
    (tmp_path / "continue.yaml").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_of_the_docstrings(folder: Path) -> None:
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(verbose=False)
    names = [name for name, place in llmprune._PUBLIC.items() if place == functions.__name__]
    examples = [example for name in names for example in parser.get_examples(getattr(functions, name).__doc__ or "")]
    assert len(examples) >= 12
    text = doctest.DocTest(examples, {"llmprune": llmprune}, "api", None, None, None)
    assert runner.run(text).failed == 0


def test_the_six_lines_of_the_first_page(folder: Path) -> None:
    (text,) = doctest.DocTestFinder(recurse=False).find(llmprune, "llmprune")
    assert doctest.DocTestRunner(verbose=False).run(text).failed == 0
    assert json.loads((folder / "smaller" / "config.json").read_text())["num_hidden_layers"] == 5


def test_the_examples_of_registries() -> None:
    assert doctest.testmod(registry).failed == 0


def test_importing_it_imports_nothing_else() -> None:
    code = "import sys, llmprune; print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'composer')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert set(llmprune._PUBLIC) | {"__version__"} == set(llmprune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'prune_it'"):
        llmprune.prune_it  # noqa: B018


def test_no_package_hides_a_function() -> None:
    packages = {path.parent.name for path in (ROOT / "llmprune").glob("*/__init__.py")}
    assert not packages & set(llmprune.__all__)


def test_a_mistake_is_one_error(folder: Path) -> None:
    with pytest.raises(llmprune.UserError, match="overrides are of a YAML"):
        llmprune.train(llmprune.load_job("continue.yaml"), ["train.duration=1ba"])  # type: ignore[arg-type]
    with pytest.raises(llmprune.UserError, match="there is no criterion 'taylr'; did you mean 'taylor'"):
        llmprune.score("base", "text", criteria=["taylr"])


def test_the_page_is_that_of_the_docstrings() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import api_page
    finally:
        sys.path.pop(0)
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == api_page.page(), "run python scripts/api_page.py"
