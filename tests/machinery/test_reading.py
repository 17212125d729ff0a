"""assignments/reading.md shows the code as it is, and leads to files that are there."""
import re

import pytest

from assignments import reading
from conftest import ROOT
from support.files import UserError

TEMPLATE = (reading.HERE / "reading.template").read_text()
PAGE = (reading.HERE / "reading.md").read_text()


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
