"""The tour: one file of cells, which runs as a script and is also the notebook."""
import json
import os
import subprocess
import sys

import pytest

from assignments import notebook
from conftest import ROOT, log_lines, stage
from support.files import UserError

TOUR = ROOT / "assignments" / "tour.py"


def test_the_notebook_is_what_the_program_makes(tmp_path):
    stage("assignments.tour", "--notebook", tmp_path / "tour.ipynb")
    made = (tmp_path / "tour.ipynb").read_text()
    ours = (ROOT / "assignments" / "tour.ipynb").read_text()
    assert made == ours, "run python -m assignments.tour --notebook assignments/tour.ipynb"


def test_a_notebook_holds_every_cell_in_its_order():
    source = 'before\n# %% [markdown]\n# # A\n#\n# * b\n# %%\nx = "é"\n\n# why\ny = 2\n\n# %%\nz\n'
    assert notebook.cells(source) == [("markdown", "# A\n\n* b"),
                                      ("code", 'x = "é"\n\n# why\ny = 2'), ("code", "z")]
    made = json.loads(notebook.notebook(source))
    assert (made["nbformat"], made["nbformat_minor"]) == (4, 4)
    assert [cell["cell_type"] for cell in made["cells"]] == ["markdown", "code", "code"]
    assert "".join(made["cells"][1]["source"]) == 'x = "é"\n\n# why\ny = 2'
    assert made["cells"][1]["outputs"] == [] and made["cells"][1]["execution_count"] is None
    assert "outputs" not in made["cells"][0]                 # the format allows none there


def test_a_line_of_code_in_a_cell_of_text_is_refused():
    with pytest.raises(UserError, match="no comment: x = 1"):
        notebook.cells("# %% [markdown]\n# text\nx = 1\n")


def test_the_code_of_the_notebook_is_the_code_of_the_file():
    made = json.loads((ROOT / "assignments" / "tour.ipynb").read_text())
    code = ["".join(cell["source"]) for cell in made["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 5
    for text in code:
        compile(text, "cell", "exec")
        assert text in TOUR.read_text()


def test_the_notebook_without_the_project_and_without_its_address_says_what_is_missing(tmp_path):
    made = json.loads((ROOT / "assignments" / "tour.ipynb").read_text())
    first = next("".join(cell["source"]) for cell in made["cells"] if cell["cell_type"] == "code")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", first], cwd=tmp_path, text=True,
                          capture_output=True, env=environment)
    assert done.returncode and "put the address of this project" in done.stderr
    inside = tmp_path / "assignments"        # Jupyter starts in the notebook's own folder
    inside.mkdir()
    (tmp_path / "vqkd.py").write_text("here = 1\n")
    done = subprocess.run([sys.executable, "-c", f"{first}\nimport vqkd\nprint(vqkd.here)"],
                          cwd=inside, text=True, capture_output=True, env=environment)
    assert done.stdout.strip() == "1", done.stderr


@pytest.mark.slow
def test_the_tour_runs_from_its_first_cell_to_its_last(tmp_path):
    environment = os.environ | dict(PYTHONPATH=str(ROOT), MPLBACKEND="Agg")
    done = subprocess.run([sys.executable, str(TOUR)], cwd=tmp_path, text=True,
                          capture_output=True, env=environment, timeout=3000)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    out = tmp_path / "runs" / "tour"
    for name in ("tokens", "codes", "collapse", "curves", "prediction"):
        assert (out / f"{name}.png").stat().st_size > 5000
    healthy, broken = [log_lines(path / "vqkd.jsonl") for path in (out, out / "broken")]
    assert healthy[-1]["perplexity"] > 30 > 16 > broken[-1]["perplexity"]
    assert any("warning" in line for line in broken)
    chance = 100 / 64
    assert log_lines(out / "pretrain.jsonl")[-1]["mask_acc"] > 4 * chance
