"""The flags that all stages share, and the types that check a flag's range where it is declared."""
import argparse
import os
from pathlib import Path

from model import PRESETS
from support.files import UserError


class Parser(argparse.ArgumentParser):
    """A mistake becomes one sentence (UserError), as everywhere else. No abbreviated flags."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(message.removeprefix("argument "))


def whole(low, high=10**9):
    """type=whole(1, 100): an integer in that range."""
    return ranged(int, low, high)


def number(low, high):
    """type=number(0, 1): a float in that range, which NaN is not."""
    return ranged(float, low, high)


def ranged(kind, low, high):
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must lie in [{low}, {high}], not {text}")
        return value
    parse.__name__ = kind.__name__           # argparse says "invalid int value"
    parse.kind = kind
    return parse


def run_parser(description):
    """A parser that knows the flags about running. A stage adds those of its method."""
    p = Parser(description)
    g = p.add_argument_group("data")
    g.add_argument("--data", help="shapes, cifar10, cifar100 or a folder; base: datasets/imagenet")
    g.add_argument("--data-dir", default="datasets", help="where CIFAR lies")
    g.add_argument("--download", action="store_true", help="fetch CIFAR if it is not in --data-dir")
    g.add_argument("--limit", type=whole(1), help="use only the first n images of each split")
    g.add_argument("--on-bad-image", default="stop", choices=["stop", "skip"],
                   help="skip: read all images at the start, leave bad ones out, list them in OUT")
    g.add_argument("--image-size", type=whole(1), help="pixels; base: 224")
    g.add_argument("--patch-size", type=whole(1), help="pixels; base: 16")
    g.add_argument("--workers", type=whole(0, 1024), help="loader processes per rank")
    g = p.add_argument_group("run")
    g.add_argument("--model", default="tiny", help="preset: tiny (CPU, minutes), small, base, large")
    g.add_argument("--out", type=Path, help="folder of this run; default runs/MODEL")
    g.add_argument("--fresh", action="store_true", help="set earlier results aside and start over")
    g.add_argument("--batch-size", type=whole(1), help="images per update, over all processes")
    g.add_argument("--micro-batch", type=whole(1), help="images one process holds at once")
    g.add_argument("--epochs", type=whole(1), help="passes over the training images")
    g.add_argument("--steps", type=whole(1), help="number of updates, instead of --epochs")
    g.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    g.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    g.add_argument("--amp", default="auto", choices=["auto", "no", "bf16"], help="bfloat16")
    g.add_argument("--compile", action="store_true", help="torch.compile the network")
    g.add_argument("--log-every", type=whole(1), default=20, help="steps between log lines")
    g.add_argument("--save-every", type=whole(1), default=200, help="steps between resume files")
    g.add_argument("--dry-run", action="store_true", help="print recipe, shapes, parameters and stop")
    return p


def fill_in(args, models, recipe):
    """Every flag left out gets its value from the column --model of the stage's table."""
    if args.model not in models:
        raise UserError(f"--model {args.model} is not a preset of this stage; choose from {', '.join(models)}")
    if args.steps is not None and args.epochs is not None:
        raise UserError(f"--steps {args.steps} and --epochs {args.epochs} both say how long to train: give one of them")
    column = models.index(args.model)
    defaults = {name: row[column] for name, row in recipe.items()}
    tiny = args.model == "tiny"
    defaults["data"] = "shapes" if tiny else "datasets/imagenet"
    defaults["workers"] = 1 if tiny else min(8, os.cpu_count() or 1)
    defaults["out"] = Path("runs") / args.model
    defaults["image_size"] = PRESETS[args.model]["image_size"]
    defaults["patch_size"] = PRESETS[args.model]["patch_size"]
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.amp_auto = args.amp == "auto"
    check_range(args, "patch_size", 1, args.image_size)
    check_range(args, "image_size", args.patch_size, 128 * args.patch_size)
    if args.image_size % args.patch_size:
        raise UserError(f"--image-size {args.image_size} is not a multiple of --patch-size {args.patch_size}")


def flag(name):
    return "--" + name.replace("_", "-")


def check_range(args, name, low, high):
    """For a range that depends on another flag; any other stands at the flag itself."""
    value = getattr(args, name)
    if not low <= value <= high:
        raise UserError(f"{flag(name)} must lie in [{low}, {high}], not {value}")
