"""Functions in the text of a file: found by name, cut out, put in, emptied."""
import ast
import textwrap


def find(tree, function, kind=ast.FunctionDef):
    """The definition of "f" or "Class.f" in a syntax tree, or None."""
    node = tree
    for part in function.split("."):
        inside = [n for n in node.body if getattr(n, "name", None) == part]
        if not inside:
            return None
        node = inside[-1]                    # the last one counts, as in Python
    return node if isinstance(node, kind) else None


def lines_of(node):
    """First and last line of a definition, counted from 0, its decorators included."""
    return min(n.lineno for n in [node, *node.decorator_list]) - 1, node.end_lineno


def put(text, function, source, before=""):
    """The text of a file with another definition of a function, and `before` above it."""
    tree = ast.parse(text)
    node = find(tree, function)
    first, last = lines_of(node)
    lines = text.splitlines()
    lines[first:last] = textwrap.indent(source, " " * node.col_offset).splitlines()
    outer = find(tree, function.partition(".")[0], ast.ClassDef) if "." in function else node
    lines[lines_of(outer)[0]:lines_of(outer)[0]] = before.splitlines()
    ast.parse("\n".join(lines))
    return "\n".join(lines) + "\n"


def cut(text, function):
    """The source of a function, not indented. None if it is not there.

    Also from a file that does not parse: from its def to the next line that stands as far left.
    """
    try:
        node = find(ast.parse(text), function)
        if node is None:
            return None
        first, last = lines_of(node)
        lines = text.splitlines()[first:last]
    except (SyntaxError, ValueError):
        lines = cut_by_indentation(text, function)
    return textwrap.dedent("\n".join(lines)) + "\n" if lines else None


def cut_by_indentation(text, function):
    lines = text.splitlines()
    indent = "    " * function.count(".")
    begin = indent + f"def {function.rpartition('.')[2]}("
    starts = [i for i, line in enumerate(lines) if line.startswith(begin)]
    if not starts:
        return []
    first = starts[-1]
    last = first + 1
    while last < len(lines) and (lines[last].startswith((indent + " ", indent + ")"))
                                 or not lines[last].strip()):
        last += 1
    while first > 0 and lines[first - 1].startswith(indent + "@"):
        first -= 1
    return lines[first:last]


def blank(text, node, message):
    """The text of a file in which one function keeps signature and docstring and loses its body."""
    lines = text.splitlines()
    first = node.body[0]
    last_kept = first.lineno - 1
    if ast.get_docstring(node) is not None:
        last_kept = first.end_lineno
    stub = f'{" " * first.col_offset}raise NotImplementedError("{message}")'
    return "\n".join([*lines[:last_kept], stub, *lines[node.end_lineno:]]) + "\n"


def is_written(source):
    """Whether a function has more in it than the hand-out's."""
    *_, last = ast.parse(source).body[0].body
    return not (isinstance(last, ast.Raise) and "NotImplementedError" in ast.unparse(last))


def new_names(text, correct):
    """Imports, constants and helpers at the top of a submitted file that the project's lacks."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return ""
    known = {name for node in ast.parse(correct).body for name in names(node)}
    new = [node for node in tree.body if names(node) and not names(node) & known]
    return "\n".join(ast.unparse(node) for node in new)


def names(node):
    """What a statement at the top of a file defines."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {n.id for target in node.targets for n in ast.walk(target)
                if isinstance(n, ast.Name)}
    return set()
