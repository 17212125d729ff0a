"""A run: everything around a training loop that is no method. The loop stays in the stage file.

    run = Run("pretrain", args)              # processes, device, precision, the state to go on from
    network = run.start(train_set, model=model, optimizer=optimizer)
    for step in run.steps():                 # progress bar, stop signals, resume files
        for batch, labels in run.micro_batches():
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

from support import data, inputs
from support.files import (
    Lock, Log, UserError, describe_run, plain_args, read_file, refuse_unwritable, rounded,
    set_aside, write_file)
from support.find import find_images
from support.process import STOP_SIGNALS, Process, StopSignal, join_processes, seed_all

# Arguments that may change between a run and its continuation. They do not say what is computed.
SAME_RUN = ("fresh dry_run workers log_every save_every device compile download data_dir out "
            "cache amp_auto").split()


class Run(Process):
    """One training run in the folder OUT.

    STAGE.jsonl is its log, STAGE.resume.pt the state to go on from, STAGE.pt the finished result.
    """

    def __init__(self, stage, args):
        """Join the other processes and look for a state to go on from (self.resumed, or None)."""
        here = join_processes(args.device, args.amp)
        super().__init__(here.rank, here.world_size, here.device, here.amp)
        self.stage = stage
        self.args = args
        self.out = args.out
        args.micro_batch = args.micro_batch or args.batch_size
        self.asked = plain_args(args)
        self.total_steps = None
        self.in_loop = False
        self.eval_loaders = {}               # (id of the data set, batch size): DataLoader
        self.resumed = find_resume_file(stage, args, self)
        if self.resumed and args.amp == "auto":              # a run keeps the precision it has
            self.amp = self.resumed["args"]["amp"]
        args.amp = self.amp
        self.asked["amp"] = self.amp
        self.step = 0

    def plan(self, train_set):
        """How many steps of how many images; a line says what a short run shrinks.  -> the steps"""
        args = self.args
        images = len(train_set)
        batch_size = args.batch_size
        args.batch_size = data.fitting_batch(args, images, self.world_size)
        lengths = data.resolve_steps(args, images)
        self.total_steps, self.warmup_steps, self.steps_per_epoch = lengths
        self.micro_batch, self.accumulation = data.split_batch(
            args.batch_size, args.micro_batch, self.world_size)
        for line in data.what_shrank(args, images, batch_size):
            self.print(line)
        return self.total_steps

    def start(self, train_set, facts=None, about=None, **parts):
        """Everything is built: restore the state, open log and loader.  -> the network to train

        parts: what a resume file has to hold, by name; anything with state_dict(). `model` is the
        network; it comes back wrapped for several processes, and compiled if asked.
        facts: what the first line of the log says. about: what the files say beside the weights.
        """
        args = self.args
        self.train_set = train_set
        self.parts = parts
        self.model = parts["model"]
        self.about = about or {}
        self.made_from = inputs.made_from(args, self)
        self.restore()

        if self.total_steps is None:
            self.plan(train_set)
        self.eval_every = self.steps_per_epoch
        batches = data.TrainBatches(
            len(train_set), args.batch_size, self.total_steps, self.step, self.rank,
            self.world_size, self.accumulation, args.seed)
        self.batches = iter(data.make_loader(train_set, batches, args.workers, self.device))
        facts = dict(images=len(train_set), steps=self.total_steps) | (facts or {})
        facts["made_from"] = self.made_from
        self.log_file = Log(self.out / f"{self.stage}.jsonl", args, self, self.step, **facts)
        self.first_bad_step = torch.full((), sys.maxsize, device=self.device)
        self.clock = time.time()
        self.clock_step = self.step
        self.print(f"{self.stage}: {count_parameters(self.model) / 1e6:.2f} M parameters, "
                   f"{len(train_set)} images, {self.total_steps} steps of {args.batch_size} = "
                   f"{self.world_size} processes x {self.accumulation} x {self.micro_batch}, "
                   f"on {self.device}, amp {self.amp}")
        self.network = self.wrap(self.model)
        return self.network

    def restore(self):
        """Give every part its state from the resume file, if there is one."""
        if not self.resumed:
            return
        for name, value in self.about.items():
            if self.resumed.get(name) != value:
                raise UserError(f"the {name} of {self.args.data} are no longer those of the run "
                                f"in {self.out}: restore them, or add --fresh")
        self.step = self.resumed["step"]
        for name, part in self.parts.items():
            part.load_state_dict(self.resumed[name])

    def wrap(self, model):
        """The network as the loop calls it: for several processes, and compiled if asked."""
        network = model
        if self.world_size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            network = DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True)
            # Buffers stay equal by construction. A broadcast in each step would hide it if they
            # did not. (Not the argument of this name: torch 2.14 warns of it.)
            network.broadcast_buffers = False
        self.synchronised = network
        # Around DistributedDataParallel, so that gradients travel while the rest is computed.
        return self.compiled(network)

    def compiled(self, function):
        """torch.compile of a network or a function if --compile is given, else the same."""
        return torch.compile(function) if self.args.compile else function

    # --- the loop
    def steps(self):
        """The updates still to do. Between two of them: resume files, stop signals, a bad loss."""
        handler = signal.getsignal(signal.SIGINT)            # not ours in a notebook
        if isinstance(handler, StopSignal):
            handler.in_loop = True
            handler.handle(STOP_SIGNALS)
        self.in_loop = True
        hide_bar = not self.is_main or not sys.stderr.isatty()
        bar = tqdm(range(self.step, self.total_steps), initial=self.step, total=self.total_steps,
                   desc=self.stage, dynamic_ncols=True, disable=hide_bar)
        for self.step in bar:
            yield self.step
            save = (self.step + 1) % self.args.save_every == 0
            stop = self.check(now=save or self.is_last)
            if self.is_last:
                return                                       # the stage calls finish
            if save or stop:
                self.save()
            if stop:
                bar.close()
                self.stop(stop)

    def stop(self, number):
        if self.is_main:
            print(f"{signal.Signals(number).name}: saved after step {self.step}; "
                  f"the same command goes on", file=sys.stderr)
        self.leave_folder()
        raise SystemExit(128 + number)

    def micro_batches(self):
        """The parts of one update, one after the other. Gradients are summed over them."""
        for k in range(self.accumulation):
            batch = next(self.batches)                       # (images, labels)
            # Gradients travel between processes only with the last part.
            if self.world_size > 1:
                self.synchronised.require_backward_grad_sync = k == self.accumulation - 1
            seed_all(self.args.seed, self.step, self.rank, k)            # for stochastic depth
            yield batch

    def backward(self, loss):
        """Gradients of the mean over the parts. Remembers the first step with a loss of NaN."""
        (loss / self.accumulation).backward()
        # An `if` would wait for the device here. torch.where does not.
        bad = self.first_bad_step.clamp(max=self.step)
        self.first_bad_step = torch.where(loss.detach().isfinite(), self.first_bad_step, bad)

    @property
    def is_last(self):
        return self.step == self.total_steps - 1

    @property
    def log_due(self):
        return self.step % self.args.log_every == 0 or self.is_last

    @property
    def evaluation_due(self):
        return (self.step + 1) % self.eval_every == 0 or self.is_last

    def log(self, **facts):
        """One line of the log about this step. Tensors become numbers, which waits for a GPU."""
        self.check(now=True)                                 # a NaN must not get into the log
        for name, value in facts.items():
            if isinstance(value, torch.Tensor):
                facts[name] = value.item()
        seconds = time.time() - self.clock
        images = (self.step + 1 - self.clock_step) * self.args.batch_size
        rates = [group["lr"] for group in self.parts["optimizer"].param_groups]
        self.log_file(step=self.step, epoch=self.step / self.steps_per_epoch, **facts,
                      lr=max(rates), images_per_s=images / seconds)
        self.clock = time.time()
        self.clock_step = self.step + 1

    def log_evaluation(self, facts):
        """One line about the held-out images, in the log and on the screen."""
        epoch = (self.step + 1) / self.steps_per_epoch
        self.log_file(step=self.step, epoch=epoch, split="val", **facts)
        parts = [f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
                 for name, value in facts.items()]
        self.print(f"step {self.step + 1}/{self.total_steps}: {', '.join(parts)}")

    def log_measurement(self, result, **more):
        """--eval, which trains nothing: a line in STAGE.jsonl (with `more`) and on the screen."""
        args = self.args
        summary = dict(summary=1, data=args.data, checkpoint=str(args.checkpoint), **result)
        self.print(json.dumps(rounded(summary)))
        log = Log(self.out / f"{self.stage}.jsonl", args, self, append=True)
        log(**summary, **more)

    def eval_batches(self, dataset, batch_size=None):
        """This process's share of a data set, each image once. Does not count for images_per_s."""
        begun = time.time()
        batch_size = batch_size or self.args.micro_batch
        loader = self.eval_loaders.get((id(dataset), batch_size))
        if loader is None:
            shares = data.eval_batches(len(dataset), batch_size, self.rank, self.world_size)
            loader = data.make_loader(dataset, shares, self.args.workers, self.device)
            # A worker forked beside the threads of gloo was seen to hang, though rarely. So
            # several processes fork the workers of the evaluations once, not each time.
            if self.world_size > 1 and self.in_loop:
                self.eval_loaders[id(dataset), batch_size] = loader      # which keeps the data set
        yield from loader
        if hasattr(self, "clock"):
            self.clock += time.time() - begun

    def check(self, now=False):
        """-> the signal received, or 0. Raises UserError after a loss that was not finite.

        All processes decide alike. Looking waits for a GPU: there every tenth step, or `now`.
        """
        received = getattr(signal.getsignal(signal.SIGINT), "received", 0)
        if self.device.type != "cpu" and not now and self.step % 10:
            return received if self.world_size == 1 else 0
        found = torch.stack([-self.first_bad_step, self.first_bad_step.new_tensor(received)])
        if self.world_size > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        first_bad_step = -int(found[0])
        if first_bad_step < sys.maxsize:
            self.refuse_bad_loss(first_bad_step)
        return int(found[1])

    def refuse_bad_loss(self, step):
        names = data.names_of(self.train_set, self.args.batch_size, step, self.args.seed)
        self.log_file(step=step, warning="the loss is not finite", images=names)
        raise UserError(f"the loss is not finite at step {step}: lower --lr, or check the images "
                        f"of that update ({', '.join(names[:3])}; all of them are in "
                        f"{self.log_file.path}); the last good state stays in {self.out}")

    # --- files
    def contents(self):
        """What a file of this run holds beside the state of the optimiser."""
        return contents(self.stage, self.model, self.args) | self.about | dict(
            args=self.asked, made_from=self.made_from)

    def save(self):
        """Write STAGE.resume.pt. The one before stays as .prev until the next time."""
        if self.is_main:
            path = self.out / f"{self.stage}.resume.pt"
            state = {name: part.state_dict() for name, part in self.parts.items()}
            write_file(path, self.contents() | state | dict(step=self.step + 1),
                       previous=f"{path}.prev")

    def finish(self, result, **facts):
        """Write the summary line and the hand-over STAGE.pt, then drop the resume files."""
        summary = dict(summary=1, step=self.total_steps, **facts, **result)
        self.log_file(**summary)
        self.print(json.dumps(rounded(summary)))
        if self.is_main:
            write_file(self.out / f"{self.stage}.pt",
                       self.contents() | dict(step=self.total_steps, result=result))
            for leftover in self.out.glob(f"{self.stage}.resume.pt*"):
                leftover.unlink()
        self.leave_folder()
        return result


def contents(stage, model, args):
    """What every file of a stage holds: arguments, commit, sources, weights, the model's sizes."""
    return describe_run(stage, args) | dict(model=model.state_dict(), arch=model.arch())


# --- resuming -------------------------------------------------------------------------------------
def find_resume_file(stage, args, process, **files):
    """-> the contents of STAGE.resume.pt, or None for a fresh start. Exits 0 if the run is done.

    files: {name: path} of files that the run reads and no argument names. Raises UserError if the
    folder holds a run with other arguments or from other inputs, or no readable file, or if
    nothing can be written there.
    """
    hold_folder(stage, args, process)
    try:
        state = read_state(stage, args, process, files)
        if process.is_main:
            refuse_unwritable(args.out)
    except (UserError, SystemExit):
        process.leave_folder()
        raise
    return state


def hold_folder(stage, args, process):
    """Lock OUT for this stage; with --fresh set earlier results aside. UserError on all processes.

    process.lock keeps it until process.leave_folder(), or the end of the process.
    """
    # torchrun --max-restarts repeats the command. Then the files in OUT belong to this run.
    first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    problem = [None]
    if process.is_main:
        try:
            process.lock = Lock(args.out / f"{stage}.lock")
            if args.fresh:
                inputs.refuse_to_move(stage, args)
            if args.fresh and first_start:
                set_aside(stage, args.out)
        except UserError as error:
            problem = [str(error)]
    if process.world_size > 1:
        dist.broadcast_object_list(problem)
    if problem[0]:
        process.leave_folder()
        raise UserError(problem[0])


def read_state(stage, args, process, files):
    """-> the contents of STAGE.resume.pt, or None. Exits 0 if the run is done."""
    final = args.out / f"{stage}.pt"
    resume = args.out / f"{stage}.resume.pt"
    paths = [final, resume, Path(f"{resume}.prev")]
    path, state = read_first(paths, stage, args, process)
    refuse_other_folders(state, args, process)
    if state is None:
        return None
    if "source_hash" not in state:
        raise UserError(f"{path} was made by another command (converted?): "
                        f"choose another --out, or add --fresh")
    refuse_other_inputs(path, state, args, inputs.made_from(args, process, **files), process)
    if path != final:
        return state
    now = describe_run(stage, args)["source_hash"]
    edited = [f for f, h in now.items() if state["source_hash"].get(f) != h]
    note = f"; source files changed since: {', '.join(edited)}" if edited else ""
    process.print(f"already done: {final}, {json.dumps(state.get('result', {}))}{note}")
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
            if process.is_main:
                print(f"{unreadable}; trying the one before", file=sys.stderr)
    if unreadable:
        raise UserError(f"no resume file in {args.out} can be read ({unreadable}): "
                        f"add --fresh to start over")
    return None, None


def refuse_other_folders(state, args, process):
    """UserError if the processes see different steps: they do not share the folder OUT."""
    if process.world_size == 1:
        return
    step = -1 if state is None else state.get("step", -1)
    least_and_most = torch.tensor([step, -step], device=process.device)
    dist.all_reduce(least_and_most, dist.ReduceOp.MAX)
    if least_and_most.sum():
        raise UserError(f"the processes see different files in {args.out}: "
                        f"name a folder that all machines share")


def refuse_other_inputs(path, state, args, now, process):
    """UserError if a file was made with other arguments, or from other inputs than `now`."""
    was = state.get("made_from")
    # A file that was moved, or a folder of images, is known by its content.
    by_content = [name for name in now if was and name in was]
    changed = differences(state["args"], plain_args(args), by_content)
    if changed:
        raise UserError(f"{path} belongs to a run with other arguments ({'; '.join(changed)}): "
                        f"repeat them, choose another --out, or add --fresh")
    changed, unknown = inputs.compare(was, now, args)
    if changed:
        raise UserError(f"{path} was made from other inputs ({'; '.join(changed)}): put them back, "
                        f"or choose another --out, or add --fresh, which sets {path} aside")
    if unknown and process.is_main:
        print(f"note: what {path} was made from is not compared: {', '.join(unknown)}",
              file=sys.stderr)


def differences(old, new, by_content=()):
    """Arguments that change what a run computes and differ between two runs, as readable text.

    by_content: names of arguments that are compared elsewhere.
    """
    changed = []
    for name in sorted(old.keys() & new.keys()):
        kept = name == "amp" and new[name] == "auto"         # a run keeps the precision it has
        passed_over = kept or name in SAME_RUN or name in by_content
        if not passed_over and within_out(name, old) != within_out(name, new):
            changed.append(f"--{name.replace('_', '-')} {old[name]} -> {new[name]}")
    return changed


def within_out(name, args):
    """An argument; if it is a path into the folder OUT, then without OUT, which may be moved."""
    out = f"{args.get('out')}{os.sep}"
    value = args[name]
    return value.removeprefix(out) if isinstance(value, str) else value


# --- without running ------------------------------------------------------------------------------
IMAGES = {               # training images of the data sets that need no look
    "shapes": 12_000, "cifar10": 50_000, "cifar100": 50_000, "datasets/imagenet": 1_281_167,
    "datasets/imagenet21k": 14_197_122, "datasets/ade20k": 20_210}


def count_parameters(module):
    """Trainable numbers in it."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def dry_run(args, model, *lines):
    """--dry-run: the recipe, the size of the model and of the run. Needs no data, no checkpoint.

    The model may lie on the device "meta", which holds shapes without numbers.
    """
    for name, value in sorted(plain_args(args).items()):
        print(f"{name:24} {value}")
    parameters = count_parameters(model)
    print(f"{parameters:,} trainable parameters; {'; '.join(lines)}")
    # float32: 4 bytes a number. AdamW keeps two more numbers for each, and a step its gradient.
    print(f"memory: weights {parameters * 4 / 2**30:.3f} GiB, with gradients and AdamW "
          f"{parameters * 16 / 2**30:.3f} GiB, activations not counted")
    images = IMAGES.get(str(args.data))
    if images is None and Path(args.data).is_dir():
        train = Path(args.data, "train")
        images = len(find_images(train if train.is_dir() else args.data))
    if args.limit and images:
        images = min(images, args.limit)
    if images:
        batch_size = args.batch_size
        args.batch_size = data.fitting_batch(args, images, 1)
        steps, _, _ = data.resolve_steps(args, images)
        epochs = "" if args.steps else f" = {args.epochs} epochs of {images:,}"
        print(f"{steps:,} steps of {args.batch_size} images{epochs}")
        print(*data.what_shrank(args, images, batch_size), sep="\n")
    elif args.steps:
        print(f"{args.steps} steps of {args.batch_size} images")
    else:
        print(f"{args.epochs} epochs of the images in {args.data}, which is not there yet")
