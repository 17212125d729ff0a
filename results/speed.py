"""results/speed.md: what python -m extras.bench measures, on a machine with nothing else to do.

    python -m results.speed                  # runs what has not run at this commit: half an hour
    python -m results.speed --list           # the commands

runs/speed.jsonl keeps the records as they come. They are copied to results/ at the end.
"""
import subprocess
import sys

from extras.plan import PEAKS
from results import make
from results.tables import RESULTS, ROOT, RUNS, fill, made_on, read_lines, table, write_lines
from support.args import Parser
from support.files import UserError, commit
from support.process import launch

ALONE = "--no-plain --no-timm --no-memory --repeats 1"
COMMANDS = [
    "python -m extras.bench --amp no",
    "python -m extras.bench --amp no --no-plain --no-timm --checkpoint-activations",
    *[f"python -m extras.bench --amp no --batch-size {n} {ALONE}" for n in (16, 32, 64)],
    "python -m extras.bench --stage vqkd --amp no",
    "python -m extras.bench --stage quantizer --amp no",
    "python -m extras.bench --stage loader --amp no --threads 1 --clock cpu --repeats 9",
    "python -m extras.bench --stage startup --amp no",
]

PAGE = """# Speed

Measured by `python -m results.speed` on a machine without a GPU ([on a GPU](gpu.md)). {made_on}
Records: [speed.jsonl](speed.jsonl).

## How near the machine's limit

Steps of base at 224 pixels. The share is that of the machine's matrix rate, the rate of the MLP's
first layer alone, which is timed before and after each step. *plain* is the same step with
everything computed, unfused and one-hot. Work that the last blocks leave out counts as done: shares
compare time, not arithmetic. Memory: the tensors that exist at one time beside weights and images.

{steps}

The look-up, straight-through, gradient and moving average of {vectors} vectors among {codes} codes
take {ms:.0f} ms, the one-hot version {plain_ms:.0f} ms: {ratio:.1f} times as long.

## Loader

Images a second of one loader process on one thread, process CPU time, JPEGs of 500 x 375:

{transforms}

Pre-training's two views beside other loaders, which take turns: torchvision's transforms on Pillow
images, and the same with the authors' further steps (float32, normalised). A window is drawn before
its JPEG is decoded, so that large photographs are decoded at a part of their size.

{loaders}

## Start-up

{startup}

How long the paper's runs take, computed for {cards}: `python -m extras.bench --plan`, and the table
in the [README](../README.md).
"""


def step_rows(records):
    """The table of steps: every contestant of every command."""
    rows = []
    for x in [x for x in records if "share" in x]:
        name = x["name"].removesuffix(" no")
        if x["checkpoint"]:
            name += ", `--checkpoint-activations`"
        memory = f"{x['peak_mib']:.0f}" if "peak_mib" in x else ""
        rows.append([name, x["batch"], f"{x['images_per_s']:.2f}", f"{100 * x['share']:.1f} %",
                     f"{x['limit'] / 1e9:.0f}", memory])
    return rows


def loader_rows(records):
    """-> lines per stage, lines per size of photograph"""
    loaders = {x["name"]: x for x in records if x["stage"] == "loader"}
    stages = [[name, f"{x['images_per_s']:.0f}"] for name, x in loaders.items() if "," not in name]
    sizes = dict.fromkeys(name.partition(", ")[0] for name in loaders if "," in name)
    others = "torchvision", "the authors' steps"
    photographs = []
    for size in sizes:
        mine = [loaders[f"{size}, {name}"] for name in others]
        photographs.append([size, *(f"{x['images_per_s']:.0f}" for x in
                                    [loaders[f"{size}, ours"], *mine]),
                            " and ".join(f"{x['ours_is_faster']:.1f}" for x in mine)])
    return stages, photographs


def feeding(records):
    """The README's sentence on the loader of pre-training."""
    loaders = {x["name"]: x for x in records if x["stage"] == "loader"}
    sizes = "500 x 375", "1500 x 1125"
    some, few = [f"{loaders[f'{size}, ours']['images_per_s']:.0f}" for size in sizes]
    times = " and ".join(f"{loaders[f'{size}, torchvision']['ours_is_faster']:.1f}"
                         for size in sizes)
    return [f"**Feeding it.** One core prepares {some} images a second of ImageNet's usual "
            f"{sizes[0]} JPEGs for", f"pre-training, and {few} of {sizes[1]}: {times} times what "
            f"torchvision's transforms do", "(`python -m extras.bench --stage loader`)."]


def page(records):
    """The text of results/speed.md. UserError if a command has no record"""
    missing = [command for command in COMMANDS if command not in {x["command"] for x in records}]
    if missing:
        raise UserError(f"there is no record of `{missing[0]}`")
    quantizer = next(x for x in records if x["stage"] == "quantizer")
    stages, photographs = loader_rows(records)
    startup = [[x["name"], f"{x['seconds']:.2f}"] for x in records if x["stage"] == "startup"]
    bare = next(x["import_torch"] for x in records if "import_torch" in x)
    startup.insert(0, ["`import torch`, which all others need", f"{bare:.2f}"])
    parts = dict(
        steps=table(["step", "batch", "images/s", "share", "limit, G/s", "MiB"],
                    step_rows(records)),
        transforms=table(["what is made", "images/s"], stages),
        loaders=table(["JPEGs of", "ours", "torchvision", "the authors' steps",
                       "ours is faster by"], photographs),
        startup=table(["", "s"], startup))
    facts = {name: quantizer[name] for name in ("vectors", "codes", "ms", "plain_ms", "ratio")}
    return fill(PAGE, made_on=made_on(records), cards=" and ".join(PEAKS), **facts,
                **{name: "\n".join(lines) for name, lines in parts.items()})


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("--list", action="store_true", help="print the commands and stop")
    args = p.parse_args(argv)
    if args.list:
        print("\n".join(COMMANDS))
        return
    kept = RUNS / "speed.jsonl"
    kept.parent.mkdir(exist_ok=True)
    for command in COMMANDS:
        done = {x["command"] for x in read_lines(kept) if x["commit"] == commit()}
        if command not in done:
            print(command, flush=True)
            words = [sys.executable, *command.split()[1:], "--out", str(kept)]
            subprocess.run(words, cwd=ROOT, check=True)
    newest = {(x["command"], x["stage"], x["name"] if "name" in x else ""): x
              for x in read_lines(kept) if x["command"] in COMMANDS}
    write_lines(RESULTS / "speed.jsonl", newest.values())
    make.main(["speed"])


if __name__ == "__main__":
    launch(main)
