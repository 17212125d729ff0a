"""The README is true: its commands, its flags, its files, its tables."""
import ast
import functools
import importlib
import re
import subprocess
import sys

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text()
SCRIPT = re.compile(r"(?:python|torchrun)\s+(?:--\S+\s+)*(?:-m\s+)?"
                    r"((?:extras|results)\.\w+|\w+\.py)([^`#\n]*)")
STAGES = ["vqkd", "pretrain", "finetune", "linprobe", "segment"]


def commands():
    """-> (script, flags) of every command in the README; lines broken inside ` ` are joined."""
    text = re.sub(r"`[^`]*`", lambda m: m.group().replace("\n", " "), README)
    found = [(script, tuple(re.findall(r"(--[a-z][\w-]*)", rest)))
             for script, rest in SCRIPT.findall(text)]
    return sorted(set(found))


def path_of(script):
    return ROOT / (script if script.endswith(".py") else script.replace(".", "/") + ".py")


@functools.cache
def help_of(script):
    words = [str(path_of(script))] if script.endswith(".py") else ["-m", script]
    done = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, text=True,
                          capture_output=True, check=True)
    return done.stdout


def test_the_readme_has_commands():
    assert len(commands()) > 15


@pytest.mark.parametrize("script, flags", commands(), ids=lambda x: str(x))
def test_a_command_of_the_readme_exists_and_knows_its_flags(script, flags):
    assert path_of(script).is_file()
    for name in flags:
        assert re.search(rf"{name}\b", help_of(script)), f"{script} has no flag {name}"


def test_every_file_that_the_readme_links_or_names_is_there():
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    named = re.findall(r"\b((?:tests|results|support|extras)/[\w./-]+\.\w+)", README)
    assert links
    missing = [name for name in {*links, *named} if not (ROOT / name).exists()]
    assert not missing


def test_every_flag_that_the_readme_names_belongs_to_some_command():
    everything = "".join(help_of(f"{stage}.py") for stage in STAGES)
    for script in ("extras.bench", "extras.convert", "extras.visualize", "extras.robustness",
                   "extras.features", "results.ablate", "results.factors"):
        everything += help_of(script)
    others = {"--nproc_per_node", "--max-restarts", "--nnodes", "--include"}     # of torchrun, grep
    named = set(re.findall(r"(?<![\w-])(--[a-z][\w-]+)", README)) - others
    unknown = [name for name in named if not re.search(rf"{name}\b", everything)]
    assert not unknown


def equation_rows():
    table = README[README.index("| in the paper | here |"):].split("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]


@pytest.mark.parametrize("row", equation_rows(), ids=lambda row: row[0])
def test_a_row_of_the_equation_table_leads_to_code_and_to_its_test(row):
    _, here, _, test = row
    names = re.findall(r"`([\w.]+)`", here)
    module = importlib.import_module(names[0].partition(".")[0])
    for name in names:
        place = module
        for part in name.removeprefix(f"{module.__name__}.").split("."):
            place = getattr(place, part)
    assert (ROOT / test).is_file()
    assert any(name.rpartition(".")[2] in (ROOT / test).read_text() for name in names)


def method_lines(path):
    """Lines of the sections "method" and "training" of a stage, and all of model.py.

    Docstring, imports, arguments and main are not counted.
    """
    lines = path.read_text().splitlines()
    if path.name == "model.py":
        return len(lines)
    heads = [i for i, line in enumerate(lines) if line.startswith("# --- ")] + [len(lines)]
    total = 0
    for first, last in zip(heads, heads[1:], strict=False):
        if re.match(r"# --- (method|training)", lines[first]):
            total += last - first
    return total


@pytest.mark.parametrize("stage", STAGES)
def test_the_method_is_over_half_of_a_stage_file(stage):
    path = ROOT / f"{stage}.py"
    tree = ast.parse(path.read_text())
    assert method_lines(path) / (len(path.read_text().splitlines()) - tree.body[0].end_lineno) > 0.5


@pytest.mark.parametrize("name", ["model", *STAGES])
def test_the_readme_counts_the_lines_of_method(name):
    row = re.search(rf"^\| \[{name}\.py\].*\| (\d+) of (\d+) \|$", README, re.M)
    assert row, f"no row of {name}.py"
    path = ROOT / f"{name}.py"
    assert (int(row[1]), int(row[2])) == (method_lines(path),
                                          len(path.read_text().splitlines()))
