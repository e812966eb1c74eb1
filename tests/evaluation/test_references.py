"""Reference losses: known curves are found again, the published ones of Llama-2 too."""

import json
from pathlib import Path

import pytest

from llmprune.cli import app
from llmprune.data.prepared import PreparedData
from llmprune.evaluation.losses import evaluate_losses
from llmprune.evaluation.references import fit_scaling_law
from llmprune.models.loading import load_model
from llmprune.utils.errors import UserError

LLAMA2 = [6738415616, 13015864320, 68976648192]


def test_the_published_references_of_llama_2() -> None:
    """Sheared-LLaMA's losses of three sizes give its references for smaller models (common crawl)."""
    law = fit_scaling_law(LLAMA2, [1.7520, 1.6680, 1.4621])
    for size, reference in ((373867520, 2.1401), (1345423360, 1.9643), (2701560320, 1.8712)):
        assert law.at(size) == pytest.approx(reference, abs=0.02)
    assert law.rmse is None  # three points, three coefficients
    assert [law.at(n) for n in LLAMA2] == pytest.approx([1.7520, 1.6680, 1.4621], abs=1e-5)


@pytest.mark.parametrize(("a", "b", "c"), [(400.0, 0.34, 1.69), (5.0, 0.05, 0.2), (3e6, 0.9, 2.0)])
def test_a_known_curve_is_found_again(a: float, b: float, c: float) -> None:
    sizes = [1e7, 3e7, 1e8, 1e9, 7e9]
    law = fit_scaling_law(sizes, [a * n**-b + c for n in sizes])
    assert (law.b, law.c) == pytest.approx((b, c), rel=2e-2)
    assert law.at(3e8) == pytest.approx(a * 3e8**-b + c, rel=1e-5)
    assert law.rmse is not None and law.rmse < 1e-6
    noisy = fit_scaling_law(sizes, [a * n**-b + c + 0.01 * (-1) ** i for i, n in enumerate(sizes)])
    assert noisy.rmse is not None and 0.003 < noisy.rmse < 0.012


def test_no_law() -> None:
    with pytest.raises(UserError, match="three sizes"):
        fit_scaling_law([1e9, 1e9, 2e9], [2.0, 2.0, 1.9])
    with pytest.raises(UserError, match="do not fall"):
        fit_scaling_law([1e9, 2e9, 4e9], [1.0, 1.5, 1.8])


def test_the_command(trained_folder: Path, model_folder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "references.json"
    app(["references", str(trained_folder), "--data", str(data), "--out", str(out)], standalone_mode=False)
    found = json.loads(out.read_text())["references"]
    assert found == pytest.approx(evaluate_losses(load_model(trained_folder), PreparedData(data)).domains, rel=1e-6)
    for arguments, message in (
        ([str(trained_folder), "--size", "1000"], "with --size"),
        ([str(trained_folder), str(model_folder)], "with --size"),
        ([str(trained_folder), str(model_folder), "--size", "1000"], "three sizes"),
    ):
        with pytest.raises(UserError, match=message):
            app(
                ["references", *arguments, "--data", str(data), "--out", str(tmp_path / "new.json")],
                standalone_mode=False,
            )
