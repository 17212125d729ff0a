"""What a run is made from: its input files and images, known by content and not by name.

    made_from    {"tokenizer": ..., "data": ...}, a short text each; every file of a run keeps it
    compare      what changed since a file was written, and what could not be compared

A checkpoint is known by its tensors: a copy, or the file in a folder that was moved, is the same.
A folder of images is known by the names below it, which hold the classes, by the size of each file
and by the contents of all label maps. Other contents are read only in a small folder.
"""
import functools
import hashlib
import math
import os
import re
import zipfile
import zlib
from pathlib import Path

import torch.distributed as dist

from support.args import flag
from support.files import UserError
from support.find import find_images, shown
from support.shapes import draw_shapes
from support.teachers import split_names

SPLITS = "train", "val", "images", "annotations"     # what stages read of a folder, if it has them
SMALL = 2**26                # bytes; a folder with less is read whole
SIZES = 100_000              # so many files are asked for their size, which takes a disk some time


def made_from(args, process, **more):
    """-> {name of a flag: what its file, or the folder of --data, holds}, the same in all processes

    more: {name: path} of further files that the run reads. What is not there is left out.
    """
    found = [None]
    if process.is_main:
        found = [fingerprints(args, more)]
    if process.world_size > 1:
        dist.broadcast_object_list(found)
    return found[0]


def fingerprints(args, more):
    """What made_from says, computed here."""
    named = {name: value for name, value in vars(args).items() if isinstance(value, Path)}
    found = {name: checksum(path) for name, path in (named | more).items() if path.is_file()}
    teacher = getattr(args, "teacher", None) or ""
    for part in split_names(teacher):        # open_clip:NAME@FILE
        file = part.partition("@")[2]
        if os.path.isfile(file):
            teacher = teacher.replace(f"@{file}", f"@{checksum(file)}")
    if teacher != (getattr(args, "teacher", None) or ""):
        found["teacher"] = teacher
    data = str(getattr(args, "data", ""))
    if re.fullmatch(r"shapes(:\w+)?", data):
        found["data"] = f"{data}, {describe_drawings()}"
    elif re.fullmatch(r"cifar100?", data):
        found["data"] = data
    elif os.path.isdir(data):
        found["data"] = describe_folder(data)
    return found


def checksum(path):
    """A text that tells files apart: of the tensors in a checkpoint, of all bytes elsewhere.

    torch.save lists a CRC-32 of each tensor at the end of its file, so the tensors are not read.
    The other contents, such as the commit, do not count: equal weights are the same input.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                parts = [part for part in archive.infolist() if "/data/" in part.filename]
            sums = [(os.path.basename(p.filename), p.file_size, p.CRC) for p in parts]
            return short(hashlib.sha256(repr(sorted(sums)).encode()))
        with open(path, "rb") as file:
            return short(hashlib.file_digest(file, "sha256"))
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path} ({error}): make or fetch it anew") from error


@functools.cache
def describe_drawings():
    """"levels 97.3, 54.1": mean and spread of ten built-in pictures, which tell a new drawing.

    Rounded: the last bits of a sine differ between processors.
    """
    images, _, _, _ = draw_shapes(0, "train", range(10))
    return f"levels {images.mean():.1f}, {images.std():.1f}"


def describe_folder(root):
    """"32 pictures, names 5fa0..., contents 31c6..." of the pictures below a folder."""
    folders = [path for name in SPLITS if os.path.isdir(path := os.path.join(root, name))]
    paths = [path for folder in folders or [root] for path in find_images(folder)]
    stride = math.ceil(len(paths) / SIZES) or 1
    sizes = [size_of(path) if i % stride == 0 else 0 for i, path in enumerate(paths)]
    small = stride == 1 and sum(sizes) < SMALL
    label_maps = os.path.join(root, "annotations", "")
    names = hashlib.sha256()
    contents = hashlib.sha256()
    for path, size in zip(paths, sizes, strict=True):
        names.update(os.fsencode(os.path.relpath(path, root)) + b"\0")
        contents.update(b"%d " % size)
        # A label map often keeps its size when its labels change.
        if small or path.startswith(label_maps):
            contents.update(b"%d " % crc_of(path))
    return f"{len(paths)} pictures, names {short(names)}, contents {short(contents)}"


def size_of(path):
    """In bytes; -1 for a link that leads nowhere. Who opens the pictures will say so."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def crc_of(path):
    """A checksum of a small file; -1 if it cannot be read."""
    try:
        return zlib.crc32(Path(path).read_bytes())
    except OSError:
        return -1


def short(digest):
    return digest.hexdigest()[:12]


def refuse_to_move(stage, args):
    """UserError if --fresh would set aside a file that the run is to read."""
    for name, path in vars(args).items():
        own = isinstance(path, Path) and path.parent == args.out
        if own and (stage == "vqkd" or path.name.startswith(f"{stage}.")):
            raise UserError(f"--fresh would set {flag(name)} {path} aside, which this run is to "
                            f"read: choose another --out")


# --- then and now ---------------------------------------------------------------------------------
def compare(was, now, args):
    """-> two lists of texts: inputs whose content changed, inputs that could not be compared

    was: made_from of a file, or None if it was written before files kept it.
    """
    if was is None:
        return [], [name_of(name, args) for name in now]
    changed = [f"{name_of(name, args)} was {was[name]}, is {now[name]}"
               for name in was if name in now and was[name] != now[name]]
    return changed, [f"{name_of(name, args)} (not there)" for name in was if name not in now]


def name_of(name, args):
    """What a message calls an input."""
    if getattr(args, name, None) is None:
        return f"the {name} file"
    return f"{flag(name)} {shown(str(getattr(args, name)))}"
