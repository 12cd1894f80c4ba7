"""The notebook runs from its first cell to its last, and shows curves, videos and the analysis."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "proximo.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # committed without results
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises CellExecutionError for a cell that fails
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert kinds.count("image/png") == 4  # two curves, calibration and map
    assert sum("data:video/mp4" in output.get("data", {}).get("text/html", "") for output in outputs) == 2
    printed = "".join(output.get("text", "") for output in outputs)
    assert "trained 500" in printed
    assert "The value function" in printed
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs), printed
