"""What a trained network says of your images, as a file for numpy.

    python -m extras.features runs/tiny/vqkd.pt photos/ --out tokens.npz
    python -m extras.features runs/tiny/pretrain.pt photo.png --what features --out features.npz

IMAGES is one picture or a folder, which is read at any depth. The file holds `names`, the path of
each picture, and beside them in the same order

    --what tokens      ids (n, gh, gw): the code of every patch. CHECKPOINT is a tokenizer.
    --what features    cls (n, D) and patches (n, D): [CLS] and the mean over the patches, after the
                       final LayerNorm. CHECKPOINT is of any stage, ours or a released one.

Both are the inputs of a linear probe, a search for similar images, or a language model of images.
"""
# Shapes:  n images, gh x gw = N patches of each, D width
import argparse
from pathlib import Path

import numpy as np
import torch

from model import imagenet_normalize
from support import data, transforms, weights
from support.args import Parser, whole
from support.files import UserError
from support.images import open_images
from support.process import join_processes, launch
from vqkd import load_tokenizer


def tokens_of(path, device):
    """-> side of an image, function from images (B, 3, H, W) in [0, 1] to {"ids": (B, gh, gw)}"""
    tokenizer = load_tokenizer(path, device)

    def encode(images):
        return {"ids": tokenizer.encode(images).unflatten(1, tokenizer.encoder.grid)}
    return tokenizer.encoder.image_size[0], encode


def features_of(path, device):
    """-> side of an image, function from images (B, 3, H, W) to {"cls", "patches"}: (B, D) each"""
    backbone, _, _ = weights.load_backbone(path, pool=None)
    backbone = backbone.to(device).eval()

    def encode(images):
        tokens = backbone(imagenet_normalize(images))        # (B, 1 + N, D)
        return {"cls": tokens[:, 0], "patches": tokens[:, 1:].mean(dim=1)}
    return backbone.image_size[0], encode


@torch.no_grad()
def encode_all(encode, dataset, batch_size, workers, device):
    """encode(images) of a whole data set.  -> {name: array (n, ...)}"""
    found = []
    batches = data.eval_batches(len(dataset), batch_size)
    for images, _ in data.make_loader(dataset, batches, workers, device):
        found.append(encode(data.to_float(images, device)))
    return {name: torch.cat([part[name] for part in found]).cpu().numpy() for name in found[0]}


def save(path, arrays):
    """Write a .npz file. UserError if the disk does not take it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another --out") from error


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("checkpoint", type=Path, help="file of a stage, ours or released")
    p.add_argument("images", type=Path, help="one picture, or a folder of pictures")
    p.add_argument("--what", default="tokens", choices=["tokens", "features"])
    p.add_argument("--out", type=Path, help="the file to write; default WHAT.npz beside CHECKPOINT")
    p.add_argument("--batch-size", type=whole(1), default=64, help="images at once")
    p.add_argument("--workers", type=whole(0, 1024), default=0, help="loader processes")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    p.add_argument("--on-bad-image", default="stop", choices=["stop", "skip"],
                   help="skip: leave pictures out that cannot be read, list them beside --out")
    args = p.parse_args(argv)
    if args.out is None:
        args.out = args.checkpoint.parent / f"{args.what}.npz"
    return args


def main(argv=None):
    args = parse_args(argv)
    process = join_processes(args.device)
    read = tokens_of if args.what == "tokens" else features_of
    side, encode = read(args.checkpoint, process.device)
    dataset = open_images(args.images, transforms.EvalTransform(side))
    bad = argparse.Namespace(on_bad_image=args.on_bad_image, workers=args.workers,
                             out=args.out.parent)
    data.leave_out_bad(bad, process, dataset)
    arrays = encode_all(encode, dataset, args.batch_size, args.workers, process.device)
    save(args.out, arrays | dict(names=np.array(dataset.names)))
    sizes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
    print(f"{len(dataset)} images -> {args.out}: names, {sizes}")


if __name__ == "__main__":
    launch(main)
