"""What a code keeps and what it ignores, on the built-in shapes, whose factors are known.

The paper argues that codes distilled from a semantic teacher ignore colour, light and pose and keep what is meant,
while codes distilled from pixels keep such details. Three measures for each factor, all on held-out images:

    told      adjusted mutual information of one patch's code and the factor, 0 to 1       see told
    decoded   how well ridge regression reads the factor off all codes of an image         see decoded
    kept      share of an image's codes that stay when this factor alone changes           see kept

    python factors.py RUN [RUN ...]        # each RUN holds a vqkd.pt; about a minute each; writes runs/factors.*

Read in this order: adjusted_information, told, ridge, decoded, alterations, kept, effective_dimension.
"""
# Shapes used here:  n images, N patches per image, D code width, K codes, C teacher width, F features, T numbers asked
import argparse
import functools
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from support import data, engine, teachers
from support.shapes import draw_shapes
import vqkd

# What the claim wants of the better code: -1 to ignore the factor, +1 to keep it.
CLAIM = dict({"class": +1}, colour=-1, light=-1, polarity=-1, rotation=-1, scale=-1, position=-1, texture=-1)
CHANGES = [*CLAIM, "large rotation"]                         # the factors, and rotation by more than training saw
GUESS = {"class": 1 / 10, "polarity": 1 / 2, "texture": 1 / 5}           # read off as names: accuracy of a guess
MOVED = ("rotation", "large rotation", "scale", "position")  # codes move with their patches: judged as bags of codes


# --- measures ---------------------------------------------------------------------------------------------------------
def information(z, f):
    """Mutual information in nats of two discrete variables, counted: z, f (n,) integers from 0."""
    bins = f.max() + 1
    joint = np.bincount(z * bins + f, minlength=(z.max() + 1) * bins).reshape(-1, bins) / len(z)
    alone = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    return float((joint * np.log(np.where(joint > 0, joint / np.maximum(alone, 1e-300), 1))).sum())


def adjusted_information(z, f, seen=None, shuffles=2, seed=0):
    """The part of factor f's entropy that the code z_p at place p tells: 0 by chance, 1 where z_p determines f.

    z (n, N), f (n,) bin of each image, seen (n, N): the patches that count. For every place I(z_p; f) and H(f) over
    the images whose patch p is seen, then sums over places weighted by their images. Counted information is biased
    upwards; the same after f is shuffled among those images is the bias, taken off: (I - chance) / (H - chance)."""
    total, rng = np.zeros(3), np.random.default_rng(seed)
    for p in range(z.shape[1]):
        rows = np.arange(len(z)) if seen is None else np.flatnonzero(seen[:, p])
        if len(rows) > 1:
            a, b = z[rows, p], f[rows]
            chance = np.mean([information(a, rng.permutation(b)) for _ in range(shuffles)])
            total += len(rows) * np.array([information(a, b), information(b, b), chance])
    return float((total[0] - total[2]) / max(total[1] - total[2], 1e-12))


def quantile_bins(x, bins=8):
    """Continuous values (n,) -> bin 0 .. bins - 1, equally many in each."""
    return np.searchsorted(np.quantile(x, np.arange(1, bins) / bins), x, side="right")


def factor_values(labels, f):
    """What there is to know of an image -> {name: (numbers to predict (n, T), bins (n,))}; a one-hot matrix is a name.

    light is the mean level of object and ground, polarity which of the two is brighter. Colour is predicted as the
    point saturation * (cos, sin) of the object's hue, since at saturation 0 no hue can be seen; binned by hue."""
    polarity, turn = (f["brightness"] > f["background"]).astype(int), 2 * np.pi * f["hue"]
    light, tercile = (f["brightness"] + f["background"]) / 2, {k: quantile_bins(f[k], 3) for k in "xy"}
    named = {"class": labels, "polarity": polarity, "texture": f["texture"]}
    values = {k: (np.eye(v.max() + 1)[v], v) for k, v in named.items()}
    values |= {k: (v[:, None], quantile_bins(v)) for k, v in
               {"light": light, "rotation": f["rotation"], "scale": f["scale"]}.items()}
    values["position"] = np.stack([f["x"], f["y"]], 1), 3 * tercile["x"] + tercile["y"]
    values["colour"] = f["saturation"][:, None] * np.stack([np.cos(turn), np.sin(turn)], 1), quantile_bins(f["hue"])
    return {k: values[k] for k in CLAIM}


def told(z, values, cover):
    """adjusted_information of every factor, from patches that can tell: those with a tenth or more on the object (cover
    (n, N) is the object's share); for the background's texture those with half or more on the ground."""
    return {k: adjusted_information(z, bins, cover <= 0.5 if k == "texture" else cover >= 0.1)
            for k, (_, bins) in values.items()}


def ridge(x, y, x_new, strengths=(1e-3, 1e-2, 1e-1, 1, 10)):
    """Least squares with S penalties, in closed form.  x (n, F), y (n, T), x_new (m, F) -> predictions (S, m, T)

    Penalties are in units of the mean eigenvalue; with more features than images the n x n problem is solved."""
    mean, centre, wide = x.mean(0), y.double().mean(0), x.shape[1] > len(x)
    x, x_new, y = x - mean, x_new - mean, y.double() - centre
    gram = (x @ x.T if wide else x.T @ x).double()
    right, left = (y, x_new @ x.T) if wide else (x.T.double() @ y, x_new)
    unit = gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.double)
    return torch.stack([left.double() @ torch.cholesky_solve(right, torch.linalg.cholesky(gram + s * unit)) + centre
                        for s in strengths])


def score(guess, y):
    """guess (S, m, T), y (m, T) -> (S,): accuracy where y is one-hot, else R^2 over all T numbers."""
    if set(y.unique().tolist()) <= {0, 1}:
        return (guess.argmax(-1) == y.argmax(-1)).double().mean(-1)
    return 1 - (guess - y).square().sum((1, 2)) / (y - y.mean(0)).square().sum()


def decoded(x, values, train):
    """Ridge on the first `train` of x (n, F), the others test it; a sixth of `train` chooses the penalties."""
    columns = [torch.from_numpy(np.asarray(y, np.float64)) for y, _ in values.values()]
    fit, result, at = train - train // 6, {}, 0
    guess = ridge(x[:fit], torch.cat(columns, 1)[:fit], x[fit:])
    for name, y in zip(values, columns):
        own = guess[..., at:at + y.shape[1]]
        best = score(own[:, :train - fit], y[fit:train]).argmax()
        result[name], at = score(own[:, train - fit:], y[train:])[best].item(), at + y.shape[1]
    return result


def beside_codes(x, centres):
    """What to read h or t off: x (n, N, C) itself, and its soft choice of a centre (K, C).  -> (n, N (C + K))

    A one-hot code is no linear function of h: a linear head on codes can say "this edge, whichever side is the darker"
    and one on h cannot. With the soft choice beside it h has the means of the codes and is only spared the rounding."""
    return torch.cat([x, (10 * x @ centres.T).softmax(-1)], dim=-1).flatten(1)


def alterations(labels, f):
    """{name: values for draw_shapes(change=...)}: one factor of every image anew, no other, mostly from another image.

    The object stays inside the picture: its new scale leaves it room at its place, its new place leaves room for its
    scale. light: new levels, the brighter side stays the brighter; polarity: object and ground swap theirs."""
    n = len(labels)
    other = {k: np.roll(v, n // 2) for k, v in f.items()}
    room, other_room = 25.5 - 24 * f["scale"], 25.5 - 24 * other["scale"]                # as in draw_shapes
    largest = np.minimum(0.95, (25.5 - np.maximum(np.abs(f["x"]), np.abs(f["y"]))) / 24)
    low, high = np.sort([other["brightness"], other["background"]], axis=0)
    brighter = f["brightness"] > f["background"]
    return {
        "class": {"class": (labels + 1 + np.arange(n) // 10 % 9) % 10},
        "colour": {k: other[k] for k in ("hue", "saturation", "background_hue")},
        "light": dict(brightness=np.where(brighter, high, low), background=np.where(brighter, low, high)),
        "polarity": dict(brightness=f["background"], background=f["brightness"]),
        "rotation": dict(rotation=other["rotation"]),                                    # within +-15 degrees
        "large rotation": dict(rotation=12 * other["rotation"]),                         # within +-180 degrees
        "scale": dict(scale=0.6 + (largest - 0.6) * (other["scale"] - 0.6) / 0.35),
        "position": {k: other[k] * room / other_room for k in "xy"},
        "texture": dict(texture=(f["texture"] + 1 + np.arange(n) % 4) % 5),
        "noise": dict(noise=np.roll(np.arange(n), n // 2))}


def kept(z, changed, seen=None):
    """Share of codes that two encodings z, changed (n, N) have in common: at the same place, and as bags of codes (the
    overlap of their histograms), where a code that follows its patch to another place counts as kept. Of the patches
    `seen` (n, N) alone, where given: background that a change leaves alone is no merit of the codes."""
    seen = torch.ones_like(z, dtype=torch.bool) if seen is None else seen
    codes = int(max(z.max(), changed.max())) + 1
    bags = [(F.one_hot(x, codes) * seen[..., None]).sum(1) for x in (z, changed)]                    # (n, K)
    return dict(place=(z == changed)[seen].double().mean().item(),
                bag=(torch.minimum(*bags).sum() / seen.sum()).item())


def effective_dimension(x):
    """Participation ratio (sum l)^2 / sum l^2 of the eigenvalues l of the covariance of x (n, F): 1 on a line, F for a
    round cloud."""
    x = x.double() - x.double().mean(0)
    covariance = x.T @ x / len(x)
    return (covariance.trace() ** 2 / covariance.square().sum()).item()


# --- one tokenizer ---------------------------------------------------------------------------------------------------
@functools.cache
def draw(split, n, altered=None):
    """The first n shapes of a split, if wanted with one factor altered -> images, masks, labels, factors."""
    change = alterations(*draw(split, n)[2:])[altered] if altered else {}
    images, masks, labels, factors = zip(*[draw_shapes(
        0, split, np.arange(n)[part], change={k: v[part] for k, v in change.items()})
        for part in (slice(i, i + 250) for i in range(0, n, 250))])
    return (*(torch.from_numpy(np.concatenate(x)) for x in (images, masks)), np.concatenate(labels),
            {k: np.concatenate([part[k] for part in factors]) for k in factors[0]})


@functools.cache
def known(train, test):
    """The training and the test images in one: images, the object's share of pixels, what there is to know."""
    (a, m, k, f), (b, o, l, g) = draw("train", train), draw("val", test)
    factors = {name: np.concatenate([f[name], g[name]]) for name in f}
    return torch.cat([a, b]), torch.cat([m, o]), factor_values(np.concatenate([k, l]), factors)


@torch.no_grad()
def in_batches(function, images):
    return torch.cat([function(data.to_float(part, "cpu")) for part in images.split(250)])


@functools.cache
def teacher_facts(name, grid, patch, codes, train, test):
    """Decoded from the teacher's own features, and their effective dimension; once for all seeds."""
    teacher, (images, _, values) = teachers.build_teacher(name, grid, patch, torch.device("cpu")), known(train, test)
    t = vqkd.l2(in_batches(teacher, images))                 # (n, N, C); the loss reads directions only
    some = t[::7].flatten(0, 1)
    centres, _ = vqkd.kmeans(some, some[torch.randperm(len(some), generator=torch.Generator().manual_seed(0))[:codes]])
    return decoded(beside_codes(t, centres), values, train), effective_dimension(t[train:].flatten(0, 1))


def measure(run, train=6000, test=2000, pairs=1000):
    """All about the tokenizer of one run -> a flat record: {"told/class": ..., "kept/colour/place": ...}."""
    begin, path = time.time(), Path(run) / "vqkd.pt"
    tokenizer, args = vqkd.load_tokenizer(path), engine.read_file(path, "vqkd")["args"]
    grid, patch, codebook = tuple(tokenizer.encoder.grid), tokenizer.encoder.patch_size, tokenizer.quantize.embedding
    if grid[0] * patch != 48:
        raise engine.UserError(f"{path} takes images of {grid[0] * patch} pixels: give one for shapes, which have 48")
    images, masks, values = known(train, test)
    h, v = vqkd.l2(in_batches(tokenizer.project, images)), vqkd.l2(codebook.weight)      # (n, N, D), (K, D)
    z = vqkd.nearest_code(h, v)                                                          # (n, N)
    cover = F.avg_pool2d(masks[:, None].float(), patch).flatten(1)[train:].numpy()       # (test, N)
    from_teacher, teacher_dimension = teacher_facts(args["teacher"], grid, patch, len(v), train, test)
    facts = dict(run=str(run), written=path.stat().st_mtime, sizes=[train, test, pairs], teacher=args["teacher"],
                 seed=args["seed"])
    results = dict(told=told(z[train:].numpy(), {k: (y, b[train:]) for k, (y, b) in values.items()}, cover),
                   codes=decoded(F.one_hot(z, len(v)).flatten(1).float(), values, train),
                   h=decoded(beside_codes(h, v), values, train), teacher=from_teacher,
                   dimension=dict(teacher=teacher_dimension, h=effective_dimension(h[train:].flatten(0, 1)),
                                  codes=effective_dimension(v[z[train:]].flatten(0, 1))))

    # Which codes stay, among the patches that show the object before or after the change (texture: among the others).
    before, labels = z[train:train + pairs], torch.from_numpy(draw("val", pairs)[2])
    own = torch.from_numpy(cover[:pairs])
    stay = {}
    for change in (*CHANGES, "noise"):
        images, masks, *_ = draw("val", pairs, change)
        after = F.avg_pool2d(masks[:, None].float(), patch).flatten(1)
        seen = own <= 0.5 if change == "texture" else torch.maximum(own, after) >= 0.1
        stay[change] = kept(before, in_batches(tokenizer.encode, images), seen)
    groups = [torch.nonzero(labels == k)[:, 0] for k in range(10)]
    first, second = torch.cat(groups), torch.cat([group.roll(1) for group in groups])
    stay["same class"] = kept(before[first], before[second], torch.maximum(own[first], own[second]) >= 0.1)
    strangers, theirs = before.roll(pairs // 2, 0), own.roll(pairs // 2, 0)
    stay["unrelated"] = kept(before, strangers, torch.maximum(own, theirs) >= 0.1)
    ground = kept(before, strangers, torch.maximum(own, theirs) <= 0.5)
    for change, shares in stay.items():                      # what unrelated images share is no merit
        how, chance = "bag" if change in MOVED else "place", ground if change == "texture" else stay["unrelated"]
        shares["above"] = (shares[how] - chance[how]) / (1 - chance[how])
    results |= {f"kept/{change}": shares for change, shares in stay.items()}
    return facts | {f"{a}/{b}": x for a, part in results.items() for b, x in part.items()} | dict(
        seconds=time.time() - begin)


# --- tables, verdicts, picture ----------------------------------------------------------------------------------------
def mean_and_error(records, key):
    """Mean and standard error over seeds; the error of a single seed is nan."""
    x = np.array([record[key] for record in records])
    return x.mean(), x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan


def cell(records, key, unit=100):
    mean, error = mean_and_error(records, key)               # a teacher is the same for all seeds: it has no error here
    known = not math.isnan(error) and not key.startswith("teacher/") and key != "dimension/teacher"
    return f"{unit * mean:.1f}" + (f" ± {unit * error:.1f}" if known else "")


def judge(difference, error):
    """4.3 standard errors decide, the 5 % level of Welch's t-test in its worst case for three seeds a side (2 degrees
    of freedom); difference > 0 is what the claim says."""
    if math.isnan(error):
        return "one seed, no verdict"
    return "within noise" if abs(difference) <= 4.3 * error else "holds" if difference > 0 else "opposite"


def verdicts(groups):
    """A sentence per factor and teacher: do its codes ignore more (of class: keep more) than the codes of pixels?"""
    lines = []
    for teacher, factor in [(t, f) for t in groups if t != "pixel" and "pixel" in groups for f in CHANGES]:
        sign, parts = CLAIM[factor.removeprefix("large ")], []
        for key, wanted in ((f"kept/{factor}/above", -sign), (f"told/{factor}", sign), (f"codes/{factor}", sign)):
            if key in groups[teacher][0]:                    # to ignore a factor is to let the codes stay
                (a, a_error), (b, b_error) = (mean_and_error(groups[t], key) for t in (teacher, "pixel"))
                word = judge(wanted * (a - b), math.hypot(a_error, b_error))
                name = {"kept": "codes that stay", "codes": "decoded"}.get(key.split("/")[0], "told")
                parts.append(f"{name} {cell(groups[teacher], key)} against {cell(groups['pixel'], key)}: **{word}**")
        wish = "carry more" if sign > 0 else "ignore more"
        lines.append(f"- {factor}, of which {teacher} codes should {wish} than pixel codes: {'; '.join(parts)}.")
    return lines


def table(corner, groups, rows, columns, unit=100):
    """Markdown: rows {label: key}, and for each group the columns {label: pattern of the record's key}."""
    lines = [[corner, *(f"{g}: {c}" if c else g for g in groups for c in columns)]]
    lines += [["---"] * len(lines[0])]
    lines += [[label, *(cell(r, pattern.format(key), unit) for r in groups.values() for pattern in columns.values())]
              for label, key in rows.items()]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def report(groups):
    """All groups {teacher: records} -> the lines of a markdown page."""
    names = {k + (f", guess {100 * GUESS[k]:.0f}" if k in GUESS else ""): k for k in CLAIM}
    stay = {k: k for k in (*CHANGES, "noise", "same class", "unrelated")}
    return ["## What codes tell, percent", "", "told: of the factor's entropy, by the code of one patch. Then read off "
            "all codes, h, the teacher's features: accuracy where a guess is given, else R^2 (0: a guess).", "",
            *table("factor", groups, names, dict(told="told/{}", codes="codes/{}", h="h/{}", teacher="teacher/{}")),
            "## Codes that stay when one factor changes, percent", "", "Of patches that show the object before or "
            "after (texture: of the others). At the same place; as a bag of codes. Below: "
            "other noise (2 % of the range), another image of the class, any other image (chance).", "",
            *table("changed", groups, stay, dict(place="kept/{}/place", bag="kept/{}/bag")),
            "## Effective dimension", "",
            *table("of", groups, {k: k for k in ("teacher", "h", "codes")}, {"": "dimension/{}"}, unit=1),
            "## Verdicts", "", "Of class codes should carry more: few stay when it changes, much of it is told and "
            "decoded. To ignore a factor is the reverse. Codes that stay: (share - unrelated) / (1 - unrelated), "
            "as bags for rotation, scale, position. A difference within 4.3 standard errors is noise.", "",
            *verdicts(groups)]


def draw_bars(groups, path):
    """Left: codes kept, above chance. Right: read off the codes (bars), h (dots) and the teacher (diamonds)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.4))
    order, height = sorted(groups, key=lambda t: t != "pixel"), 0.8 / len(groups)
    sides = ((axes[0], CHANGES, "kept/{}/above", {}, "Codes that stay when this factor alone changes\n"
              "(0: as two unrelated images; 100: all)"),
             (axes[1], list(CLAIM), "codes/{}", GUESS, "Read off all codes of an image by ridge regression\n"
              "(0: a guess; 100: perfect)"))
    marks = ("h", "o", "black", "h, before rounding"), ("teacher", "D", "white", "teacher's features")
    for axis, names, key, guess, title in sides:
        guess = np.array([guess.get(k, 0) for k in names])
        for i, teacher in enumerate(order):
            read = lambda key: np.array([mean_and_error(groups[teacher], key.format(k)) for k in names])  # noqa: E731
            at, (mean, error) = np.arange(len(names)) + (i + 0.5 - len(groups) / 2) * height, read(key).T
            axis.barh(at, 100 * (mean - guess) / (1 - guess), 0.9 * height, label=f"{teacher} codes",
                      color=("#e39b54", "#3f78b0", "#57a374", "#8d72b4", "#888888")[i % 5])
            axis.errorbar(100 * (mean - guess) / (1 - guess), at, xerr=100 * error / (1 - guess), fmt="none",
                          ecolor="black", elinewidth=1)
            for source, marker, fill, label in marks if axis is axes[1] else ():
                axis.plot(100 * (read(source + "/{}")[:, 0] - guess) / (1 - guess), at, marker, ms=4.5, mec="black",
                          mfc=fill, ls="", label=None if i else label)
        low = dict.fromkeys(["class"], "class (should be low)") if axis is axes[0] else {}
        axis.set_yticks(range(len(names)), [low.get(k, k) for k in names])
        axis.set_title(title, fontsize=10)
        axis.set_xlim(-3, 103)
        axis.set_ylim(len(CHANGES) - 0.5, -0.5)              # both panels alike, so that rows stand side by side
        axis.grid(axis="x", lw=0.4)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("percent", fontsize=9)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", type=Path, help="folders with a vqkd.pt; runs of one teacher count as its seeds")
    p.add_argument("--out", type=Path, default=Path("runs/factors"), help="writes OUT.jsonl, OUT.md and OUT.png")
    p.add_argument("--images", type=int, nargs=3, default=(6000, 2000, 1000), metavar=("TRAIN", "TEST", "PAIRS"),
                   help="images to fit on, to test on, and, of the latter, to draw anew; 6000 2000 1000")
    args = p.parse_args(argv)
    train, test, pairs = args.images
    if not (60 <= train <= 12_000 and 20 <= pairs <= test <= 2000):
        raise engine.UserError(f"--images {train} {test} {pairs}: give 60 to 12000 images to fit on, at most 2000 to "
                               f"test on, and of those 20 or more to draw anew")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    log, groups = args.out.with_suffix(".jsonl"), {}
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for run in args.runs:
        path = run / "vqkd.pt"                               # a run measured before is not measured again
        same = [r for r in done if path.exists() and (r["run"], r["written"], r["sizes"]) ==
                (str(run), path.stat().st_mtime, list(args.images))]
        record = same[-1] if same else measure(run, *args.images)
        if not same:
            with open(log, "a") as file:
                file.write(json.dumps(record) + "\n")
        print(f"{run}: teacher {record['teacher']}, seed {record['seed']}, {record['seconds']:.0f} s", flush=True)
        groups.setdefault(record["teacher"], []).append(record)
    text = "\n".join(report(groups)) + "\n"
    page = args.out.with_suffix(".md")                       # what a person wrote above the marker stays
    head = page.read_text().split("<!-- tables -->")[0] if page.exists() else ""
    page.write_text(head + "<!-- tables -->\n\n" + text)
    print(text)
    draw_bars(groups, args.out.with_suffix(".png"))


if __name__ == "__main__":
    engine.run(main)
