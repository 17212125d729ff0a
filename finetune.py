"""Stage 3a, fine-tuning: turn the pre-trained backbone into a classifier and train all of it (paper, Section 3.2).

    image --augment, mix pairs--> ViT --mean over patches--> LayerNorm --> linear head --> class

Pre-training left features of growing abstraction: early blocks are nearly right for any task, late ones must change.
So each block learns at its own rate, smaller the earlier it is (layer decay). The images are made hard enough
(RandAugment, erasing, MixUp, CutMix) that a network which could memorise them does not.

Read in this order: layer_of, mix, soft_cross_entropy, hits, restrict, new_head, build, recipe_for, train, robustness.

    python finetune.py --labels-per-class 100                               # tiny on shapes: from runs/tiny/pretrain.pt
    python finetune.py --labels-per-class 100 --init scratch --out runs/scratch      # the same without pre-training
    python finetune.py --eval --data shapes shapes:noise shapes:sketch       # runs/tiny/finetune.pt on unlike images
    torchrun --nproc_per_node=8 finetune.py --model base --data /imagenet    # the paper's run

The paper's best figures come by way of ImageNet-21k: a classifier of its 21,841 classes first, then of the 1,000.

    torchrun --nproc_per_node=8 finetune.py --model base --intermediate --data /imagenet21k      # -> finetune_21k.pt
    torchrun --nproc_per_node=8 finetune.py --model base --init 21k --data /imagenet             # -> finetune.pt
"""
# Shapes used in this file:  B images, T = 1 + N tokens, D width, C classes

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from support import data, engine, files, transforms, weights
from support.shapes import Shapes
from support.images import open_class_folders, shown
from support.engine import UserError
from model import PRESETS, ViT, count_parameters, imagenet_normalize, initialise

COMMON = dict(           # REFERENCE.md section 4; the rate is NOT scaled by the batch size
    lr=5e-4, min_lr=1e-6, batch_size=1024, weight_decay=0.05, smoothing=0.1, mixup=0.8, cutmix=1.0, crop_scale=0.08,
    randaugment="rand-m9-mstd0.5-inc1", erasing=0.25, evaluations=100)
RECIPES = {              # base, large: the paper's after 300 epochs of pre-training; tiny, small: ours
    # tiny runs for so many steps, with few labels or many, unless --epochs is given: a minute or two on 2 cores.
    "tiny": dict(COMMON, lr=1e-3, steps=200, epochs=50, warmup_epochs=5, layer_decay=0.75, drop_path=0.1,
                 evaluations=4, batch_size=128, crop_scale=0.5, randaugment="none", erasing=0, mixup=0, cutmix=0),
    "small": dict(COMMON, epochs=100, warmup_epochs=20, layer_decay=0.65, drop_path=0.1, micro_batch=256),
    "base": dict(COMMON, epochs=100, warmup_epochs=20, layer_decay=0.65, drop_path=0.1, micro_batch=128),
    "large": dict(COMMON, epochs=50, warmup_epochs=5, layer_decay=0.8, drop_path=0.2, micro_batch=64),
}
CHANGES = {              # what another start changes in the row above
    ("base", "1600 epochs"): dict(layer_decay=0.60, drop_path=0.2),
    ("base", "21k"): dict(lr=5e-5, epochs=30, layer_decay=0.75, mixup=0.0, cutmix=0.0),
    ("large", "1600 epochs"): dict(lr=2e-4),
    ("large", "21k"): dict(lr=7e-5, epochs=20, drop_path=0.25, mixup=0.0, cutmix=0.0),
}
TO_21K = dict(           # --intermediate, from pre-training to ImageNet-21k, which has no validation images
    lr=6e-4, batch_size=4096, epochs=90, warmup_epochs=20, layer_decay=0.75, evaluations=0, data="datasets/imagenet21k")
HEAD_SCALE = 0.001       # Recipe, not in the paper: a new head starts a thousandth as large, so all classes start alike


# --- method -----------------------------------------------------------------------------------------------------------
def layer_of(name, depth):
    """The layer number of a parameter for layer-wise rate decay: 0 embeddings, i + 1 block i, depth + 1 the rest.

    Layer i learns at  lr * layer_decay^(depth + 1 - i):  the head at the full rate, the embeddings slowest.
    """
    part = name.split(".")
    if part[0] in ("cls_token", "mask_token", "pos_embed", "patch_embed"):
        return 0
    if part[0] == "blocks":              # the block's own position table included
        return int(part[1]) + 1
    return depth + 1                     # norm and head; a table shared by all blocks would belong here, too


def smooth_targets(labels, classes, smoothing):
    """Labels (B,) to distributions (B, C): 1 - s + s/C on the class, s/C elsewhere."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix(images, labels, classes, mixup, cutmix, smoothing):
    """MixUp or CutMix of each image with its partner in the reversed batch. -> images (B, 3, H, W), targets (B, C)

    MixUp:   x = lam x_a + (1 - lam) x_b            lam ~ Beta(mixup, mixup)
    CutMix:  a box of x_b pasted into x_a           lam ~ Beta(cutmix, cutmix), then the share of pixels left of x_a
    and in both  t = lam t_a + (1 - lam) t_b  of the smoothed targets. One coin and one lam for the whole batch, drawn
    from numpy's generator, which the caller has seeded. Linear in the pixels, so mixing before normalising is the same.
    """
    if mixup == 0 and cutmix == 0:
        return images, smooth_targets(labels, classes, smoothing)
    from timm.data import Mixup          # what the authors call; here, because timm is slow to import
    mixer = Mixup(mixup, cutmix, switch_prob=0.5, mode="batch", label_smoothing=smoothing, num_classes=classes)
    return mixer(images, labels)


def soft_cross_entropy(logits, targets):
    """Cross-entropy against distributions, in float32:  - mean_B sum_c t_c log p_c.  logits, targets (B, C)"""
    return -(targets * logits.float().log_softmax(dim=-1)).sum(dim=-1).mean()


def hits(logits, labels):
    """How many of the labels (B,) are the first, and among the first five, of the logits (B, C)."""
    best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[:, None]          # (B, 5)
    return best[:, 0].sum(), best.any(dim=-1).sum()


def restrict(logits, columns):
    """Logits (B, C) of which only some columns can win: ImageNet-A and -R have 200 of the 1,000 classes, and papers
    report the accuracy among those. -> (B, C), all other columns -inf"""
    kept = torch.full_like(logits, -math.inf)
    kept[:, columns] = logits[:, columns]
    return kept


def choose_labels(labels, per_class, seed=0):
    """Which images may show their labels: `per_class` of every class, by (labels, seed) alone. -> sorted indices"""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for c in labels.unique().tolist():
        of_class = order[labels[order] == c]
        if len(of_class) < per_class:
            raise UserError(f"--labels-per-class {per_class}: class number {c} has only {len(of_class)} images; "
                            f"ask for fewer")
        chosen.append(of_class[:per_class])
    return torch.cat(chosen).sort().values


@torch.no_grad()
def new_head(model):
    """Shrink a head that no checkpoint has filled: its first gradients then reach the backbone softly."""
    model.head.weight.mul_(HEAD_SCALE)
    model.head.bias.mul_(HEAD_SCALE)


def build(args, classes, names=None):
    """-> (ViT with a head for `classes`, report of what was loaded or None). The report is printed by train."""
    if args.init == "scratch":
        preset = PRESETS[args.model] | dict(image_size=args.image_size, patch_size=args.patch_size)
        model, report = ViT(**preset, pool=args.pool, num_classes=classes, drop_path=args.drop_path), None
    else:
        model, checkpoint, report = weights.load_backbone(
            args.checkpoint, pool=args.pool, num_classes=classes, image_size=args.image_size, drop_path=args.drop_path)
        if names and checkpoint.get("classes") and checkpoint["classes"] != names and "head.weight" in report.loaded:
            # A head for other classes is of no use, even where their number happens to be the same.
            initialise(model.head)
            report = report._replace(loaded=[k for k in report.loaded if not k.startswith("head.")],
                                     missing=report.missing + ["head.weight", "head.bias"])
    if report is None or "head.weight" in report.missing:
        new_head(model)
    return model, report


# --- arguments --------------------------------------------------------------------------------------------------------
def recipe_for(preset, pretrain_epochs=300, init="pretrain", intermediate=False):
    """One row of the recipe: by architecture, length of pre-training, and whether it goes to or comes from 21k."""
    row = "21k" if init == "21k" else "1600 epochs" if (pretrain_epochs or 300) >= 1600 else None
    if intermediate:                     # drop path stays as above: 0.1 for base, 0.2 for large
        return RECIPES[preset] | (dict(evaluations=0) if preset == "tiny" else TO_21K)
    # From scratch there is nothing in the early blocks to keep, so all layers learn at one rate. Ours.
    return RECIPES[preset] | (dict(layer_decay=1.0) if init == "scratch" else CHANGES.get((preset, row), {}))


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                conflict_handler="resolve")  # for --data, which here may take several
    engine.add_run_args(p)
    p.add_argument("--data", nargs="+", help="shapes, cifar10, cifar100 or a folder; base: datasets/imagenet. With "
                   "--eval one or more, also shapes:noise (blur, textures, grey, contrast, sketch) and DIR/CLASS/*")
    p.add_argument("--init", default="pretrain", choices=["pretrain", "21k", "scratch"],
                   help="start from OUT/pretrain.pt, a classifier (OUT/finetune_21k.pt), or random weights")
    p.add_argument("--intermediate", action="store_true", help="train the classifier that --init 21k starts from")
    p.add_argument("--checkpoint", type=Path, help="start from this file, ours or released; --eval: the classifier")
    p.add_argument("--classes", type=Path, help="file of class names in the order of the logits, one a line or a JSON "
                   "list; default: those in the checkpoint (--eval; released ones have none) or the data's")
    p.add_argument("--eval", action="store_true", help="only measure OUT/finetune.pt, or --checkpoint, on val images")
    p.add_argument("--evaluations", type=int, help="evaluate after an epoch, at most so often; 0: never; base: 100")
    p.add_argument("--labels-per-class", type=int, help="use only so many labelled training images of each class")
    p.add_argument("--pool", default="mean", choices=["mean", "cls"],
                   help="the head reads the patches' mean through a fresh norm, or [CLS] through the pre-trained one")
    g = p.add_argument_group("augmentation")
    g.add_argument("--crop-scale", type=float, help="smallest share of the image that a random crop keeps; base: 0.08")
    g.add_argument("--randaugment", help="timm's description of RandAugment, or none; base: rand-m9-mstd0.5-inc1")
    g.add_argument("--erasing", type=float, help="probability of filling a random box with noise; base: 0.25")
    g.add_argument("--mixup", type=float, help="alpha of MixUp, 0 for none; base: 0.8")
    g.add_argument("--cutmix", type=float, help="alpha of CutMix, 0 for none; base: 1.0")
    g.add_argument("--smoothing", type=float, help="share of the target spread over all classes; base: 0.1")
    g = p.add_argument_group("optimiser")
    g.add_argument("--lr", type=float, help="peak rate of the head, not scaled by batch size; base: 5e-4")
    g.add_argument("--min-lr", type=float, help="rate that the cosine approaches; base: 1e-6")
    g.add_argument("--layer-decay", type=float, help="rate of a block by the next one's; base: 0.65 (1600 epochs: 0.6)")
    g.add_argument("--weight-decay", type=float, help="base: 0.05")
    g.add_argument("--drop-path", type=float, help="stochastic depth, last block; base: 0.1 (0.2 from 1600 epochs)")
    g.add_argument("--warmup-epochs", type=float, help="epochs of linear warm-up; base: 20")
    args = p.parse_args(argv)
    if args.model not in RECIPES:
        engine.with_recipe(args, RECIPES)                    # says which there are
    if args.data and not args.eval:
        if len(args.data) > 1:
            raise UserError(f"--data {' '.join(args.data)}: training reads one data set; several are for --eval")
        args.data, = args.data
    if args.intermediate and args.init != "pretrain":
        raise UserError(f"--intermediate starts from pre-training: leave out --init {args.init}")
    facts = look_at_checkpoint(args)
    row = recipe_for(args.model, facts["epochs"], args.init, args.intermediate)
    if args.epochs is not None:
        row.pop("steps", None)
    args = engine.with_recipe(args, {args.model: row})
    args.image_size, args.patch_size = args.image_size or facts["image_size"], args.patch_size or facts["patch_size"]
    if args.init != "scratch" and args.patch_size != facts["patch_size"]:
        raise UserError(f"--patch-size {args.patch_size}: the weights have {facts['patch_size']}; leave the flag out")
    engine.check_sizes(args.image_size, args.patch_size)
    weights.grid_of(args.image_size, args.patch_size)
    engine.check_ranges(args, [
        ("lr", 0, 10), ("min_lr", 0, 10), ("layer_decay", 1e-3, 1), ("weight_decay", 0, 10), ("drop_path", 0, 0.99),
        ("warmup_epochs", 0, 10**6), ("crop_scale", 1e-3, 1), ("erasing", 0, 1), ("mixup", 0, 100), ("cutmix", 0, 100),
        ("smoothing", 0, 0.99), ("evaluations", 0, 10**6), ("labels_per_class", 1, 10**9)])
    return args


def look_at_checkpoint(args):
    """Finds the file to start from, sets args.checkpoint, and reads from it what the recipe hangs on. -> dict"""
    preset, out = PRESETS[args.model], args.out or Path("runs") / args.model
    facts = dict(epochs=None, image_size=preset["image_size"], patch_size=preset["patch_size"])
    if args.init == "scratch" and not args.eval:
        if args.checkpoint:
            raise UserError(f"--init scratch starts from random weights: leave out --checkpoint {args.checkpoint}")
        return facts
    remedy = f"make it with python pretrain.py --model {args.model} --out {out}, or give --checkpoint FILE"
    if args.eval or args.init == "21k":
        to_21k = args.intermediate or not args.eval
        args.checkpoint = args.checkpoint or out / f"finetune{'_21k' if to_21k else ''}.pt"
        remedy = (f"make it with python finetune.py --model {args.model}{' --intermediate' if to_21k else ''} "
                  f"--out {out}, or give --checkpoint FILE, ours or released")
    args.checkpoint = args.checkpoint or out / "pretrain.pt"
    if args.dry_run and not args.checkpoint.is_file():
        return facts
    checkpoint, kind, arch = weights.look_at(args.checkpoint, args.model, remedy)
    if not args.eval and (kind == "finetune") != (args.init == "21k"):
        remedy = ("is a classifier already: use --init 21k to go on from it" if kind == "finetune" else
                  "is no classifier: use --init pretrain")
        raise UserError(f"{args.checkpoint} {remedy}")
    sizes = {arch["image_size"]} if isinstance(arch["image_size"], int) else set(arch["image_size"])
    if len(sizes) > 1 and args.image_size is None:
        raise UserError(f"{args.checkpoint} was trained on images of {arch['image_size']}: choose one --image-size")
    epochs = checkpoint.get("epochs", weights.arguments(checkpoint).get("epochs"))
    return dict(epochs=epochs, image_size=max(sizes), patch_size=arch["patch_size"])


# --- training ---------------------------------------------------------------------------------------------------------
class Few(Dataset):
    """Some images of a data set, under new numbers; each keeps the augmentation it has in the whole set."""

    def __init__(self, dataset, indices):
        self.dataset, self.indices, self.classes = dataset, indices.tolist(), dataset.classes

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, key):
        epoch, index = key
        return self.dataset[epoch, self.indices[index]]

    def title(self, index):
        return self.dataset.title(self.indices[index])


def read_classes(path):
    """A file of class names, one a line or a JSON list, in the order of the logits. -> list"""
    try:
        text = path.read_text()
        names = [str(name).strip() for name in (json.loads(text) if text.lstrip()[:1] == "[" else text.splitlines())]
    except (OSError, ValueError) as error:
        raise UserError(f"--classes {path} cannot be read ({error}): give one name a line, or a JSON list") from error
    if not names or len(set(names)) < len(names) or "" in names:
        raise UserError(f"--classes {path} has no name, a name twice or an empty line: give every logit one of its own")
    return names


def columns_of(dataset, names, source):
    """Which logit each class of a data set is, by name alone. -> (classes of the data set,) long"""
    number = {name: i for i, name in enumerate(names)}
    if unknown := [name for name in dataset.classes if name not in number]:
        some = shown(", ".join(unknown[:5] + ["..."] * (len(unknown) > 5)))
        raise UserError(f"{shown(dataset.name)} has {len(unknown)} classes that {source} does not know ({some}): "
                        f"take them away, or name the logits with --classes FILE")
    return torch.tensor([number[name] for name in dataset.classes])


def open_set(name, split, transform, args, alone=False):
    """Labelled images. `alone`: a folder need not hold the other split, and DIR/CLASS/* will do (ImageNet-A, 21k)."""
    if not alone or name in ("shapes", "cifar10", "cifar100") or not os.path.isdir(name):
        return data.open_data(name, split, transform, data_dir=args.data_dir, download=args.download, limit=args.limit,
                              seed=args.seed)
    root = os.path.join(name, split) if os.path.isdir(os.path.join(name, split)) else name
    return open_class_folders(root, transform, args.seed, args.limit)


def open_sets(args, process):
    """-> (training images, held-out images or None where nothing is to be evaluated), with labels."""
    try:
        augment = transforms.FinetuneTransform(args.image_size, scale=(args.crop_scale, 1.0), erasing=args.erasing,
                                          randaugment=None if args.randaugment in ("none", "") else args.randaugment)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"--randaugment {args.randaugment} is not understood by timm: give rand-m9-mstd0.5-inc1, say, "
                        f"or none") from error
    train_set, val_set = open_set(args.data, "train", augment, args, alone=not args.evaluations), None
    if args.evaluations:
        val_set = open_set(args.data, "val", transforms.EvalTransform(args.image_size), args)
    data.leave_out_bad(args, process, train_set, val_set)
    for dataset in filter(None, (train_set, val_set) if args.classes else ()):
        names = read_classes(args.classes)
        dataset.labels, dataset.classes = columns_of(dataset, names, args.classes)[dataset.labels], names
    if args.labels_per_class:
        train_set = Few(train_set, choose_labels(train_set.labels, args.labels_per_class, args.seed))
    return train_set, val_set


def describe(args, report):
    """Where the weights come from, and which names found no use or no source, for the first line of output."""
    if report is None:
        return "random numbers"
    begun, dropped = (sorted({k.split(".")[0] for k in names}) for names in (report.missing, report.unexpected))
    return f"{args.checkpoint} ({len(report.loaded)} tensors; fresh: {', '.join(begun)}; unused: {', '.join(dropped)})"


@torch.no_grad()
def evaluate(model, dataset, args, process, columns=None):
    """Cross-entropy (no smoothing), top-1 and top-5 in percent, with `columns` also those among these logits only
    (restricted_*). Every image counts once, over all processes."""
    model.eval()
    totals = data.zeros_to_sum(6, process.device)
    batches = data.eval_batches(len(dataset), args.micro_batch, process.rank, process.world_size)
    workers = 0 if isinstance(dataset, Shapes) else args.workers            # shapes need no decoding
    for images, labels in data.make_loader(dataset, batches, workers, process.device):
        images, labels = data.to_float(images, process.device), labels.to(process.device)
        with engine.autocast(process.device, args.amp):
            vectors = model.pooled(imagenet_normalize(images))
        logits = model.head(vectors.float())                 # in float32: bf16 logits tie, and topk would settle it
        counts = F.cross_entropy(logits, labels, reduction="sum"), labels.new_tensor(len(labels))
        few = logits if columns is None else restrict(logits, columns)
        totals += torch.stack([*counts, *hits(logits, labels), *hits(few, labels)]).to(totals.dtype)
    model.train()
    loss, n, *correct = engine.all_reduce_sum(totals).tolist()
    names = ("top1", "top5") + (() if columns is None else ("restricted_top1", "restricted_top5"))
    return dict(loss=loss / n, **{name: 100 * k / n for name, k in zip(names, correct)}, images=round(n))


def train(args, process):
    stage = stage_of(args)
    resumed = engine.start_or_resume(stage, args, process)
    train_set, val_set = open_sets(args, process)
    if resumed and resumed["classes"] != list(train_set.classes):
        raise UserError(f"the classes of {args.data} are no longer those of the run in {args.out}: restore them, or "
                        f"add --fresh")
    classes = len(train_set.classes)
    steps, warmup, per_epoch = data.resolve_steps(args, len(train_set))
    micro, accumulation = data.split_batch(args.batch_size, args.micro_batch, process.world_size)
    if micro % 2 and (args.mixup or args.cutmix):
        raise UserError(f"MixUp pairs images, and --batch-size {args.batch_size} makes micro-batches of {micro}: "
                        f"choose an even number, or --mixup 0 --cutmix 0")

    engine.seed_all(args.seed)
    model, report = build(args, classes, train_set.classes)
    model = model.to(process.device).train()
    groups = engine.param_groups(model.named_parameters(), args.weight_decay, depth=model.depth,
                                 layer_id=lambda name: layer_of(name, model.depth), layer_decay=args.layer_decay)
    optimizer = engine.adamw(groups, (0.9, 0.999), process.device)
    start, best, result = 0, {}, {}
    if resumed:
        model.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizer"])
        start, best = resumed["step"], resumed["best"]
    network = torch.compile(model) if args.compile else model
    ddp = engine.distribute(network, process)
    log = engine.Log(args.out / f"{stage}.jsonl", args, process, start, images=len(train_set), steps=steps,
                     chance=math.log(classes))
    if process.rank == 0:
        print(f"{count_parameters(model) / 1e6:.2f} M parameters from {describe(args, report)}\n"
              f"{len(train_set)} images, {classes} classes, {steps} steps of {args.batch_size} = {process.world_size} "
              f"processes x {accumulation} x {micro}; layer decay {args.layer_decay}")
    batches = iter(data.make_loader(train_set, data.TrainBatches(
        len(train_set), args.batch_size, steps, start, process.rank, process.world_size, accumulation, args.seed),
        args.workers, process.device))
    eval_every = max(1, math.ceil(steps / per_epoch / max(args.evaluations, 1)))         # epochs
    watch = engine.Watch(args, process, log, lambda step: data.names_of(train_set, args.batch_size, step, args.seed))
    clock, clock_step = time.time(), start
    for step in engine.progress(start, steps, process, stage):
        # 1. Schedules and all randomness are functions of the step, so resuming needs the step and no generator state.
        engine.set_lr(optimizer, engine.cosine_schedule(step, args.lr, args.min_lr, steps, warmup))
        for k in range(accumulation):
            images, labels = next(batches)
            images, labels = data.to_float(images, process.device), labels.to(process.device)  # (B, 3, H, W), (B,)
            engine.seed_all(args.seed, step, process.rank, k)                    # for mixing and stochastic depth

            # 2. Mix pairs of images, and their targets with them.
            images, targets = mix(images, labels, classes, args.mixup, args.cutmix, args.smoothing)     # targets (B, C)

            # 3. Name the class. No clipping, no dropout (recipe, not in the paper).
            with engine.no_sync(ddp, last=k == accumulation - 1):
                with engine.autocast(process.device, args.amp):
                    logits = ddp(imagenet_normalize(images))                     # (B, C)
                loss = soft_cross_entropy(logits, targets)
                (loss / accumulation).backward()
            watch.note(loss, step)

        # 4. One update; each group at the rate of its layer.
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last, save = step == steps - 1, (step + 1) % args.save_every == 0
        stop = watch.look(step, now=save or last or step % args.log_every == 0)
        if step % args.log_every == 0 or last:
            rate = (step + 1 - clock_step) * args.batch_size / (time.time() - clock)
            clock, clock_step = time.time(), step + 1
            log(step=step, epoch=step / per_epoch, loss=loss.item(), images_per_s=rate,
                lr=max(group["lr"] for group in optimizer.param_groups))

        # 5. Now and then every held-out image, once. Papers report the best epoch; the file keeps the last weights.
        if val_set is not None and ((step + 1) % (eval_every * per_epoch) == 0 or last):
            begun, result = time.time(), evaluate(model, val_set, args, process)
            clock += time.time() - begun                     # images_per_s is about training
            if result["top1"] > best.get("best_top1", -1):
                best = dict(best_top1=result["top1"], best_epoch=(step + 1) / per_epoch)
            log(step=step, epoch=(step + 1) / per_epoch, split="val", **result)
            if process.rank == 0:
                print(f"step {step + 1}/{steps}: " + ", ".join(f"{k} {v:.2f}" for k, v in result.items()), flush=True)
        if not last and (save or stop):
            if process.rank == 0:
                engine.save_resume(stage, args, contents(model, args, train_set.classes) | dict(
                    optimizer=optimizer.state_dict(), step=step + 1, best=best))
            if stop:
                raise SystemExit(128 + stop)

    result |= best
    log(summary=1, step=steps, init=args.init, **result)
    if process.rank == 0:
        engine.finish(stage, args, contents(model, args, train_set.classes) | dict(step=steps, result=result))
        print(json.dumps({"summary": 1, "init": args.init, **{k: round(v, 4) for k, v in result.items()}}))
    return result


def robustness(args, process):
    """--eval: the classifier in a file on one data set or several, whose classes it must know by name. Where they are
    only some of its own, the accuracy among those (restricted, as papers report ImageNet-A and -R) stands beside."""
    model, checkpoint, _ = weights.load_backbone(
        args.checkpoint, pool=None, num_classes=None, image_size=args.image_size)
    names, source = checkpoint.get("classes"), args.checkpoint
    if args.classes:
        names, source = read_classes(args.classes), args.classes
    if names and len(names) != model.num_classes:
        raise UserError(f"{source} names {len(names)} classes, {args.checkpoint} has {model.num_classes} logits: "
                        f"give one name for each with --classes FILE")
    sets = []
    for name in [args.data] if isinstance(args.data, str) else args.data:        # all, before the first is measured
        dataset = open_set(name, "val", transforms.EvalTransform(args.image_size), args, alone=True)
        if not names and len(dataset.classes) != model.num_classes:
            raise UserError(f"{args.checkpoint} knows {model.num_classes} classes, {name} has {len(dataset.classes)}: "
                            f"give the data of its training, or the names of its logits with --classes FILE")
        columns = columns_of(dataset, names or dataset.classes, source)
        dataset.labels = columns[dataset.labels]
        sets.append((name, dataset, columns))
    data.leave_out_bad(args, process, *[dataset for _, dataset, _ in sets])
    log = engine.Log(args.out / "finetune_eval.jsonl", args, process, append=True)
    model, results = model.to(process.device), {}
    say, width = print if process.rank == 0 else lambda text: None, max(len(name) for name, _, _ in sets)
    say(f"{'data':{width}}   images  classes    top-1    top-5    among these classes: top-1    top-5")
    for name, dataset, columns in sets:
        results[name] = r = evaluate(model, dataset, args, process, columns.to(process.device))
        log(data=name, classes=len(columns), **r)
        say(f"{name:{width}} {r['images']:8} {len(columns):8} {r['top1']:8.2f} {r['top5']:8.2f} "
            f"{r['restricted_top1']:29.2f} {r['restricted_top5']:8.2f}")
    summary = {k: round(v, 6) for k, v in r.items()} if len(sets) == 1 else dict(
        restricted_top1={name: round(result["restricted_top1"], 6) for name, result in results.items()})
    log(summary=1, checkpoint=str(args.checkpoint), **summary)
    say(json.dumps({"summary": 1, "checkpoint": str(args.checkpoint), **summary}))
    return r if len(sets) == 1 else results


# --- main -------------------------------------------------------------------------------------------------------------
def stage_of(args):
    """How the files of a run are called: the classifier of ImageNet-21k is a step on the way, and stands beside."""
    return "finetune_21k" if args.intermediate else "finetune"


def contents(model, args, classes):
    return engine.describe_run(stage_of(args), args) | dict(
        model=model.state_dict(), classes=list(classes), epochs=args.epochs, arch=dict(
            image_size=args.image_size, patch_size=args.patch_size, width=model.width, depth=model.depth,
            heads=model.heads, positions=model.positions, layer_scale=model.layer_scale, pool=model.pool,
            num_classes=model.num_classes))


def main(argv=None):
    args = parse_args(argv)
    if args.dry_run:
        preset = PRESETS[args.model] | dict(image_size=args.image_size, patch_size=args.patch_size)
        classes = 10 if args.model == "tiny" else 21_841 if args.intermediate else 1000
        with torch.device("meta"):                           # shapes without numbers
            model = ViT(**preset, pool=args.pool, num_classes=classes)
        print("\n".join(f"{k:18} {v}" for k, v in sorted(files.plain_args(args).items())))
        print(f"{count_parameters(model):,} trainable parameters with {model.num_classes} classes; {model.num_patches} "
              f"patches; {args.batch_size} images per update")
        return None
    process = engine.init_distributed(args.device)
    args.amp = engine.resolve_amp(args.amp, process.device)
    args.micro_batch = args.micro_batch or args.batch_size
    return robustness(args, process) if args.eval else train(args, process)


if __name__ == "__main__":
    engine.run(main)
