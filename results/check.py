"""Are the pages of results/ what their records say, and are the records of today's project?

Each fault is one sentence that ends with the command to run. Nothing here trains or draws.
"""
import argparse
import ast
import collections
import hashlib
import importlib
import json
import shlex
import shutil
import subprocess

from results.tables import read_lines, with_facts
from support import inputs
from support.files import STAGES, UserError, plain_args
from support.run import differences

NEEDED = "command", "commit", "seed", "machine", "threads", "amp", "torch"


# --- records --------------------------------------------------------------------------------------
def records_of(page, folder):
    """The records of a page, in the order of its files; of several like files with their name."""
    found = []
    for name in page.records:
        for path in sorted(folder.glob(name)):
            file = dict(file=path.name) if "*" in name else {}
            found += [record | file for record in read_lines(path)]
    return found


def digest(records):
    """What a picture keeps of the records that it was drawn from."""
    return hashlib.sha256(json.dumps(records).encode()).hexdigest()[:16]


def label(file):
    """What a sentence calls a page."""
    return f"results/{file}".replace("results/../", "")


def lacking(records):
    """A sentence if there are no records, or some do not say where they come from; else nothing."""
    if not records:
        return "there are no records"
    lacks = [set(NEEDED) - record.keys() for record in with_facts(records)]
    names = [name for name in NEEDED if any(name in some for some in lacks)]
    number = sum(1 for some in lacks if some)
    return f"{number} of {len(records)} records lack {', '.join(names)}" if names else ""


def history(root):
    """-> a function commit -> whether it is in the history; None where that cannot be known."""
    def git(*words):
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    if "true" in git("rev-parse", "--is-shallow-repository").stdout:
        return None
    return lambda commit: git("merge-base", "--is-ancestor", commit, "HEAD").returncode == 0


def wrong_commits(records, is_ancestor):
    """The commits of records that nobody can look up."""
    found = collections.Counter(record["commit"] for record in with_facts(records))
    for commit, number in found.items():
        unclear = commit == "unknown" or commit.endswith("-dirty")
        if unclear or (is_ancestor and not is_ancestor(commit)):
            short = commit[:7] + commit[40:]
            yield (f"{number} of {len(records)} records are of commit {short}, which is not in the "
                   f"history")


def today(command):
    """-> the arguments of a stage's command, typed today; None for other commands"""
    _, script, *words = shlex.split(command)
    stage = script.removesuffix(".py")
    if stage not in STAGES:
        return None
    module = importlib.import_module(stage)
    args = module.parse_args(words)
    if stage == "finetune":                  # its recipe depends on what it starts from
        module.complete(args)
    args.micro_batch = args.micro_batch or args.batch_size   # as support/run.py does
    return args


def changed_recipes(records):
    """Records whose command, typed today, would train with other numbers or other pictures."""
    for record in records:
        recipes = dict(record.get("recipes", {}))
        if "args" in record:
            recipes[record["command"]] = record["args"]
        for command, recipe in recipes.items():
            args = today(command)
            if args is None:
                continue
            changed = differences(recipe, plain_args(args))
            pictures = inputs.fingerprints(argparse.Namespace(data=args.data), {})
            was = record["made_from"].get("data")
            if was != pictures.get("data"):
                changed.append(f"pictures {was} -> {pictures.get('data')}")
            if changed:
                yield f"`{command}` is another recipe today ({'; '.join(changed)[:200]})"


# --- pages ----------------------------------------------------------------------------------------
def drawn_from(path):
    """The digest in a PNG; None if there is no picture, or none in it."""
    from PIL import Image
    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.text.get("records")


def faults_of_page(name, page, module, folder, is_ancestor):
    """What is wrong with a page, its records and its pictures."""
    records = records_of(page, folder)
    file = label(page.file)
    lacks = lacking(records)
    if lacks:
        yield f"{file}: {lacks}: {page.command}"
        return
    for wrong in wrong_commits(records, is_ancestor):
        yield f"{file}: {wrong}: {page.command}"
    recipes = list(changed_recipes(records))
    if recipes:
        more = f", and {len(recipes) - 1} more" if recipes[1:] else ""
        yield f"{file}: {recipes[0]}{more}: {page.command}"
    try:
        text = module.page(records)
    except UserError as error:               # a run is missing
        yield f"{file}: {error}: {page.command}"
        return
    path = folder / page.file
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        yield f"{file} is not what its records say: python -m results.make {name}"
    for picture in page.pictures:
        if drawn_from(folder / picture) != digest(records):
            yield (f"results/{picture} was not drawn from the records of {file}: "
                   f"python -m results.make {name}")


def imported(path):
    """Names of the modules of results/ that a source file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("results.") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "results":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").removeprefix("results."))
    return found


def unclaimed(pages, folder):
    """Files that no page is made of, and that make no page."""
    wanted = {folder / "__init__.py"}
    sources = {"make", *pages} | {page.command.split(" -m results.")[-1].split()[0]
                                  for page in pages.values()}
    while sources:                           # a module, then what it imports
        path = folder / f"{sources.pop()}.py"
        if path.exists() and path not in wanted:
            wanted.add(path)
            sources |= imported(path)
    for page in pages.values():
        wanted |= {folder / name for name in (page.file, *page.pictures)}
        wanted |= {path for name in page.records for path in folder.glob(name)}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path not in wanted and "__pycache__" not in path.parts:
            name = label(path.relative_to(folder))
            yield f"{name} is made by no page, and makes none: git rm {name}"


def faults(pages, folder, maker):
    """-> all faults, and a note on what was not looked at. maker(name): the module of a page"""
    is_ancestor = history(folder.parent)
    note = "" if is_ancestor else "commits not looked up: there is no git here, or its history ends"
    found = []
    for name, page in pages.items():
        found += faults_of_page(name, page, maker(name), folder, is_ancestor)
    return [*found, *unclaimed(pages, folder)], note
