"""Curves of one run or several, from their logs (STAGE.jsonl)."""
import json
from pathlib import Path

from extras.panels import panels, printable, save
from support.files import UserError

# Key of the log: (title, levels that a trivial guesser reaches: key of the log -> text).
CURVES = {
    "cosine": ("cosine to the teacher", {}),
    "perplexity": ("perplexity of the codes (how many are in use)", {}),
    "loss_mim": ("loss at hidden patches, last layer, Eq. (3)", {"chance": "a blind guess, ln K"}),
    "loss_cls": ("loss at hidden patches, [CLS] head, Eq. (3)", {"chance": "a blind guess, ln K"}),
    "mask_acc": ("hidden patches named right, percent", {
        "guess_position": "commonest code of the place",
        "guess_nearest": "code of the nearest visible patch"}),
    "top1": ("top-1, percent", {}),
}


def read_log(path):
    """-> (first line, training lines, evaluation lines) of a stage's JSON log."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
        steps = [x for x in lines if "step" in x and "summary" not in x]
        first = lines[0]
    except (OSError, ValueError, IndexError, TypeError) as error:
        raise UserError(f"{path} is not a JSON log ({error}): give a run's STAGE.jsonl") from error
    val = [x for x in steps if x.get("split") == "val"]
    return first, [x for x in steps if x.get("split") != "val"], val


def draw_curves(paths, out):
    """A panel per quantity that the logs hold: thin lines are training, dots held-out images."""
    draw_logs({str(path): read_log(path) for path in paths}, out)


def draw_logs(logs, out):
    """logs: {name: (first line, training lines, evaluation lines)}, see draw_curves."""
    lines = [line for _, train, val in logs.values() for line in train + val]
    keys = [key for key in CURVES if any(key in line for line in lines)]
    if not keys:
        names = ", ".join(logs) or "no logs"
        raise UserError(f"none of {names} holds a curve ({', '.join(CURVES)})")
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    figure, axes = panels(rows, columns, 4.6, 3.2, "", 0.35, left=0.14 / columns, right=0.985,
                          bottom=0.15 / rows, wspace=0.15, hspace=0.3)
    for axis, key in zip(axes.flat, keys, strict=False):
        axis.axis("on")
        title, levels = CURVES[key]
        levels_left = dict(levels)
        for number, (name, log) in enumerate(logs.items()):
            draw_curve(axis, key, name, log, f"C{number}")
            draw_levels(axis, key, log, levels_left)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.margins(y=0.08)
        axis.legend(fontsize=7, framealpha=0.7)
    save(figure, out)


def draw_curve(axis, key, name, log, colour):
    """One run in one panel: its training line, its held-out dots, and where it was warned."""
    _, train, val = log
    train = [x for x in train if key in x]
    val = [x for x in val if key in x]
    if not train and not val:
        return
    path = Path(name)
    label = path.stem
    if path.parent.name not in ("", "results"):
        label = f"{path.parent.name}/{path.stem}"
    axis.plot([x["step"] for x in train], [x[key] for x in train], color=colour, lw=0.8,
              label=printable(label))
    axis.plot([x["step"] for x in val], [x[key] for x in val], "o", color=colour, ms=4)
    if key != "perplexity":
        return
    for x in log[1]:
        if "warning" in x:                   # at this step the codebook's collapse was noticed
            axis.axvline(x["step"], color=colour, ls="--", lw=1)
            axis.annotate("warned", (x["step"], 0.5), xycoords=("data", "axes fraction"),
                          fontsize=7, color=colour, xytext=(3, 0), textcoords="offset points")


def draw_levels(axis, key, log, levels):
    """Dotted lines for trivial guessers. Each is drawn once, from the first run that has it."""
    first, train, val = log
    if not any(key in x for x in train + val):
        return
    known = dict(first)
    if val:
        known |= val[-1]
    for level in [k for k in levels if k in known]:
        style = ":" if level == "chance" else "--"
        side = "top" if level == "guess_nearest" else "bottom"
        axis.axhline(known[level], color="grey", ls=style, lw=1)
        axis.text(0.98, known[level], levels.pop(level), fontsize=7, color="dimgrey", ha="right",
                  va=side, transform=axis.get_yaxis_transform())
