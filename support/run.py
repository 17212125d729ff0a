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
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import count_parameters
from support import data
from support.process import Process, StopSignal, join_processes, resolve_amp, seed_all
from support.files import Log, UserError, describe_run, plain_args, read_file, set_aside, write_file

# Arguments that may change between a run and its continuation: they do not say what is computed.
SAME_RUN = ("fresh dry_run workers log_every save_every device compile download data_dir out "
            "amp_auto").split()


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
        batches = data.TrainBatches(len(train_set), args.batch_size, self.total_steps, self.step,
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


