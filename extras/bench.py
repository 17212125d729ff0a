"""How fast the stages are, what they need, and how far that is from the machine's limit.

    step of a stage  --time by part, operations by formula-->  share of the matrix rate, measured between the steps
    beside it        the plain version (unfused attention, one-hot quantizer, float32), timm's BEiT, timm's ViT-B

A share of 1 would be a step that does nothing but matrix products, each as fast as the MLP's first layer alone: that
product is timed before and after every step, so that other work on the machine slows both alike. Nothing is trained
here: images and weights are random, and no file is read.

Read in this order: block_operations, operations, plain, the steps, compare, plan.

    python bench.py --model tiny                            # pre-training step, float32 and bf16: CPU, seconds
    python bench.py --stage all --out speed.jsonl           # base, batch 8, every stage: CPU, half an hour
    python bench.py --plan --gpus 8 --share 0.4 --peak-tflops 989       # GPU-hours of the paper's schedules
"""
# Shapes used in this file:  B images, N patches, T = 1 + N tokens, D width, K codes of d numbers, M hidden per image,
#                            C teacher width or classes

import argparse
import contextlib
import functools
import json
import logging
import math
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from support import data, engine, files, transforms
from support.images import Folder
import finetune
import linprobe
import model
import pretrain
import segment
import vqkd
from support.engine import UserError
from model import PRESETS, ViT, imagenet_normalize

STEPS = ("pretrain", "vqkd", "finetune", "segment", "linprobe")
STAGES = (*STEPS, "quantizer", "loader", "startup")
IMAGENET = 1281167                           # training images
JPEG = 110_000                               # bytes of an ImageNet file, on average
CLIP = dict(width=768, depth=12, patch_size=16, dim=512)     # the image tower of ViT-B/16


# --- method -----------------------------------------------------------------------------------------------------------
def block_operations(tokens, width):
    """Multiplications and additions of one block for one image, forward. Norms, soft-max and GELU are not counted."""
    T, D = tokens, width
    # q, k, v: 3 products (T, D) x (D, D), proj: 1, MLP: 2 of (D, 4D); each of T D n cells costs 2.   24 T D^2
    # q k^T and weights v, over all heads: T x T x D each.                                             4 T^2 D
    return 24 * T * D ** 2 + 4 * T ** 2 * D


def preset(stage, model):
    """The column of a stage's table."""
    return {flag: row[stage.MODELS.index(model)] for flag, row in stage.RECIPE.items()}


def sizes(name):
    """All numbers that the operation counts need, of preset `name`."""
    p, tokenizer = PRESETS[name], "base" if name == "large" else name        # the paper has one tokenizer for both
    v, m = preset(vqkd, tokenizer), preset(pretrain, name)
    N = (p["image_size"] // p["patch_size"]) ** 2
    return SimpleNamespace(
        preset=name, S=p["image_size"], p=p["patch_size"], N=N, T=1 + N, D=p["width"], L=p["depth"], heads=p["heads"],
        K=v["codes"], d=v["code_dim"], M=N * 75 // 196, head_depth=m["head_depth"], early=m["early_layer"],
        tokenizer=tokenizer, D_t=PRESETS[tokenizer]["width"], L_t=v["encoder_depth"], L_d=v["decoder_depth"],
        heads_t=PRESETS[tokenizer]["heads"], C=CLIP["dim"])


def operations(stage, c):
    """Operations of one image in one step of `stage`, by part.  {part: operations}

    Backward costs twice the forward: one product for the gradient of the input, one for that of the weight. The patch
    embedding needs none for the pixels, so it counts twice instead of three times.
    """
    patches = 2 * c.N * 3 * c.p ** 2 * c.D
    blocks = c.L * block_operations(c.T, c.D)
    encoder = (2 * c.N * 3 * c.p ** 2 * c.D_t + c.L_t * block_operations(c.T, c.D_t)         # the tokenizer's
               + 2 * c.N * c.D_t * (c.D_t + c.d))                                            # ... encode_task_layer
    lookup = 2 * c.N * c.K * c.d                             # h v^T
    if stage == "pretrain":
        head = c.head_depth * block_operations(c.T, c.D)
        logits = (2 if c.head_depth else 1) * 2 * c.M * c.D * c.K                            # hidden patches only
        return dict(tokenizer=encoder + lookup, forward=patches + blocks + head + logits,
                    backward=patches + 2 * (blocks + head + logits))
    if stage == "vqkd":
        decoder = (2 * c.N * c.d * c.D_t + c.L_d * block_operations(c.T, c.D_t)
                   + 2 * c.N * c.D_t * (c.D_t + c.C))                                        # ... decode_task_layer
        pixels = 2 * c.N * 3 * c.p ** 2 * c.D_t
        teacher = (2 * c.N * 3 * CLIP["patch_size"] ** 2 * CLIP["width"] + 2 * c.N * CLIP["width"] * CLIP["dim"]
                   + CLIP["depth"] * block_operations(c.T, CLIP["width"]))
        return dict(teacher=teacher, forward=encoder + lookup + decoder, backward=2 * (encoder + decoder) - pixels)
    if stage == "finetune":
        head = 2 * c.D * 1000
        return dict(forward=patches + blocks + head, backward=patches + 2 * (blocks + head))
    if stage == "linprobe":
        return dict(forward=patches + blocks)                # the backbone is frozen; the heads read means of tokens
    raise ValueError(f"no formula for {stage}: its convolutions are counted by torch")


def counted(step):
    """What torch counts while `step` runs."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


# What the plain version does instead: the equations, with every matrix written out in memory.
def plain_attention(self, x, index=None, shared=None, queries=None):
    """softmax(q k^T / sqrt(D/H) + bias) v, with the T x T weights of every head stored."""
    q, k, v = self.queries_keys_values(x)
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    bias = self.bias(index, shared)
    weights = (logits if bias is None else logits + bias[..., :logits.shape[-1]]).softmax(dim=-1)
    return self.proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))


def plain_run(self, block, x, shared, queries=None):
    """A block computes all of its tokens; those nobody reads are dropped afterwards."""
    x = block(x, self.relative_position_index, shared)
    return x if queries is None else x.take_along_dim(queries[..., None], dim=1)


def plain_nearest_code(h, codebook, chunk=None):
    """argmin of || h - v ||^2 = h^2 + v^2 - 2 h v over the matrix of all distances (n, K)."""
    with torch.autocast(h.device.type, enabled=False):
        x, v = vqkd.l2(h.float()).flatten(0, -2), vqkd.l2(codebook.float())
        distance = x.pow(2).sum(dim=1, keepdim=True) + v.pow(2).sum(dim=1) - 2 * x @ v.T
        return distance.argmin(dim=1).view(h.shape[:-1])


def plain_code_sums(h, z, codes):
    """Sums and numbers per code through a one-hot matrix (n, K), as the released code has it."""
    one_hot = F.one_hot(z.flatten(), codes).float()
    return one_hot.T @ h.detach().float().flatten(0, -2), one_hot.sum(dim=0)


@contextlib.contextmanager
def plain(on=True):
    """Inside, the plain versions stand in for ours (precision is the caller's affair)."""
    swaps = [(model.Attention, "forward", plain_attention), (ViT, "run", plain_run),
             (vqkd, "nearest_code", plain_nearest_code), (vqkd, "code_sums", plain_code_sums)] if on else []
    ours = [(owner, name, getattr(owner, name)) for owner, name, _ in swaps]
    for owner, name, function in swaps:
        setattr(owner, name, function)
    engine.keep_freed_memory(not on)
    try:
        yield
    finally:
        engine.keep_freed_memory()
        for owner, name, function in ours:
            setattr(owner, name, function)


# --- the steps: what the training loops do, on random images, with clock(part) after each part ------------------------
def images_of(c, args, device):
    return torch.randint(256, (args.batch_size, 3, c.S, c.S), dtype=torch.uint8, device=device)


def update(network, optimizer, clip=math.inf):
    nn.utils.clip_grad_norm_(network.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def optimizer_of(network, device):
    optimizer = engine.adamw(engine.param_groups(network.named_parameters(), 0.05), (0.9, 0.98), device)
    engine.set_lr(optimizer, 1e-5)
    return optimizer


def compiled(network, args):
    return torch.compile(network) if args.compile else network


def tokenizer_of(c, device):
    tokenizer = vqkd.VQKD(c.S, c.p, c.D_t, c.L_t, c.heads_t, c.L_d, c.K, c.d, (c.C,)).to(device)
    tokenizer.quantize.embedding.weight.copy_(vqkd.l2(torch.randn(c.K, c.d)))
    return tokenizer


def pretrain_step(c, args, device):
    tokenizer = tokenizer_of(c, device).eval().requires_grad_(False)
    network = pretrain.BEiT(**PRESETS[c.preset], codes=c.K, early_layer=c.early, head_depth=c.head_depth).to(device)
    network.checkpoint_activations = args.checkpoint_activations
    forward, optimizer = compiled(network, args), optimizer_of(network, device)
    pixels = images_of(c, args, device)
    mask = torch.stack([pretrain.sample_block_mask(math.isqrt(c.N), math.isqrt(c.N), c.M, max(1, c.N * 16 // 196))
                        for _ in range(args.batch_size)]).flatten(1)
    hidden, mask = pretrain.hidden_patches(mask).to(device), mask.to(device)

    def step(amp, clock):
        images = data.to_float(pixels, device)
        clock("data")
        with engine.autocast(device, amp):
            z = tokenizer.encode(images)
            clock("tokenizer")
            logits, logits_cls = forward(imagenet_normalize(images), mask, hidden)
            loss, _ = pretrain.mim_loss(logits, logits_cls, z.gather(1, hidden).flatten())
        clock("forward")
        loss.backward()
        clock("backward")
        update(network, optimizer, 3.0)
        clock("optimiser")
    return step


def vqkd_step(c, args, device):
    network, optimizer = (n := tokenizer_of(c, device)), optimizer_of(n, device)
    forward, pixels, teacher = compiled(network, args), images_of(c, args, device), clip_size_teacher(c, device)

    def step(amp, clock):
        images = data.to_float(pixels, device)
        clock("data")
        with engine.autocast(device, amp):
            t = teacher(images)
            clock("teacher")
            o, h, v, z = forward(images)
            loss, _ = vqkd.vqkd_loss(o, t, h, v)
        clock("forward")
        loss.backward()
        clock("backward")
        network.quantize.update(*vqkd.code_sums(h, z, c.K), decay=0.99)
        update(network, optimizer)
        clock("optimiser")
    return step


def clip_size_teacher(c, device):
    """open_clip's ViT-B-16 with random weights, through the same lines that call the real one."""
    import open_clip
    from support import teachers
    logging.disable(logging.WARNING)         # that the weights are random
    tower = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None, device="cpu").visual
    logging.disable(logging.NOTSET)
    teacher = teachers.ClipTeacher.__new__(teachers.ClipTeacher)
    teacher.mean, teacher.std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    side = math.isqrt(c.N)
    teacher.size, positions = (side * 16, side * 16), tower.positional_embedding
    positions.data = teachers.resize_positions(positions.data, tuple(tower.grid_size), (side, side))
    teacher.tower = tower.to(device).eval().requires_grad_(False)
    return teacher


def supervised_step(network, loss_of, c, args, device):
    """Forward, loss_of(outputs), backward, update: fine-tuning, segmentation, and timm's networks."""
    network.to(device).train()
    forward, optimizer, pixels = compiled(network, args), optimizer_of(network, device), images_of(c, args, device)

    def step(amp, clock):
        images = data.to_float(pixels, device)
        clock("data")
        with engine.autocast(device, amp):
            outputs = forward(imagenet_normalize(images))
        loss = loss_of(outputs)
        clock("forward")
        loss.backward()
        clock("backward")
        update(network, optimizer)
        clock("optimiser")
    return step


def build_vit(c, **options):
    return ViT(c.S, c.p, c.D, c.L, c.heads, layer_scale=PRESETS[c.preset]["layer_scale"], **options)


def finetune_step(c, args, device):
    targets = finetune.smooth_targets(torch.randint(1000, (args.batch_size,), device=device), 1000, 0.1)
    return supervised_step(build_vit(c, num_classes=1000), lambda logits: finetune.soft_cross_entropy(logits, targets),
                           c, args, device)


def segment_step(c, args, device):
    labels = torch.randint(150, (args.batch_size, c.S, c.S), device=device)

    def loss_of(outputs):
        return (segment.pixel_cross_entropy(outputs[0], labels)
                + segment.AUX_WEIGHT * segment.pixel_cross_entropy(outputs[1], labels))
    return supervised_step(segment.UPerNet(build_vit(c), 150), loss_of, c, args, device)


def linprobe_step(c, args, device):
    network, pixels = build_vit(c).to(device).eval().requires_grad_(False), images_of(c, args, device)

    def step(amp, clock):
        images = data.to_float(pixels, device)
        clock("data")
        with engine.autocast(device, amp), torch.no_grad():
            linprobe.summarise(network, imagenet_normalize(images))
        clock("forward")
    return step


def timm_step(kind, c, args, device):
    """timm's BEiT (a relative table in every block) or its bare ViT of the same size, as a classifier."""
    from timm.models.beit import Beit
    from timm.models.vision_transformer import VisionTransformer
    same = dict(img_size=c.S, patch_size=c.p, embed_dim=c.D, depth=c.L, num_heads=c.heads, num_classes=1000)
    network = VisionTransformer(**same) if kind == "ViT" else Beit(
        **same, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True)
    labels = torch.randint(1000, (args.batch_size,), device=device)
    return supervised_step(network, lambda logits: F.cross_entropy(logits.float(), labels), c, args, device)


# --- measuring --------------------------------------------------------------------------------------------------------
class Clock:
    """clock(part) books the seconds since the last call under `part`; --clock cpu counts this process's time only."""

    def __init__(self, args, device):
        self.now = time.process_time if args.clock == "cpu" else time.perf_counter
        self.device, self.parts = device, {}
        self.wait()
        self.last = self.now()

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __call__(self, part):
        self.wait()
        now = self.now()
        self.parts[part], self.last = self.parts.get(part, 0) + now - self.last, now


def matrix_rate(c, args, device, amp):
    """Operations a second of the MLP's first layer, (B T, D) x (D, 4D): the machine's limit for this work."""
    x, w = torch.randn(args.batch_size * c.T, c.D, device=device), torch.randn(4 * c.D, c.D, device=device)
    x, w = (x.bfloat16(), w.bfloat16()) if amp == "bf16" else (x, w)
    F.linear(x, w)
    clock, rounds = Clock(args, device), 0
    while rounds < 3 or clock.parts["product"] < 0.15:
        F.linear(x, w)
        clock("product")
        rounds += 1
    return rounds * 2 * len(x) * c.D * 4 * c.D / clock.parts["product"]


def compare(contestants, c, args, device):
    """Time contestants {name: (step, amp, plain or not, operations)} in turn, the matrix product before and after.
    -> {name: median facts}"""
    for step, amp, is_plain, _ in contestants.values():      # warm up: buffers, caches, compilation
        with plain(is_plain):
            step(amp, lambda part: None)
    runs = {name: [] for name in contestants}
    for _ in range(args.repeats):
        for name, (step, amp, is_plain, ops) in contestants.items():
            before = matrix_rate(c, args, device, amp)
            clock = Clock(args, device)
            with plain(is_plain):
                step(amp, clock)
            limit, seconds = (before + matrix_rate(c, args, device, amp)) / 2, sum(clock.parts.values())
            rate = args.batch_size / seconds
            runs[name].append(dict(images_per_s=rate, share=rate * ops / limit, limit=limit,
                                   **{f"t_{part}": t for part, t in clock.parts.items()}))
    return {name: {key: statistics.median(run[key] for run in rs) for key in rs[0]} | dict(
        operations=contestants[name][3]) for name, rs in runs.items()}


class Held(TorchDispatchMode):
    """Inside, `peak` is the most bytes of tensors made there that existed at any one time; what a kernel needs for
    itself, and what an allocator loses between tensors, is not seen."""

    now = peak = 0

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def storages(tree):
            tensors = (t for t in tree_leaves(tree) if isinstance(t, torch.Tensor))
            return {s._cdata: s for s in map(torch.Tensor.untyped_storage, tensors)}
        old = storages((args, kwargs))
        result = function(*args, **(kwargs or {}))
        for key, storage in storages(result).items():        # a view, or what an in-place operation returns, is not new
            if key not in old:
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result


def peak_memory(stage, args, amp, is_plain, device):
    """MiB that two steps of a new network need on top of weights and images: activations, gradients, moments."""
    step, cuda = globals()[f"{stage}_step"](sizes(args.model), args, device), device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with plain(is_plain), contextlib.nullcontext() if cuda else Held() as held:
        for _ in range(2):
            step(amp, lambda part: None)
    return (torch.cuda.max_memory_allocated(device) - before if cuda else held.peak) / 2**20


def bench_step(stage, args, device, tell):
    """One stage: default in each precision, plain float32, timm's networks beside pre-training; then peak memory."""
    c, amps = sizes(args.model), ["no", "bf16"] if args.amp == "auto" else [args.amp]
    step = globals()[f"{stage}_step"](c, args, device)
    with plain():                            # the fused kernels of a CPU are unknown to torch's counter
        ops_torch = counted(lambda: step("no", lambda part: None)) / args.batch_size
    ops = ops_torch if stage == "segment" else sum(operations(stage, c).values())
    contestants = {f"{stage} {amp}": (step, amp, False, ops) for amp in amps}
    if not args.no_plain and not args.compile:               # compiled code stays what it is when functions are swapped
        contestants[f"{stage} plain"] = (step, "no", True, ops)
    if stage == "pretrain" and not args.no_timm:
        for kind in ("BEiT", "ViT"):
            theirs = timm_step(kind, c, args, device)
            contestants |= {f"timm {kind} {amp}": (theirs, amp, False, sum(operations("finetune", c).values()))
                            for amp in amps}
    results = compare(contestants, c, args, device)
    print(f"\n{stage}, {args.model}, {c.S} px, batch {args.batch_size}: {ops * args.batch_size / 1e9:.4g} G operations "
          f"a step by formula, {ops_torch * args.batch_size / 1e9:.4g} by torch's counter")
    print(f"{'':18} {'images/s':>9} {'share':>6} {'limit':>9} {'peak MiB':>9}  seconds by part")
    for name, r in results.items():
        amp, mine = contestants[name][1], name.startswith(stage)
        if mine and not args.no_memory:
            r["peak_mib"] = peak_memory(stage, args, amp, contestants[name][2], device)
        parts = ", ".join(f"{k[2:]} {v:.3g}" for k, v in r.items() if k.startswith("t_"))
        print(f"{name:18} {r['images_per_s']:9.2f} {r['share']:6.1%} {r['limit'] / 1e9:6.0f} G/s "
              f"{r.get('peak_mib', math.nan):9.0f}  {parts}", flush=True)
        tell(stage=stage, name=name, amp=amp, operations_torch=ops_torch, **r)


def bench_quantizer(args, device, tell):
    """Look-up, straight-through, gradient and moving average of 64 base images, ours beside the one-hot version."""
    c = sizes(args.model)
    n, seconds = 64 * c.N, {"default": [], "plain": []}
    book = vqkd.Codebook(c.K, c.d).to(device)
    book.embedding.weight.copy_(vqkd.l2(torch.randn(c.K, c.d)))
    start = book.embedding.weight.clone()
    for _ in range(args.repeats + 1):
        for name, times in seconds.items():
            book.embedding.weight.copy_(start)
            x = torch.randn(n, c.d, device=device, requires_grad=True)
            clock = Clock(args, device)
            with plain(name == "plain"):
                h = vqkd.l2(x)
                v, z = book(h)
                (F.mse_loss(h, v.detach()) + vqkd.straight_through(h, v).sum()).backward()
                book.update(*vqkd.code_sums(h, z, c.K), decay=0.99)
            clock("quantizer")
            times.append(clock.parts["quantizer"])
    ratio = statistics.median(p / d for p, d in list(zip(seconds["plain"], seconds["default"]))[1:])
    fast, slow = (1e3 * statistics.median(seconds[name][1:]) for name in ("default", "plain"))
    print(f"\nquantizer, {n} vectors, {c.K} x {c.d}: {fast:.1f} ms; one-hot version {slow:.1f} ms, {ratio:.1f} x")
    tell(stage="quantizer", vectors=n, codes=c.K, ms=fast, plain_ms=slow, ratio=ratio)


def bench_loader(args, device, tell):
    """Images a second that one loader process makes of JPEGs (tiny: of shapes, held in memory as CIFAR is), beside what
    a step at the full matrix rate eats."""
    c = sizes(args.model)
    grid = (math.isqrt(c.N),) * 2
    tiny = args.model == "tiny"
    crops = transforms.MIMTransform(c.S, scale=(1.0, 1.0), color_jitter=0) if tiny else transforms.MIMTransform(c.S)
    views = dict(pixels=None, vqkd=transforms.VQKDTransform(c.S), finetune=transforms.FinetuneTransform(c.S),
                 linprobe=transforms.EvalTransform(c.S),
                 pretrain=functools.partial(pretrain.masked_views, views=crops, grid=grid, count=c.M,
                                            min_block=max(1, c.N * 16 // 196)))
    if tiny:
        clock = Clock(args, device)
        count = len(data.open_data("shapes", "train"))
        clock("drawing")
        print(f"\nshapes: {count} images drawn in {clock.parts['drawing']:.1f} s")
        tell(stage="loader", name="drawing shapes", images_per_s=count / clock.parts["drawing"])
    limit = matrix_rate(c, args, device, "bf16" if args.amp == "bf16" else "no")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                 # as many as torch gives a worker
    with tempfile.TemporaryDirectory() as folder:
        if not tiny:
            write_pictures(Path(folder), 16)
        for name, transform in views.items():
            dataset = data.open_data("shapes", "train", transform, limit=64) if tiny else Folder(
                folder, None, transform, labelled=False)
            dataset[(0, 0)]
            clock, seen = Clock(args, device), 0
            while seen < 32 or clock.parts["loader"] < 1.0:
                dataset[(1, seen % len(dataset))]
                clock("loader")
                seen += 1
            rate = seen / clock.parts["loader"]
            need = limit / sum(operations(name, c).values()) if transform else math.nan
            print(f"loader of {name:9} {rate:8.1f} images/s a process; a step at full matrix rate takes {need:.1f}")
            tell(stage="loader", name=name, images_per_s=rate, need=need)
    torch.set_num_threads(threads)


def write_pictures(folder, count):
    """JPEGs of ImageNet's usual size, smooth with some noise, so that a file is about as long as theirs."""
    from PIL import Image
    for i in range(count):
        coarse = torch.rand(1, 3, 12, 16)
        image = F.interpolate(coarse, size=(375, 500), mode="bicubic").clamp(0, 1) + 0.04 * torch.randn(1, 3, 375, 500)
        pixels = (255 * image[0].clamp(0, 1)).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i:03}.jpg", quality=92)


def bench_startup(args, device, tell):
    """Seconds of `python STAGE.py --help` beside those of `import torch`, and until tiny has made its first step."""
    def seconds(*command):
        times = []
        for _ in range(args.repeats):
            begin = time.perf_counter()
            subprocess.run([sys.executable, *command], cwd=files.ROOT, check=True, capture_output=True)
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    bare = seconds("-c", "import torch")
    print(f"\nimport torch {bare:.2f} s; --help on top of that:", end=" ")
    for stage in STEPS:
        extra = seconds(f"{stage}.py", "--help") - bare
        print(f"{stage} {extra:.2f}", end=" ", flush=True)
        tell(stage="startup", name=f"{stage} --help", seconds=extra, import_torch=bare)
    print("\nfirst training step of tiny, from the command on:", end=" ")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "vqkd.py", "--out", f"{folder}/pretrain", "--steps", "2", "--continuous-steps",
                        "1", "--limit", "64"], cwd=files.ROOT, check=True, capture_output=True)
        for stage in ("vqkd", "pretrain"):
            log, begin = Path(folder, stage, f"{stage}.jsonl"), time.perf_counter()
            command = subprocess.Popen([sys.executable, f"{stage}.py", "--out", f"{folder}/{stage}"], cwd=files.ROOT,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while not (done := log.exists() and '"step": 0' in log.read_text()) and command.poll() is None:
                time.sleep(0.02)
            took = time.perf_counter() - begin
            command.terminate()
            command.wait()
            if not done:
                raise UserError(f"{stage}.py made no step: run it alone to see why")
            print(f"{stage} {took:.1f} s", end=" ", flush=True)
            tell(stage="startup", name=f"{stage}: first step", seconds=took)
    print()


# --- planning ---------------------------------------------------------------------------------------------------------
def schedules():
    """The paper's runs: (what, preset, stage, images seen)."""
    return [("tokenizer, 100 epochs", "base", "vqkd", 100 * IMAGENET),
            *((f"pre-training, {epochs} epochs", name, "pretrain", epochs * IMAGENET)
              for name in ("base", "large") for epochs in (300, 1600)),
            ("fine-tuning, 100 epochs", "base", "finetune", 100 * IMAGENET),
            ("fine-tuning, 50 epochs", "large", "finetune", 50 * IMAGENET)]


def hours(ops_per_image, images, share, peak, gpus):
    """-> GPU-hours, hours on `gpus`, images a second of all of them together; peak in operations a second."""
    rate = gpus * share * peak / ops_per_image
    return images * gpus / rate / 3600, images / rate / 3600, rate


def plan(args, tell):
    peak = args.peak_tflops * 1e12
    print(f"{args.gpus} GPUs at {args.share:.0%} of {args.peak_tflops:g} T operations/s. The loader must deliver:")
    print(f"{'':32}G ops/image  GPU-hours    hours  images/s  files MB/s  to GPUs MB/s")
    for what, name, stage, images in schedules():
        c = sizes(name)
        ops = sum(operations(stage, c).values())
        gpu_hours, wall, rate = hours(ops, images, args.share, peak, args.gpus)
        moved = rate * 3 * c.S ** 2                          # pixels travel as bytes
        print(f"{name + ' ' + what:31} {ops / 1e9:11.1f} {gpu_hours:10.0f} {wall:8.1f} {rate:9.0f} "
              f"{rate * JPEG / 1e6:11.0f} {moved / 1e6:13.0f}")
        tell(stage="plan", name=f"{name} {what}", operations=ops, gpu_hours=gpu_hours, hours=wall, images_per_s=rate,
             file_bytes_per_s=rate * JPEG, bytes_per_s=moved, gpus=args.gpus, share=args.share, peak=peak)


# --- arguments --------------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stage", default="pretrain", choices=[*STAGES, "all"], help="what to measure; default pretrain")
    p.add_argument("--model", default="base", help="preset: tiny, small, base, large; default base")
    p.add_argument("--batch-size", type=int, default=8, help="images in a step; default 8")
    p.add_argument("--amp", default="auto", choices=["auto", "no", "bf16"], help="precision; auto: both")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    p.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    p.add_argument("--clock", default="wall", choices=["wall", "cpu"],
                   help="cpu: time of this process only, for a machine that others use, too (take --threads 1)")
    p.add_argument("--repeats", type=int, default=3, help="steps of which the median counts; default 3")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    p.add_argument("--checkpoint-activations", action="store_true", help="pre-training: hold less memory")
    p.add_argument("--plain", action="store_true", help="plain version beside ours: the default, not with --compile")
    p.add_argument("--no-plain", action="store_true", help="leave the plain version out")
    p.add_argument("--no-timm", action="store_true", help="leave timm's networks out")
    p.add_argument("--no-memory", action="store_true", help="do not measure peak memory, which takes two more steps")
    p.add_argument("--out", type=Path, help="append JSON lines to this file")
    g = p.add_argument_group("plan")
    g.add_argument("--plan", action="store_true", help="print GPU-hours of the paper's schedules and stop")
    g.add_argument("--gpus", type=int, default=8)
    g.add_argument("--share", type=float, default=0.4, help="of the peak that a step reaches; default 0.4")
    g.add_argument("--peak-tflops", type=float, default=989, help="of one GPU; default 989, an H100 in bf16")
    args = p.parse_args(argv)
    if args.model not in PRESETS:
        raise UserError(f"--model {args.model} is not a preset; choose from {', '.join(PRESETS)}")
    if args.plain and (args.no_plain or args.compile):
        other = "--no-plain" if args.no_plain else "--compile"
        raise UserError(f"--plain and {other} contradict each other: leave one of them out")
    if args.stage == "vqkd" and args.model == "large":
        raise UserError("--stage vqkd --model large: the paper has one tokenizer, of size base; give --model base")
    engine.check_ranges(args, [
        ("batch_size", 2, 10**6), ("threads", 1, 4096), ("repeats", 1, 10**6), ("gpus", 1, 10**6), ("share", 1e-6, 1),
        ("peak_tflops", 1e-6, 1e9)])
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    process = engine.init_distributed(args.device)
    about = dict(model=args.model, batch=args.batch_size, threads=torch.get_num_threads(), clock=args.clock,
                 repeats=args.repeats, device=str(process.device), torch=str(torch.__version__), compile=args.compile,
                 checkpoint=args.checkpoint_activations)

    def tell(**facts):
        if args.out:
            try:
                with open(args.out, "a") as f:
                    f.write(json.dumps(about | facts) + "\n")
            except OSError as error:
                raise UserError(f"cannot write {args.out} ({error.strerror}): choose another --out") from error
    if args.plan:
        return plan(args, tell)
    torch.manual_seed(0)
    for stage in STAGES if args.stage == "all" else [args.stage]:
        if stage in STEPS:
            bench_step(stage, args, process.device, tell)
        else:
            globals()[f"bench_{stage}"](args, process.device, tell)


if __name__ == "__main__":
    engine.run(main)
