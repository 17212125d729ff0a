"""Images in, batches out: the built-in shapes, CIFAR, image folders, their transforms, and who gets which image when.

Between functions an image is uint8 RGB (3, H, W); every random choice about it follows from (seed, epoch, index), so the
order of workers, the number of processes and a killed run change nothing.
"""
import math
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import engine

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")


# -------------------------------------------------------------------------------------------------- built-in: shapes
SHAPES = ("disc", "square", "triangle", "star", "cross", "ring", "crescent", "heart", "hourglass", "arrow")
TEXTURES = ("plain", "gradient", "stripes", "checks", "dots")
SHAPES_SIZE, SHAPES_COUNT = 48, {"train": 12000, "val": 2000}


def hash_uniform(seed, split, index, draw):
    """A number in [0, 1) that is a pure function of its four integers (splitmix64): no generator, so no order."""
    with np.errstate(over="ignore"):
        x = np.asarray(index, dtype=np.uint64) + np.uint64(draw) * np.uint64(0x100000001) \
            + np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(split) * np.uint64(0xD1B54A32D192ED03)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 0x9E3779B97F4A7C15)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) / 2**53


def signed_distance(shape, x, y):
    """About the distance to the outline in units of the object's half-width, negative inside.  x, y: (n, H, W), y down."""
    r = np.hypot(x, y)
    if shape == "disc":
        return r - 0.95
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.8
    if shape == "triangle":
        return np.maximum(0.866 * np.abs(x) - 0.5 * y - 0.48, y - 0.75)
    if shape == "star":
        sector = np.pi / 5
        angle = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)       # folded into half an arm
        px, py = r * np.cos(angle), r * np.sin(angle)
        return (px - 1.0) * 0.527 + py * 0.85       # the line from the tip (1, 0) to the notch between two arms
    if shape == "cross":
        a, b = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(a - 0.95, b - 0.3), np.maximum(a - 0.3, b - 0.95))
    if shape == "ring":
        return np.abs(r - 0.7) - 0.24
    if shape == "crescent":
        return np.maximum(r - 0.95, 0.72 - np.hypot(x - 0.42, y))
    if shape == "heart":
        # Two discs of radius 0.5; their lower common tangents meet at (0, 0.95); between the discs, a wedge.
        a, b = np.abs(x), y + 0.32
        return np.minimum(np.hypot(a - 0.42, b) - 0.5, np.maximum(0.743 * (a - 0.42) + 0.669 * b - 0.5, -b))
    if shape == "hourglass":
        return np.maximum(np.abs(y) - 0.9, (np.abs(x) - 0.85 * np.abs(y) - 0.08) * 0.76)
    if shape == "arrow":
        head = np.maximum(0.75 * np.abs(x) - 0.66 * (y + 0.95), y + 0.05)
        return np.minimum(head, np.maximum(np.abs(x) - 0.27, np.abs(y - 0.4) - 0.55))
    raise ValueError(f"no shape called {shape!r}")


def draw_shapes(seed, split, index, full_rotation=False):
    """Images `index` (n,) of a split: uint8 images (n, 3, 48, 48), uint8 masks (n, 48, 48), class (n,), factors."""
    draws = iter(range(100))
    u = lambda: hash_uniform(seed, 0 if split == "train" else 1, index, next(draws)).astype(np.float32)   # noqa: E731
    n, size = len(index), SHAPES_SIZE
    label = (u() * len(SHAPES)).astype(np.int64)
    scale = 0.6 + 0.35 * u()                                                 # of the half-width
    rotation = (u() * 2 - 1) * (math.pi if full_rotation else math.pi / 12)
    room = 1 - scale * 0.9
    cx, cy = (u() * 2 - 1) * room, (u() * 2 - 1) * room                      # centre, in half-widths from the middle
    hue, saturation = u(), 0.25 + 0.5 * u()
    background_hue = u()
    # Object and background are clearly apart in brightness, either one the brighter: no pixel is bright for one class.
    gap, polarity, middle = 0.3 + 0.3 * u(), u() < 0.5, 0.4 + 0.2 * u()
    bright = np.where(polarity, middle + gap / 2, middle - gap / 2)
    dark = np.where(polarity, middle - gap / 2, middle + gap / 2)
    texture = (u() * len(TEXTURES)).astype(np.int64)
    direction, period, phase = u() * 2 * math.pi, 5 + 6 * u(), u() * 2 * math.pi

    grid = ((np.arange(size, dtype=np.float32) + 0.5) / size) * 2 - 1        # pixel centres in [-1, 1]
    gy, gx = np.meshgrid(grid, grid, indexing="ij")
    column = lambda a: a[:, None, None]                                      # noqa: E731   (n,) -> (n, 1, 1)
    dx, dy = (gx - column(cx)) / column(scale), (gy - column(cy)) / column(scale)
    c, s = column(np.cos(rotation)), column(np.sin(rotation))
    x, y = c * dx + s * dy, c * dy - s * dx
    distance = np.empty((n, size, size), np.float32)
    for k, name in enumerate(SHAPES):
        chosen = label == k
        distance[chosen] = signed_distance(name, x[chosen], y[chosen])
    cover = np.clip(0.5 - distance * column(scale) * size / 2, 0, 1)         # one pixel of anti-aliasing

    along = gx * column(np.cos(direction)) + gy * column(np.sin(direction))
    across = gy * column(np.cos(direction)) - gx * column(np.sin(direction))
    wave = np.sin(along * column(math.pi * period) + column(phase))
    weave = np.sin(across * column(math.pi * period))
    pattern = np.select([column(texture == k) for k in range(len(TEXTURES))],
                        [0 * wave, along, np.tanh(3 * wave), np.tanh(4 * wave * weave), np.tanh(4 * (wave * weave - 0.5))])

    def colour(hue, brightness, saturation):                                 # (n,) each -> (n, 3)
        tint = np.cos(2 * math.pi * (hue[:, None] - np.array([0, 1 / 3, 2 / 3], np.float32)))
        return brightness[:, None] + 0.22 * saturation[:, None] * tint

    front = colour(hue, bright, saturation)[:, :, None, None]
    back = colour(background_hue, dark, saturation)[:, :, None, None] + 0.05 * pattern[:, None]
    pixels = back + cover[:, None] * (front - back)
    # Pixel noise is hashed, too: three 21-bit pieces of one 64-bit number would do, a cheap triangle wave is enough.
    k = np.asarray(index, np.uint64)[:, None] * np.uint64(3 * size * size) + np.arange(3 * size * size, dtype=np.uint64)
    noise = hash_uniform(seed + 1, 0 if split == "train" else 1, k, 99).reshape(n, 3, size, size).astype(np.float32)
    pixels = np.clip(pixels + 0.06 * (noise - 0.5), 0, 1)
    factors = dict(colour=hue, brightness=bright, rotation=rotation, scale=scale, x=cx, y=cy, texture=texture)
    return (pixels * 255).round().astype(np.uint8), (cover > 0.5).astype(np.uint8), label, factors


class Shapes(Dataset):
    """Ten shapes on textured backgrounds, drawn at start-up in a few seconds and kept in memory (83 MB)."""

    classes, native_size, name = list(SHAPES), SHAPES_SIZE, "shapes"

    def __init__(self, split, transform=None, seed=0, limit=None, full_rotation=False):
        self.split, self.transform, self.seed, self.full_rotation = split, transform, seed, full_rotation
        self.count = min(limit or SHAPES_COUNT[split], SHAPES_COUNT[split])
        # The pictures themselves are the same for every --seed (which drives crops, masks and weights), as a data set's.
        drawn = [draw_shapes(0, split, np.arange(i, min(i + 1000, self.count)), full_rotation)
                 for i in range(0, self.count, 1000)]
        images, masks, labels, factors = zip(*drawn)
        # In shared memory, so that worker processes read it instead of copying it.
        self.images = torch.from_numpy(np.concatenate(images)).share_memory_()           # (n, 3, 48, 48) uint8
        self.masks = torch.from_numpy(np.concatenate(masks)).share_memory_()             # (n, 48, 48) uint8
        self.labels = torch.from_numpy(np.concatenate(labels))                           # (n,)
        self.factors = {k: np.concatenate([f[k] for f in factors]) for k in factors[0]}

    def __len__(self):
        return self.count

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return transformed(self.images[index], self.transform, self.seed, epoch, index), int(self.labels[index])


# ------------------------------------------------------------------------------------------------- CIFAR and folders
def transformed(image, transform, seed, epoch, index):
    """Apply a transform whose random draws are those of (seed, epoch, index), whichever library makes them."""
    if transform is None:
        return image
    engine.seed_all(seed, epoch, index)
    return transform(image)


class Cifar(Dataset):
    """CIFAR-10 or -100 in memory, read by torchvision from the python files it has unpacked under `data_dir`."""

    native_size = 32

    def __init__(self, name, split, transform=None, data_dir="datasets", download=False, seed=0, limit=None):
        from torchvision.datasets import CIFAR10, CIFAR100
        kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
        try:
            source = kind(data_dir, train=split == "train", download=download)
        except (RuntimeError, OSError) as error:
            raise engine.UserError(f"{name} is not under {data_dir} ({str(error).splitlines()[0]}): add --download, or unpack "
                                   f"{kind.filename} from www.cs.toronto.edu/~kriz/cifar.html there") from error
        self.name, self.transform, self.seed, self.classes = name, transform, seed, list(source.classes)
        self.images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()[:limit].clone().share_memory_()
        self.labels = torch.tensor(source.targets)[:limit]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return transformed(self.images[index], self.transform, self.seed, epoch, index), int(self.labels[index])


def read_image(path):
    """Any picture Pillow reads -> uint8 RGB (3, H, W). One rule for all: turned upright by its EXIF note, first frame,
    16-bit scaled to 8, transparency laid over white, everything else as Pillow converts it to RGB."""
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") or image.mode == "F":
                image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise engine.UserError(f"cannot read the image {path} ({' '.join(str(error).split())}): remove or replace it") from error


def find_images(folder):
    """All picture files below a folder, sorted by path, so that every machine numbers them alike."""
    return sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_ENDINGS and p.is_file())


class Folder(Dataset):
    """Picture files with (or without) class numbers, read from disk when asked for."""

    native_size = None

    def __init__(self, name, paths, labels=None, classes=None, transform=None, seed=0):
        self.name, self.paths, self.classes, self.transform, self.seed = name, paths, classes, transform, seed
        self.labels = None if labels is None else torch.tensor(labels)
        self.names = [str(p) for p in paths]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        label = -1 if self.labels is None else int(self.labels[index])
        return transformed(read_image(self.paths[index]), self.transform, self.seed, epoch, index), label


def class_folder(root, split, transform, seed, limit):
    """root/split/CLASS/*: the classes are those of train, in alphabetical order."""
    classes = sorted(d.name for d in (root / "train").iterdir() if d.is_dir())
    here = sorted(d.name for d in (root / split).iterdir() if d.is_dir()) if (root / split).is_dir() else []
    if here != classes:
        odd = sorted(set(here) ^ set(classes))
        raise engine.UserError(f"{root / split} and {root / 'train'} must hold the same class folders; they differ in {odd[:5]}")
    paths, labels = [], []
    for number, name in enumerate(classes):
        found = find_images(root / split / name)
        if not found:
            raise engine.UserError(f"the class folder {root / split / name} holds no image: remove it or fill it")
        paths += found
        labels += [number] * len(found)
    if limit:                            # spread over the classes, which lie one after the other
        chosen = np.linspace(0, len(paths) - 1, min(limit, len(paths))).astype(int)
        paths, labels = [paths[i] for i in chosen], [labels[i] for i in chosen]
    return Folder(str(root), paths, labels, classes, transform, seed)


def plain_folder(root, split, transform, seed, limit):
    """Images at any depth, no labels. Where there is no val/ folder every 20th image is held out."""
    if (root / "train").is_dir() and (root / "val").is_dir():
        paths = find_images(root / split)
    else:
        paths = [p for i, p in enumerate(find_images(root)) if (i % 20 == 0) == (split == "val")]
    if not paths:
        raise engine.UserError(f"{root} holds no {split} images ({', '.join(IMAGE_ENDINGS)}): give a folder with at least 2 images")
    return Folder(str(root), paths[:limit], transform=transform, seed=seed)


def open_data(name, split, transform=None, *, data_dir="datasets", download=False, limit=None, seed=0, labelled=True):
    """The data set behind --data: "shapes", "cifar10", "cifar100" or a folder; split "train" or "val".

    ds[(epoch, index)] -> (transformed image, label), label -1 where there is none.
    """
    if name == "shapes":
        return Shapes(split, transform, seed, limit)
    if name in ("cifar10", "cifar100"):
        return Cifar(name, split, transform, data_dir, download, seed, limit)
    root = Path(name)
    if not root.is_dir():
        raise engine.UserError(f"there is no folder {root}: --data takes shapes, cifar10, cifar100 or a folder with train/CLASS/* "
                               f"and val/CLASS/* (ImageNet: image-net.org, unpacked that way)")
    if not labelled:
        return plain_folder(root, split, transform, seed, limit)
    if not (root / "train").is_dir():
        raise engine.UserError(f"{root} has no folder train/CLASS/*, which training with labels needs")
    return class_folder(root, split, transform, seed, limit)


def open_images(path, transform=None):
    """One picture, or all below a folder, in the order of their names."""
    path = Path(path)
    paths = [path] if path.is_file() else find_images(path)
    if not paths:
        raise engine.UserError(f"{path} is neither an image nor a folder that holds one")
    return Folder(str(path), paths, transform=transform)


# -------------------------------------------------------------------------------------------------------- transforms
def vqkd_transform(size, scale=(0.08, 1.0)):
    """Stage 1: random resized crop (aspect 3/4 to 4/3, bicubic), flip. No colour jitter."""
    from torchvision.transforms import InterpolationMode, v2
    return v2.Compose([v2.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC, antialias=True),
                       v2.RandomHorizontalFlip()])


class MIMTransform:
    """Stage 2: colour jitter on the WHOLE image (no hue), flip, ONE crop window resized once for each network, so that
    patch i of one view is patch i of the other. Where both networks take the same size, one tensor serves both."""

    def __init__(self, size, tokenizer_size, scale, color_jitter):
        from torchvision.transforms import v2
        jitter = [v2.ColorJitter(color_jitter, color_jitter, color_jitter)] if color_jitter else []
        self.first = v2.Compose(jitter + [v2.RandomHorizontalFlip()])
        self.sizes, self.scale = (size,) if size == tokenizer_size else (size, tokenizer_size), scale

    def __call__(self, image):
        from torchvision.transforms import InterpolationMode, v2
        image = self.first(image)
        window = v2.RandomResizedCrop(1, self.scale).make_params([image])
        views = [v2.functional.resized_crop(image, **window, size=[s, s], interpolation=InterpolationMode.BICUBIC, antialias=True)
                 for s in self.sizes]
        return views[0] if len(views) == 1 else tuple(views)


def mim_transform(size, tokenizer_size=None, scale=(0.2, 1.0), color_jitter=0.4):
    return MIMTransform(size, tokenizer_size or size, scale, color_jitter)


class EvalTransform:
    """Resize the shorter side to 256/224 of `size` (bicubic), crop the centre; from 384 on straight to the size.

    Differs from the recipe for images that already have the size asked for (shapes, CIFAR): they stay as they are.
    """

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        from torchvision.transforms import InterpolationMode, v2
        if tuple(image.shape[-2:]) == (self.size, self.size):
            return image
        bicubic = dict(interpolation=InterpolationMode.BICUBIC, antialias=True)
        if self.size >= 384:
            return v2.functional.resize(image, [self.size, self.size], **bicubic)
        image = v2.functional.resize(image, [int(self.size * 256 / 224)], **bicubic)
        return v2.functional.center_crop(image, [self.size, self.size])


def eval_transform(size):
    return EvalTransform(size)


class FinetuneTransform:
    """Stage 3: random resized crop, flip, RandAugment, random erasing, in the order and strength of the recipe.

    RandAugment is timm's rand-m9-mstd0.5-inc1, as the authors call it: torchvision's magnitude 9 is another strength.
    Erasing fills a box with N(0, 1) noise after mean and std, which is mean + std * N(0, 1) before them: so the result is
    float32 in the space of [0, 1] images, but not bounded by it.
    """

    def __init__(self, size, scale=(0.08, 1.0), randaugment="rand-m9-mstd0.5-inc1", erasing=0.25, flip=0.5):
        from torchvision.transforms import InterpolationMode, v2
        from model import IMAGENET_MEAN, IMAGENET_STD
        self.crop = v2.Compose([v2.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC, antialias=True),
                                v2.RandomHorizontalFlip(flip)])
        self.augment = None
        if randaugment:
            from timm.data.auto_augment import rand_augment_transform
            self.augment = rand_augment_transform(randaugment, dict(
                translate_const=int(size * 0.45), img_mean=tuple(round(255 * m) for m in IMAGENET_MEAN), interpolation=3))
        self.erase = v2.Compose([v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
                                 v2.RandomErasing(erasing, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random"),
                                 v2.Normalize([-m / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD)], [1 / s for s in IMAGENET_STD])])
        self.erasing = erasing

    def __call__(self, image):
        from torchvision.transforms import v2
        image = self.crop(image)
        if self.augment:
            image = v2.functional.pil_to_tensor(self.augment(v2.functional.to_pil_image(image)))
        if not self.erasing:
            return image
        return self.erase(image.float() / 255)


def finetune_transform(size, scale=(0.08, 1.0), randaugment="rand-m9-mstd0.5-inc1", erasing=0.25, flip=0.5):
    return FinetuneTransform(size, scale, randaugment, erasing, flip)


# ---------------------------------------------------------------------------------------------- who gets which image
def train_batches(n, batch_size, steps, start_step=0, rank=0, world_size=1, accumulation=1, seed=0):
    """Yields, for every step from start_step on, `accumulation` lists of (epoch, index): this rank's micro-batches.

    The order of an epoch is a function of (seed, epoch); its last incomplete batch is dropped. A rank holds a contiguous
    slice of the batch and a micro-batch a slice of that, so gathering restores the order of a single process.
    """
    return TrainBatches(n, batch_size, steps, start_step, rank, world_size, accumulation, seed)


class TrainBatches:
    def __init__(self, n, batch_size, steps, start_step, rank, world_size, accumulation, seed):
        self.n, self.batch_size, self.steps, self.start_step = n, batch_size, steps, start_step
        self.rank, self.world_size, self.accumulation, self.seed = rank, world_size, accumulation, seed

    def __len__(self):
        return (self.steps - self.start_step) * self.accumulation

    def __iter__(self):
        per_epoch, known = self.n // self.batch_size, None
        micro = self.batch_size // self.world_size // self.accumulation
        for step in range(self.start_step, self.steps):
            epoch = step // per_epoch
            if epoch != known:
                order = torch.randperm(self.n, generator=torch.Generator().manual_seed(1000003 * self.seed + epoch)).tolist()
                known = epoch
            first = step % per_epoch * self.batch_size + self.rank * micro * self.accumulation
            for k in range(self.accumulation):
                yield [(epoch, i) for i in order[first + k * micro:first + (k + 1) * micro]]


def eval_batches(n, batch_size, rank=0, world_size=1):
    """Lists of indices: this rank's contiguous share, every image exactly once over all ranks, no padding."""
    first, last = n * rank // world_size, n * (rank + 1) // world_size
    return [list(range(i, min(i + batch_size, last))) for i in range(first, last, batch_size)]


def make_loader(dataset, batches, workers, device):
    """A DataLoader over ready-made batches; workers stay alive, and pages are pinned where a GPU fetches them."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, persistent_workers=workers > 0,
                      pin_memory=device.type == "cuda", worker_init_fn=one_thread if workers else None,
                      prefetch_factor=4 if workers else None)


def one_thread(worker):
    torch.set_num_threads(1)             # workers share the cores with the training step
