"""Pointers lead somewhere: to what the paper has, and to files that a reader has."""
import re
import subprocess

import pytest

from conftest import ROOT

# What the paper numbers. Its text numbers three equations. The second loss of patch aggregation
# has no number: "Eq. (3) once more, through the shallow head".
EQUATIONS = {"1", "2", "3"}
SECTIONS = {
    "1": "introduction",
    "2.1": "image representation",
    "2.2": "training the tokenizer",
    "2.3": "pre-training, with patch aggregation",
    "3.1": "set-up of pre-training",
    "3.2": "image classification: fine-tuning and linear probing",
    "3.3": "semantic segmentation",
    "3.4": "analysis: ablations, pictures of the codes",
}
# Tables, figures and parts of the appendix are named by what they show ("the appendix's table of
# hyper-parameters"): their numbers differ between printings.
STAGE_SECTION = {"model.py": "2.1", "vqkd.py": "2.2", "pretrain.py": "2.3", "finetune.py": "3.2",
                 "linprobe.py": "3.2", "segment.py": "3.3"}
MADE_BY_A_COMMAND = {"AGENTS.md", "ASSIGNMENT.md", "OUT.md", "a.md"}  # not files of this project


def project_files():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True,
                            capture_output=True)
    if listed.returncode:                    # an unpacked copy has no history
        return sorted(p.relative_to(ROOT) for p in ROOT.rglob("*.*") if p.is_file())
    return [ROOT.joinpath(name).relative_to(ROOT) for name in listed.stdout.splitlines()
            if (ROOT / name).is_file()]


FILES = project_files()
PAGES = [path for path in FILES if path.suffix in (".py", ".md", ".sh")
         and path.name != "test_pointers.py"]


def wrong_pointers(text):
    """Equations, sections, tables, figures that a text names and the paper does not have."""
    wrong = []
    for found in re.finditer(r"\b(?:Eqs?\b\.?|[Ee]quations?\b) ?(\(?\d[\d(), andto]*)", text):
        named = found[1].rstrip(" ,andto")
        ours = "(" in named and set(re.findall(r"\d+", named)) <= EQUATIONS
        if not ours:
            wrong.append(found[0])
    for found in re.finditer(r"(?:\b[Ss]ec(?:tions?|s?\.)|§) ?(\d[\d.]*)", text):
        if found[1].rstrip(".") not in SECTIONS:
            wrong.append(found[0])
    numbered = r"\b(?:[Tt]ables?|[Ff]igures?|[Tt]ab\.|[Ff]igs?\.) ?\d+|\b[Aa]ppendix [A-Z\d]\b"
    wrong += re.findall(numbered, text)
    return wrong


@pytest.mark.parametrize("path", PAGES, ids=str)
def test_every_equation_section_table_and_figure_that_is_named_exists(path):
    assert wrong_pointers((ROOT / path).read_text()) == []


@pytest.mark.parametrize("text", ["Eq. (4)", "Eqs. (3) and (4)", "Eq. 2", "Equation 2",
                                  "equation (5)", "Section 2.4", "(Sec. 3.5)", "Table 7", "Fig. 2",
                                  "Appendix C"])
def test_a_pointer_to_nowhere_is_noticed(text):
    assert wrong_pointers(f"as {text} says") != []


@pytest.mark.parametrize("text", ["Eq. (2)", "Eqs. (1) to (3)", "Eqs. (1), (2)", "Section 3.3.",
                                  "the equation sums over D", "a table of 12 rows"])
def test_a_pointer_to_what_exists_is_not_complained_of(text):
    assert wrong_pointers(f"as {text} says") == []


@pytest.mark.parametrize("name, section", STAGE_SECTION.items())
def test_a_stage_names_the_section_that_describes_it(name, section):
    docstring = (ROOT / name).read_text().split('"""')[1]
    assert re.findall(r"Section (\d\.\d)", docstring) == [section]


@pytest.mark.parametrize("path", [p for p in PAGES if p.suffix == ".py"], ids=str)
def test_a_page_that_the_code_names_is_a_page_that_readers_have(path):
    known = {file.name for file in FILES} | MADE_BY_A_COMMAND
    named = set(re.findall(r"\b[\w-]+\.(?:md|sh|ipynb)\b", (ROOT / path).read_text()))
    assert not named - known
