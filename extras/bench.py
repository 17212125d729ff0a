"""How fast the stages are, what memory they need, and how far they are from the machine's limit.

    step of a stage  --time by part, operations by formula-->  share of the machine's matrix rate
    beside it        the plain version (unfused attention, one-hot quantizer, float32),
                     timm's BEiT and timm's ViT-B

A share of 100 % would be a step of nothing but matrix products, each as fast as the MLP's first
layer alone. That product is timed before and after every step, so that other work on the machine
slows both alike. Nothing is trained here: images and weights are random, and no file is read.

Read in this order: extras/operations.py, extras/plain.py, extras/steps.py, then Clock and compare.

    python -m extras.bench --model tiny                      # pre-training step: CPU, seconds
    python -m extras.bench --stage all --out speed.jsonl     # base, batch 8: CPU, half an hour
    python -m extras.bench --plan            # hours and memory of the paper's runs
"""
# Shapes:  B images, N patches, T = 1 + N tokens, D width, K codes of d numbers
import collections
import contextlib
import copy
import functools
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pretrain
import vqkd
from extras import plan
from extras.loaders import compare_loaders, write_pictures
from extras.operations import counted, operations, sizes
from extras.plain import plain
from extras.steps import STEPS, timm_step
from model import PRESETS
from support import data, transforms
from support.args import Parser, number, whole
from support.files import ROOT, UserError, commit, processor, refuse_unwritable
from support.images import Folder
from support.process import Process, join_processes, launch

CPU_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# A step to time: its precision, whether in the plain version, its operations per image.
Contestant = collections.namedtuple("Contestant", "step amp plain operations")


# --- measuring ------------------------------------------------------------------------------------
class Clock:
    """clock(part) notes that a part has ended; parts() gives the seconds of each.

    On CUDA the notes are events in the stream of work. So the CPU does not wait between parts, as
    in training; parts() waits once. kind "cpu" counts the time of this process only.
    """

    def __init__(self, kind, device):
        self.device = device
        self.read = CPU_CLOCKS[kind]
        self.wait()
        self.notes = [(None, self.now())]

    def __call__(self, part):
        self.notes.append((part, self.now()))

    def now(self):
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        if self.device.type == "mps":
            torch.mps.synchronize()
        return self.read()

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def parts(self):
        """-> {part: seconds}"""
        self.wait()
        found = collections.Counter()
        for (_, before), (part, after) in itertools.pairwise(self.notes):
            if self.device.type == "cuda":
                found[part] += before.elapsed_time(after) / 1000
            else:
                found[part] += after - before
        return dict(found)


def matrix_rate(c, args, device, amp):
    """Operations a second of the MLP's first layer, (B T, D) x (D, 4D): the machine's limit."""
    dtype = torch.bfloat16 if amp == "bf16" else torch.float32
    x = torch.randn(args.batch_size * c.T, c.D, device=device).to(dtype)
    w = torch.randn(4 * c.D, c.D, device=device).to(dtype)
    at_once = 100 if device.type == "cuda" else 1            # a GPU takes microseconds for one
    for _ in range(at_once):
        F.linear(x, w)
    products = seconds = 0
    while products < 3 or seconds < 0.15:
        clock = Clock(args.clock, device)
        for _ in range(at_once):
            F.linear(x, w)
        clock("products")
        seconds += clock.parts()["products"]
        products += at_once
    return products * 2 * len(x) * c.D * 4 * c.D / seconds


def compare(contestants, c, args, device):
    """Time the contestants {name: Contestant} in turn, each between two matrix products.

    -> {name: medians of images_per_s, share, limit and the seconds t_PART of each part}
    """
    warm_up = 3 if device.type == "cuda" else 1              # buffers, caches, compilation
    for x in contestants.values():
        with plain(x.plain):
            for _ in range(warm_up):
                x.step(Process(device=device, amp=x.amp), lambda part: None)
    runs = {name: [] for name in contestants}
    for _ in range(args.repeats):
        for name, x in contestants.items():
            before = matrix_rate(c, args, device, x.amp)
            with plain(x.plain):
                clock = Clock(args.clock, device)
                x.step(Process(device=device, amp=x.amp), clock)
                parts = clock.parts()
            limit = (before + matrix_rate(c, args, device, x.amp)) / 2
            rate = args.batch_size / sum(parts.values())
            facts = dict(images_per_s=rate, share=rate * x.operations / limit, limit=limit)
            runs[name].append(facts | {f"t_{part}": t for part, t in parts.items()})
    results = {}
    for name, facts in runs.items():
        medians = {key: statistics.median(run[key] for run in facts) for key in facts[0]}
        results[name] = medians | dict(operations=contestants[name].operations)
    return results


class Held(TorchDispatchMode):
    """Inside, `peak` is the most bytes of new tensors that existed at any one time.

    It does not see what a kernel needs for itself, nor what an allocator loses between tensors.
    """

    now = peak = 0

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        old = storages((args, kwargs))
        result = function(*args, **(kwargs or {}))
        for key, storage in storages(result).items():
            if key not in old:               # a view or an in-place operation makes nothing new
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result


def storages(tree):
    """The memory behind all tensors of a nested structure, by its address."""
    tensors = [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
    return {s._cdata: s for s in map(torch.Tensor.untyped_storage, tensors)}


def peak_memory(make_step, c, args, amp, is_plain, device):
    """MiB that two steps of a new network need beside weights and images.

    That is for activations, gradients and the moments of the optimiser.
    """
    step = make_step(c, args, device)
    run = Process(device=device, amp=amp)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with plain(is_plain), contextlib.nullcontext() if on_gpu else Held() as held:
        for _ in range(2):
            step(run, lambda part: None)
    peak = torch.cuda.max_memory_allocated(device) - before if on_gpu else held.peak
    return peak / 2**20


# --- a step ---------------------------------------------------------------------------------------
def bench_step(stage, args, device, tell):
    """One stage in each precision, beside the plain version; pre-training also beside timm."""
    c = sizes(args.model)
    amps = ["no", "bf16"] if args.amp == "auto" else [args.amp]
    step = STEPS[stage](c, args, device)
    ops_torch = operations_by_torch(stage, args, device)
    ops = ops_torch if stage == "segment" else sum(operations(stage, c).values())
    contestants = {f"{stage} {amp}": Contestant(step, amp, False, ops) for amp in amps}
    if not args.no_plain and not args.compile:               # compiled code cannot be exchanged
        contestants[f"{stage} plain"] = Contestant(step, "no", True, ops)
    if stage == "pretrain" and not args.no_timm:
        theirs = sum(operations("finetune", c).values())
        for kind in ("BEiT", "ViT"):
            timm = timm_step(kind, c, args, device)
            for amp in amps:
                contestants[f"timm {kind} {amp}"] = Contestant(timm, amp, False, theirs)
    results = compare(contestants, c, args, device)

    print(f"\n{stage}, {args.model}, {c.S} px, batch {args.batch_size}: "
          f"{ops * args.batch_size / 1e9:.4g} G operations a step by formula, "
          f"{ops_torch * args.batch_size / 1e9:.4g} by torch's counter")
    print(f"{'':18} {'images/s':>9} {'share':>6} {'limit':>9} {'peak MiB':>9}  seconds by part")
    # Compiled code does not run under Held, so there is no figure for it on a CPU.
    measurable = device.type == "cuda" or not args.compile
    for name, facts in results.items():
        x = contestants[name]
        if name.startswith(stage) and measurable and not args.no_memory:
            facts["peak_mib"] = peak_memory(STEPS[stage], c, args, x.amp, x.plain, device)
        parts = ", ".join(f"{key[2:]} {t:.3g}" for key, t in facts.items() if key[:2] == "t_")
        print(f"{name:18} {facts['images_per_s']:9.2f} {facts['share']:6.1%} "
              f"{facts['limit'] / 1e9:6.0f} G/s {facts.get('peak_mib', math.nan):9.0f}  {parts}",
              flush=True)
        tell(stage=stage, name=name, amp=x.amp, operations_torch=ops_torch, **facts)


def operations_by_torch(stage, args, device):
    """What torch counts in a step of one image, in the plain version.

    torch's counter does not know the fused kernels of a CPU, nor compiled code.
    """
    args = copy.copy(args)
    args.compile = False
    step = STEPS[stage](sizes(args.model), args, device)
    with plain():
        return counted(lambda: step(Process(device=device), lambda part: None)) / args.batch_size


# --- quantizer, loader, start-up ------------------------------------------------------------------
def bench_quantizer(args, device, tell):
    """Look-up, straight-through, gradient and moving average of 64 images, ours and one-hot."""
    c = sizes(args.model)
    vectors = 64 * c.N
    book = vqkd.Codebook(c.K, c.d).to(device)
    start = vqkd.l2(torch.randn(c.K, c.d, device=device))
    seconds = {"ours": [], "plain": []}
    for _ in range(args.repeats + 1):
        for name, times in seconds.items():
            book.embedding.weight.copy_(start)
            x = torch.randn(vectors, c.d, device=device, requires_grad=True)
            with plain(name == "plain"):
                clock = Clock(args.clock, device)
                h = vqkd.l2(x)
                v, z = book(h)
                loss = F.mse_loss(h, v.detach()) + vqkd.straight_through(h, v).sum()
                loss.backward()
                book.update(*vqkd.code_sums(h, z, c.K), decay=0.99)
                clock("quantizer")
                times.append(clock.parts()["quantizer"])
    ours, slow = seconds["ours"][1:], seconds["plain"][1:]   # the first round warms up
    ratio = statistics.median(s / o for s, o in zip(slow, ours, strict=True))
    ours_ms, plain_ms = 1e3 * statistics.median(ours), 1e3 * statistics.median(slow)
    print(f"\nquantizer, {vectors} vectors, {c.K} x {c.d}: {ours_ms:.1f} ms; one-hot version "
          f"{plain_ms:.1f} ms, {ratio:.1f} x")
    tell(stage="quantizer", vectors=vectors, codes=c.K, ms=ours_ms, plain_ms=plain_ms, ratio=ratio)


def stage_transforms(c):
    """{stage: what its loader makes of an image}; pixels: reading alone"""
    crops = transforms.MIMTransform(c.S, scale=(c.pretrain.crop_scale, 1.0),
                                    color_jitter=c.pretrain.color_jitter)
    side = c.S // c.p
    masked = functools.partial(pretrain.masked_views, views=crops, grid=(side, side), count=c.M,
                               min_block=c.pretrain.mask_min_block)
    return dict(pixels=None, vqkd=transforms.VQKDTransform(c.S), pretrain=masked,
                finetune=transforms.FinetuneTransform(c.S), linprobe=transforms.EvalTransform(c.S))


def bench_loader(args, device, tell):
    """Images a second that one loader process makes, and what a step at full matrix rate takes.

    Of JPEGs, and beside other loaders; tiny: of shapes, which are in memory as CIFAR is.
    """
    c = sizes(args.model)
    now = CPU_CLOCKS[args.clock]             # loaders work on the CPU, whatever the device
    tiny = args.model == "tiny"
    if tiny:
        begin = now()
        count = len(data.open_data("shapes", "train"))
        seconds = now() - begin
        print(f"\nshapes: {count} images drawn in {seconds:.1f} s")
        tell(stage="loader", name="drawing shapes", images_per_s=count / seconds)
    limit = matrix_rate(c, args, device, "bf16" if args.amp == "bf16" else "no")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                 # torch gives one thread to each worker
    with tempfile.TemporaryDirectory() as folder:
        if not tiny:
            write_pictures(Path(folder), 16)
        for name, transform in stage_transforms(c).items():
            if tiny:
                dataset = data.open_data("shapes", "train", transform, limit=64)
            else:
                dataset = Folder(folder, None, transform, labelled=False)
            rate = images_per_second(dataset, now)
            need = math.nan
            if transform:
                need = limit / sum(operations(name, c).values())
            print(f"loader of {name:9} {rate:8.1f} images/s a process; a step at full matrix rate "
                  f"takes {need:.1f}")
            tell(stage="loader", name=name, images_per_s=rate, need=need)
    if not tiny:
        compare_loaders(args.repeats, now, tell)
    torch.set_num_threads(threads)


def images_per_second(dataset, now):
    """From at least 32 images and one second.  now() is the time; the first image warms up."""
    dataset[(0, 0)]
    begin = now()
    seen = 0
    while seen < 32 or now() - begin < 1.0:
        dataset[(1, seen % len(dataset))]
        seen += 1
    return seen / (now() - begin)


def bench_startup(args, device, tell):
    """Seconds of `python STAGE.py --help` beyond `import torch`, and to the first step of tiny."""
    def seconds(*command):
        times = []
        for _ in range(args.repeats):
            begin = time.perf_counter()
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    bare = seconds("-c", "import torch")
    print(f"\nimport torch {bare:.2f} s; --help on top of that:", end=" ")
    for stage in STEPS:
        extra = seconds(f"{stage}.py", "--help") - bare
        print(f"{stage} {extra:.2f}", end=" ", flush=True)
        tell(stage="startup", name=f"{stage} --help", seconds=extra, import_torch=bare)
    print("\nfirst training step of tiny, from the command on:", end=" ")
    common = ["--device", device.type]
    with tempfile.TemporaryDirectory() as folder:
        # Pre-training needs a tokenizer.
        few = ["--steps", "2", "--continuous-steps", "1", "--limit", "64"]
        subprocess.run([sys.executable, "vqkd.py", "--out", f"{folder}/pretrain", *few, *common],
                       cwd=ROOT, check=True, capture_output=True)
        for stage in ("vqkd", "pretrain"):
            took = until_first_step(stage, Path(folder) / stage, common)
            print(f"{stage} {took:.1f} s", end=" ", flush=True)
            tell(stage="startup", name=f"{stage}: first step", seconds=took)
    print()


def until_first_step(stage, out, flags):
    """Seconds from the command until its log has a line about step 0. UserError if it never has."""
    log = out / f"{stage}.jsonl"
    begin = time.perf_counter()
    command = subprocess.Popen([sys.executable, f"{stage}.py", "--out", str(out), *flags],
                               cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = False
    while not done and command.poll() is None:
        time.sleep(0.02)
        done = log.exists() and '"step": 0' in log.read_text()
    seconds = time.perf_counter() - begin
    command.terminate()
    command.wait()
    if not done:
        raise UserError(f"{stage}.py made no step: run it alone to see why")
    return seconds


# --- arguments ------------------------------------------------------------------------------------
BENCHES = {stage: functools.partial(bench_step, stage) for stage in STEPS}
BENCHES |= dict(quantizer=bench_quantizer, loader=bench_loader, startup=bench_startup)


def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--stage", default="pretrain", choices=[*BENCHES, "all"], help="default pretrain")
    add("--model", default="base", help="preset: tiny, small, base, large; default base")
    add("--batch-size", type=whole(2, 10**6), default=8, help="images in a step; default 8")
    add("--amp", default="auto", choices=["auto", "no", "bf16"], help="precision; auto: both")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--threads", type=whole(1, 4096), help="CPU threads; default: torch's choice")
    add("--clock", default="wall", choices=[*CPU_CLOCKS], help="cpu: time of this process only, "
        "for a CPU that others use, too (take --threads 1)")
    add("--repeats", type=whole(1), default=3, help="steps, of which the median counts; default 3")
    add("--compile", action="store_true", help="torch.compile the network; no plain version then")
    add("--checkpoint-activations", action="store_true", help="pre-training: hold less memory")
    add("--no-plain", action="store_true", help="leave the plain version out")
    add("--no-timm", action="store_true", help="leave timm's networks out")
    add("--no-memory", action="store_true", help="do not measure memory, which takes two steps")
    add("--out", type=Path, help="append JSON lines to this file")
    add = p.add_argument_group("plan").add_argument
    add("--plan", action="store_true", help="print hours and memory of the paper's runs, and stop")
    add("--share", type=number(1e-6, 1), help="of the peak; default: measured, in results/gpu")
    add("--peak-tflops", type=number(1e-6, 1e9), help="of one GPU; default: H100 and A100 in bf16")
    args = p.parse_args(argv)
    if args.model not in PRESETS:
        raise UserError(f"--model {args.model} is not a preset; choose from {', '.join(PRESETS)}")
    if args.stage == "vqkd" and args.model == "large":
        raise UserError("--stage vqkd --model large: the paper has one tokenizer, of size base; "
                        "give --model base")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.plan:
        peaks = {"GPU": args.peak_tflops * 1e12} if args.peak_tflops else plan.PEAKS
        print("\n".join(plan.table(plan.plan(peaks, args.share))))
        return
    if args.out:
        refuse_unwritable(args.out.parent)
    device = join_processes(args.device).device
    if args.clock == "cpu" and device.type != "cpu":
        raise UserError(f"--clock cpu does not see the work of {device}: leave it out")
    words = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    about = dict(
        command=" ".join(["python -m extras.bench", *words]).partition(" --out ")[0],
        commit=commit(), seed=0, amp=args.amp, **processor(),
        model=args.model, batch=args.batch_size, threads=torch.get_num_threads(), clock=args.clock,
        repeats=args.repeats, device=str(device), torch=str(torch.__version__),
        compile=args.compile, checkpoint=args.checkpoint_activations)
    if device.type == "cuda":
        print(about["gpu"])

    def tell(**facts):
        if not args.out:
            return
        try:
            with open(args.out, "a") as f:
                f.write(json.dumps(about | facts) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {args.out} ({error.strerror}): choose another "
                            f"--out") from error

    torch.manual_seed(0)
    for stage in BENCHES if args.stage == "all" else [args.stage]:
        BENCHES[stage](args, device, tell)


if __name__ == "__main__":
    launch(main)
