"""Features computed once, kept in a file, and read from then on.

    store_features            encode(images) of a whole data set -> FeatureFile, computed if missing
    cache_features            a data set whose images come with their teacher's features
    open_teacher_and_images   what vqkd.py learns from, with such features or without

The name of a file ends in a hash of everything that its features follow from: weights, code,
images, sizes, precision. So other weights or other images never meet an old file. A file is written
under another name and renamed when it is complete, so a killed run leaves nothing half-read.
"""
# Shapes:  n images, B images of a batch, N patches, C teacher width, S image side
import copy
import hashlib
import math
import os
import shutil
import sys
import uuid
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from tqdm import tqdm

from support import data, teachers, transforms
from support.checks import check_teacher
from support.files import UserError
from support.images import shown, spread
from support.positions import grid_of, sides
from support.process import seed_all


# --- the file -------------------------------------------------------------------------------------
class FeatureFile:
    """A table of features on disk, a row per image. file[rows] -> a tensor with a copy of them.

    The table may be larger than the memory: only the rows asked for are read.
    """

    mapped = None

    def __init__(self, path, shape, dtype):
        self.path, self.shape, self.dtype = Path(path), tuple(shape), dtype

    def __getstate__(self):
        return {**self.__dict__, "mapped": None}             # a worker maps the file itself

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        if isinstance(rows, torch.Tensor):
            rows = rows.numpy()
        return torch.from_numpy(np.array(self.table()[rows]))

    def table(self):
        """All rows, mapped. UserError if the file is not what was written."""
        if self.mapped is None:
            try:
                self.mapped = np.load(self.path, mmap_mode="r")
                found = self.mapped.shape, self.mapped.dtype.name
                if found != (self.shape, self.dtype):
                    raise ValueError(f"it holds {found} instead of {(self.shape, self.dtype)}")
            except (OSError, ValueError, EOFError) as error:
                reason = " ".join(str(error).split())
                raise UserError(f"the file of features {self.path} is damaged ({reason}): "
                                f"delete it, and the next run computes it again") from error
        return self.mapped


@torch.no_grad()
def store_features(folder, flag, name, encode, dataset, process, *, networks=(), about=(),
                   dtype="float16", batch_size=64, workers=0):
    """-> FeatureFile (n, ...): encode(image) of each image of a data set, in order.

    folder     shared by all processes; flag is what the user calls it, for error messages
    name       how the file's name begins, for human readers
    encode     images (B, 3, S, S) in [0, 1] -> features (B, ...)
    networks   the modules that encode reads; about: whatever else its features follow from
    UserError if the disk has no room for the file, before any work.
    """
    facts = [None] * 4
    if process.is_main:                      # for all: it asks the disk about every picture file
        image, _ = dataset[0]
        example = encode(data.to_float(image[None], process.device))
        shape = (len(dataset), *example.shape[1:])
        key = [about, shape, dtype, process.amp, some_digits(example)]
        path = Path(folder) / file_name(name, dataset, networks, key)
        temporary = None if path.exists() else empty_file(path, shape, dtype, flag)
        facts = [str(path), temporary, shape, dtype]
    if process.world_size > 1:
        dist.broadcast_object_list(facts)
    path, temporary, shape, dtype = facts
    if temporary:
        write_rows(temporary, encode, dataset, process, batch_size, workers)
        process.wait()                       # all have written ...
        if process.is_main:
            os.replace(temporary, path)
        process.wait()                       # ... and all will find the file
    file = FeatureFile(path, shape, dtype)
    file.table()                             # raises here, not in a worker, if the file is damaged
    return file


def file_name(name, dataset, networks, key):
    """NAME-DATA-SPLIT-SIZEpx-HASH.npy, SIZE as 48 or 224x320"""
    images = getattr(dataset, "dataset", dataset)            # the data set behind a wrapper
    fields = "name split limit max_rotation".split()
    facts = [getattr(images, field, None) for field in fields]
    facts += [getattr(dataset, field, None) for field in ("times", "crop_seed")]
    facts += [sorted(vars(images.transform).items()), key]
    digest = hashlib.sha256(repr(facts).encode())
    for network in networks:
        for tensor in network.state_dict().values():
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    for path in getattr(images, "paths", ()):                # a folder: by path, size and date
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"{shown(os.fsdecode(path))} cannot be found ({error.strerror}): "
                            f"remove or mend the link") from error
        digest.update(repr((bytes(path), status.st_size, status.st_mtime_ns)).encode())
    place = Path(images.name).resolve().name
    pixels = "x".join(str(side) for side in dict.fromkeys(sides(images.transform.size)))
    return (f"{name}-{place}-{images.split}-{pixels}px-"
            f"{digest.hexdigest()[:12]}.npy")


def some_digits(example):
    """Sixteen features of the first image, as text: they change when someone edits the code.

    Three digits of each: the last digits differ from machine to machine.
    """
    numbers = example.float().flatten()
    return [f"{x:.2e}" for x in numbers[::max(1, len(numbers) // 16)].tolist()]


def empty_file(path, shape, dtype, flag):
    """Make a file of this shape beside `path` -> its name, which no other run has."""
    gigabytes = math.prod(shape) * np.dtype(dtype).itemsize / 1e9
    what = f"{' x '.join(map(str, shape))} numbers"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free / 1e9
        if free < gigabytes:
            raise UserError(f"{flag} {path.parent}: {what} take {gigabytes:.3g} GB and {free:.3g} "
                            f"GB are free: name a folder on another disk, or remove the *.tmp "
                            f"that killed runs left there")
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
    except OSError as error:
        raise UserError(f"{flag} {path.parent}: cannot write there ({error}): "
                        f"name another folder") from error
    print(f"computing features once: {what}, {gigabytes:.3g} GB, in {path}", flush=True)
    return temporary


def write_rows(path, encode, dataset, process, batch_size, workers):
    """Compute and write the contiguous share of this process."""
    table = np.load(path, mmap_mode="r")
    row_bytes = table.nbytes // len(table)
    batches = data.eval_batches(len(dataset), batch_size, process.rank, process.world_size)
    loader = data.make_loader(dataset, batches, workers, process.device)
    hide_bar = not process.is_main or not sys.stderr.isatty()
    try:
        # Written, not mapped: a disk that fills up would kill a process that writes to a map.
        with open(path, "r+b") as file:
            if batches:
                file.seek(table.offset + batches[0][0] * row_bytes)
            for images, _ in tqdm(loader, "features", disable=hide_bar):
                features = encode(data.to_float(images, process.device))
                features = features.to(getattr(torch, table.dtype.name))
                if not features.isfinite().all():
                    raise UserError(f"some features are NaN, or beyond what {table.dtype} can "
                                    f"hold: check the weights of the network")
                file.write(features.cpu().numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}): remove it, then free some space or name "
                        f"another folder") from error


# --- data sets around it --------------------------------------------------------------------------
class WithCrops(Dataset):
    """Every image of a data set 1 + augment times: whole, then random crops and flips of it."""

    def __init__(self, dataset, augment):
        self.dataset, self.times = dataset, 1 + augment
        self.crop_seed = dataset.seed if augment else None
        self.crops = copy.copy(dataset)      # the same images through another transform
        self.crops.transform = transforms.VQKDTransform(dataset.transform.size)

    def __len__(self):
        return self.times * len(self.dataset)

    def __getitem__(self, row):
        index, view = divmod(row, self.times)
        return self.crops[(view - 1, index)] if view else self.dataset[(0, index)]


def cache_features(teacher, dataset, folder, process, *, flip, batch_size=64, workers=0):
    """-> WithFeatures: the images of a data set beside their teacher's features, from a file.

    dataset  shows images whole (transforms.EvalTransform): crops cannot be known beforehand
    flip     for training: the mirror images' features are stored, too, and each epoch draws one
    Differs from the recipe, which crops at random: the teacher would run in every step.
    Loading may move the global generators of random numbers: seed them afterwards.
    """
    if not isinstance(dataset.transform, transforms.EvalTransform):
        raise ValueError(f"only whole images (EvalTransform) can be cached: {dataset.transform}")

    def encode(images):
        # A teacher is not mirror-symmetric: the mirror image has to be computed, too.
        views = [images, images.flip(-1)] if flip else [images]
        with process.autocast():
            return torch.stack([teacher(view) for view in views], dim=1)     # (B, 1 or 2, N, C)

    if flip:
        process.print("training images are shown whole, half of them mirrored; no random crops")
    networks = []
    for one in getattr(teacher, "teachers", [teacher]):
        networks += [part for part in vars(one).values() if isinstance(part, torch.nn.Module)]
    file = store_features(
        folder, "--cache-teacher", "+".join(teacher.names), encode, dataset, process,
        networks=networks, about=(teacher.name, teacher.grid, teacher.dims, flip),
        batch_size=batch_size, workers=workers)
    return WithFeatures(dataset, file)


class WithFeatures(Dataset):
    """ds[(epoch, index)] -> ((image (3, S, S) uint8, t (N, C) float16), label)

    Whether an image comes mirrored follows from (seed, epoch, index), as all random draws do.
    """

    def __init__(self, dataset, file):
        self.dataset, self.file = dataset, file
        self.seed, self.labels, self.classes = dataset.seed, dataset.labels, dataset.classes

    def __len__(self):
        return len(self.dataset)

    def title(self, index):
        return self.dataset.title(index)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, int(key))
        image, label = self.dataset[(epoch, index)]
        seed_all(self.seed, epoch, index)
        mirrored = self.file.shape[1] == 2 and bool(torch.rand(()) < 0.5)
        t = self.file[index, int(mirrored)]                  # (N, C)
        return (image.flip(-1) if mirrored else image, t), label


# --- stage 1 --------------------------------------------------------------------------------------
def open_teacher_and_images(args, process):
    """-> the frozen teacher, training images in random crops, whole held-out images.

    With --cache-teacher the training images are whole, too, and come with their features.
    """
    whole_image = transforms.EvalTransform(args.image_size)
    crops = transforms.VQKDTransform(args.image_size, scale=(args.crop_scale, 1.0))
    train_set = data.open_split(args, "train", whole_image if args.cache_teacher else crops)
    val_set = data.open_split(args, "val", whole_image)
    data.leave_out_bad(args, process, train_set, val_set)
    grid = grid_of(args.image_size, args.patch_size)
    teacher = teachers.build_teacher(args.teacher, grid, args.patch_size, process.device)
    some = torch.stack([train_set[i][0] for i in spread(len(train_set), 8)])
    check_teacher(teacher, data.to_float(some, process.device), process)
    if args.cache_teacher:                   # features are computed once, later only read
        how = dict(batch_size=args.micro_batch, workers=args.workers)
        folder = args.cache_teacher
        train_set = cache_features(teacher, train_set, folder, process, flip=True, **how)
        val_set = cache_features(teacher, val_set, folder, process, flip=False, **how)
    return teacher, train_set, val_set
