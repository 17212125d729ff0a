"""Tables of results/downstream.md from the logs of results/downstream.sh: segmentation, robustness to shifted shapes.

    python results/downstream.py            # reads runs/*/, writes results/downstream.md below its marker and .jsonl
"""
import json
import math
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
STARTS = {"hog": "pre-trained", "scratch-3e-3": "scratch, lr 3e-3", "scratch-6e-3": "scratch, lr 6e-3",
          "scratch-1e-2": "scratch, lr 1e-2"}


def lines_of(run, name):
    path = ROOT / "runs" / run / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def cell(values):
    """Mean ± standard error over the seeds."""
    if len(values) < 2:
        return f"{values[0]:.1f} (one seed)" if values else "--"
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{mean:.1f} ± {spread / math.sqrt(len(values)):.1f}" + ("" if len(values) == len(SEEDS) else " (two seeds)")


def main():
    records, out = [], ["## Segmentation", "", "| start | mIoU | by seed | without background | mAcc | aAcc | seconds |",
                        "|---|---|---|---|---|---|---|"]
    for name, label in STARTS.items():
        found = [(s, lines_of(f"{name}-{s}", "segment")) for s in SEEDS]
        found = [(s, lines[0], x) for s, lines in found for x in lines if "summary" in x]
        records += [dict(stage="segment", start=label, seed=s, commit=first["commit"]) | x for s, first, x in found]
        values = {k: [x[k] for *_, x in found] for k in ("miou", "miou_objects", "m_acc", "a_acc", "time")}
        seeds = ", ".join(f"{v:.1f}" for v in values["miou"])
        out.append(f"| {label} | {cell(values['miou'])} | {seeds} | " + " | ".join(
            cell(values[k]) for k in ("miou_objects", "m_acc", "a_acc", "time")) + " |")
    starts = [name for name in STARTS if lines_of(f"{name}-0", "finetune_eval")]
    out += ["", "## Robustness: top-1 on shifted shapes, percent", "",
            "| held-out set | " + " | ".join(STARTS[name] for name in starts) + " |", "|---" * (len(starts) + 1) + "|"]
    table = {}
    for name in starts:
        for s in SEEDS:
            lines = lines_of(f"{name}-{s}", "finetune_eval")
            for x in lines:
                if "data" in x and "top1" in x:
                    table.setdefault(x["data"], {}).setdefault(name, {})[s] = x["top1"]
                    records.append(dict(stage="finetune --eval", start=STARTS[name], seed=s, commit=lines[0]["commit"]) | x)
    for shift, row in table.items():
        out.append(f"| {shift} | " + " | ".join(cell(list(row.get(name, {}).values())) for name in starts) + " |")
    page = ROOT / "results" / "downstream.md"
    page.with_suffix(".jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    head = page.read_text().split("<!-- tables -->")[0]
    page.write_text("\n".join([head + "<!-- tables -->", "", *out, ""]))
    print("\n".join(out))


if __name__ == "__main__":
    main()
