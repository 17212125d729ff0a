"""Gather the summary lines of the runs of results/tiny.sh into results/tiny.jsonl and the tables of results/README.md.

    python results/table.py            # reads runs/*-SEED/*.jsonl, writes both files
"""
import json
import math
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)


def summaries(run, stage):
    """The summary lines of a stage's log, with the run's name, commit, arguments and seconds."""
    path = ROOT / "runs" / run / f"{stage}.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    facts = {k: lines[0].get(k) for k in ("commit", "torch", "cores", "threads", "processes", "device")}
    return [dict(run=run, stage=stage, seed=lines[0]["args"]["seed"], amp=lines[0]["args"]["amp"], **facts) | x
            for x in lines if "summary" in x]


def mean_and_error(values):
    """12.3 ± 0.4: mean and standard error over seeds; -- where a run is missing."""
    if len(values) < len(SEEDS):
        return "--"
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{mean:.1f} ± {spread / math.sqrt(len(values)):.1f}"


def column(name, stage, key, source=None):
    found = [x for s in SEEDS for x in summaries(f"{name}-{s}", stage) if source in (None, x.get("source"))]
    return mean_and_error([x[key] for x in found if key in x])


def main():
    runs = sorted(p.name for p in (ROOT / "runs").iterdir() if p.is_dir())
    records = [x for run in runs for stage in ("vqkd", "pretrain", "linprobe", "finetune") for x in summaries(run, stage)]
    (ROOT / "results" / "tiny.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))

    out = ["## Tokenizer (VQ-KD), whole held-out set, K = 64", "",
           "| teacher | codes used | perplexity | cosine x 100 | encoder's linear probe, chosen head |", "|---|---|---|---|---|"]
    for name in ("hog", "pixel"):
        found = [x for s in SEEDS for x in summaries(f"{name}-{s}", "vqkd")]
        cosine = mean_and_error([100 * x["cosine"] for x in found])
        probe = column(name, "linprobe", "top1", "tokenizer") if name == "hog" else "not measured"
        out.append(f"| {name} | {column(name, 'vqkd', 'codes_used')} | {column(name, 'vqkd', 'perplexity')} | {cosine} | {probe} |")
    out += ["", "## Pre-training and linear probe, percent", "",
            "| run | hidden patches named right | by the [CLS] head | guess: commonest of the place | guess: nearest visible "
            "| probe, chosen head | probe, paper's reading |", "|---|---|---|---|---|---|---|"]
    for name, label in (("hog", "teacher hog, patch aggregation (default)"), ("noagg", "hog, `--no-aggregation`"),
                        ("pixel", "`--teacher pixel`"), ("beit", "`--teacher pixel --no-aggregation` (BEiT-like)")):
        cells = [column(name, "pretrain", k) for k in ("mask_acc", "mask_acc_cls", "guess_position", "guess_nearest")]
        cells += [column(name, "linprobe", k, "pretrain") for k in ("top1", "paper_top1")]
        out.append(f"| {label} | " + " | ".join(cells) + " |")
    for source, label in (("random", "random weights"), ("pixels", "tuned linear classifier on raw pixels")):
        out.append(f"| {label} | | | | | {column('hog', 'linprobe', 'top1', source)} | "
                   f"{column('hog', 'linprobe', 'paper_top1', source) if source == 'random' else ''} |")
    out += ["", "## Fine-tuning with 100 labels a class, top-1 in percent after the last step", "",
            "| start | " + " | ".join(f"seed {s}" for s in SEEDS) + " | mean |", "|---|---|---|---|---|"]
    rows = {"pre-trained (lr 1e-3)": "hog"} | {f"scratch, lr {r}": f"scratch-{r}" for r in ("3e-4", "1e-3", "3e-3")}
    for label, name in rows.items():
        values = [x["top1"] for s in SEEDS for x in summaries(f"{name}-{s}", "finetune")]
        out.append(f"| {label} | " + " | ".join(f"{v:.2f}" for v in values) + f" | {mean_and_error(values)} |")
    page = ROOT / "results" / "README.md"
    head = page.read_text().split("<!-- tables -->")[0]
    page.write_text(head + "<!-- tables -->\n\n" + "\n".join(out) + "\n")
    print("\n".join(out))


if __name__ == "__main__":
    main()
