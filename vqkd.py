"""Stage 1, VQ-KD: train the tokenizer that turns every image patch into one of K discrete codes (paper, Section 2.2).

    image --encoder--> h --nearest code--> v --decoder--> o    pulled towards    t = teacher(image)

The decoder must rebuild a semantic teacher's patch features (CLIP, DINO) from nothing but the codes, so the codes come
to mean what the teacher's features mean. Afterwards teacher and decoder are dropped; encoder and codebook stay.

Read in this order: nearest_code, straight_through, vqkd_loss, code_sums, ema_update, kmeans, VQKD, train.

    python vqkd.py                                                       # tiny on built-in shapes: CPU, minutes
    torchrun --nproc_per_node=8 vqkd.py --model base --data /imagenet    # the paper's run
    python vqkd.py --encode IMAGE_OR_FOLDER                              # images -> token ids, in runs/tiny/tokens.npz
"""
# Shapes used in this file:  B images, N = gh x gw patches per image, D code width, K codes, C teacher width

import argparse
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import data
import engine
import teachers
import weights
from model import PRESETS, ViT, count_parameters, initialise

PAPER = dict(            # REFERENCE.md section 2; the paper has this one tokenizer, of base size, for both backbones
    teacher="clip", codes=8192, code_dim=32, encoder_depth=12, decoder_depth=3, decay=0.99, beta=1.0, lr=5e-5,
    min_lr=1e-5, beta2=0.99, weight_decay=1e-4, batch_size=512, micro_batch=64, epochs=100, warmup_epochs=10,
    crop_scale=0.08, continuous_steps=0, restart_dead_codes=0)
RECIPES = {              # tiny, small: ours
    # tiny: codes that start on an encoder which knows nothing hold it back (results/README.md: cold start). So training
    # begins without quantizer, then come the k-means start, a faster moving average, new places for dead codes.
    "tiny": dict(PAPER, teacher="hog", codes=64, code_dim=16, encoder_depth=4, decoder_depth=1, decay=0.97, lr=4e-3,
                 batch_size=32, micro_batch=32, epochs=2, warmup_epochs=0.5, crop_scale=0.6, continuous_steps=250,
                 restart_dead_codes=20),
    "small": dict(PAPER, codes=2048, decoder_depth=1, micro_batch=128),
    "base": PAPER,
}


# --- method -----------------------------------------------------------------------------------------------------------
def l2(x):
    """l2(x) of the equations: every vector divided by its length."""
    return F.normalize(x, dim=-1)


def nearest_code(h, codebook, chunk=None):
    """The token of every vector, Eq. (1).  h (..., D), codebook (K, D) -> (...) long in [0, K).  A pure look-up."""
    # In chunks, so that no more than chunk x K similarities exist at a time: 8 MB stay in a CPU's cache.
    chunk = chunk or max(1, (2**21 if h.device.type == "cpu" else 2**27) // len(codebook))
    with torch.no_grad(), torch.autocast(h.device.type, enabled=False):  # float32: bf16 would change about 1 id in 300
        h, v = l2(h.float()), l2(codebook.float())
        # Eq. (1):  z_i = argmin_j || l2(h_i) - l2(v_j) ||
        # On the unit sphere ||a - b||^2 = 2 - 2 a.b, so the nearest code is the one with the largest cosine.
        parts = h.flatten(0, -2).split(chunk)
        room = h.new_empty(len(v) * len(parts[0]))           # (K, chunk) cosines; the next chunk overwrites them
        z = [largest(torch.mm(v, part.T, out=room[:len(v) * len(part)].view(len(v), len(part)))) for part in parts]
    return torch.cat(z).view(h.shape[:-1])


def largest(s):
    """s.argmax(dim=0) of s (K, n), but several times faster on a CPU: which group of codes holds the largest, then
    which code of that group. The largest itself is found many at a time, its place only one by one."""
    group = math.gcd(s.shape[0], 64)
    s = s.unflatten(0, (-1, group))                          # (K / group, group, n)
    best = s.amax(dim=1).argmax(dim=0)                       # (n,)
    return best * group + s[best, :, torch.arange(len(best), device=s.device)].argmax(dim=-1)


def straight_through(h, v):
    """Forward sees the code v, backward sees the identity: argmax has no gradient, so this line is the only road by
    which the decoder teaches the encoder.  h, v (..., D) -> (..., D)"""
    return h + (v - h).detach()


def vqkd_loss(o, t, h, v, beta=1.0, teacher_dims=None):
    """Eq. (2), negated so that we minimise it.  o, t (B, N, C); h = l2(h_i), v = l2(v_zi) (B, N, D) -> loss, parts

    max  sum_i cos(o_i, t_i)  -  || sg[l2(h_i)] - l2(v_zi) ||^2  -  || l2(h_i) - sg[l2(v_zi)] ||^2

    Ours, not in the paper: several teachers in a row in C, as {"clip": 512, "dino": 768}; their cosines are averaged.
    """
    dims = teacher_dims or {"": o.shape[-1]}
    pairs = zip(o.float().split(list(dims.values()), dim=-1), t.float().split(list(dims.values()), dim=-1))
    cosines = [F.cosine_similarity(o_, t_, dim=-1).mean() for o_, t_ in pairs]           # cos(o_i, t_i)
    cosine = sum(cosines) / len(cosines)
    codebook = F.mse_loss(v, h.detach())                     # || sg[l2(h_i)] - l2(v_zi) ||^2   moves v; see below
    commit = F.mse_loss(h, v.detach())                       # || l2(h_i) - sg[l2(v_zi)] ||^2   keeps h near its code
    # Differs from Eq. (2): v is no parameter. Instead of following the gradient of `codebook` the codes move by moving
    # average (ema_update), as the authors train them; the two point the same way (tests/test_ema.py shows it).
    # Differs from Eq. (2): mse_loss is a mean over D where the equation sums, so these terms are D times smaller.
    parts = dict(cosine=cosine, commit=commit, codebook=codebook)
    if len(cosines) > 1:
        parts |= {f"cosine_{name}": c for name, c in zip(dims, cosines)}
    return 1 - cosine + beta * commit, {name: part.detach() for name, part in parts.items()}


def code_sums(h, z, codes):
    """Per code, the sum of the vectors assigned to it and their number.  h (..., D), z (...) -> (K, D), (K,)

    index_add instead of a one-hot matrix, which for base would have 100,352 x 8192 entries a step.
    """
    h, z = h.detach().float().flatten(0, -2), z.flatten()
    sums = torch.zeros(codes, h.shape[-1], device=h.device).index_add_(0, z, h)
    return sums, torch.bincount(z, minlength=codes).float()


def ema_update(codebook, sums, counts, decay):
    """Move every code that was used towards the mean direction of its vectors.  (K, D), (K, D), (K,) -> (K, D)

    v <- l2( decay * v + (1 - decay) * l2(mean of its l2(h)) ); the mean's length, and so the count, plays no part.
    Recipe, not in the paper: codes unused in the step stay where they are.
    """
    moved = l2(decay * codebook + (1 - decay) * l2(sums))
    return torch.where((counts > 0)[:, None], moved, codebook)


def kmeans(x, centres, iterations=10):
    """Spherical k-means: assign each row of x (n, D) to its nearest centre (K, D) on the sphere, take l2 of the mean.
    -> centres, counts of the last assignment. An empty centre stays."""
    for _ in range(iterations):
        z = nearest_code(x, centres)
        sums, counts = code_sums(x, z, len(centres))
        centres = torch.where((counts > 0)[:, None], l2(sums), centres)
    return centres, counts


class Codebook(nn.Module):
    """K unit vectors. State, not parameters: k-means starts them, ema_update moves them, no optimiser sees them."""

    def __init__(self, codes, code_dim):
        super().__init__()
        self.embedding = nn.Embedding(codes, code_dim)       # the released name of the table: quantize.embedding.weight
        self.embedding.weight.requires_grad_(False).zero_()
        self.register_buffer("cluster_size", torch.zeros(codes))         # how much each code is used of late

    @torch.no_grad()
    def update(self, sums, counts, decay):
        """Once per training step, after the look-up, with sums over all micro-batches and processes.
        Differs from the released code: a look-up changes no counter, so evaluating leaves no trace, and the counter
        runs on (there it is set to 0 before each epoch and each evaluation)."""
        self.cluster_size.mul_(decay).add_(counts, alpha=1 - decay)
        self.embedding.weight.copy_(ema_update(self.embedding.weight, sums, counts, decay))

    def forward(self, h):
        """h = l2(h_i) (B, N, D) -> v = l2(v_zi) (B, N, D), z (B, N)"""
        z = nearest_code(h, self.embedding.weight)
        return l2(self.embedding(z)), z


class VQKD(nn.Module):
    """Encoder, codebook and decoder. The teacher is not in here: it is never trained, saved or wrapped."""

    def __init__(self, image_size, patch_size, width, depth, heads, decoder_depth, codes, code_dim, teacher_dims):
        super().__init__()
        # Recipe, not in the paper: absolute positions, no layer scale (relative positions come with stage 2).
        kind = dict(positions="absolute", layer_scale=0, pool="mean")
        self.encoder = ViT(image_size, patch_size, width, depth, heads, **kind)
        # The decoder is the same kind of network on the map of codes, each code one "pixel" of D channels.
        self.decoder = ViT(self.encoder.grid, 1, width, decoder_depth, heads, in_channels=code_dim, **kind)
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, code_dim))
        # One head per teacher. The first has the released name; more than one is ours.
        self.decode_task_layer, *more = [nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, dim))
                                         for dim in teacher_dims]
        self.more_decode_task_layers = nn.ModuleList(more)
        self.quantize = Codebook(codes, code_dim)
        initialise(self.encode_task_layer)
        initialise(self.decode_task_layer)
        initialise(self.more_decode_task_layers)

    def project(self, images):
        """Images (B, 3, H, W) in [0, 1] -> h (B, N, D), not yet normalised. The tokenizer's own pixels are [-1, 1]."""
        tokens = self.encoder(images * 2 - 1)[:, 1:]         # LayerNorm on each patch token, [CLS] dropped
        with torch.autocast(images.device.type, enabled=False):          # the quantizer always computes in float32
            return self.encode_task_layer(tokens.float())

    def decode(self, v):
        """Codes (B, N, D) -> o (B, N, C), the decoder's guess of the teacher's features (of all teachers, in a row)."""
        gh, gw = self.encoder.grid
        x = self.decoder(v.transpose(1, 2).reshape(v.shape[0], -1, gh, gw))[:, 1:]
        return torch.cat([head(x) for head in (self.decode_task_layer, *self.more_decode_task_layers)], dim=-1)

    def forward(self, images, quantize=True):
        """-> o (B, N, C), h (B, N, D), v (B, N, D), z (B, N); quantize=False lets h itself pass instead of its code."""
        h = l2(self.project(images))
        v, z = self.quantize(h) if quantize else (h.detach(), None)
        return self.decode(straight_through(h, v) if quantize else h), h, v, z

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, H, W) in [0, 1] -> token ids (B, N) long. Changes nothing in the tokenizer."""
        return nearest_code(self.project(images), self.quantize.embedding.weight)


# --- arguments --------------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    engine.add_run_args(p)
    g = p.add_argument_group("VQ-KD")
    g.add_argument("--teacher", help="whose patch features to distil: clip, dino, open_clip:NAME@TAG_OR_FILE, "
                                     "timm:NAME@FILE, hog, pixel, or several: clip+dino; base: clip, tiny: hog")
    g.add_argument("--cache-teacher", type=Path, metavar="DIR",
                   help="compute the teacher's features once, keep them in DIR and train on whole images and mirror "
                        "images: no random crops, but a CLIP-size teacher becomes usable on a CPU")
    g.add_argument("--codes", type=int, help="K, size of the codebook; base: 8192")
    g.add_argument("--code-dim", type=int, help="D, numbers per code; base: 32")
    g.add_argument("--encoder-depth", type=int, help="blocks of the encoder; base: 12")
    g.add_argument("--decoder-depth", type=int, help="blocks of the decoder; base: 3")
    g.add_argument("--decay", type=float, help="of the moving average that moves the codes; base: 0.99")
    g.add_argument("--beta", type=float, help="weight of the commitment term; base: 1")
    g.add_argument("--continuous-steps", type=int, help="first steps without quantizer, before k-means; base: 0")
    g.add_argument("--restart-dead-codes", type=int, metavar="STEPS",
                   help="so often, in the first 80 %% of training, move codes that nothing chose of late to current "
                        "vectors; base: 0, never")
    g.add_argument("--stop-on-collapse", action="store_true", help="end the run when the codebook collapses")
    g.add_argument("--crop-scale", type=float, help="smallest share of the image that a random crop keeps; base: 0.08")
    g.add_argument("--lr", type=float, help="peak rate at batch 128, grows with --batch-size; base: 5e-5, so 2e-4")
    g.add_argument("--min-lr", type=float, help="rate that the cosine approaches; base: 1e-5")
    g.add_argument("--beta2", type=float, help="of AdamW; base: 0.99")
    g.add_argument("--weight-decay", type=float, help="base: 1e-4")
    g.add_argument("--warmup-epochs", type=float, help="epochs of linear warm-up; base: 10")
    g.add_argument("--init", type=Path, help="go on from this tokenizer (ours or a released one) on your own --data; "
                                             "with another number of --codes its most used ones stay, or are split")
    g.add_argument("--encode", type=Path, metavar="IMAGE_OR_FOLDER", help="only write the token ids of images")
    args = p.parse_args(argv)
    if args.cache_teacher and args.crop_scale is not None:
        raise engine.UserError("--cache-teacher trains on whole images, without random crops: leave out --crop-scale")
    args = engine.with_recipe(args, RECIPES)
    args.image_size = args.image_size or PRESETS[args.model]["image_size"]
    args.patch_size = args.patch_size or PRESETS[args.model]["patch_size"]
    engine.check_sizes(args.image_size, args.patch_size)
    engine.check_ranges(args, [
        ("codes", 2, 2**20), ("code_dim", 1, 4096), ("encoder_depth", 1, 100), ("decoder_depth", 1, 100), ("lr", 0, 10),
        ("decay", 0, 1), ("beta", 0, 1e3), ("continuous_steps", 0, 10**9), ("restart_dead_codes", 0, 10**9),
        ("min_lr", 0, 10), ("crop_scale", 1e-3, 1), ("beta2", 0, 0.9999), ("weight_decay", 0, 10),
        ("warmup_epochs", 0, 10**6)])
    weights.grid_of(args.image_size, args.patch_size)        # complains where it does not divide
    return args


# --- codebook health --------------------------------------------------------------------------------------------------
def codebook_usage(counts):
    """How healthy a codebook is, from how often each code was chosen (K,): a collapse shows as falling perplexity."""
    p = counts.cpu().double() / counts.sum().clamp(min=1).item()
    entropy = -(p * p.clamp(min=1e-30).log()).sum().item()   # in nats; ln K where all codes are used alike
    used = int((counts > 0).sum())
    return dict(codes_used=used, dead_codes=len(counts) - used, entropy=entropy, perplexity=math.exp(entropy),
                top10_share=100 * p.sort(descending=True).values[:10].sum().item())


def collapsing(perplexity, best, codes, warned=False):
    """Whether the codebook is dying: perplexity under 20 % of its best or 15 % of the codes. Having `warned`, the
    answer stays yes until it is back over half of its best and over 25 %, so that one fall gives one warning.

    A collapse feeds itself: codes that nothing chooses do not move, while the encoder pulls everything to the few that
    are left. The time to know is on the way down. For a step or two a healthy codebook dips, too, just after its
    k-means start, but not below 28 % of its best (results/health.md).
    """
    share, floor = (0.5, 0.25) if warned else (0.2, 0.15)
    return perplexity < max(share * best, floor * codes)


def resize_codebook(codebook, cluster_size, codes):
    """Another number of codes for a trained codebook.  (K, D), (K,) -> (codes, D), (codes,)

    Shrunk, the most used codes stay. Grown, the most used ones are split in two that differ a little: they share the
    old one's vectors between them and drift apart, so that new codes land where the data is dense.
    """
    order = cluster_size.argsort(descending=True, stable=True)
    if codes <= len(codebook):
        keep = order[:codes].sort().values                   # the ids that stay keep their order
        return codebook[keep], cluster_size[keep]
    split = order.repeat(math.ceil(codes / len(order)) - 1)[:codes - len(order)]
    new = l2(codebook[split] + 0.05 * l2(torch.randn_like(codebook[split])))
    share = cluster_size / (1 + torch.bincount(split, minlength=len(order)))
    return torch.cat([codebook, new]), torch.cat([share, share[split]])


@torch.no_grad()
def kmeans_start(model, dataset, args, process):
    """Give the codebook its first codes: k-means on what the encoder says of a few training images, on rank 0 for all.

    Differs from the released code, which clusters each process's first batch apart and never makes them equal: at least
    4K vectors (at most 65,536), from as many images as that takes, drawn without replacement.
    """
    weight = model.quantize.embedding.weight
    if process.rank == 0:
        codes, patches = len(weight), model.encoder.num_patches
        wanted = min(max(4 * codes, 4096), 65536)
        images_needed = min(math.ceil(wanted / patches), len(dataset))
        generator = torch.Generator().manual_seed(args.seed)
        order, h = torch.randperm(len(dataset), generator=generator).tolist()[:images_needed], []
        for first in range(0, images_needed, 64):
            batch = torch.utils.data.default_collate([dataset[(0, i)][0] for i in order[first:first + 64]])
            images = batch if isinstance(batch, torch.Tensor) else batch[0]
            with engine.autocast(process.device, args.amp):
                h.append(l2(model.project(data.to_float(images, process.device))).flatten(0, 1))
        h = torch.cat(h)                                     # (n, D)
        start = h[torch.randperm(len(h), generator=generator)[:codes].to(h.device)]
        if len(start) < codes:
            print(f"warning: only {len(h)} vectors for {codes} codes, the rest start at random: lower --codes",
                  file=sys.stderr)
            extra = torch.randn(codes - len(start), h.shape[1], generator=generator)
            start = torch.cat([start, l2(extra).to(h.device)])
        weight.copy_(kmeans(h, start)[0])
    if process.world_size > 1:
        dist.broadcast(weight, src=0)
    # Every code begins as used once in a while, so that none counts as dead before it had a chance.
    model.quantize.cluster_size.fill_(1.0)


@torch.no_grad()
def restart_dead_codes(codebook, h, process, threshold=0.1):
    """Move each code that hardly anything chose of late to a random current vector; rank 0 draws, all receive.

    Ours, not in the paper: small codebooks on small data lose codes faster than the moving average brings them back.
    """
    weight, h = codebook.embedding.weight, h.detach().flatten(0, 1)
    dead = (codebook.cluster_size < threshold).nonzero()[:, 0][:len(h)]
    if len(dead):
        weight[dead] = h[torch.randperm(len(h), device="cpu")[:len(dead)].to(h.device)]
        codebook.cluster_size[dead] = 1.0
    if process.world_size > 1:
        dist.broadcast(weight, src=0)
    return len(dead)


def watch_codebook(counts, health, step, args, process, log):
    """Warn, once per fall, when the codebook collapses; --stop-on-collapse ends the run. -> health, for next time"""
    perplexity = codebook_usage(counts)["perplexity"]
    best, warned = max(health["best"], perplexity), health["warned"]
    most = min(args.codes, int(counts.sum()) / 4)            # a small batch cannot show the whole of a large codebook
    falling = collapsing(perplexity, best, most, warned)
    if falling and not warned:
        text = (f"the codebook is collapsing: perplexity {perplexity:.1f} of {args.codes} at step {step}, {best:.1f} "
                f"at best. Lower --lr or lengthen --warmup-epochs; on small data start late (--continuous-steps), let "
                f"the codes follow faster (--decay 0.97) or give dead ones a new place (--restart-dead-codes 20)")
        log(step=step, warning=text)
        if args.stop_on_collapse:
            raise engine.UserError(text)
        if process.rank == 0:
            print(f"warning: {text}", file=sys.stderr, flush=True)
    return dict(best=best, warned=falling)


# --- training ---------------------------------------------------------------------------------------------------------
def images_and_features(batch, teacher, device):
    """Images (B, 3, H, W) in [0, 1] and the teacher's features t (B, N, C), from the teacher or from its cache."""
    if isinstance(batch, torch.Tensor):
        images = data.to_float(batch, device)
        return images, teacher(images)
    return data.to_float(batch[0], device), batch[1].to(device, non_blocking=True).float()


@torch.no_grad()
def evaluate(model, teacher, dataset, args, process):
    """Cosine to the teacher, distance to the code and codebook use over the whole data set, all ranks together."""
    model.eval()
    batches = data.eval_batches(len(dataset), args.micro_batch, process.rank, process.world_size)
    dims = dict(zip(teacher.names, teacher.dims))
    names = ["images", "cosine", "commit", "distance"] + [f"cosine_{name}" for name in dims if len(dims) > 1]
    totals = data.zeros_to_sum(len(names), process.device)
    counts = torch.zeros(args.codes, device=process.device)
    for batch, _ in data.make_loader(dataset, batches, args.workers, process.device):
        with engine.autocast(process.device, args.amp):
            images, t = images_and_features(batch, teacher, process.device)
            o, h, v, z = model(images)
            _, parts = vqkd_loss(o, t, h, v, teacher_dims=dims)
        parts |= dict(images=torch.ones_like(parts["cosine"]), distance=(h - v).norm(dim=-1).mean())     # || h - v ||
        totals += torch.stack([parts[name] for name in names]) * len(images)
        counts += torch.bincount(z.flatten(), minlength=args.codes)
    model.train()
    n, *sums = engine.all_reduce_sum(totals).tolist()
    return {name: s / n for name, s in zip(names[1:], sums)} | codebook_usage(engine.all_reduce_sum(counts))


def train(args, process):
    resumed = engine.start_or_resume("vqkd", args, process)
    options = dict(data_dir=args.data_dir, limit=args.limit, seed=args.seed, labelled=False)
    whole = data.eval_transform(args.image_size)
    views = whole if args.cache_teacher else data.vqkd_transform(args.image_size, scale=(args.crop_scale, 1.0))
    train_set = data.open_data(args.data, "train", views, download=args.download, **options)
    val_set = data.open_data(args.data, "val", whole, **options)
    data.leave_out_bad(args, train_set, val_set)
    steps, warmup, per_epoch = data.resolve_steps(args, len(train_set))
    if args.continuous_steps >= steps and not args.init:
        raise engine.UserError(f"--continuous-steps {args.continuous_steps} leaves none of {steps} steps to the codes")
    micro, accumulation = data.split_batch(args.batch_size, args.micro_batch, process.world_size)
    grid = (args.image_size // args.patch_size,) * 2
    teacher = teachers.build_teacher(args.teacher, grid, args.patch_size, process.device)
    teacher_dims = dict(zip(teacher.names, teacher.dims))
    if args.cache_teacher:
        train_set, val_set = (teachers.cache_features(
            teacher, images, args.cache_teacher, process, flip=flip, batch_size=args.micro_batch, workers=args.workers,
            amp=args.amp) for images, flip in ((train_set, True), (val_set, False)))

    engine.seed_all(args.seed)
    model = build(args, teacher.dims).to(process.device)
    if args.init:
        load_state(model, args.init)
    groups = engine.param_groups(model.named_parameters(), args.weight_decay)
    optimizer = engine.adamw(groups, (0.9, args.beta2), process.device)
    start, health = 0, dict(best=0.0, warned=False)
    if resumed:
        model.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizer"])
        start, health = resumed["step"], resumed.get("health", health)
    network = torch.compile(model) if args.compile else model
    ddp = engine.distribute(network, process)
    log = engine.Log(args.out / "vqkd.jsonl", args, process, start, images=len(train_set), steps=steps)
    if process.rank == 0:
        print(f"VQ-KD: {count_parameters(model) / 1e6:.2f} M parameters, {len(train_set)} images, {steps} steps of "
              f"{args.batch_size} = {process.world_size} processes x {accumulation} x {micro}; teacher {args.teacher}")
    if args.init and not resumed:
        before = evaluate(model, teacher, val_set, args, process)
        log(step=0, split="val", note="before", **before)
    batches = iter(data.make_loader(train_set, data.train_batches(
        len(train_set), args.batch_size, steps, start, process.rank, process.world_size, accumulation, args.seed),
        args.workers, process.device))
    lr = args.lr * args.batch_size / 128                     # Recipe, not in the paper: the rate grows with the batch
    watch = engine.Watch(args, process, log, lambda step: data.names_of(train_set, args.batch_size, step, args.seed))
    clock, clock_step = time.time(), start
    for step in engine.progress(start, steps, process, "vqkd"):
        # 1. The rate is a function of the step. So is all randomness: resuming needs the step and no generator state.
        engine.set_lr(optimizer, engine.cosine_schedule(step, lr, args.min_lr, steps, warmup))
        quantize = step >= args.continuous_steps or bool(args.init)
        if step == args.continuous_steps and not args.init:
            kmeans_start(model, train_set, args, process)

        # 2. Gradients of Eq. (2). All micro-batches of an update look up in one and the same codebook.
        sums = torch.zeros_like(model.quantize.embedding.weight)
        counts = torch.zeros(args.codes, device=process.device)
        for k in range(accumulation):
            batch, _ = next(batches)
            with engine.no_sync(ddp, last=k == accumulation - 1):
                with engine.autocast(process.device, args.amp):
                    images, t = images_and_features(batch, teacher, process.device)  # (B, 3, H, W), (B, N, C)
                    o, h, v, z = ddp(images, quantize)
                    loss, parts = vqkd_loss(o, t, h, v, args.beta, teacher_dims)
                (loss / accumulation).backward()
            watch.note(loss, step)
            if quantize:
                s, c = code_sums(h, z, args.codes)
                sums, counts = sums + s, counts + c
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # 3. The codes follow the vectors that chose them: looked up first, moved after, once per update.
        if quantize:
            model.quantize.update(engine.all_reduce_sum(sums), engine.all_reduce_sum(counts), args.decay)
            if args.restart_dead_codes and step % args.restart_dead_codes == 0 and step < 0.8 * steps:
                engine.seed_all(args.seed, step)
                restart_dead_codes(model.quantize, h, process)
            if process.device.type == "cpu" or step % 10 == 0:           # reading a number waits for a GPU
                health = watch_codebook(counts, health, step, args, process, log)

        # 4. One log line now and then; an evaluation after every epoch.
        last, save = step == steps - 1, (step + 1) % args.save_every == 0
        stop = watch.look(step, now=save or last or step % args.log_every == 0)
        if step % args.log_every == 0 or last:
            rate = (step + 1 - clock_step) * args.batch_size / (time.time() - clock)
            clock, clock_step = time.time(), step + 1
            log(step=step, epoch=step / per_epoch, loss=loss.item(), **{k: p.item() for k, p in parts.items()},
                **({k: u for k, u in codebook_usage(counts).items() if k != "entropy"} if quantize else {}),
                lr=optimizer.param_groups[0]["lr"], images_per_s=rate)
        if ((step + 1) % per_epoch == 0 or last) and quantize:
            begun, result = time.time(), evaluate(model, teacher, val_set, args, process)
            clock += time.time() - begun                     # images_per_s is about training
            log(step=step, epoch=(step + 1) / per_epoch, split="val", **result)
            if process.rank == 0:
                print(f"step {step + 1}/{steps}: cosine {result['cosine']:.3f}, {result['codes_used']} of {args.codes} "
                      f"codes used, perplexity {result['perplexity']:.1f}", flush=True)
        if not last and (save or stop):
            if process.rank == 0:
                engine.save_resume("vqkd", args, contents(model, args) | dict(
                    optimizer=optimizer.state_dict(), step=step + 1, health=health))
            if stop:
                raise SystemExit(128 + stop)

    if args.init and not resumed and process.rank == 0:
        print(f"codes used on {args.data}: {before['codes_used']} before, {result['codes_used']} after; "
              f"perplexity {before['perplexity']:.1f} before, {result['perplexity']:.1f} after")
    log(summary=1, step=steps, **result)
    if process.rank == 0:
        engine.finish("vqkd", args, contents(model, args) | dict(step=steps, result=result))
    return result


# --- files ------------------------------------------------------------------------------------------------------------
def build(args, teacher_dims):
    width, heads = PRESETS[args.model]["width"], PRESETS[args.model]["heads"]
    return VQKD(args.image_size, args.patch_size, width, args.encoder_depth, heads, args.decoder_depth, args.codes,
                args.code_dim, teacher_dims)


def contents(model, args):
    e = model.encoder
    return engine.describe_run("vqkd", args) | dict(model=model.state_dict(), arch=dict(
        image_size=e.image_size[0], patch_size=e.patch_size, width=e.width, depth=e.depth, heads=e.heads,
        positions="absolute", layer_scale=0, pool="mean"))


def load_state(model, path):
    """Load tokenizer weights, ours or released, into `model`. Dead entries of the released files are passed over."""
    file = engine.read_file(path, remedy="make it with python vqkd.py, or give --tokenizer FILE")
    state, own = weights.state_dict(file, str(path)), model.quantize
    if "quantize.embedding.weight" not in state:
        raise engine.UserError(f"{path} is no VQ-KD tokenizer: make one with python vqkd.py")
    dead = ("teacher", "scaling_layer", "quantize.embedding.cluster_size", "quantize.embedding.embed_avg",
            "quantize.embedding.initted")
    state = {k: t for k, t in state.items() if not k.startswith(dead)}
    table = state["quantize.embedding.weight"]
    if len(table) != len(own.cluster_size):
        size = state.get("quantize.cluster_size", torch.ones(len(table)))
        table, size = resize_codebook(table, size, len(own.cluster_size))
        state |= {"quantize.embedding.weight": table, "quantize.cluster_size": size}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise engine.UserError(f"{path} does not fit this tokenizer: {' '.join(str(error).split())[:300]}") from error


def load_tokenizer(path, device="cpu"):
    """-> a frozen VQKD in evaluation mode, its sizes read off the file's own tensors, as released files need it."""
    file = engine.read_file(path, remedy="make it with python vqkd.py, or give --tokenizer FILE")
    state = weights.state_dict(file, str(path))
    try:
        width, _, _, patch = state["encoder.patch_embed.proj.weight"].shape
        side = round(math.sqrt(state["encoder.pos_embed"].shape[1] - 1))
        codes, code_dim = state["quantize.embedding.weight"].shape
        teacher_dims = [len(state["decode_task_layer.2.bias"])] + [
            len(t) for k, t in state.items() if re.fullmatch(r"more_decode_task_layers\.\d+\.2\.bias", k)]
    except (KeyError, ValueError, AttributeError) as error:
        raise engine.UserError(f"{path} is no VQ-KD tokenizer ({error}): make one with python vqkd.py") from error
    depth, decoder_depth = (len({k.split(".")[2] for k in state if k.startswith(f"{part}.blocks.")})
                            for part in ("encoder", "decoder"))
    heads = file.get("arch", {}).get("heads", width // 64)               # released files do not say: 64 a head
    model = VQKD(side * patch, patch, width, depth, heads, decoder_depth, codes, code_dim, teacher_dims)
    load_state(model, path)
    return model.to(device).eval().requires_grad_(False)


def encode_files(args, process):
    """--encode: token ids of one image or of every image under a folder -> OUT/tokens.npz (ids (n, gh, gw), names)."""
    model = load_tokenizer(args.init or args.out / "vqkd.pt", process.device)
    dataset = data.open_images(args.encode, data.eval_transform(model.encoder.image_size[0]))
    data.leave_out_bad(args, dataset)
    ids = [model.encode(data.to_float(images, process.device)).cpu() for images, _ in
           data.make_loader(dataset, data.eval_batches(len(dataset), 64, 0, 1), 0, process.device)]
    gh, gw = model.encoder.grid
    args.out.mkdir(parents=True, exist_ok=True)
    np.savez(args.out / "tokens.npz", ids=torch.cat(ids).view(-1, gh, gw).numpy(), names=np.array(dataset.names))
    print(f"{len(dataset)} images -> {args.out / 'tokens.npz'}: ids ({len(dataset)}, {gh}, {gw}), names")


def main(argv=None):
    args = parse_args(argv)
    if args.dry_run:
        # The teacher's width is all that is wanted of it: known for the two of the paper, free of cost for ours.
        known, grid = dict(clip=512, dino=768), (args.image_size // args.patch_size,) * 2
        dims = [known.get(name) or teachers.build_one(name, grid, args.patch_size, "cpu").dim
                for name in teachers.split_names(args.teacher)]
        with torch.device("meta"):                           # shapes without numbers
            model = build(args, dims)
        print("\n".join(f"{k:18} {v}" for k, v in sorted(weights.plain_args(args).items())))
        print(f"{count_parameters(model):,} trainable parameters; {model.encoder.num_patches} patches per image; "
              f"{args.codes} codes of {args.code_dim} numbers; {args.batch_size} images per update")
        return None
    process = engine.init_distributed(args.device)
    args.amp = engine.resolve_amp(args.amp, process.device)
    args.micro_batch = args.micro_batch or args.batch_size
    if args.encode:
        return encode_files(args, process)
    return train(args, process)


if __name__ == "__main__":
    engine.run(main)
