"""Images in, batches out: built-in shapes, CIFAR, folders, segmentation folders, transforms, who gets which image when.

    open_data   -> data set -> make_loader(train_batches or eval_batches) -> images (B, 3, H, W) uint8, labels (B,)
    open_scenes -> data set -> the same, with a label for every pixel: labels (B, H, W)

Between functions an image is uint8 RGB (3, H, W). Everything random follows from numbers one can write down: shape i
from (seed, split, i), the order of an epoch from (seed, epoch), the augmentation of a sample from (seed, epoch, index).
So the number of workers or processes and a killed run change nothing, and resuming needs no saved generator.

Read in this order: Images, draw_shapes, Cifar, Folder, the four transforms, SegmentTransform, Scenes, TrainBatches.
"""
# Shapes used in this file:  n images in a data set, c images drawn in one pass, S side of a shapes image
import contextlib
import hashlib
import math
import os
import random
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from model import IMAGENET_MEAN, IMAGENET_STD
from support.files import UserError

# torchvision takes longer to import than torch: what needs it imports it (VF, v2), so that --help answers at once.
NEAREST, BILINEAR = 0, 2                     # interpolations have Pillow's numbers there
BICUBIC = dict(interpolation=3, antialias=True)      # as Pillow's, which the authors use
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
# What such a file may hold, whatever its ending says. Pillow knows more, and some of that (EPS) runs other programs.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")


def seed_all(*numbers):
    """Seed torch, random and numpy from any integers, say (seed, epoch, index): the draws that follow are a function of
    these numbers alone, so that no generator state has to be saved."""
    value = int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")
    # Not torch.manual_seed, which spends 100 us a call on a CUDA that is not in use: this runs once per image.
    torch.default_generator.manual_seed(value % 2**63)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value % 2**63)
    random.seed(value)
    np.random.seed(value % 2**32)


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


def hashed(*numbers, draws):
    """Uniform numbers in [0, 1) that depend on `numbers` alone: a counter instead of a generator (splitmix64's mixing).

    Each number is an integer or an array (c,) of integers; the result is (c, draws). It gives image 7 without drawing
    images 0 to 6, and a thousand images in one pass."""
    def mix(x):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    golden, state = np.uint64(0x9E3779B97F4A7C15), np.zeros(1, dtype=np.uint64)
    for number in numbers:                                   # arrays of integers wrap around at 2^64, as they should
        state = mix(state + golden * (np.atleast_1d(number).astype(np.uint64) + np.uint64(1)))
    state = mix(state[:, None] + golden * np.arange(1, draws + 1, dtype=np.uint64))                  # (c, draws)
    return (state >> np.uint64(40)).astype(np.float32) / np.float32(2 ** 24)


SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "crescent", "heart", "arrow", "hourglass")
TEXTURES = ("plain", "gradient", "stripes", "checks", "dots")


def signed_distance(shape, x, y):
    """About the distance to the outline, negative inside. x points right, y down; a shape fills about [-1, 1] each way.
    No two shapes are equal up to a rotation or a reflection."""
    def box(x, y, half_width, half_height):
        return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)

    r, sector = np.hypot(x, y), np.float32(np.pi / 5)
    if shape == "circle":
        return r - 0.92
    if shape == "square":
        return box(x, y, 0.82, 0.82)
    if shape == "triangle":
        return np.maximum(0.866 * np.abs(x) - 0.5 * (y - 0.2), y - 0.2) - 0.58
    if shape == "star":      # fold the plane into half a spike, where the outline is the line from its tip to a notch
        angle = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
        return (r * np.cos(angle) - 1.08) * 0.3596 + r * np.sin(angle) * 0.9331
    if shape == "cross":
        return np.minimum(box(x, y, 0.95, 0.32), box(x, y, 0.32, 0.95))
    if shape == "ring":
        return np.abs(r - 0.72) - 0.22
    if shape == "crescent":
        return np.maximum(np.hypot(x + 0.05, y) - 0.95, 0.72 - np.hypot(x - 0.42, y))
    if shape == "heart":     # a square on its tip, and a disc on each of its two upper sides
        u, v = 0.7071 * (x - y + 0.08), -0.7071 * (x + y - 0.08)
        return np.minimum.reduce([box(u, v, 0.56, 0.56), np.hypot(u - 0.56, v) - 0.56, np.hypot(u, v - 0.56) - 0.56])
    if shape == "arrow":
        head = np.maximum(0.8 * np.abs(x) - 0.6 * (y + 0.97), y - 0.12)
        return np.minimum(head, box(x, y - 0.45, 0.26, 0.5))
    if shape == "hourglass":
        return np.maximum(np.abs(y) - 0.88, 0.75 * (np.abs(x) - 0.88 * np.abs(y) - 0.06))
    raise ValueError(f"no shape is called {shape!r}")


def draw_shapes(seed, split, index, max_rotation=15.0, size=48, change=None):
    """Images `index` (c,) of a split in one pass: images (c, 3, S, S), masks (c, S, S), labels (c,), factors.

    Images 0 to 9, 10 to 19, ... hold every class once, so that the first n are balanced. `change` draws them anew with
    other values (c,) of some factors, all else equal: {"hue": ..., "class": labels, "noise": whose noise to take}."""
    index, split, half = np.asarray(index), ("train", "val").index(split), size / 2
    labels = (index + (10 * hashed(seed, split, index // 10, 0, draws=1)[:, 0]).astype(np.int64)) % 10
    u = hashed(seed, split, index, 1, draws=16)
    scale = 0.60 + 0.35 * u[:, 0]                            # of the half-width
    room = (1 - scale) * half + 1.5                          # how far from the middle its centre may lie, in pixels
    # Object and background are clearly apart in brightness, either one the brighter: no pixel is bright for one class,
    # so that a linear classifier on pixels learns little, while outlines look the same to gradients of either sign.
    low, high, brighter = 0.12 + 0.22 * u[:, 6], 0.66 + 0.24 * u[:, 7], u[:, 8] < 0.5
    factors = dict(
        scale=scale, rotation=(2 * u[:, 1] - 1) * np.float32(max_rotation),                          # degrees
        x=(2 * u[:, 2] - 1) * room, y=(2 * u[:, 3] - 1) * room,                                      # pixels
        hue=u[:, 4], saturation=u[:, 5], brightness=np.where(brighter, high, low),
        background_hue=u[:, 9], background=np.where(brighter, low, high),
        texture=(len(TEXTURES) * u[:, 10]).astype(np.int64))
    change = dict(change or {})
    labels, noise_of = np.asarray(change.pop("class", labels)), change.pop("noise", index)
    if unknown := set(change) - set(factors):
        raise ValueError(f"no factor is called {sorted(unknown)}: there are class, noise, {', '.join(factors)}")
    factors |= {name: np.asarray(value, factors[name].dtype) for name, value in change.items()}
    f = {name: value[:, None, None] for name, value in factors.items()}                              # (c, 1, 1) each
    py, px = np.meshgrid(*2 * [np.arange(size, dtype=np.float32) - np.float32(half - 0.5)], indexing="ij")

    # The object: pixels into its own coordinates, then the outline of its class. Its share of a pixel falls from 1 to 0
    # over one pixel across the outline, which is what anti-aliases it.
    cos, sin, unit = np.cos(np.deg2rad(f["rotation"])), np.sin(np.deg2rad(f["rotation"])), f["scale"] * np.float32(half)
    dx, dy = (px - f["x"]) / unit, (py - f["y"]) / unit
    x, y = cos * dx + sin * dy, cos * dy - sin * dx                                                  # (c, S, S)
    distance = np.empty_like(x)
    for k, shape in enumerate(SHAPES):
        distance[labels == k] = signed_distance(shape, x[labels == k], y[labels == k])
    share = np.clip(0.5 - distance * unit, 0, 1)

    # The background: a regular pattern in [-1, 1] of low contrast.
    turn = np.float32(2 * np.pi)
    angle, period = turn * u[:, 11, None, None], 6 + 6 * u[:, 12, None, None]                        # period in pixels
    cos, sin = np.cos(angle), np.sin(angle)
    along, across = cos * px + sin * py, cos * py - sin * px
    warp, weft = (np.sin(turn * (d / period + u[:, j, None, None])) for j, d in ((13, along), (14, across)))
    pattern = np.select([f["texture"] == k for k in range(len(TEXTURES))],
                        [0 * warp, along / np.float32(half), 3 * warp, 3 * warp * weft, 4 * (warp + weft) - 4])

    # Colours: a hue moves the channels against each other and leaves their mean, the brightness, where it is.
    def tint(hue):                                                                                   # -> (c, 3, 1, 1)
        third = np.arange(3, dtype=np.float32)[:, None, None] / 3
        return np.float32(0.17) * f["saturation"][:, None] * np.cos(turn * (hue[:, None] - third))

    ground = (f["background"] + np.float32(0.04) * pattern.clip(-1, 1))[:, None] + tint(f["background_hue"])
    image = ground + share[:, None] * (f["brightness"][:, None] + tint(f["hue"]) - ground)          # (c, 3, S, S)
    noise = hashed(seed, split, noise_of, 2, draws=size * size).reshape(-1, 1, size, size)
    image += np.float32(0.04) * (noise - np.float32(0.5))
    return (image.clip(0, 1) * 255).round().astype(np.uint8), (share > 0.5).astype(np.uint8), labels, factors


SHIFTS = ("noise", "blur", "textures", "grey", "contrast", "sketch")


def unseen_textures(seed, split, index, size=48):
    """A pattern (c, S, S) in [-1, 1] of a kind that TEXTURES has not: rings, zigzags, bricks or a mosaic."""
    u, tiles = hashed(seed, split, index, 3, draws=5), 2 * hashed(seed, split, index, 4, draws=12 * 12) - 1
    u = u[:, :, None, None]                                  # (c, 5, 1, 1)
    kind, angle, period = 4 * u[:, 0], np.pi * u[:, 1], 7 + 4 * u[:, 2]
    py, px = np.meshgrid(*2 * [np.arange(size, dtype=np.float32)], indexing="ij")
    px, py = px - size * u[:, 3], py - size * u[:, 4]        # (c, S, S)   from a place of each image's own
    x, y = np.cos(angle) * px + np.sin(angle) * py, np.cos(angle) * py - np.sin(angle) * px
    rings = np.sin(2 * np.pi * np.hypot(px, py) / period)
    zigzags = np.sin(2 * np.pi * (y + np.abs(x % (2 * period) - period)) / period)
    joints = np.minimum(y % period, (x + period * (y // period % 2)) % (2 * period))         # between rows and bricks
    tile = np.arange(size) * 12 // size
    mosaic = tiles.reshape(-1, 12, 12)[:, tile][:, :, tile]
    return np.select([kind < 1, kind < 2, kind < 3], [2 * rings, 2 * zigzags, 1.6 * joints - 2.2], mosaic).clip(-1, 1)


def shift_shapes(shift, seed, split, index, max_rotation=15.0):
    """draw_shapes seen in a way that no training image is (one of SHIFTS): class, place and size of the object stay.
    What is drawn at random follows from (seed, split, index), so every run meets the same images."""
    from torchvision.transforms.v2 import functional as VF
    number, plain = ("train", "val").index(split), dict(texture=np.zeros(len(index)))
    images, masks, labels, factors = draw_shapes(
        seed, split, index, max_rotation, change=plain if shift == "textures" else None)
    x, inside, size = torch.from_numpy(images) / 255, torch.from_numpy(masks)[:, None].float(), images.shape[-1]
    if shift == "noise":                                     # of each channel apart, as wide as the contrast
        x = x + 0.9 * (torch.from_numpy(hashed(seed, number, index, 3, draws=3 * size**2)).view(x.shape) - 0.5)
    elif shift == "blur":
        x = VF.gaussian_blur(x, [13, 13], [2.5, 2.5])
    elif shift == "textures":                                # three times the contrast of the ones in training
        x = x + 0.12 * (1 - inside) * torch.from_numpy(unseen_textures(seed, number, index, size)).float()[:, None]
    elif shift == "grey":
        x = VF.rgb_to_grayscale(x, num_output_channels=3)
    elif shift == "contrast":
        x = 0.5 + 0.2 * (x - 0.5)
    elif shift == "sketch":                                  # a pencil line where the mask begins, on white paper
        line = F.max_pool2d(inside, 3, 1, 1) + F.max_pool2d(-inside, 3, 1, 1)                # 1 on the edge, else 0
        x = VF.gaussian_blur(0.95 - 0.75 * line, [3, 3], [0.5, 0.5]).expand_as(x)
    else:
        raise UserError(f"shapes have no shift {shift!r}: there are shapes:{', shapes:'.join(SHIFTS)}")
    return (x.clip(0, 1) * 255).round().byte().numpy(), masks, labels, factors


class Shapes(InMemory):
    """Ten shapes on regular backgrounds: no files, no download, and every factor behind an image is known. Drawn at
    start-up in seconds, 83 MB. max_rotation=180 is the variant for asking what a code makes of rotation; shift, one of
    SHIFTS, shows the same objects in another way, for asking what a classifier hangs on."""

    SIZES, native_size = {"train": 12_000, "val": 2_000}, 48

    def __init__(self, split, transform=None, seed=0, limit=None, *, count=None, max_rotation=15.0, pictures=0,
                 shift=None):
        # --seed drives crops, masks and weights. The pictures stay as they are, like any other data set's; another
        # number for `pictures` draws others.
        super().__init__(f"shapes:{shift}" if shift else "shapes", split, transform, seed)
        self.count, self.max_rotation, self.pictures = count or self.SIZES[split], max_rotation, pictures
        self.shift = shift
        self.count = min(limit or self.count, self.count)
        self.classes = list(SHAPES)
        self.labels = torch.from_numpy(self.arrays["labels"])                # (n,)

    def load(self):
        def draw(start):
            index = np.arange(start, min(start + 250, self.count))
            which = self.pictures, self.split, index, self.max_rotation
            return shift_shapes(self.shift, *which) if self.shift else draw_shapes(*which)

        with ThreadPoolExecutor(os.cpu_count()) as pool:     # 250 at a time stay in a core's cache
            images, masks, labels, factors = zip(*pool.map(draw, range(0, self.count, 250)))
        factors = {name: np.concatenate([part[name] for part in factors]) for name in factors[0]}
        return dict(images=np.concatenate(images), masks=np.concatenate(masks), labels=np.concatenate(labels),
                    factors=factors)

    def masks(self, index):
        """Which pixels are the object's: (S, S) uint8, or (m, S, S) for several indices."""
        return torch.from_numpy(self.arrays["masks"][index])

    @property
    def factors(self):
        """What each image was drawn from: {"scale": (n,), "rotation": (n,) degrees, "x", "y": pixels, ...}."""
        return self.arrays["factors"]


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


# -------------------------------------------------------------------------------------------------------- transforms
class RandomCrop:
    """A window of random area (`scale` of the image) and aspect (3/4 to 4/3; ten tries, then the central crop), resized
    (bicubic) once to each of `sizes`; then flipped with probability `flip`. One tensor for one size, else a tuple.
    Of a square image a scale of 1 leaves nothing to draw: ten tries miss the aspect, then it is taken whole."""

    def __init__(self, sizes, scale, flip):
        from torchvision.transforms import v2
        self.window, self.sizes, self.flip = v2.RandomResizedCrop(sizes[0], scale), sizes, flip

    def __call__(self, image):
        from torchvision.transforms.v2 import functional as VF
        whole = self.window.scale[0] == 1 and image.shape[-2] == image.shape[-1]
        window = dict(top=0, left=0, height=image.shape[-2], width=image.shape[-1]) if whole else (
            self.window.make_params([image]))
        views = [VF.resized_crop(image, **window, size=[size, size], **BICUBIC) for size in self.sizes]
        if torch.rand(()) < self.flip:
            views = [view.flip(-1) for view in views]
        return views[0] if len(views) == 1 else tuple(views)


def vqkd_transform(size, scale=(0.08, 1.0), flip=0.5):
    """Stage 1: random resized crop -> flip. No colour jitter."""
    return RandomCrop([size], scale, flip)


def jitter(image, strength):
    """Brightness, contrast and saturation of an image (3, H, W) uint8, each times U(1 - strength, 1 + strength), in
    random order. Contrast is the distance from the image's mean grey, saturation that from the pixel's own grey.

    Written out, as this is most of the loader's work: five times faster than torchvision's on 500 x 375 pixels, since
    numbers become bytes once. Differs from the recipe, which rounds after each of the three: by a few levels."""
    order, factors = torch.randperm(3).tolist(), (1 + strength * (2 * torch.rand(3) - 1)).tolist()
    x = image.to(torch.float32, memory_format=torch.contiguous_format)
    for which in order:
        factor = factors[which]
        if which == 0:
            x.mul_(factor)
        else:
            grey = 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]            # (H, W)
            x.mul_(factor).add_(grey.mean() if which == 1 else grey, alpha=1 - factor)
        x.clamp_(0, 255)
    return x.round_().to(torch.uint8)


class MIMTransform:
    """Stage 2: colour jitter of the WHOLE image (no hue) -> flip -> ONE window, resized for the backbone and for the
    tokenizer, so that patch i is the same place in both; where both take one size, one tensor serves both."""

    def __init__(self, sizes, scale, color_jitter, flip):
        self.color_jitter, self.flip, self.crop = color_jitter, flip, RandomCrop(sizes, scale, 0.0)

    def __call__(self, image):
        if self.color_jitter:
            image = jitter(image, self.color_jitter)
        if torch.rand(()) < self.flip:
            image = image.flip(-1)
        return self.crop(image)


def mim_transform(size, tokenizer_size=None, scale=(0.2, 1.0), color_jitter=0.4, flip=0.5):
    return MIMTransform([size] if tokenizer_size in (None, size) else [size, tokenizer_size], scale, color_jitter, flip)


def posterize(image, bits, **_):
    """timm asks for 0 bits at magnitude 10: black, as Pillow made it when the authors ran this. Pillow 13 refuses 0."""
    from PIL import Image, ImageOps
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


class FinetuneTransform:
    """Stage 3: random resized crop -> flip -> RandAugment -> erasing. Result: uint8 without erasing, else float32.

    RandAugment is timm's, as the authors call it (moves of up to 0.45 of the side, holes filled with the mean colour,
    bicubic): torchvision's magnitude 9 is another strength. Erasing (one box of 2 to 33 % of the area, aspect 0.3 to
    1/0.3) sets pixels to N(0, 1) AFTER mean and std are taken off: mean + std * N(0, 1) where images are in [0, 1]."""

    def __init__(self, size, scale=(0.08, 1.0), randaugment="rand-m9-mstd0.5-inc1", erasing=0.25, flip=0.5):
        from torchvision.transforms import v2
        self.crop, self.augment, self.erasing = RandomCrop([size], scale, flip), None, erasing
        if randaugment:
            from timm.data.auto_augment import rand_augment_transform
            fill = tuple(round(255 * m) for m in IMAGENET_MEAN)
            self.augment = rand_augment_transform(        # 3: bicubic, in Pillow's numbers
                randaugment, dict(translate_pct=0.45, img_mean=fill, interpolation=3))
            for op in self.augment.ops:
                if op.name == "PosterizeIncreasing":
                    op.aug_fn = posterize
        self.box = v2.RandomErasing(1.0, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random")

    def __call__(self, image):
        from torchvision.transforms.v2 import functional as VF
        image = self.crop(image)
        if self.augment:
            image = VF.pil_to_tensor(self.augment(VF.to_pil_image(image)))
        if not self.erasing:
            return image
        image = image.float() / 255
        if torch.rand(()) < self.erasing:
            box = self.box.make_params([image])              # i, j, h, w, and v: N(0, 1) noise (3, h, w)
            if box["v"] is not None:
                mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
                image = VF.erase(image, **{**box, "v": mean + std * box["v"]})
        return image


finetune_transform = FinetuneTransform


class EvalTransform:
    """Resize the shorter side to 256/224 of `size` (bicubic) -> crop the centre; from 384 on straight to size x size.

    Differs from the recipe for images of at most 64 px a side (shapes, CIFAR): they are shown whole, since their
    objects fill them to the edge; and one that has the size already is left untouched."""

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        size, whole = [self.size, self.size], self.size >= 384 or max(image.shape[-2:]) <= 64
        if whole and list(image.shape[-2:]) == size:
            return image
        from torchvision.transforms.v2 import functional as VF
        if whole:
            return VF.resize(image, size, **BICUBIC)
        longest = 8 * min(image.shape[-2:])                  # of a strip, say 20,000 x 10, the crop shows the middle:
        if max(image.shape[-2:]) > longest:                  # enlarged as a whole it would fill the memory
            image = VF.center_crop(image, [min(side, longest) for side in image.shape[-2:]])
        return VF.center_crop(VF.resize(image, [self.size * 256 // 224], **BICUBIC), size)


eval_transform = EvalTransform


# ------------------------------------------------------------------------------------------------------ segmentation
IGNORE = 255             # a pixel with this label counts neither in a loss nor in a score


def fit_size(height, width, long, short):
    """The largest size of this aspect whose longer side is at most `long` and whose shorter side at most `short`."""
    scale = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def saturate(x, factor):
    """Multiply the saturation (value - least) / value of HSV, value being the largest channel, by `factor`, to 1 at
    most, hue and value unchanged: every channel's distance from the value grows by the factor.  x (3, H, W) float"""
    value, least = x.amax(dim=0, keepdim=True), x.amin(dim=0, keepdim=True)              # (1, H, W)
    return value - (value / (value - least).clamp(min=1e-6)).clamp(max=factor) * (value - x)


def distort(image):
    """Photometric distortion of an image (3, H, W) uint8; each of the four with probability 1/2, in values of 0 to 255:
    brightness + U(-32, 32); contrast x U(0.5, 1.5), here or, by a coin, last; saturation x U(0.5, 1.5); hue + up to 18
    of 180 steps either way. Recipe, not in the paper."""
    from torchvision.transforms.v2 import functional as VF

    def coin():
        return torch.rand(()).item() < 0.5

    def uniform(low, high):
        return low + (high - low) * torch.rand(()).item()

    def contrast(x):
        return (x * uniform(0.5, 1.5)).clamp(0, 255) if coin() else x

    x = image.float()                    # Differs from the recipe: it rounds to bytes after each of the four, we once
    if coin():
        x = (x + uniform(-32, 32)).clamp(0, 255)
    contrast_first = coin()
    if contrast_first:
        x = contrast(x)
    if coin():
        x = saturate(x, uniform(0.5, 1.5))
    if coin():
        x = 255 * VF.adjust_hue(x / 255, int(torch.randint(-18, 18, ())) / 180)
    if not contrast_first:
        x = contrast(x)
    return x.round().clamp(0, 255).to(torch.uint8)


class SegmentTransform:
    """Stage 3c, image and label map alike: resize to fit (4 size x r, size x r) with r ~ U(1/jitter, jitter) -> crop of
    size x size -> flip -> photometric distortion of the image -> pad on the right and at the bottom.

    Base: size 512, so (2048 r, 512 r), and jitter 2. A crop that shows one class only, or one class on `cat_max` of
    its labelled pixels or more, is drawn again, ten times at most. Recipe, not in the paper.
    Differs from the recipe, which pads with 0 after normalising, that is, with the mean colour: we pad bytes with the
    mean colour's nearest byte (0.01 at most after normalising), so that images travel as bytes."""

    def __init__(self, size, jitter=2.0, cat_max=0.75, flip=0.5, distortion=True):
        self.size, self.jitter, self.cat_max, self.flip, self.distortion = size, jitter, cat_max, flip, distortion

    def __call__(self, image, labels):
        """image (3, H, W) uint8, labels (H, W) uint8 -> the same of size x size"""
        r = 1 / self.jitter + (self.jitter - 1 / self.jitter) * torch.rand(()).item()
        size = fit_size(*labels.shape, 4 * self.size * r, self.size * r)
        if size != tuple(labels.shape):
            from torchvision.transforms.v2 import functional as VF
            # Bilinear without antialiasing, nearest by rounding down: as OpenCV's, which the authors use.
            image = VF.resize(image, size, BILINEAR, antialias=False)
            labels = VF.resize(labels[None], size, NEAREST)[0]
        top, left = self.draw(labels)
        image = image[:, top:top + self.size, left:left + self.size]
        labels = labels[top:top + self.size, left:left + self.size]
        if torch.rand(()).item() < self.flip:
            image, labels = image.flip(-1), labels.flip(-1)
        return self.pad(distort(image) if self.distortion else image, labels)

    def draw(self, labels):
        """Corner (top, left) of a crop that fulfils cat_max, or of the tenth after the first."""
        room = [max(side - self.size, 0) for side in labels.shape]
        for tries in range(11):
            top, left = (int(torch.randint(r + 1, ())) for r in room)
            crop = labels[top:top + self.size, left:left + self.size]
            if tries == 10 or not any(room) or self.varied(crop):        # the tenth is taken unseen
                return top, left

    def varied(self, labels):
        """At least two classes, and none of them on cat_max of the labelled pixels or more."""
        counts = labels[labels != IGNORE].bincount().double()
        return bool((counts > 0).sum() > 1 and counts.max() / counts.sum() < self.cat_max)

    def pad(self, image, labels):
        height, width = labels.shape
        if (height, width) == (self.size, self.size):
            return image.contiguous(), labels.contiguous()
        mean = (255 * torch.tensor(IMAGENET_MEAN)).round().to(torch.uint8).view(3, 1, 1)
        canvas = mean.repeat(1, self.size, self.size)
        ground = torch.full((self.size, self.size), IGNORE, dtype=torch.uint8)
        canvas[:, :height, :width], ground[:height, :width] = image, labels
        return canvas, ground


segment_transform = SegmentTransform


class Scenes(Images):
    """Images with a class for every pixel: ds[(epoch, index)] -> (image (3, H, W), label map (H, W)), both uint8. The
    transform, which has to move both alike, gets both. A subclass says what pair(index) is."""

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, int(key))
        image, labels = self.pair(index)
        if self.transform is not None:
            seed_all(self.seed, epoch, index)
            image, labels = self.transform(image, labels)
        return image, labels


class ShapeScenes(Scenes):
    """The built-in shapes with their masks: label 0 is the background, which counts as a class, 1 to 10 the shapes."""

    native_size, background = 48, True

    def __init__(self, split, transform=None, seed=0, limit=None):
        super().__init__("shapes", split, transform, seed)
        self.shapes = Shapes(split, None, seed, limit)
        self.classes = ["background", *SHAPES]

    def pair(self, index):
        return self.shapes.image(index), self.shapes.masks(index) * (int(self.shapes.labels[index]) + 1)

    def __len__(self):
        return len(self.shapes)


class SceneFolder(Scenes):
    """ADE20K's layout: images/training/NAME.jpg with annotations/training/NAME.png, and validation alike.

    An annotation is a picture with one channel of class numbers: 1 to `classes`, 0 and 255 for pixels without a label.
    They become 0 to classes - 1 and IGNORE. `limit` images are spread evenly over the sorted names. Names of classes
    come from ADE20K's objectInfo150.txt where it lies beside the two folders."""

    FOLDERS, background = {"train": "training", "val": "validation"}, False

    def __init__(self, root, split, classes, transform=None, seed=0, limit=None):
        super().__init__(str(root), split, transform, seed)
        self.classes = class_names(root, classes)
        images, maps = (os.path.join(root, kind, self.FOLDERS[split]) for kind in ("images", "annotations"))
        paths = find_images(images)
        if not paths:
            raise UserError(f"{shown(images)} holds no image: label maps want ADE20K's layout, images/{{training,"
                            f"validation}}/NAME.jpg and annotations/{{training,validation}}/NAME.png")
        kept = np.linspace(0, len(paths) - 1, min(limit or len(paths), len(paths))).round().astype(int)
        paths = [paths[i] for i in kept]
        targets = [os.path.join(maps, os.path.splitext(os.path.relpath(path, images))[0] + ".png") for path in paths]
        for path, target in zip(paths, targets):
            if not os.path.isfile(target):
                raise UserError(f"there is no annotation {shown(target)} for {shown(path)}: add it, or remove the "
                                f"image")
        self.paths = np.array([os.fsencode(path) for path in paths])     # arrays of bytes, as in Folder
        self.targets = np.array([os.fsencode(target) for target in targets])

    def title(self, index):
        return shown(os.fsdecode(self.paths[index]))

    def pair(self, index):
        path, target = os.fsdecode(self.paths[index]), os.fsdecode(self.targets[index])
        image, labels = read_image(path), read_labels(target, len(self.classes))
        if image.shape[1:] != labels.shape:
            raise UserError(f"{shown(target)} is {labels.shape[1]}x{labels.shape[0]}, its image {shown(path)} "
                            f"{image.shape[2]}x{image.shape[1]}: they must have the same size")
        return image, labels

    def look(self, index):
        """As in Folder. Sizes or class numbers that do not fit are no damage: they end a run all the same."""
        read_image(os.fsdecode(self.paths[index]), draft=True)
        with open_picture(os.fsdecode(self.targets[index]), "annotation") as picture:
            picture.load()

    def __len__(self):
        return len(self.paths)


def class_names(root, count):
    """The names in ADE20K's objectInfo150.txt (first of the synonyms), if it has `count` of them, else numbers."""
    try:
        with open(os.path.join(root, "objectInfo150.txt"), encoding="utf-8") as f:
            names = [line.rstrip("\n").split("\t")[-1].split(",")[0].strip() for line in f][1:]      # first, the header
    except (OSError, ValueError):                            # ValueError: not UTF-8
        names = []
    return names if len(names) == count else [f"class {i + 1}" for i in range(count)]


def read_labels(path, classes):
    """An annotation -> labels (H, W) uint8. ADE20K's rule: 0 becomes IGNORE, any other number one less, 255 stays."""
    with open_picture(path, "annotation") as picture:
        mode, numbers = picture.mode, np.array(picture)
    if mode not in ("L", "P", "I", "I;16"):
        raise UserError(f"{shown(path)} has pixels of kind {mode}: an annotation has one channel of class numbers")
    beyond = numbers[(numbers > classes) & (numbers != IGNORE)]
    if beyond.size:
        raise UserError(f"{shown(path)} holds label {beyond.max()}, but there are {classes} classes: give --classes N")
    labels = np.where((numbers == 0) | (numbers == IGNORE), IGNORE, numbers.astype(np.int64) - 1)
    return torch.from_numpy(labels.astype(np.uint8))


def open_scenes(name, split, transform=None, *, classes=None, limit=None, seed=0):
    """The segmentation data set behind --data: "shapes", or a folder in ADE20K's layout; split "train" or "val"."""
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} leaves no image: give 1 or more")
    if name == "shapes":
        if classes not in (None, 1 + len(SHAPES)):
            raise UserError(f"--classes {classes}: shapes have {1 + len(SHAPES)} with the background; leave it out")
        return ShapeScenes(split, transform, seed, limit)
    if name in ("cifar10", "cifar100") or not os.path.isdir(name):
        reason = "these images have no label maps" if name in ("cifar10", "cifar100") else "there is no such folder"
        raise UserError(f"--data {shown(name)}: {reason}; give shapes or a folder with images/training, "
                        f"images/validation, annotations/training, annotations/validation (ADE20K: "
                        f"ADEChallengeData2016.zip)")
    return SceneFolder(name, split, classes or 150, transform, seed, limit)


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


train_batches = TrainBatches


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
