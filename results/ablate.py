"""The paper's ablations at tiny size: small changes to a short run, over several seeds.

What matters, and does it matter in the direction that the paper says?

    row = flags of stage 1, flags of stage 2, perhaps exchanged functions, and the paper's claims
    tokenizer --> pre-training --> linear probe and k-NN     for each row and seed, then one table

A row that changes only stage 2 shares the tokenizer of its seed. Some changes have no flag (no l2,
no k-means at the start, regression instead of codes). For them this file exchanges functions of the
stages, so that the stage files need not know. A finished stage is not run again: you can stop at
any time and repeat the command.

    python -m results.ablate                             # all rows, seeds 0 1 2: hours on two cores
    python -m results.ablate --rows "no aggregation" "l = 2" --seeds 0 1
    python -m results.ablate --table --results results/ablations.md      # only the table

Further flags go to both stages and the probe. Two shells with different seeds take half the time.
"""
import collections
import contextlib
import math
import random
import types
from pathlib import Path

import torch
import torch.nn.functional as F

import linprobe
import pretrain
import vqkd
from results.tables import mean_and_error, read_lines, write_below, write_lines
from support import data, teachers
from support.args import Parser, whole
from support.files import UserError
from support.process import launch
from support.shapes import Shapes

RUNS = Path("runs/ablations")
# About half of what tiny usually sees. After it the masked losses have left their plateau.
# Batches and warm-up (48 and 75 updates) are those of the table: tiny's recipe until 2026-11-25.
BATCH = "--batch-size 64 --micro-batch 64 "
SHORT = {
    "vqkd": BATCH + "--steps 240 --continuous-steps 100 --lr 2e-3 --warmup-epochs 0.257 "
            "--restart-dead-codes 20",
    "pretrain": BATCH + "--steps 300 --warmup-epochs 0.401",
    "linprobe": "--limit 6000 --blocks 2",
}


# --- changes without a flag -----------------------------------------------------------------------
# Each returns {"module.name": function}, see exchanged.
def without_l2():
    """Eq. (1) without l2(.): Euclidean distance, plain means as codes, vectors of any length."""
    def nearest_code(h, codebook):
        distance = torch.cdist(h.float().flatten(0, -2), codebook.float())
        return distance.argmin(dim=-1).view(h.shape[:-1])

    def means(x, z, centres):
        sums, counts = vqkd.code_sums(x, z, len(centres))
        return sums / counts.clamp(min=1)[:, None], counts

    def ema_update(codebook, sums, counts, decay):
        mean = sums / counts.clamp(min=1)[:, None]
        moved = decay * codebook + (1 - decay) * mean
        return torch.where((counts > 0)[:, None], moved, codebook)

    def kmeans(x, centres, iterations=10):
        for _ in range(iterations):
            mean, counts = means(x, nearest_code(x, centres), centres)
            centres = torch.where((counts > 0)[:, None], mean, centres)
        return centres, counts

    return {"vqkd.l2": lambda x: x, "vqkd.nearest_code": nearest_code,
            "vqkd.ema_update": ema_update, "vqkd.kmeans": kmeans}


def without_kmeans():
    """The codes start as random unit vectors."""
    def start(model, dataset, args, run):
        weight = model.quantize.embedding.weight
        generator = torch.Generator().manual_seed(args.seed)
        weight.copy_(F.normalize(torch.randn(weight.shape, generator=generator), dim=-1))
        model.quantize.cluster_size.fill_(1.0)
    return {"vqkd.kmeans_start": start}


def single_patches():
    """Hidden patches drawn one by one instead of in blocks."""
    def mask(gh, gw, count, *_):
        hidden = torch.zeros(gh * gw, dtype=torch.bool)
        hidden[random.sample(range(gh * gw), count)] = True
        return hidden.view(gh, gw)
    return {"pretrain.sample_block_mask": mask}


def regress(target):
    """No codes: both heads regress a teacher's features at hidden patches.

    MAE does so with pixels, MaskFeat with HOG. The features of each patch are scaled to mean square
    1; the loss is the mean squared error. The "codes" that the loop then sees are the numbers of
    the patches of the batch, by which the loss finds their features.
    """
    latest = {}                              # the features of the batch, (B N, C)

    def stand_in(path, device="cpu"):
        tokenizer = vqkd.load_tokenizer(path, device)        # only for its sizes
        encoder = tokenizer.encoder
        teacher = teachers.build_teacher(target, encoder.grid, encoder.patch_size, device)

        def encode(images):
            t = F.normalize(teacher(images), dim=-1) * teacher.dim ** 0.5        # (B, N, C)
            latest["t"] = t.flatten(0, 1)
            return torch.arange(len(latest["t"]), device=t.device).view(t.shape[:2])

        quantize = types.SimpleNamespace(cluster_size=torch.zeros(teacher.dim))
        return types.SimpleNamespace(encoder=encoder, encode=encode, quantize=quantize,
                                     arch=tokenizer.arch)

    def loss(o, o_cls, z):
        t = latest["t"][z]                                   # (M, C)
        loss_mim = F.mse_loss(o.float(), t)
        loss_cls = F.mse_loss(o_cls.float(), t)
        return loss_mim + loss_cls, (loss_mim.detach(), loss_cls.detach())

    return {"pretrain.load_tokenizer": stand_in, "pretrain.mim_loss": loss,
            "pretrain.commonest_codes": lambda *_: None,
            "pretrain.accuracy": lambda o, z: math.nan, "pretrain.evaluate": lambda *_: {}}


# --- the rows -------------------------------------------------------------------------------------
# claims: (column, "+" or "-", other row): this row's column is expected above or below the other's.
# source: who expects it, the paper's text or its argument as we read it.
Row = collections.namedtuple("Row", "name vqkd pretrain change claims source",
                             defaults=("", "", None, (), "paper"))
OURS = "our reading"
BASE = "base"
PROBES_BELOW_BASE = [("top1", "-", BASE), ("paper_top1", "-", BASE)]
DEEP_DECODER = [("cosine", "+", BASE), ("perplexity", "-", BASE), ("top1", "-", BASE)]
ROWS = [
    Row(BASE),
    # Patch aggregation (Section 2.3): better than none, above all in the probe. Shared head.
    Row("no aggregation", pretrain="--no-aggregation",
        claims=[("paper_top1", "-", BASE), ("top1", "-", BASE)]),
    Row("head depth 3", pretrain="--head-depth 3", claims=[("paper_top1", "-", BASE)]),
    Row("head depth 1", pretrain="--head-depth 1", claims=[("paper_top1", "+", "head depth 3")]),
    Row("l = 2", pretrain="--early-layer 2"),
    Row("l = 5", pretrain="--early-layer 5"),
    # Targets of hidden patches: codes of features (here), codes of pixels (BEiT), or no codes.
    Row("teacher pixel", vqkd="--teacher pixel", claims=PROBES_BELOW_BASE, source=OURS),
    Row("regress pixels", change=lambda: regress("pixel"), claims=PROBES_BELOW_BASE, source=OURS),
    Row("regress HOG (= the teacher)", change=lambda: regress("hog")),
    Row("BEiT-like: teacher pixel, no aggregation", vqkd="--teacher pixel",
        pretrain="--no-aggregation", claims=PROBES_BELOW_BASE, source=OURS),
    # The tokenizer (Section 2.2): a deep decoder fits better, but uses fewer codes and serves less.
    # A small code dimension raises the use of codes.
    Row("decoder depth 3", vqkd="--decoder-depth 3", claims=DEEP_DECODER),
    Row("decoder depth 6", vqkd="--decoder-depth 6", claims=DEEP_DECODER),
    Row("code dimension 8", vqkd="--code-dim 8", claims=[("perplexity", "+", BASE)]),
    Row("code dimension 64", vqkd="--code-dim 64", claims=[("perplexity", "-", BASE)]),
    Row("without l2", change=without_l2),
    Row("single patches hidden", change=single_patches),
    Row("separate head", pretrain="--separate-head", claims=[("paper_top1", "-", BASE)]),
    Row("75 % hidden", pretrain="--mask-patches 27"),
    Row("20 % hidden", pretrain="--mask-patches 7"),
    Row("no warm-up without quantizer", vqkd="--continuous-steps 0"),
    Row("EMA decay 0.99", vqkd="--decay 0.99"),
    Row("without k-means start", change=without_kmeans),
    Row("no restarts of dead codes", vqkd="--restart-dead-codes 0"),
    Row("K = 16", vqkd="--codes 16"),
    Row("K = 256", vqkd="--codes 256"),
    Row("code dimension 32", vqkd="--code-dim 32", claims=[("perplexity", "-", BASE)]),
    Row("decoder depth 2", vqkd="--decoder-depth 2",
        claims=[("cosine", "+", BASE), ("perplexity", "-", BASE)]),
    Row("55 % hidden", pretrain="--mask-patches 20"),
]


# --- running --------------------------------------------------------------------------------------
def folder(name, seed):
    """The run folder of a row and seed: runs/ablations/75-hidden-0"""
    words = "".join(c if c.isalnum() else " " for c in name).split()
    return RUNS / f"{'-'.join(words)}-{seed}"


def changes(row):
    """The functions that a row exchanges."""
    return row.change() if row.change else {}


def tokenizer_of(row):
    """The name of the first row with the same stage 1. Its tokenizer serves this row, too."""
    def stage_1(r):
        return r.vqkd, [name for name in changes(r) if name.startswith("vqkd.")]
    return next(r.name for r in ROWS if stage_1(r) == stage_1(row))


@contextlib.contextmanager
def exchanged(change):
    """{"module.name": function} stand in for the module's own until the block ends."""
    modules = dict(vqkd=vqkd, pretrain=pretrain, data=data, teachers=teachers)
    with contextlib.ExitStack() as stack:
        for key, new in change.items():
            module, name = key.split(".")
            stack.callback(setattr, modules[module], name, getattr(modules[module], name))
            setattr(modules[module], name, new)
        yield


def call(stage, *flags):
    """A stage's main, as from the command line. A finished stage says so and exits with 0."""
    try:
        stage.main([str(flag) for flag in flags])
    except SystemExit as done:
        if done.code:
            raise


def run_row(row, seed, run_flags):
    """Both stages and the probe for one row and seed. Finished ones are left as they are."""
    home = folder(row.name, seed)
    tokenizer = folder(tokenizer_of(row), seed) / "vqkd.pt"
    # No workers: one that is started anew (spawn) imports the modules without the exchange.
    common = ["--seed", seed, "--workers", 0, *run_flags]
    with exchanged(changes(row)):
        call(vqkd, *SHORT["vqkd"].split(), *row.vqkd.split(), "--out", tokenizer.parent, *common)
        call(pretrain, *SHORT["pretrain"].split(), *row.pretrain.split(),
             "--tokenizer", tokenizer, "--out", home, *common)
    call(linprobe, *SHORT["linprobe"].split(), "--out", home, *common)


class DrawnOnce(Shapes):
    """The shapes, drawn once for all rows of this process."""

    kept = {}

    def load(self):
        key = self.split, self.count, self.max_rotation
        if key not in self.kept:
            self.kept[key] = super().load()
        return self.kept[key]


# --- the table ------------------------------------------------------------------------------------
COLUMNS = {  # key of the summaries: (title, digits)
    "cosine": ("cosine x 100", 1),
    "codes_used": ("codes used", 1),
    "perplexity": ("perplexity", 1),
    "mask_acc": ("hidden named right", 1),
    "top1": ("probe, chosen", 1),
    "paper_top1": ("probe, paper's reading", 1),
    "knn": ("k-NN", 1),
    "seconds": ("seconds, both stages", 0),
}


def read_row(row, seed):
    """-> {column: value} of a finished run from its logs, or None."""
    home = folder(row.name, seed)
    logs = dict(vqkd=folder(tokenizer_of(row), seed), pretrain=home, linprobe=home)
    if "pretrain.load_tokenizer" in changes(row):
        del logs["vqkd"]                     # this row uses no codes
    found = dict(seconds=0)
    for stage, place in logs.items():
        lines = read_lines(place / f"{stage}.jsonl")
        summary = next((line for line in lines if "summary" in line), None)
        if summary is None:
            return None
        if stage != "linprobe":
            found["seconds"] += seconds_of(lines)
        found |= {key: value for key, value in summary.items() if key in COLUMNS}
        found["commit"] = lines[0]["commit"]
    if "cosine" in found:
        found["cosine"] *= 100
    return found


def seconds_of(lines):
    """The clock of a log starts at 0 again where a run was resumed. The parts are added up."""
    times = [line["time"] for line in lines if "time" in line] + [0.0]
    return sum(a for a, b in zip(times, times[1:], strict=False) if b < a)


CRITICAL_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}   # two-sided, 5 %, by degrees of freedom


def verdict(own, other, sign):
    """-> "same", "opposite" or "within noise", mean difference, its standard error

    own, other: {seed: value}; sign: "+" if the row is expected above the other. Differences are
    taken seed by seed, because equal seeds share pictures and start: much of the noise cancels.
    Student's t-test at the 5 % level decides. Two standard errors would be too few: with three
    seeds, chance alone exceeds them in 18 % of all comparisons.
    """
    seeds = sorted(own.keys() & other.keys())
    if len(seeds) < 2:
        return "too few seeds", math.nan, math.nan
    mean, error = mean_and_error([own[s] - other[s] for s in seeds])
    if abs(mean) <= CRITICAL_T.get(len(seeds) - 1, 2.6) * error:
        return "within noise", mean, error
    as_expected = (mean > 0) == (sign == "+")
    return "same" if as_expected else "opposite", mean, error


def table_line(name, records):
    """One row of the table: mean ± standard error of each column over the seeds."""
    cells = []
    for key, (_, digits) in COLUMNS.items():
        values = [record[key] for record in records if key in record]
        if not values:
            cells.append("--")
            continue
        mean, error = mean_and_error(values)
        spread = "" if math.isnan(error) else f" ± {error:.{digits}f}"
        cells.append(f"{mean:.{digits}f}{spread}")
    return f"| {name} | {len(records)} | " + " | ".join(cells) + " |"


def claim_line(row, claim, results):
    """One line on something that is expected of a row, and whether it holds here."""
    key, sign, other = claim
    own = {seed: record[key] for seed, record in results[row.name].items() if key in record}
    against = {seed: record[key] for seed, record in results[other].items() if key in record}
    word, mean, error = verdict(own, against, sign)
    side = "above" if sign == "+" else "below"
    return (f"| {row.name} {side} {other} ({row.source}) | {COLUMNS[key][0]} | "
            f"{mean:+.1f} ± {error:.1f} | {word} |")


def write_table(seeds, out):
    """OUT and OUT.jsonl from the logs: a line per row, then what is expected, line by line."""
    results = {}
    for row in ROWS:
        records = {seed: read_row(row, seed) for seed in seeds}
        results[row.name] = {seed: record for seed, record in records.items() if record}
    done = [row for row in ROWS if results[row.name]]
    if not done:
        raise UserError(f"{RUNS} holds no finished run of seeds {seeds}: run python -m "
                        f"results.ablate first")

    titles = " | ".join(title for title, _ in COLUMNS.values())
    lines = [f"| row | seeds | {titles} |", "|---" * (len(COLUMNS) + 2) + "|"]
    lines += [table_line(row.name, list(results[row.name].values())) for row in done]
    lines += ["", "| expected | column | here: difference, seed by seed | verdict |",
              "|---|---|---|---|"]
    lines += [claim_line(row, claim, results) for row in done for claim in row.claims]

    out.parent.mkdir(parents=True, exist_ok=True)
    records = []
    for row in done:
        for seed, record in results[row.name].items():
            numbers = {k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}
            records.append(dict(row=row.name, seed=seed) | numbers)
    write_lines(out.with_suffix(".jsonl"), records)
    write_below(out, lines)
    print("\n".join(lines))


def main(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--rows", nargs="+", default=[row.name for row in ROWS], help="names; default: all")
    add("--seeds", nargs="+", type=whole(0, 2**32 - 1), default=[0, 1, 2])
    add("--table", action="store_true", help="run nothing, only write the table")
    add("--results", type=Path, default=RUNS / "ablations.md",
        help="the table to write; .jsonl beside it")
    add("--list", action="store_true", help="print the rows and their flags")
    args, run_flags = p.parse_known_args(argv)
    if unknown := set(args.rows) - {row.name for row in ROWS}:
        raise UserError(f"there is no row {', '.join(sorted(unknown))}: "
                        f"python -m results.ablate --list names them")
    if args.list:
        for row in ROWS:
            print(f"{row.name:42} {row.vqkd} {row.pretrain}".rstrip())
        return
    if not args.table:
        with exchanged({"data.Shapes": DrawnOnce}):
            for row in [row for row in ROWS if row.name in args.rows]:
                for seed in args.seeds:
                    print(f"--- {row.name}, seed {seed}", flush=True)
                    run_row(row, seed, run_flags)
    write_table(args.seeds, args.results)


if __name__ == "__main__":
    launch(main)
