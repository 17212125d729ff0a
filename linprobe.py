"""Stage 3b, linear probing: what can a LINEAR classifier read off the frozen network? (Section 3.2)

    image --frozen network--> tokens of every block --read-out: [CLS], patch mean, both--> head

The network is never trained here. Its features are computed once and kept in a file. Then a whole
grid of heads (block x read-out x norm x rate) is trained at once. The result depends on all these
choices, and the paper names only one of them: [CLS] of the last layer. Results of all heads are
shown. The head to report is chosen on a tenth of the TRAINING images. A table at the end compares
it with raw pixels and with few labels.

Read in this order: readout, summarise, LinearHeads, Probe, train_heads, accuracy, choose, knn,
ridge, score_reading, run_probe.

    python linprobe.py                     # tiny on built-in shapes: reads runs/tiny/pretrain.pt
    python linprobe.py --source all        # backbone, tokenizer, random weights, pixels, HOG
    torchrun --nproc_per_node=8 linprobe.py --model base --data /imagenet
"""
# Shapes:  n images, B images of a batch, T = 1 + N tokens with [CLS] first, D width,
#          L layers (blocks, then the final norm), F = 2D features per layer ([CLS] | patch mean),
#          F' features of a read-out, S (rate, decay) pairs, H = read-outs x norms, C classes
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import PRESETS, imagenet_normalize
from support import inputs
from support.args import check_sides, fill_in, number, run_parser, whole
from support.files import Log, UserError
from support.optim import adamw, cosine_schedule, set_lr
from support.probe import (
    SOURCES, feature_folder, file_of, grid_of_heads, hand_over, load_sources, named, open_images,
    store_splits, without)
from support.process import join_processes, launch
from support.run import dry_run, find_resume_file
from support.teachers import HogTeacher

MODELS = "tiny", "small", "base", "large"
RATES = 1e-3, 4e-3, 1.6e-2               # of AdamW, around the 4e-3 of BEiT v1's probe
RECIPE = {  # All ours: the paper states no optimiser, rate or norm. BEiT v1's probe: 100 epochs.
    # tiny takes few steps: in directions in which features vary little, only high rates learn.
    #                tiny                small  base   large
    "rates":        ((0.03, 0.125, 0.5), RATES, RATES, RATES),
    "weight_decay": (1e-4,               1e-4,  1e-4,  1e-4),
    "blocks":       (6,                  12,    12,    8),           # how many, from the last
    "batch_size":   (256,                1024,  1024,  1024),
    "micro_batch":  (64,                 256,   256,   128),
    "epochs":       (20,                 30,    30,    30),
    "labels_per_class": (10, 10, 10, 10),
}
DRAWS = 20                               # of few labels; all of them cost less than the heads
# Heads on raw pixels overfit (1728 numbers of 10,800 images): the weight decay matters most.
PIXEL_SETTINGS = [(rate, decay) for rate in (1e-4, 3e-4, 1e-3) for decay in (1.0, 30.0, 300.0)]
READOUTS = "cls", "mean", "both"
NORMS = "none", "batchnorm"


# --- method: features -----------------------------------------------------------------------------
def readout(tokens, kind):
    """One vector per image.  tokens (B, T, D) -> (B, D) for cls and mean, (B, 2D) for both."""
    cls = tokens[:, 0]
    mean = tokens[:, 1:].mean(dim=1)                         # of the patches, without [CLS]
    return dict(cls=cls, mean=mean, both=torch.cat([cls, mean], dim=-1))[kind]


@torch.no_grad()
def summarise(model, x, blocks=None):
    """Normalised images -> features (B, L, F) of the last `blocks` blocks and of the final norm."""
    first = 0 if blocks is None else model.depth - blocks
    tokens = model.features(x, range(first, model.depth))    # per block (B, T, D)
    # Differs from BEiT v1's probe, which reads before any norm: there, users of BEiT v2 were far
    # below the paper's figure. Pre-training reads the last layer through the final norm.
    norm = model.fc_norm if model.pool == "mean" else model.norm
    tokens.append(norm(tokens[-1]))
    return torch.stack([readout(x.float(), "both") for x in tokens], dim=1)


def encode(source, images):
    """Images (B, 3, H, W) in [0, 1] -> features (B, L, F) of a Source: a network, pixels or HOG."""
    if source.model is not None:
        return summarise(source.model, imagenet_normalize(images), blocks=len(source.layers) - 1)
    if source.name == "hog":                                 # all patches side by side
        return HogTeacher(8)(F.interpolate(images, size=48, mode="area")).flatten(1)[:, None]
    # 1728 numbers of any image. On shapes they serve as well as all 6912; 224 px would be 150,528.
    x = F.interpolate(images, size=24, mode="area").flatten(1)
    return (x - x.mean(dim=1, keepdim=True))[:, None]        # a single layer; sign: light or dark


def columns(kind, width):
    """Where a read-out lies among the `width` = F features of a layer.  -> slice"""
    half = width // 2
    parts = dict(cls=slice(0, half), mean=slice(half, width))
    return parts.get(kind, slice(0, width))                  # both, pixels: all of them


def mean_and_variance(features, rows, chunk=4096):
    """Of every feature, over the rows (m,) of images.  features (n, L, F) -> 2 x (L, F) float64"""
    # Sorted: rows that lie together in the file are read together.
    parts = rows.sort().values.split(chunk)
    mean = sum(features[part].double().sum(0) for part in parts) / len(rows)
    variance = sum((features[part].double() - mean).square().sum(0) for part in parts) / len(rows)
    return mean, variance


def input_scale(variance, norm):
    """What a head's input, after the mean is taken off, is multiplied by.  variance, -> (L, F')

    "batchnorm" divides each feature by its own std, "none" all of a layer by one number, so that
    one rate fits all layers.
    Differs from MAE's probe: its BatchNorm takes the statistics of a batch, ours of all images.
    """
    overall = variance.mean(dim=1, keepdim=True).expand_as(variance)
    if norm == "none":
        return 1 / (overall + 1e-12).sqrt()
    # 1e-6: a feature that hardly varies stays small. 1e-12: there is no division by 0.
    return 1 / (variance + 1e-6 * overall + 1e-12).sqrt()


# --- method: heads --------------------------------------------------------------------------------
class LinearHeads(nn.Module):
    """Linear classifiers on one read-out with one norm: a head for each layer and setting.

    All heads are one batched product. A loop over nn.Linear took 3.5 times as long for the 126
    heads of tiny, and as long for base.
    Differs from BEiT v1's probe: heads start at 0. The loss is convex, so the start matters little.
    """

    def __init__(self, kind, variance, norm, settings, classes):
        super().__init__()
        self.kind = kind
        self.norm = norm
        self.columns = columns(kind, variance.shape[1])
        variance = variance[:, self.columns]
        layers, width = variance.shape                       # L, F'
        scale = input_scale(variance, norm).float()
        self.register_buffer("scale", scale[:, None])                    # (L, 1, F')
        self.weight = nn.ParameterList(torch.zeros(layers, classes, width) for _ in settings)
        self.bias = nn.ParameterList(torch.zeros(layers, classes, 1) for _ in settings)

    def forward(self, x):
        """Centred features (L, F, B) -> logits (L, S, C, B)."""
        # The weights take the scale: (W s) x = W (s x), and that is less work.
        weight = torch.cat(list(self.weight), dim=1) * self.scale        # (L, S C, F')
        bias = torch.cat(list(self.bias), dim=1)                         # (L, S C, 1)
        logits = torch.baddbmm(bias, weight, x[:, self.columns])         # (L, S C, B)
        return logits.unflatten(1, (len(self.weight), -1))

    @torch.no_grad()
    def head(self, layer, s, mean):
        """-> weight (C, F'), bias (C,) of a head for raw features: scale and mean are in them."""
        weight = self.weight[s][layer] * self.scale[layer]
        return weight, self.bias[s][layer, :, 0] - weight @ mean[layer, self.columns]


class Probe(nn.Module):
    """The whole grid of heads: H = read-outs x norms times LinearHeads.

    mean, variance (L, F) of the training images; settings: S pairs (rate, weight decay).
    """

    def __init__(self, mean, variance, readouts, settings, classes):
        super().__init__()
        self.settings = settings
        self.register_buffer("mean", mean.float())
        self.groups = nn.ModuleList(LinearHeads(kind, variance, norm, settings, classes)
                                    for kind in readouts for norm in NORMS)

    def forward(self, features):
        """Raw features (B, L, F) -> one after the other, logits (L, S, C, B) of H groups."""
        x = features.to(self.mean.device).float() - self.mean
        x = x.permute(1, 2, 0)                               # (L, F, B)
        for group in self.groups:
            yield group(x)


def train_heads(probe, features, labels, rows, steps, batch_size, seed=0):
    """Train all heads on the images `rows`.  features (n, L, F), labels (n,), rows (m,) long

    No head's loss contains the weights of another, and AdamW treats every number by itself. So each
    head learns exactly what it would learn alone.
    Differs from BEiT v1's probe: biases have no weight decay, and the rate falls at every step.
    """
    groups = []                              # set_lr multiplies the schedule by lr_scale
    for s, (rate, decay) in enumerate(probe.settings):
        matrices = [group.weight[s] for group in probe.groups]
        biases = [group.bias[s] for group in probe.groups]
        groups.append(dict(params=matrices, lr_scale=rate, weight_decay=decay))
        groups.append(dict(params=biases, lr_scale=rate, weight_decay=0.0))
    optimizer = adamw(groups, (0.9, 0.999), probe.mean.device)
    batch_size = min(batch_size, len(rows))
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < batch_size:          # a new epoch; the rest of the old one is dropped
            order = rows[torch.randperm(len(rows), generator=generator)]
        batch = order[:batch_size]
        order = order[batch_size:]
        set_lr(optimizer, cosine_schedule(step, 1.0, 0.0, steps))
        y = labels[batch].to(probe.mean.device)              # (B,)
        for logits in probe(features[batch]):                # (L, S, C, B)
            logits = logits.flatten(0, 1)                    # (L S, C, B)
            loss = F.cross_entropy(logits, y.expand(len(logits), -1), reduction="sum")
            (loss / batch_size).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def accuracy(logits, labels, k=1):
    """Percent of images with their label among the k largest.  (B, ..., C), (B,) -> (...)"""
    best = logits.topk(min(k, logits.shape[-1]), dim=-1).indices         # (B, ..., k)
    hit = (best == labels.view(-1, *[1] * (logits.ndim - 1))).any(dim=-1)
    return 100 * hit.double().mean(dim=0)


@torch.no_grad()
def score_heads(probe, features, labels, rows, chunk=512):
    """-> (2, L, S, H): top-1 and top-5 of all heads on the images `rows`, in percent."""
    total = 0
    for part in rows.split(chunk):           # the logits of few images are held at a time
        y = labels[part].to(probe.mean.device)
        scores = []
        for logits in probe(features[part]):
            logits = logits.permute(3, 0, 1, 2)                          # (B, L, S, C)
            scores.append(torch.stack([accuracy(logits, y, 1), accuracy(logits, y, 5)]))
        total = total + len(part) * torch.stack(scores, dim=-1)
    return total.cpu() / len(rows)


def choose(held_out, probe, source):
    """The best setting of every layer, read-out and norm, one row each.  -> a list of dicts

    held_out (L, S, H): top-1 on the held-out images. at: (layer, s, h), a head's place in the grid.
    """
    table = []
    for layer, block in enumerate(source.layers):
        for h, group in enumerate(probe.groups):
            s = int(held_out[layer, :, h].argmax())
            rate, decay = probe.settings[s]
            is_paper = block == source.layers[-1] and group.kind == source.paper
            table.append(dict(
                at=(layer, s, h), block=block, readout=group.kind, norm=group.norm, rate=rate,
                weight_decay=decay, held_out=held_out[layer, s, h].item(), paper=is_paper))
    return table


def knn(bank, bank_labels, queries, k, classes, temperature=0.07, sign_blind=False, chunk=256):
    """Class scores by the k images of largest cosine.  bank (m, F'), queries (n, F') -> (n, C)

    Each neighbour votes with exp(cosine / 0.07), as in DINO. sign_blind takes |cosine|: for pixels,
    where light on dark is as near as dark on light.
    """
    bank = F.normalize(bank.float(), dim=-1)
    scores = []
    for part in queries.split(chunk):
        cosine = F.normalize(part.float(), dim=-1) @ bank.T
        if sign_blind:
            cosine = cosine.abs()
        similarity, nearest = cosine.topk(min(k, len(bank)), dim=-1)     # (B, k)
        votes = torch.zeros(len(part), classes, device=bank.device)
        vote = (similarity / temperature).exp()
        scores.append(votes.scatter_add_(1, bank_labels[nearest], vote))
    return torch.cat(scores)


def ridge(x, y):
    """A linear classifier by least squares.  x (m, F') features, y (m, C) targets -> W (F', C)

    W makes |x W - y|^2 + decay |W|^2 smallest. One formula solves F' equations, the other m.
    Logistic regression on ten images a class was no better on tiny, and takes many steps.
    """
    m, width = x.shape
    decay = 0.1 * x.square().sum() / m + 1e-12       # a tenth of the mean |x|^2, for all sources
    if width <= m:
        return torch.linalg.solve(x.T @ x + decay * torch.eye(width).to(x), x.T @ y)
    return x.T @ torch.linalg.solve(x @ x.T + decay * torch.eye(m).to(x), y)


@torch.no_grad()
def score_reading(row, source, probe, train, images, val, draws):
    """What else the layer and read-out of a row of the table are worth.  -> {name: top-1}

    knn1, knn10, knn20: k-NN among all training images; images (n,): their rows in the file.
    few_top1, few_knn1 (R,): ridge and 1-NN if only the m images of a draw show their labels.
    """
    layer, _, h = row["at"]
    group = probe.groups[h]
    (x, labels), (queries, truth) = (
        (features[:, layer, group.columns].to(probe.mean.device), labels.to(probe.mean.device))
        for features, labels in (train, val))
    x, labels = x[images], labels[images]                    # (n, F'), (n,)
    classes = group.bias[0].shape[1]

    def neighbours(k, rows=slice(None)):
        sign_blind = source.name == "pixels"
        votes = knn(x[rows], labels[rows], queries, k, classes, sign_blind=sign_blind)
        return accuracy(votes, truth).item()

    def linear(rows):
        a, b = ((features.float() - probe.mean[layer, group.columns]) * group.scale[layer]
                for features in (x[rows], queries))          # with the row's norm
        y = F.one_hot(labels[rows], classes).float()
        return accuracy(b @ ridge(a, y - y.mean(dim=0)), truth).item()

    few = dict(few_top1=list(map(linear, draws)), few_knn1=[neighbours(1, rows) for rows in draws])
    return {f"knn{k}": neighbours(k) for k in (1, 10, 20)} | few


def hold_out(n, seed):
    """Nine tenths of n images to train heads, one tenth to choose one.  -> 2 x (rows,) long"""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    tenth = max(1, n // 10)
    return order[tenth:], order[:tenth]


# --- training: all heads of one source ------------------------------------------------------------
def run_probe(source, sets, stored, args, process, log):
    """Everything for one source.  -> its summary, its best head"""
    begin = time.time()
    train_set, val_set, draws = sets

    # 1. Features of all images are computed once. `views` rows belong to each training image.
    # Differs from BEiT v1's probe, which crops and mirrors anew in every epoch (see --augment).
    train, val, seconds = stored             # of train and val: features (rows, L, F), labels
    views = 1 + args.augment

    # 2. All heads at once, on nine tenths of the training images.
    fit, held = hold_out(len(train_set), args.seed)
    fit = torch.cat([fit * views + view for view in range(views)])       # rows of the file
    mean, variance = mean_and_variance(train[0], fit)
    readouts = READOUTS
    settings = [(rate, args.weight_decay) for rate in args.rates]
    if source.model is None:
        readouts = [source.paper]
        settings = PIXEL_SETTINGS
    probe = Probe(mean, variance, readouts, settings, len(train_set.classes)).to(process.device)
    steps = args.steps or args.epochs * max(1, len(fit) // args.batch_size)
    train_heads(probe, *train, fit, steps, args.batch_size, args.seed)

    # 3. Choose the setting of every head, and the best head, on the held-out tenth. Differs from
    # BEiT v1's probe, which picks by the validation images: those then flatter it.
    held_out, _ = score_heads(probe, *train, held * views)
    table = choose(held_out, probe, source)
    best = max(table, key=lambda row: row["held_out"])
    paper = max((row for row in table if row["paper"]), key=lambda row: row["held_out"])

    # 4. Only now look at the validation labels: once, for all heads.
    top1, top5 = score_heads(probe, *val, torch.arange(len(val_set)))
    for row in table:
        row |= dict(top1=top1[row["at"]].item(), top5=top5[row["at"]].item())
        log(source=source.name, **without(row, "at"))
    print(grid_of_heads(source.name, table, best, paper), flush=True)

    # 5. The same two readings by k-NN and with few labels. The bank: all training images, those
    # held out too, each without its crops.
    images = torch.arange(len(train_set)) * views
    of_paper = score_reading(paper, source, probe, train, images, val, draws)
    of_best = of_paper
    if best is not paper:
        of_best = score_reading(best, source, probe, train, images, val, draws)
    summary = dict(
        source=source.name, **without(best, "at", "paper"), paper_top1=paper["top1"],
        paper_top5=paper["top5"], paper_reading=f"{paper['block']} {paper['readout']}",
        **named(of_best, of_paper, args.labels_per_class), images=len(train_set), steps=steps,
        seconds=seconds + time.time() - begin)
    layer, s, h = best["at"]
    return summary, probe.groups[h].head(layer, s, probe.mean)


# --- arguments ------------------------------------------------------------------------------------
def parse_args(argv=None):
    p = run_parser(__doc__, without=("compile", "log_every", "save_every"))
    add = p.add_argument_group("probe").add_argument
    add("--source", default="pretrain", choices=[*SOURCES, "all"], help="whose features: "
        "OUT/pretrain.pt, the encoder in OUT/vqkd.pt, an untrained network, or all; raw pixels are "
        "always beside it, and for tiny all has HOG, too")
    add("--checkpoint", type=Path, help="probe this file, ours or released, not OUT/pretrain.pt")
    add("--cache", type=Path, metavar="DIR", help="keep the features in DIR, for further probes of "
        "the same network; default: in OUT, until the probe is done")
    add("--blocks", type=whole(1, 1000), help="probe the last so many blocks; base: 12, all")
    add("--rates", type=number(1e-9, 10), nargs="+", help="of AdamW, one head each; base: 1e-3 "
        "4e-3 1.6e-2")
    add("--weight-decay", type=number(0, 1000), help="of AdamW; base: 1e-4")
    add("--augment", type=whole(0, 100), default=0, help="random crops and flips per training "
        "image, kept as further features; base: 0, only the image")
    add("--labels-per-class", type=whole(0), metavar="N", help="top-1 from N labels of every "
        "class, too: the mean of 20 draws of training images; 0: not measured; base: 10")
    args = p.parse_args(argv)
    if args.checkpoint and args.source in ("tokenizer", "random"):
        raise UserError(f"--source {args.source} does not read --checkpoint {args.checkpoint}: "
                        f"leave one out")
    size = args.image_size
    if args.source in ("pretrain", "tokenizer"):
        args.image_size = None               # the patches are those of a file, still to be read
    fill_in(args, MODELS, RECIPE)
    args.image_size = size                   # None: as the file was made
    if size:
        check_sides(args, 1)
    return args


# --- main -----------------------------------------------------------------------------------------
def main(argv=None):
    args = parse_args(argv)
    if args.dry_run:
        return describe(args)
    process = join_processes(args.device, args.amp)
    args.amp = process.amp
    stage = "linprobe" if args.source in ("pretrain", "all") else f"linprobe_{args.source}"
    names = SOURCES if args.source == "all" else (args.source,)
    # A probe belongs to the weights it read, whatever their file is called.
    files = {name: file_of(name, args) for name in names if name in ("pretrain", "tokenizer")}
    find_resume_file(stage, args, process, **files)          # ends here if this probe is done

    made_from = inputs.made_from(args, process, **files)
    sources = load_sources(names, args, process.device)
    sets = open_images(sources, args, DRAWS, process)
    log = Log(args.out / f"{stage}.jsonl", args, process, made_from=made_from)
    stored = [store_splits(source, encode, images, args, process)
              for source, images in zip(sources, sets, strict=True)]
    if not process.is_main:                  # the heads are small: rank 0 trains them alone
        return None
    results = [run_probe(*each, args, process, log)
               for each in zip(sources, sets, stored, strict=True)]
    if not args.cache:
        shutil.rmtree(feature_folder(args))
    return hand_over(results, stage, args, log, made_from)


def describe(args):
    """--dry-run: the recipe and the sizes of features and heads."""
    layers = min(args.blocks, PRESETS[args.model]["depth"]) + 1
    width = 2 * PRESETS[args.model]["width"]
    classes = {"shapes": 10, "cifar10": 10, "cifar100": 100}.get(args.data, 1000)
    with torch.device("meta"):               # shapes without numbers
        probe = Probe(*torch.ones(2, layers, width), READOUTS, args.rates, classes)
    heads = len(probe.groups) * layers * len(args.rates)
    gigabytes = layers * width * 2 * 1281167 / 1e9
    dry_run(args, probe, f"{heads} heads of {classes} classes", f"{layers * width} features per "
            f"image, for ImageNet {gigabytes:.0f} GB in float16")


if __name__ == "__main__":
    launch(main)
