"""The flags that stages share, and types that check a flag's range where the flag is declared."""
import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from model import PRESETS
from support.files import ROOT, UserError
from support.positions import sides


class Parser(argparse.ArgumentParser):
    """A mistake on the command line becomes a UserError. Flags have to be written out in full."""

    def __init__(self, description, moved=None):
        """moved: {"--old": function of the arguments -> the words of the command it is now}."""
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.moved = moved or {}
        for name in self.moved:              # an attribute of args only if it is given
            self.add_argument(name, default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def parse_args(self, args=None, namespace=None):
        args = super().parse_args(args, namespace)
        for name, command in self.moved.items():
            if hasattr(args, name.strip("-").replace("-", "_")):
                run_instead(name, [*command(args), *self.typed(args, SHARED)])
        return args

    def typed(self, args, names):
        """The words of those of these flags that were given: ["--workers", 2]"""
        given = [name for name in names if getattr(args, name, None) != self.get_default(name)]
        return [word for name in given for word in (flag(name), getattr(args, name))]

    def error(self, message):
        raise UserError(message.removeprefix("argument "))


SHARED = "batch_size", "workers", "device", "on_bad_image"   # the same in every command


def run_instead(name, words):
    """The flag `name` has become `python -m WORDS`: say so, run that, end with its exit code."""
    words = list(map(str, words))
    print(f"note: {name} is now `python -m {shlex.join(words)}`", file=sys.stderr, flush=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-m", *words], env=os.environ | {"PYTHONPATH": path})
    code = done.returncode
    raise SystemExit(code if code >= 0 else 128 - code)      # negative: ended by this signal


def whole(low, high=10**9):
    """type=whole(1, 100): an integer from 1 to 100."""
    return ranged(int, low, high)


def number(low, high):
    """type=number(0, 1): a float from 0 to 1. NaN is refused."""
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


class Size(argparse.Action):
    """nargs="+", action=Size: one number of pixels, or two, which become (height, width)."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            parser.error(f"{option_string} takes one number, or height and width, not "
                         f"{len(values)} numbers")
        square = len(set(values)) == 1
        setattr(namespace, self.dest, values[0] if square else tuple(values))


def run_parser(description, without=(), moved=None):
    """A parser that knows the flags about running. A stage adds the flags of its method.

    without: names of flags that the stage does not honour ("compile", ...).
    moved: {"--old": function}, for flags that have become a command of their own (Parser).
    """
    p = Parser(description, moved)
    group = None

    def add(name, **options):
        if name.removeprefix("--").replace("-", "_") not in without:
            group.add_argument(name, **options)

    group = p.add_argument_group("data")
    add("--data", help="shapes, cifar10, cifar100 or a folder; base: datasets/imagenet")
    add("--data-dir", default="datasets", help="where CIFAR lies")
    add("--download", action="store_true", help="fetch CIFAR if it is not in --data-dir")
    add("--limit", type=whole(1), help="use only the first n images of each split")
    add("--on-bad-image", default="stop", choices=["stop", "skip"],
        help="skip: read all images at the start, leave bad ones out, list them in OUT")
    add("--image-size", type=whole(1), nargs="+", action=Size, metavar="PIXELS",
        help="one number, or height and width; base: 224")
    add("--patch-size", type=whole(1), help="pixels; base: 16")
    add("--workers", type=whole(0, 1024), help="loader processes per rank")
    group = p.add_argument_group("run")
    add("--model", default="tiny", help="preset: tiny (CPU, minutes), small, base, large")
    add("--out", type=Path, help="folder of this run; default runs/MODEL")
    add("--fresh", action="store_true", help="set earlier results aside and start over")
    add("--batch-size", type=whole(1), help="images per update, over all processes")
    add("--micro-batch", type=whole(1), help="images one process holds at once")
    add("--epochs", type=whole(1), help="passes over the training images")
    add("--steps", type=whole(1), help="number of updates, instead of --epochs")
    add("--seed", type=whole(0, 2**32 - 1), default=0, help="of all random draws; default 0")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--amp", default="auto", choices=["auto", "no", "bf16"],
        help="bfloat16; auto: on CUDA and on CPUs with bf16 matrix units")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--log-every", type=whole(1), default=20, help="steps between log lines")
    add("--save-every", type=whole(1), default=200, help="steps between resume files")
    add("--dry-run", action="store_true", help="print recipe, sizes, steps, memory and stop")
    return p


def fill_in(args, models, recipe):
    """Every flag left out gets its value from the column --model of the stage's table.

    models: the names of the columns. recipe: {flag: (a value per column)}. args.typed then holds
    the flags of the recipe that were given, with the values that the recipe has for them: what was
    not typed may shrink with a short run (data.resolve_steps). Raises UserError for a preset that
    the stage does not have, or for sizes that give no grid of patches.
    """
    check_preset(args, models)
    if args.steps is not None and args.epochs is not None:
        raise UserError(f"--steps {args.steps} and --epochs {args.epochs} both say how long to "
                        f"train: give one of them")
    if args.steps is not None:
        recipe = {"steps": [None] * len(models)} | recipe
    column = models.index(args.model)
    preset = PRESETS[args.model]
    tiny = args.model == "tiny"
    defaults = dict(
        data="shapes" if tiny else "datasets/imagenet",
        workers=1 if tiny else min(8, os.cpu_count() or 1),
        out=Path("runs") / args.model,
        image_size=preset["image_size"], patch_size=preset["patch_size"])
    recipe_values = {name: row[column] for name, row in recipe.items()}
    args.typed = {name: value for name, value in recipe_values.items()
                  if getattr(args, name, None) is not None}
    defaults |= recipe_values
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    check_out(args)
    check_range(args, "patch_size", 1, min(sides(args.image_size)))
    check_sides(args, 1)
    for side in sides(args.image_size):
        if side % args.patch_size:
            raise UserError(f"--image-size {side} is not a multiple of "
                            f"--patch-size {args.patch_size}")


def check_preset(args, models):
    if args.model not in models:
        raise UserError(f"--model {args.model} is not a preset of this stage; "
                        f"choose from {', '.join(models)}")


def check_out(args):
    """UserError if OUT is a folder with another purpose, or one in which such a folder lies."""
    out = Path(os.path.realpath(args.out))
    here = Path(os.path.realpath("."))
    home = Path(os.path.realpath(os.path.expanduser("~")))
    places = {"the current folder": here, "your home": home, "this project": ROOT}
    for name, place in places.items():
        if out == place or out in place.parents:
            raise UserError(f"--out {args.out} is {name}, or holds it: give a folder of its own, "
                            f"for example {Path('runs') / args.model}")
    for name in ("data", "data_dir"):
        place = getattr(args, name, None)
        if place and os.path.isdir(place) and out == Path(os.path.realpath(place)):
            raise UserError(f"--out {args.out} is the folder of {flag(name)}: give another one, "
                            f"for example {Path('runs') / args.model}")


def flag(name):
    return "--" + name.replace("_", "-")


def check_range(args, name, low, high):
    """For a range that depends on another flag. Any other range stands at the flag itself."""
    value = getattr(args, name)
    if not low <= value <= high:
        raise UserError(f"{flag(name)} must lie in [{low}, {high}], not {value}")


def check_sides(args, least):
    """UserError unless each side of --image-size has from `least` to 128 patches."""
    for side in sides(args.image_size):
        of_side = argparse.Namespace(image_size=side)
        check_range(of_side, "image_size", least * args.patch_size, 128 * args.patch_size)
