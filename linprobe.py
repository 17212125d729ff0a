"""Stage 3b, linear probing: how much of the classes is there for a LINEAR classifier to read? (paper, Section 3.3)

    image --frozen network--> tokens of every block --read-out: [CLS], patch mean, both--> linear head --> class

The network is never trained here. Its features are computed once and kept; then a whole grid of heads (block x read-out
x norm x rate) is trained at once, because the answer hangs on those choices and the paper names only one of them: [CLS]
of the last layer. All heads are shown; the one to report is chosen on a tenth of the TRAINING images.

Read in this order: readout, summarise, gains, train_heads, accuracy, knn, probe.

    python linprobe.py                     # tiny on built-in shapes: reads runs/tiny/pretrain.pt; under a minute
    python linprobe.py --source all        # backbone, tokenizer, random weights and raw pixels side by side
    torchrun --nproc_per_node=8 linprobe.py --model base --data /imagenet
"""
# Shapes used in this file:  B of n images, T = 1 + N tokens with [CLS] first, D width, L layers (blocks, then norm),
#                            F = 2D features per layer ([CLS] | patch mean), H heads per layer, S settings, C classes

import argparse
import collections
import copy
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from support import data, engine, files, transforms, weights
from model import PRESETS, ViT, imagenet_normalize, initialise, rescale_residual_branches

RATES = (1e-3, 4e-3, 1.6e-2)     # AdamW, around the 4e-3 of BEiT v1's probe
RECIPES = {              # all ours: the paper gives no optimiser, rate or norm. blocks: how many, from the last
    # tiny takes few steps, and the classes also lie in directions of little spread, which only high rates then reach.
    "tiny": dict(rates=(0.03, 0.125, 0.5), batch_size=256, epochs=20, micro_batch=64, blocks=6),
    "small": dict(rates=RATES, batch_size=1024, epochs=30, micro_batch=256, blocks=12),
    "base": dict(rates=RATES, batch_size=1024, epochs=30, micro_batch=256, blocks=12),
    "large": dict(rates=RATES, batch_size=1024, epochs=30, micro_batch=128, blocks=8),
}
# Raw pixels, 6912 numbers for 10,800 images, overfit: the decay matters most (ridge regression does no better).
PIXEL_SETTINGS = [(rate, decay) for rate in (1e-4, 3e-4, 1e-3) for decay in (1.0, 30.0, 300.0)]
READOUTS, NORMS = ("cls", "mean", "both"), ("none", "batchnorm")
SOURCES = ("pretrain", "tokenizer", "random")
Source = collections.namedtuple("Source", "name model encode layers readouts paper settings image_size")


# --- method -----------------------------------------------------------------------------------------------------------
def readout(tokens, kind):
    """One vector per image from its tokens (B, T, D): [CLS], the mean of the patch tokens, or both side by side."""
    cls, mean = tokens[:, 0], tokens[:, 1:].mean(dim=1)
    return dict(cls=cls, mean=mean, both=torch.cat([cls, mean], dim=-1))[kind]       # (B, D), (B, D), (B, 2D)


@torch.no_grad()
def summarise(model, x, blocks=None):
    """Normalised images -> features (B, L, F) of the last `blocks` blocks (default: all), raw, then of the norm."""
    tokens = model.features(x, range(model.depth - (blocks or model.depth), model.depth))
    # Users who probed the raw last layer lost much of the paper's figure: the head of pre-training read [CLS] through
    # this norm, and so should a probe. Fine-tuning drops it.
    tokens.append((model.fc_norm if model.pool == "mean" else model.norm)(tokens[-1]))
    return torch.stack([readout(t.float(), "both") for t in tokens], dim=1)


def gains(features, readouts, chunk=4096):
    """What each head scales its input with.  features (n, L, F) -> mean (L, F), gain (L, H, F), H = readouts x norms

    "batchnorm" divides each channel by its own spread, "none" all channels of a read-out by one number (the head could
    do that itself; it only makes one rate fit all layers). Channels outside the read-out get 0, so that heads of all
    read-outs are rows of one matrix.
    Differs from MAE's probe: the statistics of its BatchNorm without affine come from a batch, ours from all images.
    """
    n, L, F_ = features.shape
    mean = sum(part.double().sum(0) for part in features.split(chunk)) / n
    variance = sum((part.double() - mean).square().sum(0) for part in features.split(chunk)) / n     # (L, F)
    rows = []
    for kind in readouts:
        seen = torch.ones(F_, dtype=torch.double)
        if kind in ("cls", "mean"):
            seen[slice(F_ // 2, None) if kind == "cls" else slice(F_ // 2)] = 0
        overall = (variance * seen).sum(1, keepdim=True) / seen.sum()                                # (L, 1)
        rows += [seen / (overall + 1e-12).sqrt(), seen / (variance + 1e-6 * overall + 1e-12).sqrt()]
    return mean.float(), torch.stack([row.expand(L, F_) for row in rows], dim=1).float()


def train_heads(features, labels, mean, gain, classes, settings, steps, batch_size, seed=0, device="cpu"):
    """Train L x S x H linear classifiers at once.  features (n, L, F), labels (n,), settings: S x (rate, weight decay)

    -> weight (L, S, H, C, F), bias (L, S, H, C), which apply to the raw features: mean and gain are folded in.
    The loss is the sum over heads of each one's mean cross-entropy. No head's loss contains another's weights, and
    AdamW treats every number by itself, so each head learns exactly what it would learn alone.
    Differs from BEiT v1's probe: heads start at zero (convex: the start is forgotten), and images are not augmented.
    """
    (L, H, F_), n, batch_size = gain.shape, len(features), min(batch_size, len(features))
    mean, gain, flat = mean.to(device), gain[:, None, :, None].to(device), features.flatten(1)
    w = [torch.zeros(L, H, classes, F_, device=device, requires_grad=True) for _ in settings]
    b = [torch.zeros(L, H, classes, device=device, requires_grad=True) for _ in settings]
    optimizer = engine.adamw([group for w_, b_, (rate, decay) in zip(w, b, settings) for group in (
        dict(params=[w_], lr_scale=rate, weight_decay=decay), dict(params=[b_], lr_scale=rate, weight_decay=0.0))],
        (0.9, 0.999), torch.device(device))
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < batch_size:                          # a new epoch; the rest of the old one is dropped
            order = torch.randperm(n, generator=generator)
        index, order = order[:batch_size], order[batch_size:]
        x = flat.index_select(0, index).to(device).float().view(-1, L, F_).sub_(mean).permute(1, 2, 0)     # (L, F, B)
        y = labels[index].to(device).expand(L * len(settings) * H, -1)                   # (L * S * H, B)
        engine.set_lr(optimizer, engine.cosine_schedule(step, 1.0, 0.0, steps))
        weight, bias = torch.stack(w, dim=1) * gain, torch.stack(b, dim=1)               # (L, S, H, C, F), (L, S, H, C)
        logits = torch.baddbmm(bias.view(L, -1, 1), weight.view(L, -1, F_), x).view(-1, classes, batch_size)
        (F.cross_entropy(logits, y, reduction="sum") / batch_size).backward()            # logits (L * S * H, C, B)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        weight = torch.stack(w, dim=1) * gain
        return weight, torch.stack(b, dim=1) - torch.einsum("lf,lshcf->lshc", mean, weight)


def head_logits(features, weight, bias):
    """Raw features (B, L, F) -> logits (B, L, S, H, C) of all heads."""
    return torch.einsum("blf,lshcf->blshc", features, weight) + bias


def accuracy(logits, labels, k=1):
    """Percent of images whose class is among the k largest logits.  logits (B, ..., C), labels (B,) -> (...)"""
    best = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
    hit = (best == labels.view(-1, *[1] * (logits.ndim - 1))).any(dim=-1)
    return 100 * hit.double().mean(dim=0)


def score_heads(features, labels, weight, bias, chunk=512):
    """-> (2, L, S, H): top-1 and top-5 of all heads, in chunks, so that the logits of few images are held at a time."""
    total = 0
    for x, y in zip(features.split(chunk), labels.split(chunk)):
        logits, y = head_logits(x.to(weight.device).float(), weight, bias), y.to(weight.device)
        total = total + len(y) * torch.stack([accuracy(logits, y, 1), accuracy(logits, y, 5)])
    return total.cpu() / len(labels)


def knn(bank, bank_labels, queries, k, classes, temperature=0.07, chunk=256):
    """Scores (n, C) by the k nearest of `bank` (m, F) by angle; each votes with exp(cosine / 0.07), as in DINO."""
    bank, scores = F.normalize(bank.float(), dim=-1), []
    for part in queries.split(chunk):
        similarity, nearest = (F.normalize(part.float(), dim=-1) @ bank.T).topk(min(k, len(bank)), dim=-1)   # (B, k)
        votes = torch.zeros(len(part), classes, device=bank.device)
        scores.append(votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp()))
    return torch.cat(scores)


def hold_out(n, seed):
    """Split n training images into nine tenths to fit heads and one tenth to choose among them. -> two index vectors"""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[max(1, n // 10):], order[:max(1, n // 10)]


# --- arguments --------------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    engine.add_run_args(p)
    g = p.add_argument_group("probe")
    g.add_argument("--source", default="pretrain", choices=[*SOURCES, "all"],
                   help="whose features: OUT/pretrain.pt, the encoder in OUT/vqkd.pt, an untrained network, or all")
    g.add_argument("--checkpoint", type=Path, help="probe this file, ours or a released one, not OUT/pretrain.pt")
    g.add_argument("--blocks", type=int, help="probe the last so many blocks; base: 12, all of them")
    g.add_argument("--rates", type=float, nargs="+", help="of AdamW, one head each; base: 1e-3 4e-3 1.6e-2")
    g.add_argument("--weight-decay", type=float, default=1e-4, help="of AdamW; base: 1e-4")
    g.add_argument("--augment", type=int, default=0,
                   help="random crops and flips per training image, kept as further features; base: 0, only the image")
    args = engine.with_recipe(p.parse_args(argv), RECIPES)
    sizes = [getattr(args, name) or PRESETS[args.model][name] for name in ("image_size", "patch_size")]
    engine.check_sizes(*sizes)
    if args.source in ("random", "all"):                     # the others have the patches of their file
        weights.grid_of(*sizes)
    engine.check_ranges(args, [
        ("blocks", 1, 1000), ("rates", 1e-9, 10), ("weight_decay", 0, 1000), ("augment", 0, 100)])
    if args.checkpoint and args.source in ("tokenizer", "random"):
        raise engine.UserError(f"--source {args.source} does not read --checkpoint {args.checkpoint}: leave one out")
    return args


# --- features ---------------------------------------------------------------------------------------------------------
def load_source(name, args, device):
    """-> Source: `encode` from images (B, 3, H, W) in [0, 1] to features (B, L, F), and what L and F are."""
    size = args.image_size or PRESETS[args.model]["image_size"]
    settings = [(rate, args.weight_decay) for rate in args.rates]
    if name == "pixels":                                     # what a linear classifier can do without any network
        def encode(images):                                  # at most 48 px: 224 px would be 150,528 numbers an image
            small = images if size <= 48 else F.interpolate(images, size=48, mode="area")
            return small.flatten(1)[:, None]
        return Source(name, None, encode, ["pixels"], ["pixels"], "pixels", PIXEL_SETTINGS, size)

    if name == "random":
        engine.seed_all(args.seed)
        preset = PRESETS[args.model] | dict(image_size=size)
        preset["patch_size"] = args.patch_size or preset["patch_size"]
        model, paper = ViT(**preset, positions="shared", pool=None), "cls"
        initialise(model, preset.get("init_std", 0.02), cut=1.0, convolutions=True)          # as pre-training starts
        rescale_residual_branches(model.blocks)
    else:
        stage = "vqkd" if name == "tokenizer" else "pretrain"
        path = (name == "pretrain" and args.checkpoint) or args.out / f"{stage}.pt"
        file = engine.read_file(path, remedy=f"make it with python {stage}.py --model {args.model} --out {args.out}")
        # The tokenizer's [-1, 1] pixels are folded into its first layer by load_backbone, so all take the same input.
        model, _, report = weights.load_backbone(file, pool=None, image_size=args.image_size)
        # The paper reads [CLS] where patch aggregation trained it, and the patch mean where nothing did.
        paper = "cls" if any(key.startswith("cls_pt_layers.") for key in report.unexpected) else "mean"
    model = model.to(device).eval().requires_grad_(False)
    blocks = min(args.blocks, model.depth)
    layers = [str(i + 1) for i in range(model.depth - blocks, model.depth)] + ["norm"]
    encode = lambda images: summarise(model, imagenet_normalize(images), blocks)         # noqa: E731
    return Source(name, model, encode, layers, READOUTS, paper, settings, model.image_size[0])


@torch.no_grad()
def extract(source, dataset, items, args, process, chunk=8192):
    """Features (n, L, F) and labels (n,) of items [(epoch, index)], in their order, in the memory of rank 0.

    Each process computes a contiguous share and sends it to rank 0; what it returns itself is of no use.
    """
    n, device, rank, processes = len(items), process.device, process.rank, process.world_size
    shares = [data.eval_batches(n, args.micro_batch, r, processes) for r in range(processes)]
    sizes = [sum(map(len, share)) for share in shares]
    shape = source.encode(torch.zeros(1, 3, source.image_size, source.image_size, device=device)).shape[1:]
    rows = n if rank == 0 else sizes[rank]
    # float16 halves the memory where there is much: base on ImageNet is 1.28 M x 13 x 1536 numbers, 51 GB.
    features = torch.empty(rows, *shape, dtype=torch.float32 if args.model == "tiny" else torch.float16)
    labels, at = torch.empty(rows, dtype=torch.long), 0
    batches = [[items[i] for i in batch] for batch in shares[rank]]
    for images, y in data.make_loader(dataset, batches, args.workers, device):
        with engine.autocast(device, args.amp):
            features[at:at + len(y)] = source.encode(data.to_float(images, device)).cpu()
        labels[at:at + len(y)] = y
        at += len(y)
    for sender in range(1, processes):                       # in order and in chunks: nccl sends from GPU memory only
        for first in range(0, sizes[sender], chunk):
            for x in (features, labels):
                part = slice(first, min(first + chunk, sizes[sender]))
                if rank == sender:
                    dist.send(x[part].to(device), dst=0)
                elif rank == 0:
                    part = slice(at + part.start, at + part.stop)
                    buffer = torch.empty_like(x[part], device=device)
                    dist.recv(buffer, src=sender)
                    x[part] = buffer.cpu()
        at += sizes[sender] if rank == 0 else 0
    return features, labels


# --- loop -------------------------------------------------------------------------------------------------------------
def probe(source, args, process, log):
    """Everything for one source. -> its summary and its best head, on rank 0; the other processes only extract."""
    begin, device = time.time(), process.device
    open_ = dict(data_dir=args.data_dir, download=args.download, limit=args.limit, seed=args.seed)
    plain = transforms.EvalTransform(source.image_size)
    train_set = data.open_data(args.data, "train", plain, **open_)
    val_set = data.open_data(args.data, "val", plain, **open_)
    data.leave_out_bad(args, process, train_set, val_set)
    n, classes = len(train_set), len(train_set.classes)
    if n < 10:
        raise engine.UserError(f"{n} training images are too few to hold a tenth out: raise --limit or add images")

    # 1. Features of the training images, once, the held-out tenth last; with --augment, of random views to fit, too.
    fit, held = hold_out(n, args.seed)
    features, labels = extract(source, train_set, [(0, i) for i in torch.cat([fit, held]).tolist()], args, process)
    if args.augment:
        crops = copy.copy(train_set)                         # the same images, seen in another way
        crops.transform = transforms.VQKDTransform(source.image_size)
        views = [(view, i) for view in range(args.augment) for i in fit.tolist()]
        more = extract(source, crops, views, args, process)
    seconds = time.time() - begin
    val = extract(source, val_set, [(0, i) for i in range(len(val_set))], args, process)
    if process.rank > 0:                                     # the heads are small: rank 0 trains them alone
        return None, None
    fit_features, fit_labels = features[:len(fit)], labels[:len(fit)]        # views, no copies
    if args.augment:
        fit_features, fit_labels = torch.cat([fit_features, more[0]]), torch.cat([fit_labels, more[1]])
    print(f"{source.name}: {features.shape[1]} x {features.shape[2]} features of {n} images in {seconds:.1f} s,"
          f" {features.nbytes * (1 + 2 * args.augment) / 2**30:.2f} GiB of memory", flush=True)

    # 2. All heads at once, on nine tenths of the training images.
    mean, gain = gains(fit_features, source.readouts)
    steps = args.steps or args.epochs * max(1, len(fit_features) // args.batch_size)
    heads = train_heads(fit_features, fit_labels, mean, gain, classes, source.settings, steps, args.batch_size,
                        args.seed, device)

    # 3. Choose on the held-out tenth: the setting of every head, and the best head of all.
    held_out = score_heads(features[len(fit):], labels[len(fit):], *heads)[0]                # (L, S, H)
    table = choose(held_out, source)
    best = max(table, key=lambda row: row["held_out"])
    paper = max((row for row in table if row["paper"]), key=lambda row: row["held_out"])

    # 4. Only now look at the validation labels: once, for all heads.
    top1, top5 = score_heads(*val, *heads)
    for row in table:
        row.update(top1=top1[row["at"]].item(), top5=top5[row["at"]].item())
        log(source=source.name, **{k: v for k, v in row.items() if k != "at"})
    neighbours = {}
    for label, row in (("knn", paper), ("knn_best", best)):
        for k in (10, 20):
            neighbours[f"{label}{k}"] = score_knn(features, labels, val, row, gain, k, classes, device)
    print(format_table(source.name, table, best, paper, neighbours), flush=True)
    layer, s, h = best["at"]
    seen = gain[layer, h].nonzero()[:, 0]
    head = dict(weight=heads[0][layer, s, h][:, seen].cpu(), bias=heads[1][layer, s, h].cpu())           # (C, F'), (C,)
    return dict(source=source.name, **{k: v for k, v in best.items() if k not in ("at", "paper")},
                paper_top1=paper["top1"], paper_top5=paper["top5"],
                paper_reading=f"{paper['block']} {paper['readout']}", knn=neighbours["knn20"], **neighbours, images=n,
                images_per_s=n * (1 + args.augment) / seconds, steps=steps, seconds=time.time() - begin), head


def choose(held_out, source):
    """One row per layer, read-out and norm with the setting that is best on held-out images.  held_out (L, S, H)"""
    table = []
    for layer, block in enumerate(source.layers):
        for h, (kind, norm) in enumerate((kind, norm) for kind in source.readouts for norm in NORMS):
            s = int(held_out[layer, :, h].argmax())
            rate, decay = source.settings[s]
            table.append(dict(at=(layer, s, h), block=block, readout=kind, norm=norm, rate=rate, weight_decay=decay,
                              held_out=held_out[layer, s, h].item(),
                              paper=block == source.layers[-1] and kind == source.paper))
    return table


def score_knn(features, labels, val, row, gain, k, classes, device):
    """Top-1 of k-NN on the read-out of one row; all plain training images are the bank."""
    layer, _, h = row["at"]
    seen = gain[layer, h].nonzero()[:, 0]
    bank, queries = (x[:, layer, seen].to(device) for x in (features, val[0]))
    return accuracy(knn(bank, labels.to(device), queries, k, classes), val[1].to(device)).item()


def format_table(name, table, best, paper, neighbours):
    """A line per layer, a column per read-out and norm: validation top-1 of the setting chosen on held-out images."""
    columns = list(dict.fromkeys((row["readout"], row["norm"]) for row in table))
    lines = [f"{name:10}" + "".join(f"{kind + '/' + norm:>18}" for kind, norm in columns)]
    for block in dict.fromkeys(row["block"] for row in table):
        cells = [f"{row['top1']:.1f}{'*' if row is best else ' '}{'p' if row is paper else ' '}"
                 for row in table if row["block"] == block]
        lines.append(f"{block:>10}" + "".join(f"{cell:>18}" for cell in cells))
    lines.append(f"  * chosen on held-out training images: top-1 {best['top1']:.2f}, top-5 {best['top5']:.2f} "
                 f"(rate {best['rate']:g}, weight decay {best['weight_decay']:g})")
    lines.append(f"  p the paper's reading: {paper['top1']:.2f}")
    lines.append("  k-NN (k = 10, 20) on the features of p: {knn10:.2f}, {knn20:.2f}; "
                 "of *: {knn_best10:.2f}, {knn_best20:.2f}".format(**neighbours))
    return "\n".join(lines)


# --- main -------------------------------------------------------------------------------------------------------------
def main(argv=None):
    args = parse_args(argv)
    if args.dry_run:
        width, layers = PRESETS[args.model]["width"], min(args.blocks, PRESETS[args.model]["depth"]) + 1
        print("\n".join(f"{k:18} {v}" for k, v in sorted(files.plain_args(args).items())))
        heads, features = layers * len(READOUTS) * len(NORMS) * len(args.rates), layers * 2 * width
        print(f"{heads} heads: {layers} layers, {len(READOUTS)} read-outs, {len(NORMS)} norms, {len(args.rates)} rates")
        print(f"{features} features per image: for ImageNet {features * 2 * 1281167 / 2**30:.0f} GiB in float16")
        return None
    process = engine.init_distributed(args.device)
    args.amp = engine.resolve_amp(args.amp, process.device)
    names = (*SOURCES, "pixels") if args.source == "all" else (args.source,)
    stage = "linprobe" if "pretrain" in names else f"linprobe_{args.source}"
    done, origin = args.out / f"{stage}.pt", args.out / ("vqkd.pt" if args.source == "tokenizer" else "pretrain.pt")
    origin = args.checkpoint or origin
    if done.exists() and origin.exists() and done.stat().st_mtime < origin.stat().st_mtime:
        args.fresh = True                                    # a probe of an earlier network: set it aside, probe anew
    engine.start_or_resume(stage, args, process)
    sources = [load_source(name, args, process.device) for name in names]        # a missing file shows before any work
    log = engine.Log(args.out / f"{stage}.jsonl", args, process)
    results = [probe(source, args, process, log) for source in sources]
    if process.rank > 0:
        return None
    for summary, _ in results:
        log(summary=1, **summary)
        print(json.dumps({"summary": 1, **{k: round(v, 4) if isinstance(v, float) else v for k, v in summary.items()}}))
    if len(results) > 1:
        print(f"{'source':>10} {'top-1':>7} {'paper':>7} {'k-NN':>7}   chosen")
        for r, _ in results:
            print(f"{r['source']:>10} {r['top1']:7.2f} {r['paper_top1']:7.2f} {r['knn']:7.2f}   "
                  f"block {r['block']}, {r['readout']}, {r['norm']}")
    summary, head = results[0]
    engine.finish(stage, args, engine.describe_run(stage, args) | dict(
        model=head, block=summary["block"], readout=summary["readout"], norm=summary["norm"], rate=summary["rate"],
        result=summary, sources=[r for r, _ in results]))
    return summary


if __name__ == "__main__":
    engine.run(main)
