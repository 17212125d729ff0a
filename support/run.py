"""A run: everything around a training loop that is no method. The loop itself stays in the stage file.

    run = Run("pretrain", args)                      # processes, device, precision, the state to go on from
    network = run.start(train_set, model=model, optimizer=optimizer)
    for step in run.steps():                         # progress bar, stop signals, resume files
        for batch in run.micro_batches():
            with run.autocast():
                loss = ...
            run.backward(loss)
        optimizer.step()
        if run.log_due:
            run.log(loss=loss)
    run.finish(result)

All randomness is a function of (seed, step), so a resume file needs no generator state.
Nothing in this file knows a stage.
"""
import argparse
import ctypes
import dataclasses
import datetime
import json
import os
import signal
import sys
import time
import timeit
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import count_parameters
from support import data
from support.data import seed_all
from support.files import Log, UserError, describe_run, plain_args, read_file, set_aside, write_file

# Arguments that may change between a run and its continuation: they do not say what is computed.
SAME_RUN = ("fresh dry_run workers log_every save_every device compile download data_dir out "
            "amp_auto").split()


# --- where a run computes -------------------------------------------------------------------------
@dataclasses.dataclass
class Process:
    """This process among all of the run, its device and its precision."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    amp: str = "no"

    @property
    def is_main(self):
        return self.rank == 0

    def autocast(self):
        """bfloat16 matrix products where amp is "bf16"; float32 otherwise."""
        # Differs from the recipe (float16, GradScaler): bf16 has float32's range, no loss scaling.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp == "bf16")

    def sum(self, tensor):
        """Sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor):
        """All processes receive rank 0's numbers, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def print(self, text):
        if self.is_main:
            print(text, flush=True)

    def warn(self, text):
        if self.is_main:
            print(f"warning: {text}", file=sys.stderr, flush=True)


def join_processes(device="auto"):
    """-> Process, for `python STAGE.py` and `torchrun STAGE.py` alike. nccl on GPUs, else gloo."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = "cuda" if available["cuda"] else "cpu"
    if not available[device]:
        raise UserError(f"--device {device}: torch sees no such device here; use --device cpu")
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        # torchrun --max-restarts keeps its store, where processes that are gone left their
        # addresses: so each start has a name of its own there.
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                                timeout=datetime.timedelta(minutes=30))
    return Process(rank, world_size, torch.device(device))


def resolve_amp(amp, process):
    """auto: bf16 on CUDA; on a CPU with bf16 instructions if a product is 1.5 times faster."""
    if amp != "auto":
        return amp
    if process.device.type == "cuda":
        return "bf16"
    has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if process.device.type != "cpu" or not has_bf16:
        return "no"
    seconds = torch.zeros(2)
    for i, dtype in enumerate([torch.float32, torch.bfloat16]):
        a = torch.ones(768, 768, dtype=dtype)
        seconds[i] = min(timeit.repeat(lambda: a @ a, number=1, repeat=8))
    float32, bf16 = process.sum(seconds).tolist()            # one answer for all processes
    return "bf16" if 1.5 * bf16 < float32 else "no"


# --- the run --------------------------------------------------------------------------------------
class Run(Process):
    """One training run in the folder OUT: STAGE.jsonl (log), STAGE.resume.pt, at the end STAGE.pt."""

    def __init__(self, stage, args):
        self.stage, self.args, self.out = stage, args, args.out
        here = join_processes(args.device)
        super().__init__(here.rank, here.world_size, here.device)
        args.amp = self.amp = resolve_amp(args.amp, self)
        args.micro_batch = args.micro_batch or args.batch_size
        self.resumed = find_resume_file(stage, args, self)   # None at the beginning
        self.amp = args.amp
        self.step = 0

    def start(self, train_set, facts=None, about=None, **parts):
        """Everything is built: go on from the resume file if there is one, open log and loader.

        parts: what a resume file has to hold, by name; anything with state_dict(). `model` is the
        network, which is returned compiled and wrapped as needed.
        facts: what the log's first line says; about: what the files say beside the weights.
        """
        self.train_set, self.parts, self.about = train_set, parts, about or {}
        self.model = parts["model"]
        if self.resumed:
            self.step = self.resumed["step"]
            for name, part in parts.items():
                part.load_state_dict(self.resumed[name])

        args = self.args
        self.total_steps, self.warmup_steps, self.steps_per_epoch = data.resolve_steps(args, len(train_set))
        self.micro_batch, self.accumulation = data.split_batch(
            args.batch_size, args.micro_batch, self.world_size)
        batches = data.train_batches(len(train_set), args.batch_size, self.total_steps, self.step,
                                     self.rank, self.world_size, self.accumulation, args.seed)
        self.batches = iter(data.make_loader(train_set, batches, args.workers, self.device))
        self.log_file = Log(self.out / f"{self.stage}.jsonl", args, self, self.step, **(
            dict(images=len(train_set), steps=self.total_steps) | (facts or {})))
        self.first_bad_step = torch.full((), sys.maxsize, device=self.device)
        self.clock, self.clock_step = time.time(), self.step
        self.network = torch.compile(self.model) if args.compile else self.model
        if self.world_size > 1:
            # Buffers are equal by construction; a broadcast would only hide it if they were not.
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(
                self.network, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.print(f"{self.stage}: {count_parameters(self.model) / 1e6:.2f} M parameters, "
                   f"{len(train_set)} images, {self.total_steps} steps of {args.batch_size} = "
                   f"{self.world_size} processes x {self.accumulation} x {self.micro_batch}")
        return self.network

    # --- the loop
    def steps(self):
        """The updates still to do. Between two of them: resume files, stop signals, a bad loss."""
        handler = signal.getsignal(signal.SIGINT)            # none of ours in a notebook
        if isinstance(handler, StopSignal):
            handler.in_loop = True
            signal.signal(signal.SIGTERM, handler)
        hide_bar = not self.is_main or not sys.stderr.isatty()
        for self.step in tqdm(range(self.step, self.total_steps), initial=self.step, total=self.total_steps,
                              desc=self.stage, dynamic_ncols=True, disable=hide_bar):
            yield self.step
            save = (self.step + 1) % self.args.save_every == 0
            stop = self.check(now=save or self.is_last)
            if self.is_last:
                return                                       # the stage calls finish
            if save or stop:
                self.save()
            if stop:
                name = signal.Signals(stop).name
                if self.is_main:
                    print(f"{name}: saved after step {self.step}; the same command goes on", file=sys.stderr)
                raise SystemExit(128 + stop)

    def micro_batches(self):
        """The parts of one update, one after the other; gradients are summed over them."""
        for k in range(self.accumulation):
            batch = next(self.batches)                       # (images, labels)
            # Gradients travel between processes only with the last part.
            if self.world_size > 1:
                self.network.require_backward_grad_sync = k == self.accumulation - 1
            seed_all(self.args.seed, self.step, self.rank, k)            # for stochastic depth
            yield batch

    def backward(self, loss):
        """Gradients of the mean over micro-batches. Keeps the first step whose loss is no number."""
        (loss / self.accumulation).backward()
        # Without waiting for the device: no `if`.
        bad = self.first_bad_step.clamp(max=self.step)
        self.first_bad_step = torch.where(loss.detach().isfinite(), self.first_bad_step, bad)

    @property
    def is_last(self):
        return self.step == self.total_steps - 1

    @property
    def log_due(self):
        return self.step % self.args.log_every == 0 or self.is_last

    @property
    def epoch_ends(self):
        return (self.step + 1) % self.steps_per_epoch == 0 or self.is_last

    def log(self, **facts):
        """One line of STAGE.jsonl about this step. Tensors become numbers, which waits for a GPU."""
        self.check(now=True)
        seconds = time.time() - self.clock
        images = (self.step + 1 - self.clock_step) * self.args.batch_size
        self.log_file(step=self.step, epoch=self.step / self.steps_per_epoch, **numbers(facts),
                      lr=self.parts["optimizer"].param_groups[0]["lr"], images_per_s=images / seconds)
        self.clock, self.clock_step = time.time(), self.step + 1

    def log_evaluation(self, facts):
        """One line about the held-out images, in the log and on the screen."""
        self.log_file(step=self.step, epoch=(self.step + 1) / self.steps_per_epoch, split="val", **facts)
        text = ", ".join(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
                         for name, value in facts.items())
        self.print(f"step {self.step + 1}/{self.total_steps}: {text}")

    def eval_batches(self, dataset, batch_size=None):
        """This process's share of a data set, each image once. Does not count for images_per_s."""
        begun = time.time()
        batch_size = batch_size or self.args.micro_batch
        shares = data.eval_batches(len(dataset), batch_size, self.rank, self.world_size)
        yield from data.make_loader(dataset, shares, self.args.workers, self.device)
        if hasattr(self, "clock"):
            self.clock += time.time() - begun

    def check(self, now=False):
        """-> the signal received, or 0. UserError after a loss that was no number.

        All processes decide alike. Looking waits for a GPU: there every tenth step, or `now`.
        """
        handler = signal.getsignal(signal.SIGINT)
        received = getattr(handler, "received", 0)
        if self.device.type != "cpu" and not now and self.step % 10:
            return received if self.world_size == 1 else 0
        found = torch.stack([-self.first_bad_step, self.first_bad_step.new_tensor(received)])
        if self.world_size > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        bad, received = -int(found[0]), int(found[1])
        if bad < sys.maxsize:
            names = data.names_of(self.train_set, self.args.batch_size, bad, self.args.seed)
            self.log_file(step=bad, warning="the loss is not finite", images=names)
            raise UserError(f"the loss is not finite at step {bad}: lower --lr, or check the images of that "
                            f"update ({', '.join(names[:3])}; all of them are in {self.log_file.path}); "
                            f"the last good state stays in {self.out}")
        return received

    # --- files
    def save(self):
        """Write STAGE.resume.pt; the one before stays as .prev until the next time."""
        if self.is_main:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            path = self.out / f"{self.stage}.resume.pt"
            write_file(path, contents(self.stage, self.model, self.args) | self.about | state
                       | dict(step=self.step + 1), previous=f"{path}.prev")

    def finish(self, result):
        """Write the hand-over STAGE.pt, then drop the resume files."""
        self.log_file(summary=1, step=self.total_steps, **result)
        if self.is_main:
            facts = dict(step=self.total_steps, result=result)
            write_file(self.out / f"{self.stage}.pt", contents(self.stage, self.model, self.args) | self.about | facts)
            for leftover in self.out.glob(f"{self.stage}.resume.pt*"):
                leftover.unlink()
        return result


def numbers(facts):
    return {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in facts.items()}


def contents(stage, model, args):
    """What every file of a stage holds: arguments, commit, sources, weights, the model's sizes."""
    return describe_run(stage, args) | dict(model=model.state_dict(), arch=model.arch())


def dry_run(args, model, *lines):
    """--dry-run: the recipe and the size of the model, which may lie on the device "meta"."""
    for name, value in sorted(plain_args(args).items()):
        print(f"{name:18} {value}")
    print(f"{count_parameters(model):,} trainable parameters; " + "; ".join(lines))


def differences(old, new):
    """Arguments that change what a run computes and differ between two runs, as readable text."""
    return [f"--{k.replace('_', '-')} {old.get(k)} -> {new.get(k)}" for k in sorted(old.keys() | new.keys())
            if k not in SAME_RUN and old.get(k) != new.get(k)]


def find_resume_file(stage, args, process):
    """-> the contents of STAGE.resume.pt, or None for a fresh start. Exits 0 where the run is done.

    UserError where the folder holds a run with other arguments, or none of its files can be read.
    """
    # torchrun --max-restarts repeats the command: what it then finds is this run's own.
    first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if args.fresh and process.rank == 0 and first_start:
        set_aside(stage, args.out)
    if process.world_size > 1:
        dist.barrier()
    final = args.out / f"{stage}.pt"
    resume = args.out / f"{stage}.resume.pt"
    path, state = read_first([final, resume, Path(f"{resume}.prev")], stage, args, process)
    if process.world_size > 1:               # all ranks have to go on from one and the same step
        step = (state or {}).get("step", -1)
        steps = torch.tensor([step, -step], device=process.device)
        dist.all_reduce(steps, dist.ReduceOp.MAX)
        if steps.sum():
            raise UserError(f"the processes see different files in {args.out}: name a folder that all machines share")
    if state is None:
        return None
    if "source_hash" not in state:
        raise UserError(f"{path} was made by another command (converted?): choose another --out, or add --fresh")
    if args.amp_auto:                        # measured once per run: the machine may be busier now
        args.amp = state["args"]["amp"]
    now = describe_run(stage, args)
    if changed := differences(state["args"], now["args"]):
        raise UserError(f"{path} belongs to a run with other arguments ({'; '.join(changed)}): "
                        f"repeat them, choose another --out, or add --fresh")
    if path != final:
        return state
    if process.rank == 0:
        edited = [f for f, h in now["source_hash"].items() if state["source_hash"].get(f) != h]
        note = f"; source files changed since: {', '.join(edited)}" if edited else ""
        print(f"already done: {final}, {json.dumps(state.get('result', {}))}{note}")
    raise SystemExit(0)


def read_first(paths, stage, args, process):
    """-> (path, contents) of the first of these files that can be read, or (None, None)."""
    unreadable = ""
    for path in paths:
        if not path.exists():
            continue
        try:
            return path, read_file(path, kind=stage)
        except UserError as error:
            if path == paths[0]:
                raise
            unreadable = str(error)
            if process.rank == 0:
                print(f"{unreadable}; trying the one before", file=sys.stderr)
    if unreadable:
        raise UserError(f"no resume file in {args.out} can be read ({unreadable}): add --fresh to start over")
    return None, None


# --- the process around a run ---------------------------------------------------------------------
class StopSignal:
    """SIGTERM and Ctrl-C. Outside a training loop they end the process; in one Run.check sees them.
    A second one ends the process at once (not under torchrun, which passes on one of its own)."""

    received, in_loop = 0, False

    def __call__(self, number, frame):
        again = self.received and "RANK" not in os.environ
        if not self.in_loop or again:
            os._exit(128 + number)
        self.received = number


def launch(main):
    """Call a stage's main(). A UserError becomes one sentence on stderr and exit code 2, under
    torchrun only once; a process that lost another one says so and exits 1; SIGTERM and Ctrl-C end
    a run with its state saved (143, 130)."""
    # Unbuffered lines, for os._exit drops what is in the buffer; file names may be no valid UTF-8.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    keep_freed_memory()
    signal.signal(signal.SIGINT, StopSignal())
    if "RANK" not in os.environ:             # torchrun needs SIGTERM's default until the loop
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    try:
        main()
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)        # nothing is worth waiting for now
        rank = int(os.environ.get("RANK", 0))
        if rank > 0:
            time.sleep(5)                    # rank 0 most likely met the same: then torchrun ends us
        text, code = explain(error, rank)
        print(f"error: {' '.join(text.splitlines())}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            os._exit(code)                   # others may hang: do not wait for them
        sys.exit(code)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            ended = sys.exc_info()[1]
            if ended is None or isinstance(ended, SystemExit):
                # Not the interpreter's own end: a thread of gloo that then drops its last tensor
                # asks for the interpreter's lock, which aborts the process (torch 2.14).
                os._exit((ended.code or 0) if ended else 0)


def explain(error, rank):
    """-> (sentence, exit code) of an error that has one; any other is raised again."""
    if isinstance(error, UserError):
        text = str(error)
        if text.startswith("Caught "):       # a loader's worker: its traceback, then the sentence
            text = text.splitlines()[-1].rpartition("UserError: ")[2]
        return text, 2
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        return (f"rank {rank} lost another process, whose own words or the launcher's say why; the same "
                f"command goes on from the last resume file"), 1
    raise error


def keep_freed_memory(keep=True):
    """Linux: what a step frees stays with the process for the next. glibc would hand large blocks
    back, and the kernel clears each page when it is asked again: up to a third of a CPU's step."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):             # glibc, not musl
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
        libc.mallopt(M_MMAP_MAX, 0 if keep else 65536)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, -1 if keep else 2**26)
