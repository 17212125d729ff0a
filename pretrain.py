"""Stage 2, masked image modelling with patch aggregation (BEiT v2, Section 2.3).

    image --frozen tokenizer--> z                        the code of each patch: the targets
    image --hide 40 % of the patches--> ViT --> logits                            Eq. (3)
                     [CLS] of layer L, patches of layer l --> shallow head --> logits_cls
                                                          Eq. (3) once more, from these

The shallow head gets its patches from layer l, where they know little of the rest of the image.
To find the codes of hidden patches, it needs [CLS] to tell it what the image shows. So [CLS] learns
to summarise the image. Guessing all codes alike gives a loss of ln K per head.

Read in this order: sample_block_mask, aggregate, BEiT, mim_loss, train.

    python pretrain.py                                       # tiny on built-in shapes, CPU
    torchrun --nproc_per_node=8 pretrain.py --model base --data /imagenet    # the paper's run
"""
# Shapes:  B images, N = gh x gw patches, T = 1 + N tokens, D width, K codes,
#          m hidden patches of one image, M = B m hidden patches of a batch
import functools
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import PRESETS, Block, ViT, imagenet_normalize, initialise, rescale_residual_branches
from support import data, transforms
from support.args import check_range, fill_in, flag, number, run_parser, whole
from support.codebook import require_grid, require_tokenizer
from support.files import UserError
from support.guessers import commonest_codes, guess_hidden
from support.optim import adamw, cosine_schedule, param_groups, set_lr
from support.positions import grid_of
from support.process import launch, seed_all
from support.run import Run, dry_run
from support.start import go_on_from
from vqkd import load_tokenizer


# --- method: which patches to hide ----------------------------------------------------------------
def sample_block_mask(gh, gw, count, min_block=16):
    """Hide exactly `count` of gh x gw patches, in rectangular blocks.  -> (gh, gw) bool

    A single hidden patch could be guessed from its neighbours; inside a block these are hidden.
    min_block: the smallest area of a block, in patches. Draws come from Python's `random`, which
    the data set seeds for each image.
    """
    mask = [[False] * gw for _ in range(gh)]
    remaining = count
    while remaining > 0:
        new = sample_block(mask, remaining, min_block)
        for y, x in new:
            mask[y][x] = True
        remaining -= len(new)
    return torch.tensor(mask)


def sample_block(mask, remaining, min_block):
    """The patches (y, x) that one more block hides, 1 to `remaining`.  mask: lists (gh, gw)"""
    gh, gw = len(mask), len(mask[0])
    for _ in range(10):                      # recipe, not in the paper: ten tries
        # At the end `remaining` may be less than min_block. The area then lies between them.
        area = random.uniform(min_block, remaining)
        # Recipe, not in the paper: height / width between 0.3 and 1 / 0.3. The logarithm is
        # uniform, so tall blocks are as frequent as flat ones.
        aspect = math.exp(random.uniform(math.log(0.3), -math.log(0.3)))
        h = round(math.sqrt(area * aspect))
        w = round(math.sqrt(area / aspect))
        if not (0 < h < gh and 0 < w < gw):                  # no block has the image's full side
            continue
        top = random.randint(0, gh - h)
        left = random.randint(0, gw - w)
        block = [(y, x) for y in range(top, top + h) for x in range(left, left + w)]
        new = [(y, x) for y, x in block if not mask[y][x]]
        if 0 < len(new) <= remaining:        # blocks may overlap; the total is never exceeded
            return new
    visible = [(y, x) for y in range(gh) for x in range(gw) if not mask[y][x]]
    return random.sample(visible, remaining)                 # single patches fill up the rest


def masked_views(image, views, grid, count, min_block):
    """What the loader makes of an image: views(image), and a mask (N,) drawn for it."""
    return views(image), sample_block_mask(*grid, count, min_block).flatten()


def hidden_patches(mask):
    """Which patches of each image are hidden.  mask (B, N) bool -> (B, m) long"""
    counts = mask.sum(dim=1)
    if (counts != counts[0]).any():
        raise ValueError(f"every image must hide equally many patches, not {counts.tolist()}")
    return mask.nonzero()[:, 1].view(len(mask), -1)


# --- method: the network --------------------------------------------------------------------------
def aggregate(last, early):
    """The input of the shallow head: [x_CLS of layer L, x_1 .. x_N of layer l].  -> (B, T, D)

    last, early (B, T, D): tokens of layers L and l. From layer L the head gets [CLS] alone.
    """
    return torch.cat([last[:, :1], early[:, 1:]], dim=1)


class BEiT(ViT):
    """The backbone, a mask token, a head over the K codes, and the shallow head (cls_pt_layers).

    early_layer: l of the paper, counted from 1. head_depth: blocks of the shallow head; 0 trains
    without patch aggregation. shared_head: backbone and shallow head use one final norm and one
    head over the codes, as in the paper. more: further arguments of ViT.
    """

    def __init__(self, image_size, patch_size, width, depth, heads, codes, *, early_layer=9,
                 head_depth=2, shared_head=True, positions="shared", layer_scale=0.1,
                 drop_path=0.0, init_std=0.02, **more):
        super().__init__(image_size, patch_size, width, depth, heads, positions=positions,
                         layer_scale=layer_scale, drop_path=drop_path, pool=None, **more)
        self.codes = codes
        self.early_layer = early_layer
        self.shared_head = shared_head or head_depth == 0
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.lm_head = nn.Linear(width, codes)
        # Recipe, not in the paper: the drop-path rates are those of layers l + 1, l + 2, ...
        rates = torch.linspace(0, drop_path, max(depth, early_layer + head_depth), device="cpu")
        self.cls_pt_layers = nn.ModuleList(
            Block(width, heads, self.mlp_ratio, layer_scale, rate)
            for rate in rates[early_layer:early_layer + head_depth].tolist())
        self.cls_pt_norm = self.cls_pt_lm_head = None
        if not self.shared_head:
            self.cls_pt_norm = nn.LayerNorm(width, eps=self.norm.eps)
            self.cls_pt_lm_head = nn.Linear(width, codes)
        # Differs from the released code, which initialises before it adds the shallow head, so
        # that the head's linear layers begin with torch's larger weights and random biases.
        initialise(self, init_std, cut=1, convolutions=True)
        rescale_residual_branches(self.blocks)
        rescale_residual_branches(self.cls_pt_layers, first_layer=early_layer + 1)

    def arch(self):
        return super().arch() | dict(codes=self.codes, early_layer=self.early_layer,
                                     head_depth=len(self.cls_pt_layers),
                                     shared_head=self.shared_head)

    def streams(self, x, mask, queries=None):
        """-> tokens of layer L, tokens of the shallow head (or None): (B, T, D) each, before norm.

        x (B, 3, H, W) normalised, mask (B, N) bool. queries (B, 1 + m): the numbers of the tokens
        that are read. The last blocks compute only these, (B, 1 + m, D) each.
        """
        bias = self.shared_bias()            # one position bias for all blocks and the head
        reads_all = self.early_layer == self.depth           # with l = L the head needs all patches
        early, last = self.features(x, [self.early_layer - 1, self.depth - 1], mask, bias,
                                    None if reads_all else queries)
        shallow = None
        if len(self.cls_pt_layers):
            shallow = aggregate(last, early)                 # (B, T, D)
            for block in self.cls_pt_layers[:-1]:
                shallow = self.run(block, shallow, bias)
            shallow = self.run(self.cls_pt_layers[-1], shallow, bias, queries)
        if reads_all and queries is not None:
            last = last.take_along_dim(queries[..., None], dim=1)
        return last, shallow

    def forward(self, x, mask, hidden=None):
        """-> logits, logits_cls (M, K) of the hidden patches; logits_cls is None without the head.

        x (B, 3, H, W) normalised, mask (B, N) bool. hidden (B, m): hidden_patches(mask), if known.
        The training loop computes it on the CPU. On a GPU, the loop would have to wait for m.
        """
        if hidden is None:
            hidden = hidden_patches(mask)
        # Only [CLS] (by aggregate) and hidden patches are read. The last blocks skip all others.
        queries = F.pad(1 + hidden, (1, 0))                  # (B, 1 + m); token 0 is [CLS]
        last, shallow = self.streams(x, mask, queries)
        logits = self.lm_head(self.norm(last[:, 1:].flatten(0, 1)))      # (M, K)
        if shallow is None:
            return logits, None
        norm = self.cls_pt_norm or self.norm
        head = self.cls_pt_lm_head or self.lm_head
        return logits, head(norm(shallow[:, 1:].flatten(0, 1)))


# --- method: the loss -----------------------------------------------------------------------------
def mim_loss(logits, logits_cls, z):
    """Eq. (3), the cross-entropy of the hidden patches' codes.  -> loss, (loss_mim, loss_cls)

        L_MIM = - sum over images, sum over hidden patches i of  log p(z_i | masked image)

    logits (M, K), logits_cls (M, K) or None, z (M,) the codes. p is the soft-max of the logits.
    loss_cls has no number in the paper: it is Eq. (3) once more, through the shallow head.
    """
    # Differs from Eq. (3), a sum: the mean over M patches, so a guess has ln K in any batch.
    loss_mim = F.cross_entropy(logits.float(), z)
    loss_cls = torch.zeros_like(loss_mim)
    if logits_cls is not None:
        loss_cls = F.cross_entropy(logits_cls.float(), z)
    return loss_mim + loss_cls, (loss_mim.detach(), loss_cls.detach())


# --- training -------------------------------------------------------------------------------------
def train(args):
    """The whole of stage 2; the network is then in OUT/pretrain.pt.  -> the last evaluation"""
    run = Run("pretrain", args)
    tokenizer = open_tokenizer(args, run.device)
    codes = len(tokenizer.quantize.cluster_size)             # K
    train_set, val_set = open_images(args, run, tokenizer)

    seed_all(args.seed)
    model = build(args, codes)
    if args.init and not run.resumed:
        run.print(go_on_from(args.init, model))
    model.to(run.device)
    groups = param_groups(model.named_parameters(), args.weight_decay)
    optimizer = adamw(groups, (0.9, args.beta2), run.device)
    # facts: for the log, the loss of a uniform guess, ln K. about: for later stages, in the file.
    network = run.start(train_set, model=model, optimizer=optimizer,
                        facts={"chance": math.log(codes)},
                        about={"epochs": args.epochs, "aggregation": args.head_depth > 0})
    commonest = commonest_codes(tokenizer, train_set, run)   # only to compare with: see evaluate
    encode = run.compiled(tokenizer.encode)

    for step in run.steps():
        lr = cosine_schedule(step, args.lr, args.min_lr, run.total_steps, run.warmup_steps)
        set_lr(optimizer, lr)
        for (views, mask), _ in run.micro_batches():
            images, tokenizer_images = data.two_views(views, run.device)         # (B, 3, H, W)
            hidden = hidden_patches(mask).to(run.device, non_blocking=True)      # (B, m)
            mask = mask.to(run.device, non_blocking=True)                        # (B, N)
            with run.autocast():
                # The tokenizer sees the whole image and gives each patch its code.
                z = encode(tokenizer_images)                                     # (B, N)
                z = z.gather(1, hidden).flatten()                                # (M,)
                # The network sees the other patches and has to find the codes of the hidden ones.
                logits, logits_cls = network(imagenet_normalize(images), mask, hidden)
                loss, (loss_mim, loss_cls) = mim_loss(logits, logits_cls, z)     # Eq. (3), twice
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
            result = evaluate(model, tokenizer, val_set, commonest, run)
            run.log_evaluation(result)
    return run.finish(result)


def build(args, codes):
    """The backbone that the flags describe, with heads over so many codes."""
    sizes = PRESETS[args.model] | dict(image_size=args.image_size, patch_size=args.patch_size)
    model = BEiT(**sizes, codes=codes, drop_path=args.drop_path, early_layer=args.early_layer,
                 head_depth=args.head_depth, shared_head=not args.separate_head)
    model.checkpoint_activations = args.checkpoint_activations
    return model


# --- data -----------------------------------------------------------------------------------------
def open_tokenizer(args, device):
    """The frozen tokenizer of --tokenizer. UserError if it is not there, or has other patches."""
    require_tokenizer(args)
    tokenizer = load_tokenizer(args.tokenizer, device)
    require_grid(tokenizer.encoder.grid, args)
    return tokenizer


def open_images(args, run, tokenizer):
    """-> training images in random crops, whole held-out images; each with a mask of its own."""
    size = args.image_size
    tokenizer_size = tokenizer.arch()["image_size"]
    scale = args.crop_scale, 1.0
    crops = transforms.MIMTransform(size, tokenizer_size, scale, args.color_jitter)
    still = transforms.MIMEvalTransform(size, tokenizer_size)
    masked = functools.partial(masked_views, grid=tokenizer.encoder.grid, count=args.mask_patches,
                               min_block=args.mask_min_block)
    train_set = data.open_split(args, "train", functools.partial(masked, views=crops))
    val_set = data.open_split(args, "val", functools.partial(masked, views=still))
    data.leave_out_bad(args, run, train_set, val_set)
    return train_set, val_set


# --- measuring ------------------------------------------------------------------------------------
def accuracy(logits, z):
    """Percentage of hidden patches whose code has the largest logit.  logits (M, K), z (M,)"""
    return 100 * (logits.argmax(dim=-1) == z).float().mean().item()


@torch.no_grad()
def evaluate(model, tokenizer, dataset, commonest, run):
    """Losses and accuracies (in percent) over all hidden patches of a data set.

    guess_position, guess_nearest: the accuracies of two guessers that see no pixels, by the code
    that is commonest at a position or of the nearest visible patch (support/guessers.py).
    """
    model.eval()
    totals = data.zeros_to_sum(7, run.device)
    for (views, mask), _ in run.eval_batches(dataset):
        images, tokenizer_images = data.two_views(views, run.device)
        mask = mask.to(run.device)
        with run.autocast():
            z = tokenizer.encode(tokenizer_images)
            logits, logits_cls = model(imagenet_normalize(images), mask)
        _, losses = mim_loss(logits, logits_cls, z[mask])
        if logits_cls is None:
            logits_cls = logits
        guesses = [logits.argmax(-1), logits_cls.argmax(-1),
                   *guess_hidden(z, mask, commonest, model.grid)]
        hidden = mask.sum()
        numbers = [hidden] + [loss * hidden for loss in losses]
        numbers += [100 * (guess == z[mask]).sum() for guess in guesses]
        totals += torch.stack(numbers).to(totals.dtype)
    model.train()

    hidden, *sums = run.sum(totals).tolist()
    names = "loss_mim loss_cls mask_acc mask_acc_cls guess_position guess_nearest".split()
    means = {name: total / hidden for name, total in zip(names, sums, strict=True)}
    result = dict(loss=means["loss_mim"] + means["loss_cls"]) | means
    if len(model.cls_pt_layers) == 0:
        del result["loss_cls"], result["mask_acc_cls"]
    return result


# --- arguments ------------------------------------------------------------------------------------
MODELS = "tiny", "small", "base", "large"
RECIPE = {  # base and large: the appendix's table of hyper-parameters; tiny and small: ours
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
LONG_RUN = {  # from 1600 epochs on
    "beta2":         (0.98,   0.98,    0.999,   0.999),
    "drop_path":     (0.0,    0.0,     0.1,     0.1),
}


def parse_args(argv=None):
    p = run_parser(__doc__)
    add = p.add_argument_group("pre-training").add_argument
    add("--tokenizer", type=Path, help="VQ-KD file, ours or released; default OUT/vqkd.pt")
    add("--init", type=Path, help="go on from these pre-trained weights, ours or released")
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
    add("--weight-decay", type=number(0, 10), help="of AdamW; base: 0.05")
    add("--clip-grad", type=number(0, 1e6), help="largest gradient norm, 0 for none; base: 3")
    add("--drop-path", type=number(0, 0.99), help="stochastic depth of the last block, growing "
        "linearly from 0; base: 0, from 1600 epochs on 0.1")
    add("--warmup-epochs", type=number(0, 10**6), help="epochs of linear warm-up; base: 10")
    add("--checkpoint-activations", action="store_true", help="less memory, a little more work")
    args = p.parse_args(argv)

    if args.no_aggregation or args.head_depth == 0:
        for name in ("early_layer", "head_depth", "separate_head"):
            if getattr(args, name):
                raise UserError(f"{flag(name)}: --no-aggregation (or --head-depth 0) trains "
                                f"without the shallow head; leave one of them out")
        args.head_depth = 0
    long_run = args.epochs is not None and args.epochs >= 1600
    fill_in(args, MODELS, RECIPE | LONG_RUN if long_run else RECIPE)
    fill_in_masks(args)
    if args.tokenizer is None:
        args.tokenizer = args.out / "vqkd.pt"
        if args.model == "large":            # the paper's one tokenizer is of base size
            args.tokenizer = Path("runs/base/vqkd.pt")
    check_range(args, "early_layer", 1, PRESETS[args.model]["depth"])
    return args


def fill_in_masks(args):
    """Hide 75 of 196 patches ("40 %" in the paper; 38 %), in blocks from 16 on, or such shares."""
    patches = math.prod(grid_of(args.image_size, args.patch_size))
    if args.mask_patches is None:
        args.mask_patches = patches * 75 // 196
    if args.mask_min_block is None:
        args.mask_min_block = max(1, min(patches * 16 // 196, args.mask_patches))
    check_range(args, "mask_patches", 1, patches - 1)
    check_range(args, "mask_min_block", 1, args.mask_patches)


def main(argv=None):
    args = parse_args(argv)
    if args.dry_run:
        with torch.device("meta"):           # shapes without numbers
            model = build(args, codes=64 if args.model == "tiny" else 8192)
        return dry_run(args, model, f"{args.mask_patches} of {model.num_patches} patches hidden")
    return train(args)


if __name__ == "__main__":
    launch(main)
