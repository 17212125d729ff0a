"""Labels of a data set: which images may show theirs, and which logit each class has.

    open_sets, open_labelled       labelled data sets, also from DIR/CLASS/*
    choose_labels, Few             --labels-per-class: train on a few images of each class
    read_classes, number_by_name   --classes: names of the logits, in their order
"""
import json
import os

import torch
from torch.utils.data import Dataset

from support import data
from support.files import UserError
from support.find import plain_name, read_text
from support.images import open_class_folders, shown


def open_labelled(name, split, transform, args, alone=False):
    """A data set with labels.  -> ds[(epoch, index)] = (transformed image, label)

    alone: the folder needs no second split beside this one, and DIR/CLASS/* will do
    (ImageNet-A, ImageNet-21k).
    """
    built_in = name.partition(":")[0] in ("shapes", "cifar10", "cifar100")
    if built_in or not alone or not os.path.isdir(name):
        return data.open_data(name, split, transform, data_dir=args.data_dir, seed=args.seed,
                              download=args.download, limit=args.limit)
    below = os.path.join(name, split)
    root = below if os.path.isdir(below) else name
    return open_class_folders(root, transform, args.seed, args.limit)


def open_sets(args, process, augment, still):
    """-> training images, held-out images (None if nothing is evaluated); both with labels.

    augment, still: the transforms of the two. Honours --on-bad-image, --classes (the classes get
    the numbers of that list) and --labels-per-class.
    """
    train_set = open_labelled(args.data, "train", augment, args, alone=not args.evaluations)
    val_set = None
    if args.evaluations:
        val_set = open_labelled(args.data, "val", still, args)
    data.leave_out_bad(args, process, train_set, val_set)
    if args.classes:
        names = read_classes(args.classes)
        number_by_name(train_set, names, args.classes)
        if val_set is not None:
            number_by_name(val_set, names, args.classes)
    if args.labels_per_class:
        chosen = choose_labels(train_set.labels, args.labels_per_class, args.seed)
        train_set = Few(train_set, chosen)
    return train_set, val_set


# --- few labels -----------------------------------------------------------------------------------
def choose_labels(labels, per_class, seed=0):
    """Which images may show their label: `per_class` of every class.  -> sorted indices

    The choice depends on (labels, seed) alone. Raises UserError if a class has too few images.
    """
    classes, counts = labels.unique(return_counts=True)
    for c, count in zip(classes.tolist(), counts.tolist(), strict=True):
        if count < per_class:
            raise UserError(f"--labels-per-class {per_class}: class number {c} has only "
                            f"{count} images; ask for fewer")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]        # class by class, in random order
    first = counts.cumsum(0) - counts                        # where a class begins
    chosen = order[first[:, None] + torch.arange(per_class)]             # (classes, per_class)
    return chosen.flatten().sort().values


class Few(Dataset):
    """Some images of a data set under new numbers.

    Each image keeps the augmentation that it has in the whole set.
    """

    def __init__(self, dataset, indices):
        self.dataset = dataset
        self.indices = indices.tolist()
        self.classes = dataset.classes

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, key):
        epoch, index = key
        return self.dataset[epoch, self.indices[index]]

    def title(self, index):
        return self.dataset.title(self.indices[index])


# --- names of classes -----------------------------------------------------------------------------
def read_classes(path):
    """A file of class names in the order of the logits, one a line or a JSON list.  -> list

    Raises UserError for a file that cannot be read, an empty name or a name that occurs twice.
    """
    try:
        text = read_text(path)
        names = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--classes {path} cannot be read ({error}): "
                        f"give one name a line, or a JSON list") from error
    names = [plain_name(str(name)).strip() for name in names]
    if not names or len(set(names)) < len(names) or "" in names:
        raise UserError(f"--classes {path} has no name, a name twice or an empty line: "
                        f"give every logit one of its own")
    return names


def columns_of(dataset, names, source):
    """The logit of each class of a data set, found by name.  -> (classes of the data set,) long

    names: the classes of the logits in their order; source: where they stand, for the message of
    the UserError that a class without a logit raises.
    """
    column = {plain_name(name): i for i, name in enumerate(names)}
    unknown = [name for name in dataset.classes if name not in column]
    if unknown:
        some = shown(", ".join(unknown[:5] + ["..."] * (len(unknown) > 5)))
        raise UserError(f"{shown(dataset.name)} has {len(unknown)} classes that {source} does not "
                        f"know ({some}): take them away, or name the logits with --classes FILE")
    return torch.tensor([column[name] for name in dataset.classes])


def number_by_name(dataset, names, source):
    """Give a data set the classes `names`: its labels become their logits.  -> columns_of"""
    columns = columns_of(dataset, names, source)
    dataset.labels = columns[dataset.labels]
    dataset.classes = names
    return columns


def names_of_logits(args, file, logits):
    """The class names of a classifier, and where they stand.  -> list of `logits` names or None

    They come from --classes if it is given, else from the contents of args.checkpoint (`file`).
    Released files have none.
    """
    names = file.get("classes")
    source = args.checkpoint
    if args.classes:
        names = read_classes(args.classes)
        source = args.classes
    if names and len(names) != logits:
        raise UserError(f"{source} names {len(names)} classes, {args.checkpoint} has {logits} "
                        f"logits: give one name for each with --classes FILE")
    return names, source


def open_for_classifier(name, transform, args, file, logits):
    """Held-out images whose labels are logits of the classifier in args.checkpoint.

    -> data set, columns_of.  file: the contents of args.checkpoint. A classifier whose classes have
    no names takes a data set with as many classes as it has logits.
    """
    names, source = names_of_logits(args, file, logits)
    dataset = open_labelled(name, "val", transform, args, alone=True)
    if not names and len(dataset.classes) != logits:
        raise UserError(f"{source} knows {logits} classes, {name} has {len(dataset.classes)}: give "
                        f"the data of its training, or the names of its logits with --classes FILE")
    return dataset, number_by_name(dataset, names or dataset.classes, source)
