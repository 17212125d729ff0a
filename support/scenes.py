"""Semantic segmentation: images with a class for every pixel, their augmentation, a picture.

    open_scenes -> data set -> SegmentTransform -> image (3, S, S), labels (S, S), both uint8

A label is the number of a class, or IGNORE for a pixel without one.

Read in this order: SegmentTransform, distort, Scenes, read_labels, open_scenes.
"""
# Shapes:  H x W an image, S the side of a crop
import colorsys
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model import IMAGENET_MEAN
from support.files import UserError
from support.images import Images, find_images, open_picture, read_image, shown, spread
from support.positions import sides
from support.process import seed_all
from support.shapes import SHAPES, Shapes
from support.transforms import BILINEAR, NEAREST

IGNORE = 255             # a pixel with this label counts neither in a loss nor in a score
LARGEST_SHARE = 0.75     # of a crop's labelled pixels that one class may take; else another crop
FOLDERS = {"train": "training", "val": "validation"}         # ADE20K's names of the splits
NOT_SCENES = "cifar10", "cifar100"


# --- augmentation ---------------------------------------------------------------------------------
def fit_size(height, width, long, short):
    """The largest (height, width) of this aspect with sides of at most `long` and `short`."""
    scale = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


class SegmentTransform:
    """Training images and their labels: resize, crop, flip, distort the colours, pad.

    size: S, side of the crop, or (height, width), of which S is the smaller one; base: 512.
    jitter: the image is resized to fit (4 S r, S r) with r ~ U(1 / jitter, jitter); base: 2.
    distortion: whether the colours of the image are changed.
    """

    def __init__(self, size, jitter=2.0, distortion=True):
        self.size = sides(size)
        self.jitter = jitter
        self.distortion = distortion

    def __call__(self, image, labels):
        """image (3, H, W), labels (H, W) -> image (3, S, S), labels (S, S), all uint8"""
        from torchvision.transforms.v2 import functional as VF           # slow to import
        r = 1 / self.jitter + (self.jitter - 1 / self.jitter) * torch.rand(()).item()
        short = min(self.size)
        size = fit_size(*labels.shape, 4 * short * r, short * r)
        if size != tuple(labels.shape):
            # Bilinear without antialiasing, and nearest by rounding down, as OpenCV has them,
            # which the authors use. Labels are numbers of classes: their mean has no meaning.
            image = VF.resize(image, size, BILINEAR, antialias=False)
            labels = VF.resize(labels[None], size, NEAREST)[0]
        top, left = self.draw_corner(labels)
        place = self.window(top, left)
        image = image[:, *place]
        labels = labels[place]
        if torch.rand(()).item() < 0.5:
            image, labels = image.flip(-1), labels.flip(-1)
        if self.distortion:
            image = distort(image)
        return self.pad(image, labels)

    def window(self, top, left):
        """The rows and columns of a crop."""
        return slice(top, top + self.size[0]), slice(left, left + self.size[1])

    def draw_corner(self, labels):
        """The corner (top, left) of a crop that shows several classes.

        Recipe, not in the paper: ten crops are looked at. If none of them is varied, the next one
        is taken as it is.
        """
        room = [max(side - own, 0) for side, own in zip(labels.shape, self.size, strict=True)]
        for tries in range(11):
            top, left = (int(torch.randint(r + 1, ())) for r in room)
            crop = labels[self.window(top, left)]
            if tries == 10 or not any(room) or is_varied(crop):
                return top, left

    def pad(self, image, labels):
        """Fill up to S x S on the right and at the bottom: the mean colour, IGNORE as the label."""
        from torchvision.transforms.v2 import functional as VF
        height, width = labels.shape
        right = self.size[1] - width
        bottom = self.size[0] - height
        border = [0, 0, right, bottom]                       # left, top, right, bottom
        # Differs from the recipe, which pads with 0 after normalising. The mean colour is that 0,
        # here rounded to bytes: off by at most 0.01 after normalising.
        mean = [round(255 * m) for m in IMAGENET_MEAN]
        image = VF.pad(image, border, fill=mean)
        labels = VF.pad(labels[None], border, fill=IGNORE)[0]
        return image.contiguous(), labels.contiguous()


def is_varied(labels):
    """Whether a crop shows several classes, and none on LARGEST_SHARE of its labelled pixels."""
    counts = labels[labels != IGNORE].bincount().double()
    return bool((counts > 0).sum() > 1 and counts.max() / counts.sum() < LARGEST_SHARE)


def distort(image):
    """Change brightness, contrast, saturation and hue, each with probability 1/2.

    image (3, H, W) uint8 -> the same kind. Recipe, not in the paper. In values from 0 to 255:
    brightness + U(-32, 32); contrast x U(0.5, 1.5), either before the colours or after them;
    saturation x U(0.5, 1.5); hue by up to 18 of 180 steps.
    """
    from torchvision.transforms.v2 import functional as VF               # slow to import
    # Differs from the recipe, which rounds to bytes after each of the four. We round once.
    x = image.float()
    if coin():
        x = (x + uniform(-32, 32)).clamp(0, 255)
    contrast_first = coin()
    if contrast_first and coin():
        x = (x * uniform(0.5, 1.5)).clamp(0, 255)
    if coin():
        x = saturate(x, uniform(0.5, 1.5))
    if coin():
        x = 255 * VF.adjust_hue(x / 255, int(torch.randint(-18, 18, ())) / 180)
    if not contrast_first and coin():
        x = (x * uniform(0.5, 1.5)).clamp(0, 255)
    return x.round().clamp(0, 255).to(torch.uint8)


def coin():
    return torch.rand(()).item() < 0.5


def uniform(low, high):
    return low + (high - low) * torch.rand(()).item()


def saturate(x, factor):
    """Multiply the saturation of HSV, to at most 1. Hue and value stay.  x (3, H, W) float

    The value V is the largest channel, and the saturation is (V - least) / V. So the distance of
    every channel from V grows by `factor`, at most until the least channel is 0.
    """
    value = x.amax(dim=0, keepdim=True)                      # (1, H, W)
    distance = value - x.amin(dim=0, keepdim=True)           # (1, H, W)
    most = value / distance.clamp(min=1e-6)                  # this factor makes the least channel 0
    return value - most.clamp(max=factor) * (value - x)


# --- data sets ------------------------------------------------------------------------------------
class Scenes(Images):
    """ds[(epoch, index)] -> image (3, H, W), labels (H, W), both uint8.

    A subclass says what pair(index) is. It sets `classes` (their names), `background` (whether
    class 0 is the background) and `at_once` (how many images of one size evaluation can stack).
    """

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, int(key))
        image, labels = self.pair(index)
        if self.transform is not None:
            seed_all(self.seed, epoch, index)
            image, labels = self.transform(image, labels)    # both have to move alike
        return image, labels


class ShapeScenes(Scenes):
    """The built-in shapes with their masks. Label 0 is the background, 1 to 10 are the shapes."""

    background = True
    at_once = 50

    def __init__(self, split, transform=None, seed=0, limit=None):
        super().__init__("shapes", split, transform, seed)
        self.shapes = Shapes(split, None, seed, limit)
        self.classes = ["background", *SHAPES]

    def pair(self, index):
        label = int(self.shapes.labels[index]) + 1
        return self.shapes.image(index), label * self.shapes.masks(index)

    def __len__(self):
        return len(self.shapes)


class SceneFolder(Scenes):
    """ADE20K's layout: images/training/NAME.jpg with annotations/training/NAME.png, and validation.

    Annotations are read by read_labels. `limit` images are spread evenly over the sorted names.
    """

    background = False
    at_once = 1              # images have sizes of their own

    def __init__(self, root, split, classes, transform=None, seed=0, limit=None):
        super().__init__(str(root), split, transform, seed)
        self.classes = class_names(root, classes)
        images = os.path.join(root, "images", FOLDERS[split])
        annotations = os.path.join(root, "annotations", FOLDERS[split])
        paths = find_images(images)
        if not paths:
            raise UserError(f"{shown(images)} holds no image: label maps want ADE20K's layout, "
                            f"images/{{training,validation}}/NAME.jpg and "
                            f"annotations/{{training,validation}}/NAME.png")
        paths = [paths[i] for i in spread(len(paths), limit)]
        targets = []
        for path in paths:
            name = os.path.splitext(os.path.relpath(path, images))[0] + ".png"
            target = os.path.join(annotations, name)
            if not os.path.isfile(target):
                raise UserError(f"there is no annotation {shown(target)} for {shown(path)}: "
                                f"add it, or remove the image")
            targets.append(target)
        # Arrays of bytes, for the reason given in Folder.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.targets = np.array([os.fsencode(target) for target in targets])

    def title(self, index):
        return shown(os.fsdecode(self.paths[index]))

    def pair(self, index):
        path = os.fsdecode(self.paths[index])
        target = os.fsdecode(self.targets[index])
        image = read_image(path)
        labels = read_labels(target, len(self.classes))
        if image.shape[1:] != labels.shape:
            raise UserError(f"{shown(target)} is {labels.shape[1]}x{labels.shape[0]}, its image "
                            f"{shown(path)} {image.shape[2]}x{image.shape[1]}: "
                            f"they must have the same size")
        return image, labels

    def look(self, index):
        """Read a pair only to see whether it can be read. Its sizes and labels are not checked."""
        read_image(os.fsdecode(self.paths[index]), s=8)
        with open_picture(os.fsdecode(self.targets[index]), "annotation") as picture:
            picture.load()

    def __len__(self):
        return len(self.paths)


def class_names(root, count):
    """The names in ROOT/objectInfo150.txt, a file of ADE20K. Without it, or if it has another
    number of names, the classes are called "class 1", "class 2" and so on.  -> list of str"""
    try:
        lines = Path(root, "objectInfo150.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):            # ValueError: the file is not UTF-8
        lines = []
    synonyms = [line.split("\t")[-1] for line in lines[1:]]  # the first line is a header
    names = [line.split(",")[0].strip() for line in synonyms]
    if len(names) == count:
        return names
    return [f"class {i + 1}" for i in range(count)]


def read_labels(path, classes):
    """An annotation, a picture with one channel of class numbers  -> labels (H, W) uint8

    ADE20K's rule: class numbers 1 to `classes` become labels 0 to classes - 1. The numbers 0 and
    255 mark pixels without a label, and become IGNORE. Raises UserError for any other picture.
    """
    with open_picture(path, "annotation") as picture:
        mode = picture.mode
        numbers = np.array(picture)
    if mode not in ("L", "P", "I", "I;16"):
        raise UserError(f"{shown(path)} has pixels of kind {mode}: an annotation has one channel "
                        f"of class numbers")
    unlabelled = (numbers == 0) | (numbers == IGNORE)
    beyond = numbers[(numbers > classes) & ~unlabelled]
    if beyond.size:
        raise UserError(f"{shown(path)} holds label {beyond.max()}, but there are {classes} "
                        f"classes: give --classes N")
    labels = np.where(unlabelled, IGNORE, numbers.astype(np.int64) - 1)
    return torch.from_numpy(labels.astype(np.uint8))


def open_split(args, split, classes, transform=None):
    """open_scenes with the flags of segment.py; training may use fewer images."""
    limits = [args.limit]
    if split == "train":
        limits.append(args.train_images)
    limit = min([n for n in limits if n], default=None)
    return open_scenes(args.data, split, transform, classes=classes, limit=limit, seed=args.seed)


def open_scenes(name, split, transform=None, *, classes=None, limit=None, seed=0):
    """The data set behind --data: "shapes", or a folder in ADE20K's layout.

    split: "train" or "val". classes: how many classes a folder has; default 150. limit: how many
    images to keep. Raises UserError for a name without label maps.
    """
    if name == "shapes":
        if classes not in (None, 1 + len(SHAPES)):
            raise UserError(f"--classes {classes}: shapes have {1 + len(SHAPES)} with the "
                            f"background; leave it out")
        return ShapeScenes(split, transform, seed, limit)
    if name in NOT_SCENES or not os.path.isdir(name):
        reason = "these images have no label maps" if name in NOT_SCENES else "no such folder"
        raise UserError(f"--data {shown(name)}: {reason}; give shapes or a folder with "
                        f"images/training, images/validation, annotations/training, "
                        f"annotations/validation (ADE20K: ADEChallengeData2016.zip)")
    return SceneFolder(name, split, classes or 150, transform, seed, limit)


def open_for_segmenter(args, count, names):
    """The held-out images of --data for a segmenter of `count` classes, named `names` or unnamed.

    UserError if the classes of the images are others.
    """
    in_folder = None if args.data == "shapes" else count
    dataset = open_split(args, "val", args.classes or in_folder)
    if count != len(dataset.classes) or names not in (None, dataset.classes):
        other = " of other names" if count == len(dataset.classes) else ""
        raise UserError(f"{args.checkpoint} knows {count} classes, {shown(dataset.name)} has "
                        f"{len(dataset.classes)}{other}: give the data of its training")
    return dataset


# --- predictions, a band at a time ----------------------------------------------------------------
def bands(size, depth, most=2**22):
    """Rows of an image of `size` (H, W) from top to bottom, as (first, last + 1).

    A band of `depth` numbers a pixel holds `most` numbers, or a little less; at least one row.
    """
    rows = max(1, most // (depth * size[1]))
    return [(top, min(top + rows, size[0])) for top in range(0, size[0], rows)]


def resize_rows(x, size, top, bottom):
    """The rows top to bottom - 1 of maps (B, C, h, w) resized to `size` (H, W), bilinear.

    -> (B, C, bottom - top, W)
    """
    if bottom - top < size[0]:
        # Row r lies at (r + 1/2) h / H - 1/2 among the h rows, between two of them.
        rows = torch.arange(top, bottom, device=x.device)
        place = ((rows + 0.5) * (x.shape[2] / size[0]) - 0.5).clamp(min=0)
        above = place.long().clamp(max=x.shape[2] - 1)
        below = (above + 1).clamp(max=x.shape[2] - 1)
        x = torch.lerp(x[:, :, above], x[:, :, below], (place - above)[:, None])
    return F.interpolate(x, (bottom - top, size[1]), mode="bilinear", align_corners=False)


# --- results --------------------------------------------------------------------------------------
def class_table(names, iou, accuracy):
    """Readable lines, the best class first.  iou, accuracy: (C,) in percent, NaN where undefined"""
    lines = ["class                    IoU    acc"]
    for i in iou.nan_to_num(-1).argsort(descending=True).tolist():
        lines.append(f"{names[i]:20} {iou[i]:7.2f}{accuracy[i]:7.2f}")
    return "\n".join(lines)


def by_name(names, iou):
    """IoU of every class for the log; None for a class that occurs nowhere."""
    return {name: None if math.isnan(value) else round(value, 2)
            for name, value in zip(names, iou.tolist(), strict=True)}


def draw_scenes(dataset, predict, path, columns=10, cell=144):
    """Save a picture with a column per image: the image, its labels, the prediction.

    predict: images (1, 3, H, W) uint8 -> classes (1, H, W). White pixels have no label.
    """
    from PIL import Image, ImageOps
    colours = class_colours(dataset)
    columns = min(columns, len(dataset))
    pitch = cell + 4
    sheet = Image.new("RGB", (columns * pitch - 4, 3 * pitch - 4), "white")
    for column in range(columns):
        image, labels = dataset[column * len(dataset) // columns]
        predicted = predict(image[None])[0].cpu()
        rows = [image.permute(1, 2, 0).numpy(), colours[labels], colours[predicted]]
        for row, pixels in enumerate(rows):
            picture = Image.fromarray(pixels)
            picture = ImageOps.contain(picture, (cell, cell), Image.Resampling.NEAREST)
            sheet.paste(picture, (column * pitch, row * pitch))
    sheet.save(path)


def class_colours(dataset):
    """One colour per label, IGNORE white.  -> (256, 3) uint8"""
    colours = np.full((256, 3), 255, dtype=np.uint8)
    for i in range(len(dataset.classes)):
        hue = 0.618034 * i % 1               # steps of the golden section: no two hues are close
        brightness = 0.55 + 0.2 * (i % 3)
        colours[i] = 255 * np.array(colorsys.hsv_to_rgb(hue, 0.75, brightness))
    if dataset.background:
        colours[0] = 40
    return colours
