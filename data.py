"""Images in, batches out: the built-in shapes, CIFAR, image folders, their transforms, and who gets which image when.

    open_data -> data set -> make_loader(train_batches or eval_batches) -> images (B, 3, H, W) uint8, labels (B,)

Between functions an image is uint8 RGB (3, H, W). Everything random follows from numbers one can write down: shape i
from (seed, split, i), the order of an epoch from (seed, epoch), the augmentation of a sample from (seed, epoch, index).
So the number of workers or processes and a killed run change nothing, and resuming needs no saved generator.

Read in this order: Images, draw_shapes, Cifar, Folder, the four transforms, TrainBatches.
"""
# Shapes used in this file:  n images in a data set, c images drawn in one pass, S side of a shapes image
import os

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as VF

import engine
from engine import UserError
from model import IMAGENET_MEAN, IMAGENET_STD

BICUBIC = dict(interpolation=InterpolationMode.BICUBIC, antialias=True)      # as Pillow's, which the authors use
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


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
            engine.seed_all(self.seed, epoch, index)
            image = self.transform(image)
        return image, -1 if self.labels is None else int(self.labels[index])


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
    """The data set behind --data: "shapes", "cifar10", "cifar100" or a folder; split "train" or "val".

    ds[(epoch, index)] -> (transformed image, label), label -1 where there is none. limit keeps so many images.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split is 'train' or 'val', not {split!r}")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} leaves no image: give 1 or more")
    if name == "shapes":
        return Shapes(split, transform, seed, limit)
    if name in ("cifar10", "cifar100"):
        return Cifar(name, split, transform, seed, limit, data_dir, download)
    if not os.path.isdir(name):
        raise UserError(f"--data {name}: there is no such folder; give shapes, cifar10, cifar100 or a folder with "
                        f"train/CLASS/* and val/CLASS/* (ImageNet: from image-net.org, laid out that way)")
    return Folder(name, split, transform, seed, limit, labelled)


# -------------------------------------------------------------------------------------------------- built-in: shapes
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


class Shapes(InMemory):
    """Ten shapes on regular backgrounds: no files, no download, and every factor behind an image is known. Drawn at
    start-up in seconds, 83 MB. max_rotation=180 is the variant for asking what a code makes of rotation."""

    SIZES, native_size = {"train": 12_000, "val": 2_000}, 48

    def __init__(self, split, transform=None, seed=0, limit=None, *, count=None, max_rotation=15.0, pictures=0):
        # --seed drives crops, masks and weights. The pictures stay as they are, like any other data set's; another
        # number for `pictures` draws others.
        super().__init__("shapes", split, transform, seed)
        self.count, self.max_rotation, self.pictures = count or self.SIZES[split], max_rotation, pictures
        self.count = min(limit or self.count, self.count)
        self.classes = list(SHAPES)
        self.labels = torch.from_numpy(self.arrays["labels"])                # (n,)

    def load(self):
        parts = [draw_shapes(self.pictures, self.split, np.arange(i, min(i + 250, self.count)), self.max_rotation)
                 for i in range(0, self.count, 250)]         # 250 at a time stay in the processor's cache
        images, masks, labels, factors = zip(*parts)
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


def read_image(path):
    """Any picture Pillow reads -> (3, H, W) uint8 RGB, by one rule: first frame, turned upright as its EXIF note says,
    16 bits scaled to 8, transparency laid over white, all else (grey, palette, CMYK) as Pillow converts it to RGB.

    Differs from the authors' loader, which drops transparency and shows whatever colour lies below it."""
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers of unknown range")
            if image.mode.startswith("I"):                   # 16-bit grey; "I" in older versions of Pillow
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
            if image.has_transparency_data:
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except Exception as error:                               # a broken file raises whatever its decoder stumbles over
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read the image {path} ({reason}): remove it or replace it") from error


def find_images(folder):
    """All picture files at any depth below a folder, sorted, so that every machine numbers them alike. Other files and
    hidden ones are passed over; folders that are links are followed."""
    return sorted(os.path.join(parent, file) for parent, _, files in os.walk(folder, followlinks=True) for file in files
                  if file.lower().endswith(IMAGE_ENDINGS) and not file.startswith("."))


def find_classes(root):
    """The class folders of root/train, sorted; root/val must have the same ones."""
    found = {}
    for split in ("train", "val"):
        folder = os.path.join(root, split)
        entries = os.scandir(folder) if os.path.isdir(folder) else []
        found[split] = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        if not found[split]:
            raise UserError(f"{root} has no class folders {split}/CLASS/*, which give the labels: put the images there")
    odd = sorted(set(found["train"]) ^ set(found["val"]))
    if odd:
        raise UserError(f"{root}/train and {root}/val must hold the same class folders, but only one of them has "
                        f"{', '.join(odd[:5])}: add or remove it")
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
                    raise UserError(f"the class folder {folder} holds no image: fill it, or remove it from both splits")
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
            raise UserError(f"{root} holds no image for {split or 'this'} ({' '.join(IMAGE_ENDINGS)}): check the name, "
                            f"or put images there (2 or more for training)")
        kept = np.linspace(0, len(paths) - 1, min(limit or len(paths), len(paths))).round().astype(int)
        self.labels = torch.tensor(labels)[kept] if labelled else None
        # One array of bytes: workers would copy a list of a million strings, page by page, just by counting references.
        self.paths = np.array([os.fsencode(paths[i]) for i in kept])

    @property
    def names(self):
        return [os.fsdecode(path) for path in self.paths]

    def image(self, index):
        return read_image(os.fsdecode(self.paths[index]))

    def __len__(self):
        return len(self.paths)


def open_images(path, transform=None):
    """One picture, or all at any depth below a folder, in the order of their names."""
    return Folder(path, None, transform, labelled=False)


# -------------------------------------------------------------------------------------------------------- transforms
class RandomCrop:
    """A window of random area (`scale` of the image) and aspect (3/4 to 4/3; ten tries, then the central crop), resized
    (bicubic) once to each of `sizes`; then flipped with probability `flip`. One tensor for one size, else a tuple."""

    def __init__(self, sizes, scale, flip):
        self.window, self.sizes, self.flip = v2.RandomResizedCrop(sizes[0], scale), sizes, flip

    def __call__(self, image):
        window = self.window.make_params([image])            # top, left, height, width
        views = [VF.resized_crop(image, **window, size=[size, size], **BICUBIC) for size in self.sizes]
        if torch.rand(()) < self.flip:
            views = [view.flip(-1) for view in views]
        return views[0] if len(views) == 1 else tuple(views)


def vqkd_transform(size, scale=(0.08, 1.0), flip=0.5):
    """Stage 1: random resized crop -> flip. No colour jitter."""
    return RandomCrop([size], scale, flip)


class MIMTransform:
    """Stage 2: colour jitter of the WHOLE image (no hue) -> flip -> ONE window, resized for the backbone and for the
    tokenizer, so that patch i is the same place in both; where both take one size, one tensor serves both."""

    def __init__(self, sizes, scale, color_jitter, flip):
        self.jitter = v2.ColorJitter(color_jitter, color_jitter, color_jitter) if color_jitter else None
        self.flip, self.crop = flip, RandomCrop(sizes, scale, 0.0)

    def __call__(self, image):
        if self.jitter:
            image = self.jitter(image)
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
        size = [self.size, self.size]
        if self.size >= 384 or max(image.shape[-2:]) <= 64:
            return image if list(image.shape[-2:]) == size else VF.resize(image, size, **BICUBIC)
        return VF.center_crop(VF.resize(image, [self.size * 256 // 224], **BICUBIC), size)


eval_transform = EvalTransform


# ---------------------------------------------------------------------------------------------- who gets which image
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
    first, last = n * rank // world_size, n * (rank + 1) // world_size
    return [list(range(i, min(i + batch_size, last))) for i in range(first, last, batch_size)]


def make_loader(dataset, batches, workers, device):
    """A DataLoader over ready-made batches. Workers stay alive; pages are pinned where a GPU fetches them."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, persistent_workers=workers > 0,
                      prefetch_factor=4 if workers else None, pin_memory=torch.device(device).type == "cuda",
                      generator=torch.Generator())           # its own, or it would draw from that of the training loop
