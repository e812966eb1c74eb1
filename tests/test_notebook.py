"""docs/notebook.ipynb, executed from top to bottom with a small model."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

DOCS = Path(__file__).parents[1] / "docs"


def test_it_runs(trained_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(DOCS / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    for name, place in (("MODEL", trained_folder), ("DATA", data), ("OUT", tmp_path)):
        for cell in notebook.cells:
            lines = cell.source.split("\n")
            cell.source = "\n".join(
                f"{name} = Path({str(place)!r})" if x.startswith(f"{name} = ") else x for x in lines
            )
    for cell in notebook.cells:
        cell.source = cell.source.replace("BATCHES = 20", "BATCHES = 3").replace("LENGTH = 512", "LENGTH = 32")
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(DOCS)}}).execute()
    shown = [
        output.get("data", {}).get("text/plain", "") for cell in notebook.cells for output in cell.get("outputs", ())
    ]
    assert any("Difference(max_abs=" in text for text in shown)
    assert (tmp_path / "report.html").stat().st_size > 10_000
