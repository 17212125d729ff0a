"""From a name to batches: open a data set, leave out bad images, say who gets which image when.

    open_data -> data set -> make_loader(data set, TrainBatches or eval_batches)
              -> images (B, 3, H, W), labels (B,)

Images stay uint8 until they are on the device; to_float then makes them [0, 1].

Everything random follows from numbers one can write down: the order of an epoch from (seed,
epoch), the augmentation of a sample from (seed, epoch, index). So the number of workers and of
processes changes nothing, and a run that goes on needs no saved generator. Differs from the
released code, which seeds each process once.
"""
import math
import os
import sys
from pathlib import Path
from traceback import walk_tb

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from support.checks import check_sets
from support.files import UserError
from support.find import LeftOut, shown
from support.images import Cifar, Folder
from support.process import ignore_stop_signals, signals_wait
from support.shapes import Shapes


# --- opening --------------------------------------------------------------------------------------
def open_data(name, split, transform=None, *, data_dir="datasets", download=False, limit=None,
              seed=0, labelled=True):
    """The data set behind --data, split "train" or "val".

    name: "shapes" (or "shapes:noise" and the other SHIFTS), "cifar10", "cifar100" or a folder.
    ds[(epoch, index)] -> (transformed image, label); the label is -1 if there is none.
    limit keeps so many images. UserError if there is no such data set.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split is 'train' or 'val', not {split!r}")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} leaves no image: give 1 or more")
    kind, _, shift = name.partition(":")
    if kind == "shapes":
        return Shapes(split, transform, seed, limit, shift=shift or None)
    if name in ("cifar10", "cifar100"):
        return Cifar(name, split, transform, seed, limit, data_dir, download)
    if not os.path.isdir(name):
        raise UserError(
            f"--data {shown(name)}: there is no such folder; give shapes, cifar10, cifar100 or a "
            f"folder with train/CLASS/* and val/CLASS/* (ImageNet: from image-net.org, laid out "
            f"that way)")
    return Folder(name, split, transform, seed, limit, labelled)


def open_split(args, split, transform, labelled=False):
    """open_data with a stage's flags. CIFAR holds both splits in one file: fetched with train."""
    download = args.download and split == "train"
    return open_data(args.data, split, transform, data_dir=args.data_dir, download=download,
                     limit=args.limit, seed=args.seed, labelled=labelled)


# --- unreadable images ----------------------------------------------------------------------------
class Look(Dataset):
    """look[index] -> why image `index` of a data set cannot be read; "" if it can."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, index):
        try:
            self.dataset.look(index)
        except UserError as error:
            return str(error)
        return ""


def look_at_all(dataset, workers, process):
    """-> the reason why it cannot be read, or "", of every image. Each process reads its share."""
    batches = eval_batches(len(dataset), 64, process.rank, process.world_size)
    loader = make_loader(Look(dataset), batches, workers, "cpu")
    share = [reason for batch in loader for reason in batch]
    if process.world_size == 1:
        return share
    shares = [None] * process.world_size
    dist.all_gather_object(shares, share)
    return sum(shares, [])


def leave_out_bad(args, process, *datasets):
    """What happens to picture files before a run: bad ones are left out, the others looked at.

    A line says which files of the folders are no images. --on-bad-image skip takes the images that
    cannot be read out of these data sets. A sample of what is left goes through checks.py.
    """
    datasets = [dataset for dataset in datasets if hasattr(dataset, "paths")]    # picture files
    say_what_is_left_out(datasets, process)
    if args.on_bad_image == "skip" and datasets:
        skip_bad(args, process, datasets)
    check_sets(datasets, process)


def skip_bad(args, process, datasets):
    """Take the images that cannot be read out of these data sets.

    OUT/bad_images.txt lists them with the reasons. UserError if no image of a data set is left.
    All files are read once at the start, and not when a batch meets a bad one. So an epoch has one
    length, an evaluation counts each readable image once, and a resumed run meets the same images.
    Differs from the released code, which puts a random image in the place of a bad one.
    """
    total = sum(map(len, datasets))
    titles, reasons_of_bad = [], []
    for dataset in datasets:
        reasons = look_at_all(dataset, args.workers, process)
        good = np.array([not reason for reason in reasons])
        if not good.any():
            raise UserError(f"none of the {len(good)} images of {shown(dataset.name)} can be read: "
                            f"{reasons[0]}")
        titles += [dataset.title(i) for i in np.flatnonzero(~good)]
        reasons_of_bad += [reason for reason in reasons if reason]
        for name in ("paths", "targets", "labels"):
            if getattr(dataset, name, None) is not None:
                setattr(dataset, name, getattr(dataset, name)[good])
    file = Path(args.out, "bad_images.txt")
    if process.is_main:
        write_list(file, reasons_of_bad)
    if titles:
        some = ", ".join(titles[:3] + ["..."] * (len(titles) > 3))
        process.warn(f"{len(titles)} of {total} images cannot be read and are left out ({some}); "
                     f"{file} says why")


def say_what_is_left_out(datasets, process):
    """A printed line for each folder with files that are not used: how many, and why."""
    folders = {}
    for dataset in datasets:
        folders.setdefault(dataset.name, LeftOut()).merge(dataset.left_out)
        dataset.left_out = LeftOut()         # a worker need not carry the list
    for root, left_out in folders.items():
        if left_out and process.is_main:
            print(f"note: {left_out.text(root)}", file=sys.stderr, flush=True)


def write_list(file, lines):
    """Write these lines; without any, remove the file that an earlier run left."""
    try:
        file.unlink(missing_ok=True)
        if lines:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {shown(file)} ({error.strerror}): "
                        f"choose another --out") from error


# --- how many steps, who gets which image ---------------------------------------------------------
def steps_per_epoch(images, batch_size):
    """An incomplete last batch of an epoch is dropped."""
    if images < batch_size:
        raise UserError(f"{images} training images do not fill one batch of {batch_size}: "
                        f"lower --batch-size")
    return images // batch_size


def fitting_batch(args, images, world_size):
    """The images of one update: as the recipe says, or as many as there are if they are fewer.

    UserError if --batch-size was typed and there are fewer.
    """
    per_rank = images // world_size
    if images >= args.batch_size:
        return args.batch_size
    if "batch_size" in typed(args) or per_rank == 0:
        steps_per_epoch(images, max(args.batch_size, world_size))        # says so
    parts = math.ceil(per_rank / (args.micro_batch or per_rank))
    unit = 2 * parts                         # even micro-batches: MixUp pairs images
    return world_size * max(per_rank - per_rank % unit, 1)


def typed(args):
    """The flags that were given, with the recipe's values instead (see args.fill_in)."""
    return getattr(args, "typed", {})


def resolve_steps(args, images):
    """-> (steps, warmup_steps, steps_per_epoch)

    A run that is shorter than the recipe keeps the recipe's share of warm-up. A warm-up that was
    typed stays as it is; UserError if it leaves no step.
    """
    per_epoch = steps_per_epoch(images, args.batch_size)
    steps = args.steps or args.epochs * per_epoch
    recipe_epochs = typed(args).get("epochs") or args.epochs
    warmup_epochs = getattr(args, "warmup_epochs", 0)        # linprobe.py has none
    asked = None
    if "warmup_share" in args:               # segment.py counts its warm-up in steps
        asked = "--warmup-steps"
        warmup = args.warmup_steps
        if warmup is None:
            warmup = args.warmup_share * steps
            asked = None
    elif "warmup_epochs" in typed(args):
        asked = "--warmup-epochs"
        warmup = warmup_epochs * per_epoch
    elif args.steps:
        warmup = warmup_epochs * (args.steps / recipe_epochs)
    else:
        warmup = warmup_epochs * min(1, args.epochs / recipe_epochs) * per_epoch
    if asked and round(warmup) >= steps:
        raise UserError(f"{asked} asks for a warm-up of {round(warmup)} steps in a run of {steps}: "
                        f"lower it, or leave it out")
    return steps, min(round(warmup), steps - 1), per_epoch


# Flags that count steps of a recipe, whose length args.recipe_steps is (vqkd.py).
COUNT_STEPS = "continuous_steps", "restart_dead_codes"


def shortened(args, name, steps):
    """A flag of COUNT_STEPS in a run of so many steps: its share if the run is short.

    A typed one is kept.
    """
    value = getattr(args, name)
    recipe_steps = getattr(args, "recipe_steps", None) or steps
    if name in typed(args) or steps >= recipe_steps or not value:
        return value
    least = 0 if name == "continuous_steps" else 1
    return max(least, value * steps // recipe_steps)


def recipe_length(args, steps_per_epoch):
    """How many steps the recipe takes, whatever was typed; None if it does not say."""
    if getattr(args, "recipe_steps", None):
        return args.recipe_steps
    if "steps" in typed(args):
        return typed(args)["steps"] or args.epochs and args.epochs * steps_per_epoch
    if "epochs" in typed(args):
        recipe_epochs = typed(args)["epochs"]
        return recipe_epochs and recipe_epochs * steps_per_epoch
    return None


def what_shrank(args, images, batch_size):
    """Lines about what is smaller than in the recipe.  batch_size: the recipe's"""
    if args.batch_size < batch_size:
        yield (f"{images} training images are fewer than the recipe's batch of {batch_size}: "
               f"batches of {args.batch_size}")
    steps, warmup, per_epoch = resolve_steps(args, images)
    recipe = recipe_length(args, per_epoch)
    if recipe and steps < recipe:
        parts = [f"warm-up {warmup} steps"]
        parts += [f"--{name.replace('_', '-')} {shortened(args, name, steps)}"
                  for name in COUNT_STEPS if getattr(args, name, 0)]
        yield f"{steps} steps are fewer than the recipe's {recipe}: {', '.join(parts)}"


def split_batch(batch_size, micro_batch, world_size):
    """-> (micro batch, accumulation): batch_size = world_size * accumulation * micro batch.

    micro_batch, if given, is the largest that fits into memory.
    """
    if batch_size % world_size:
        raise UserError(f"--batch-size {batch_size} is not a multiple of the {world_size} "
                        f"processes")
    per_rank = batch_size // world_size
    accumulation = max(1, math.ceil(per_rank / (micro_batch or per_rank)))
    while per_rank % accumulation:           # equal parts: the mean of their means is the mean
        accumulation += 1
    return per_rank // accumulation, accumulation


class TrainBatches:
    """For each step from start_step on, `accumulation` lists of (epoch, index) for this rank.

    The order of an epoch is a function of (seed, epoch); its incomplete last batch is dropped. A
    rank holds a contiguous slice of the whole batch, and a micro-batch a slice of that. So
    gathering all of them restores the batch of a single process. Differs from the recipe, where
    each process batches a share of the epoch, and drops the end of that.
    """

    def __init__(self, n, batch_size, steps, start_step=0, rank=0, world_size=1, accumulation=1,
                 seed=0):
        if batch_size % (world_size * accumulation):
            raise ValueError(f"batch size {batch_size} is not divisible by {world_size} ranks x "
                             f"{accumulation} parts")
        self.n = n
        self.per_epoch = steps_per_epoch(n, batch_size)
        self.batch_size = batch_size
        self.steps = steps
        self.start_step = start_step
        self.rank = rank
        self.accumulation = accumulation
        self.micro_batch = batch_size // (world_size * accumulation)
        self.seed = seed

    def __len__(self):
        return max(0, self.steps - self.start_step) * self.accumulation

    def __iter__(self):
        drawn = None
        for step in range(self.start_step, self.steps):
            epoch, place = divmod(step, self.per_epoch)
            if epoch != drawn:
                generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
                order = torch.randperm(self.n, generator=generator)
                drawn = epoch
            first = place * self.batch_size + self.rank * self.accumulation * self.micro_batch
            for k in range(self.accumulation):
                start = first + k * self.micro_batch
                yield [(epoch, i) for i in order[start:start + self.micro_batch].tolist()]


def names_of(dataset, batch_size, step, seed):
    """The titles of the images of one update, for a sentence about that update."""
    batch, = TrainBatches(len(dataset), batch_size, step + 1, step, seed=seed)
    return [dataset.title(index) for _, index in batch]


def eval_batches(n, batch_size, rank=0, world_size=1):
    """Lists of indices: the contiguous share of this rank. All ranks together have each image once.

    Differs from the recipe, which fills up the last shares with images that then count twice.
    """
    first = n * rank // world_size
    last = n * (rank + 1) // world_size
    starts = range(first, last, batch_size)
    return [list(range(start, min(start + batch_size, last))) for start in starts]


# --- loading --------------------------------------------------------------------------------------
class Loader(DataLoader):
    """A DataLoader whose workers leave stop signals to the training loop."""

    def __iter__(self):
        try:
            with signals_wait():             # until the workers ignore them
                return super().__iter__()
        except OSError as error:             # no room for their semaphores, no more processes
            calls = [call.f_locals.get("self") for call, _ in walk_tb(error.__traceback__)]
            for half_made in calls:
                if isinstance(half_made, _BaseDataLoaderIter):
                    half_made._shutdown = True               # else its end adds a traceback
            raise UserError(f"cannot start loader workers ({error.strerror}): "
                            f"give --workers 0, or fewer") from error


def make_loader(dataset, batches, workers, device):
    """A DataLoader over ready-made lists of keys. Workers live as long as the loader."""
    return Loader(
        dataset, batch_sampler=batches, num_workers=workers, persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None, worker_init_fn=ignore_stop_signals,
        pin_memory=torch.device(device).type == "cuda",      # a GPU fetches pinned pages faster
        generator=torch.Generator())         # else it would draw from the training loop's generator


def to_float(images, device):
    """uint8 images -> float32 in [0, 1] on the device; float images stay as they are.

    Images travel as bytes, a quarter of the size.
    """
    images = images.to(device, non_blocking=True)
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float()


def some_images(dataset, indices, device, batch_size=64):
    """Some images of a data set in batches (B, 3, H, W) in [0, 1]. Cached features are left out."""
    some = Subset(dataset, indices)
    for batch, _ in make_loader(some, eval_batches(len(some), batch_size), 0, device):
        images = batch if isinstance(batch, torch.Tensor) else batch[0]
        yield to_float(images, device)


def two_views(views, device):
    """Stage 2: -> images in [0, 1] for the backbone, for the tokenizer; the same if of one size."""
    if isinstance(views, torch.Tensor):
        images = to_float(views, device)
        return images, images
    return to_float(views[0], device), to_float(views[1], device)


def zeros_to_sum(n, device):
    """n zeros for adding up over a data set: float64, except on mps, which has none."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.zeros(n, dtype=dtype, device=device)
