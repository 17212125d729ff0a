"""What a metric needs, looked at in a sample of the data before a training starts.

    check_images    not all of them have one colour only
    check_classes   there are two or more, and training shows those that are held out
    check_labels    the numbers in label maps are classes, and not something else
    check_teacher   features differ from patch to patch

What makes every figure meaningless is a UserError that says what was found and what was expected.
What is odd but possible is a warning.
"""
import collections

import numpy as np
import torch

from support.files import UserError
from support.find import shown
from support.images import read_image, spread

IMAGES_LOOKED_AT = 32
MAPS_LOOKED_AT = 200


def check_sets(datasets, process):
    """Look at a sample of every data set of picture files, and print what was looked at."""
    datasets = [dataset for dataset in datasets if len(dataset)]
    looked_at = [check_images(dataset, process) for dataset in datasets]
    labelled = [dataset for dataset in datasets if getattr(dataset, "labels", None) is not None]
    if labelled:
        check_classes(labelled, process)
    maps = [dataset for dataset in datasets if hasattr(dataset, "numbers")]
    if maps:
        looked_at.append(check_labels(maps, process))
    if looked_at:
        process.print(f"looked at {'; '.join(looked_at)}")


# --- images and classes ---------------------------------------------------------------------------
def check_images(dataset, process):
    """UserError if training images have one colour only, all of a sample.  -> what was looked at

    Held-out images, and those that are only read by a trained network, may be as they are.
    """
    flat, seen = [], set()
    chosen = spread(len(dataset), IMAGES_LOOKED_AT)
    for index in chosen:
        try:
            image = read_image(dataset.path(index), s=8)
            if is_flat(image):               # small, the image may have lost its texture
                image = read_image(dataset.path(index))
        except UserError:
            continue                         # the run itself says what is wrong with it
        seen.add(hash(image.numpy().tobytes()))
        if is_flat(image):
            flat.append(dataset.title(index))
    of = f"{len(chosen)} of {len(dataset)} images{of_split(dataset)}"
    if len(flat) == len(chosen) and dataset.split == "train":
        raise UserError(f"{shown(dataset.name)}: the images have one colour only, {flat[0]} for "
                        f"example ({of} looked at): there is nothing to learn in them, give others")
    if flat:
        process.warn(f"{len(flat)} images have one colour only, {flat[0]} for example "
                     f"({of} looked at)")
    if len(seen) == 1 and len(chosen) > 1:
        process.warn(f"{shown(dataset.name)}: always the same picture ({of} looked at)")
    return of


def of_split(dataset):
    return f" ({dataset.split})" if dataset.split else ""


def is_flat(image):
    """Whether all pixels of an image (3, H, W) are equal; one pixel alone is not called flat."""
    pixels = image.flatten(1)
    return pixels.shape[1] > 1 and bool((pixels == pixels[:, :1]).all())


def check_classes(datasets, process):
    """UserError for a single class. A warning for held-out classes that training never shows."""
    for dataset in datasets:
        if len(dataset.classes) == 1:
            raise UserError(f"{shown(dataset.name)} has one class, {shown(dataset.classes[0])}: "
                            f"accuracy would be 100 % without learning; give two or more")
    train, *others = datasets
    known = set(train.labels.tolist())
    for other in others:
        missing = sorted(set(other.labels.tolist()) - known)
        if missing and other.name == train.name and other.classes == train.classes:
            names = ", ".join([other.classes[i] for i in missing[:5]] + ["..."][:len(missing) - 5])
            process.warn(f"{len(missing)} of {len(other.classes)} held-out classes have no "
                         f"training image ({shown(names)}): they count as mistakes")


# --- label maps -----------------------------------------------------------------------------------
def check_labels(datasets, process):
    """Compare the numbers in a sample of label maps with --classes.  -> what was looked at"""
    found = {}                               # {split: {number: pixels}}
    texts = []
    for dataset in datasets:
        chosen = spread(len(dataset), MAPS_LOOKED_AT)
        of = f"{len(chosen)} of {len(dataset)} label maps{of_split(dataset)}"
        pixels, empty = count_numbers(dataset, chosen)
        refuse_unknown_numbers(dataset, pixels, of)
        refuse_few_classes(dataset, pixels, of)
        if empty:
            process.warn(f"{empty} label maps have no labelled pixel ({of} looked at)")
        found[dataset.split] = pixels
        texts.append(f"{of}: {in_words(pixels)}")
    everywhere = sum(found.values(), collections.Counter())
    refuse_numbers_from_zero(datasets[0], everywhere, process)
    warn_of_absent_classes(datasets[0], found, process)
    return "; ".join(texts)


def count_numbers(dataset, chosen):
    """-> {number: pixels} over these label maps; how many of them have no labelled pixel"""
    pixels = collections.Counter()
    empty = 0
    for index in chosen:
        numbers, counts = np.unique(dataset.numbers(index), return_counts=True)
        pixels.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
        empty += not set(numbers.tolist()) - dataset.unlabelled
    return pixels, empty


def in_words(pixels, most=8):
    """Numbers with their shares, or the ranges they fill if they are many."""
    numbers = sorted(pixels)
    total = sum(pixels.values())
    if len(numbers) <= most:
        return "numbers " + ", ".join(f"{n} ({100 * pixels[n] / total:.3g} %)" for n in numbers)
    return f"numbers {ranges(numbers)} ({len(numbers)} different)"


def ranges(numbers, most=6):
    """Sorted numbers in words: "0 to 18, 255"."""
    runs = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    words = [str(a) if a == b else f"{a} to {b}" for a, b in runs]
    return ", ".join(words[:most] + ["..."][:len(words) - most])


def expected(dataset):
    """What the numbers of a label map mean, in words."""
    classes = len(dataset.classes)
    unlabelled = " and ".join(str(n) for n in sorted(dataset.unlabelled))
    return (f"with --classes {classes}, {dataset.first} to {dataset.first + classes - 1} are "
            f"classes and {unlabelled} no label")


def classes_in(dataset, pixels):
    return sorted(set(pixels) - dataset.unlabelled)


def refuse_unknown_numbers(dataset, pixels, of):
    last = dataset.first + len(dataset.classes) - 1
    unknown = [n for n in classes_in(dataset, pixels) if n > last]
    if unknown:
        raise UserError(f"the label maps of {shown(dataset.name)} hold {ranges(unknown)} "
                        f"({of}: {in_words(pixels)}), but {expected(dataset)}: give --classes N, "
                        f"or number the classes anew")


def refuse_few_classes(dataset, pixels, of):
    """UserError without any class, or with one only in training: any network would be perfect."""
    classes = classes_in(dataset, pixels)
    if len(classes) > 1 or (classes and dataset.split == "val"):
        return
    what = f"only class number {classes[0]} has pixels" if classes else "no pixel has a label"
    remedy = "number the classes from 1 on"
    if 0 in pixels and 0 in dataset.unlabelled:
        remedy += ", or say with --zero class that 0 is a class"
    raise UserError(f"{shown(dataset.name)}: {what} ({of}: {in_words(pixels)}), and "
                    f"{expected(dataset)}: {remedy}")


def refuse_numbers_from_zero(dataset, pixels, process):
    """Are the classes numbered from 0 (train ids)? Then 0 occurs, and the last number does not."""
    last = len(dataset.classes)
    if dataset.zero or 0 not in pixels or last in pixels or dataset.has_names:
        return                               # said with --zero, or seen
    share = 100 * pixels[0] / sum(pixels.values())
    what = (f"{shown(dataset.name)}: number 0 has {share:.3g} % of the pixels and counts as "
            f"unlabelled, and number {last} never occurs ({in_words(pixels)})")
    if all(n in pixels for n in range(1, last)):
        raise UserError(f"{what}: this looks like classes numbered from 0; say --zero class if 0 "
                        f"is a class, --zero unlabelled if it is none")
    if last - 1 in pixels:
        process.warn(f"{what}: if 0 is a class, say --zero class")


def warn_of_absent_classes(dataset, found, process):
    """Warn of held-out classes that training does not show, and of --classes much too large."""
    train, val = found.get("train"), found.get("val")
    if train and val:
        known = classes_in(dataset, train)
        missing = sorted(set(classes_in(dataset, val)) - set(known))
        text = (f"class numbers {ranges(missing)} are among the held-out label maps looked at and "
                f"not among those of training ({ranges(known)})")
        if missing and not set(classes_in(dataset, val)) & set(known):
            raise UserError(f"{text}: no class is in both, put the same classes into both splits")
        if missing:
            process.warn(text)
    seen = set()
    for pixels in found.values():
        seen.update(classes_in(dataset, pixels))
    if 2 * len(seen) <= len(dataset.classes) and len(dataset.classes) > 3:
        process.warn(f"{len(seen)} of --classes {len(dataset.classes)} occur in the label maps "
                     f"looked at (numbers {ranges(sorted(seen))})")


# --- teachers -------------------------------------------------------------------------------------
@torch.no_grad()
def check_teacher(teacher, images, process):
    """UserError if a teacher's features are not finite, or alike at all patches.

    images (B, 3, H, W) in [0, 1]: a few images that differ.
    """
    with process.autocast():
        t = teacher(images)                                  # (B, N, C)
    for name, part in zip(teacher.names, t.split(teacher.dims, dim=-1), strict=True):
        bad = (~part.isfinite().flatten(1).all(dim=1)).sum().item()
        if bad:
            raise UserError(f"--teacher {teacher.name}: the features of {name} are NaN or infinite "
                            f"in {bad} of {len(images)} images: check its weights, or try --amp no")
        scale = part.abs().max()
        if (part - part.mean(dim=(0, 1))).abs().max() <= 1e-5 * scale:
            what = f"at all patches of {len(images)} images"
        elif part.shape[1] > 1 and (part - part.mean(1, keepdim=True)).abs().max() <= 1e-5 * scale:
            what = f"at all {part.shape[1]} patches of an image, in {len(images)} images"
        else:
            continue
        raise UserError(f"--teacher {teacher.name}: {name} gives the same features {what}; they "
                        f"should differ from patch to patch: check its weights and the images")
