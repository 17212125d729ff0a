"""What surrounds a linear probe: the frozen networks, their images, files of features, tables.

    load_sources, load_source         networks, and which of their layers are read
    open_images, store_splits         their images; their features in files
    draw_labels                       the images that show their labels, if few do
    named                             the keys of a summary
    grid_of_heads, sources_compared   what linprobe.py prints
    hand_over                         summaries, table and linprobe.pt
"""
import dataclasses
import json
import math
import statistics
import time

from model import PRESETS, ViT, initialise, rescale_residual_branches
from support import data, transforms, weights
from support.features import WithCrops, store_features
from support.files import UserError, describe_run, rounded, write_file
from support.labels import choose_labels
from support.process import seed_all

SOURCES = "pretrain", "tokenizer", "random"


# --- whose features -------------------------------------------------------------------------------
@dataclasses.dataclass
class Source:
    """A frozen network, or what needs none: raw pixels, HOG. And what of it is probed."""

    name: str                # one of SOURCES, "pixels" or "hog"
    model: ViT | None        # None: pixels, hog
    image_size: int | tuple  # (height, width) if they differ
    layers: list             # their names: block numbers, then "norm"
    paper: str = "cls"       # the read-out that the paper's figure stands for


def load_sources(names, args, device):
    """-> the Sources of these names; behind them pixels, and HOG if all are asked for.

    HOG is the teacher of tiny, made by hand: nothing that tiny distils from it should be above it.
    The networks of base have better teachers.
    """
    sources = [load_source(name, args, device) for name in names]
    size = sources[0].image_size             # of the network that they stand beside
    sources.append(Source("pixels", None, size, ["pixels"], paper="pixels"))
    if args.source == "all" and args.model == "tiny":
        sources.append(Source("hog", None, size, ["hog"], paper="hog"))
    return sources


def load_source(name, args, device):
    """-> Source. name: one of SOURCES. A tokenizer behind --checkpoint is named as what it is."""
    size = args.image_size or PRESETS[args.model]["image_size"]
    paper = "cls"
    if name == "random":
        model = untrained(args, size)
    else:
        script = "vqkd.py" if name == "tokenizer" else "pretrain.py"
        command = f"python {script} --model {args.model} --out {args.out}"
        checkpoint = weights.read(file_of(name, args), remedy=f"make it with {command}")
        # The tokenizer's pixel range is folded into its first layer, so all take the same input.
        model, _, report = weights.load_backbone(checkpoint, pool=None, image_size=args.image_size)
        # The paper reads [CLS] if patch aggregation trained it; otherwise we read the patch mean.
        aggregated = any(key.startswith("cls_pt_layers.") for key in report.unexpected)
        paper = "cls" if aggregated else "mean"
        if checkpoint.kind == "vqkd":
            name = "tokenizer"
    model = model.to(device).eval().requires_grad_(False)
    first = model.depth - min(args.blocks, model.depth)
    layers = [str(block + 1) for block in range(first, model.depth)] + ["norm"]
    return Source(name, model, model.arch()["image_size"], layers, paper)


def untrained(args, size):
    """A network with the random weights that pre-training starts from."""
    seed_all(args.seed)
    preset = PRESETS[args.model] | dict(image_size=size, patch_size=args.patch_size)
    model = ViT(**preset, positions="shared", pool=None)
    initialise(model, preset.get("init_std", 0.02), cut=1.0, convolutions=True)
    rescale_residual_branches(model.blocks)
    return model


def file_of(name, args):
    """The checkpoint that a source is read from."""
    if name == "tokenizer":
        return args.out / "vqkd.pt"
    return args.checkpoint or args.out / "pretrain.pt"


# --- images and their features --------------------------------------------------------------------
def open_images(sources, args, draws, process):
    """What open_size gives, for each of the sources. Each size is opened once."""
    opened = {size: open_size(size, args, draws, process)
              for size in dict.fromkeys(source.image_size for source in sources)}
    return [opened[source.image_size] for source in sources]


def open_size(image_size, args, draws, process):
    """-> training and validation images, whole, with labels; draw_labels of the training images."""
    plain = transforms.EvalTransform(image_size)
    train_set = data.open_split(args, "train", plain, labelled=True)
    val_set = data.open_split(args, "val", plain, labelled=True)
    data.leave_out_bad(args, process, train_set, val_set)
    if len(train_set) < 10:
        raise UserError(f"{len(train_set)} training images are too few to hold a tenth out: "
                        f"raise --limit or add images")
    return train_set, val_set, draw_labels(args, train_set.labels, draws)


def store_splits(source, encode, sets, args, process):
    """-> store_split of training and validation images, with and without crops; the seconds."""
    begin = time.time()
    train = store_split(source, encode, sets[0], args.augment, args, process)
    val = store_split(source, encode, sets[1], 0, args, process)
    seconds = time.time() - begin
    process.print(f"{source.name}: features of {len(sets[0])} images in {seconds:.1f} s")
    return train, val, seconds


def store_split(source, encode, dataset, augment, args, process):
    """-> features (n (1 + augment), L, F), which stay in a file until they are used, and labels.

    encode(source, images) -> features (B, L, F) of images (B, 3, H, W) in [0, 1].
    """
    def encode_fast(images):
        with process.autocast():
            return encode(source, images)

    # float16 halves the file: base on ImageNet is 1.28 M x 13 x 1536 numbers, 51 GB.
    features = store_features(
        feature_folder(args), "--cache", source.name, encode_fast, WithCrops(dataset, augment),
        process, networks=[source.model] if source.model else [], about=source.layers,
        dtype="float32" if args.model == "tiny" else "float16",
        batch_size=args.micro_batch, workers=args.workers)
    return features, dataset.labels.repeat_interleave(1 + augment)


def feature_folder(args):
    return args.cache or args.out / "linprobe.features"


# --- few labels -----------------------------------------------------------------------------------
def draw_labels(args, labels, draws):
    """Which images show their labels: --labels-per-class of every class.  -> `draws` x (m,) long

    Other seeds make other draws. There are none if a class has too few images: UserError if the
    flag was typed.
    """
    per_class = args.labels_per_class
    smallest = labels.unique(return_counts=True)[1].min()
    if per_class == 0 or smallest < per_class and "labels_per_class" not in args.typed:
        return []
    return [choose_labels(labels, per_class, args.seed * draws + draw) for draw in range(draws)]


def mean_and_error(values):
    """The mean of R draws or seeds, and its standard error: their standard deviation / sqrt(R).

    The error of a single value is nan.
    """
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.fmean(values), spread / len(values)**0.5


def named(of_best, of_paper, per_class):
    """What linprobe.score_reading gave for the chosen head and for the paper's reading, by the keys
    of a summary: knn20, knn_best20, top1_10, top1_10_se, ...
    """
    found = dict(knn=of_paper["knn20"])
    for k in (1, 10, 20):
        found |= {f"knn{k}": of_paper[f"knn{k}"], f"knn_best{k}": of_best[f"knn{k}"]}
    few = dict(top1=of_best["few_top1"], paper_top1=of_paper["few_top1"],
               knn1=of_paper["few_knn1"], knn_best1=of_best["few_knn1"])
    for name, values in few.items():
        if values:
            key = f"{name}_{per_class}"
            found[key], found[f"{key}_se"] = mean_and_error(values)
            found["draws"] = len(values)
    return found


# --- tables ---------------------------------------------------------------------------------------
def grid_of_heads(source, table, best, paper):
    """A line per layer, a column per read-out and norm, in each place the top-1 in percent.

    table: a row per layer, read-out and norm, in this order. best, paper: two of them.
    """
    titles = dict.fromkeys(f"{row['readout']}/{row['norm']}" for row in table)
    lines = [f"{source:10}" + "".join(f"{title:>18}" for title in titles)]
    block = None
    for row in table:
        if row["block"] != block:
            block = row["block"]
            lines.append(f"{block:>10}")
        marks = "*" * (row is best) + "p" * (row is paper)
        lines[-1] += f"{row['top1']:>16.1f}{marks:2}"
    lines += [
        f"  * {source}, chosen on held-out training images: top-1 {best['top1']:.2f}, "
        f"top-5 {best['top5']:.2f} (rate {best['rate']:g}, weight decay {best['weight_decay']:g})",
        f"  p {source}, the paper's reading: {paper['top1']:.2f}"]
    return "\n".join(lines)


NOTES = {
    "pretrain": "the backbone of stage 2",
    "tokenizer": "the encoder of stage 1",
    "random": "the network before any training",
    "pixels": "images as 24 x 24 pixels without their mean, nothing learned; NN by |cosine|",
    "hog": "made by hand, the teacher of tiny: a ceiling for what is distilled from it",
}
ALL_LABELS = {"top1": "chosen", "paper_top1": "paper's", "knn1": "1-NN", "knn20": "20-NN"}
FEW_LABELS = {"top1": "chosen", "paper_top1": "paper's", "knn1": "1-NN"}


def sources_compared(summaries, args):
    """The table at the end: a line per source, top-1 with all labels and with few; then notes."""
    n = args.labels_per_class
    few = f"{n} labels a class"
    has_few = f"top1_{n}" in summaries[0]
    groups = ["", "", "", "all labels"]
    titles = list(ALL_LABELS.values())
    if has_few:
        groups += ["", "", few]
        titles += FEW_LABELS.values()
    lines = [line("top-1 in %", groups), line("source", titles) + "   chosen"]
    for r in summaries:
        cells = [f"{r[key]:.2f}" for key in ALL_LABELS]
        if has_few:
            keys = [f"{key}_{n}" for key in FEW_LABELS]
            cells += [f"{r[key]:.1f} +- {r[f'{key}_se']:.1f}" for key in keys]
        reading = dict.fromkeys([r["block"], r["readout"]])  # pixels pixels: once
        lines.append(line(r["source"], cells) + f"   {' '.join(reading)}")
    lines += [f"  {r['source']}: {NOTES[r['source']]}" for r in summaries]
    lines.append("  paper's: the reading of the paper, in the last layer; NN: neighbours in it")
    if has_few:
        lines.append(f"  {few}: the same readings by ridge regression, mean and standard error of "
                     f"{r['draws']} draws")
    elif n:
        lines.append(f"  {few}: not measured, some class has fewer images")
    if args.data == "shapes":
        lines.append(f"  With all labels, {r['images']:,} drawings fill their space: there a "
                     f"nearest neighbour is a memory.")
    return "\n".join(lines)


def line(first, cells):
    """A line of the table: four cells of all labels, then those of few."""
    return (f"{first:10}" + "".join(f"{cell:>9}" for cell in cells[:4])
            + "".join(f"{cell:>14}" for cell in cells[4:]))


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}


# --- the end --------------------------------------------------------------------------------------
def hand_over(results, stage, args, log, made_from):
    """Log and print what was found, and write the head of the first source into its file.

    results: (summary, (weight (C, F'), bias (C,))) of every source.  -> the first summary
    """
    summaries = [summary for summary, _ in results]
    for summary in summaries:
        log(summary=1, **summary)
        print(json.dumps(rounded(dict(summary=1, **summary))))
    print(sources_compared(summaries, args))
    first, (weight, bias) = results[0]
    model = dict(weight=weight.cpu(), bias=bias.cpu())
    write_file(args.out / f"{stage}.pt", describe_run(stage, args) | dict(
        model=model, block=first["block"], readout=first["readout"], norm=first["norm"],
        rate=first["rate"], result=first, sources=summaries, made_from=made_from))
    return first
