"""What a code keeps and what it ignores, on the built-in shapes, whose factors are known.

The paper argues that codes distilled from a semantic teacher ignore colour, light and pose and keep
the meaning, while codes distilled from pixels keep such details. Three measures for each factor,
all on held-out images (results/measures.py computes them):

    told      adjusted mutual information of one patch's code and the factor, 0 to 1
    decoded   how well ridge regression reads the factor off all codes of an image
    kept      share of an image's codes that stay when this factor alone changes

    python -m results.factors                # the tokenizers of results.tiny -> results/factors.*
    python -m results.factors RUN [RUN ...]  # others, each RUN holds a vqkd.pt -> runs/factors.*

About a minute each. A run that was measured before (runs/factors.jsonl) is not measured again.
"""
# Shapes:  n images, N patches per image, D code width, K codes, C teacher width
import functools
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import vqkd
from results import make, tables
from results.measures import (
    CLAIM, alterations, beside_codes, decoded, effective_dimension, factor_values, kept, told)
from support import data, probe, teachers
from support.args import Parser
from support.files import UserError, read_file
from support.process import launch
from support.shapes import draw_shapes

RUNS = [f"runs/{teacher}-{seed}" for seed in range(3) for teacher in ("hog", "pixel")]
CHANGES = [*CLAIM, "large rotation"]         # the factors, and a rotation larger than in training
GUESS = {"class": 1 / 10, "polarity": 1 / 2, "texture": 1 / 5}   # names: the accuracy of a guess
# With these changes codes move with their patches: they are judged as bags of codes.
MOVED = ("rotation", "large rotation", "scale", "position")


# --- the images -----------------------------------------------------------------------------------
@functools.cache
def draw(split, n, altered=None):
    """The first n shapes of a split -> images, masks, labels, factors.

    altered: the name of a factor that is drawn anew, see alterations.
    """
    change = {}
    if altered:
        _, _, labels, factors = draw(split, n)
        change = alterations(labels, factors)[altered]
    parts = []
    for start in range(0, n, 250):
        part = slice(start, start + 250)
        own_change = {k: v[part] for k, v in change.items()}
        parts.append(draw_shapes(0, split, np.arange(n)[part], change=own_change))
    images, masks, labels, factors = zip(*parts, strict=True)
    factors = {k: np.concatenate([part[k] for part in factors]) for k in factors[0]}
    return (torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(masks)),
            np.concatenate(labels), factors)


@functools.cache
def train_and_test(train, test):
    """Training and test images in one -> images, masks, factor_values."""
    images, masks, labels, factors = zip(draw("train", train), draw("val", test), strict=True)
    factors = {name: np.concatenate([part[name] for part in factors]) for name in factors[0]}
    return torch.cat(images), torch.cat(masks), factor_values(np.concatenate(labels), factors)


def object_share(masks, patch_size):
    """Masks (n, H, W) -> the object's share of each patch (n, N)"""
    return F.avg_pool2d(masks[:, None].float(), patch_size).flatten(1)


@torch.no_grad()
def in_batches(function, images):
    return torch.cat([function(data.to_float(part, "cpu")) for part in images.split(250)])


# --- one tokenizer --------------------------------------------------------------------------------
@functools.cache
def teacher_facts(name, grid, patch, codes, train, test):
    """What is decoded from the teacher's own features, and their effective dimension."""
    teacher = teachers.build_teacher(name, grid, patch, torch.device("cpu"))
    images, _, values = train_and_test(train, test)
    t = vqkd.l2(in_batches(teacher, images))                 # (n, N, C); the loss sees directions
    some = t[::7].flatten(0, 1)
    order = torch.randperm(len(some), generator=torch.Generator().manual_seed(0))
    centres, _ = vqkd.kmeans(some, some[order[:codes]])
    dimension = effective_dimension(t[train:].flatten(0, 1))
    return decoded(beside_codes(t, centres), values, train), dimension


def measure(run, train=6000, test=2000, pairs=1000):
    """All about the tokenizer of one run -> a record: {"told/class": ..., "kept/colour/place": ...}

    UserError if the tokenizer takes images of another size than the shapes have.
    """
    begin = time.time()
    path = Path(run) / "vqkd.pt"
    tokenizer = vqkd.load_tokenizer(path)
    file = read_file(path, "vqkd")
    args = file["args"]
    grid = tuple(tokenizer.encoder.grid)
    patch = tokenizer.encoder.patch_size
    if grid[0] * patch != 48:
        raise UserError(f"{path} takes images of {grid[0] * patch} pixels: give one for shapes, "
                        f"which have 48")
    images, masks, values = train_and_test(train, test)
    h = vqkd.l2(in_batches(tokenizer.project, images))       # (n, N, D)
    v = vqkd.l2(tokenizer.quantize.embedding.weight)         # (K, D)
    z = vqkd.nearest_code(h, v)                              # (n, N)
    cover = object_share(masks[train:], patch)               # (test, N)
    test_values = {k: (y, bins[train:]) for k, (y, bins) in values.items()}
    from_teacher, teacher_dimension = teacher_facts(
        args["teacher"], grid, patch, len(v), train, test)
    results = dict(
        told=told(z[train:].numpy(), test_values, cover.numpy()),
        codes=decoded(F.one_hot(z, len(v)).flatten(1).float(), values, train),
        h=decoded(beside_codes(h, v), values, train),
        teacher=from_teacher,
        dimension=dict(teacher=teacher_dimension,
                       h=effective_dimension(h[train:].flatten(0, 1)),
                       codes=effective_dimension(v[z[train:]].flatten(0, 1))))
    shares = codes_that_stay(tokenizer, z[train:train + pairs], cover[:pairs])
    results |= {f"kept/{change}": numbers for change, numbers in shares.items()}
    record = dict(run=str(run), written=path.stat().st_mtime, sizes=[train, test, pairs],
                  teacher=args["teacher"])
    record |= tables.about(f"python -m results.factors {run}", args["seed"])
    tokenizer = f"python vqkd.py --teacher {args['teacher']} --seed {args['seed']} --out {run}"
    record |= dict(recipes={tokenizer: args}, made_from=file.get("made_from", {}))
    for group, numbers in results.items():
        record |= {f"{group}/{name}": number for name, number in numbers.items()}
    return record | dict(seconds=time.time() - begin)


def codes_that_stay(tokenizer, before, cover):
    """Which codes stay when one factor changes.  before, cover (pairs, N): first held-out images

    -> {change: dict(place, bag, above)}. Patches count that show the object before or after the
    change (texture: that do not show it). above is the share above that of unrelated images, as
    (share - unrelated) / (1 - unrelated).
    """
    pairs = len(before)
    patch = tokenizer.encoder.patch_size
    stay = {}
    for change in (*CHANGES, "noise"):
        images, masks, _, _ = draw("val", pairs, change)
        after = object_share(masks, patch)
        seen = torch.maximum(cover, after) >= 0.1
        if change == "texture":
            seen = cover <= 0.5
        stay[change] = kept(before, in_batches(tokenizer.encode, images), seen)

    # For comparison: another image of the same class, and any other image.
    labels = torch.from_numpy(draw("val", pairs)[2])
    groups = [torch.nonzero(labels == k)[:, 0] for k in range(10)]
    first = torch.cat(groups)
    second = torch.cat([group.roll(1) for group in groups])
    seen = torch.maximum(cover[first], cover[second]) >= 0.1
    stay["same class"] = kept(before[first], before[second], seen)
    strangers = before.roll(pairs // 2, 0)
    either = torch.maximum(cover, cover.roll(pairs // 2, 0))
    unrelated = stay["unrelated"] = kept(before, strangers, either >= 0.1)
    unrelated_background = kept(before, strangers, either <= 0.5)
    for change, shares in stay.items():
        how = "bag" if change in MOVED else "place"
        chance = (unrelated_background if change == "texture" else unrelated)[how]
        shares["above"] = (shares[how] - chance) / (1 - chance)
    return stay


# --- tables and verdicts --------------------------------------------------------------------------
def mean_and_error(records, key):
    """Mean and standard error over seeds. The error of a single seed is nan."""
    return probe.mean_and_error([record[key] for record in records])


def cell(records, key, unit=100):
    mean, error = mean_and_error(records, key)
    # A teacher is the same for all seeds, so its figures have no error over seeds.
    if math.isnan(error) or key.startswith("teacher/") or key == "dimension/teacher":
        return f"{unit * mean:.1f}"
    return f"{unit * mean:.1f} ± {unit * error:.1f}"


def judge(difference, error):
    """difference > 0 is what the claim says. 4.3 standard errors decide.

    That is the 5 % level of Welch's t-test in its worst case for three seeds on either side (2
    degrees of freedom).
    """
    if math.isnan(error):
        return "one seed, no verdict"
    if abs(difference) <= 4.3 * error:
        return "within noise"
    return "holds" if difference > 0 else "opposite"


def verdicts(groups):
    """A sentence per factor and teacher: do its codes ignore more than the codes of pixels?

    Of the class they should keep more.
    """
    if "pixel" not in groups:
        return []
    lines = []
    for teacher in [name for name in groups if name != "pixel"]:
        for factor in CHANGES:
            sign = CLAIM[factor.removeprefix("large ")]
            # To ignore a factor is to let the codes stay when it changes.
            measures = {f"kept/{factor}/above": ("codes that stay", -sign),
                        f"told/{factor}": ("told", sign), f"codes/{factor}": ("decoded", sign)}
            parts = []
            for key, (name, wanted) in measures.items():
                if key not in groups[teacher][0]:
                    continue                 # a large rotation is no factor that can be told
                a, a_error = mean_and_error(groups[teacher], key)
                b, b_error = mean_and_error(groups["pixel"], key)
                word = judge(wanted * (a - b), math.hypot(a_error, b_error))
                parts.append(f"{name} {cell(groups[teacher], key)} against "
                             f"{cell(groups['pixel'], key)}: **{word}**")
            wish = "carry more" if sign > 0 else "ignore more"
            lines.append(f"- {factor}, of which {teacher} codes should {wish} than pixel codes: "
                         f"{'; '.join(parts)}.")
    return lines


def table(corner, groups, rows, columns, unit=100):
    """Markdown. rows {label: name}; for each group the columns {label: pattern of the key}."""
    header = [corner]
    for group in groups:
        header += [f"{group}: {column}" if column else group for column in columns]
    lines = [[label, *(cell(records, pattern.format(name), unit)
                       for records in groups.values() for pattern in columns.values())]
             for label, name in rows.items()]
    return [*tables.table(header, lines), ""]


PAGE = """# What a code keeps and what it ignores

The paper argues that codes distilled from a semantic teacher ignore colour, light and pose and keep
meaning, while codes of pixels keep details. Every factor behind a built-in picture is known, so
this can be measured. `python -m results.factors` did so with {runs} tokenizers ({teachers}),
{train} images to fit on and {test} held out; mean ± standard error over seeds. Records:
[factors.jsonl](factors.jsonl). {made_on}

![what codes keep](factors.png)

HOG describes outlines: it is built to forget colour and which side is brighter, and to follow every
edge. What its codes ignore says nothing about CLIP or DINO, which were not at hand.

**To be read with care.** ± is over tokenizers only. All are tested on the same images, and the
teacher's columns carry no ±. "Should ignore texture" is our reading, not the paper's words. Circles
and rings do not show rotation. h and teacher are read linearly together with a soft choice of a
centre (`measures.beside_codes`), because one-hot codes are no linear function of h. Effective
dimension is the participation ratio of the covariance: the paper argues from the smaller dimension
of the code space.

{report}
"""


def grouped(records):
    """-> {teacher: its records}"""
    groups = {}
    for record in records:
        groups.setdefault(record["teacher"], []).append(record)
    return groups


def page(records):
    """The text of results/factors.md."""
    groups = grouped(records)
    train, test, _ = records[0]["sizes"]
    teachers = ", ".join(f"{name}: {len(some)}" for name, some in groups.items())
    return tables.fill(PAGE, runs=len(records), teachers=teachers, train=train, test=test,
                       made_on=tables.made_on(records), report="\n".join(report(groups)).strip())


def report(groups):
    """All groups {teacher: records} -> the tables and verdicts, as lines of Markdown."""
    names = {}
    for name in CLAIM:
        guess = f", guess {100 * GUESS[name]:.0f}" if name in GUESS else ""
        names[name + guess] = name
    stay = {name: name for name in (*CHANGES, "noise", "same class", "unrelated")}
    spaces = {name: name for name in ("teacher", "h", "codes")}
    return [
        "## What codes tell, percent", "",
        "told: of the factor's entropy, by the code of one patch. Then read off all codes, h, the "
        "teacher's features: accuracy where a guess is given, else R^2 (0: a guess).", "",
        *table("factor", groups, names,
               dict(told="told/{}", codes="codes/{}", h="h/{}", teacher="teacher/{}")),
        "## Codes that stay when one factor changes, percent", "",
        "Of patches that show the object before or after (texture: of the others). At the same "
        "place; as a bag of codes. Below: other noise (2 % of the range), another image of the "
        "class, any other image (chance).", "",
        *table("changed", groups, stay, dict(place="kept/{}/place", bag="kept/{}/bag")),
        "## Effective dimension", "",
        *table("of", groups, spaces, {"": "dimension/{}"}, unit=1),
        "## Verdicts", "",
        "Of class codes should carry more: few stay when it changes, much of it is told and "
        "decoded. To ignore a factor is the reverse. Codes that stay: (share - unrelated) / "
        "(1 - unrelated), as bags for rotation, scale, position. A difference within 4.3 standard "
        "errors is noise.", "",
        *verdicts(groups)]


# --- the picture ----------------------------------------------------------------------------------
COLOURS = "#e39b54", "#3f78b0", "#57a374", "#8d72b4", "#888888"
MARKS = ("h", "o", "black", "h, before rounding"), ("teacher", "D", "white", "teacher's features")


def draw_bars(groups, path):
    """Left: codes that stay, above chance. Right: what is read off codes, h and the teacher."""
    import matplotlib                        # here, because it is slow to import
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.4))
    groups = {name: groups[name] for name in sorted(groups, key=lambda name: name != "pixel")}
    draw_side(left, groups, CHANGES, "kept/{}/above", {})
    draw_side(right, groups, list(CLAIM), "codes/{}", GUESS, MARKS)
    left.set_title("Codes that stay when this factor alone changes\n"
                   "(0: as two unrelated images; 100: all)", fontsize=10)
    right.set_title("Read off all codes of an image by ridge regression\n"
                    "(0: a guess; 100: perfect)", fontsize=10)
    names = ["class (should be low)" if name == "class" else name for name in CHANGES]
    left.set_yticks(range(len(names)), names)
    right.set_yticks(range(len(CLAIM)), list(CLAIM))
    figure.legend(*right.get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=9,
                  frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


PICTURES = {"factors.png": lambda records, path: draw_bars(grouped(records), path)}


def draw_side(axis, groups, names, pattern, guesses, marks=()):
    """One panel: a bar per factor and teacher, from a guess (0) to perfect (100).

    marks: (source, marker, fill, label) of dots that are drawn beside the bars.
    """
    guess = np.array([guesses.get(name, 0) for name in names])
    height = 0.8 / len(groups)
    for i, (teacher, records) in enumerate(groups.items()):
        def read(key, records=records):
            pairs = [mean_and_error(records, key.format(name)) for name in names]
            mean, error = np.array(pairs).T
            return 100 * (mean - guess) / (1 - guess), 100 * error / (1 - guess)

        at = np.arange(len(names)) + (i + 0.5 - len(groups) / 2) * height
        mean, error = read(pattern)
        axis.barh(at, mean, 0.9 * height, label=f"{teacher} codes", color=COLOURS[i % 5])
        axis.errorbar(mean, at, xerr=error, fmt="none", ecolor="black", elinewidth=1)
        for source, marker, fill, label in marks:
            axis.plot(read(source + "/{}")[0], at, marker, ms=4.5, mec="black", mfc=fill, ls="",
                      label=None if i else label)
    axis.set_xlim(-3, 103)
    axis.set_ylim(len(CHANGES) - 0.5, -0.5)  # both panels alike, so that rows stand side by side
    axis.grid(axis="x", lw=0.4)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("percent", fontsize=9)


# --- the command ----------------------------------------------------------------------------------
def measured_before(run, done, sizes):
    """The record of this very file among those of OUT.jsonl, or None."""
    path = run / "vqkd.pt"
    if not path.exists():
        return None
    wanted = str(run), path.stat().st_mtime, list(sizes)
    same = [r for r in done if (r["run"], r["written"], r["sizes"]) == wanted]
    return same[-1] if same else None


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("runs", nargs="*", type=Path, help="folders with a vqkd.pt; runs of one teacher "
                   "count as its seeds; default: those of results.tiny, for the page")
    p.add_argument("--out", type=Path, default=Path("runs/factors"),
                   help="writes OUT.jsonl, OUT.md and OUT.png")
    p.add_argument("--images", type=int, nargs=3, default=(6000, 2000, 1000),
                   metavar=("TRAIN", "TEST", "PAIRS"), help="images to fit on, to test on, and, of "
                   "the latter, to draw anew; default 6000 2000 1000")
    args = p.parse_args(argv)
    train, test, pairs = args.images
    if not (60 <= train <= 12_000 and 20 <= pairs <= test <= 2000):
        raise UserError(f"--images {train} {test} {pairs}: give 60 to 12000 images to fit on, at "
                        f"most 2000 to test on, and of those 20 or more to draw anew")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    log = args.out.with_suffix(".jsonl")
    done = tables.read_lines(log)
    records = []
    for run in args.runs or map(Path, RUNS):
        record = measured_before(run, done, args.images)
        if record is None:
            record = measure(run, *args.images)
            done.append(record)
            tables.write_lines(log, done)
        print(f"{run}: teacher {record['teacher']}, seed {record['seed']}, "
              f"{record['seconds']:.0f} s", flush=True)
        records.append(record)
    if args.runs:
        args.out.with_suffix(".md").write_text(page(records))
        draw_bars(grouped(records), args.out.with_suffix(".png"))
    else:
        tables.write_lines(tables.RESULTS / "factors.jsonl", records)
        make.main(["factors"])


if __name__ == "__main__":
    launch(main)
