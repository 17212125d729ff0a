"""Images in, batches out: built-in shapes, CIFAR, folders, segmentation folders, transforms, who gets which image when.

    open_data   -> data set -> make_loader(train_batches or eval_batches) -> images (B, 3, H, W) uint8, labels (B,)
    open_scenes -> data set -> the same, with a label for every pixel: labels (B, H, W)

Between functions an image is uint8 RGB (3, H, W). Everything random follows from numbers one can write down: shape i
from (seed, split, i), the order of an epoch from (seed, epoch), the augmentation of a sample from (seed, epoch, index).
So the number of workers or processes and a killed run change nothing, and resuming needs no saved generator.

Read in this order: Images, draw_shapes, Cifar, Folder, the four transforms, SegmentTransform, Scenes, TrainBatches.
"""
# Shapes used in this file:  n images in a data set, c images drawn in one pass, S side of a shapes image
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from support.files import UserError
from support.images import Cifar, Folder, shown
from support.shapes import Shapes


def open_data(name, split, transform=None, *, data_dir="datasets", download=False, limit=None, seed=0, labelled=True):
    """The data set behind --data: "shapes" (also "shapes:noise" and so on), "cifar10", "cifar100" or a folder; split
    "train" or "val".

    ds[(epoch, index)] -> (transformed image, label), label -1 where there is none. limit keeps so many images.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split is 'train' or 'val', not {split!r}")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} leaves no image: give 1 or more")
    if name.split(":")[0] == "shapes":                       # shapes, or shapes:noise and the other SHIFTS
        return Shapes(split, transform, seed, limit, shift=name[7:] or None)
    if name in ("cifar10", "cifar100"):
        return Cifar(name, split, transform, seed, limit, data_dir, download)
    if not os.path.isdir(name):
        raise UserError(f"--data {shown(name)}: there is no such folder; give shapes, cifar10, cifar100 or a folder "
                        f"with train/CLASS/* and val/CLASS/* (ImageNet: from image-net.org, laid out that way)")
    return Folder(name, split, transform, seed, limit, labelled)


# -------------------------------------------------------------------------------------------------- built-in: shapes
def open_split(args, split, transform, labelled=False):
    """open_data with a stage's flags."""
    download = args.download and split == "train"
    return open_data(args.data, split, transform, data_dir=args.data_dir, download=download, limit=args.limit,
                     seed=args.seed, labelled=labelled)


# ------------------------------------------------------------------------------------------------- unreadable images
class Look(Dataset):
    """look[index] -> why picture file `index` of a data set cannot be read, as a sentence; "" where it can."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, index):
        try:
            self.dataset.look(index)
        except UserError as error:
            return str(error)
        return ""


def leave_out_bad(args, *datasets):
    """--on-bad-image skip: read every picture file of these data sets once, and take those out that cannot be read; all
    of them, with the reasons, stand in OUT/bad_images.txt.

    At the start and not when a batch meets one: so an epoch has one length, an evaluation counts each readable image
    once, and a run that goes on meets the same images. Each process reads its share and hears of all."""
    datasets = [dataset for dataset in datasets if hasattr(dataset, "paths")]            # shapes and CIFAR have none
    if args.on_bad_image == "stop" or not datasets:
        return
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    total, bad = sum(map(len, datasets)), []
    for dataset in datasets:
        batches = eval_batches(len(dataset), 64, rank, processes)
        shares = [[reason for part in make_loader(Look(dataset), batches, args.workers, "cpu") for reason in part]]
        if processes > 1:
            share, shares = shares[0], [None] * processes
            dist.all_gather_object(shares, share)
        reasons = sum(shares, [])                            # of all images, "" for each good one
        good = np.array([not reason for reason in reasons])
        if not good.any():
            raise UserError(f"none of the {len(good)} images of {shown(dataset.name)} can be read: {reasons[0]}")
        bad += [(dataset.title(i), reasons[i]) for i in np.flatnonzero(~good)]
        for name in ("paths", "targets", "labels"):
            if getattr(dataset, name, None) is not None:
                setattr(dataset, name, getattr(dataset, name)[good])
    if rank > 0:
        return
    file = Path(args.out, "bad_images.txt")
    try:
        file.unlink(missing_ok=True)
        if bad:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(f"{reason}\n" for _, reason in bad), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {shown(file)} ({error.strerror}): choose another --out") from error
    if bad:
        some = ", ".join(title for title, _ in bad[:3]) + ", ..." * (len(bad) > 3)
        print(f"warning: {len(bad)} of {total} images cannot be read and are left out ({some}); {file} says why",
              file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- who gets which image
def steps_per_epoch(images, batch_size):
    """An incomplete last batch of an epoch is dropped."""
    if images < batch_size:
        raise UserError(f"{images} training images do not fill one batch of {batch_size}: lower --batch-size")
    return images // batch_size


def resolve_steps(args, images):
    """-> (steps, warmup_steps, steps_per_epoch)"""
    per_epoch = steps_per_epoch(images, args.batch_size)
    steps = args.steps or args.epochs * per_epoch            # a run cut short keeps the recipe's share of warm-up:
    warmup = round(args.warmup_epochs * (args.steps / args.epochs if args.steps else per_epoch))
    return steps, min(warmup, steps - 1), per_epoch


def split_batch(batch_size, micro_batch, world_size):
    """-> (micro batch, accumulation): one update of `batch_size` as world_size * accumulation * micro images."""
    if batch_size % world_size:
        raise UserError(f"--batch-size {batch_size} is not a multiple of the {world_size} processes")
    per_rank = batch_size // world_size
    accumulation = max(1, math.ceil(per_rank / (micro_batch or per_rank)))
    while per_rank % accumulation:           # equal parts, so that a mean of means is the mean
        accumulation += 1
    return per_rank // accumulation, accumulation


def names_of(dataset, batch_size, step, seed):
    """What the images of one update are called: the path where there is one. For a sentence about that update."""
    batch, = TrainBatches(len(dataset), batch_size, step + 1, step, seed=seed)
    return [dataset.title(index) for _, index in batch]


class TrainBatches:
    """For every step from start_step on, `accumulation` lists of (epoch, index): the micro-batches of this rank.

    The order of an epoch is a function of (seed, epoch); its last incomplete batch is dropped. A rank holds a
    contiguous slice of the whole batch, a micro-batch a slice of that: gathering restores the order of one process."""

    def __init__(self, n, batch_size, steps, start_step=0, rank=0, world_size=1, accumulation=1, seed=0):
        if n < batch_size:
            raise UserError(f"{n} training images do not fill a batch of {batch_size}: lower --batch-size")
        if batch_size % (world_size * accumulation):
            raise ValueError(f"batch size {batch_size} is not divisible by {world_size} ranks x {accumulation} parts")
        self.n, self.batch_size, self.steps, self.start_step, self.seed = n, batch_size, steps, start_step, seed
        self.rank, self.accumulation, self.micro = rank, accumulation, batch_size // (world_size * accumulation)

    def __len__(self):
        return max(0, self.steps - self.start_step) * self.accumulation

    def __iter__(self):
        per_epoch, drawn = self.n // self.batch_size, None
        for step in range(self.start_step, self.steps):
            epoch, place = divmod(step, per_epoch)
            if epoch != drawn:
                order = torch.randperm(self.n, generator=torch.Generator().manual_seed(1_000_003 * self.seed + epoch))
                drawn = epoch
            first = place * self.batch_size + self.rank * self.accumulation * self.micro
            for start in range(first, first + self.accumulation * self.micro, self.micro):
                yield [(epoch, i) for i in order[start:start + self.micro].tolist()]


def eval_batches(n, batch_size, rank=0, world_size=1):
    """Lists of indices: the contiguous share of this rank; over all ranks every image exactly once, without padding."""
    # Differs from the recipe, which fills up the last shares with images that then count twice.
    first, last = n * rank // world_size, n * (rank + 1) // world_size
    return [list(range(i, min(i + batch_size, last))) for i in range(first, last, batch_size)]


def to_float(images, device):
    """uint8 images to float32 in [0, 1] on the device: they travel as bytes, a quarter of the size. Floats stay."""
    images = images.to(device, non_blocking=True)
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float()


def zeros_to_sum(n, device):
    """Where n numbers are added up over a data set: float64, but on mps, which has none."""
    return torch.zeros(n, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def leave_ctrl_c_alone(worker):
    """Ctrl-C reaches all processes of a terminal; the training loop decides what becomes of it, not its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(dataset, batches, workers, device):
    """A DataLoader over ready-made batches. Workers stay alive; pages are pinned where a GPU fetches them."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, persistent_workers=workers > 0,
                      prefetch_factor=4 if workers else None, pin_memory=torch.device(device).type == "cuda",
                      worker_init_fn=leave_ctrl_c_alone,
                      generator=torch.Generator())           # its own, or it would draw from that of the training loop
