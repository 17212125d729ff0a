"""What the studies share: reading logs, means over seeds, and pages whose tables are made anew."""
import json
import math
from pathlib import Path

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


def mean_and_error(values):
    """-> mean over seeds and its standard error, which is nan for a single seed."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def write_below(page, lines, marker="<!-- tables -->"):
    """Replace what stands below the marker of a page. What a person wrote above it stays."""
    head = page.read_text().split(marker)[0] if page.exists() else ""
    page.write_text("\n".join([head + marker, "", *lines, ""]))
