"""What surrounds a linear probe: the frozen networks, their images, files of features, tables.

    load_source                       a network, and which of its layers are read
    open_images, store_split          its images; their features in a file
    grid_of_heads, sources_compared   what linprobe.py prints at its end
"""
import dataclasses

from model import PRESETS, ViT, initialise, rescale_residual_branches
from support import data, transforms, weights
from support.features import WithCrops, store_features
from support.files import UserError
from support.process import seed_all

SOURCES = "pretrain", "tokenizer", "random"


# --- whose features -------------------------------------------------------------------------------
@dataclasses.dataclass
class Source:
    """A frozen network, or the raw pixels, and what of it is probed."""

    name: str
    model: ViT | None        # None: the pixels
    image_size: int | tuple  # (height, width) if they differ
    layers: list             # their names: block numbers, then "norm"
    paper: str = "cls"       # the read-out that the paper's figure stands for


def load_source(name, args, device):
    """-> Source. name: one of SOURCES, or "pixels", which tells what needs no network at all."""
    size = args.image_size or PRESETS[args.model]["image_size"]
    if name == "pixels":
        return Source(name, None, size, ["pixels"], paper="pixels")
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
def open_images(source, args, process):
    """-> training and validation images, whole, with labels."""
    plain = transforms.EvalTransform(source.image_size)
    train_set = data.open_split(args, "train", plain, labelled=True)
    val_set = data.open_split(args, "val", plain, labelled=True)
    data.leave_out_bad(args, process, train_set, val_set)
    if len(train_set) < 10:
        raise UserError(f"{len(train_set)} training images are too few to hold a tenth out: "
                        f"raise --limit or add images")
    return train_set, val_set


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
        f"  * chosen on held-out training images: top-1 {best['top1']:.2f}, "
        f"top-5 {best['top5']:.2f} (rate {best['rate']:g}, weight decay {best['weight_decay']:g})",
        f"  p the paper's reading: {paper['top1']:.2f}"]
    return "\n".join(lines)


def sources_compared(summaries):
    """A line per source: the chosen head, the paper's reading, k-NN."""
    lines = [f"{'source':>10} {'top-1':>7} {'paper':>7} {'k-NN':>7}   chosen"]
    for r in summaries:
        lines.append(f"{r['source']:>10} {r['top1']:7.2f} {r['paper_top1']:7.2f} {r['knn']:7.2f}   "
                     f"block {r['block']}, {r['readout']}, {r['norm']}")
    return "\n".join(lines)
