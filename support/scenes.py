"""Semantic segmentation: images with a class for every pixel, their augmentation, a picture.

    open_scenes -> data set -> SegmentTransform -> image (3, S, S), labels (S, S), both uint8

A label is the number of a class, or IGNORE for a pixel without one.

Read in this order: SegmentTransform, distort, Scenes, read_numbers, to_labels, open_scenes.
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
from support.find import (
    LeftOut, find_images, leave_out_beside, plain_name, read_text, shown)
from support.images import (
    Images, open_picture, read_image, spread, turn_of, turn_upright, upright_size)
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

    Annotations are pictures with one channel of class numbers; 255 marks a pixel without a label.
    zero: "class" if 0 is a class, too; "unlabelled", ADE20K's rule, if 0 is no class and number 1
    is label 0; None if the user did not say, which is read as "unlabelled".
    `limit` images are spread evenly over the sorted names.
    """

    background = False
    at_once = 1              # images have sizes of their own

    def __init__(self, root, split, classes, transform=None, seed=0, limit=None, zero=None):
        super().__init__(str(root), split, transform, seed)
        self.zero = zero
        self.first = 0 if zero == "class" else 1             # the number of the first class
        self.unlabelled = {IGNORE} if zero == "class" else {0, IGNORE}
        names = class_names(root, classes)
        self.has_names = names is not None
        self.classes = names or [f"class {i + self.first}" for i in range(classes)]
        paths, targets, self.left_out = find_pairs(root, FOLDERS[split], limit)
        # Arrays of bytes, for the reason given in Folder.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.targets = np.array([os.fsencode(target) for target in targets])

    def path(self, index):
        return os.fsdecode(self.paths[index])

    def title(self, index):
        return shown(self.path(index))

    def pair(self, index):
        image = read_image(self.path(index))
        target = os.fsdecode(self.targets[index])
        return image, to_labels(self.numbers(index), len(self.classes), self.first, target)

    def numbers(self, index):
        """The label map of an image as it is stored, turned as its image is.  -> (H, W) integers"""
        return read_numbers(os.fsdecode(self.targets[index]), self.path(index))

    def look(self, index):
        """Read a pair only to see whether it can be read. Its labels are not checked."""
        read_image(self.path(index), s=8)
        self.numbers(index)

    def __len__(self):
        return len(self.paths)


def find_pairs(root, folder, limit=None):
    """-> paths of the images in root/images/FOLDER, of their maps in annotations/FOLDER, LeftOut

    Names are compared without their endings. `limit` images are spread evenly over the names.
    """
    images = os.path.join(root, "images", folder)
    annotations = os.path.join(root, "annotations", folder)
    left_out = LeftOut()
    found = find_images(images, left_out)
    if not found:
        raise UserError(f"{shown(images)} holds no image: label maps want ADE20K's layout, "
                        f"images/{{training,validation}}/NAME.jpg and "
                        f"annotations/{{training,validation}}/NAME.png")
    maps = {}
    for path in find_images(annotations, left_out):
        maps.setdefault(stem_of(path, annotations), []).append(path)
    paths = [found[i] for i in spread(len(found), limit)]
    targets = []
    for path in paths:
        stem = stem_of(path, images)
        if stem not in maps:
            target = os.path.join(annotations, f"{stem}.png")
            raise UserError(f"there is no annotation {shown(target)} for {shown(path)}: "
                            f"add it, or remove the image")
        targets.append(maps[stem][0])
    of_images = {stem_of(path, images) for path in found}
    for stem, some in maps.items():
        for path in some[1:] if stem in of_images else some:
            left_out.add("annotations without an image", path)
    leave_out_beside(root, ["images", "annotations", "objectInfo150.txt"], left_out)
    for kind in ("images", "annotations"):
        leave_out_beside(os.path.join(root, kind), list(FOLDERS.values()), left_out)
    return paths, targets, left_out


def stem_of(path, folder):
    """The name of a file below `folder`, without its ending; é is é however it is written."""
    return plain_name(os.path.splitext(os.path.relpath(path, folder))[0])


def class_names(root, count):
    """The names in ROOT/objectInfo150.txt, a file of ADE20K.  -> list of str

    None without it, or if it has another number of names.
    """
    try:
        lines = read_text(Path(root, "objectInfo150.txt")).splitlines()
    except (OSError, ValueError):            # ValueError: the file is not UTF-8
        return None
    synonyms = [line.split("\t")[-1] for line in lines[1:]]  # the first line is a header
    names = [line.split(",")[0].strip() for line in synonyms]
    return names if len(names) == count else None


def read_numbers(path, image=None):
    """An annotation, a picture with one channel of class numbers.  -> (H, W) integers

    image: the file of its image, whose size it must have. An EXIF note that turns the photograph
    turns its annotation as well. UserError for any other picture.
    """
    with open_picture(path, "annotation") as picture:
        mode = picture.mode
        form = picture.format
        numbers = np.array(picture)
    if mode not in ("L", "P", "I", "I;16"):
        raise UserError(f"{shown(path)} has pixels of kind {mode}: an annotation has one channel "
                        f"of class numbers")
    if form in ("JPEG", "MPO"):
        raise UserError(f"{shown(path)} is a JPEG, which changes the numbers of the classes: save "
                        f"annotations as PNG")
    if image is None:
        return numbers
    with open_picture(image) as photo:
        turn = turn_of(photo)
        size = photo.size[::-1]                              # (H, W) as it is stored
    upright = upright_size(size, turn)
    if turn > 1 and upright == size == numbers.shape:
        raise UserError(
            f"the EXIF note of {shown(image)} turns it, and {shown(path)} would fit before and "
            f"after: save the photograph upright and without the note, as its annotation is drawn")
    if turn > 1 and numbers.shape == size:   # drawn before the photograph was turned
        return turn_upright(numbers, turn)
    if numbers.shape != upright:
        raise UserError(f"{shown(path)} is {numbers.shape[1]}x{numbers.shape[0]}, its image "
                        f"{shown(image)} {upright[1]}x{upright[0]}: they must have the same size")
    return numbers


def to_labels(numbers, classes, first=1, name="it"):
    """Class numbers (H, W) from `first` on -> labels (H, W) uint8 from 0 on.

    ADE20K's rule is first = 1: the numbers 1 to `classes` become 0 to classes - 1. What lies below
    `first`, and 255, become IGNORE. UserError for a number beyond the classes, of the file `name`.
    """
    labels = numbers.astype(np.int64) - first
    unlabelled = (labels < 0) | (numbers == IGNORE)
    beyond = numbers[(labels >= classes) & ~unlabelled]
    if beyond.size:
        raise UserError(f"{shown(name)} holds label {beyond.max()}, but there are {classes} "
                        f"classes: give --classes N")
    labels = np.where(unlabelled, IGNORE, labels)
    return torch.from_numpy(labels.astype(np.uint8))


def open_split(args, split, classes, transform=None):
    """open_scenes with the flags of segment.py; training may use fewer images."""
    limits = [args.limit]
    if split == "train":
        limits.append(args.train_images)
    limit = min([n for n in limits if n], default=None)
    return open_scenes(args.data, split, transform, classes=classes, limit=limit, seed=args.seed,
                       zero=args.zero)


def open_scenes(name, split, transform=None, *, classes=None, limit=None, seed=0, zero=None):
    """The data set behind --data: "shapes", or a folder in ADE20K's layout.

    split: "train" or "val". classes: how many classes a folder has; default 150. limit: how many
    images to keep. zero: what number 0 of a folder means, see SceneFolder. Raises UserError for a
    name without label maps.
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
    return SceneFolder(name, split, classes or 150, transform, seed, limit, zero)


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
