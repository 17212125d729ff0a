"""The tables of the README that follow from the code: flags, lines of method, hours of a run.

    python -m results.readme                 # writes them into README.md, between their marks

The first screen comes from records (results/first_screen.py). As long as those are missing, what
stands there stays.
"""
import argparse
import importlib
import re
from unittest import mock

from extras import plan
from results import first_screen, make, speed
from results.check import lacking, records_of
from results.tables import RESULTS, ROOT, read_lines
from support.args import Parser

STAGES = "vqkd", "pretrain", "finetune", "linprobe", "segment"
FILES = {
    "model": "the ViT by hand: patches, relative positions, attention, block, read-outs",
    "vqkd": "stage 1: quantizer, loss with both stop-gradients, k-means start, training",
    "pretrain": "stage 2: block masks, patch aggregation, both heads",
    "finetune": "stage 3a: layer decay, mixing, classification",
    "linprobe": "stage 3b: a grid of linear heads at once, k-NN",
    "segment": "stage 3c: UPerNet on four blocks, sliding windows, mIoU",
}


# --- lines of method ------------------------------------------------------------------------------
def method_lines(text):
    """Lines in the sections "method" and "training" of a stage's text.

    Docstring, imports, arguments and main are not counted.
    """
    sections = re.split(r"^# --- ", text, flags=re.MULTILINE)[1:]
    return sum(len(section.splitlines()) for section in sections
               if section.startswith(("method", "training")))


def files_table():
    lines = ["| to read | | lines of method, of all |", "|---|---|---|"]
    for name, what in FILES.items():
        text = (ROOT / f"{name}.py").read_text()
        all_lines = len(text.splitlines())
        method = all_lines if name == "model" else method_lines(text)
        lines.append(f"| [{name}.py]({name}.py) | {what} | {method} of {all_lines} |")
    return lines


# --- flags ----------------------------------------------------------------------------------------
class Caught(Exception):
    """Carries the parser of a stage."""


def parser_of(stage):
    """The parser that a stage makes, caught at the moment when it would read a command line."""
    def catch(parser, argv=None):
        raise Caught(parser)
    with mock.patch.object(Parser, "parse_args", catch):
        try:
            importlib.import_module(stage).parse_args([])
        except Caught as caught:
            return caught.args[0]


def flags(stage):
    """{flag: what it does}, without --help."""
    found = {}
    for action in parser_of(stage)._actions:
        hidden = action.help == argparse.SUPPRESS            # it only hands on to another command
        if action.option_strings and not hidden and not isinstance(action, argparse._HelpAction):
            text = action.help or ""
            if action.choices:
                text = f"{', '.join(map(str, action.choices))}. {text}"
            found[action.option_strings[0]] = text.replace("%%", "%").replace("|", "/").strip(" .")
    return found


def flags_table():
    """A row for each flag and meaning, with the stages that have it."""
    stages = {}
    for stage in STAGES:
        for flag, text in flags(stage).items():
            stages.setdefault((flag, text), []).append(f"{stage}.py")
    lines = ["| flag | of | what it does |", "|---|---|---|"]
    for (flag, text), files in sorted(stages.items(), key=lambda item: (-len(item[1]), item[0])):
        of = "every stage" if len(files) == len(STAGES) else ", ".join(files)
        lines.append(f"| `{flag}` | {of} | {text} |")
    return lines


# --- the page -------------------------------------------------------------------------------------
TABLES = {"files": files_table, "flags": flags_table,
          "plan": lambda: plan.table(plan.plan(plan.PEAKS)),
          "loader": lambda: speed.feeding(read_lines(RESULTS / "speed.jsonl"))}


def page(records):
    """The README with today's tables. UserError if records of the first screen are missing"""
    return with_tables((ROOT / "README.md").read_text(), {
        **TABLES, "first-screen": lambda: first_screen.screen(records)})


def with_tables(text, tables):
    """A text with today's tables between the marks of each.  tables: {name: () -> lines}"""
    for name, table in tables.items():
        begin = f"<!-- {name} -->"
        end = f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        if not found:
            raise ValueError(f"README.md has no mark {begin}")
        text = "\n".join([before + begin, *table(), end]) + after
    return text


def main():
    path = ROOT / "README.md"
    records = records_of(make.PAGES["readme"], RESULTS)
    if lacking(records):
        path.write_text(with_tables(path.read_text(), TABLES))
    else:
        path.write_text(page(records))


if __name__ == "__main__":
    main()
