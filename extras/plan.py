"""How long the paper's runs take, what memory they need, and how many cores feed them.

    python -m extras.bench --plan            # H100 and A100, one and eight of them
    python -m extras.bench --plan --peak-tflops 142 --share 0.35     # another card, another share

A step's share of the card's dense bf16 peak is read from the records in results/gpu, which
`python -m results.gpu` makes on a GPU. A run whose step was not measured takes the share of base
pre-training. Nobody has run these lengths here: the hours are computed, not observed.
"""
import json
from collections import namedtuple

from extras.operations import hours, operations, schedules, sizes
from support.files import ROOT, UserError

# Dense bf16 peaks of the data sheets, in operations a second.
PEAKS = {"H100": 989e12, "A100": 312e12}
GPUS = 1, 8
# One run: what it is, preset, stage, images seen, the step's share of the peak and whether that was
# measured, GiB (None: not measured), {(card, GPUs): hours}, {the same: cores that feed them}.
Row = namedtuple("Row", "what model stage images share measured gib hours cores")


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def measured_steps():
    """{(stage, model): the fastest record of a step} from results/gpu.

    Its peak_mib is the memory of the newest step whose memory was measured (compiled ones are not).
    """
    found = {}
    memory = {}
    for path in sorted((ROOT / "results" / "gpu").glob("*.jsonl")):
        for record in records(path):
            if "share_of_datasheet" not in record:
                continue
            key = record["stage"], record["model"]
            memory[key] = record.get("peak_mib", memory.get(key))
            share = record["share_of_datasheet"]
            if key not in found or share > found[key]["share_of_datasheet"]:
                found[key] = record
    return {key: record | dict(peak_mib=memory[key]) for key, record in found.items()}


def loader_rates():
    """{stage: images a second that one core delivers}, from the newest record of the loader."""
    path = ROOT / "results" / "speed.jsonl"
    if not path.exists():
        return {}
    return {r["name"]: r["images_per_s"] for r in records(path) if r["stage"] == "loader"}


def plan(peaks, share=None):
    """-> a Row for each of the paper's runs.  peaks: {card: operations a second}

    share: of the peak, for all steps, instead of the measured ones. UserError without any record.
    """
    steps = measured_steps()
    if share is None and ("pretrain", "base") not in steps:
        raise UserError("results/gpu holds no record of a base step: give --share, or make records "
                        "with python -m results.gpu")
    rates = loader_rates()
    rows = []
    for what, model, stage, images in schedules():
        record = steps.get((stage, model))
        of_peak = share
        if share is None:
            of_peak = (record or steps["pretrain", "base"])["share_of_datasheet"]
        ops = sum(operations(stage, sizes(model)).values())
        took = {}
        cores = {}
        for card, peak in peaks.items():
            for gpus in GPUS:
                _, took[card, gpus], rate = hours(ops, images, of_peak, peak, gpus)
                cores[card, gpus] = rate / rates[stage] if stage in rates else None
        gib = record["peak_mib"] / 1024 if record and record["peak_mib"] else None
        rows.append(Row(what, model, stage, images, of_peak, record is not None and share is None,
                        gib, took, cores))
    return rows


def table(rows):
    """The rows as lines of a table."""
    columns = list(rows[0].hours)            # (card, GPUs)
    names = [f"hours, {gpus} {card}" for card, gpus in columns]
    lines = [f"| run | share of peak | GiB | {' | '.join(names)} | "
             f"cores for 8 {columns[1][0]} |",
             "|---|---|---|" + "---|" * len(columns) + "---|"]
    for r in rows:
        share = f"{r.share:.0%}"
        if not r.measured:
            share += " (assumed)"
        gib = "-" if r.gib is None else f"{r.gib:.0f}"
        took = " | ".join(f"{r.hours[column]:,.0f}" for column in columns)
        cores = r.cores[columns[1]]
        cores = "-" if cores is None else f"{cores:.0f}"
        lines.append(f"| {r.model}: {r.what} | {share} | {gib} | {took} | {cores} |")
    return lines
