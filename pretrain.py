"""Stage 2, masked image modelling with patch aggregation: the pre-training of BEiT v2's backbone (paper, Section 2.3).

    image --frozen tokenizer--> z                              what each patch is called, the target
    image --hide 40 % of the patches--> ViT --last layer--> logits                  Eq. (3): name the hidden patches
                                          `--[CLS] of layer L, patches of l--> shallow head--> logits_cls   Eq. (4)

The shallow head gets patches that know little of the rest of the image, so it can only name the hidden ones if [CLS]
tells it what the image shows: that teaches [CLS] to summarise.  At the start each loss is ln K, that of a blind guess.

Read in this order: sample_block_mask, aggregate, BEiT, mim_loss, train.

    python pretrain.py                                                      # tiny on built-in shapes: CPU, minutes
    torchrun --nproc_per_node=8 pretrain.py --model base --data /imagenet   # the paper's run
"""
# Shapes used in this file:  B images, N = gh x gw patches, T = 1 + N tokens, D width, K codes, M hidden in a batch

import argparse
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
import engine
import weights
from model import (
    PRESETS, Block, ViT, count_parameters, imagenet_normalize, initialise, rescale_residual_branches, select)
from vqkd import load_tokenizer

PAPER = dict(            # REFERENCE.md section 3
    early_layer=9, head_depth=2, lr=1.5e-3, min_lr=1e-5, beta2=0.98, weight_decay=0.05, clip_grad=3.0, drop_path=0.0,
    batch_size=2048, micro_batch=128, epochs=300, warmup_epochs=10, color_jitter=0.4, crop_scale=0.2)
RECIPES = {              # tiny, small: ours
    "tiny": dict(PAPER, early_layer=4, lr=2e-3, batch_size=32, micro_batch=32, epochs=3, warmup_epochs=1,
                 color_jitter=0.0, crop_scale=1.0),
    "small": dict(PAPER, micro_batch=256),
    "base": PAPER,
    "large": dict(PAPER, early_layer=21, micro_batch=64),
}
LONG_RUN = dict(beta2=0.999, drop_path=0.1)      # base and large from 1600 epochs on (REFERENCE.md section 3)


# --- method -----------------------------------------------------------------------------------------------------------
def sample_block_mask(gh, gw, count, min_block=16, min_aspect=0.3):
    """Which patches to hide: exactly `count` of gh x gw, in rectangular blocks.  -> (gh, gw) bool

    A lone hidden patch could be guessed from its neighbours; a block cannot. Draws from `random`, which the data set
    seeds per (seed, epoch, image). Recipe, not in the paper: 10 tries per block, then single cells fill the rest.
    """
    mask = [[False] * gw for _ in range(gh)]
    remaining = count
    while remaining > 0:
        for _ in range(10):
            area = random.uniform(min_block, remaining)
            aspect = math.exp(random.uniform(math.log(min_aspect), math.log(1 / min_aspect)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < h < gh and 0 < w < gw):
                continue
            top, left = random.randint(0, gh - h), random.randint(0, gw - w)
            new = [(y, x) for y in range(top, top + h) for x in range(left, left + w) if not mask[y][x]]
            if 0 < len(new) <= remaining:                    # blocks may overlap, but never hide too much
                break
        else:
            free = [(y, x) for y in range(gh) for x in range(gw) if not mask[y][x]]
            new = random.sample(free, remaining)
        for y, x in new:
            mask[y][x] = True
        remaining -= len(new)
    return torch.tensor(mask)


def hidden_patches(mask):
    """Which patches of each image are hidden: the same number of every image.  mask (B, N) bool -> (B, M / B) long"""
    if (mask.sum(dim=1) != mask[0].sum()).any():
        raise ValueError(f"every image must hide equally many patches, these hide {mask.sum(dim=1).tolist()}")
    return mask.nonzero()[:, 1].view(len(mask), -1)


def aggregate(last, early):
    """The input of the shallow head, Eq. (4): [x_CLS^(L), x_1^(l), ..., x_N^(l)].  2 x (B, T, D) -> (B, T, D)"""
    # Early patches know little of the rest of the image. To name hidden tokens the head has to consult [CLS], which
    # is the only road from the last layer into this head: so [CLS] learns to summarise.
    return torch.cat([last[:, :1], early[:, 1:]], dim=1)     # of `last`, [CLS] alone


class BEiT(ViT):
    """The backbone with a mask token, a head over the K codes and, for patch aggregation, a few blocks on the side."""

    def __init__(self, image_size, patch_size, width, depth, heads, codes, *, layer_scale=0.1, drop_path=0.0,
                 early_layer=9, head_depth=2, shared_head=True, init_std=0.02, position_std=0.0):
        super().__init__(image_size, patch_size, width, depth, heads, positions="shared", layer_scale=layer_scale,
                         drop_path=drop_path, pool=None, position_std=position_std)
        self.early_layer = early_layer                       # l of the paper counts from 1
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.lm_head = nn.Linear(width, codes)
        # Recipe, not in the paper: the head's blocks take the stochastic-depth rates that follow layer l's.
        rates = torch.linspace(0, drop_path, max(depth, early_layer + head_depth), device="cpu").tolist()
        self.cls_pt_layers = nn.ModuleList(
            Block(width, heads, self.mlp_ratio, layer_scale, rates[early_layer + i]) for i in range(head_depth))
        self.cls_pt_norm = self.cls_pt_lm_head = None        # shared with the main stream, unless
        if head_depth and not shared_head:
            self.cls_pt_norm, self.cls_pt_lm_head = nn.LayerNorm(width, eps=self.norm.eps), nn.Linear(width, codes)
        # Differs from the released code, which initialises before it adds the aggregation blocks and so leaves those
        # at the framework's default.
        initialise(self, init_std, cut=1, convolutions=True)
        rescale_residual_branches(self.blocks)
        rescale_residual_branches(self.cls_pt_layers, first_layer=early_layer + 1)

    def streams(self, x, mask, only=None):
        """-> the last layer's tokens and the shallow head's (None without it), both (B, T, D), before the norm; with
        only (B, m), these tokens alone, [CLS] being the first of them."""
        shared = self.shared_bias()                          # one position bias for all blocks and the head
        wanted = None if self.early_layer == self.depth else only        # l = L: the head reads all of the last layer
        early, last = self.features(x, [self.early_layer - 1, self.depth - 1], mask, shared, wanted)
        s = aggregate(last, early) if len(self.cls_pt_layers) else None
        for block in self.cls_pt_layers:
            s = self.run(block, s, shared, only if block is self.cls_pt_layers[-1] else None)
        return last if wanted is only else select(last, only), s

    def forward(self, x, mask, hidden=None):
        """Normalised images (B, 3, H, W), mask (B, N) bool -> logits, logits_cls (M, K), for hidden patches only.
        hidden (B, M / B): hidden_patches(mask), if it is known beforehand; a GPU would have to wait to learn M."""
        hidden = hidden_patches(mask) if hidden is None else hidden
        # Nothing reads the other patches of either stream's last block: so it computes [CLS] and hidden ones only.
        only = torch.cat([torch.zeros_like(hidden[:, :1]), 1 + hidden], dim=1)               # (B, 1 + M / B)
        last, s = self.streams(x, mask, only)
        logits = self.lm_head(self.norm(last[:, 1:].flatten(0, 1)))
        if s is None:
            return logits, None
        norm, head = (self.norm, self.lm_head) if self.cls_pt_norm is None else (self.cls_pt_norm, self.cls_pt_lm_head)
        return logits, head(norm(s[:, 1:].flatten(0, 1)))


def mim_loss(logits, logits_cls, z):
    """Eqs. (3) + (4): cross-entropy of the hidden patches' codes z (M,), averaged, summed over the two heads.
    -> loss, (loss_mim, loss_cls).  A blind guess costs ln K per head."""
    loss_mim = F.cross_entropy(logits.float(), z)            # - mean over M of log p(z_i | x^M)
    loss_cls = F.cross_entropy(logits_cls.float(), z) if logits_cls is not None else torch.zeros_like(loss_mim)
    return loss_mim + loss_cls, (loss_mim.detach(), loss_cls.detach())


def accuracy(logits, z):
    """Share of hidden patches named right, in percent.  logits (M, K), z (M,)"""
    return 100 * (logits.argmax(dim=-1) == z).float().mean().item()


def nearest_visible_code(z, mask, grid):
    """A guesser that knows continuity alone: each patch's nearest visible patch lends its code. (B, N) -> (B, N)"""
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    cells = torch.stack([y.flatten(), x.flatten()], dim=1).float().to(z.device)
    distance = torch.cdist(cells, cells)[None] + mask[:, None, :] * 1e6      # (B, N, N): hidden patches lend nothing
    return z.gather(1, distance.argmin(dim=-1))


class MaskedViews:
    """What the loader's workers do to an image: crop it (data.mim_transform) and draw its mask."""

    def __init__(self, views, grid, count, min_block):
        self.views, self.grid, self.count, self.min_block = views, grid, count, min_block

    def __call__(self, image):
        return self.views(image), sample_block_mask(*self.grid, self.count, self.min_block).flatten()


class StillViews:
    """The same two views without chance, for evaluation."""

    def __init__(self, size, tokenizer):
        sizes = dict.fromkeys([size, tokenizer.encoder.image_size[0]])       # one view where both take the same size
        self.transforms = [data.eval_transform(s) for s in sizes]

    def __call__(self, image):
        views = tuple(t(image) for t in self.transforms)
        return views if len(views) > 1 else views[0]


# --- arguments --------------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    engine.add_run_args(p)
    p.add_argument("--checkpoint-activations", action="store_true",
                   help="keep for the backward pass what linear layers gave, compute the rest again: less memory")
    p.add_argument("--tokenizer", type=Path,
                   help="VQ-KD file, ours or released; default OUT/vqkd.pt (large: runs/base/vqkd.pt)")
    g = p.add_argument_group("patch aggregation")
    g.add_argument("--early-layer", type=int, help="l, the block whose patches the shallow head gets; base: 9 of 12")
    g.add_argument("--head-depth", type=int, help="blocks of the shallow head; base: 2")
    g.add_argument("--no-aggregation", action="store_true", help="train Eq. (3) alone, without the shallow head")
    g.add_argument("--separate-head", action="store_true", help="a norm and code head of its own for the shallow head")
    g = p.add_argument_group("masking and crops")
    g.add_argument("--mask-patches", type=int, help="patches to hide, exactly; base: 75 of 196")
    g.add_argument("--mask-min-block", type=int, help="smallest block, in patches; base: 16")
    g.add_argument("--crop-scale", type=float, help="smallest share of the image that a random crop keeps; base: 0.2")
    g.add_argument("--color-jitter", type=float, help="strength of brightness, contrast, saturation; base: 0.4")
    g = p.add_argument_group("optimiser")
    g.add_argument("--lr", type=float, help="peak rate, not scaled by batch size; base: 1.5e-3")
    g.add_argument("--min-lr", type=float, help="rate that the cosine approaches; base: 1e-5")
    g.add_argument("--beta2", type=float, help="of AdamW; base: 0.98 (0.999 from 1600 epochs on)")
    g.add_argument("--weight-decay", type=float, help="base: 0.05")
    g.add_argument("--clip-grad", type=float, help="largest gradient norm, 0 for none; base: 3")
    g.add_argument("--drop-path", type=float, help="stochastic depth, last block; base: 0 (0.1 from 1600 epochs on)")
    g.add_argument("--warmup-epochs", type=float, help="epochs of linear warm-up; base: 10")
    args = p.parse_args(argv)
    if args.no_aggregation or args.head_depth == 0:
        given = dict(early_layer=args.early_layer, head_depth=args.head_depth, separate_head=args.separate_head)
        if flags := [f"--{name.replace('_', '-')}" for name, value in given.items() if value]:
            raise engine.UserError(f"{' and '.join(flags)}: --no-aggregation (or --head-depth 0) trains without the "
                                   f"shallow head that this is about; leave one of them out")
    if args.model in ("base", "large") and (args.epochs or 0) >= 1600:
        for name, value in LONG_RUN.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    args = engine.with_recipe(args, RECIPES)
    preset = PRESETS[args.model]
    args.image_size, args.patch_size = args.image_size or preset["image_size"], args.patch_size or preset["patch_size"]
    engine.check_sizes(args.image_size, args.patch_size)
    if args.image_size % args.patch_size:
        raise engine.UserError(f"--image-size {args.image_size} is not a multiple of --patch-size {args.patch_size}")
    patches = (args.image_size // args.patch_size) ** 2
    args.mask_patches = patches * 75 // 196 if args.mask_patches is None else args.mask_patches
    if args.mask_min_block is None:
        args.mask_min_block = max(1, min(patches * 16 // 196, args.mask_patches))
    if args.no_aggregation:
        args.head_depth = 0
    if args.tokenizer is None:
        args.tokenizer = Path("runs/base/vqkd.pt") if args.model == "large" else args.out / "vqkd.pt"
    engine.check_ranges(args, [
        ("early_layer", 1, preset["depth"]), ("head_depth", 0, 100), ("mask_patches", 1, patches - 1), ("lr", 0, 10),
        ("mask_min_block", 1, args.mask_patches), ("crop_scale", 1e-3, 1), ("color_jitter", 0, 1), ("min_lr", 0, 10),
        ("beta2", 0, 0.9999), ("weight_decay", 0, 10), ("clip_grad", 0, 1e6), ("drop_path", 0, 0.99),
        ("warmup_epochs", 0, 10**6)])
    return args


# --- training ---------------------------------------------------------------------------------------------------------
def views_to_device(views, device):
    """-> (backbone view, tokenizer view) in [0, 1]: one and the same tensor where both networks take the same size."""
    if isinstance(views, torch.Tensor):
        images = data.to_float(views, device)
        return images, images
    return data.to_float(views[0], device), data.to_float(views[1], device)


def commonest_codes(tokenizer, dataset, args, process, most=1024):
    """The commonest code of every grid position over `most` training images, evenly spread: (N,)."""
    counts = torch.zeros(tokenizer.encoder.num_patches, len(tokenizer.quantize.cluster_size), device=process.device)
    n, most = len(dataset), min(most, len(dataset))
    batches = [[i * n // most for i in b] for b in data.eval_batches(most, 256, process.rank, process.world_size)]
    for (views, _), _ in data.make_loader(dataset, batches, args.workers, process.device):
        with engine.autocast(process.device, args.amp):
            z = tokenizer.encode(views_to_device(views, process.device)[1])
        counts += F.one_hot(z, counts.shape[1]).sum(dim=0)
    return engine.all_reduce_sum(counts).argmax(dim=1)


@torch.no_grad()
def evaluate(model, tokenizer, dataset, commonest, args, process):
    """Losses, both heads' accuracies and those of the two trivial guessers, in percent, over all hidden patches."""
    model.eval()
    totals = data.zeros_to_sum(7, process.device)
    batches = data.eval_batches(len(dataset), args.micro_batch, process.rank, process.world_size)
    for (views, mask), _ in data.make_loader(dataset, batches, args.workers, process.device):
        images, tokenizer_images = views_to_device(views, process.device)
        mask = mask.to(process.device)
        with engine.autocast(process.device, args.amp):
            z = tokenizer.encode(tokenizer_images)
            logits, logits_cls = model(imagenet_normalize(images), mask)
        _, (loss_mim, loss_cls) = mim_loss(logits, logits_cls, z[mask])
        hits = [(guess == z[mask]).sum() for guess in (
            logits.argmax(-1), logits.argmax(-1) if logits_cls is None else logits_cls.argmax(-1),
            commonest.expand_as(z)[mask], nearest_visible_code(z, mask, model.grid)[mask])]
        m = mask.sum()
        totals += torch.stack([loss_mim * m, loss_cls * m, *hits, m]).to(totals.dtype)
    model.train()
    *sums, n = engine.all_reduce_sum(totals).tolist()
    loss_mim, loss_cls = sums[0] / n, sums[1] / n
    acc, acc_cls, common, nearest = (100 * s / n for s in sums[2:])
    result = dict(loss=loss_mim + loss_cls, loss_mim=loss_mim, mask_acc=acc)
    if args.head_depth:
        result |= dict(loss_cls=loss_cls, mask_acc_cls=acc_cls)
    return result | dict(guess_position=common, guess_nearest=nearest)


def train(args, process):
    resumed = engine.start_or_resume("pretrain", args, process)
    if not args.tokenizer.is_file():
        size = "base" if args.model == "large" else args.model           # the paper's one tokenizer serves both
        raise engine.UserError(f"there is no tokenizer {args.tokenizer}: make it with python vqkd.py --model {size}, "
                               f"or give --tokenizer FILE, ours or a released one")
    tokenizer = load_tokenizer(args.tokenizer, process.device)
    grid = (args.image_size // args.patch_size,) * 2
    if tokenizer.encoder.grid != grid:
        # Each network has its own patch size; what must agree is the grid, patch for patch.
        raise engine.UserError(
            f"the tokenizer {args.tokenizer} has {tokenizer.encoder.grid} patches, the backbone {grid}: train one with "
            f"python vqkd.py --image-size {args.image_size} --patch-size {args.patch_size}")
    views = data.mim_transform(args.image_size, tokenizer.encoder.image_size[0], scale=(args.crop_scale, 1.0),
                               color_jitter=args.color_jitter)
    masks = (grid, args.mask_patches, args.mask_min_block)
    options = dict(data_dir=args.data_dir, limit=args.limit, seed=args.seed, labelled=False)
    train_set = data.open_data(args.data, "train", MaskedViews(views, *masks), download=args.download, **options)
    # Held-out images: no random crop, but a mask, the same one every time.
    val_set = data.open_data(args.data, "val", MaskedViews(StillViews(args.image_size, tokenizer), *masks), **options)
    data.leave_out_bad(args, train_set, val_set)
    steps, warmup, per_epoch = data.resolve_steps(args, len(train_set))
    micro, accumulation = data.split_batch(args.batch_size, args.micro_batch, process.world_size)
    codes = len(tokenizer.quantize.cluster_size)

    engine.seed_all(args.seed)
    model = build(args, codes).to(process.device)
    model.checkpoint_activations = args.checkpoint_activations
    groups = engine.param_groups(model.named_parameters(), args.weight_decay)
    optimizer = engine.adamw(groups, (0.9, args.beta2), process.device)
    start = 0
    if resumed:
        model.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizer"])
        start = resumed["step"]
    network = torch.compile(model) if args.compile else model
    ddp = engine.distribute(network, process)
    log = engine.Log(args.out / "pretrain.jsonl", args, process, start, images=len(train_set), steps=steps,
                     chance=math.log(codes))
    if process.rank == 0:
        print(f"MIM: {count_parameters(model) / 1e6:.2f} M parameters, {len(train_set)} images, {steps} steps of "
              f"{args.batch_size} = {process.world_size} processes x {accumulation} x {micro}; {args.mask_patches} of "
              f"{model.num_patches} patches hidden; a blind guess costs ln {codes} = {math.log(codes):.2f} per head")
    batches = iter(data.make_loader(train_set, data.train_batches(
        len(train_set), args.batch_size, steps, start, process.rank, process.world_size, accumulation, args.seed),
        args.workers, process.device))
    watch = engine.Watch(args, process, log, lambda step: data.names_of(train_set, args.batch_size, step, args.seed))
    clock, clock_step, commonest = time.time(), start, None
    for step in engine.progress(start, steps, process, "pretrain"):
        # 1. Schedules and all randomness are functions of the step, so resuming needs the step and no generator state.
        engine.set_lr(optimizer, engine.cosine_schedule(step, args.lr, args.min_lr, steps, warmup))
        for k in range(accumulation):
            (views, mask), _ = next(batches)
            images, tokenizer_images = views_to_device(views, process.device)        # (B, 3, H, W) in [0, 1]
            hidden = hidden_patches(mask).to(process.device, non_blocking=True)      # (B, M / B), found on the host
            mask = mask.to(process.device, non_blocking=True)                        # (B, N) bool
            engine.seed_all(args.seed, step, process.rank, k)                        # for stochastic depth
            with engine.no_sync(ddp, last=k == accumulation - 1):
                with engine.autocast(process.device, args.amp):
                    # 2. What the frozen tokenizer calls each patch. It sees the whole image; the model will not.
                    z = tokenizer.encode(tokenizer_images)                           # (B, N)
                    # 3. Name the hidden patches: from the last layer, Eq. (3), and through the [CLS] head, Eq. (4).
                    logits, logits_cls = ddp(imagenet_normalize(images), mask, hidden)       # (M, K) each
                    z = select(z, hidden).flatten(0, 1)                              # (M,)
                    loss, (loss_mim, loss_cls) = mim_loss(logits, logits_cls, z)
                (loss / accumulation).backward()
            watch.note(loss, step)

        # 4. One update, then one log line now and then and an evaluation after every epoch.
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last, save = step == steps - 1, (step + 1) % args.save_every == 0
        stop = watch.look(step, now=save or last or step % args.log_every == 0)
        if step % args.log_every == 0 or last:
            rate = (step + 1 - clock_step) * args.batch_size / (time.time() - clock)
            clock, clock_step = time.time(), step + 1
            facts = dict(loss=loss.item(), loss_mim=loss_mim.item(), mask_acc=accuracy(logits, z))
            if logits_cls is not None:
                facts |= dict(loss_cls=loss_cls.item(), mask_acc_cls=accuracy(logits_cls, z))
            log(step=step, epoch=step / per_epoch, **facts, grad_norm=grad_norm.item(),
                lr=optimizer.param_groups[0]["lr"], images_per_s=rate)
        if (step + 1) % per_epoch == 0 or last:
            begun = time.time()
            if commonest is None:                            # the tokenizer is frozen: it stays what it is
                commonest = commonest_codes(tokenizer, train_set, args, process)
            result = evaluate(model, tokenizer, val_set, commonest, args, process)
            clock += time.time() - begun                     # images_per_s is about training
            log(step=step, epoch=(step + 1) / per_epoch, split="val", **result)
            if process.rank == 0:
                print(f"step {step + 1}/{steps}: " + ", ".join(f"{k} {v:.2f}" for k, v in result.items()), flush=True)
        if not last and (save or stop):
            if process.rank == 0:
                engine.save_resume("pretrain", args, contents(model, args) | dict(
                    optimizer=optimizer.state_dict(), step=step + 1))
            if stop:
                raise SystemExit(128 + stop)

    log(summary=1, step=steps, **result)
    if process.rank == 0:
        engine.finish("pretrain", args, contents(model, args) | dict(step=steps, result=result))
    return result


# --- files ------------------------------------------------------------------------------------------------------------
def build(args, codes):
    preset = PRESETS[args.model] | dict(image_size=args.image_size, patch_size=args.patch_size)
    return BEiT(**preset, codes=codes, drop_path=args.drop_path, early_layer=args.early_layer,
                head_depth=args.head_depth, shared_head=not args.separate_head)


def contents(model, args):
    return engine.describe_run("pretrain", args) | dict(
        model=model.state_dict(), epochs=args.epochs, aggregation=args.head_depth > 0, arch=dict(
            image_size=args.image_size, patch_size=args.patch_size, width=model.width, depth=model.depth,
            heads=model.heads, positions="shared", layer_scale=model.layer_scale, pool=None))


def main(argv=None):
    args = parse_args(argv)
    if args.dry_run:
        with torch.device("meta"):                           # shapes without numbers
            model = build(args, codes=64 if args.model == "tiny" else 8192)
        print("\n".join(f"{k:18} {v}" for k, v in sorted(weights.plain_args(args).items())))
        print(f"{count_parameters(model):,} trainable parameters; {model.num_patches} patches, {args.mask_patches} "
              f"hidden; {args.batch_size} images per update")
        return None
    process = engine.init_distributed(args.device)
    args.amp = engine.resolve_amp(args.amp, process.device)
    args.micro_batch = args.micro_batch or args.batch_size
    return train(args, process)


if __name__ == "__main__":
    engine.run(main)
