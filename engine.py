"""What every stage needs and no stage is about: processes, seeds, schedules, parameter groups, checkpoints, log lines.

Read a stage file first and come here for a name that is not clear. Nothing in this file knows a stage.
"""
import argparse
import collections
import contextlib
import ctypes
import datetime
import hashlib
import json
import math
import os
import random
import signal
import sys
import time
import timeit
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from weights import Log, UserError, describe_run, read_file, set_aside, write_file  # noqa: F401

Process = collections.namedtuple("Process", "rank world_size device")
POSITIVE = "limit image_size patch_size batch_size micro_batch epochs steps log_every save_every".split()
# Arguments in which a run may differ from the one it goes on from, for they do not say what is computed.
SAME_RUN = "fresh dry_run workers log_every save_every device compile download data_dir out amp_auto".split()


def run(main):
    """Call a stage's main(). A UserError becomes one sentence on stderr and exit code 2, under torchrun only once; a
    process that lost another one says so and exits 1; SIGTERM and Ctrl-C end a run with its state saved (143, 130)."""
    # Unbuffered lines, as os._exit would drop what is still in the buffer; and file names may be no valid UTF-8.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    keep_freed_memory()
    signal.signal(signal.SIGINT, StopSignal())
    if "RANK" not in os.environ:             # torchrun needs SIGTERM's default until the loop, to end a waiting one
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    try:
        main()
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)        # from here on nothing is worth waiting for
        # Rank 0 most likely met the same, or its end is what this rank met: then torchrun ends this process meanwhile.
        rank = int(os.environ.get("RANK", 0))
        time.sleep(5 if rank > 0 else 0)
        if isinstance(error, UserError):
            # A loader's worker wraps the sentence in its traceback, as the last line.
            text, code = str(error), 2
            text = text.splitlines()[-1].rpartition("UserError: ")[2] if text.startswith("Caught ") else text
        elif isinstance(error, dist.DistError) or "gloo" in str(error):
            text, code = (f"rank {rank} lost another process, whose own words or the launcher's say why; the same "
                          f"command goes on from the last resume file"), 1
        else:
            raise
        print(f"error: {' '.join(text.splitlines())}", file=sys.stderr, flush=True)
        os._exit(code) if dist.is_initialized() else sys.exit(code)      # peers may hang: do not wait for them
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            ended = sys.exc_info()[1]
            if ended is None or isinstance(ended, SystemExit):
                # Not the interpreter's own end: a thread of gloo that then drops its last tensor asks for the
                # interpreter's lock in a destructor, which aborts the process after all its work (torch 2.14).
                os._exit((ended.code or 0) if ended else 0)


class StopSignal:
    """What SIGTERM and Ctrl-C do: outside of a training loop they end the process; in one they are kept for Watch, and
    a second one ends the process at once (not under torchrun, which passes on one of its own)."""

    received, in_loop = 0, False

    def __call__(self, number, frame):
        if not self.in_loop or (self.received and "RANK" not in os.environ):
            os._exit(128 + number)
        self.received = number


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


# --------------------------------------------------------------------------------------------------------- arguments
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


# --------------------------------------------------------------------------------------------- processes and devices
def init_distributed(device="auto"):
    """-> Process, for `python STAGE.py` and `torchrun STAGE.py` alike: nccl on GPUs, else gloo."""
    available = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if device == "auto":
        device = "cuda" if available["cuda"] else "cpu"
    if not available[device]:
        raise UserError(f"--device {device}: torch sees no such device here; use --device cpu")
    rank, local, world_size = (int(os.environ.get(k, v)) for k, v in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1).items())
    if device == "cuda":
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    if world_size > 1 and not dist.is_initialized():
        # torchrun --max-restarts keeps its store, where processes that are gone have left their addresses: so each
        # start has a name of its own there.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), next(dist.rendezvous("env://"))[0])
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", store=store, rank=rank,
                                world_size=world_size, timeout=datetime.timedelta(minutes=30))
    return Process(rank, world_size, torch.device(device))


def keep_freed_memory(keep=True):
    """Linux: what a step frees stays with the process for the next. glibc would hand large blocks back, and the kernel
    clears each page when it is asked again: up to a third of a step on a CPU.  keep=False: as glibc does it"""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):             # glibc, not musl.  M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD:
        for name, value in ((-4, 0 if keep else 65536), (-3, 2**25), (-1, -1 if keep else 2**26)):
            libc.mallopt(name, value)


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


def resolve_amp(amp, device):
    """auto: bf16 on CUDA, and on a CPU with bf16 matrix instructions if they make a product 1.5 times faster."""
    if amp != "auto" or device.type == "cuda":
        return amp.replace("auto", "bf16")
    if device.type != "cpu" or not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return "no"
    seconds = [min(timeit.repeat("a @ a", globals=dict(a=torch.ones(768, 768, dtype=dtype)), number=1, repeat=8))
               for dtype in (torch.float32, torch.bfloat16)]
    float32, bf16 = all_reduce_sum(torch.tensor(seconds)).tolist()       # one answer for all processes
    return "bf16" if 1.5 * bf16 < float32 else "no"


# --------------------------------------------------------------------------- randomness, schedules, groups, updates
def seed_all(*numbers):
    """Seed torch, random and numpy from any integers, say (seed, epoch, index): the draws that follow are a function of
    these numbers alone, so that no generator state has to be saved."""
    value = int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")
    # Not torch.manual_seed, which spends 100 us a call on a CUDA that is not in use: this runs once per image.
    torch.default_generator.manual_seed(value % 2**63)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value % 2**63)
    random.seed(value)
    np.random.seed(value % 2**32)


def cosine_schedule(step, base, final, total, warmup=0, start=0.0):
    """Linear warm-up from `start`, then a half cosine from base towards final. Recipe, not in the paper: step 0 has
    rate `start` exactly, the peak comes twice (steps warmup - 1 and warmup), and `final` is approached only."""
    if step < warmup:
        return start + (base - start) * step / (warmup - 1) if warmup > 1 else start
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def param_groups(named, weight_decay, skip=("cls_token", "pos_embed"), layer_id=None, layer_decay=1.0, depth=0):
    """AdamW groups. No weight decay for 1-D parameters, biases and names in `skip` (whole or as their last part);
    mask_token and relative-position tables ARE decayed. With layer_decay < 1 layer i learns at
    lr_scale = layer_decay ** (depth + 1 - i), where layer_id(name) gives i (0: embeddings, depth + 1: head)."""
    groups = {}
    for name, p in named:
        if p.requires_grad:
            no_decay = p.ndim == 1 or name.endswith(".bias") or name in skip or name.rsplit(".", 1)[-1] in skip
            layer = depth + 1 if layer_id is None else layer_id(name)
            group = groups.setdefault((layer, no_decay), dict(params=[], names=[], weight_decay=(
                0.0 if no_decay else weight_decay), lr_scale=layer_decay ** (depth + 1 - layer)))
            group["params"].append(p)
            group["names"].append(name)
    return list(groups.values())


def adamw(groups, betas, device):
    # Recipe, not in the paper: eps 1e-8. Fused: one kernel for all parameters instead of a handful per tensor.
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=device.type in ("cpu", "cuda"))


def set_lr(optimizer, lr):
    """The rate of the schedule times each group's lr_scale (layer-wise decay scales the minimum, too)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


# ----------------------------------------------------------------------------------------- checkpoints and log lines
def differences(old, new):
    """Arguments that change what a run computes and differ between two runs, as readable text."""
    return [f"--{k.replace('_', '-')} {old.get(k)} -> {new.get(k)}" for k in sorted(old.keys() | new.keys())
            if k not in SAME_RUN and old.get(k) != new.get(k)]


def start_or_resume(stage, args, process):
    """-> the contents of STAGE.resume.pt to go on from, or None for a fresh start. Exits 0 where the run is already
    done; raises UserError where the folder holds a run with other arguments, or none of its files can be read."""
    # torchrun --max-restarts repeats the command after a failure: what it then finds is this run's own.
    if args.fresh and process.rank == 0 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        set_aside(stage, args.out)
    if process.world_size > 1:
        dist.barrier()
    final, resume = args.out / f"{stage}.pt", args.out / f"{stage}.resume.pt"
    state, unreadable = None, ""
    for path in filter(Path.exists, (final, resume, Path(f"{resume}.prev"))):
        try:
            state = read_file(path, kind=stage)
            break
        except UserError as error:
            if path == final:
                raise
            unreadable = str(error)
            if process.rank == 0:
                print(f"{unreadable}; trying the one before", file=sys.stderr)
    if unreadable and not state:
        raise UserError(f"no resume file in {args.out} can be read ({unreadable}): add --fresh to start over")
    if process.world_size > 1:               # all ranks have to go on from one and the same step
        steps = torch.tensor([1, -1], device=process.device) * (state or {}).get("step", -1)
        dist.all_reduce(steps, dist.ReduceOp.MAX)
        if steps.sum():
            raise UserError(f"the processes see different files in {args.out}: name a folder that all machines share")
    if not state:
        return None
    if "source_hash" not in state:
        raise UserError(f"{path} was made by another command (converted?): choose another --out, or add --fresh")
    if args.amp_auto:        # measured once per run: the machine may be busier now
        args.amp = state["args"]["amp"]
    now = describe_run(stage, args)
    if changed := differences(state["args"], now["args"]):
        raise UserError(f"{path} belongs to a run with other arguments ({'; '.join(changed)}): "
                        f"repeat them, choose another --out, or add --fresh")
    if path != final:
        return state
    if process.rank == 0:
        edited = ", ".join(f for f, h in now["source_hash"].items() if state["source_hash"].get(f) != h)
        print(f"already done: {final}, {json.dumps(state.get('result', {}))}"
              + (f"; source files changed since: {edited}" if edited else ""))
    raise SystemExit(0)


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
