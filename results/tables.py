"""What the studies share: reading and writing records, means over seeds, lines of tables."""
import json
import math
import textwrap
from pathlib import Path

import torch

from support.files import commit, processor
from support.probe import mean_and_error

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs"
RESULTS = ROOT / "results"


def read_lines(path):
    """The records of a file of JSON lines; none if there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def about(command, seed=0, amp="no"):
    """What a record says of itself if no log of a stage says it."""
    return dict(command=command, commit=commit(), seed=seed, amp=amp, **processor(),
                threads=torch.get_num_threads(), torch=str(torch.__version__))


def with_facts(records):
    """Records with what is known of each. One that says nothing belongs to the last that does."""
    found = []
    facts = {}
    names = "command commit seed amp machine cpu gpu cores threads torch".split()
    for record in records:
        if "command" in record or "torch" in record:
            facts = {name: record[name] for name in names if name in record}
        found.append(facts | record)
    return found


def made_on(records):
    """One sentence: commits, machines, threads, precision and torch of all records."""
    records = with_facts(records)

    def all_of(name):
        return ", ".join(sorted({str(record[name]) for record in records if name in record}))
    commits = ", ".join(sorted({record["commit"][:7] for record in records}))
    precision = all_of("amp").replace("no", "float32")
    machine = ", ".join(filter(None, map(all_of, ("gpu", "cpu", "machine"))))
    return (f"Commits {commits}; {machine}, cores: {all_of('cores')}, threads of a process: "
            f"{all_of('threads')}; {precision}; torch {all_of('torch')}.")


def cell(values, digits=1):
    """12.3 ± 0.4: mean and standard error over seeds; the value alone of one; -- of none."""
    if not values:
        return "--"
    mean, error = mean_and_error(values)
    spread = "" if math.isnan(error) else f" ± {error:.{digits}f}"
    return f"{mean:.{digits}f}{spread}"


def table(titles, rows):
    """Lines of a Markdown table. rows: lists of cells"""
    lines = [titles, ["---"] * len(titles), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def fill(template, **facts):
    """A page: the facts in their places; paragraphs of plain text are wrapped anew."""
    parts = template.format(**facts).strip().split("\n\n")
    return "\n\n".join(part if part[:1] in "#|!-*<1" else textwrap.fill(
        part, 100, break_long_words=False, break_on_hyphens=False) for part in parts) + "\n"
