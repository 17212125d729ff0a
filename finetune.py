"""Stage 3a, fine-tuning: the pre-trained backbone becomes a classifier (BEiT v2, Section 3.2).

    image --augment, mix pairs--> ViT --mean over patches--> LayerNorm --> linear head --> class

All of the network is trained. Early blocks already compute features that serve any task, and late
blocks have to change more. So each block learns at a rate of its own, which is smaller for earlier
blocks (layer decay). RandAugment, erasing, MixUp and CutMix change the images so much that the
network cannot memorise them.

Read in this order: layer_of, layer_decay_groups, smooth_targets, mix, soft_cross_entropy,
shrink_head, build, class_logits, evaluate, train.

    python finetune.py --labels-per-class 100                  # tiny on built-in shapes, CPU
    torchrun --nproc_per_node=8 finetune.py --model base --data /imagenet    # the paper's run

The paper's best figures come by way of ImageNet-21k: first a classifier of its 21,841 classes
(--intermediate, which writes finetune_21k.pt), then one of the 1,000 classes (--init 21k).
"""
# Shapes:  B images, T = 1 + N tokens, D width, C classes
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from model import imagenet_normalize, initialise
from support import data, weights
from support.args import check_preset, fill_in, number, run_parser, whole
from support.files import UserError
from support.labels import open_for_classifier, open_sets
from support.optim import adamw, cosine_schedule, param_groups, set_lr
from support.process import launch, seed_all
from support.run import Run, dry_run
from support.start import describe_start, read_start, start_backbone, start_file
from support.transforms import RANDAUGMENT, EvalTransform, FinetuneTransform

MODELS = "tiny", "small", "base", "large"
RECIPE = {  # base and large: the paper's after 300 epochs of pre-training; tiny and small: ours
    #                 tiny    small        base         large
    "lr":            (1e-3,   5e-4,        5e-4,        5e-4),       # not scaled by the batch size
    "min_lr":        (1e-6,   1e-6,        1e-6,        1e-6),
    "layer_decay":   (0.75,   0.65,        0.65,        0.8),
    "weight_decay":  (0.05,   0.05,        0.05,        0.05),
    "drop_path":     (0.1,    0.1,         0.1,         0.2),
    "batch_size":    (128,    1024,        1024,        1024),
    "micro_batch":   (None,   256,         128,         64),         # None: the whole batch at once
    "steps":         (200,    None,        None,        None),       # unless --epochs is given
    "epochs":        (50,     100,         100,         50),
    "warmup_epochs": (5,      20,          20,          5),
    "evaluations":   (4,      100,         100,         100),
    "crop_scale":    (0.5,    0.08,        0.08,        0.08),
    "randaugment":   ("none", RANDAUGMENT, RANDAUGMENT, RANDAUGMENT),
    "erasing":       (0.0,    0.25,        0.25,        0.25),
    "mixup":         (0.0,    0.8,         0.8,         0.8),
    "cutmix":        (0.0,    1.0,         1.0,         1.0),
    "smoothing":     (0.1,    0.1,         0.1,         0.1),
}
# What another start changes in the columns above.
LONG_RUN = {             # after 1600 epochs of pre-training
    "base": {"layer_decay": 0.60, "drop_path": 0.2},
    "large": {"lr": 2e-4}}
FROM_21K = {             # from a classifier of ImageNet-21k, with --init 21k
    "base": {"lr": 5e-5, "epochs": 30, "layer_decay": 0.75, "mixup": 0.0, "cutmix": 0.0},
    "large": {"lr": 7e-5, "epochs": 20, "drop_path": 0.25, "mixup": 0.0, "cutmix": 0.0}}
TO_21K = {               # to such a classifier, with --intermediate. It has no validation images.
    "data": "datasets/imagenet21k", "lr": 6e-4, "batch_size": 4096, "epochs": 90,
    "warmup_epochs": 20, "layer_decay": 0.75, "evaluations": 0}


# --- method: rates, targets, head -----------------------------------------------------------------
def layer_of(name, depth):
    """The layer of a parameter: 0 for the embeddings, b + 1 for block b, depth + 1 for the rest.

    Layer i learns at  lr * layer_decay^(depth + 1 - i):  the head at the full rate, the embeddings
    at the smallest.
    """
    part = name.split(".")
    if part[0] in ("cls_token", "mask_token", "pos_embed", "patch_embed"):
        return 0
    if part[0] == "blocks":              # also the block's own table of relative positions
        return int(part[1]) + 1
    return depth + 1                     # norm and head


def layer_decay_groups(model, weight_decay, layer_decay):
    """Groups of parameters for AdamW. lr_scale of each: its layer's factor on the rate."""
    return param_groups(model.named_parameters(), weight_decay, depth=model.depth,
                        layer_id=lambda name: layer_of(name, model.depth), layer_decay=layer_decay)


def smooth_targets(labels, classes, smoothing):
    """Labels (B,) -> distributions (B, C): 1 - s + s/C on the class, s/C on every other class."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix(images, labels, classes, mixup, cutmix, smoothing):
    """MixUp or CutMix of each image a with b, the image at its place in the reversed batch.

    images (B, 3, H, W), labels (B,) -> images (B, 3, H, W), targets (B, C)

    MixUp:   x = lam x_a + (1 - lam) x_b         lam ~ Beta(mixup, mixup)
    CutMix:  a box of x_b is pasted into x_a     lam ~ Beta(cutmix, cutmix), then corrected to the
                                                 share of pixels that remains of x_a
    Both:    t = lam t_a + (1 - lam) t_b         of the smoothed targets
    Each micro-batch has one coin (MixUp or CutMix) and one lam, of numpy's generator, which
    run.micro_batches seeds. Differs from the recipe, which mixes after imagenet_normalize: it is
    linear, so the pixels are the same.
    """
    if mixup == 0 and cutmix == 0:
        return images, smooth_targets(labels, classes, smoothing)
    from timm.data import Mixup          # the authors use it, too; imported here because it is slow
    mixer = Mixup(mixup, cutmix, switch_prob=0.5, mode="batch",
                  label_smoothing=smoothing, num_classes=classes)
    return mixer(images, labels)


def soft_cross_entropy(logits, targets):
    """Cross-entropy with distributions:  - mean_B sum_c t_c log p_c.  logits, targets t (B, C)

    Without mixing this is F.cross_entropy(logits, labels, label_smoothing=s).
    """
    log_p = logits.float().log_softmax(dim=-1)               # (B, C), in float32
    return -(targets * log_p).sum(dim=-1).mean()


@torch.no_grad()
def shrink_head(model):
    """Shrink a head with random weights to a thousandth. Recipe, not in the paper: all classes then
    start nearly alike, and the first gradients that reach the backbone are small."""
    model.head.weight.mul_(0.001)
    model.head.bias.mul_(0.001)


def build(args, checkpoint, classes):
    """The backbone with a head for `classes`, a list of names.  -> ViT, Report of the names loaded

    checkpoint: from read_start. None means random weights, and then the report is None, too.
    Differs from the released code, which keeps a head of as many classes: ours must have the same.
    """
    model, report = start_backbone(args, checkpoint, pool=args.pool, num_classes=len(classes),
                                   drop_path=args.drop_path)
    if checkpoint is None:
        shrink_head(model)
        return model, None
    names = checkpoint.file.get("classes") or classes        # released files name no classes
    if names != classes and "head.weight" in report.loaded:
        initialise(model.head)           # as many classes, but of other names
        report = report._replace(
            loaded=[name for name in report.loaded if not name.startswith("head.")],
            missing=[*report.missing, "head.weight", "head.bias"])
    if "head.weight" in report.missing:
        shrink_head(model)
    return model, report


# --- method: accuracy -----------------------------------------------------------------------------
def class_logits(model, images, run):
    """Logits (B, C) of uint8 images (B, 3, H, W), to be compared.

    Differs from the recipe: the head is in float32. In 16 bits, logits of several classes tie.
    """
    images = data.to_float(images, run.device)
    with run.autocast():
        vectors = model.pooled(imagenet_normalize(images))                       # (B, D)
    return model.head(vectors.float())


def hits(logits, labels):
    """How many labels (B,) are the first, and how many among the first five, of logits (B, C)."""
    best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices                 # (B, 5)
    right = best == labels[:, None]                                              # (B, 5)
    return right[:, 0].sum(), right.any(dim=-1).sum()


@torch.no_grad()
def evaluate(model, dataset, run):
    """Cross-entropy without smoothing; top-1 and top-5 in percent.  -> dict

    Over the images of all processes, each counted once.
    """
    model.eval()
    totals = data.zeros_to_sum(4, run.device)                # loss, first, first five, images
    for images, labels in run.eval_batches(dataset):
        labels = labels.to(run.device)
        logits = class_logits(model, images, run)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        count = labels.new_tensor(len(labels))
        totals += torch.stack([loss, *hits(logits, labels), count]).to(totals.dtype)
    model.train()
    loss, top1, top5, count = run.sum(totals).tolist()
    return dict(loss=loss / count, top1=100 * top1 / count, top5=100 * top5 / count,
                images=round(count))


# --- training -------------------------------------------------------------------------------------
def train(args, checkpoint):
    """The run that the arguments describe, from `checkpoint` (see build).  -> last evaluation"""
    run = Run(stage_of(args), args)
    train_set, val_set = open_images(args, run)
    classes = list(train_set.classes)
    run.plan(train_set)
    refuse_odd_batches(args, run.world_size)

    seed_all(args.seed)
    model, report = build(args, checkpoint, classes)
    model = model.to(run.device)
    groups = layer_decay_groups(model, args.weight_decay, args.layer_decay)
    optimizer = adamw(groups, (0.9, 0.999), run.device)
    best = Best()
    run.print(describe_start(args, report))
    network = run.start(train_set, model=model, optimizer=optimizer, best=best,
                        facts={"chance": math.log(len(classes))},
                        about={"classes": classes, "epochs": args.epochs})
    # Evaluate at the end of an epoch, at most --evaluations times.
    epochs = run.total_steps / run.steps_per_epoch
    epochs_between = math.ceil(epochs / max(1, args.evaluations))
    run.eval_every = epochs_between * run.steps_per_epoch
    result = {}

    for step in run.steps():
        lr = cosine_schedule(step, args.lr, args.min_lr, run.total_steps, run.warmup_steps)
        set_lr(optimizer, lr)            # times layer_decay^(depth + 1 - i) for layer i
        for images, labels in run.micro_batches():
            images = data.to_float(images, run.device)                           # (B, 3, H, W)
            labels = labels.to(run.device, non_blocking=True)                    # (B,)
            # Mix pairs of images, and their targets with them.
            images, targets = mix(images, labels, len(classes),
                                  args.mixup, args.cutmix, args.smoothing)       # targets (B, C)
            # Classify. Recipe, not in the paper: no dropout, and gradients are not clipped.
            with run.autocast():
                logits = network(imagenet_normalize(images))                     # (B, C)
            loss = soft_cross_entropy(logits, targets)
            run.backward(loss)

        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if run.log_due:
            run.log(loss=loss)
        if val_set is not None and run.evaluation_due:
            result = evaluate(model, val_set, run)
            best.update(result, epoch=(step + 1) / run.steps_per_epoch)
            run.log_evaluation(result)
    return run.finish(result | best.facts, init=args.init)


class Best:
    """The best top-1 so far. Differs from the recipe, which reports and saves the best epoch: that
    is chosen on the images it is measured on. So our result and our file are those of the last."""

    def __init__(self):
        self.facts = {}

    def update(self, result, epoch):
        if result["top1"] > self.facts.get("best_top1", -1):
            self.facts = dict(best_top1=result["top1"], best_epoch=epoch)

    def state_dict(self):
        return self.facts

    def load_state_dict(self, facts):
        self.facts = dict(facts)


# --- data -----------------------------------------------------------------------------------------
def open_images(args, process):
    """-> augmented training images, held-out images (None if nothing is evaluated)"""
    randaugment = None if args.randaugment in ("none", "") else args.randaugment
    augment = FinetuneTransform(args.image_size, (args.crop_scale, 1.0), randaugment, args.erasing)
    return open_sets(args, process, augment, EvalTransform(args.image_size))


def refuse_odd_batches(args, processes):
    """UserError if MixUp would leave one image of a micro-batch without a partner."""
    micro_batch, _ = data.split_batch(args.batch_size, args.micro_batch, processes)
    if micro_batch % 2 and (args.mixup or args.cutmix):
        raise UserError(f"MixUp pairs images, and --batch-size {args.batch_size} in parts of "
                        f"{micro_batch} (--micro-batch) leaves one over: choose even numbers, or "
                        f"--mixup 0 --cutmix 0")


def evaluate_file(args, checkpoint):
    """--eval: measure a classifier in a file on held-out images.  -> the result of evaluate"""
    run = Run("finetune_eval", args)
    model, file, _ = weights.load_backbone(checkpoint, pool=None, num_classes=None,
                                           image_size=args.image_size)
    still = EvalTransform(args.image_size)
    dataset, _ = open_for_classifier(args.data, still, args, file, model.num_classes)
    data.leave_out_bad(args, run, dataset)
    result = evaluate(model.to(run.device), dataset, run)
    run.log_measurement(result)
    return result


# --- arguments ------------------------------------------------------------------------------------
def parse_args(argv=None):
    """The flags. Those left out stay None until `complete`, because no file is opened here."""
    p = run_parser(__doc__, without=("data",))
    add = p.add_argument_group("fine-tuning").add_argument
    add("--data", nargs="+", help="shapes, cifar10, cifar100 or a folder; base: datasets/imagenet")
    add("--init", default="pretrain", choices=["pretrain", "21k", "scratch"],
        help="start from OUT/pretrain.pt, a classifier (OUT/finetune_21k.pt), or random weights")
    add("--intermediate", action="store_true", help="train the classifier for --init 21k")
    add("--checkpoint", type=Path, help="start from this file (--eval: measure it)")
    add("--eval", action="store_true", help="only measure OUT/finetune.pt on held-out images")
    add("--evaluations", type=whole(0, 10**6), help="evaluate so often at most; base: 100")
    add("--classes", type=Path, help="file of class names, which orders the logits")
    add("--labels-per-class", type=whole(1), help="use only so many labels of each class")
    add("--pool", default="mean", choices=["mean", "cls"],
        help="what the head reads: mean over patches, fresh norm; [CLS], pre-trained norm")
    add("--crop-scale", type=number(1e-3, 1), help="smallest share that a crop keeps; base: 0.08")
    add("--randaugment", help=f"timm's description of RandAugment, or none; base: {RANDAUGMENT}")
    add("--erasing", type=number(0, 1), help="probability of a box of noise; base: 0.25")
    add("--mixup", type=number(0, 100), help="alpha of MixUp, 0 for none; base: 0.8")
    add("--cutmix", type=number(0, 100), help="alpha of CutMix, 0 for none; base: 1.0")
    add("--smoothing", type=number(0, 0.99), help="share that all classes get; base: 0.1")
    add("--lr", type=number(0, 10), help="peak rate of the head; base: 5e-4")
    add("--min-lr", type=number(0, 10), help="rate that the cosine approaches; base: 1e-6")
    add("--layer-decay", type=number(1e-3, 1), help="a block's rate by the next one's; base: 0.65")
    add("--weight-decay", type=number(0, 10), help="base: 0.05")
    add("--drop-path", type=number(0, 0.99), help="stochastic depth of the last block; base: 0.1")
    add("--warmup-epochs", type=number(0, 10**6), help="epochs of linear warm-up; base: 20")
    args = p.parse_args(argv)
    check_preset(args, MODELS)
    if args.intermediate and args.init != "pretrain":
        raise UserError(f"--intermediate starts from pre-training: leave out --init {args.init}")
    args.checkpoint = start_file(args, stage_of(args))
    if args.data and len(args.data) > 1:
        raise UserError(f"--data takes one data set; to measure a classifier on several: python -m "
                        f"extras.robustness CHECKPOINT --data {' '.join(args.data)}")
    args.data = args.data and args.data[0]
    return args


def stage_of(args):
    """The name of a run's files. The classifier of ImageNet-21k has a name of its own."""
    return "finetune_21k" if args.intermediate else "finetune"


def recipe_for(preset, pretrain_epochs=None, init="pretrain", intermediate=False):
    """RECIPE with what another start changes. An unknown length of pre-training counts as 300."""
    changes = {}
    if intermediate:
        changes = {"evaluations": 0} if preset == "tiny" else TO_21K
    elif init == "scratch":              # ours: the early blocks hold nothing that has to be kept
        changes = {"layer_decay": 1.0}
    elif init == "21k":
        changes = FROM_21K.get(preset, {})
    elif (pretrain_epochs or 300) >= 1600:
        changes = LONG_RUN.get(preset, {})
    return RECIPE | {name: [value] * len(MODELS) for name, value in changes.items()}


def complete(args, checkpoint=None):
    """Fill in the flags left out: sizes from the checkpoint, the rest from the recipe for it."""
    pretrain_epochs = None
    if checkpoint is not None:
        args.image_size = args.image_size or checkpoint.backbone["image_size"]
        args.patch_size = checkpoint.backbone["patch_size"]
        said = weights.arguments(checkpoint.file) | checkpoint.file
        pretrain_epochs = said.get("epochs")
    recipe = recipe_for(args.model, pretrain_epochs, args.init, args.intermediate)
    if args.epochs is not None:
        recipe["steps"] = [None] * len(MODELS)
    fill_in(args, MODELS, recipe)
    return args


# --- main -----------------------------------------------------------------------------------------
def main(argv=None):
    args = parse_args(argv)
    checkpoint = read_start(args)
    complete(args, checkpoint)
    if args.dry_run:
        classes = 21_841 if args.intermediate else 1000
        if args.model == "tiny":
            classes = 10
        with torch.device("meta"):           # shapes without numbers
            model, _ = build(args, None, range(classes))
        return dry_run(args, model, f"{classes} classes", f"{model.num_patches} patches")
    if args.eval:
        return evaluate_file(args, checkpoint)
    return train(args, checkpoint)


if __name__ == "__main__":
    launch(main)
