"""The README's table of flags, made from the parsers of the stages.

    python -m results.flags                  # writes it into README.md, between its two marks
"""
import argparse
import importlib
from unittest import mock

from results.tables import ROOT
from support.args import Parser

STAGES = "vqkd", "pretrain", "finetune", "linprobe", "segment"
BEGIN, END = "<!-- flags -->", "<!-- end of flags -->"


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
        if action.option_strings and not isinstance(action, argparse._HelpAction):
            text = action.help or ""
            if action.choices:
                text = f"{', '.join(map(str, action.choices))}. {text}"
            found[action.option_strings[0]] = text.replace("%%", "%").replace("|", "/").strip(" .")
    return found


def table():
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


def with_table(text):
    """The text of the README with today's table between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, *table(), END]) + after


def main():
    path = ROOT / "README.md"
    path.write_text(with_table(path.read_text()))


if __name__ == "__main__":
    main()
