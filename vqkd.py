"""Stage 1, VQ-KD: a tokenizer that turns each patch into one of K codes (BEiT v2, Section 2.2).

    image --encoder--> h --nearest code--> v --decoder--> o   pulled towards   t = teacher(image)

The decoder must rebuild a semantic teacher's patch features (CLIP, DINO) from nothing but the
codes, so the codes come to mean what the teacher's features mean. Afterwards teacher and decoder
are dropped; encoder and codebook stay.

Read in this order: nearest_code, straight_through, vqkd_loss, ema_update, kmeans, VQKD, train.

    python vqkd.py                                           # tiny on built-in shapes, CPU
    torchrun --nproc_per_node=8 vqkd.py --model base --data /imagenet    # the paper's run
    python vqkd.py --encode IMAGE_OR_FOLDER                  # token ids, in runs/tiny/tokens.npz
"""
# Shapes:  B images, N = gh x gw patches per image, D code width, K codes, C teacher width
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from model import PRESETS, ViT, initialise
from support import data, teachers, transforms, weights
from support.features import cache_features
from support.images import open_images
from support.args import fill_in, number, run_parser, whole
from support.codebook import (
    CodebookWatch, codebook_usage, resize_codebook, restart_dead_codes)
from support.files import UserError
from support.optim import adamw, cosine_schedule, param_groups, set_lr
from support.process import join_processes, launch, seed_all
from support.run import Run, dry_run

MODELS = "tiny", "small", "base"
RECIPE = {  # base: the paper's (REFERENCE.md section 2), for both backbones; tiny, small: ours.
    # tiny starts without quantizer and with faster codes: see "cold start" in results/README.md.
    #                     tiny    small   base
    "teacher":            ("hog", "clip", "clip"),
    "codes":              (64,    2048,   8192),     # K
    "code_dim":           (16,    32,     32),       # D
    "encoder_depth":      (4,     12,     12),
    "decoder_depth":      (1,     1,      3),
    "decay":              (0.97,  0.99,   0.99),
    "beta":               (1.0,   1.0,    1.0),
    "lr":                 (4e-3,  5e-5,   5e-5),
    "min_lr":             (1e-5,  1e-5,   1e-5),
    "beta2":              (0.99,  0.99,   0.99),
    "weight_decay":       (1e-4,  1e-4,   1e-4),
    "batch_size":         (32,    512,    512),
    "micro_batch":        (32,    128,    64),
    "epochs":             (2,     100,    100),
    "warmup_epochs":      (0.5,   10,     10),
    "crop_scale":         (0.6,   0.08,   0.08),
    "continuous_steps":   (250,   0,      0),
    "restart_dead_codes": (20,    0,      0),
}


# --- method ---------------------------------------------------------------------------------------
def l2(x):
    """l2(x) of the equations: every vector divided by its length."""
    return F.normalize(x, dim=-1)


@torch.no_grad()
def nearest_code(h, codebook):
    """Eq. (1), the token of every vector.  h (..., D), codebook (K, D) -> z (...) long

        z_i = argmin_j || l2(h_i) - l2(v_j) ||

    On the unit sphere ||a - b||^2 = 2 - 2 a.b, so the nearest code has the largest cosine.
    """
    # Always float32: with bf16 about 1 id in 300 would change.
    with torch.autocast(h.device.type, enabled=False):
        cosine = l2(h.float()) @ l2(codebook.float()).T      # (..., K)
        return cosine.argmax(dim=-1)


def straight_through(h, v):
    """Forward sees the code v, backward sees the identity.  h, v (..., D) -> (..., D)

    argmax has no gradient: this line is the only road by which the decoder teaches the encoder.
    """
    return h + (v - h).detach()


def vqkd_loss(o, t, h, v, beta=1.0, teacher_dims=None):
    """Eq. (2), negated so that we minimise it.  -> loss, parts

        max  sum_i cos(o_i, t_i) - || sg[l2(h_i)] - l2(v_zi) ||^2 - || l2(h_i) - sg[l2(v_zi)] ||^2

    o, t (B, N, C); h = l2(h_i) and v = l2(v_zi) (B, N, D).
    Ours: several teachers side by side in C, {"clip": 512, "dino": 768}; mean of their cosines.
    """
    dims = teacher_dims or {"": o.shape[-1]}
    widths = list(dims.values())
    cosines = []
    for o_i, t_i in zip(o.float().split(widths, dim=-1), t.float().split(widths, dim=-1)):
        cosines.append(F.cosine_similarity(o_i, t_i, dim=-1).mean())     # cos(o_i, t_i)
    cosine = sum(cosines) / len(cosines)
    # Differs from Eq. (2): mse_loss is a mean over D where the equation sums over D.
    codebook = F.mse_loss(v, h.detach())     # moves v towards h; logged only, see ema_update
    commit = F.mse_loss(h, v.detach())       # keeps h near its code
    loss = 1 - cosine + beta * commit

    parts = dict(cosine=cosine, commit=commit, codebook=codebook)
    if len(cosines) > 1:
        parts |= {f"cosine_{name}": c for name, c in zip(dims, cosines)}
    return loss, {name: part.detach() for name, part in parts.items()}


def code_sums(h, z, codes):
    """Per code, the sum and the number of the vectors assigned to it.  -> (K, D), (K,)

    index_add, not a one-hot matrix, which for base would have 100,352 x 8192 entries a step.
    """
    h = h.detach().float().flatten(0, -2)
    z = z.flatten()
    sums = torch.zeros(codes, h.shape[-1], device=h.device).index_add_(0, z, h)
    return sums, torch.bincount(z, minlength=codes).float()


def ema_update(codebook, sums, counts, decay):
    """Each code that was used moves towards the mean direction of its vectors.  -> (K, D)

        v <- l2( decay * v + (1 - decay) * l2(mean of its l2(h)) )

    Takes the place of the codebook term of Eq. (2), as the authors train; both point the same way.
    The number of vectors plays no part. Codes unused in this step stay where they are.
    """
    moved = l2(decay * codebook + (1 - decay) * l2(sums))
    return torch.where((counts > 0)[:, None], moved, codebook)


def kmeans(x, centres, iterations=10):
    """Spherical k-means of x (n, D) from these centres (K, D).  -> centres, counts (K,)

    Assign each vector to its nearest centre, take l2 of the mean. An empty centre stays.
    """
    for _ in range(iterations):
        z = nearest_code(x, centres)
        sums, counts = code_sums(x, z, len(centres))
        centres = torch.where((counts > 0)[:, None], l2(sums), centres)
    return centres, counts


class Codebook(nn.Module):
    """K unit vectors. No parameters: k-means starts them, ema_update moves them."""

    def __init__(self, codes, code_dim):
        super().__init__()
        self.embedding = nn.Embedding(codes, code_dim)       # the released name of the table
        self.embedding.weight.requires_grad_(False).zero_()
        self.register_buffer("cluster_size", torch.zeros(codes))         # use of each code of late

    @torch.no_grad()
    def update(self, sums, counts, decay):
        """Once per step, after the look-up, with sums over all micro-batches and processes.

        Differs from the released code: a look-up changes no counter, so evaluating leaves no trace.
        """
        self.cluster_size.mul_(decay).add_(counts, alpha=1 - decay)
        self.embedding.weight.copy_(ema_update(self.embedding.weight, sums, counts, decay))

    def forward(self, h):
        """h = l2(h_i) (B, N, D) -> v = l2(v_zi) (B, N, D), z (B, N)"""
        z = nearest_code(h, self.embedding.weight)
        return l2(self.embedding(z)), z


def linear_tanh_linear(width, out):
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))


class VQKD(nn.Module):
    """Encoder, codebook, decoder. The teacher is not in here: it is never trained nor saved."""

    def __init__(self, image_size, patch_size, width, depth, heads, decoder_depth, codes, code_dim,
                 teacher_dims, mlp_ratio=4.0, decoder=None):
        """decoder: width, heads or mlp_ratio of the decoder, where they are not the encoder's."""
        super().__init__()
        # Recipe, not in the paper: absolute positions, no layer scale (those come with stage 2).
        sizes = dict(width=width, heads=heads, mlp_ratio=mlp_ratio,
                     positions="absolute", layer_scale=0, pool="mean")
        self.encoder = ViT(image_size, patch_size, depth=depth, **sizes)
        # The decoder is a ViT on the map of codes, each code one "pixel" of D channels.
        sizes |= decoder or {}
        self.decoder = ViT(self.encoder.grid, 1, depth=decoder_depth, in_channels=code_dim, **sizes)
        self.encode_task_layer = linear_tanh_linear(width, code_dim)
        # One head per teacher. The first has the released name; more than one is ours.
        first, *more = [linear_tanh_linear(self.decoder.width, dim) for dim in teacher_dims]
        self.decode_task_layer = first
        self.more_decode_task_layers = nn.ModuleList(more)
        self.quantize = Codebook(codes, code_dim)
        initialise(self.encode_task_layer)
        initialise(self.decode_task_layer)
        initialise(self.more_decode_task_layers)

    def arch(self):
        return self.encoder.arch() | dict(decoder_heads=self.decoder.heads)

    def project(self, images):
        """Images (B, 3, H, W) in [0, 1] -> h (B, N, D), not yet normalised."""
        tokens = self.encoder(images * 2 - 1)[:, 1:]         # pixels in [-1, 1]; [CLS] is dropped
        with torch.autocast(images.device.type, enabled=False):
            return self.encode_task_layer(tokens.float())    # always float32, as the look-up is

    def decode(self, v):
        """Codes (B, N, D) -> o (B, N, C), the decoder's guess of the teachers' features."""
        gh, gw = self.encoder.grid
        code_map = v.transpose(1, 2).unflatten(2, (gh, gw))  # (B, D, gh, gw)
        x = self.decoder(code_map)[:, 1:]
        heads = [self.decode_task_layer, *self.more_decode_task_layers]
        return torch.cat([head(x) for head in heads], dim=-1)

    def forward(self, images, quantize=True):
        """-> o (B, N, C), h (B, N, D), v (B, N, D), z (B, N).  Not quantized, h itself passes."""
        h = l2(self.project(images))
        if not quantize:
            return self.decode(h), h, h.detach(), None
        v, z = self.quantize(h)
        return self.decode(straight_through(h, v)), h, v, z

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, H, W) in [0, 1] -> token ids z (B, N). Changes nothing in the tokenizer."""
        return nearest_code(self.project(images), self.quantize.embedding.weight)


# --- training -------------------------------------------------------------------------------------
def train(args):
    run = Run("vqkd", args)
    teacher, train_set, val_set = open_teacher_and_images(args, run)
    teacher_dims = dict(zip(teacher.names, teacher.dims))

    seed_all(args.seed)
    model = build(args, teacher.dims).to(run.device)
    if args.init:
        load_state(model, args.init)
    groups = param_groups(model.named_parameters(), args.weight_decay)
    optimizer = adamw(groups, (0.9, args.beta2), run.device)
    health = CodebookWatch(args.codes, args.stop_on_collapse)
    network = run.start(train_set, model=model, optimizer=optimizer, health=health)
    quantize_from = 0 if args.init else args.continuous_steps
    if quantize_from >= run.total_steps:
        raise UserError(f"--continuous-steps {quantize_from} leaves none of {run.total_steps} "
                        f"steps to the codes")
    before = None
    if args.init and not run.resumed:
        before = evaluate(model, teacher, val_set, run)
        run.log_file(step=0, split="val", note="before", **before)
    peak_lr = args.lr * args.batch_size / 128                # recipe: grows with the batch

    for step in run.steps():
        lr = cosine_schedule(step, peak_lr, args.min_lr, run.total_steps, run.warmup_steps)
        set_lr(optimizer, lr)
        quantize = step >= quantize_from
        if step == quantize_from and not args.init:
            kmeans_start(model, train_set, args, run)

        # Gradients of Eq. (2). All micro-batches look up in one and the same codebook.
        sums = torch.zeros_like(model.quantize.embedding.weight)         # (K, D)
        counts = torch.zeros(args.codes, device=run.device)              # (K,)
        for batch, _ in run.micro_batches():
            with run.autocast():
                images, t = images_and_features(batch, teacher, run.device)
                o, h, v, z = network(images, quantize)
                loss, parts = vqkd_loss(o, t, h, v, args.beta, teacher_dims)
            run.backward(loss)
            if quantize:
                more_sums, more_counts = code_sums(h, z, args.codes)
                sums += more_sums
                counts += more_counts
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # The codes follow the vectors that chose them: looked up first, moved after.
        if quantize:
            model.quantize.update(run.sum(sums), run.sum(counts), args.decay)
            if restart_due(step, args, run.total_steps):
                seed_all(args.seed, step)
                restart_dead_codes(model.quantize, h, run)
            health.look(counts, run)

        if run.log_due:
            usage = codebook_usage(counts) if quantize else {}
            usage.pop("entropy", None)
            run.log(loss=loss, **parts, **usage)
        if run.evaluation_due and quantize:
            result = evaluate(model, teacher, val_set, run)
            run.log_evaluation(result)
    if before:
        run.print(f"codes used on {args.data}: {before['codes_used']} before, "
                  f"{result['codes_used']} after; perplexity {before['perplexity']:.1f} before, "
                  f"{result['perplexity']:.1f} after")
    return run.finish(result)


def restart_due(step, args, total_steps):
    """Ours: every so many steps, in the first 80 % of training."""
    every = args.restart_dead_codes
    return every > 0 and step % every == 0 and step < 0.8 * total_steps


@torch.no_grad()
def kmeans_start(model, dataset, args, run):
    """The first codes: k-means on the encoder's vectors of some training images, on rank 0 for all.

    Differs from the released code, which clusters each process's first batch apart and never makes
    them equal: at least 4K vectors (at most 65,536), drawn without replacement.
    """
    weight = model.quantize.embedding.weight
    codes = len(weight)
    if run.is_main:
        wanted = min(max(4 * codes, 4096), 65536)
        images_needed = min(math.ceil(wanted / model.encoder.num_patches), len(dataset))
        generator = torch.Generator().manual_seed(args.seed)
        order = torch.randperm(len(dataset), generator=generator).tolist()[:images_needed]
        h = vectors_of(model, dataset, order, run)           # (n, D)
        start = h[torch.randperm(len(h), generator=generator)[:codes].to(h.device)]
        if len(start) < codes:
            run.warn(f"only {len(h)} vectors for {codes} codes, the rest start at random: "
                     f"lower --codes")
            extra = torch.randn(codes - len(start), h.shape[1], generator=generator)
            start = torch.cat([start, l2(extra).to(h.device)])
        weight.copy_(kmeans(h, start)[0])
    run.broadcast(weight)
    # Every code begins as used once in a while: none counts as dead before it had a chance.
    model.quantize.cluster_size.fill_(1.0)


def vectors_of(model, dataset, order, run):
    """l2(h) of all patches of these images, as they look in epoch 0.  -> (n, D)"""
    h = []
    for first in range(0, len(order), 64):
        samples = [dataset[(0, i)][0] for i in order[first:first + 64]]
        batch = torch.utils.data.default_collate(samples)
        images = batch if isinstance(batch, torch.Tensor) else batch[0]
        with run.autocast():
            h.append(l2(model.project(data.to_float(images, run.device))).flatten(0, 1))
    return torch.cat(h)


@torch.no_grad()
def evaluate(model, teacher, dataset, run):
    """Cosine to the teacher, distance to the code and codebook use over the whole data set."""
    model.eval()
    dims = dict(zip(teacher.names, teacher.dims))
    names = ["images", "cosine", "commit", "distance"]
    if len(dims) > 1:
        names += [f"cosine_{name}" for name in dims]
    codes = len(model.quantize.cluster_size)
    totals = data.zeros_to_sum(len(names), run.device)
    counts = torch.zeros(codes, device=run.device)
    for batch, _ in run.eval_batches(dataset):
        with run.autocast():
            images, t = images_and_features(batch, teacher, run.device)
            o, h, v, z = model(images)
            _, parts = vqkd_loss(o, t, h, v, teacher_dims=dims)
        parts["images"] = torch.ones_like(parts["cosine"])
        parts["distance"] = (h - v).norm(dim=-1).mean()      # || h - v ||
        totals += torch.stack([parts[name] for name in names]) * len(images)
        counts += torch.bincount(z.flatten(), minlength=codes)
    model.train()

    n, *sums = run.sum(totals).tolist()
    means = {name: s / n for name, s in zip(names[1:], sums)}
    return means | codebook_usage(run.sum(counts))


def build(args, teacher_dims):
    size = PRESETS[args.model]
    return VQKD(args.image_size, args.patch_size, size["width"], args.encoder_depth, size["heads"],
                args.decoder_depth, args.codes, args.code_dim, teacher_dims)


# --- data -----------------------------------------------------------------------------------------
def open_teacher_and_images(args, run):
    """-> the frozen teacher, training images in random crops, held-out images."""
    whole_image = transforms.EvalTransform(args.image_size)
    crops = transforms.VQKDTransform(args.image_size, scale=(args.crop_scale, 1.0))
    train_set = data.open_split(args, "train", whole_image if args.cache_teacher else crops)
    val_set = data.open_split(args, "val", whole_image)
    data.leave_out_bad(args, run, train_set, val_set)
    side = args.image_size // args.patch_size
    teacher = teachers.build_teacher(args.teacher, (side, side), args.patch_size, run.device)
    if args.cache_teacher:                   # features are computed once, and read from then on
        how = dict(batch_size=args.micro_batch, workers=args.workers)
        folder = args.cache_teacher
        train_set = cache_features(teacher, train_set, folder, run, flip=True, **how)
        val_set = cache_features(teacher, val_set, folder, run, flip=False, **how)
    return teacher, train_set, val_set


def images_and_features(batch, teacher, device):
    """-> images (B, 3, H, W) in [0, 1], t (B, N, C) from the teacher or from its cache."""
    if isinstance(batch, torch.Tensor):
        images = data.to_float(batch, device)
        return images, teacher(images)
    images, t = batch
    return data.to_float(images, device), t.to(device, non_blocking=True).float()


# --- a tokenizer from a file ----------------------------------------------------------------------
def read_tokenizer(path):
    """-> the Checkpoint of a tokenizer, ours or released: its weights, and all its sizes."""
    checkpoint = weights.read(path, "make it with python vqkd.py, or give --tokenizer FILE")
    if checkpoint.kind != "vqkd":
        raise UserError(f"{path} is no VQ-KD tokenizer: make one with python vqkd.py")
    return checkpoint


def load_tokenizer(path, device="cpu"):
    """-> a frozen VQKD in evaluation mode."""
    model = weights.build(VQKD, read_tokenizer(path))
    return model.to(device).eval().requires_grad_(False)


def load_state(model, path):
    """Go on from the tokenizer in a file. If its number of codes is another, it is fitted."""
    checkpoint = read_tokenizer(path)
    heads = checkpoint.facts["heads"]        # other heads would fit, and mean something else
    if heads != model.encoder.heads:
        raise UserError(f"{path} has {heads} attention heads, the model of --model "
                        f"{model.encoder.heads}: give the --model it was made with")
    codes = len(model.quantize.cluster_size)
    table = checkpoint.weights["quantize.embedding.weight"]
    if len(table) != codes:
        used = checkpoint.weights.get("quantize.cluster_size", torch.ones(len(table)))
        table, used = resize_codebook(table, used, codes)
        fitted = {"quantize.embedding.weight": table, "quantize.cluster_size": used}
        checkpoint = checkpoint._replace(weights=checkpoint.weights | fitted)
    weights.check(model.state_dict(), checkpoint)
    model.load_state_dict(checkpoint.weights)


def encode_files(args):
    """--encode: token ids of one image, or of all under a folder -> OUT/tokens.npz (ids, names)."""
    process = join_processes(args.device)
    model = load_tokenizer(args.init or args.out / "vqkd.pt", process.device)
    dataset = open_images(args.encode, transforms.EvalTransform(model.encoder.image_size[0]))
    data.leave_out_bad(args, process, dataset)
    batches = data.eval_batches(len(dataset), 64)
    ids = []
    for images, _ in data.make_loader(dataset, batches, 0, process.device):
        ids.append(model.encode(data.to_float(images, process.device)).cpu())
    gh, gw = model.encoder.grid
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "tokens.npz"
    np.savez(path, ids=torch.cat(ids).view(-1, gh, gw).numpy(), names=np.array(dataset.names))
    print(f"{len(dataset)} images -> {path}: ids ({len(dataset)}, {gh}, {gw}), names")


# --- arguments ------------------------------------------------------------------------------------
def parse_args(argv=None):
    p = run_parser(__doc__)
    add = p.add_argument_group("VQ-KD").add_argument
    add("--teacher", help=f"whose features to distil: {teachers.NAMES}; base: clip, tiny: hog")
    add("--cache-teacher", type=Path, metavar="DIR", help="compute the teacher's features once, "
        "keep them in DIR, train on whole and mirrored images: a CLIP teacher fits a CPU")
    add("--codes", type=whole(2, 2**20), help="K, size of the codebook; base: 8192")
    add("--code-dim", type=whole(1, 4096), help="D, numbers per code; base: 32")
    add("--encoder-depth", type=whole(1, 100), help="blocks of the encoder; base: 12")
    add("--decoder-depth", type=whole(1, 100), help="blocks of the decoder; base: 3")
    add("--decay", type=number(0, 1), help="moving average that moves the codes; base: 0.99")
    add("--beta", type=number(0, 1e3), help="weight of the commitment term; base: 1")
    add("--continuous-steps", type=whole(0), help="first steps without quantizer; base: 0")
    add("--restart-dead-codes", type=whole(0), metavar="STEPS", help="so often, in the first 80 %% "
        "of training, move codes that nothing chose of late to current vectors; base: 0, never")
    add("--stop-on-collapse", action="store_true", help="end the run when the codebook collapses")
    add("--crop-scale", type=number(1e-3, 1), help="smallest share that a crop keeps; base: 0.08")
    add("--lr", type=number(0, 10), help="peak rate at batch 128, grows with the batch; base: 5e-5")
    add("--min-lr", type=number(0, 10), help="rate that the cosine approaches; base: 1e-5")
    add("--beta2", type=number(0, 0.9999), help="of AdamW; base: 0.99")
    add("--weight-decay", type=number(0, 10), help="base: 1e-4")
    add("--warmup-epochs", type=number(0, 10**6), help="epochs of linear warm-up; base: 10")
    add("--init", type=Path, help="go on from this tokenizer, ours or released, on your own --data")
    add("--encode", type=Path, metavar="IMAGE_OR_FOLDER", help="only write the token ids of images")
    args = p.parse_args(argv)
    if args.cache_teacher and args.crop_scale is not None:
        raise UserError("--cache-teacher trains on whole images: leave out --crop-scale")
    fill_in(args, MODELS, RECIPE)
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.encode:
        return encode_files(args)
    if args.dry_run:
        dims = teachers.widths(args.teacher, args.image_size // args.patch_size, args.patch_size)
        with torch.device("meta"):           # shapes without numbers
            model = build(args, dims)
        return dry_run(args, model, f"{model.encoder.num_patches} patches per image",
                       f"{args.codes} codes of {args.code_dim} numbers",
                       f"{args.batch_size} images per update")
    return train(args)


if __name__ == "__main__":
    launch(main)
