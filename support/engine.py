"""What finetune, linprobe and segment still use. It goes when they, too, use support/run.py and support/args.py."""
import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from support.files import Log, UserError, describe_run, read_file, set_aside, write_file  # noqa: F401
from support.optim import adamw, cosine_schedule, param_groups, set_lr  # noqa: F401
from support.process import Process, StopSignal, keep_freed_memory, launch as run, seed_all  # noqa: F401
from support.process import resolve_amp  # noqa: F401
from support.process import join_processes as init_distributed  # noqa: F401
from support.run import differences, find_resume_file as start_or_resume  # noqa: F401

POSITIVE = "limit image_size patch_size batch_size micro_batch epochs steps log_every save_every".split()


class Watch:
    """What ends a run between two updates: a loss that is no number, SIGTERM, Ctrl-C. All processes decide alike."""

    def __init__(self, args, process, log, names):
        self.args, self.process, self.log, self.names = args, process, log, names        # names(step): images of a step
        self.first_bad = torch.full((), sys.maxsize, device=process.device)
        self.handler = signal.getsignal(signal.SIGINT)       # a StopSignal, unless a notebook calls main
        if isinstance(self.handler, StopSignal):
            self.handler.in_loop = True
            signal.signal(signal.SIGTERM, self.handler)

    def note(self, loss, step):
        """Keep the first step whose loss is not finite, without waiting for the device."""
        self.first_bad = torch.where(loss.detach().isfinite(), self.first_bad, self.first_bad.clamp(max=step))

    def look(self, step, now):
        """-> the signal received, or 0. UserError after a loss that was not finite. Looking waits for a GPU, so there
        it is done every tenth step, and where `now` is true: before a state is logged or saved."""
        received = getattr(self.handler, "received", 0)
        if self.process.device.type != "cpu" and not now and step % 10:
            return received if self.process.world_size == 1 else 0
        numbers = torch.stack([-self.first_bad, self.first_bad.new_tensor(received)])
        if self.process.world_size > 1:
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        bad, received = -int(numbers[0]), int(numbers[1])
        if bad < sys.maxsize:
            names = self.names(bad)
            self.log(step=bad, warning="the loss is not finite", images=names)
            raise UserError(f"the loss is not finite at step {bad}: lower --lr, or check the images of that update "
                            f"({', '.join(names[:3])}; all of them are in {self.log.path}); the last good state stays "
                            f"in {self.args.out}")
        if received and self.process.rank == 0:
            print(f"{signal.Signals(received).name}: saved after step {step}; the same command goes on",
                  file=sys.stderr)
        return received


def add_run_args(parser):
    """The flags that all stages share; each stage adds those of its method."""
    g = parser.add_argument_group("run")
    g.add_argument("--model", default="tiny", help="preset and recipe: tiny (CPU, minutes), small, base, large")
    g.add_argument("--data", help="shapes, cifar10, cifar100 or a folder; base: datasets/imagenet")
    g.add_argument("--data-dir", default="datasets", help="where CIFAR lies")
    g.add_argument("--download", action="store_true", help="fetch CIFAR if it is not in --data-dir")
    g.add_argument("--limit", type=int, help="use only the first n images of each split")
    g.add_argument("--on-bad-image", default="stop", choices=["stop", "skip"],
                   help="an image that cannot be read ends the run; or all are read once at the start, and bad ones "
                        "left out and listed in OUT/bad_images.txt; default: stop")
    g.add_argument("--image-size", type=int, help="pixels; base: 224")
    g.add_argument("--patch-size", type=int, help="pixels; base: 16")
    g.add_argument("--out", type=Path, help="folder of this run; default runs/MODEL")
    g.add_argument("--fresh", action="store_true", help="set earlier results of this stage aside and start over")
    g.add_argument("--batch-size", type=int, help="images per update over all processes and accumulation steps")
    g.add_argument("--micro-batch", type=int, help="images one process holds at once; the rest is accumulated")
    g.add_argument("--epochs", type=int, help="passes over the training images")
    g.add_argument("--steps", type=int, help="number of updates, instead of --epochs")
    g.add_argument("--amp", default="auto", choices=["auto", "no", "bf16"], help="bfloat16; auto: where it is faster")
    g.add_argument("--compile", action="store_true", help="torch.compile the network")
    g.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    g.add_argument("--workers", type=int, help="loader processes per rank; default: 1 for tiny, else 8 or the cores")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--log-every", type=int, help="steps between log lines; default 20")
    g.add_argument("--save-every", type=int, help="steps between resume files; default 200")
    g.add_argument("--dry-run", action="store_true", help="print recipe, shapes, parameters and stop")


def with_recipe(args, recipes):
    """Fill every flag left at None: from the preset's row of the stage's RECIPES, else from what all stages share."""
    if args.model not in recipes:
        raise UserError(f"--model {args.model} is not a preset of this stage; choose from {', '.join(recipes)}")
    if args.steps is not None and args.epochs is not None:
        raise UserError(f"--steps {args.steps} and --epochs {args.epochs} both say how long to train: give one of them")
    tiny = args.model == "tiny"
    shared = dict(out=Path("runs") / args.model, log_every=20, save_every=200, amp_auto=args.amp == "auto",
                  data="shapes" if tiny else "datasets/imagenet", workers=1 if tiny else min(8, os.cpu_count() or 1))
    for name, value in (shared | recipes[args.model]).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    check_ranges(args, [(name, 1, 10**9) for name in POSITIVE] + [("workers", 0, 1024), ("seed", 0, 2**32 - 1)])
    return args


def check_ranges(args, ranges):
    """Refuse a flag, or one number of several, outside its (name, low, high), NaN included. Those left at None pass."""
    for name, low, high in ranges:
        given = getattr(args, name)
        for value in given if isinstance(given, (list, tuple)) else [given]:
            if value is not None and not low <= value <= high:
                raise UserError(f"--{name.replace('_', '-')} must lie in [{low}, {high}], not {value}")


def check_sizes(image_size, patch_size):
    """Refuse sizes that make no grid of patches, or one whose tables of positions would fill the memory."""
    check_ranges(argparse.Namespace(image_size=image_size, patch_size=patch_size), [
        ("patch_size", 1, image_size), ("image_size", patch_size, 128 * patch_size)])


def distribute(model, process):
    """DistributedDataParallel where there are several processes. Buffers are not broadcast: they are equal on all ranks
    by construction, and a broadcast would hide it if they were not."""
    ids = [process.device.index] if process.device.type == "cuda" else None
    return model if process.world_size == 1 else torch.nn.parallel.DistributedDataParallel(
        model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def no_sync(model, last):
    """Gradients travel between processes only with the last micro-batch of an update."""
    return contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()


def all_reduce_sum(tensor):
    """Sum over all processes, in place; the tensor itself where there is one process."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def autocast(device, amp):
    """bfloat16 matrix products where amp is "bf16"; float32 otherwise."""
    # Differs from the recipe, float16 with a GradScaler: bf16 has float32's range, so no gradient has to be scaled.
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")


def save_resume(stage, args, contents):
    """Write STAGE.resume.pt; the one before stays as .prev until the next time."""
    resume = args.out / f"{stage}.resume.pt"
    write_file(resume, contents, previous=f"{resume}.prev")


def finish(stage, args, contents):
    """Write the hand-over STAGE.pt, then drop the resume files."""
    write_file(args.out / f"{stage}.pt", contents)
    for f in args.out.glob(f"{stage}.resume.pt*"):           # .prev, and .tmp of a process killed while writing
        f.unlink()


def progress(start, total, process, label):
    """A tqdm bar on a terminal; where output goes to a file, nothing (the JSON log has it all)."""
    from tqdm import tqdm
    return tqdm(range(start, total), initial=start, total=total, desc=label, dynamic_ncols=True,
                disable=process.rank > 0 or not sys.stderr.isatty())
