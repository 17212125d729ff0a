"""Stage 1, VQ-KD: a tokenizer that turns each patch into one of K codes (BEiT v2, Section 2.2).

    image --encoder--> h --nearest code--> v --decoder--> o   pulled towards   t = teacher(image)

The decoder has to predict a teacher's features (CLIP, DINO) of every patch, and it sees nothing but
the codes. So a code comes to stand for what the teacher's features mean. After stage 1 teacher and
decoder are dropped. Encoder and codebook stay: stage 2 predicts the codes of hidden patches.

Read in this order: nearest_code, straight_through, vqkd_loss, ema_update, kmeans, VQKD, train.

    python vqkd.py                                           # tiny on built-in shapes, CPU
    torchrun --nproc_per_node=8 vqkd.py --model base --data /imagenet    # the paper's run
"""
# Shapes:  B images, N = gh x gw patches per image, K codes, D numbers per code,
#          C numbers of the teacher per patch, n vectors in k-means
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import PRESETS, ViT, initialise
from support import data, teachers, weights
from support.args import fill_in, number, run_parser, whole
from support.codebook import CodebookHealth, codebook_usage, continue_from, read_tokenizer
from support.features import open_teacher_and_images
from support.files import UserError
from support.optim import adamw, cosine_schedule, param_groups, set_lr
from support.positions import grid_of
from support.process import launch, seed_all
from support.run import Run, dry_run


# --- method: look-up and loss ---------------------------------------------------------------------
def l2(x):
    """l2(x) of the equations: every vector of x (..., D) divided by its length."""
    return F.normalize(x, dim=-1)


@torch.no_grad()
def nearest_code(h, codebook):
    """Eq. (1), the token of every vector.  h (..., D), codebook (K, D) -> z (...) in [0, K)

        z_i = argmin_j || l2(h_i) - l2(v_j) ||

    On the unit sphere ||a - b||^2 = 2 - 2 a.b, so the nearest code has the largest cosine.
    """
    # Differs from the released code, whose products are float16 under autocast. Here they are
    # float32. Of random vectors, 1 in 400 would get another id with float16, 1 in 36 with bfloat16.
    with torch.autocast(h.device.type, enabled=False):
        v = l2(codebook.float())                             # (K, D)
        # 4096 vectors at a time: the cosines of all vectors with all codes may fill gigabytes.
        parts = l2(h.float()).reshape(-1, h.shape[-1]).split(4096)
        z = [(part @ v.T).argmax(dim=-1) for part in parts]              # (4096,) each
        return torch.cat(z).view(h.shape[:-1])


def straight_through(h, v):
    """The value is v, the gradient goes to h as if the value were h.  h, v (..., D) -> (..., D)

    argmax has no gradient. Only through this line does the decoder teach the encoder.
    """
    return h + (v - h).detach()


def vqkd_loss(o, t, h, v, beta=1.0, widths=None):
    """Eq. (2), negated so that we minimise it.  -> loss, its parts by name

        max  sum_i cos(o_i, t_i) - || sg[l2(h_i)] - l2(v_zi) ||^2 - || l2(h_i) - sg[l2(v_zi)] ||^2

    o, t (B, N, C); h = l2(h_i) and v = l2(v_zi) (B, N, D). beta: weight of the last term.
    widths: ours, {name: width} of several teachers whose features lie side by side in C.
    """
    # Differs from Eq. (2), as the released code does: means over images, patches and D, not sums.
    o, t = o.float(), t.float()
    cosine = F.cosine_similarity(o, t, dim=-1).mean()        # cos(o_i, t_i)
    cosines = teachers.each_cosine(o, t, widths)             # {} if there is one teacher
    if cosines:
        cosine = sum(cosines.values()) / len(cosines)
    # Differs from Eq. (2) in some printings, which lack the squares. The released code has them.
    codebook = F.mse_loss(v, h.detach())                     # || sg[h] - v ||^2 / D
    commit = F.mse_loss(h, v.detach())                       # || h - sg[v] ||^2 / D
    # Differs from Eq. (2): the codebook term is only logged, as ema_update moves the codes.
    loss = 1 - cosine + beta * commit

    parts = dict(cosine=cosine, commit=commit, codebook=codebook) | cosines
    return loss, {name: part.detach() for name, part in parts.items()}


# --- method: how the codes move -------------------------------------------------------------------
def code_sums(h, z, codes):
    """Per code, the sum and the number of the vectors that chose it.  -> (K, D), (K,)

    h (B, N, D), z (B, N). No one-hot matrix: base would need 100,352 x 8192 entries per step.
    """
    h = h.detach().float().flatten(0, -2)                    # (B N, D)
    z = z.flatten()                                          # (B N,)
    sums = torch.zeros(codes, h.shape[-1], device=h.device).index_add_(0, z, h)
    # Not bincount: it would make the CPU wait for the GPU.
    counts = torch.zeros(codes, device=h.device).index_add_(0, z, torch.ones_like(h[:, 0]))
    return sums, counts


def ema_update(codebook, sums, counts, decay):
    """Each code that was used moves towards its vectors.  codebook, sums (K, D) -> (K, D)

        v <- l2( decay * v + (1 - decay) * l2(mean of its l2(h)) )           mean or sum: same l2

    The moving average of Section 2.2 replaces the codebook term of Eq. (2), which would pull v the
    same way. Recipe, not in the paper: counts are no weights, and a code that no vector chose
    stays where it is.
    """
    moved = l2(decay * codebook + (1 - decay) * l2(sums))
    return torch.where((counts > 0)[:, None], moved, codebook)


def kmeans(x, centres, iterations=10):
    """Spherical k-means of x (n, D) from these centres (K, D).  -> centres (K, D), counts (K,)

    Each round assigns every vector to its nearest centre. The l2 of their mean is the new centre.
    A centre without vectors stays. Recipe, not in the paper: ten rounds.
    """
    for _ in range(iterations):
        z = nearest_code(x, centres)
        sums, counts = code_sums(x, z, len(centres))
        centres = torch.where((counts > 0)[:, None], l2(sums), centres)
    return centres, counts


@torch.no_grad()
def kmeans_start(model, dataset, args, run):
    """The first codes: k-means of at least 4K of the encoder's vectors (at most 65,536).

    Recipe, not in the paper. Random codes would lie where no vectors are, and never be chosen.
    Differs from the released code, where each process clusters its first batch and the codes of
    the processes begin unequal: here rank 0 clusters random images, and all receive its codes.
    """
    weight = model.quantize.embedding.weight                 # (K, D)
    codes = len(weight)                                      # K
    if run.is_main:
        generator = torch.Generator().manual_seed(args.seed)
        wanted = min(max(4 * codes, 4096), 65536)
        h = some_vectors(model, dataset, wanted, generator, run)         # (n, D)
        start = h[torch.randperm(len(h), generator=generator)[:codes].to(h.device)]
        if len(start) < codes:
            run.warn(f"only {len(h)} vectors for {codes} codes, the rest start at random: "
                     f"lower --codes")
            more = torch.randn(codes - len(start), h.shape[1], generator=generator)
            start = torch.cat([start, l2(more).to(h.device)])
        weight.copy_(kmeans(h, start)[0])
    run.broadcast(weight)
    model.quantize.cluster_size.fill_(1.0)                   # no code counts as unused yet


def some_vectors(model, dataset, wanted, generator, run):
    """l2(h) of all patches of random images, at least `wanted` if there are so many.  -> (n, D)"""
    images_needed = math.ceil(wanted / model.encoder.num_patches)
    chosen = torch.randperm(len(dataset), generator=generator)[:images_needed].tolist()
    h = []
    for images in data.some_images(dataset, chosen, run.device):
        with run.autocast():
            h.append(l2(model.project(images)).flatten(0, 1))
    return torch.cat(h)


# --- method: the network --------------------------------------------------------------------------
class Codebook(nn.Module):
    """K unit vectors. No gradient reaches them: k-means starts them, ema_update moves them."""

    def __init__(self, codes, code_dim):
        super().__init__()
        self.embedding = nn.Embedding(codes, code_dim)       # (K, D), under its released name
        self.embedding.weight.requires_grad_(False).zero_()
        self.register_buffer("cluster_size", torch.zeros(codes))         # (K,) recent vectors

    @torch.no_grad()
    def update(self, sums, counts, decay):
        """Once per step, after the look-up, with sums over all micro-batches and processes.

        Differs from the released code, which zeroes cluster_size before every epoch and counts
        in evaluation, too: here only training counts, and results count for themselves.
        """
        self.cluster_size.mul_(decay).add_(counts, alpha=1 - decay)
        self.embedding.weight.copy_(ema_update(self.embedding.weight, sums, counts, decay))

    def forward(self, h):
        """h = l2(h_i) (B, N, D) -> v = l2(v_zi) (B, N, D), z (B, N)"""
        z = nearest_code(h, self.embedding.weight)
        return l2(self.embedding(z)), z


def linear_tanh_linear(width, out):
    """The last layers of encoder (width -> D) and decoder (width -> C)."""
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))


class VQKD(nn.Module):
    """Encoder, codebook, decoder. The teacher is not in here: it is never trained nor saved."""

    def __init__(self, image_size, patch_size, width, depth, heads, decoder_depth, codes, code_dim,
                 teacher_dims, mlp_ratio=4.0, decoder=None):
        """decoder: width, heads or mlp_ratio of the decoder, where they are not the encoder's."""
        super().__init__()
        # Recipe, not in the paper: absolute positions, no layer scale (those come with stage 2).
        # pool="mean" pools nothing here. It only gives the last norm its released name, fc_norm.
        sizes = dict(width=width, heads=heads, mlp_ratio=mlp_ratio,
                     positions="absolute", layer_scale=0, pool="mean")
        self.encoder = ViT(image_size, patch_size, depth=depth, **sizes)
        # The decoder is a ViT on the map of codes, each code one "pixel" of D channels.
        sizes |= decoder or {}
        self.decoder = ViT(self.encoder.grid, 1, depth=decoder_depth, in_channels=code_dim, **sizes)
        # decode's map has its D channels innermost in memory. DDP warns if these weights do not.
        self.decoder.patch_embed.to(memory_format=torch.channels_last)
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
        """The sizes that a file of weights states beside them."""
        return self.encoder.arch() | dict(decoder_heads=self.decoder.heads)

    def project(self, images):
        """Images (B, 3, H, W) in [0, 1] -> h (B, N, D), not yet normalised."""
        tokens = self.encoder(images * 2 - 1)[:, 1:]         # pixels in [-1, 1]; [CLS] is dropped
        with torch.autocast(images.device.type, enabled=False):
            return self.encode_task_layer(tokens.float())    # always float32, as the look-up is

    def decode(self, v):
        """Codes v (B, N, D) -> o (B, N, C), the decoder's guess of the teacher's features."""
        gh, gw = self.encoder.grid
        code_map = v.transpose(1, 2).unflatten(2, (gh, gw))  # (B, D, gh, gw)
        x = self.decoder(code_map)[:, 1:]                    # (B, N, width)
        heads = [self.decode_task_layer, *self.more_decode_task_layers]
        return torch.cat([head(x) for head in heads], dim=-1)

    def forward(self, images, quantize=True):
        """Images (B, 3, H, W) in [0, 1] -> o (B, N, C), l2(h) and v (B, N, D), z (B, N)

        quantize=False is ours: the decoder gets l2(h) itself, v is that, and z is None.
        """
        h = l2(self.project(images))
        if not quantize:
            return self.decode(h), h, h.detach(), None
        v, z = self.quantize(h)
        return self.decode(straight_through(h, v)), h, v, z

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, H, W) in [0, 1] -> tokens z (B, N). Changes nothing in the tokenizer."""
        return nearest_code(self.project(images), self.quantize.embedding.weight)


def load_tokenizer(path, device="cpu"):
    """-> the frozen VQKD of a file, ours or released. UserError if the file is no tokenizer."""
    model = weights.build(VQKD, read_tokenizer(path))
    return model.to(device).eval().requires_grad_(False)


# --- training -------------------------------------------------------------------------------------
def train(args):
    """The whole of stage 1.  -> the result of the last evaluation; the tokenizer is in OUT"""
    run = Run("vqkd", args)
    teacher, train_set, val_set = open_teacher_and_images(args, run)
    quantize_from = first_quantized_step(args, run.plan(train_set))
    model = first_model(args, teacher.dims).to(run.device)
    groups = param_groups(model.named_parameters(), args.weight_decay)
    optimizer = adamw(groups, (0.9, args.beta2), run.device)
    health = CodebookHealth(args)            # ours: dead codes, a collapse, what --init brought
    network = run.start(train_set, model=model, optimizer=optimizer, health=health)
    if args.init and not run.resumed:
        health.begin(evaluate(model, teacher, val_set, run), run)
    peak_lr = args.lr * args.batch_size / 128                # recipe: it grows with the batch

    for step in run.steps():
        lr = cosine_schedule(step, peak_lr, args.min_lr, run.total_steps, run.warmup_steps)
        set_lr(optimizer, lr)
        quantize = step >= quantize_from
        if step == quantize_from and not args.init:
            kmeans_start(model, train_set, args, run)        # the codes begin among the l2(h)

        # Gradients of Eq. (2). All micro-batches of a step use the same codebook.
        sums = torch.zeros_like(model.quantize.embedding.weight)         # (K, D)
        counts = torch.zeros(args.codes, device=run.device)              # (K,)
        for batch, _ in run.micro_batches():
            with run.autocast():
                images, t = images_and_features(batch, teacher, run.device)      # t (B, N, C)
                o, h, v, z = network(images, quantize)       # (B, N, C), (B, N, D) twice, (B, N)
                loss, parts = vqkd_loss(o, t, h, v, args.beta, teacher.widths)
            run.backward(loss)
            if quantize:
                more_sums, more_counts = code_sums(h, z, args.codes)
                sums += more_sums
                counts += more_counts
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # Then the codes move towards the vectors that chose them, in all processes.
        if quantize:
            model.quantize.update(run.sum(sums), run.sum(counts), args.decay)
            health.look_after(model.quantize, h, counts, run)

        if run.log_due:
            usage = codebook_usage(counts) if quantize else {}
            run.log(loss=loss, **parts, **usage)
        if run.evaluation_due and quantize:
            result = evaluate(model, teacher, val_set, run)
            run.log_evaluation(result)
    health.compare(result, run)
    return run.finish(result)


def images_and_features(batch, teacher, device):
    """-> images (B, 3, H, W) in [0, 1], t = teacher(images) (B, N, C), or t from --cache-teacher"""
    if isinstance(batch, torch.Tensor):
        images = data.to_float(batch, device)
        return images, teacher(images)
    images, t = batch
    return data.to_float(images, device), t.to(device, non_blocking=True).float()


def first_model(args, teacher_dims):
    """An untrained tokenizer, or with --init the one in a file."""
    seed_all(args.seed)
    model = build(args, teacher_dims)
    if args.init:
        continue_from(model, args.init)
    return model


def build(args, teacher_dims):
    """The tokenizer that the flags describe, with a decoder head per teacher."""
    size = PRESETS[args.model]
    return VQKD(args.image_size, args.patch_size, size["width"], args.encoder_depth, size["heads"],
                args.decoder_depth, args.codes, args.code_dim, teacher_dims)


def first_quantized_step(args, steps):
    """The first step with the quantizer: 0, as in the paper, or with the codes of --init.

    Ours: after --continuous-steps. The vectors of an untrained encoder mean little, and so would
    codes made of them. UserError if no step is left to the codes.
    """
    first = 0 if args.init else data.shortened(args, "continuous_steps", steps)
    if first >= steps:
        raise UserError(f"--continuous-steps {first} leaves none of {steps} steps to the codes")
    return first


# --- measuring ------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, teacher, dataset, run):
    """Means over a data set: cosine to the teacher, commitment, distance of l2(h) and its code.

    Also how many codes are in use, and how evenly (codebook_usage in support/codebook.py).
    Differs from the released code, which measures in float32: we use the precision of training.
    """
    model.eval()
    names = ["cosine", "commit", "distance"]
    if len(teacher.widths) > 1:
        names += [f"cosine_{name}" for name in teacher.widths]
    codes = len(model.quantize.cluster_size)
    totals = data.zeros_to_sum(1 + len(names), run.device)
    counts = torch.zeros(codes, device=run.device)
    for batch, _ in run.eval_batches(dataset):
        with run.autocast():
            images, t = images_and_features(batch, teacher, run.device)
            o, h, v, z = model(images)
            _, parts = vqkd_loss(o, t, h, v, widths=teacher.widths)
        parts["distance"] = (h - v).norm(dim=-1).mean()
        numbers = [torch.ones_like(parts["cosine"])] + [parts[name] for name in names]
        totals += torch.stack(numbers) * len(images)
        counts += code_sums(h, z, codes)[1]
    model.train()

    n, *sums = run.sum(totals).tolist()
    means = {name: total / n for name, total in zip(names, sums, strict=True)}
    return means | codebook_usage(run.sum(counts))


# --- arguments ------------------------------------------------------------------------------------
MODELS = "tiny", "small", "base"
RECIPE = {  # base: the appendix's table of hyper-parameters; tiny and small: ours
    # tiny starts without the quantizer and with faster codes: "naive" in results/health.md.
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
    "recipe_steps":       (750,   None,   None),     # shorter runs shorten the two lines above
}


def parse_args(argv=None):
    p = run_parser(__doc__, moved={"--encode": features_command})
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
    add("--restart-dead-codes", type=whole(0), metavar="STEPS", help="every so many steps, "
        "in the first 80 %% of training, move unused codes to current vectors; base: 0, never")
    add("--stop-on-collapse", action="store_true", help="end the run if the codebook collapses")
    add("--crop-scale", type=number(1e-3, 1), help="smallest share that a crop keeps; base: 0.08")
    add("--lr", type=number(0, 10), help="peak rate at batch 128, grows with the batch; base: 5e-5")
    add("--min-lr", type=number(0, 10), help="rate that the cosine approaches; base: 1e-5")
    add("--beta2", type=number(0, 0.9999), help="of AdamW; base: 0.99")
    add("--weight-decay", type=number(0, 10), help="of AdamW; base: 1e-4")
    add("--warmup-epochs", type=number(0, 10**6), help="epochs of linear warm-up; base: 10")
    add("--init", type=Path, help="go on from this tokenizer, ours or released, on your own --data")
    args = p.parse_args(argv)
    if args.cache_teacher and args.crop_scale is not None:
        raise UserError("--cache-teacher trains on whole images: leave out --crop-scale")
    fill_in(args, MODELS, RECIPE)
    return args


def features_command(args):
    """`--encode IMAGES --init FILE --out DIR` in today's words."""
    out = args.out or Path("runs") / args.model
    return ["extras.features", args.init or out / "vqkd.pt", args.encode,
            "--what", "tokens", "--out", out / "tokens.npz"]


def main(argv=None):
    args = parse_args(argv)
    if args.dry_run:
        grid = grid_of(args.image_size, args.patch_size)
        dims = teachers.widths(args.teacher, grid, args.patch_size)
        with torch.device("meta"):           # shapes without numbers
            model = build(args, dims)
        return dry_run(args, model, f"{model.encoder.num_patches} patches per image",
                       f"{args.codes} codes of {args.code_dim} numbers")
    return train(args)


if __name__ == "__main__":
    launch(main)
