"""The README is true: its commands, its flags, its files, its tables."""
import ast
import contextlib
import functools
import importlib
import inspect
import io
import re

import pytest

from conftest import ROOT
from results.readme import STAGES, TABLES, flags, method_lines, with_tables

README = (ROOT / "README.md").read_text()
SCRIPT = re.compile(r"(?:python|torchrun)\s+(?:--\S+\s+)*(?:-m\s+)?"
                    r"((?:extras|results)\.\w+|\w+\.py)([^`#\n]*)")


def commands():
    """-> (script, flags) of every command in the README; lines broken inside ` ` are joined."""
    text = README.replace("```", "")         # in a block each line is a command
    text = re.sub(r"`[^`]*`", lambda m: m.group().replace("\n", " "), text)
    found = [(script, tuple(re.findall(r"(--[a-z][\w-]*)", rest)))
             for script, rest in SCRIPT.findall(text)]
    return sorted(set(found))


def path_of(script):
    return ROOT / (script if script.endswith(".py") else script.replace(".", "/") + ".py")


@functools.cache
def help_of(script):
    """What `script --help` prints; "" for a script without flags."""
    main = importlib.import_module(script.removesuffix(".py")).main
    if not inspect.signature(main).parameters:
        return ""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        main(["--help"])
    return printed.getvalue()


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
    others = {"--nproc_per_node", "--max-restarts", "--nnodes", "--rdzv_backend",    # of torchrun
              "--rdzv_endpoint", "--signals-to-handle", "--nodes", "--include"}      # sbatch, grep
    named = set(re.findall(r"(?<![\w-])(--[a-z][\w-]*\w)(?![\w-])", README)) - others
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


def test_the_tables_that_follow_from_the_code_are_todays():
    assert with_tables(README, TABLES) == README, "python -m results.readme"


@pytest.mark.parametrize("stage", STAGES)
def test_the_method_is_over_half_of_a_stage_file(stage):
    text = (ROOT / f"{stage}.py").read_text()
    docstring = ast.parse(text).body[0].end_lineno
    assert method_lines(text) / (len(text.splitlines()) - docstring) > 0.5


def test_lines_of_method_are_those_of_method_and_training():
    lines = ["docstring", "# --- method: a", "x", "", "# --- training ---", "y", "# --- data", "z"]
    assert method_lines("\n".join(lines)) == 3 + 2


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_of_a_stage_has_a_line_and_says_what_it_does(stage):
    for flag, text in flags(stage).items():
        assert text, f"{stage} {flag} has no help"
        assert f"| `{flag}` |" in README
