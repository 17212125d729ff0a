"""Stage 3c, semantic segmentation: the backbone names a class for every pixel, through UPerNet (paper, Section 3.2).

    image --ViT--> maps of four blocks --pyramid--> 1/4, 1/8, 1/16, 1/32 --UPerNet--> class of every pixel at 1/4

A ViT keeps one resolution from the first block to the last; a segmentation head wants fine maps for outlines and
coarse ones for context. So four blocks are tapped, and deconvolutions or pooling give each tap another resolution.
UPerNet then pools the coarsest map over regions of many sizes, carries what it finds down to the finest, and reads
all four together. A small second head on one tap helps training and is not used afterwards.

Read in this order: add_pyramid, UPerHead, UPerNet, pixel_cross_entropy, layer_of, poly_schedule, slide, train, scores.

    python segment.py                                                       # tiny on shapes: from runs/tiny/pretrain.pt
    python segment.py --init scratch --lr 3e-3 --out runs/scratch           # the same without pre-training
    torchrun --nproc_per_node=8 segment.py --model base --data /ade20k      # the paper's run
    python segment.py --eval                                                # measure runs/tiny/segment.pt
"""
# Shapes used in this file:  B images, gh x gw patches, D width, C classes, h x w some map's size, H x W the image's

import argparse
import colorsys
import json
import math
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

from support import data, engine, files, weights
from support.scenes import SegmentTransform, fit_size, open_scenes
from support.scenes import IGNORE
from support.engine import UserError
from model import PRESETS, ViT, count_parameters, imagenet_normalize

COMMON = dict(           # REFERENCE.md section 6; the rate is NOT scaled by the batch size
    data="datasets/ade20k", image_size=512, batch_size=16, steps=160_000, warmup_steps=1500, weight_decay=0.05,
    jitter=2.0, distortion=True, channels=None, train_images=None, evaluations=10)
RECIPES = {              # base, large: the paper's for our kind of pre-training; tiny, small: ours
    # tiny has few labelled images, for there pre-training matters most, and no jitter: shapes fill their images.
    "tiny": dict(COMMON, data="shapes", image_size=48, lr=2e-3, steps=600, warmup_steps=60, layer_decay=0.75,
                 drop_path=0.1, jitter=1.0, distortion=False, channels=64, train_images=200, evaluations=2),
    "small": dict(COMMON, lr=5e-5, layer_decay=0.75, drop_path=0.15, micro_batch=16),
    "base": dict(COMMON, lr=5e-5, layer_decay=0.75, drop_path=0.15, micro_batch=16),
    "large": dict(COMMON, lr=4e-5, layer_decay=0.9, drop_path=0.2, micro_batch=8),
}
CHANGES = {              # what a start from an ImageNet-21k classifier changes in the row above
    ("base", "21k"): dict(layer_decay=0.85),
    ("large", "21k"): dict(lr=3e-5),
}
POOLS = (1, 2, 3, 6)     # sides of the grids of regions that the pyramid pooling takes means over
AUX_WEIGHT, AUX_CHANNELS, AUX_TAP = 0.4, 256, 2
DROPOUT = 0.1            # of whole channels, in front of both classifiers
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)       # --multi-scale, each also mirrored


# --- method -----------------------------------------------------------------------------------------------------------
def taps_of(depth):
    """The 0-based blocks whose raw outputs are read, a third, half, two thirds, all the way up.  base: 3, 5, 7, 11"""
    return depth // 3 - 1, depth // 2 - 1, 2 * depth // 3 - 1, depth - 1


def resize(x, size):
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def conv(in_channels, out_channels, side):
    """Convolution without bias -> BatchNorm -> ReLU. Starts as He et al.: N(0, 2 / fan-out)."""
    layer = nn.Conv2d(in_channels, out_channels, side, padding=side // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(OrderedDict(conv=layer, bn=nn.BatchNorm2d(out_channels), relu=nn.ReLU()))


def classifier(channels, classes):
    layer = nn.Conv2d(channels, classes, 1)
    nn.init.normal_(layer.weight, std=0.01)                  # Recipe, not in the paper
    nn.init.zeros_(layer.bias)
    return layer


def add_pyramid(vit):
    """Four ways to bring a tap (B, D, gh, gw) to 4, 2, 1 and 1/2 times its size, the width kept. They sit inside the
    backbone because the released files name them so. Its final norm goes: taps are raw block outputs."""
    def double():
        return nn.ConvTranspose2d(vit.width, vit.width, kernel_size=2, stride=2)
    vit.fpn1 = nn.Sequential(double(), nn.BatchNorm2d(vit.width), nn.GELU(), double())
    vit.fpn2 = nn.Sequential(double())                       # no norm, no activation (recipe, not in the paper)
    vit.fpn3 = nn.Identity()
    vit.fpn4 = nn.MaxPool2d(kernel_size=2, stride=2)
    vit.norm = vit.fc_norm = None
    return vit


class UPerHead(nn.Module):
    """Context from the coarsest map, outlines from the finest: pyramid pooling on top, then a feature pyramid down."""

    def __init__(self, width, channels, classes):
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), conv(width, channels, 1)) for side in POOLS)
        self.bottleneck = conv(width + len(POOLS) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(conv(width, channels, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(conv(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = conv(4 * channels, channels, 3)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.conv_seg = classifier(channels, classes)

    def forward(self, maps):
        """Four maps (B, D, h, w), finest first -> logits (B, C, h, w) at the finest."""
        top = maps[-1]
        pooled = [resize(pool(top), top.shape[-2:]) for pool in self.psp_modules]
        levels = [lateral(x) for lateral, x in zip(self.lateral_convs, maps)]
        levels.append(self.bottleneck(torch.cat([top, *pooled], dim=1)))
        for i in (2, 1, 0):                                  # top down: each level adds what the coarser one knows
            levels[i] = levels[i] + resize(levels[i + 1], levels[i].shape[-2:])
        levels[:3] = [smooth(x) for smooth, x in zip(self.fpn_convs, levels)]
        x = torch.cat([resize(x, levels[0].shape[-2:]) for x in levels], dim=1)      # (B, 4 channels, h, w)
        return self.conv_seg(self.dropout(self.fpn_bottleneck(x)))


def fcn_head(width, classes, channels=AUX_CHANNELS):
    """The auxiliary head: one convolution and a classifier, so that a tap in the middle feels the labels directly."""
    return nn.Sequential(OrderedDict(convs=nn.Sequential(conv(width, channels, 3)), dropout=nn.Dropout2d(DROPOUT),
                                     conv_seg=classifier(channels, classes)))


class UPerNet(nn.Module):
    """Backbone, pyramid and the two heads. Names are those of the released checkpoints."""

    def __init__(self, backbone, classes, channels=None, aux_channels=AUX_CHANNELS):
        super().__init__()
        if min(backbone.grid) < 2:
            raise UserError(f"a crop of {backbone.grid[0]}x{backbone.grid[1]} patches is too small: raise --image-size")
        self.backbone, self.taps = add_pyramid(backbone), taps_of(backbone.depth)
        self.decode_head = UPerHead(backbone.width, channels or backbone.width, classes)
        self.auxiliary_head = fcn_head(backbone.width, classes, aux_channels)

    def maps(self, images):
        """Images (B, 3, H, W), normalised -> four maps (B, D, h, w); 512 px in patches of 16: 128, 64, 32, 16."""
        tokens = self.backbone.features(images, blocks=self.taps)                    # 4 x (B, T, D), before any norm
        maps = [t[:, 1:].transpose(1, 2).unflatten(2, self.backbone.grid) for t in tokens]       # (B, D, gh, gw)
        return [getattr(self.backbone, f"fpn{i + 1}")(x) for i, x in enumerate(maps)]

    def forward(self, images):
        """-> logits (B, C, h, w) of the head; in training of both heads."""
        maps = self.maps(images)
        logits = self.decode_head(maps)
        return (logits, self.auxiliary_head(maps[AUX_TAP])) if self.training else logits


def pixel_cross_entropy(logits, labels):
    """Cross-entropy of logits (B, C, h, w), brought to the size of the labels (B, H, W), in float32.

    Recipe, not in the paper: the mean is over ALL pixels. Ignored ones add 0 and still count below the line, so a
    crop that is half padding pulls half as hard (torch's mean would leave them out)."""
    total = F.cross_entropy(resize(logits.float(), labels.shape[-2:]), labels, ignore_index=IGNORE, reduction="sum")
    return total / labels.numel()


def layer_of(name, depth):
    """Layer number for the rate decay: 0 embeddings, i + 1 block i, depth + 1 the pyramid and both heads."""
    part = name.removeprefix("backbone.").split(".")
    if part[0] in ("cls_token", "mask_token", "pos_embed", "patch_embed"):
        return 0
    return int(part[1]) + 1 if part[0] == "blocks" else depth + 1


def rate_groups(model, weight_decay, layer_decay):
    """AdamW groups in which layer i learns at  lr * layer_decay^(depth + 1 - i).
    Recipe, not in the paper: skip is empty, so that in this stage, unlike the others, [CLS] is decayed, too."""
    depth = model.backbone.depth
    return engine.param_groups(model.named_parameters(), weight_decay, skip=(), layer_decay=layer_decay, depth=depth,
                               layer_id=lambda name: layer_of(name, depth))


def poly_schedule(step, base, total, warmup):
    """base * (1 - step / total), times a linear warm-up from 0: a line to 0 that is bent at its start only.
    Differs from the recipe during warm-up, by a millionth of the base or less: there it starts at that, not at 0."""
    return base * min(1.0, step / warmup if warmup else 1.0) * (1 - step / total)


def window_starts(side, window, stride):
    """Where windows begin along one side: every `stride` pixels; the last is shifted inwards to end with the image."""
    count = math.ceil(max(side - window, 0) / stride) + 1
    return [max(0, min(i * stride, side - window)) for i in range(count)]


def slide(logits_of, images, window, stride):
    """Logits (B, C, H, W) of images (B, 3, H, W) at least as large as the window: the mean over all windows that show
    a pixel.  logits_of: (B, 3, *window) -> (B, C, h, w) of any size;  window, stride: two numbers each."""
    total, times = 0, torch.zeros(images.shape[-2:], device=images.device)
    for top in window_starts(images.shape[-2], window[0], stride[0]):
        for left in window_starts(images.shape[-1], window[1], stride[1]):
            place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            logits = resize(logits_of(images[place]).float(), window)
            if isinstance(total, int):
                total = logits.new_zeros(*logits.shape[:2], *images.shape[-2:])
            total[place] += logits
            times[place] += 1
    return total / times


def predict(model, images, scales=(1.0,), flip=False):
    """Class probabilities (B, C, H, W) of images (B, 3, H, W) in [0, 1] of any size.

    Each is resized to fit (4 S, S), S the side of the crop (base: 2048, 512), read through windows two thirds of a
    crop apart, and its logits brought back to H x W. Several scales and mirror images average as probabilities."""
    window, size, total = model.backbone.image_size, images.shape[-2:], 0
    stride = [round(side * 2 / 3) for side in window]        # 341 of 512
    for scale in scales:
        fitted = fit_size(*size, 4 * min(window) * scale, min(window) * scale)
        view = imagenet_normalize(images if fitted == tuple(size) else resize(images, fitted))
        # Differs from the recipe, which fails where a side is shorter than the window (aspect above 4, scales below
        # 1): we pad on the right and at the bottom with the mean colour, and cut that off again.
        missing = [max(w - s, 0) for w, s in zip(window, fitted)]
        view = F.pad(view, (0, missing[1], 0, missing[0]))
        for mirrored in (False, True)[:1 + flip]:
            logits = slide(model, view.flip(-1) if mirrored else view, window, stride)
            logits = (logits.flip(-1) if mirrored else logits)[..., :fitted[0], :fitted[1]]
            total = total + resize(logits, size).softmax(dim=1)
    return total / (len(scales) * (1 + flip))


def warmup_of(preset, steps):
    """Updates of warm-up in a run of so many: a run cut short keeps the recipe's share.  base: 1500 of 160,000"""
    return round(steps * RECIPES[preset]["warmup_steps"] / RECIPES[preset]["steps"])


# --- arguments --------------------------------------------------------------------------------------------------------
def recipe_for(preset, init="pretrain"):
    """One row of the recipe: by architecture, and whether it comes by way of ImageNet-21k."""
    # From scratch there is nothing in the early blocks to keep, so all layers learn at one rate. Ours.
    return RECIPES[preset] | (dict(layer_decay=1.0) if init == "scratch" else CHANGES.get((preset, init), {}))


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    engine.add_run_args(p)
    p.add_argument("--init", default="pretrain", choices=["pretrain", "21k", "scratch"],
                   help="start from OUT/pretrain.pt, a classifier (OUT/finetune_21k.pt), or random weights")
    p.add_argument("--checkpoint", type=Path, help="start from this file, ours or released; --eval: the segmenter")
    p.add_argument("--eval", action="store_true", help="only measure OUT/segment.pt, or --checkpoint, on val images")
    p.add_argument("--multi-scale", action="store_true",
                   help="--eval: average six scales and mirror images, for models trained with --jitter (not tiny)")
    p.add_argument("--evaluations", type=int, help="evaluate so many times in a run; base: 10")
    p.add_argument("--train-images", type=int, help="use only so many labelled training images; base: all, tiny: 200")
    p.add_argument("--classes", type=int, help="classes of a folder's annotations, label 0 left out; default 150")
    g = p.add_argument_group("optimiser")
    g.add_argument("--lr", type=float, help="peak rate of the heads, not scaled by batch size; base: 5e-5")
    g.add_argument("--layer-decay", type=float, help="rate of a block by the next one's; base: 0.75 (by 21k: 0.85)")
    g.add_argument("--weight-decay", type=float, help="base: 0.05")
    g.add_argument("--drop-path", type=float, help="stochastic depth, last block; base: 0.15")
    g.add_argument("--warmup-steps", type=int, help="updates of linear warm-up; base: 1500 of 160,000, or that share")
    g.add_argument("--jitter", type=float, help="images are resized by 1/JITTER to JITTER before cropping; base: 2")
    args = p.parse_args(argv)
    if args.model not in RECIPES:
        engine.with_recipe(args, RECIPES)                    # says which there are
    if args.multi_scale and not args.eval:
        raise UserError("--multi-scale belongs to --eval: training measures at one scale")
    row = recipe_for(args.model, args.init)
    if args.steps is not None:
        row["warmup_steps"] = warmup_of(args.model, args.steps)
    elif args.epochs is not None:                            # train knows how many steps that makes
        row = {k: v for k, v in row.items() if k not in ("steps", "warmup_steps")}
    facts = look_at_checkpoint(args, row["image_size"])
    row["image_size"] = facts["image_size"]
    args = engine.with_recipe(args, {args.model: row})
    args.patch_size = args.patch_size or facts["patch_size"]
    if (args.init != "scratch" or args.eval) and args.patch_size != facts["patch_size"]:
        raise UserError(f"--patch-size {args.patch_size}: the weights have {facts['patch_size']}; leave the flag out")
    engine.check_sizes(args.image_size, args.patch_size)
    weights.grid_of(args.image_size, args.patch_size)
    engine.check_ranges(args, [
        ("lr", 0, 10), ("layer_decay", 1e-3, 1), ("weight_decay", 0, 10), ("drop_path", 0, 0.99), ("jitter", 1, 10),
        ("warmup_steps", 0, 10**9), ("evaluations", 1, 10**6), ("train_images", 1, 10**9), ("classes", 2, 254)])
    return args


def look_at_checkpoint(args, crop):
    """Finds the file to start from, sets args.checkpoint, and reads from it the sizes that go with it. -> dict"""
    preset, out = PRESETS[args.model], args.out or Path("runs") / args.model
    facts = dict(image_size=crop, patch_size=preset["patch_size"])
    if args.init == "scratch" and not args.eval:
        if args.checkpoint:
            raise UserError(f"--init scratch starts from random weights: leave out --checkpoint {args.checkpoint}")
        return facts
    name = "segment" if args.eval else "finetune_21k" if args.init == "21k" else "pretrain"
    script = "finetune.py --intermediate" if name == "finetune_21k" else f"{name}.py"
    remedy = f"make it with python {script} --model {args.model} --out {out}, or give --checkpoint FILE"
    args.checkpoint = args.checkpoint or out / f"{name}.pt"
    if args.dry_run and not args.checkpoint.is_file():
        return facts
    _, kind, arch = weights.look_at(args.checkpoint, args.model, remedy)
    if args.eval != (kind == "segment"):
        wrong = ("is no segmenter: train one with python segment.py" if args.eval else
                 "is a segmenter already: measure it with --eval, or start from a backbone")
        raise UserError(f"{args.checkpoint} {wrong}")
    if not args.eval and (kind == "finetune") != (args.init == "21k"):
        wrong = "no classifier: use --init pretrain" if args.init == "21k" else "a classifier: start with --init 21k"
        raise UserError(f"{args.checkpoint} is {wrong}")
    size = arch["image_size"] if isinstance(arch["image_size"], int) else max(arch["image_size"])
    if args.eval and args.image_size not in (None, size):
        raise UserError(f"--image-size {args.image_size}: {args.checkpoint} reads windows of {size} px; leave it out")
    return dict(image_size=size if args.eval else crop, patch_size=arch["patch_size"])


# --- training ---------------------------------------------------------------------------------------------------------
def open_sets(args, process):
    """-> (training images, held-out images), with label maps."""
    transform = SegmentTransform(args.image_size, args.jitter, distortion=args.distortion)
    few = min([n for n in (args.limit, args.train_images) if n], default=None)
    options = dict(classes=args.classes, seed=args.seed)
    train_set = open_scenes(args.data, "train", transform, limit=few, **options)
    val_set = open_scenes(args.data, "val", limit=args.limit, **options)
    data.leave_out_bad(args, process, train_set, val_set)
    return train_set, val_set


def build(args, classes):
    """-> (UPerNet, report of what was loaded or None)."""
    if args.init == "scratch":
        preset = PRESETS[args.model] | dict(image_size=args.image_size, patch_size=args.patch_size)
        vit, report = ViT(**preset, drop_path=args.drop_path), None
    else:
        vit, _, report = weights.load_backbone(args.checkpoint, pool=None, image_size=args.image_size,
                                               drop_path=args.drop_path)
    return UPerNet(vit, classes, args.channels), report


def upernet(classes, channels, aux_channels, **sizes):
    """A UPerNet from the facts of a file; sizes: the arguments of ViT."""
    return UPerNet(ViT(**sizes), classes, channels, aux_channels)


def load_segmenter(path):
    """-> (UPerNet with the weights of a segment.pt, ours or released, contents of the file)."""
    checkpoint = weights.read(path)
    if checkpoint.kind != "segment":
        raise UserError(f"{path} is no segmenter: train one with python segment.py")
    return weights.build(upernet, checkpoint), checkpoint.file


@torch.no_grad()
def average_statistics(model, world_size):
    """Make BatchNorm's running means and variances equal on all ranks, as rank 0's are what is saved. On GPUs they are
    already. (On CPUs each rank normalises by its own images; there is no synchronised BatchNorm for gloo.) Taking the
    mean now or later is the same, as they move linearly, so how often a run is saved changes nothing but rounding."""
    for m in model.modules():
        if world_size > 1 and isinstance(m, nn.BatchNorm2d):
            for statistic in (m.running_mean, m.running_var):
                dist.all_reduce(statistic)
                statistic.div_(world_size)


def confusion(predicted, labels, classes):
    """How many pixels of class i (row) were called j (column), ignored ones left out. -> (C, C) long"""
    known = labels != IGNORE
    return (labels[known] * classes + predicted[known]).bincount(minlength=classes ** 2).view(classes, classes)


def scores(matrix, background=False):
    """Figures of a confusion matrix, in percent, and IoU (C,) and accuracy (C,) of every class, on the CPU.

    IoU_c = pixels of c called c / pixels of c or called c; mIoU its mean over classes. A class that neither labels
    nor predictions hold has none (NaN) and stays out of the mean. a_acc: all pixels alike; m_acc: mean over classes."""
    matrix = matrix.cpu().double()                           # here, as mps has no float64
    hit, of_class, called = matrix.diagonal(), matrix.sum(dim=1), matrix.sum(dim=0)
    iou, acc = 100 * hit / (of_class + called - hit), 100 * hit / of_class
    figures = dict(miou=iou.nanmean().item(), m_acc=acc.nanmean().item(), a_acc=(100 * hit.sum() / matrix.sum()).item())
    if background:                                           # class 0 counts above, and is left out here
        figures["miou_objects"] = iou[1:].nanmean().item()
    return figures, iou, acc


@torch.no_grad()
def evaluate(model, dataset, args, process):
    """-> (figures, IoU (C,), accuracy (C,)) in percent. Every image counts once, over all processes, at its own size:
    folders one image at a time, shapes, which have one size, many."""
    model.eval()
    classes = len(dataset.classes)
    matrix = torch.zeros(classes, classes, dtype=torch.long, device=process.device)
    folder = args.data != "shapes"
    batches = data.eval_batches(len(dataset), 1 if folder else 50, process.rank, process.world_size)
    options = dict(scales=SCALES, flip=True) if args.multi_scale else {}
    for images, labels in data.make_loader(dataset, batches, args.workers if folder else 0, process.device):
        images, labels = data.to_float(images, process.device), labels.to(process.device).long()
        with engine.autocast(process.device, args.amp):
            predicted = predict(model, images, **options).argmax(dim=1)              # (B, H, W)
        matrix += confusion(predicted, labels, classes)
    model.train()
    return scores(engine.all_reduce_sum(matrix), dataset.background)


@torch.no_grad()
def draw(model, dataset, args, process, path, columns=10, cell=144):
    """A picture with a column for each of ten held-out images: the image, its truth (white: ignored), the prediction.
    A class has one colour in all of them; hues lie a golden section apart."""
    model.eval()
    colours = np.full((256, 3), 255, dtype=np.uint8)
    for i in range(len(dataset.classes)):
        colours[i] = 255 * np.array(colorsys.hsv_to_rgb(0.618034 * i % 1, 0.75, 0.55 + 0.2 * (i % 3)))
    if dataset.background:
        colours[0] = 40
    columns = min(columns, len(dataset))
    sheet = Image.new("RGB", (columns * (cell + 4) - 4, 3 * (cell + 4) - 4), "white")
    for column in range(columns):
        image, labels = dataset[column if args.data == "shapes" else column * len(dataset) // columns]
        with engine.autocast(process.device, args.amp):
            predicted = predict(model, data.to_float(image[None], process.device)).argmax(dim=1)[0]
        for row, pixels in enumerate((image.permute(1, 2, 0), colours[labels], colours[predicted.cpu()])):
            picture = ImageOps.contain(Image.fromarray(np.asarray(pixels)), (cell, cell), Image.Resampling.NEAREST)
            sheet.paste(picture, (column * (cell + 4), row * (cell + 4)))
    sheet.save(path)
    model.train()


def train(args, process):
    resumed = engine.start_or_resume("segment", args, process)
    train_set, val_set = open_sets(args, process)
    if resumed and resumed["classes"] != list(train_set.classes):
        raise UserError(f"the classes of {args.data} are no longer those of the run in {args.out}: restore them, or "
                        f"add --fresh")
    per_epoch = data.steps_per_epoch(len(train_set), args.batch_size)
    steps = args.steps or args.epochs * per_epoch
    warmup = min(warmup_of(args.model, steps) if args.warmup_steps is None else args.warmup_steps, steps - 1)
    micro, accumulation = data.split_batch(args.batch_size, args.micro_batch, process.world_size)
    synchronised = process.world_size > 1 and process.device.type == "cuda"
    # Differs from the recipe where a batch is accumulated: BatchNorm sees one part of the 16 images at a time (on CPUs,
    # where nothing synchronises it, only this process's share of that).
    seen = micro * process.world_size if synchronised else micro
    if micro < 2 and not synchronised:
        raise UserError("BatchNorm needs two images at once in every process: raise --micro-batch or --batch-size")

    engine.seed_all(args.seed)
    model, report = build(args, len(train_set.classes))
    if synchronised:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(process.device).train()
    groups = rate_groups(model, args.weight_decay, args.layer_decay)
    optimizer, start = engine.adamw(groups, (0.9, 0.999), process.device), 0
    if resumed:
        model.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizer"])
        start = resumed["step"]
    ddp = engine.distribute(torch.compile(model) if args.compile else model, process)
    log = engine.Log(args.out / "segment.jsonl", args, process, start, images=len(train_set), steps=steps,
                     chance=math.log(len(train_set.classes)))
    if process.rank == 0:
        print(f"{count_parameters(model) / 1e6:.2f} M parameters, backbone from "
              f"{'random numbers' if report is None else f'{args.checkpoint} ({len(report.loaded)} tensors)'}\n"
              f"{len(train_set)} images, {len(train_set.classes)} classes, {steps} steps of {args.batch_size} = "
              f"{process.world_size} processes x {accumulation} x {micro}; BatchNorm over {seen} images; "
              f"layer decay {args.layer_decay}")
        if accumulation > 1:
            print(f"note: the batch is accumulated, and BatchNorm sees {seen} of its {args.batch_size} images at once: "
                  f"raise --micro-batch if memory allows")
    batches = iter(data.make_loader(train_set, data.TrainBatches(
        len(train_set), args.batch_size, steps, start, process.rank, process.world_size, accumulation, args.seed),
        args.workers, process.device))
    eval_every = math.ceil(steps / args.evaluations)
    watch = engine.Watch(args, process, log, lambda step: data.names_of(train_set, args.batch_size, step, args.seed))
    clock, clock_step = time.time(), start
    for step in engine.progress(start, steps, process, "segment"):
        # 1. Schedules and all randomness are functions of the step, so resuming needs the step and no generator state.
        engine.set_lr(optimizer, poly_schedule(step, args.lr, steps, warmup))
        for k in range(accumulation):
            images, labels = next(batches)                                       # (B, 3, H, W), (B, H, W) uint8
            images, labels = data.to_float(images, process.device), labels.to(process.device).long()
            engine.seed_all(args.seed, step, process.rank, k)                    # for dropout and stochastic depth

            # 2. Name the pixels: from the pyramid, and from one tap through the auxiliary head.
            with engine.no_sync(ddp, last=k == accumulation - 1):
                with engine.autocast(process.device, args.amp):
                    logits, logits_aux = ddp(imagenet_normalize(images))         # (B, C, h, w), (B, C, gh, gw)
                loss_main, loss_aux = pixel_cross_entropy(logits, labels), pixel_cross_entropy(logits_aux, labels)
                loss = loss_main + AUX_WEIGHT * loss_aux
                (loss / accumulation).backward()
            watch.note(loss, step)

        # 3. One update; each group at the rate of its layer. No clipping (recipe, not in the paper).
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last, save = step == steps - 1, (step + 1) % args.save_every == 0
        stop = watch.look(step, now=save or last or step % args.log_every == 0)
        if step % args.log_every == 0 or last:
            rate = (step + 1 - clock_step) * args.batch_size / (time.time() - clock)
            clock, clock_step = time.time(), step + 1
            log(step=step, epoch=step / per_epoch, loss=loss.item(), loss_main=loss_main.item(),
                loss_aux=loss_aux.item(), images_per_s=rate, lr=max(group["lr"] for group in optimizer.param_groups))

        # 4. Now and then every held-out image, once, at its own size. The file keeps the last weights, not the best.
        if (step + 1) % eval_every == 0 or last:
            begun = time.time()
            average_statistics(model, process.world_size)
            result, iou, acc = evaluate(model, val_set, args, process)
            clock += time.time() - begun                     # images_per_s is about training
            log(step=step, epoch=(step + 1) / per_epoch, split="val", **result)
            if process.rank == 0:
                print(f"step {step + 1}/{steps}: " + ", ".join(f"{k} {v:.2f}" for k, v in result.items()), flush=True)
        if not last and (save or stop):
            average_statistics(model, process.world_size)
            if process.rank == 0:
                engine.save_resume("segment", args, contents(model, args, train_set.classes) | dict(
                    optimizer=optimizer.state_dict(), step=step + 1))
            if stop:
                raise SystemExit(128 + stop)

    tell(args, process, log, val_set.classes, result, iou, acc, step=steps, init=args.init)
    if process.rank == 0:
        engine.finish("segment", args, contents(model, args, train_set.classes) | dict(step=steps, result=result))
        draw(model, val_set, args, process, args.out / "segment.png")
    return result


def tell(args, process, log, names, result, iou, acc, **facts):
    """The summary line of the log; on the screen the table by class, best first, and the same line."""
    log(summary=1, **facts, **result,                        # None: a class that occurs nowhere
        iou={name: None if math.isnan(v) else round(v, 2) for name, v in zip(names, iou.tolist())})
    if process.rank == 0:
        order = iou.nan_to_num(-1).argsort(descending=True).tolist()
        print("\n".join(["class                    IoU    acc"] + [
            f"{names[i]:20} {iou[i]:7.2f}{acc[i]:7.2f}" for i in order]))
        print(json.dumps({"summary": 1, **facts, **{k: round(v, 4) for k, v in result.items()}}))


def evaluate_file(args, process):
    """--eval: the segmenter in a file, on the held-out images of --data. Its classes must be those of the data."""
    model, checkpoint = load_segmenter(args.checkpoint)
    classes = model.decode_head.conv_seg.out_channels
    dataset = open_scenes(args.data, "val", classes=args.classes or (None if args.data == "shapes" else classes),
                               limit=args.limit, seed=args.seed)
    if classes != len(dataset.classes) or checkpoint.get("classes", dataset.classes) != dataset.classes:
        other = ", of other names" if classes == len(dataset.classes) else ""
        raise UserError(f"{args.checkpoint} knows {classes} classes, {args.data} has {len(dataset.classes)}{other}: "
                        f"give the data of its training")
    data.leave_out_bad(args, process, dataset)
    result, iou, acc = evaluate(model.to(process.device), dataset, args, process)
    log = engine.Log(args.out / "segment_eval.jsonl", args, process, append=True)
    tell(args, process, log, dataset.classes, result, iou, acc, checkpoint=str(args.checkpoint), images=len(dataset))
    return result


# --- main -------------------------------------------------------------------------------------------------------------
def contents(model, args, classes):
    vit = model.backbone
    return engine.describe_run("segment", args) | dict(model=model.state_dict(), classes=list(classes), arch=dict(
        image_size=args.image_size, patch_size=args.patch_size, width=vit.width, depth=vit.depth, heads=vit.heads,
        positions=vit.positions, layer_scale=vit.layer_scale, channels=model.decode_head.conv_seg.in_channels,
        num_classes=len(classes)))


def main(argv=None):
    args = parse_args(argv)
    if args.dry_run:
        classes = args.classes or (11 if args.data == "shapes" else 150)
        with torch.device("meta"):                           # shapes without numbers
            vit = ViT(**PRESETS[args.model] | dict(image_size=args.image_size, patch_size=args.patch_size))
            model = UPerNet(vit, classes, args.channels)
            sizes = [tuple(x.shape[-2:]) for x in model.maps(torch.zeros(2, 3, args.image_size, args.image_size))]
        print("\n".join(f"{k:18} {v}" for k, v in sorted(files.plain_args(args).items())))
        print(f"{count_parameters(model):,} trainable parameters with {classes} classes, both heads counted; taps "
              f"{model.taps}; maps {sizes}; {args.batch_size} images per update")
        return None
    process = engine.init_distributed(args.device)
    args.amp = engine.resolve_amp(args.amp, process.device)
    args.micro_batch = args.micro_batch or args.batch_size
    return evaluate_file(args, process) if args.eval else train(args, process)


if __name__ == "__main__":
    engine.run(main)
