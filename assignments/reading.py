"""assignments/reading.md: the paper section by section, beside each the code that computes it.

    python -m assignments.reading             # writes reading.md from reading.template

The prose stands in reading.template. There a line

    {{ vqkd.nearest_code }}                   a function, class, method or table of a file
    {{ vqkd.train: for }}                     the first loop in it

becomes the excerpt that it names. Excerpts are found by name, so lines may move. A test compares
reading.md with what this program makes.
"""
import ast
import re
import textwrap
from pathlib import Path

from support.args import Parser
from support.files import ROOT, UserError
from support.process import launch

HERE = Path(__file__).resolve().parent
MARK = re.compile(r"^\{\{ ([\w/]+)\.([\w.]+)(: for)? \}\}$", re.M)


def names_of(node):
    """The names that a statement gives: of a function, of a class, or of the variables it fills."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = getattr(node, "targets", [])
    return [target.id for target in targets if isinstance(target, ast.Name)]


def find(tree, name):
    """The statement called "function", "Class" or "Class.method" in a syntax tree, or None."""
    for part in name.split("."):
        tree = next((node for node in tree.body if part in names_of(node)), None)
        if tree is None:
            return None
    return tree


def first_line(node):
    """Where a statement begins, with its decorators."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(d.lineno for d in decorators)])


def excerpt(file, name, loop=False):
    """The source of `name` in `file` (without .py), to the left margin. UserError if not there."""
    path = ROOT / f"{file}.py"
    if not path.is_file():
        raise UserError(f"reading.template names {file}.py, which is not there")
    source = path.read_text()
    node = find(ast.parse(source), name)
    if loop and node is not None:
        node = next((n for n in ast.walk(node) if isinstance(n, ast.For)), None)
    if node is None:
        what = f"a loop in {name}" if loop else name
        raise UserError(f"{file}.py has no {what}: let assignments/reading.template follow the "
                        f"code")
    lines = source.splitlines()[first_line(node) - 1:node.end_lineno]
    return textwrap.dedent("\n".join(lines))


def block(match):
    """What stands in the place of a mark: the name, linked to its file, and the code."""
    file, name, loop = match.groups()
    part = ", its loop" if loop else ""
    return (f"`{name}`{part}, in [{file}.py](../{file}.py):\n\n```python\n"
            f"{excerpt(file, name, bool(loop))}\n```")


def page(template):
    """The template with all its marks replaced."""
    text = MARK.sub(block, template)
    if left := re.search(r"^.*\{\{.*$", text, re.M):
        raise UserError(f"reading.template has a mark that is not understood: {left[0]}")
    return text


def main(argv=None):
    Parser(__doc__).parse_args(argv)
    text = page((HERE / "reading.template").read_text())
    (HERE / "reading.md").write_text(text)
    print(f"assignments/reading.md: {len(text.split())} words, {text.count('```python')} excerpts")


if __name__ == "__main__":
    launch(main)
