"""What assignments/ makes of the sources: reading.md with its code, the notebook of the tour."""
import json
import os
import re
import subprocess
import sys

import pytest

from assignments import notebook, reading
from conftest import ROOT, log_lines, stage
from support.files import UserError

TEMPLATE = (reading.HERE / "reading.template").read_text()
PAGE = (reading.HERE / "reading.md").read_text()
TOUR = ROOT / "assignments" / "tour.py"


def test_the_reading_is_what_its_template_and_the_code_make():
    assert reading.page(TEMPLATE) == PAGE, "run python -m assignments.reading"


def test_an_excerpt_is_found_by_name_wherever_its_lines_are(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "ROOT", tmp_path)
    code = "class A:\n    @staticmethod\n    def f(x):\n        for i in x:\n            print(i)\n"
    table = "TABLE = {\n    1: 2,\n}\n"
    for before in ("", "import os\n\n\n"):
        (tmp_path / "m.py").write_text(before + code + table)
        assert reading.excerpt("m", "A.f") == (
            "@staticmethod\ndef f(x):\n    for i in x:\n        print(i)")
        assert reading.excerpt("m", "A.f", loop=True) == "for i in x:\n    print(i)"
        assert reading.excerpt("m", "TABLE") == table.rstrip()


@pytest.mark.parametrize("mark, said", [
    ("{{ vqkd.no_such }}", "no_such"), ("{{ nothing.f }}", "nothing.py"),
    ("{{ vqkd.l2: for }}", "a loop in l2"), ("{{ vqkd l2 }}", "not understood")])
def test_a_mark_that_leads_nowhere_is_named(mark, said):
    with pytest.raises(UserError, match=said):
        reading.page(f"text\n\n{mark}\n")


def test_every_link_of_the_reading_leads_to_a_file():
    links = re.findall(r"\]\(((?!http)[^)]+)\)", PAGE)
    assert len(links) > 20
    assert not [link for link in links if not (reading.HERE / link).is_file()]


def test_the_reading_walks_the_paper_in_its_order_and_fits_in_an_hour():
    sections = re.findall(r"^## Section (\d\.\d)", PAGE, re.M)
    assert sections == ["2.1", "2.2", "2.3", "3.1", "3.2", "3.3", "3.4"]
    words = len(re.sub(r"```.*?```", "", PAGE, flags=re.S).split())
    code = sum(len(part.splitlines()) for part in re.findall(r"```python\n(.*?)```", PAGE, re.S))
    # 100 words and 10 lines of code a minute.
    assert words / 100 + code / 10 <= 60, (words, code)


def test_every_name_that_the_reading_mentions_is_in_its_file():
    assert "def kmeans_start" in (ROOT / "vqkd.py").read_text()
    assert "LONG_RUN =" in (ROOT / "pretrain.py").read_text()


# --- the tour -------------------------------------------------------------------------------------
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
