"""What a trained network says of your images, as a file for numpy or a spreadsheet.

    python -m extras.features runs/tiny/vqkd.pt photos/ --out tokens.npz
    python -m extras.features runs/tiny/pretrain.pt photo.png --what features --out features.npz
    python -m extras.features runs/tiny/finetune.pt photos/ --what classes --out classes.csv

IMAGES is one picture or a folder, which is read at any depth. The file holds `names`, the path of
each picture, and beside them in the same order

    --what tokens      ids (n, gh, gw): the code of every patch. CHECKPOINT is a tokenizer.
    --what features    cls (n, D) and patches (n, D): [CLS] and the mean over the patches, after the
                       final LayerNorm. CHECKPOINT is of any stage, ours or a released one.
    --what classes     class (n, 5), probability (n, 5): the five likeliest classes, the best first.
                       CHECKPOINT is a classifier, finetune.pt or a released one, whose classes
                       --classes FILE names: one a line, or a JSON list.

A file that ends in .npz holds arrays, one that ends in .csv a line per picture. Without --out the
arrays lie in WHAT.npz beside CHECKPOINT, and the classes in classes.csv, too.
Tokens and features are the inputs of a linear probe, a search for similar images, or a language
model of images.
"""
# Shapes:  n images, B images of a batch, gh x gw = N patches of each, D width, C classes
import argparse
import csv
from pathlib import Path

import numpy as np
import torch

from finetune import class_logits
from model import imagenet_normalize
from support import data, transforms, weights
from support.args import Parser, whole
from support.files import UserError, refuse_unwritable
from support.images import open_images, shown
from support.labels import names_of_logits
from support.process import join_processes, launch
from vqkd import load_tokenizer

BEST = 5                                     # classes of each picture


# --- what a network says --------------------------------------------------------------------------
# Each of these gives the network, and a function from images (B, 3, H, W) in [0, 1] to arrays.
def tokens_of(args, process):
    """{"ids": (B, gh, gw)}"""
    tokenizer = load_tokenizer(args.checkpoint, process.device)

    def encode(images):
        return {"ids": tokenizer.encode(images).unflatten(1, tokenizer.encoder.grid)}
    return tokenizer.encoder, encode


def features_of(args, process):
    """{"cls", "patches"}: (B, D) each"""
    backbone, _, _ = weights.load_backbone(args.checkpoint, pool=None)
    backbone = backbone.to(process.device).eval()

    def encode(images):
        tokens = backbone(imagenet_normalize(images))        # (B, 1 + N, D)
        return {"cls": tokens[:, 0], "patches": tokens[:, 1:].mean(dim=1)}
    return backbone, encode


def classes_of(args, process):
    """{"class": (B, 5) numbers of logits, "probability": (B, 5)}"""
    model, file, _ = weights.load_backbone(args.checkpoint, pool=None, num_classes=None)
    model = model.to(process.device).eval()
    args.names, _ = names_of_logits(args, file, model.num_classes)

    def encode(images):
        p = class_logits(model, images, process).softmax(dim=-1)         # (B, C)
        best = p.topk(min(BEST, p.shape[-1]), dim=-1)
        return {"class": best.indices, "probability": best.values}
    return model, encode


READ = dict(tokens=tokens_of, features=features_of, classes=classes_of)


@torch.no_grad()
def encode_all(encode, dataset, batch_size, workers, device):
    """encode(images) of a whole data set.  -> {name: array (n, ...)}"""
    found = []
    batches = data.eval_batches(len(dataset), batch_size)
    for images, _ in data.make_loader(dataset, batches, workers, device):
        found.append(encode(data.to_float(images, device)))
    return {name: torch.cat([part[name] for part in found]).cpu().numpy() for name in found[0]}


# --- files ----------------------------------------------------------------------------------------
def save(path, names, arrays):
    """Write a .npz or a .csv file. UserError if the disk does not take it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            with open(path, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows(names, arrays))
            return
        with open(path, "wb") as file:
            np.savez(file, names=np.array(names), **arrays)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another --out") from error


def rows(names, arrays):
    """The arrays as lines of a table, the first of them with the titles: name, class_1, class_2"""
    flat = {name: array.reshape(len(array), -1) for name, array in arrays.items()}
    yield ["name", *(f"{name}_{i + 1}" for name, array in flat.items()
                     for i in range(array.shape[1]))]
    for i, name in enumerate(names):
        values = [value for array in flat.values() for value in array[i].tolist()]
        yield [shown(name), *(f"{v:.6g}" if isinstance(v, float) else v for v in values)]


def name_classes(arrays, names):
    """The numbers of the logits become names. A released file has none: they stay numbers."""
    if names is None:
        print("note: the classes of this file have no names, so their numbers are given, counted "
              "from 0; name them with --classes FILE")
        names = range(arrays["class"].max() + 1)
    return arrays | {"class": np.array([str(name) for name in names])[arrays["class"]]}


# --- the command ----------------------------------------------------------------------------------
def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("checkpoint", type=Path, help="file of a stage, ours or released")
    p.add_argument("images", type=Path, help="one picture, or a folder of pictures")
    p.add_argument("--what", default="tokens", choices=list(READ))
    p.add_argument("--out", type=Path, help="the file to write, .npz or .csv; default WHAT.npz "
                   "beside CHECKPOINT, and classes.csv")
    p.add_argument("--classes", type=Path, help="file of class names in the order of the logits")
    p.add_argument("--batch-size", type=whole(1), default=64, help="images at once")
    p.add_argument("--workers", type=whole(0, 1024), default=0, help="loader processes")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    p.add_argument("--on-bad-image", default="stop", choices=["stop", "skip"],
                   help="skip: leave pictures out that cannot be read, list them beside --out")
    args = p.parse_args(argv)
    if args.classes and args.what != "classes":
        raise UserError("--classes names what --what classes gives: add that, or leave it out")
    args.files = [args.out]
    if args.out is None:
        args.out = args.checkpoint.parent / f"{args.what}.npz"
        args.files = [args.out]
        if args.what == "classes":
            args.files.append(args.out.with_suffix(".csv"))
    if args.out.suffix not in (".npz", ".csv"):
        raise UserError(f"--out {args.out} has to end in .npz or .csv, which says what to write")
    return args


def main(argv=None):
    args = parse_args(argv)
    refuse_unwritable(args.out.parent)
    process = join_processes(args.device)
    network, encode = READ[args.what](args, process)
    still = transforms.EvalTransform(network.arch()["image_size"])
    dataset = open_images(args.images, still)
    bad = argparse.Namespace(on_bad_image=args.on_bad_image, workers=args.workers,
                             out=args.out.parent)
    data.leave_out_bad(bad, process, dataset)
    arrays = encode_all(encode, dataset, args.batch_size, args.workers, process.device)
    if args.what == "classes":
        arrays = name_classes(arrays, args.names)
        for name, best, p in list(zip(dataset.names, *arrays.values(), strict=True))[:10]:
            print(f"{shown(name)}: {best[0]} ({100 * p[0]:.1f} %)")
    for file in args.files:
        save(file, dataset.names, arrays)
    sizes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
    written = ", ".join(map(str, args.files))
    print(f"{len(dataset)} images -> {written}: names, {sizes}")


if __name__ == "__main__":
    launch(main)
