"""The house: what stands at the top level, which way imports point, how long things are."""
import ast
import importlib.metadata

import pytest
from packaging.requirements import Requirement

from conftest import ROOT

STAGES = ["vqkd", "pretrain", "finetune", "linprobe", "segment"]
TOP = {f"{name}.py" for name in ["model", *STAGES]}
# Imports go to the left only.
FLOORS = ["model", "support", "stages", "extras", "assignments", "results"]
FOLDERS = "", "support/", "assignments/", "extras/", "results/"
SOURCES = sorted(f for folder in FOLDERS for f in ROOT.glob(f"{folder}*.py"))
IDS = [str(f.relative_to(ROOT)) for f in SOURCES]


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def floor_of(module):
    first = module.partition(".")[0]
    return "stages" if first in STAGES else first


def imports(path):
    """Names of the project's modules that a file imports, anywhere in it."""
    known = {module_of(f) for f in SOURCES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return (found & known) - {module_of(path)}


def functions(path):
    """-> (name, lines) of every function, without the lines of its decorators."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def test_the_installed_torch_and_torchvision_lie_in_ranges_that_belong_together():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    ranges = {r.name: r.specifier for r in (Requirement(x.partition("#")[0]) for x in lines)}
    for name in ("torch", "torchvision"):
        assert importlib.metadata.version(name) in ranges[name]
    for minor in range(30):                  # torchvision 0.26 belongs to torch 2.11, and so on
        assert (f"2.{minor}.0" in ranges["torch"]) == (f"0.{minor + 15}.0" in ranges["torchvision"])


def test_the_top_level_holds_the_five_stages_and_the_model():
    assert {f.name for f in ROOT.glob("*.py")} == TOP


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_imports_point_downwards_only(path):
    here = FLOORS.index(floor_of(module_of(path)))
    for other in imports(path):
        assert FLOORS.index(floor_of(other)) <= here, f"{module_of(path)} imports {other}"


def test_a_stage_imports_no_other_stage_but_pretraining_its_tokenizer():
    found = {stage: sorted(imports(ROOT / f"{stage}.py") & set(STAGES)) for stage in STAGES}
    assert found == {"vqkd": [], "pretrain": ["vqkd"], "finetune": [], "linprobe": [],
                     "segment": []}


def test_no_import_goes_in_a_circle():
    graph = {module_of(f): imports(f) for f in SOURCES}
    done = set()

    def visit(module, path):
        assert module not in path, f"circle: {' -> '.join([*path, module])}"
        if module not in done:
            for other in graph[module]:
                visit(other, [*path, module])
            done.add(module)
    for module in graph:
        visit(module, [])


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_a_file_has_at_most_500_lines_and_a_function_at_most_60(path):
    assert len(path.read_text().splitlines()) <= 500
    long = [(name, lines) for name, lines in functions(path) if lines > 60]
    assert not long


@pytest.mark.parametrize("stage", STAGES)
def test_a_training_loop_fits_on_a_screen_and_so_do_its_flags(stage):
    lines = dict(functions(ROOT / f"{stage}.py"))
    assert lines.get("train", 0) <= 50
    assert lines["parse_args"] <= 45


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_every_module_and_every_function_of_a_stage_says_what_it_is_for(path):
    tree = ast.parse(path.read_text())
    if path.name == "__init__.py":
        return
    assert ast.get_docstring(tree)
    if path.parent == ROOT:
        silent = [node.name for node in tree.body if isinstance(node, ast.ClassDef)
                  and not ast.get_docstring(node)]
        assert not silent
