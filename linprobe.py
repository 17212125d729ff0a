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
# Shapes used in this file:  B images, T = 1 + N tokens with [CLS] first, D width, L layers (blocks, and the final norm),
#                            F = 2D features per layer ([CLS] | patch mean), H heads per layer, S settings, C classes

import argparse
import collections
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import engine
from model import PRESETS, ViT, imagenet_normalize, initialise, rescale_residual_branches

RATES = (1e-3, 4e-3, 1.6e-2)     # AdamW, around the 4e-3 of BEiT v1's probe
RECIPES = {              # all ours: the paper gives neither optimiser nor rate nor norm. blocks: how many, from the last
    "tiny": dict(rates=RATES, weight_decay=1e-4, batch_size=1024, epochs=30, micro_batch=250, blocks=6, augment=0),
    "small": dict(rates=RATES, weight_decay=1e-4, batch_size=1024, epochs=30, micro_batch=256, blocks=12, augment=0),
    "base": dict(rates=RATES, weight_decay=1e-4, batch_size=1024, epochs=30, micro_batch=256, blocks=12, augment=0),
    "large": dict(rates=RATES, weight_decay=1e-4, batch_size=1024, epochs=30, micro_batch=128, blocks=8, augment=0),
}
PIXEL_SETTINGS = [(rate, decay) for rate in (3e-4, 1e-3, 3e-3) for decay in (0.0, 1.0, 10.0)]
READOUTS, NORMS = ("cls", "mean", "both"), ("none", "batchnorm")
SOURCES = ("pretrain", "tokenizer", "random")
Source = collections.namedtuple("Source", "name encode layers readouts paper settings image_size")


# --- method -----------------------------------------------------------------------------------------------------------
def readout(tokens, kind):
    """One vector per image from its tokens (B, T, D): [CLS], the mean of the patch tokens, or both side by side."""
    cls, mean = tokens[:, 0], tokens[:, 1:].mean(dim=1)
    return dict(cls=cls, mean=mean, both=torch.cat([cls, mean], dim=-1))[kind]       # (B, D), (B, D), (B, 2D)


@torch.no_grad()
def summarise(model, x, blocks=None):
    """Normalised images -> features (B, L, F) of the last `blocks` blocks (default: all), raw, and of the final norm."""
    tokens = model.features(x, range(model.depth - (blocks or model.depth), model.depth))
    # Users who probed the raw last layer lost much of the paper's figure: the head of pre-training read [CLS] through
    # this norm, and so should a probe. Fine-tuning drops it.
    tokens.append((model.fc_norm if model.pool == "mean" else model.norm)(tokens[-1]))
    return torch.stack([readout(t.float(), "both") for t in tokens], dim=1)


def gains(features, readouts, chunk=4096):
    """What each head multiplies its input with.  features (n, L, F) -> mean (L, F), gain (L, H, F), H = readouts x norms

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
    """Train L x S x H linear classifiers at once.  features (n, L, F), labels (n,), settings: S pairs (rate, weight decay)

    -> weight (L, S, H, C, F), bias (L, S, H, C), which apply to the raw features: mean and gain are folded in.
    The loss is the sum over heads of each one's mean cross-entropy. No head's loss contains another's weights, and AdamW
    treats every number by itself, so each head learns exactly what it would learn alone.
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
        if len(order) < batch_size:                          # a new epoch; the incomplete last batch of the old one is dropped
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
    """Scores (n, C) by the k nearest of `bank` (m, F) in cosine; each votes with exp(cosine / 0.07), as DINO does it."""
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
                   help="whose features: OUT/pretrain.pt, the encoder in OUT/vqkd.pt, an untrained network, or all of these")
    g.add_argument("--checkpoint", type=Path, help="probe this backbone, ours or a released one, instead of OUT/pretrain.pt")
    g.add_argument("--blocks", type=int, help="probe the last so many blocks; base: 12, all of them")
    g.add_argument("--rates", type=float, nargs="+", help="learning rates of AdamW, one head each; base: 1e-3 4e-3 1.6e-2")
    g.add_argument("--weight-decay", type=float, help="of AdamW; base: 1e-4")
    g.add_argument("--augment", type=int, help="random crops and flips per training image that are kept as further features; "
                                               "0, as for base: the plain image only")
    args = engine.with_recipe(p.parse_args(argv), RECIPES)
    if args.blocks < 1 or args.augment < 0 or args.weight_decay < 0 or not all(0 < r <= 10 for r in args.rates):
        raise engine.UserError("--blocks must be at least 1, --augment and --weight-decay at least 0, --rates in (0, 10]")
    return args


# --- features ---------------------------------------------------------------------------------------------------------
def load_source(name, args, device):
    """-> Source: the function `encode` from images (B, 3, H, W) in [0, 1] to features (B, L, F), and what L and F are."""
    size = args.image_size or PRESETS[args.model]["image_size"]
    settings = [(rate, args.weight_decay) for rate in args.rates]
    if name == "pixels":                                     # what a linear classifier can do without any network
        def encode(images):                                  # at most 48 px: 224 px would be 150,528 numbers an image
            small = images if size <= 48 else F.interpolate(images, size=48, mode="area")
            return small.flatten(1)[:, None]
        return Source(name, encode, ["pixels"], ["pixels"], "pixels", PIXEL_SETTINGS, size)

    normalise, paper = imagenet_normalize, "cls"
    if name == "pretrain":
        path = args.checkpoint or args.out / "pretrain.pt"
        file = engine.read_file(path, remedy=f"make it with python pretrain.py --model {args.model} --out {args.out}")
        import weights
        model, _, _ = weights.load_backbone(file, pool=None, image_size=args.image_size)
        # The paper reads [CLS] where patch aggregation trained it, and the patch mean where nothing did.
        paper = "cls" if any("cls_pt_layers." in key for key in file.get("model", file)) else "mean"
    elif name == "tokenizer":
        file = engine.read_file(args.out / "vqkd.pt", kind="vqkd",
                                remedy=f"make it with python vqkd.py --model {args.model} --out {args.out}")
        model, paper = ViT(**file["arch"]), "mean"           # its patches were trained, its [CLS] was not
        model.load_state_dict({k.removeprefix("encoder."): v for k, v in file["model"].items() if k.startswith("encoder.")})
        normalise = lambda images: images * 2 - 1            # noqa: E731  the tokenizer's own door
    else:
        engine.seed_all(args.seed)
        preset = PRESETS[args.model] | dict(image_size=size)
        preset["patch_size"] = args.patch_size or preset["patch_size"]
        model = ViT(**preset, positions="shared", pool=None)
        initialise(model, cut=1.0, convolutions=True)        # as pre-training starts
        rescale_residual_branches(model.blocks)
    model = model.to(device).eval().requires_grad_(False)
    blocks = min(args.blocks, model.depth)
    layers = [str(i + 1) for i in range(model.depth - blocks, model.depth)] + ["norm"]
    return Source(name, lambda images: summarise(model, normalise(images), blocks), layers, READOUTS, paper, settings,
                  model.image_size[0])


def extract(source, dataset, items, args, process):
    """Features (n, L, F) and labels (n,) of items [(epoch, index)], in their order, on the CPU of rank 0.

    Each process takes a contiguous share and rank 0 gathers them; on the others the result is their own share.
    """
    store = torch.float32 if args.model == "tiny" else torch.float16     # base on ImageNet: 51 GB in float16
    batches = [[items[i] for i in batch] for batch in
               data.eval_batches(len(items), args.micro_batch, process.rank, process.world_size)]
    features, labels = [], []
    for images, y in data.make_loader(dataset, batches, args.workers, process.device):
        with engine.autocast(process.device, args.amp):
            features.append(source.encode(engine.to_float(images, process.device)).to(store).cpu())
        labels.append(y)
    return gather_rows(torch.cat(features), process), gather_rows(torch.cat(labels), process)


def gather_rows(x, process, chunk=8192):
    """Rows of all processes, in the order of ranks, on rank 0; in chunks, because nccl sends from GPU memory only."""
    if process.world_size == 1:
        return x
    sizes = torch.zeros(process.world_size, dtype=torch.long, device=process.device)
    sizes[process.rank] = len(x)
    sizes, parts = engine.all_reduce_sum(sizes).tolist(), [x]
    for rank in range(1, process.world_size):
        for first in range(0, sizes[rank], chunk):
            if process.rank == rank:
                dist.send(x[first:first + chunk].to(process.device), dst=0)
            elif process.rank == 0:
                buffer = torch.empty(min(chunk, sizes[rank] - first), *x.shape[1:], dtype=x.dtype, device=process.device)
                dist.recv(buffer, src=rank)
                parts.append(buffer.cpu())
    return torch.cat(parts) if process.rank == 0 else x


# --- loop -------------------------------------------------------------------------------------------------------------
def probe(source, args, process, log):
    """Everything for one source. -> its summary and its best head, on rank 0; the other processes only extract."""
    begin, device = time.time(), process.device
    open_ = dict(data_dir=args.data_dir, download=args.download, limit=args.limit, seed=args.seed)
    plain = data.eval_transform(source.image_size)
    train_set = data.open_data(args.data, "train", plain, **open_)
    val_set = data.open_data(args.data, "val", plain, **open_)
    n, classes = len(train_set), len(train_set.classes)
    if n < 10:
        raise engine.UserError(f"{n} training images are too few to hold a tenth out: raise --limit or give more --data")

    # 1. Features of the plain training images, once; with --augment, of further random views of those to fit.
    features, labels = extract(source, train_set, [(0, i) for i in range(n)], args, process)
    fit, held = hold_out(n, args.seed)
    more = None
    if args.augment:
        crops = data.open_data(args.data, "train", data.vqkd_transform(source.image_size), **open_)
        views = [(view, i) for view in range(args.augment) for i in fit.tolist()]
        more = extract(source, crops, views, args, process)
    seconds = time.time() - begin
    val = extract(source, val_set, [(0, i) for i in range(len(val_set))], args, process)
    if process.rank > 0:                                     # the heads are small: rank 0 trains them alone
        return None, None
    fit_features, fit_labels = features[fit], labels[fit]
    if more:
        fit_features, fit_labels = torch.cat([fit_features, more[0]]), torch.cat([fit_labels, more[1]])
    print(f"{source.name}: features of {n} images, {features.shape[1]} layers x {features.shape[2]}, in {seconds:.1f} s; "
          f"{(features.nbytes + fit_features.nbytes) / 2**30:.2f} GiB of memory", flush=True)

    # 2. All heads at once, on nine tenths of the training images.
    mean, gain = gains(fit_features, source.readouts)
    steps = args.steps or args.epochs * max(1, len(fit_features) // args.batch_size)
    weight, bias = train_heads(fit_features, fit_labels, mean, gain, classes, source.settings, steps, args.batch_size,
                               args.seed, device)

    # 3. Choose on the held-out tenth: the setting of every head, and the best head of all.
    held_out = score_heads(features[held], labels[held], weight, bias)[0]                # (L, S, H)
    table = choose(held_out, source)
    best = max(table, key=lambda row: row["held_out"])
    paper = max((row for row in table if row["paper"]), key=lambda row: row["held_out"])

    # 4. Only now look at the validation labels: once, for all heads.
    top1, top5 = score_heads(*val, weight, bias)
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
    head = dict(weight=weight[layer, s, h][:, seen].cpu(), bias=bias[layer, s, h].cpu())     # (C, F'), (C,)
    return dict(source=source.name, **{k: v for k, v in best.items() if k not in ("at", "paper")},
                paper_top1=paper["top1"], paper_top5=paper["top5"], paper_reading=f"{paper['block']} {paper['readout']}",
                knn=neighbours["knn20"], **neighbours, images=n, steps=steps, seconds=time.time() - begin), head


def choose(held_out, source):
    """One row per layer, read-out and norm with the setting that is best on held-out images.  held_out (L, S, H)"""
    table = []
    for layer, block in enumerate(source.layers):
        for h, (kind, norm) in enumerate((kind, norm) for kind in source.readouts for norm in NORMS):
            s = int(held_out[layer, :, h].argmax())
            rate, decay = source.settings[s]
            table.append(dict(at=(layer, s, h), block=block, readout=kind, norm=norm, rate=rate, weight_decay=decay,
                              held_out=held_out[layer, s, h].item(), paper=block == source.layers[-1] and kind == source.paper))
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
    lines = [f"{name:10}" + "".join(f"{kind + '/' + norm:>16}" for kind, norm in columns)]
    for block in dict.fromkeys(row["block"] for row in table):
        cells = [f"{row['top1']:.1f}{'*' if row is best else ' '}{'p' if row is paper else ' '}"
                 for row in table if row["block"] == block]
        lines.append(f"{block:>10}" + "".join(f"{cell:>16}" for cell in cells))
    lines.append(f"  * chosen on held-out training images: top-1 {best['top1']:.2f}, top-5 {best['top5']:.2f} (rate {best['rate']:g}, "
                 f"weight decay {best['weight_decay']:g}); p the paper's reading: {paper['top1']:.2f}")
    lines.append("  k-NN on the paper's reading {knn10:.2f} (k = 10), {knn20:.2f} (k = 20); on the features of * {knn_best10:.2f}, "
                 "{knn_best20:.2f}".format(**neighbours))
    return "\n".join(lines)


# --- main -------------------------------------------------------------------------------------------------------------
def main(argv=None):
    args = parse_args(argv)
    if args.dry_run:
        width, layers = PRESETS[args.model]["width"], min(args.blocks, PRESETS[args.model]["depth"]) + 1
        print("\n".join(f"{k:18} {v}" for k, v in sorted(engine.plain_args(args).items())))
        print(f"{layers} layers x {len(READOUTS)} read-outs x {len(NORMS)} norms x {len(args.rates)} rates = "
              f"{layers * len(READOUTS) * len(NORMS) * len(args.rates)} heads; {layers * 2 * width} features per image")
        return None
    process = engine.init_distributed(args.device)
    args.amp = engine.resolve_amp(args.amp, process.device)
    names = (*SOURCES, "pixels") if args.source == "all" else (args.source,)
    stage = "linprobe" if "pretrain" in names else f"linprobe_{args.source}"
    done, origin = args.out / f"{stage}.pt", args.checkpoint or args.out / ("vqkd.pt" if stage.endswith("tokenizer") else "pretrain.pt")
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
            print(f"{r['source']:>10} {r['top1']:7.2f} {r['paper_top1']:7.2f} {r['knn']:7.2f}   block {r['block']}, {r['readout']}, {r['norm']}")
    summary, head = results[0]
    engine.finish(stage, args, engine.describe_run(stage, args) | dict(
        model=head, block=summary["block"], readout=summary["readout"], norm=summary["norm"], rate=summary["rate"],
        result=summary, sources=[r for r, _ in results]))
    return summary


if __name__ == "__main__":
    engine.run(main)
