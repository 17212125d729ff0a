"""Segmentation data: images with a class for every pixel.
"""
import os

import numpy as np
import torch

from model import IMAGENET_MEAN
from support.files import UserError
from support.images import Images, find_images, open_picture, read_image, shown
from support.process import seed_all
from support.shapes import SHAPES, Shapes
from support.transforms import NEAREST, BILINEAR

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

    background = True

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
