"""Pictures from folders and CIFAR, read by one rule.
"""
import contextlib
import os
import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from support.files import UserError
from support.process import seed_all

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
# What such a file may hold, whatever its ending says. Pillow knows more, and some of that (EPS) runs other programs.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")


class Images(Dataset):
    """A data set whose key is (epoch, index): the sampler says which epoch it is, so that workers that live for the
    whole run need not be told. A subclass sets labels, classes, native_size and says what image(index) is."""

    labels, classes, native_size = None, None, None

    def __init__(self, name, split, transform=None, seed=0):
        self.name, self.split, self.transform, self.seed = name, split, transform, seed

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, int(key))      # (epoch, index), or an index of epoch 0
        image = self.image(index)                                            # (3, H, W) uint8
        if self.transform is not None:
            # torchvision draws from torch's generator, RandAugment from `random` and numpy: all three are seeded. With
            # workers=0 they are the training loop's own, which therefore seeds itself after fetching a batch.
            seed_all(self.seed, epoch, index)
            image = self.transform(image)
        return image, -1 if self.labels is None else int(self.labels[index])

    def title(self, index):
        return f"{self.name} {self.split} {index}"


class InMemory(Images):
    """Images held as one array, filled by load(). A pickled copy (a worker under spawn) leaves it out and loads again;
    a forked worker shares its pages. Not in torch's shared memory, of which a container often has 64 MB only."""

    held = None

    def __getstate__(self):
        return {**self.__dict__, "held": None}

    @property
    def arrays(self):
        if self.held is None:
            self.held = self.load()
        return self.held

    @property
    def images(self):
        return torch.from_numpy(self.arrays["images"])       # (n, 3, H, W) uint8

    def image(self, index):
        return torch.from_numpy(self.arrays["images"][index])

    def __len__(self):
        return len(self.labels)


# ------------------------------------------------------------------------------------------------- CIFAR and folders
class Cifar(InMemory):
    """CIFAR-10 or -100, read by torchvision from the python files it finds (and checks) under `data_dir`."""

    native_size = 32

    def __init__(self, name, split, transform=None, seed=0, limit=None, data_dir="datasets", download=False):
        super().__init__(name, split, transform, seed)
        self.limit, self.data_dir = limit, data_dir
        if download:                                         # one process of each machine fetches, the others wait
            if int(os.environ.get("LOCAL_RANK", 0)) == 0:
                self.read(download=True)
            if dist.is_initialized():
                dist.barrier()
        self.labels, self.classes = torch.from_numpy(self.arrays["labels"]), self.arrays["classes"]

    def read(self, download=False):
        from torchvision.datasets import CIFAR10, CIFAR100
        kind = CIFAR10 if self.name == "cifar10" else CIFAR100
        try:
            return kind(self.data_dir, train=self.split == "train", download=download)
        except (RuntimeError, OSError) as error:
            folder, reason = os.path.join(self.data_dir, kind.base_folder), " ".join(str(error).split())
            raise UserError(f"{self.name} is not in {folder}, or not complete ({reason}): add --download, or unpack "
                            f"{kind.filename} from www.cs.toronto.edu/~kriz/cifar.html in --data-dir") from error

    def load(self):
        source = self.read()
        images = np.ascontiguousarray(source.data[:self.limit].transpose(0, 3, 1, 2))        # (n, 3, 32, 32)
        return dict(images=images, labels=np.array(source.targets[:self.limit]), classes=list(source.classes))


def shown(path):
    """A path or name as a message shows it, on one line: line breaks and bytes that are no text are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
                   for c in os.fsdecode(path))


@contextlib.contextmanager
def open_picture(path, kind="image"):
    """A picture file, opened by Pillow; whatever goes wrong with it inside the block becomes one sentence."""
    from PIL import Image
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                  # a damaged note beside the pixels is no concern of ours,
            warnings.simplefilter("error", Image.DecompressionBombWarning)               # 90 million pixels are
            with Image.open(path, formats=FORMATS) as image:
                yield image
    except Exception as error:                               # a broken file raises whatever its decoder stumbles over
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read the {kind} {shown(path)} ({reason}): remove it or replace it") from error


def read_image(path, draft=False):
    """Any picture Pillow reads -> (3, H, W) uint8 RGB, by one rule: first frame, turned upright as its EXIF note says,
    16 bits scaled to 8, transparency laid over white, all else (grey, palette, CMYK) as Pillow converts it to RGB.
    `draft`: a JPEG comes at an eighth of its size, in a fifth of the time; what is broken in it shows all the same.

    Differs from the authors' loader, which drops transparency and shows whatever colour lies below it."""
    from PIL import Image, ImageOps
    with open_picture(path) as image:
        if draft:
            image.draft(None, (1, 1))
        image.load()
        with contextlib.suppress(Exception):                 # a damaged note does not say which side is up
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers of unknown range")
        if image.mode.startswith("I"):                       # 16-bit grey, which Pillow also calls "I", as 32-bit
            levels = np.asarray(image)
            if levels.min() < 0 or levels.max() > 65535:
                raise ValueError("its pixels are 32-bit numbers of unknown range")
            image = Image.fromarray((levels / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)         # channels side by side in memory: cropped faster than not


def no_entry(error):
    """os.walk would pass over a folder that may not be read, and its images would be missing without a word."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise UserError(f"cannot look into the folder {shown(error.filename)} ({error.strerror}): change its "
                        f"permissions, or move it away") from error


def entries_of(folder):
    """Names of the folders and of the files in `folder`, hidden ones left out; none where there is no such folder."""
    _, *kinds = next(os.walk(folder, onerror=no_entry), (folder, [], []))
    return [[name for name in names if not name.startswith(".")] for names in kinds]


def find_images(folder, above=()):
    """All picture files at any depth below a folder, sorted, so that every machine numbers them alike. Other files and
    hidden ones are passed over; folders that are links are followed, but not back to a folder that we are in."""
    here = os.path.realpath(folder)
    folders, files = entries_of(folder) if here not in above else ([], [])
    found = [os.path.join(folder, name) for name in files if name.lower().endswith(IMAGE_ENDINGS)]
    for name in folders:
        found += find_images(os.path.join(folder, name), (*above, here))
    return sorted(found)


def class_folders(folder):
    """Names of the folders in `folder`, sorted, hidden ones left out; none where there is no such folder."""
    return sorted(entries_of(folder)[0])


def find_classes(root):
    """The class folders of root/train, sorted; root/val must have the same ones."""
    found = {}
    for split in ("train", "val"):
        found[split] = class_folders(os.path.join(root, split))
        if not found[split]:
            raise UserError(f"{shown(root)} has no class folders {split}/CLASS/*, which give the labels: put the "
                            f"images there")
    odd = sorted(set(found["train"]) ^ set(found["val"]))
    if odd:
        root, odd = shown(root), shown(", ".join(odd[:5]))
        raise UserError(f"{root}/train and {root}/val must hold the same class folders, but only one of them has "
                        f"{odd}: add or remove it")
    return found["train"]


class Folder(Images):
    """Picture files, read from disk when asked for: train/CLASS/* and val/CLASS/*, or, unlabelled, images at any depth.

    Unlabelled, train/ and val/ are taken where they exist; without a val/ every 20th image is held out in its place;
    split None is everything. `limit` images are spread evenly over the sorted list, where class follows class."""

    def __init__(self, root, split, transform=None, seed=0, limit=None, labelled=True):
        super().__init__(str(root), split, transform, seed)
        paths, labels = [], []
        if labelled:
            self.classes = find_classes(root)
            for number, name in enumerate(self.classes):
                folder = os.path.join(root, split, name)
                found = find_images(folder)
                if not found:
                    raise UserError(f"the class folder {shown(folder)} holds no image: fill it, or remove it from both "
                                    f"splits")
                paths += found
                labels += [number] * len(found)
        elif split is None:
            paths = [str(root)] if os.path.isfile(root) else find_images(root)
        elif os.path.isdir(os.path.join(root, "val")):
            paths = find_images(os.path.join(root, split))
        else:
            train = os.path.join(root, "train")
            paths = find_images(train if os.path.isdir(train) else root)
            paths = [path for i, path in enumerate(paths) if (i % 20 == 0) == (split == "val")]
        if not paths:
            raise UserError(f"{shown(root)} holds no image for {split or 'this'} ({' '.join(IMAGE_ENDINGS)}): check "
                            f"the name, or put images there (2 or more for training)")
        kept = np.linspace(0, len(paths) - 1, min(limit or len(paths), len(paths))).round().astype(int)
        self.labels = torch.tensor(labels)[kept] if labelled else None
        # One array of bytes: workers would copy a list of a million strings, page by page, just by counting references.
        self.paths = np.array([os.fsencode(paths[i]) for i in kept])

    @property
    def names(self):
        return [os.fsdecode(path) for path in self.paths]

    def image(self, index):
        return read_image(os.fsdecode(self.paths[index]))

    def look(self, index):
        """Reads image `index` only to see whether that goes well."""
        read_image(os.fsdecode(self.paths[index]), draft=True)

    def title(self, index):
        return shown(os.fsdecode(self.paths[index]))

    def __len__(self):
        return len(self.paths)


def open_class_folders(root, transform=None, seed=0, limit=None):
    """Labelled images of root/CLASS/*, without another split beside them (ImageNet-A, 21k). `limit` spreads over all
    images, and takes no class away."""
    classes, first = class_folders(root), len(os.path.join(root, ""))
    dataset = Folder(root, None, transform, seed, limit, labelled=False)
    folders, number = [path[first:].split(os.sep)[0] for path in dataset.names], {c: i for i, c in enumerate(classes)}
    if stray := set(folders) - set(classes):
        root = shown(root)
        raise UserError(f"{root} has {'images outside its' if classes else 'no'} class folders, which give the labels "
                        f"({shown(min(stray))}): put them into {root}/CLASS/*")
    dataset.labels, dataset.classes = torch.tensor([number[folder] for folder in folders]), classes
    return dataset


def open_images(path, transform=None):
    """One picture, or all at any depth below a folder, in the order of their names."""
    return Folder(path, None, transform, labelled=False)
