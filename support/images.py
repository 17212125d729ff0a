"""Pictures from folders and CIFAR, read by one rule.

    Images          a data set: ds[(epoch, index)] -> (image (3, H, W), label)
      InMemory      held as one array: Cifar here, Shapes in shapes.py
      Folder        picture files, read from disk when asked for
    read_image      any picture file -> (3, H, W) uint8 RGB
    Photo           a JPEG of which only the size is known, decoded at full size or less

A picture or folder that cannot be used is a UserError: one sentence that names it and the remedy.
"""
import contextlib
import os
import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from support.files import UserError
from support.find import (
    IMAGE_ENDINGS, LeftOut, class_folders, find_classes, labelled_files, more_formats, shown,
    unlabelled_files)
from support.process import seed_all

# What such a file may hold, whatever its ending says. Pillow reads more formats, but for some of
# them (EPS) it runs other programs.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")


# --- data sets ------------------------------------------------------------------------------------
class Images(Dataset):
    """A data set whose key is (epoch, index).

    The sampler names the epoch with every index, so workers that live for the whole run follow it.
    A subclass defines image(index), (3, H, W) uint8. If there are labels, the subclass sets
    `labels`, (n,) integers, and `classes`, their names.
    """

    labels = None
    classes = None

    def __init__(self, name, split, transform=None, seed=0):
        self.name = name
        self.split = split
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key):
        """key: (epoch, index), or an index alone, of epoch 0. The label is -1 if there is none."""
        epoch, index = key if isinstance(key, tuple) else (0, int(key))
        if self.transform is None:
            image = self.image(index)
        else:
            image = self.source(index)
            # torchvision draws from torch's generator, RandAugment from `random` and numpy. With
            # workers=0 these are the training loop's own, so it seeds itself after each batch.
            seed_all(self.seed, epoch, index)
            image = self.transform(image)
        label = -1 if self.labels is None else int(self.labels[index])
        return image, label

    def source(self, index):
        """What the transform is given: the image, or a Photo."""
        return self.image(index)

    def title(self, index):
        """What a message calls this image."""
        return f"{self.name} {self.split} {index}"


class InMemory(Images):
    """Images held as arrays, which load() of the subclass makes.

    A forked worker shares their memory pages. A pickled copy (a worker under spawn) leaves them out
    and loads them again. We do not use torch's shared memory: containers often have only 64 MB.
    """

    held = None

    def __getstate__(self):
        return {**self.__dict__, "held": None}

    @property
    def arrays(self):
        """{"images": (n, 3, H, W) uint8, "labels": (n,), ...}"""
        if self.held is None:
            self.held = self.load()
        return self.held

    @property
    def images(self):
        return torch.from_numpy(self.arrays["images"])

    def image(self, index):
        return torch.from_numpy(self.arrays["images"][index])

    def __len__(self):
        return len(self.labels)


class Cifar(InMemory):
    """CIFAR-10 or -100. torchvision reads the python files in `data_dir` and checks their sums."""

    def __init__(self, name, split, transform=None, seed=0, limit=None, data_dir="datasets",
                 download=False):
        super().__init__(name, split, transform, seed)
        self.limit = limit
        self.data_dir = data_dir
        if download:                         # one process of each machine fetches, the others wait
            if int(os.environ.get("LOCAL_RANK", 0)) == 0:
                self.read(download=True)
            if dist.is_initialized():
                dist.barrier()
        self.labels = torch.from_numpy(self.arrays["labels"])
        self.classes = self.arrays["classes"]

    def read(self, download=False):
        from torchvision.datasets import CIFAR10, CIFAR100   # slow to import
        kind = CIFAR10 if self.name == "cifar10" else CIFAR100
        try:
            return kind(self.data_dir, train=self.split == "train", download=download)
        except (RuntimeError, OSError) as error:
            folder = os.path.join(self.data_dir, kind.base_folder)
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self.name} is not in {folder}, or not complete ({reason}): add --download, or "
                f"unpack {kind.filename} from www.cs.toronto.edu/~kriz/cifar.html in --data-dir"
            ) from error

    def load(self):
        source = self.read()
        images = source.data[:self.limit].transpose(0, 3, 1, 2)                  # (n, 3, 32, 32)
        labels = source.targets[:self.limit]
        return dict(images=np.ascontiguousarray(images), labels=np.array(labels),
                    classes=list(source.classes))


class Folder(Images):
    """Picture files: train/CLASS/* and val/CLASS/*, or, unlabelled, images at any depth.

    Unlabelled, find.unlabelled_files chooses. Split None is every image.
    `limit` images are spread evenly over the sorted list, in which class follows class.
    """

    def __init__(self, root, split, transform=None, seed=0, limit=None, labelled=True):
        super().__init__(str(root), split, transform, seed)
        self.left_out = LeftOut()            # what else lies there, for a line on the screen
        if labelled:
            self.classes = find_classes(root, self.left_out)
            paths, labels = labelled_files(root, split, self.classes, self.left_out)
        else:
            paths = unlabelled_files(root, split, self.left_out)
        if not paths:
            raise UserError(
                f"{shown(root)} holds no image for {split or 'this'} ({' '.join(IMAGE_ENDINGS)}): "
                f"check the name, or put images there (2 or more for training)")
        kept = spread(len(paths), limit)
        if labelled:
            self.labels = torch.tensor(labels)[kept]
        # One array of bytes. Counting references to a million strings would write to each of their
        # memory pages, and so give every worker a copy of its own.
        self.paths = np.array([os.fsencode(paths[i]) for i in kept])

    @property
    def names(self):
        return [os.fsdecode(path) for path in self.paths]

    def path(self, index):
        return os.fsdecode(self.paths[index])

    def image(self, index):
        return read_image(self.path(index))

    def source(self, index):
        return open_photo(self.path(index))

    def look(self, index):
        """Read image `index` only to see whether that goes well; UserError if not."""
        read_image(self.path(index), s=8)

    def title(self, index):
        return shown(self.path(index))

    def __len__(self):
        return len(self.paths)


def open_class_folders(root, transform=None, seed=0, limit=None):
    """Labelled images of root/CLASS/*, without another split beside them (ImageNet-A, 21k).

    `limit` spreads over all images and takes no class away.
    """
    dataset = Folder(root, None, transform, seed, limit, labelled=False)
    classes = class_folders(root)
    dataset.classes = list(classes)
    number = {folder: i for i, name in enumerate(classes) for folder in classes[name]}
    above = os.path.join(root, "")
    folders = [path.removeprefix(above).split(os.sep)[0] for path in dataset.names]
    stray = set(folders) - set(number)
    if stray:
        root = shown(root)
        fault = "images outside its" if dataset.classes else "no"
        raise UserError(f"{root} has {fault} class folders, which give the labels "
                        f"({shown(min(stray))}): put them into {root}/CLASS/*")
    dataset.labels = torch.tensor([number[folder] for folder in folders])
    return dataset


def open_images(path, transform=None):
    """One picture, or all at any depth below a folder, in the order of their names."""
    return Folder(path, None, transform, labelled=False)


# --- reading one picture --------------------------------------------------------------------------
@contextlib.contextmanager
def reading(path, kind="image"):
    """Any error inside the block becomes one sentence that names the picture file."""
    from PIL import Image
    try:
        with warnings.catch_warnings():
            # A damaged note beside the pixels does not matter. More than 90 million pixels do.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except Exception as error:               # a decoder may raise anything on a broken file
        reason = " ".join(str(error).split())
        is_tiff = os.fsdecode(path).lower().endswith((".tif", ".tiff"))
        if is_tiff and isinstance(error, Image.UnidentifiedImageError):
            reason = "a damaged TIFF, or one of other channels than grey or RGB"
        raise UserError(f"cannot read the {kind} {shown(path)} ({reason}): "
                        f"remove it or replace it") from error


def formats():
    """Pillow's names of the formats that are read here."""
    return [*FORMATS, *set(more_formats().values())]


@contextlib.contextmanager
def open_picture(path, kind="image"):
    """A picture file, opened by Pillow. Any error inside the block becomes one sentence."""
    from PIL import Image
    with reading(path, kind), Image.open(path, formats=formats()) as image:
        yield image


def read_image(path, s=1):
    """Any picture that Pillow reads -> (3, H, W) uint8 RGB, by one rule.

    The first frame; turned upright as its EXIF note says; 16 bits scaled to 8; transparency laid
    over white; all else (grey, palette, CMYK) as Pillow converts it to RGB.
    s: a JPEG comes at 1/s of its size (2, 4 or 8), in less time. What is broken in it shows all the
    same.

    Differs from the authors' loader, which drops transparency, shows the colour that lies below,
    and does not turn images: photographs of phones would lie on their side.
    """
    with open_picture(path) as image:
        return pixels_of(image, s)


def pixels_of(image, s=1):
    """What read_image says, of an open picture."""
    from PIL import Image, ImageOps
    refuse_bands(image)
    if s > 1:
        width, height = image.size
        image.draft(None, (max(1, width // s), max(1, height // s)))
    image.load()
    with contextlib.suppress(Exception):                     # a damaged note says nothing
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):           # 16-bit grey. Pillow also calls 32 bits "I".
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("its pixels are 32-bit numbers of unknown range")
        if 0 < levels.max() < 4096:          # a camera or scanner of 12 bits: nearly black here
            raise ValueError(f"its 16-bit values reach only {levels.max()} of 65535: scale them to "
                             f"8 bits first")
        image = Image.fromarray((levels / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    if image.mode != "RGB":
        image = image.convert("RGB")
    pixels = np.array(image)                                 # (H, W, 3)
    # No copy: channels stay side by side in memory, which makes cropping faster.
    return torch.from_numpy(pixels).permute(2, 0, 1)         # (3, H, W)


def refuse_bands(image):
    """ValueError for a TIFF of other channels than grey, RGB, CMYK: Pillow would drop some."""
    tags = getattr(image, "tag_v2", {})
    channels = tags.get(277, 1)              # TIFF's numbers: SamplesPerPixel, ExtraSamples, ...
    alpha = sum(kind in (1, 2) for kind in tags.get(338, ()))
    is_cmyk = tags.get(262) == 5             # ... PhotometricInterpretation
    if channels - alpha not in (1, 3, 4 if is_cmyk else 3):
        raise ValueError(f"it has {channels - alpha} channels, networks here read three: choose "
                         f"three and save them as RGB")


class Photo:
    """A JPEG of which only the size is known yet: shape (3, H, W), upright.

    So a transform can draw its window first, and then decode(s), once: (3, H / s, W / s) uint8,
    rounded up. s is 1, 2, 4 or 8. A coarse pixel stands for s x s pixels, and takes less time.
    Coarse pixels begin at the upper left of the photograph as it was taken. If the EXIF note turns
    it, they may lie up to one of them off.
    """

    def __init__(self, path, image):
        self.path = path
        self.image = image                   # Pillow's, whose file is open
        height, width = upright_size(image.size[::-1], turn_of(image))
        self.shape = (3, height, width)

    def decode(self, s=1):
        with reading(self.path):
            return pixels_of(self.image, s)


def open_photo(path):
    """-> a Photo if the picture is a JPEG, else its pixels"""
    from PIL import Image
    with reading(path):
        image = Image.open(path, formats=formats())
        if image.format in ("JPEG", "MPO"):                  # MPO: more pictures lie behind it
            return Photo(path, image)
        with image:
            return pixels_of(image)


# --- photographs with an EXIF note ----------------------------------------------------------------
def turn_of(image):
    """How an open picture has to be turned to be upright: from 1, not at all, to 8.

    The camera wrote it into the EXIF note.
    """
    turn = 1
    with contextlib.suppress(Exception):                     # a damaged note says nothing
        turn = image.getexif().get(0x0112, 1)
    return turn if turn in range(1, 9) else 1


def upright_size(size, turn):
    """(height, width) of a picture after the turn."""
    return size[::-1] if turn >= 5 else size


def turn_upright(numbers, turn):
    """Turn an array (H, W) as read_image turns a photograph with this note."""
    if turn >= 5:
        numbers = numbers.T
    if turn in (3, 4, 7, 8):
        numbers = numbers[::-1]
    if turn in (2, 3, 6, 7):
        numbers = numbers[:, ::-1]
    return np.ascontiguousarray(numbers)


# --- choosing -------------------------------------------------------------------------------------
def spread(n, limit):
    """Which of n images to keep: `limit` indices at even distances, or all of them."""
    count = min(limit or n, n)
    return np.linspace(0, n - 1, count).round().astype(int)
