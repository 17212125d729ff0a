"""The tables of results/README.md and results/tiny.jsonl, from the logs of results/tiny.sh.

    python -m results.table            # reads runs/*-SEED/*.jsonl, writes both files
"""
from results.tables import RESULTS, RUNS, mean_and_error, read_lines, write_below, write_lines

SEEDS = (0, 1, 2)
STAGES = ("vqkd", "pretrain", "linprobe", "finetune")


def summaries(run, stage):
    """The summary lines of a stage's log, with the run's name, commit, arguments and seconds."""
    lines = read_lines(RUNS / run / f"{stage}.jsonl")
    if not lines:
        return []
    first = lines[0]
    facts = dict(run=run, stage=stage, seed=first["args"]["seed"], amp=first["args"]["amp"])
    names = "commit", "torch", "cores", "threads", "processes", "device"
    facts |= {name: first.get(name) for name in names}
    return [facts | x for x in lines if "summary" in x]


def of_all_seeds(name, stage):
    return [x for seed in SEEDS for x in summaries(f"{name}-{seed}", stage)]


def cell(values):
    """12.3 ± 0.4: mean and standard error over seeds; -- if a run is missing."""
    if len(values) < len(SEEDS):
        return "--"
    mean, error = mean_and_error(values)
    return f"{mean:.1f} ± {error:.1f}"


def column(name, stage, key, source=None):
    found = [x for x in of_all_seeds(name, stage) if source in (None, x.get("source"))]
    return cell([x[key] for x in found if key in x])


def line(*cells):
    return "| " + " | ".join(cells) + " |"


def tokenizer_table():
    lines = ["| teacher | codes used | perplexity | cosine x 100 | encoder's linear probe, chosen "
             "head |", "|---|---|---|---|---|"]
    for name in ("hog", "pixel"):
        cosine = cell([100 * x["cosine"] for x in of_all_seeds(name, "vqkd")])
        probe = "not measured"
        if name == "hog":
            probe = column(name, "linprobe", "top1", "tokenizer")
        lines.append(line(name, column(name, "vqkd", "codes_used"),
                          column(name, "vqkd", "perplexity"), cosine, probe))
    return lines


def pretraining_table():
    lines = ["| run | hidden patches named right | by the [CLS] head | guess: commonest of the "
             "place | guess: nearest visible | probe, chosen head | probe, paper's reading |",
             "|---|---|---|---|---|---|---|"]
    runs = {"hog": "teacher hog, patch aggregation (default)", "noagg": "hog, `--no-aggregation`",
            "pixel": "`--teacher pixel`",
            "beit": "`--teacher pixel --no-aggregation` (BEiT-like)"}
    for name, label in runs.items():
        keys = "mask_acc", "mask_acc_cls", "guess_position", "guess_nearest"
        cells = [column(name, "pretrain", key) for key in keys]
        cells += [column(name, "linprobe", key, "pretrain") for key in ("top1", "paper_top1")]
        lines.append(line(label, *cells))
    random, pixels = [column("hog", "linprobe", "top1", source) for source in ("random", "pixels")]
    paper = column("hog", "linprobe", "paper_top1", "random")
    lines.append(f"| random weights | | | | | {random} | {paper} |")
    lines.append(f"| tuned linear classifier on raw pixels | | | | | {pixels} |  |")
    return lines


def finetuning_table():
    lines = [line("start", *(f"seed {seed}" for seed in SEEDS), "mean"), "|---|---|---|---|---|"]
    runs = {"pre-trained (lr 1e-3)": "hog"}
    runs |= {f"scratch, lr {rate}": f"scratch-{rate}" for rate in ("3e-4", "1e-3", "3e-3")}
    for label, name in runs.items():
        values = [x["top1"] for x in of_all_seeds(name, "finetune")]
        lines.append(line(label, *(f"{v:.2f}" for v in values), cell(values)))
    return lines


def main():
    runs = sorted(path.name for path in RUNS.iterdir() if path.is_dir())
    records = [x for run in runs for stage in STAGES for x in summaries(run, stage)]
    write_lines(RESULTS / "tiny.jsonl", records)
    lines = [
        "## Tokenizer (VQ-KD), whole held-out set, K = 64", "", *tokenizer_table(), "",
        "## Pre-training and linear probe, percent", "", *pretraining_table(), "",
        "## Fine-tuning with 100 labels a class, top-1 in percent after the last step", "",
        *finetuning_table()]
    write_below(RESULTS / "README.md", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
