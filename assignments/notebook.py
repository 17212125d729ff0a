"""A Python file with cell markers becomes a notebook. Used by tour.py.

    # %% [markdown]      the comment lines below are text
    # %%                 the lines below are code

What stands before the first marker is not in the notebook.
"""
import json
from pathlib import Path

from support.args import Parser
from support.files import UserError

MARKER = "# %%"


def cells(source):
    """-> [(kind, text)], kind "markdown" or "code". UserError for text that is no comment."""
    found = []
    for line in source.splitlines():
        if line.startswith(MARKER):
            kind = "markdown" if line.removeprefix(MARKER).strip() == "[markdown]" else "code"
            found.append((kind, []))
        elif found:
            kind, lines = found[-1]
            if kind == "markdown":
                if line and not line.startswith("#"):
                    raise UserError(f"a cell of text has a line that is no comment: {line}")
                line = line.removeprefix("#").removeprefix(" ")
            lines.append(line)
    return [(kind, "\n".join(lines).strip("\n")) for kind, lines in found]


def notebook(source):
    """The text of the .ipynb file (format 4), without outputs."""
    made = []
    for kind, text in cells(source):
        cell = dict(cell_type=kind, metadata={}, source=text.splitlines(keepends=True))
        if kind == "code":
            cell |= dict(execution_count=None, outputs=[])
        made.append(cell)
    kernel = dict(display_name="Python 3", language="python", name="python3")
    whole = dict(cells=made, metadata=dict(kernelspec=kernel, language_info=dict(name="python")),
                 nbformat=4, nbformat_minor=4)
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def write(source_path, argv=None):
    """The command line of a file of cells: --notebook FILE writes it as a notebook."""
    p = Parser(f"{source_path} as a notebook")
    p.add_argument("--notebook", type=Path, required=True, help="the .ipynb file to write")
    args = p.parse_args(argv)
    try:
        args.notebook.write_text(notebook(Path(source_path).read_text()))
    except OSError as error:
        raise UserError(f"cannot write {args.notebook} ({error.strerror}): choose another "
                        f"--notebook") from error
    print(f"{Path(source_path).name} -> {args.notebook}")
