"""Stage 2, masked image modelling with patch aggregation (BEiT v2, Section 2.3).

    image --frozen tokenizer--> z                       what each patch is called: the target
    image --hide 40 % of the patches--> ViT --> logits                             Eq. (3)
                     [CLS] of layer L, patches of layer l --> shallow head --> logits_cls
                                                        the same loss from these: Eq. (4)

The shallow head gets patches that know little of the rest of the image. It can name the hidden
ones only if [CLS] tells it what the image shows: that teaches [CLS] to summarise.
At the start each loss is ln K, that of a blind guess.

Read in this order: sample_block_mask, aggregate, BEiT, mim_loss, train.

    python pretrain.py                                          # tiny on built-in shapes, CPU
    torchrun --nproc_per_node=8 pretrain.py --model base --data /imagenet    # the paper's run
"""
# Shapes:  B images, N = gh x gw patches, T = 1 + N tokens, D width, K codes,
#          M hidden patches in a batch, m = M / B hidden patches of one image
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import (
    PRESETS, Block, ViT, imagenet_normalize, initialise, rescale_residual_branches, select)
from support import data, transforms
from support.args import check_range, fill_in, flag, number, run_parser, whole
from support.files import UserError
from support.optim import adamw, cosine_schedule, param_groups, set_lr
from support.process import launch, seed_all
from support.run import Run, dry_run
from vqkd import load_tokenizer

MODELS = "tiny", "small", "base", "large"
RECIPE = {  # base and large: the paper's (REFERENCE.md section 3); tiny and small: ours
    #                tiny     small    base     large
    "early_layer":   (4,      9,       9,       21),
    "head_depth":    (2,      2,       2,       2),
    "lr":            (2e-3,   1.5e-3,  1.5e-3,  1.5e-3),
    "min_lr":        (1e-5,   1e-5,    1e-5,    1e-5),
    "beta2":         (0.98,   0.98,    0.98,    0.98),
    "weight_decay":  (0.05,   0.05,    0.05,    0.05),
    "clip_grad":     (3.0,    3.0,     3.0,     3.0),
    "drop_path":     (0.0,    0.0,     0.0,     0.0),
    "batch_size":    (32,     2048,    2048,    2048),
    "micro_batch":   (32,     256,     128,     64),
    "epochs":        (3,      300,     300,     300),
    "warmup_epochs": (1,      10,      10,      10),
    "color_jitter":  (0.0,    0.4,     0.4,     0.4),
    "crop_scale":    (1.0,    0.2,     0.2,     0.2),
}
LONG_RUN = {"beta2": 0.999, "drop_path": 0.1}    # base and large from 1600 epochs on


# --- method ---------------------------------------------------------------------------------------
def sample_block_mask(gh, gw, count, min_block=16, min_aspect=0.3):
    """Which patches to hide: exactly `count` of gh x gw, in rectangular blocks.  -> (gh, gw) bool

    A lone hidden patch could be guessed from its neighbours; a block cannot.
    Draws from `random`, which the data set seeds per (seed, epoch, image).
    """
    mask = [[False] * gw for _ in range(gh)]
    remaining = count
    while remaining > 0:
        new = sample_block(mask, remaining, min_block, min_aspect)
        for y, x in new:
            mask[y][x] = True
        remaining -= len(new)
    return torch.tensor(mask)


def sample_block(mask, remaining, min_block, min_aspect):
    """The cells that one more block hides: at least one new cell, never more than `remaining`."""
    gh = len(mask)
    gw = len(mask[0])
    log_aspect = math.log(min_aspect)
    for _ in range(10):                      # recipe, not in the paper: 10 tries per block
        area = random.uniform(min_block, remaining)
        aspect = math.exp(random.uniform(log_aspect, -log_aspect))
        h = round(math.sqrt(area * aspect))
        w = round(math.sqrt(area / aspect))
        if not (0 < h < gh and 0 < w < gw):
            continue
        top = random.randint(0, gh - h)
        left = random.randint(0, gw - w)
        cells = [(y, x) for y in range(top, top + h) for x in range(left, left + w)]
        new = [(y, x) for y, x in cells if not mask[y][x]]
        if 0 < len(new) <= remaining:        # blocks may overlap, but never hide too much
            return new
    free = [(y, x) for y in range(gh) for x in range(gw) if not mask[y][x]]
    return random.sample(free, remaining)    # single cells fill the rest


def hidden_patches(mask):
    """Which patches of each image are hidden.  mask (B, N) bool -> (B, m) long"""
    counts = mask.sum(dim=1)
    if (counts != counts[0]).any():
        raise ValueError(f"every image must hide equally many patches, not {counts.tolist()}")
    return mask.nonzero()[:, 1].view(len(mask), -1)


def aggregate(last, early):
    """Input of the shallow head: [x_CLS^(L), x_1^(l), ..., x_N^(l)].  2 x (B, T, D) -> (B, T, D)

    [CLS] is the only road from the last layer into this head, so [CLS] learns to summarise.
    """
    return torch.cat([last[:, :1], early[:, 1:]], dim=1)


class BEiT(ViT):
    """The backbone with a mask token, a head over the K codes, and a shallow head on the side."""

    def __init__(self, image_size, patch_size, width, depth, heads, codes, *, early_layer=9,
                 head_depth=2, shared_head=True, layer_scale=0.1, drop_path=0.0, init_std=0.02,
                 positions="shared", **more):
        """more: further arguments of ViT (mlp_ratio, in_channels, position_std)."""
        super().__init__(image_size, patch_size, width, depth, heads, positions=positions,
                         layer_scale=layer_scale, drop_path=drop_path, pool=None, **more)
        self.early_layer = early_layer       # l of the paper, which counts from 1
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.lm_head = nn.Linear(width, codes)
        # Recipe, not in the paper: the head's blocks go on with layer l's stochastic depth.
        rates = torch.linspace(0, drop_path, max(depth, early_layer + head_depth), device="cpu")
        self.cls_pt_layers = nn.ModuleList(
            Block(width, heads, self.mlp_ratio, layer_scale, rate)
            for rate in rates[early_layer:early_layer + head_depth].tolist())
        self.cls_pt_norm = None              # None: shared with the main stream, as in the paper
        self.cls_pt_lm_head = None
        if head_depth and not shared_head:
            self.cls_pt_norm = nn.LayerNorm(width, eps=self.norm.eps)
            self.cls_pt_lm_head = nn.Linear(width, codes)
        # Differs from the released code, which initialises before it adds the aggregation
        # blocks and so leaves those at the framework's default.
        initialise(self, init_std, cut=1, convolutions=True)
        rescale_residual_branches(self.blocks)
        rescale_residual_branches(self.cls_pt_layers, first_layer=early_layer + 1)

    def arch(self):
        return super().arch() | dict(early_layer=self.early_layer)

    def streams(self, x, mask, queries=None):
        """-> tokens of the last layer, tokens of the shallow head (or None), both before the norm.

        queries (B, 1 + m): only these tokens are wanted of each stream's last block; saves time.
        """
        bias = self.shared_bias()            # one position bias for all blocks and the head
        # With l = L the head reads all tokens of the last layer, not only the queries.
        reads_all = self.early_layer == self.depth
        layers = [self.early_layer - 1, self.depth - 1]
        early, last = self.features(x, layers, mask, bias, None if reads_all else queries)
        side = None
        if len(self.cls_pt_layers):
            side = aggregate(last, early)
            for block in self.cls_pt_layers[:-1]:
                side = self.run(block, side, bias)
            side = self.run(self.cls_pt_layers[-1], side, bias, queries)
        if reads_all and queries is not None:
            last = select(last, queries)
        return last, side

    def forward(self, x, mask, hidden=None):
        """Images (B, 3, H, W), mask (B, N) bool -> logits, logits_cls (M, K) of the hidden patches.

        hidden (B, m): hidden_patches(mask), if known; a GPU would have to wait to learn m.
        """
        if hidden is None:
            hidden = hidden_patches(mask)
        cls = torch.zeros_like(hidden[:, :1])
        queries = torch.cat([cls, 1 + hidden], dim=1)        # [CLS] and the hidden patches
        last, side = self.streams(x, mask, queries)
        logits = self.lm_head(self.norm(last[:, 1:].flatten(0, 1)))
        if side is None:
            return logits, None
        norm = self.cls_pt_norm or self.norm
        head = self.cls_pt_lm_head or self.lm_head
        return logits, head(norm(side[:, 1:].flatten(0, 1)))


def mim_loss(logits, logits_cls, z):
    """Eqs. (3) + (4): cross-entropy of the hidden patches' codes z (M,), summed over both heads.

    -> loss, (loss_mim, loss_cls).  A blind guess costs ln K per head.
    """
    loss_mim = F.cross_entropy(logits.float(), z)            # - mean over M of log p(z_i | x^M)
    loss_cls = torch.zeros_like(loss_mim)
    if logits_cls is not None:
        loss_cls = F.cross_entropy(logits_cls.float(), z)
    return loss_mim + loss_cls, (loss_mim.detach(), loss_cls.detach())


# --- measuring ------------------------------------------------------------------------------------
def accuracy(logits, z):
    """Share of hidden patches named right, in percent.  logits (M, K), z (M,)"""
    return 100 * (logits.argmax(dim=-1) == z).float().mean().item()


def nearest_visible_code(z, mask, grid):
    """A guesser that knows continuity alone: the nearest visible patch lends its code. (B, N)"""
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    cells = torch.stack([y.flatten(), x.flatten()], dim=1).float().to(z.device)
    distance = torch.cdist(cells, cells) + mask[:, None, :] * 1e6    # hidden patches lend nothing
    return z.gather(1, distance.argmin(dim=-1))


@torch.no_grad()
def commonest_codes(tokenizer, dataset, run, most=1024):
    """The commonest code of each grid position, over evenly spread training images.  -> (N,)"""
    codes = len(tokenizer.quantize.cluster_size)
    counts = torch.zeros(tokenizer.encoder.num_patches, codes, device=run.device)
    n = len(dataset)
    most = min(most, n)
    spread = torch.utils.data.Subset(dataset, [i * n // most for i in range(most)])
    for (views, _), _ in run.eval_batches(spread, batch_size=256):
        with run.autocast():
            z = tokenizer.encode(views_to_device(views, run.device)[1])
        counts += F.one_hot(z, codes).sum(dim=0)
    return run.sum(counts).argmax(dim=1)


@torch.no_grad()
def evaluate(model, tokenizer, dataset, commonest, run):
    """Losses, accuracies of both heads and of two trivial guessers, over all hidden patches."""
    model.eval()
    totals = data.zeros_to_sum(7, run.device)
    for (views, mask), _ in run.eval_batches(dataset):
        images, tokenizer_images = views_to_device(views, run.device)
        mask = mask.to(run.device)
        with run.autocast():
            z = tokenizer.encode(tokenizer_images)
            logits, logits_cls = model(imagenet_normalize(images), mask)
        _, (loss_mim, loss_cls) = mim_loss(logits, logits_cls, z[mask])
        guess_cls = logits if logits_cls is None else logits_cls
        guesses = [logits.argmax(-1), guess_cls.argmax(-1), commonest.expand_as(z)[mask],
                   nearest_visible_code(z, mask, model.grid)[mask]]
        hits = [(guess == z[mask]).sum() for guess in guesses]
        hidden = mask.sum()
        numbers = [loss_mim * hidden, loss_cls * hidden, *hits, hidden]
        totals += torch.stack(numbers).to(totals.dtype)
    model.train()

    *sums, hidden = run.sum(totals).tolist()
    loss_mim = sums[0] / hidden
    loss_cls = sums[1] / hidden
    acc, acc_cls, position, nearest = [100 * hit / hidden for hit in sums[2:]]
    result = dict(loss=loss_mim + loss_cls, loss_mim=loss_mim, mask_acc=acc)
    if len(model.cls_pt_layers):
        result |= dict(loss_cls=loss_cls, mask_acc_cls=acc_cls)
    return result | dict(guess_position=position, guess_nearest=nearest)


# --- data -----------------------------------------------------------------------------------------
class MaskedViews:
    """What the loader's workers do to an image: crop it and draw its mask."""

    def __init__(self, views, grid, count, min_block):
        self.views = views
        self.grid = grid
        self.count = count
        self.min_block = min_block

    def __call__(self, image):
        views = self.views(image)
        mask = sample_block_mask(*self.grid, self.count, self.min_block)
        return views, mask.flatten()


class StillViews:
    """The same two views without chance, for evaluation."""

    def __init__(self, size, tokenizer_size):
        sizes = dict.fromkeys([size, tokenizer_size])        # one view where both are equal
        self.transforms = [transforms.EvalTransform(s) for s in sizes]

    def __call__(self, image):
        views = [transform(image) for transform in self.transforms]
        return tuple(views) if len(views) > 1 else views[0]


def open_images(args, run, tokenizer):
    """-> training images in random crops, held-out images; each with a mask."""
    size = args.image_size
    tokenizer_size = tokenizer.encoder.image_size[0]
    masks = tokenizer.encoder.grid, args.mask_patches, args.mask_min_block
    crops = transforms.MIMTransform(size, tokenizer_size, (args.crop_scale, 1.0), args.color_jitter)
    train_set = data.open_split(args, "train", MaskedViews(crops, *masks))
    val_set = data.open_split(args, "val", MaskedViews(StillViews(size, tokenizer_size), *masks))
    data.leave_out_bad(args, run, train_set, val_set)
    return train_set, val_set


def views_to_device(views, device):
    """-> backbone view, tokenizer view in [0, 1]: the same tensor where both have one size."""
    if isinstance(views, torch.Tensor):
        images = data.to_float(views, device)
        return images, images
    return data.to_float(views[0], device), data.to_float(views[1], device)


def open_tokenizer(args, device):
    """The frozen tokenizer of --tokenizer. Its grid of patches has to be the backbone's."""
    if not args.tokenizer.is_file():
        size = "base" if args.model == "large" else args.model       # the paper has one for both
        raise UserError(f"there is no tokenizer {args.tokenizer}: make it with python vqkd.py "
                        f"--model {size}, or give --tokenizer FILE, ours or a released one")
    tokenizer = load_tokenizer(args.tokenizer, device)
    side = args.image_size // args.patch_size
    if tokenizer.encoder.grid != (side, side):
        raise UserError(
            f"the tokenizer {args.tokenizer} has {tokenizer.encoder.grid} patches, the backbone "
            f"{(side, side)}: train one with python vqkd.py --image-size {args.image_size} "
            f"--patch-size {args.patch_size}")
    return tokenizer


# --- training -------------------------------------------------------------------------------------
def train(args):
    run = Run("pretrain", args)
    tokenizer = open_tokenizer(args, run.device)
    codes = len(tokenizer.quantize.cluster_size)             # K
    train_set, val_set = open_images(args, run, tokenizer)
    commonest = None

    seed_all(args.seed)
    model = build(args, codes).to(run.device)
    groups = param_groups(model.named_parameters(), args.weight_decay)
    optimizer = adamw(groups, (0.9, args.beta2), run.device)
    network = run.start(train_set, model=model, optimizer=optimizer,
                        facts={"chance": math.log(codes)},
                        about={"epochs": args.epochs, "aggregation": args.head_depth > 0})

    for step in run.steps():
        lr = cosine_schedule(step, args.lr, args.min_lr, run.total_steps, run.warmup_steps)
        set_lr(optimizer, lr)
        for (views, mask), _ in run.micro_batches():
            images, tokenizer_images = views_to_device(views, run.device)        # (B, 3, H, W)
            hidden = hidden_patches(mask).to(run.device, non_blocking=True)      # (B, m)
            mask = mask.to(run.device, non_blocking=True)                        # (B, N)
            with run.autocast():
                # The tokenizer names each patch. It sees the whole image; the model does not.
                z = tokenizer.encode(tokenizer_images)                           # (B, N)
                z = select(z, hidden).flatten(0, 1)                              # (M,)
                # Name the hidden patches: from the last layer, and through the [CLS] head.
                logits, logits_cls = network(imagenet_normalize(images), mask, hidden)
                loss, (loss_mim, loss_cls) = mim_loss(logits, logits_cls, z)     # Eqs. (3), (4)
            run.backward(loss)

        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if run.log_due:
            facts = dict(loss=loss, loss_mim=loss_mim, mask_acc=accuracy(logits, z))
            if logits_cls is not None:
                facts |= dict(loss_cls=loss_cls, mask_acc_cls=accuracy(logits_cls, z))
            run.log(**facts, grad_norm=grad_norm)
        if run.evaluation_due:
            if commonest is None:                            # the tokenizer is frozen: count once
                commonest = commonest_codes(tokenizer, train_set, run)
            result = evaluate(model, tokenizer, val_set, commonest, run)
            run.log_evaluation(result)
    return run.finish(result)


def build(args, codes):
    sizes = PRESETS[args.model] | dict(image_size=args.image_size, patch_size=args.patch_size)
    model = BEiT(**sizes, codes=codes, drop_path=args.drop_path, early_layer=args.early_layer,
                 head_depth=args.head_depth, shared_head=not args.separate_head)
    model.checkpoint_activations = args.checkpoint_activations
    return model


# --- arguments ------------------------------------------------------------------------------------
def parse_args(argv=None):
    p = run_parser(__doc__)
    add = p.add_argument_group("pre-training").add_argument
    add("--tokenizer", type=Path, help="VQ-KD file, ours or released; default OUT/vqkd.pt")
    add("--early-layer", type=whole(1, 100), help="l: the shallow head gets its patches; base: 9")
    add("--head-depth", type=whole(0, 100), help="blocks of the shallow head; base: 2")
    add("--no-aggregation", action="store_true", help="train Eq. (3) alone, no shallow head")
    add("--separate-head", action="store_true", help="a norm and code head of its own")
    add("--mask-patches", type=whole(1), help="patches to hide, exactly; base: 75 of 196")
    add("--mask-min-block", type=whole(1), help="smallest block, in patches; base: 16")
    add("--crop-scale", type=number(1e-3, 1), help="smallest share that a crop keeps; base: 0.2")
    add("--color-jitter", type=number(0, 1), help="brightness, contrast, saturation; base: 0.4")
    add("--lr", type=number(0, 10), help="peak rate, not scaled by batch size; base: 1.5e-3")
    add("--min-lr", type=number(0, 10), help="rate that the cosine approaches; base: 1e-5")
    add("--beta2", type=number(0, 0.9999), help="of AdamW; base: 0.98, from 1600 epochs on 0.999")
    add("--weight-decay", type=number(0, 10), help="base: 0.05")
    add("--clip-grad", type=number(0, 1e6), help="largest gradient norm, 0 for none; base: 3")
    add("--drop-path", type=number(0, 0.99), help="base: 0, from 1600 epochs on 0.1")
    add("--warmup-epochs", type=number(0, 10**6), help="epochs of linear warm-up; base: 10")
    add("--checkpoint-activations", action="store_true", help="less memory, a little more work")
    args = p.parse_args(argv)

    if args.no_aggregation or args.head_depth == 0:
        about_the_head = "early_layer", "head_depth", "separate_head"
        if given := [flag(name) for name in about_the_head if getattr(args, name)]:
            raise UserError(f"{' and '.join(given)}: --no-aggregation (or --head-depth 0) trains "
                            f"without the shallow head that this is about; leave one of them out")
        args.head_depth = 0
    recipe = RECIPE
    if args.model in ("base", "large") and (args.epochs or 0) >= 1600:
        recipe = RECIPE | {name: [value] * len(MODELS) for name, value in LONG_RUN.items()}
    fill_in(args, MODELS, recipe)

    patches = (args.image_size // args.patch_size) ** 2      # N; the paper hides 75 of 196
    if args.mask_patches is None:
        args.mask_patches = patches * 75 // 196
    if args.mask_min_block is None:
        args.mask_min_block = max(1, min(patches * 16 // 196, args.mask_patches))
    if args.tokenizer is None:
        args.tokenizer = args.out / "vqkd.pt"
        if args.model == "large":            # the paper's one tokenizer is of base size
            args.tokenizer = Path("runs/base/vqkd.pt")
    check_range(args, "mask_patches", 1, patches - 1)
    check_range(args, "mask_min_block", 1, args.mask_patches)
    check_range(args, "early_layer", 1, PRESETS[args.model]["depth"])
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.dry_run:
        with torch.device("meta"):           # shapes without numbers
            model = build(args, codes=64 if args.model == "tiny" else 8192)
        return dry_run(args, model, f"{args.mask_patches} of {model.num_patches} patches hidden",
                       f"{args.batch_size} images per update")
    return train(args)


if __name__ == "__main__":
    launch(main)
