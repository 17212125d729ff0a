"""The tables of results/downstream.md and its .jsonl, from the logs of results/downstream.sh.

Segmentation, and top-1 on shifted shapes.

    python -m results.downstream            # reads runs/*/, writes results/downstream.*
"""
from results.tables import RESULTS, RUNS, mean_and_error, read_lines, write_below, write_lines

SEEDS = (0, 1, 2)
STARTS = {"hog": "pre-trained", "scratch-3e-3": "scratch, lr 3e-3",
          "scratch-6e-3": "scratch, lr 6e-3", "scratch-1e-2": "scratch, lr 1e-2"}


def cell(values):
    """Mean ± standard error over the seeds."""
    if not values:
        return "--"
    mean, error = mean_and_error(values)
    if len(values) == 1:
        return f"{mean:.1f} (one seed)"
    note = "" if len(values) == len(SEEDS) else " (two seeds)"
    return f"{mean:.1f} ± {error:.1f}{note}"


def segmentation():
    """-> records, lines of the table"""
    records = []
    lines = ["| start | mIoU | by seed | without background | mAcc | aAcc | seconds |",
             "|---|---|---|---|---|---|---|"]
    for name, label in STARTS.items():
        found = []
        for seed in SEEDS:
            log = read_lines(RUNS / f"{name}-{seed}" / "segment.jsonl")
            about = dict(stage="segment", start=label, seed=seed)
            found += [about | dict(commit=log[0]["commit"]) | x for x in log if "summary" in x]
        records += found
        seeds = ", ".join(f"{x['miou']:.1f}" for x in found)
        cells = [cell([x[key] for x in found])
                 for key in ("miou", "miou_objects", "m_acc", "a_acc", "time")]
        lines.append("| " + " | ".join([label, cells[0], seeds, *cells[1:]]) + " |")
    return records, lines


def robustness():
    """-> records, lines of the table"""
    starts = [name for name in STARTS if (RUNS / f"{name}-0" / "finetune_eval.jsonl").exists()]
    records = []
    for name in starts:
        for seed in SEEDS:
            log = read_lines(RUNS / f"{name}-{seed}" / "finetune_eval.jsonl")
            about = dict(stage="finetune --eval", start=STARTS[name], seed=seed)
            records += [about | dict(commit=log[0]["commit"]) | x
                        for x in log if "data" in x and "top1" in x]
    lines = ["| held-out set | " + " | ".join(STARTS[name] for name in starts) + " |",
             "|---" * (len(starts) + 1) + "|"]
    for shift in dict.fromkeys(x["data"] for x in records):
        cells = []
        for name in starts:
            found = {x["seed"]: x["top1"] for x in records
                     if x["data"] == shift and x["start"] == STARTS[name]}
            cells.append(cell(list(found.values())))
        lines.append(f"| {shift} | " + " | ".join(cells) + " |")
    return records, lines


def main():
    records, lines = segmentation()
    more_records, more_lines = robustness()
    lines = ["## Segmentation", "", *lines, "", "## Robustness: top-1 on shifted shapes, percent",
             "", *more_lines]
    write_lines(RESULTS / "downstream.jsonl", records + more_records)
    write_below(RESULTS / "downstream.md", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
