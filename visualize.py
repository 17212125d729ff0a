"""Pictures of what a run did. So far: curves from the JSON logs, several runs in one picture, with the line of chance.

    python visualize.py runs/tiny/pretrain.jsonl --out curves.png
    python visualize.py runs/a/vqkd.jsonl runs/b/vqkd.jsonl runs/b/pretrain.jsonl --out curves.png
"""
import argparse
import json
from pathlib import Path

import engine

PANELS = {               # key of the log: (title, what the line of chance is there)
    "cosine": ("cosine to the teacher", None),
    "perplexity": ("perplexity of the codes (how many are in use)", None),
    "loss_mim": ("loss at hidden patches, last layer, Eq. (3)", "chance"),
    "loss_cls": ("loss at hidden patches, [CLS] head, Eq. (4)", "chance"),
    "mask_acc": ("hidden patches named right, percent", None),
    "top1": ("top-1, percent", None),
}


def read_log(path):
    """-> (first line, training lines, evaluation lines) of a stage's JSON log."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise engine.UserError(f"{path} is not a JSON log ({error}): give a run's STAGE.jsonl") from error
    steps = [x for x in lines if "step" in x and "summary" not in x]
    return lines[0], [x for x in steps if x.get("split") != "val"], [x for x in steps if x.get("split") == "val"]


def draw_curves(paths, out):
    """One panel per quantity that any of the logs holds: training as a thin line, held-out images as dots."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    logs = {str(p): read_log(p) for p in paths}
    keys = [k for k in PANELS if any(k in x for _, train, val in logs.values() for x in train + val)]
    if not keys:
        raise engine.UserError(f"none of {', '.join(logs)} holds a curve ({', '.join(PANELS)})")
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.8 * columns, 3.4 * rows), squeeze=False)
    for axis, key in zip(axes.flat, keys):
        title, chance = PANELS[key]
        for number, (name, (first, train, val)) in enumerate(logs.items()):
            if not any(key in x for x in train + val):
                continue
            colour = f"C{number}"
            axis.plot([x["step"] for x in train if key in x], [x[key] for x in train if key in x], color=colour, lw=0.8,
                      label=f"{Path(name).parent.name}/{Path(name).stem}" if Path(name).parent.name != "results" else
                      Path(name).stem)
            axis.plot([x["step"] for x in val if key in x], [x[key] for x in val if key in x], "o", color=colour, ms=4)
            if chance and chance in first:
                axis.axhline(first[chance], color="grey", ls=":", lw=1)
                axis.text(0.98, first[chance], "a blind guess, ln K", fontsize=7, va="bottom", ha="right", color="grey",
                          transform=axis.get_yaxis_transform())
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7)
    for axis in axes.flat[len(keys):]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("logs", nargs="+", type=Path, help="STAGE.jsonl files of one or several runs")
    p.add_argument("--out", type=Path, default=Path("curves.png"), help="the PNG to write")
    args = p.parse_args(argv)
    draw_curves(args.logs, args.out)
    print(f"{len(args.logs)} logs -> {args.out}")


if __name__ == "__main__":
    engine.run(main)
