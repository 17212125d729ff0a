"""Stage 3c, semantic segmentation: a class for every pixel, through UPerNet (BEiT v2, Section 3.3).

    image --ViT--> outputs of four blocks --pyramid--> maps at 1/4, 1/8, 1/16, 1/32 of the image
                                          --UPerNet--> the class of every pixel, at 1/4

A ViT has one resolution in all its blocks. A segmentation head needs fine maps for outlines and
coarse maps for context. So the outputs of four blocks are resized: two are enlarged by
deconvolutions, one stays, one is pooled. UPerNet takes means of the coarsest map over regions of
several sizes, adds the result to the finer maps step by step, and reads all four maps together.

Read in this order: add_pyramid, UPerHead, UPerNet, pixel_cross_entropy, slide, scores, train.

    python segment.py                              # tiny on shapes, CPU, from runs/tiny/pretrain.pt
    torchrun --nproc_per_node=8 segment.py --model base --data /ade20k       # the paper's run
    python segment.py --eval                       # measure runs/tiny/segment.pt
"""
# Shapes:  B images, gh x gw patches, T = 1 + gh gw tokens, D width, C classes,
#          h x w the size of a map (not always the same one), H x W that of the image
import math
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import ViT, imagenet_normalize
from support import batchnorm, data, weights
from support.args import Size, check_sides, fill_in, number, run_parser, whole
from support.files import UserError
from support.optim import adamw, param_groups, set_lr
from support.process import launch, seed_all
from support.run import Run, dry_run
from support.scenes import (
    IGNORE, SegmentTransform, bands, by_name, class_table, draw_scenes, fit_size,
    open_for_segmenter, open_split, resize_rows)
from support.start import describe_start, read_start, start_backbone, start_file

MODELS = "tiny", "small", "base", "large"
RECIPE = {  # base and large: the appendix's table of hyper-parameters; tiny and small: ours
    #                tiny            small             base              large
    "data":          ("shapes",      "datasets/ade20k", "datasets/ade20k", "datasets/ade20k"),
    "image_size":    (48,            512,              512,              512),
    "lr":            (2e-3,          5e-5,             5e-5,             4e-5),
    "layer_decay":   (0.75,          0.75,             0.75,             0.9),
    "drop_path":     (0.1,           0.15,             0.15,             0.2),
    "weight_decay":  (0.05,          0.05,             0.05,             0.05),
    "batch_size":    (16,            16,               16,               16),
    "micro_batch":   (16,            16,               16,               8),
    "steps":         (600,           160_000,          160_000,          160_000),
    "warmup_share":  (0.1,           1500 / 160_000,   1500 / 160_000,   1500 / 160_000),
    "evaluations":   (2,             10,               10,               10),
    # Shapes fill their images, so tiny neither resizes nor distorts them. It gets few labelled
    # images, because pre-training matters most then.
    "jitter":        (1.0,           2.0,              2.0,              2.0),
    "distortion":    (False,         True,             True,             True),
    "train_images":  (200,           None,             None,             None),
    "channels":      (64,            None,             None,             None),      # None: D
}
OTHER_STARTS = {         # what --init changes. 21k: the paper's; scratch: ours, one rate for all
    "21k": {"lr": (2e-3, 5e-5, 5e-5, 3e-5), "layer_decay": (0.75, 0.75, 0.85, 0.9)},
    "scratch": {"layer_decay": (1.0, 1.0, 1.0, 1.0)},
}
# Recipe, not in the paper, in all presets:
POOLS = 1, 2, 3, 6       # pyramid pooling takes means over 1 x 1, 2 x 2, 3 x 3 and 6 x 6 regions
DROPOUT = 0.1            # of whole channels, before both classifiers
AUX_WEIGHT = 0.4         # of the loss of the auxiliary head
AUX_TAP = 2              # the map that the auxiliary head reads, counted from 0: the third of four
SCALES = 0.5, 0.75, 1.0, 1.25, 1.5, 1.75                     # --multi-scale


# --- method: the network --------------------------------------------------------------------------
def taps_of(depth):
    """The blocks that are read, counted from 0: at a third, half, two thirds and all of the depth.

    base: 3, 5, 7, 11; large: 7, 11, 15, 23
    """
    return depth // 3 - 1, depth // 2 - 1, 2 * depth // 3 - 1, depth - 1


def resize(x, size):
    """Maps (B, C, h, w) -> (B, C, *size), bilinear."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def conv(in_channels, out_channels, side):
    """Convolution without bias (BatchNorm has one), BatchNorm, ReLU: (B, C, h, w) -> same h, w."""
    layer = nn.Conv2d(in_channels, out_channels, side, padding=side // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(OrderedDict(conv=layer, bn=nn.BatchNorm2d(out_channels), relu=nn.ReLU()))


def classifier(channels, classes):
    """The same linear layer at every place of a map: (B, channels, h, w) -> (B, C, h, w)."""
    layer = nn.Conv2d(channels, classes, kernel_size=1)
    nn.init.normal_(layer.weight, std=0.01)                  # Recipe, not in the paper: 0.01
    nn.init.zeros_(layer.bias)
    return layer


def add_pyramid(vit):
    """Give a backbone four layers that resize a map (B, D, gh, gw): by 4, 2, 1 and 1/2.

    They are parts of the backbone because the released files name them so.
    """
    def double():                            # twice the height and width
        return nn.ConvTranspose2d(vit.width, vit.width, kernel_size=2, stride=2)

    vit.fpn1 = nn.Sequential(double(), nn.BatchNorm2d(vit.width), nn.GELU(), double())
    vit.fpn2 = nn.Sequential(double())                       # Recipe, not in the paper: no norm
    vit.fpn3 = nn.Identity()
    vit.fpn4 = nn.MaxPool2d(kernel_size=2, stride=2)
    # Recipe, not in the paper: outputs of blocks are read without a norm. The final one is removed.
    vit.norm = vit.fc_norm = vit.pool = None
    return vit


class UPerHead(nn.Module):
    """UPerNet: the coarsest map gives the context, the finest map the outlines."""

    def __init__(self, width, channels, classes):
        """width: D of the four maps. channels: of all maps between these and the classifier."""
        super().__init__()
        # Pyramid pooling, for the coarsest map: means over regions, then all of them together.
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), conv(width, channels, 1)) for side in POOLS)
        self.bottleneck = conv(width + len(POOLS) * channels, channels, 3)
        # Feature pyramid, for the three finer maps: before and after the coarser map is added.
        self.lateral_convs = nn.ModuleList(conv(width, channels, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(conv(channels, channels, 3) for _ in range(3))
        # The classifier, of all four maps together.
        self.fpn_bottleneck = conv(4 * channels, channels, 3)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.conv_seg = classifier(channels, classes)

    def forward(self, maps):
        """Four maps (B, D, h, w), the finest first -> logits (B, C, h, w) at the finest size."""
        # Pyramid pooling: every place of the coarsest map learns what is around it.
        top = maps[3]
        pooled = [resize(pool(top), top.shape[-2:]) for pool in self.psp_modules]
        context = self.bottleneck(torch.cat([top, *pooled], dim=1))      # (B, channels, h, w)
        # Feature pyramid: from coarse to fine, the next coarser map is added to each.
        levels = [lateral(maps[i]) for i, lateral in enumerate(self.lateral_convs)] + [context]
        for i in (2, 1, 0):                  # (B, channels, h, w) each
            levels[i] = levels[i] + resize(levels[i + 1], levels[i].shape[-2:])
        smooth = [layer(levels[i]) for i, layer in enumerate(self.fpn_convs)] + [context]
        # All four are read together, at the size of the finest.
        x = torch.cat([resize(x, smooth[0].shape[-2:]) for x in smooth], dim=1)  # 4 * channels
        return self.conv_seg(self.dropout(self.fpn_bottleneck(x)))


def fcn_head(width, classes, channels):
    """The auxiliary head (B, D, h, w) -> (B, C, h, w): inner blocks learn from labels directly."""
    return nn.Sequential(OrderedDict(
        convs=nn.Sequential(conv(width, channels, 3)),
        dropout=nn.Dropout2d(DROPOUT),
        conv_seg=classifier(channels, classes)))


class UPerNet(nn.Module):
    """Backbone, pyramid and the two heads. The names are those of the released files."""

    def __init__(self, backbone, classes, channels=None, aux_channels=256):
        """channels: of UPerHead, default D as in the recipe. aux_channels: of fcn_head."""
        super().__init__()
        self.backbone = add_pyramid(backbone)
        self.taps = taps_of(backbone.depth)
        self.decode_head = UPerHead(backbone.width, channels or backbone.width, classes)
        self.auxiliary_head = fcn_head(backbone.width, classes, aux_channels)

    def arch(self):
        """The sizes that a file of weights states beside them."""
        classes, channels = self.decode_head.conv_seg.weight.shape[:2]
        return self.backbone.arch() | dict(channels=channels, num_classes=classes)

    def maps(self, images):
        """Images (B, 3, H, W), normalised -> four maps (B, D, h, w), the finest first.

        512 pixels in patches of 16: maps with sides of 128, 64, 32 and 16.
        """
        vit = self.backbone
        maps = []
        layers = vit.fpn1, vit.fpn2, vit.fpn3, vit.fpn4
        for tokens, layer in zip(vit.features(images, self.taps), layers, strict=True):
            patches = tokens[:, 1:].transpose(1, 2)          # (B, D, gh gw), without [CLS]
            maps.append(layer(patches.unflatten(2, vit.grid)))           # from (B, D, gh, gw)
        return maps

    def forward(self, images):
        """Images (B, 3, H, W), normalised -> logits (B, C, H/4, W/4) for patches of 16 pixels.

        In training: these, and the logits (B, C, gh, gw) of the auxiliary head.
        """
        maps = self.maps(images)
        logits = self.decode_head(maps)
        if not self.training:
            return logits
        return logits, self.auxiliary_head(maps[AUX_TAP])


# --- method: the loss and the rates ---------------------------------------------------------------
def pixel_cross_entropy(logits, labels):
    """Cross-entropy of logits (B, C, h, w), resized to the labels (B, H, W), in float32.

    Recipe, not in the paper: the mean is over ALL pixels. Pixels without a label are counted, and
    add 0 to the sum. So a crop that is half padding counts half.
    """
    logits = resize(logits.float(), labels.shape[-2:])       # (B, C, H, W)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / labels.numel()


def layer_of(name, depth):
    """The layer of a parameter: 0 embeddings, b + 1 for block b, depth + 1 pyramid and heads."""
    part = name.removeprefix("backbone.").split(".")
    if part[0] == "blocks":
        return int(part[1]) + 1
    return 0 if part[0] in ("cls_token", "pos_embed", "patch_embed") else depth + 1


def rate_groups(model, weight_decay, layer_decay):
    """AdamW groups in which layer i learns at  lr * layer_decay^(depth + 1 - i)."""
    # Recipe, not in the paper: unlike in the other stages, weight decay acts on [CLS], too.
    depth = model.backbone.depth
    return param_groups(model.named_parameters(), weight_decay, skip=(), layer_decay=layer_decay,
                        depth=depth, layer_id=lambda name: layer_of(name, depth))


def poly_schedule(step, base, total, warmup):
    """The rate of a step: a straight line from `base` to 0, times a linear warm-up from 0 to 1."""
    # Differs from the recipe, whose warm-up starts at a millionth of `base`. Ours starts at 0, as
    # in the other stages.
    rate = base * (1 - step / total)
    return rate * (step / warmup) if step < warmup else rate


# --- method: prediction and scores ----------------------------------------------------------------
def window_starts(side, window, stride):
    """Where windows begin on a side: every `stride` pixels, but the last one ends with the side."""
    count = math.ceil(max(side - window, 0) / stride) + 1
    return [max(0, min(i * stride, side - window)) for i in range(count)]


def slide(logits_of, images, window, stride):
    """Logits (B, C, H, W): at every pixel, the mean of the logits of all windows that show it.

    images (B, 3, H, W), no smaller than the window. window, stride: (height, width).
    logits_of: (B, 3, *window) -> (B, C, h, w), of any size.
    """
    height, width = images.shape[-2:]
    total = None
    times = torch.zeros(height, width, device=images.device)             # windows per pixel
    for top in window_starts(height, window[0], stride[0]):
        for left in window_starts(width, window[1], stride[1]):
            place = ..., slice(top, top + window[0]), slice(left, left + window[1])
            logits = resize(logits_of(images[place]).float(), window)
            if total is None:                                # C is known from here on
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[place] += logits
            times[place] += 1
    return total.div_(times)


def view_logits(model, images, scale, mirrored):
    """Logits (B, C, h, w) of one view of images (B, 3, H, W) in [0, 1]: resized, maybe mirrored.

    Images are resized to fit (4 S, S) x scale, S the side of the crop (base: 2048, 512), and read
    through windows. Logits of a mirror image are mirrored back.
    """
    window = model.backbone.image_size
    stride = [round(side * 2 / 3) for side in window]        # 341 of 512
    size = tuple(images.shape[-2:])
    height, width = fit_size(*size, 4 * min(window) * scale, min(window) * scale)
    view = images if (height, width) == size else resize(images, (height, width))
    # Differs from the recipe, which rounds the view to bytes and fails if a side is shorter
    # than the window (aspect above 4, scales below 1): we pad with 0, the mean colour.
    missing_height = max(window[0] - height, 0)
    missing_width = max(window[1] - width, 0)
    view = F.pad(imagenet_normalize(view), (0, missing_width, 0, missing_height))
    if mirrored:
        logits = slide(model, view.flip(-1), window, stride).flip(-1)
    else:
        logits = slide(model, view, window, stride)
    return logits[..., :height, :width]


def predict(model, images, scales=(1.0,), flip=False):
    """Class probabilities of images (B, 3, H, W) in [0, 1], of any size.

    Yields them in bands from top to bottom, (B, C, rows, W) each: all at once would take 0.6 GB
    per megapixel with 150 classes. They are means over `scales` and, with `flip`, mirror images.
    """
    size = tuple(images.shape[-2:])
    views = [(scale, mirrored) for scale in scales for mirrored in (False, True)[:1 + flip]]
    total = None                             # of the views so far, if there are several
    for view in views:
        logits = view_logits(model, images, *view)           # (B, C, h, w)
        if total is None and len(views) > 1:
            total = logits.new_zeros(*logits.shape[:2], *size)
        for top, bottom in bands(size, len(images) * logits.shape[1]):
            p = resize_rows(logits, size, top, bottom).softmax(dim=1)
            if total is not None:
                p = total[:, :, top:bottom].add_(p)
            if view == views[-1]:
                yield p / len(views)


def confusion(predicted, labels, classes):
    """How many pixels of class i (row) are predicted as j (column).  2 x (B, H, W) -> (C, C)"""
    known = labels != IGNORE
    pairs = labels[known].long() * classes + predicted[known]        # i C + j
    return pairs.bincount(minlength=classes ** 2).view(classes, classes)


def scores(matrix, background=False):
    """Figures of a confusion matrix (C, C) in percent; IoU (C,) and accuracy (C,) of each class.

    miou: mean IoU, miou_objects: without class 0, where that is the `background`. m_acc: mean
    accuracy. a_acc: share of right pixels. A class that neither labels nor predictions hold has
    no IoU (NaN) and stays out of the mean.
    """
    matrix = matrix.cpu().double()           # mps has no float64
    hit = matrix.diagonal()                                  # (C,) intersection
    labelled = matrix.sum(dim=1)                             # (C,)
    predicted = matrix.sum(dim=0)                            # (C,)
    iou = 100 * hit / (labelled + predicted - hit)           # intersection / union
    acc = 100 * hit / labelled
    a_acc = 100 * hit.sum() / matrix.sum()
    figures = dict(miou=iou.nanmean().item(), m_acc=acc.nanmean().item(), a_acc=a_acc.item())
    if background:
        figures["miou_objects"] = iou[1:].nanmean().item()
    return figures, iou, acc


@torch.no_grad()
def name_pixels(model, images, run, multi_scale=False):
    """Images (B, 3, H, W) uint8 -> the class of every pixel (B, H, W) uint8."""
    images = data.to_float(images, run.device)
    scales = SCALES if multi_scale else [1.0]
    with run.autocast():
        probabilities = predict(model, images, scales, flip=multi_scale)
        return torch.cat([p.argmax(dim=1).to(torch.uint8) for p in probabilities], dim=1)


def evaluate(model, dataset, run, multi_scale=False):
    """The scores of held-out images, each at its own size, over all processes."""
    model.eval()
    classes = len(dataset.classes)
    matrix = torch.zeros(classes, classes, dtype=torch.long, device=run.device)
    for images, labels in run.eval_batches(dataset, dataset.at_once):
        labels = labels.to(run.device)                       # (B, H, W) uint8
        matrix += confusion(name_pixels(model, images, run, multi_scale), labels, classes)
    model.train()
    return scores(run.sum(matrix), dataset.background)


# --- training -------------------------------------------------------------------------------------
def train(args):
    """The run that the arguments describe.  -> figures of the last evaluation"""
    run = Run("segment", args)
    crops = SegmentTransform(args.image_size, args.jitter, args.distortion)
    train_set = open_split(args, "train", args.classes, crops)
    val_set = open_split(args, "val", args.classes)
    data.leave_out_bad(args, run, train_set, val_set)
    names = train_set.classes
    run.plan(train_set)
    batchnorm.check_batch(args, run)
    seed_all(args.seed)
    model, report = build(args, read_start(args), len(names))
    model = batchnorm.synchronise(model, run).to(run.device).train()
    run.print(describe_start(args, report))
    groups = rate_groups(model, args.weight_decay, args.layer_decay)
    optimizer = adamw(groups, (0.9, 0.999), run.device)
    network = run.start(train_set, model=model, optimizer=optimizer,
                        facts={"chance": math.log(len(names))}, about={"classes": names})
    run.eval_every = math.ceil(run.total_steps / args.evaluations)

    for step in run.steps():
        set_lr(optimizer, poly_schedule(step, args.lr, run.total_steps, run.warmup_steps))
        for images, labels in run.micro_batches():
            images = data.to_float(images, run.device)                   # (B, 3, H, W)
            labels = labels.to(run.device, non_blocking=True).long()     # (B, H, W)
            # Classify the pixels: from all four maps, and from one with the auxiliary head.
            with run.autocast():
                logits, logits_aux = network(imagenet_normalize(images))         # (B, C, h, w)
            loss_main = pixel_cross_entropy(logits, labels)
            loss_aux = pixel_cross_entropy(logits_aux, labels)
            loss = loss_main + AUX_WEIGHT * loss_aux
            run.backward(loss)

        optimizer.step()                     # Recipe, not in the paper: gradients are not clipped
        optimizer.zero_grad(set_to_none=True)
        batchnorm.average_statistics(model, run)             # the same network in all processes

        if run.log_due:
            run.log(loss=loss, loss_main=loss_main, loss_aux=loss_aux)
        if run.evaluation_due:
            result, iou, acc = evaluate(model, val_set, run)
            run.log_evaluation(result)

    run.print(class_table(names, iou, acc))
    run.finish(result, init=args.init, iou=by_name(names, iou))
    if run.is_main:
        model.eval()
        draw_scenes(val_set, lambda x: name_pixels(model, x, run), args.out / "segment.png")
    return result


def build(args, checkpoint, classes):
    """-> UPerNet, Report of the names loaded.  checkpoint: from read_start; None: random weights"""
    if checkpoint is not None and checkpoint.kind == "segment":
        raise UserError(f"{args.checkpoint} is a segmenter already: measure it with --eval, or "
                        f"start from a backbone")
    vit, report = start_backbone(args, checkpoint, pool=None, drop_path=args.drop_path)
    return UPerNet(vit, classes, args.channels), report


# --- a segmenter from a file ----------------------------------------------------------------------
def upernet(classes, channels, aux_channels, **sizes):
    """UPerNet from the facts of a file."""
    return UPerNet(ViT(**sizes), classes, channels, aux_channels)


def load_segmenter(path):
    """-> UPerNet with the weights of a segment.pt, ours or released; the contents of the file."""
    checkpoint = weights.read(path, "make it with python segment.py, or give --checkpoint FILE")
    if checkpoint.kind != "segment":
        raise UserError(f"{path} is no segmenter: train one with python segment.py")
    return weights.build(upernet, checkpoint), checkpoint.file


def evaluate_file(args):
    """--eval: measure the segmenter in a file on the held-out images of --data."""
    run = Run("segment_eval", args)
    model, file = load_segmenter(args.checkpoint)
    args.zero = args.zero or file.get("args", {}).get("zero")
    val_set = open_for_segmenter(args, model.arch()["num_classes"], file.get("classes"))
    data.leave_out_bad(args, run, val_set)
    result, iou, acc = evaluate(model.to(run.device), val_set, run, args.multi_scale)
    run.print(class_table(val_set.classes, iou, acc))
    run.log_measurement(result | dict(images=len(val_set)), iou=by_name(val_set.classes, iou))
    return result


# --- arguments ------------------------------------------------------------------------------------
def parse_args(argv=None):
    p = run_parser(__doc__, without=("data", "data_dir", "download", "image_size"))
    add = p.add_argument_group("segmentation").add_argument
    add("--data", help="shapes, or a folder in ADE20K's layout; base: datasets/ade20k")
    add("--classes", type=whole(2, 254), help="how many classes a folder has; default 150")
    add("--zero", choices=["unlabelled", "class"], help="what number 0 of a folder's label maps "
        "is; default unlabelled, as in ADE20K")
    add("--train-images", type=whole(1), help="use so many labelled images; base: all, tiny: 200")
    add("--image-size", type=whole(1), nargs="+", action=Size, metavar="PIXELS",
        help="side of the crop, or its height and width; base: 512")
    add("--jitter", type=number(1, 10), help="resize by 1/JITTER to JITTER, then crop; base: 2")
    add("--init", default="pretrain", choices=["pretrain", "21k", "scratch"],
        help="start from OUT/pretrain.pt, OUT/finetune_21k.pt, or random weights")
    add("--checkpoint", type=Path, help="start from this file; with --eval: measure this file")
    add("--eval", action="store_true", help="only measure OUT/segment.pt, or --checkpoint")
    add("--multi-scale", action="store_true", help="with --eval: average six scales and "
        "mirror images; for models trained with --jitter (not tiny)")
    add("--evaluations", type=whole(1, 10**6), help="how often a run evaluates; base: 10")
    add("--lr", type=number(0, 10), help="peak rate of the heads, for any batch size; base: 5e-5")
    add("--layer-decay", type=number(1e-3, 1), help="rate of a block by the next one's; base: 0.75")
    add("--weight-decay", type=number(0, 10), help="base: 0.05")
    add("--drop-path", type=number(0, 0.99), help="stochastic depth, last block; base: 0.15")
    add("--warmup-steps", type=whole(0), help="updates of linear warm-up; base: 1500 of 160,000")
    args = p.parse_args(argv)

    if args.multi_scale and not args.eval:
        raise UserError("--multi-scale belongs to --eval: training measures at one scale")
    if args.eval and (args.image_size or args.patch_size):
        raise UserError("--eval reads --image-size and --patch-size in the file: leave them out")
    args.checkpoint = start_file(args, "segment")
    patch_size = args.patch_size
    fill_in(args, MODELS, RECIPE | OTHER_STARTS.get(args.init, {}))
    if args.epochs:                          # instead of the steps of the recipe
        args.steps = None
    # The coarsest map has half the resolution, so it needs two patches a side.
    check_sides(args, 2)
    if args.checkpoint:
        args.patch_size = patch_size         # None: that of the file
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.dry_run:
        classes = args.classes or (11 if args.data == "shapes" else 150)
        with torch.device("meta"):           # shapes without numbers
            model, _ = build(args, None, classes)
        return dry_run(args, model, f"{classes} classes", f"blocks {model.taps} are read")
    return evaluate_file(args) if args.eval else train(args)


if __name__ == "__main__":
    launch(main)
