"""Features computed once and read from then on.
"""
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

from support.files import UserError
from support import data, transforms
from support.process import seed_all
from support.images import shown


# ----------------------------------------------------------------------------------------- features computed only once
def cache_features(teacher, dataset, folder, process, *, flip, batch_size=64, workers=0, amp="no"):
    """-> WithFeatures: `dataset`, its images beside their teacher's features, from a file in `folder`; made if missing.

    dataset  Images shown whole (transforms.EvalTransform): features of random crops could not be known beforehand.
    flip     for training: the mirror image's features are cached, too, and every epoch draws one of the two.
    All processes share `folder`, on one machine. Loading may move the global generators of random numbers: seed them
    afterwards.
    """
    if not isinstance(dataset.transform, transforms.EvalTransform):
        raise ValueError(f"features are cached of images as transforms.EvalTransform shows them, not {dataset.transform}")
    # A teacher is not mirror-symmetric: the mirror image's features are not its features mirrored.
    shape = (len(dataset), 2 if flip else 1, math.prod(teacher.grid), teacher.dim)                   # (n, 1 or 2, N, C)
    answer = [None, None]
    if process.rank == 0:                                    # for all: it asks the disk about every picture file
        path = Path(folder) / cache_name(teacher, dataset, flip, amp)
        answer = [str(path), None if path.exists() else empty_file(path, shape, dataset)]
    if process.world_size > 1:
        dist.broadcast_object_list(answer)
    path, temporary = answer
    if temporary:
        write_features(temporary, teacher, dataset, process, batch_size, workers, amp)
        if process.world_size > 1:
            dist.barrier()                                   # all have written ...
        if process.rank == 0:
            os.replace(temporary, path)
        if process.world_size > 1:
            dist.barrier()                                   # ... and all will find it
    cached = WithFeatures(dataset, path, shape)
    cached.features                                          # a damaged file is said here and not by a worker
    return cached


def cache_name(teacher, dataset, flip, amp):
    """A file name that begins readably and ends in a hash of all that the features follow from, so that another
    teacher, other weights, other images or another size never meet an old file."""
    facts = [getattr(dataset, k, None) for k in ("name", "split", "limit", "count", "max_rotation")]
    facts += [len(dataset), sorted(vars(dataset.transform).items()), bool(flip), amp, fingerprint(teacher)]
    digest = hashlib.sha256(repr(facts).encode())
    for path in getattr(dataset, "paths", ()):               # an image folder: its files by path, size and date
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"{shown(os.fsdecode(path))} cannot be found ({error.strerror}): remove or "
                                   f"mend the link") from error
        digest.update(repr((bytes(path), status.st_size, status.st_mtime_ns)).encode())
    return "-".join(["+".join(teacher.names), Path(dataset.name).resolve().name, dataset.split,
                     f"{dataset.transform.size}px", digest.hexdigest()[:12]]) + ".npy"


def fingerprint(teacher):
    """A digest of what a teacher computes: its name, sizes and every weight. Where it has no weights, its features of
    one fixed image stand in for its code, rounded, since their last digits differ from machine to machine."""
    digest = hashlib.sha256(repr((teacher.name, teacher.grid)).encode())
    for one in getattr(teacher, "teachers", [teacher]):
        digest.update(repr(sorted((k, v) for k, v in vars(one).items() if isinstance(v, (int, tuple, list)))).encode())
        tensors = [t for v in vars(one).values() if isinstance(v, torch.nn.Module) for t in v.state_dict().values()]
        if not tensors:
            image = torch.rand(1, 3, *[3 * one.patch_size] * 2, generator=torch.Generator().manual_seed(0))
            tensors = [(100 * one(image)).round().to(torch.int16)]
        for tensor in tensors:
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def empty_file(path, shape, dataset):
    """A file of `shape` beside `path`, once there is room for it -> its name. No other run has this name, and it goes
    when the file is complete: a killed build is not taken for a finished one."""
    folder, temporary, gigabytes = path.parent, f"{path}.{uuid.uuid4().hex[:8]}.tmp", math.prod(shape) * 2 / 1e9
    what = f"{shape[0]} {dataset.split} images x {shape[1]} x {shape[2]} patches x {shape[3]} numbers"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free / 1e9
        if free < gigabytes:
            raise UserError(f"--cache-teacher {folder}: {what} take {gigabytes:.3g} GB and {free:.3g} GB are "
                                   f"free: name a folder on another disk, or remove *.tmp that killed runs left there")
        np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
    except OSError as error:
        raise UserError(f"--cache-teacher {folder}: cannot write there ({error}): name another one") from error
    crops = "; training images are shown whole: flipped, without random crops" if shape[1] == 2 else ""
    print(f"caching the teacher's features in {path}: {what}, {gigabytes:.3g} GB{crops}", flush=True)
    return temporary


def write_features(temporary, teacher, dataset, process, batch_size, workers, amp):
    """The contiguous share of this process, every image and, where asked for, its mirror image."""
    features = np.load(temporary, mmap_mode="r+")                                                    # (n, 1 or 2, N, C)
    batches = data.eval_batches(len(dataset), batch_size, process.rank, process.world_size)
    loader = data.make_loader(dataset, batches, workers, process.device)
    hide_bar = process.rank > 0 or not sys.stderr.isatty()
    for indices, (images, _) in zip(tqdm(batches, "teacher", disable=hide_bar), loader):
        images = data.to_float(images, process.device)                                             # (B, 3, S, S)
        for mirrored in range(features.shape[1]):
            with torch.autocast(process.device.type, torch.bfloat16, enabled=amp == "bf16"):
                t = teacher(images.flip(-1) if mirrored else images).half()                          # (B, N, C)
            if not t.isfinite().all():
                raise UserError(f"--teacher {teacher.name} gives numbers that float16 cannot hold (NaN, or "
                                       f"beyond 65504): check its weights, or leave out --cache-teacher")
            features[indices[0]:indices[-1] + 1, mirrored] = t.cpu().numpy()
    features.flush()


class WithFeatures(Dataset):
    """Images and what the teacher says of them: ds[(epoch, index)] -> ((image (3, S, S) uint8, t (N, C) float16),
    label). Whether an image comes mirrored follows from (seed, epoch, index), as every draw in data.py does."""

    held = None

    def __init__(self, dataset, path, shape):
        self.dataset, self.path, self.shape = dataset, path, shape
        self.seed, self.labels, self.classes = dataset.seed, dataset.labels, dataset.classes

    def __getstate__(self):
        return {**self.__dict__, "held": None}               # a worker under spawn maps the file itself

    @property
    def features(self):
        if self.held is None:
            try:
                self.held = np.load(self.path, mmap_mode="r")
                if (self.held.shape, self.held.dtype) != (self.shape, np.float16):
                    raise ValueError(f"it holds {self.held.dtype} {self.held.shape} instead of float16 {self.shape}")
            except (OSError, ValueError, EOFError) as error:
                raise UserError(f"the feature cache {self.path} is damaged ({' '.join(str(error).split())}): "
                                       f"delete it, and the next run computes it anew") from error
        return self.held

    def __len__(self):
        return len(self.dataset)

    def title(self, index):
        return self.dataset.title(index)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, int(key))
        image, label = self.dataset[(epoch, index)]
        seed_all(self.seed, epoch, index)
        mirrored = int(self.shape[1] == 2 and torch.rand(()) < 0.5)
        t = torch.from_numpy(np.array(self.features[index, mirrored]))       # a copy: the map cannot be written to
        return (image.flip(-1) if mirrored else image, t), label
