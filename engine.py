"""What every stage needs and no stage is about: processes, seeds, schedules, parameter groups, checkpoints, log lines.

Read a stage file first and come here for a name that is not clear. Nothing in this file knows a stage.
"""
import argparse
import collections
import contextlib
import datetime
import hashlib
import json
import math
import os
import pickle
import platform
import random
import shlex
import signal
import subprocess
import sys
import time
import timeit
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent
Process = collections.namedtuple("Process", "rank world_size device")
POSITIVE = "limit image_size patch_size batch_size micro_batch epochs steps log_every save_every".split()
# Arguments in which a run may differ from the one it goes on from, for they do not say what is computed.
SAME_RUN = "fresh dry_run workers log_every save_every device compile download data_dir out amp_auto".split()


class UserError(Exception):
    """A mistake the user can mend: one sentence that names the thing and the remedy. run() exits 2 with it."""


def run(main):
    """Call a stage's main(). A UserError becomes one sentence on stderr and exit code 2, under torchrun only once;
    SIGTERM and Ctrl-C end the run without a traceback (143, 130). The last resume file stays."""
    sys.stdout.reconfigure(line_buffering=True)              # os._exit would drop what is still in the buffer
    if "RANK" not in os.environ:             # torchrun needs SIGTERM's default, which works inside a collective, too
        signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    try:
        main()
    except KeyboardInterrupt:
        os._exit(130)
    except Exception as error:
        # Rank 0 most likely met the same, or its end is what this rank met: then torchrun ends this process meanwhile.
        time.sleep(5 if int(os.environ.get("RANK", 0)) > 0 else 0)
        if not isinstance(error, UserError):
            raise
        # A loader's worker wraps the sentence in its traceback, as the last line.
        print(f"error: {str(error).splitlines()[-1].removeprefix('engine.UserError: ')}", file=sys.stderr, flush=True)
        os._exit(2) if dist.is_initialized() else sys.exit(2)     # peers may hang in a collective: do not wait for them
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------------- arguments
def add_run_args(parser):
    """The flags that all stages share; each stage adds those of its method."""
    g = parser.add_argument_group("run")
    g.add_argument("--model", default="tiny", help="preset and recipe: tiny (CPU, minutes), small, base, large")
    g.add_argument("--data", help="shapes, cifar10, cifar100 or a folder; base: datasets/imagenet")
    g.add_argument("--data-dir", default="datasets", help="where CIFAR lies")
    g.add_argument("--download", action="store_true", help="fetch CIFAR if it is not in --data-dir")
    g.add_argument("--limit", type=int, help="use only the first n images of each split")
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
    tiny = args.model == "tiny"
    shared = dict(out=Path("runs") / args.model, log_every=20, save_every=200, amp_auto=args.amp == "auto",
                  data="shapes" if tiny else "datasets/imagenet", workers=1 if tiny else min(8, os.cpu_count() or 1))
    for name, value in (shared | recipes[args.model]).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    check_ranges(args, [(name, 1, 10**12) for name in POSITIVE] + [("workers", 0, 1024)])
    return args


def check_ranges(args, ranges):
    """Refuse a flag outside its (name, low, high), NaN included. Flags that stayed at None pass."""
    for name, low, high in ranges:
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} must lie in [{low}, {high}], not {value}")


def steps_per_epoch(images, batch_size):
    """An incomplete last batch of an epoch is dropped."""
    if images < batch_size:
        raise UserError(f"{images} training images do not fill one batch of {batch_size}: lower --batch-size")
    return images // batch_size


def resolve_steps(args, images):
    """-> (steps, warmup_steps, steps_per_epoch)"""
    per_epoch = steps_per_epoch(images, args.batch_size)
    steps = args.steps or args.epochs * per_epoch            # a run cut short keeps the recipe's share of warm-up:
    warmup = round(args.steps * args.warmup_epochs / args.epochs) if args.steps else args.warmup_epochs * per_epoch
    return steps, min(warmup, steps - 1), per_epoch


def split_batch(batch_size, micro_batch, world_size):
    """-> (micro batch, accumulation): one update of `batch_size` as world_size * accumulation * micro images."""
    if batch_size % world_size:
        raise UserError(f"--batch-size {batch_size} is not a multiple of the {world_size} processes")
    per_rank = batch_size // world_size
    accumulation = max(1, math.ceil(per_rank / (micro_batch or per_rank)))
    while per_rank % accumulation:           # equal parts, so that a mean of means is the mean
        accumulation += 1
    return per_rank // accumulation, accumulation


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
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=datetime.timedelta(minutes=30))
    return Process(rank, world_size, torch.device(device))


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


def zeros_to_sum(n, device):
    """Where n numbers are added up over a data set: float64, but on mps, which has none."""
    return torch.zeros(n, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


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


def to_float(images, device):
    """uint8 images to float32 in [0, 1] on the device: they travel as bytes, a quarter of the size. Floats stay."""
    images = images.to(device, non_blocking=True)
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float()


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
def describe_run(kind, args):
    """What every file says about itself, beside its weights: arguments, commit, and a hash of each source file."""
    status, commit = subprocess.getstatusoutput(f"git -C {shlex.quote(str(ROOT))} rev-parse HEAD")
    return dict(kind=kind, preset=args.model, data=str(args.data), image_size=args.image_size, args=plain_args(args),
                commit="unknown" if status else commit, torch=str(torch.__version__), source_hash={
                    f.name: hashlib.sha256(f.read_bytes()).hexdigest()[:12] for f in sorted(ROOT.glob("*.py"))})


def plain_args(args):
    return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in vars(args).items()}


def write_file(path, contents):
    """torch.save to a temporary name beside `path`, flush to disk, then rename: a reader never sees half a file."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            torch.save(contents, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if temporary.is_file():
            temporary.unlink()
        raise UserError(f"could not write {path} ({' '.join(str(error).split())}): free some space or choose another "
                        f"--out; the file that was there before is untouched") from error


def read_file(path, kind=None, remedy=""):
    """Load a checkpoint on the CPU without running any code in it; UserError for what is none. An argparse.Namespace,
    which released files hold, is harmless and allowed; any other object is refused."""
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}" + (f"; {remedy}" if remedy else ""))
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds objects other than tensors and numbers, or is damaged: not loaded") from error
    except Exception as error:               # a damaged file raises whatever its reader stumbles over
        raise UserError(f"{path} is truncated or no checkpoint at all: make or fetch it anew") from error
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds a {type(contents).__name__}, not a checkpoint")
    if kind is not None and contents.get("kind") != kind:
        raise UserError(f"{path} is a {contents.get('kind', 'foreign')!r} file where a {kind!r} file is needed")
    return contents


def differences(old, new):
    """Arguments that change what a run computes and differ between two runs, as readable text."""
    return [f"--{k.replace('_', '-')} {old.get(k)} -> {new.get(k)}" for k in sorted(old.keys() | new.keys())
            if k not in SAME_RUN and old.get(k) != new.get(k)]


def set_aside(stage, out):
    """--fresh: earlier results move to OUT.1 (or .2 ...). With the tokenizer goes the whole folder, which stands on it;
    a later stage moves only its own files, for it needs the others."""
    aside = Path(next(f"{out}.{n}" for n in range(1, 10**6) if not Path(f"{out}.{n}").exists()))
    if stage == "vqkd" and out.exists():
        out.rename(aside)
    for f in sorted(out.glob(f"{stage}.*")):
        aside.mkdir(exist_ok=True)
        f.rename(aside / f.name)


def start_or_resume(stage, args, process):
    """-> the contents of STAGE.resume.pt to go on from, or None for a fresh start. Exits 0 where the run is already
    done; raises UserError where the folder holds a run with other arguments."""
    if args.fresh and process.rank == 0:
        set_aside(stage, args.out)
    if process.world_size > 1:
        dist.barrier()
    final = args.out / f"{stage}.pt"
    for path in filter(Path.exists, (final, args.out / f"{stage}.resume.pt", args.out / f"{stage}.resume.pt.prev")):
        try:
            state = read_file(path, kind=stage)
        except UserError as error:
            if path == final:
                raise
            print(f"{error}; trying the one before", file=sys.stderr)
            continue
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
    return None


def save_resume(stage, args, contents):
    """Write STAGE.resume.pt; the one before stays as .prev until the next time."""
    resume = args.out / f"{stage}.resume.pt"
    if resume.exists():
        os.replace(resume, f"{resume}.prev")
    write_file(resume, contents)


def finish(stage, args, contents):
    """Write the hand-over STAGE.pt, then drop the resume files."""
    write_file(args.out / f"{stage}.pt", contents)
    for name in (f"{stage}.resume.pt", f"{stage}.resume.pt.prev"):
        (args.out / name).unlink(missing_ok=True)


class Log:
    """One JSON line per call on rank 0, appended to STAGE.jsonl; the first line says what the run is. On resuming,
    lines of steps that the resume file does not know are cut off, so that no step stands there twice. With `append`
    (measurements, which are no runs) all lines stay, and another first line follows them."""

    def __init__(self, path, args, process, start_step=0, append=False, **facts):
        self.path, self.active, self.begin = Path(path), process.rank == 0, time.time()
        if self.active:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make {self.path.parent} ({error.strerror}): choose another --out") from error
            lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
            lines = [x for x in lines if x.endswith("}\n") and (
                append or start_step and json.loads(x).get("step", -1) < start_step)]
            self.path.write_text("".join(lines))
            if append or not lines:
                self(**describe_run(self.path.stem, args), python=platform.python_version(), cores=os.cpu_count(),
                     machine=platform.machine(), threads=torch.get_num_threads(), processes=process.world_size,
                     device=str(process.device), **facts)

    def __call__(self, **facts):
        if self.active:
            facts = {k: round(v, 6) if isinstance(v, float) else v for k, v in facts.items()}
            with open(self.path, "a") as f:
                f.write(json.dumps(facts | dict(time=round(time.time() - self.begin, 2))) + "\n")


def progress(start, total, process, label):
    """A tqdm bar on a terminal; where output goes to a file, nothing (the JSON log has it all)."""
    from tqdm import tqdm
    return tqdm(range(start, total), initial=start, total=total, desc=label, dynamic_ncols=True,
                disable=process.rank > 0 or not sys.stderr.isatty())


def check_finite(loss, step, args):
    """Stop a run whose loss is no number any more; what is on disk stays the last good state."""
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} at step {step}: lower --lr or check the images; "
                        f"the last good state is in {args.out}")
