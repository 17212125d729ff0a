"""The paper's ablations at tiny size, each row a small change to a short run, over several seeds: what matters, and
does it go the way the paper says?

    row = flags of stage 1, flags of stage 2, perhaps a few functions exchanged, and what the paper states about it
    tokenizer --> pre-training --> linear probe and k-NN          for every row and seed, then one table with verdicts

A row that changes only stage 2 shares the tokenizer of its seed. What has no flag (a method without its l2, a start
without k-means, regression instead of codes) is exchanged from here, so that the stage files stay free of it. Every
stage resumes and a finished one is not run again: stop this at any time and repeat the command.

    python ablate.py                                 # all rows, seeds 0 1 2: hours on two cores
    python ablate.py --rows "no aggregation" "l = 2" --seeds 0 1      # in two shells with other seeds: twice as fast
    python ablate.py --table --results results/ablations.md           # only the table, from what is in runs/ablations
"""
import argparse
import collections
import contextlib
import json
import math
import random
import types
from pathlib import Path

import torch
import torch.nn.functional as F

from support import data, engine
from support.shapes import Shapes
import linprobe
import pretrain
from support import teachers
import vqkd

RUNS = Path("runs/ablations")
# About half of what tiny usually sees, enough for the masked losses to leave the level of the codes' entropy.
# Batches and warm-up (48 and 75 updates) as when the table was made: tiny's recipe until 2026-11-25.
BATCH = "--batch-size 64 --micro-batch 64 "
SHORT = {stage: flags.split() for stage, flags in dict(
    vqkd=BATCH + "--steps 240 --continuous-steps 100 --lr 2e-3 --warmup-epochs 0.6",
    pretrain=BATCH + "--steps 300 --warmup-epochs 0.75", linprobe="--limit 6000 --blocks 2").items()}


# --- what has no flag -------------------------------------------------------------------------------------------------
def without_l2():
    """Eq. (1) without l2(.): plain Euclidean distance, plain means as codes, vectors of any length."""
    def nearest_code(h, codebook, chunk=16384):
        z = [torch.cdist(part, codebook.float()).argmin(dim=-1) for part in h.float().flatten(0, -2).split(chunk)]
        return torch.cat(z).view(h.shape[:-1])

    def ema_update(codebook, sums, counts, decay):
        mean = sums / counts.clamp(min=1)[:, None]
        return torch.where((counts > 0)[:, None], decay * codebook + (1 - decay) * mean, codebook)

    def kmeans(x, centres, iterations=10):
        for _ in range(iterations):
            sums, counts = vqkd.code_sums(x, nearest_code(x, centres), len(centres))
            centres = torch.where((counts > 0)[:, None], sums / counts.clamp(min=1)[:, None], centres)
        return centres, counts

    return {"vqkd.l2": lambda x: x, "vqkd.nearest_code": nearest_code, "vqkd.ema_update": ema_update,
            "vqkd.kmeans": kmeans}


def without_kmeans():
    """The codes start as random unit vectors."""
    def start(model, dataset, args, process):
        weight = model.quantize.embedding.weight
        weight.copy_(F.normalize(torch.randn(weight.shape, generator=torch.Generator().manual_seed(args.seed)), dim=-1))
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
    """No codes: both heads regress a teacher's features at hidden patches, as MAE does with pixels, MaskFeat with HOG.
    The loss is the mean-squared error to the features, scaled to mean square 1 (patch by patch)."""
    def stand_in(path, device="cpu"):
        encoder = vqkd.load_tokenizer(path, device).encoder              # only for its sizes
        teacher = teachers.build_teacher(target, encoder.grid, encoder.patch_size, device)
        encode = lambda images: F.normalize(teacher(images), dim=-1) * teacher.dim ** 0.5            # noqa: E731
        return types.SimpleNamespace(encoder=encoder, encode=encode,
                                     quantize=types.SimpleNamespace(cluster_size=torch.zeros(teacher.dim)))

    def loss(o, o_cls, t):
        loss_mim = F.mse_loss(o.float(), t)
        loss_cls = F.mse_loss(o_cls.float(), t)
        return loss_mim + loss_cls, (loss_mim.detach(), loss_cls.detach())

    return {"pretrain.load_tokenizer": stand_in, "pretrain.mim_loss": loss, "pretrain.commonest_codes": lambda *_: None,
            "pretrain.accuracy": lambda o, t: math.nan, "pretrain.evaluate": lambda *_: {}}


# --- the rows ---------------------------------------------------------------------------------------------------------
# claims: (column, "+" or "-", other row): this row's column is expected above or below the other's. source: who expects
# it, the paper's text (REFERENCE.md section 8) or its argument as we read it.
Row = collections.namedtuple("Row", "name vqkd pretrain change claims source", defaults=((), (), None, (), "paper"))
OURS = "our reading"
BASE = "base"
ROWS = [
    Row(BASE),
    # Patch aggregation (Section 2.3): better than none, above all in the probe; a shared head, of 1 or 2 blocks.
    Row("no aggregation", pretrain=["--no-aggregation"], claims=[("paper_top1", "-", BASE), ("top1", "-", BASE)]),
    Row("head depth 3", pretrain=["--head-depth", "3"], claims=[("paper_top1", "-", BASE)]),
    Row("head depth 1", pretrain=["--head-depth", "1"], claims=[("paper_top1", "+", "head depth 3")]),
    Row("l = 2", pretrain=["--early-layer", "2"]),
    Row("l = 5", pretrain=["--early-layer", "5"]),
    # What is predicted at hidden patches: codes of features, as here, codes of pixels (BEiT), or no codes at all.
    Row("teacher pixel", vqkd=["--teacher", "pixel"], claims=[("top1", "-", BASE), ("paper_top1", "-", BASE)],
        source=OURS),
    Row("regress pixels", change=lambda: regress("pixel"), claims=[("top1", "-", BASE), ("paper_top1", "-", BASE)],
        source=OURS),
    Row("regress HOG (= the teacher)", change=lambda: regress("hog")),
    Row("BEiT-like: teacher pixel, no aggregation", vqkd=["--teacher", "pixel"], pretrain=["--no-aggregation"],
        claims=[("top1", "-", BASE), ("paper_top1", "-", BASE)], source=OURS),
    # The tokenizer (Section 2.2): a deep decoder fits better, but uses fewer codes and serves less; few dimensions
    # raise the use of codes.
    Row("decoder depth 3", vqkd=["--decoder-depth", "3"],
        claims=[("cosine", "+", BASE), ("perplexity", "-", BASE), ("top1", "-", BASE)]),
    Row("decoder depth 6", vqkd=["--decoder-depth", "6"],
        claims=[("cosine", "+", BASE), ("perplexity", "-", BASE), ("top1", "-", BASE)]),
    Row("code dimension 8", vqkd=["--code-dim", "8"], claims=[("perplexity", "+", BASE)]),
    Row("code dimension 64", vqkd=["--code-dim", "64"], claims=[("perplexity", "-", BASE)]),
    Row("without l2", change=without_l2),
    Row("single patches hidden", change=single_patches),
    Row("separate head", pretrain=["--separate-head"], claims=[("paper_top1", "-", BASE)]),
    Row("75 % hidden", pretrain=["--mask-patches", "27"]),
    Row("20 % hidden", pretrain=["--mask-patches", "7"]),
    Row("no warm-up without quantizer", vqkd=["--continuous-steps", "0"]),
    Row("EMA decay 0.99", vqkd=["--decay", "0.99"]),
    Row("without k-means start", change=without_kmeans),
    Row("no restarts of dead codes", vqkd=["--restart-dead-codes", "0"]),
    Row("K = 16", vqkd=["--codes", "16"]),
    Row("K = 256", vqkd=["--codes", "256"]),
    Row("code dimension 32", vqkd=["--code-dim", "32"], claims=[("perplexity", "-", BASE)]),
    Row("decoder depth 2", vqkd=["--decoder-depth", "2"], claims=[("cosine", "+", BASE), ("perplexity", "-", BASE)]),
    Row("55 % hidden", pretrain=["--mask-patches", "20"]),
]


# --- running ----------------------------------------------------------------------------------------------------------
def folder(name, seed):
    """The run folder of a row and seed: runs/ablations/75-hidden-0"""
    return RUNS / f"{'-'.join(''.join(c if c.isalnum() else ' ' for c in name).split())}-{seed}"


def tokenizer_of(row):
    """The name of the first row with the same stage 1, whose tokenizer serves this one, too."""
    def stage_1(r):
        changed = [k for k in (r.change() if r.change else {}) if k.startswith("vqkd.")]
        return list(r.vqkd), changed
    return next(r.name for r in ROWS if stage_1(r) == stage_1(row))


@contextlib.contextmanager
def exchanged(change):
    """{"module.name": function}: in place of the module's own, until the block ends."""
    modules = dict(vqkd=vqkd, pretrain=pretrain, data=data)
    places = [(modules[key.partition(".")[0]], key.partition(".")[2], new) for key, new in change.items()]
    before = [getattr(module, name) for module, name, _ in places]
    try:
        for module, name, new in places:
            setattr(module, name, new)
        yield
    finally:
        for (module, name, _), old in zip(places, before):
            setattr(module, name, old)


def call(stage, argv):
    """A stage's main, as from the command line; one that is already done says so and exits with 0."""
    try:
        stage.main([str(a) for a in argv])
    except SystemExit as done:
        if done.code:
            raise


def run_row(row, seed, run_flags):
    """Both stages and the probe for one row and seed; what is there already is left as it is."""
    home, tokenizer = folder(row.name, seed), folder(tokenizer_of(row), seed) / "vqkd.pt"
    with exchanged(row.change() if row.change else {}):
        # No workers: one started afresh (spawn) would import the modules anew, and know nothing of the exchange.
        common = ["--seed", seed, "--workers", 0, *run_flags]
        call(vqkd, [*SHORT["vqkd"], *row.vqkd, "--out", tokenizer.parent, *common])
        call(pretrain, [*SHORT["pretrain"], *row.pretrain, "--tokenizer", tokenizer, "--out", home, *common])
    call(linprobe, [*SHORT["linprobe"], "--out", home, *common])


class DrawnOnce(Shapes):
    """The shapes, drawn once for all rows of this process."""

    kept = {}

    def load(self):
        key = (self.split, self.count, self.max_rotation, self.pictures)
        if key not in self.kept:
            self.kept[key] = super().load()
        return self.kept[key]


# --- the table --------------------------------------------------------------------------------------------------------
COLUMNS = {              # key: (title, digits)
    "cosine": ("cosine x 100", 1), "codes_used": ("codes used", 1), "perplexity": ("perplexity", 1),
    "mask_acc": ("hidden named right", 1), "top1": ("probe, chosen", 1), "paper_top1": ("probe, paper's reading", 1),
    "knn": ("k-NN", 1), "seconds": ("seconds, both stages", 0)}


def read_row(row, seed):
    """-> {column: value} of a finished run from its logs, or None."""
    logs = dict(vqkd=folder(tokenizer_of(row), seed), pretrain=folder(row.name, seed), linprobe=folder(row.name, seed))
    if row.change and "pretrain.load_tokenizer" in row.change():
        del logs["vqkd"]                                     # no codes, so no tokenizer in its cost and columns
    found = {}
    for stage, home in logs.items():
        path = home / f"{stage}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        summary = next((x for x in lines if "summary" in x), None)
        if summary is None:
            return None
        # The clock of a log starts again where a run was resumed: the parts add up.
        times = [x["time"] for x in lines if "time" in x]
        took = sum(a for a, b in zip(times, times[1:] + [0.0]) if b < a)
        seconds = found.get("seconds", 0) + (took if stage != "linprobe" else 0)
        found |= {k: v for k, v in summary.items() if k in COLUMNS} | dict(seconds=seconds, commit=lines[0]["commit"])
    return found | (dict(cosine=100 * found["cosine"]) if "cosine" in found else {})


def mean_and_error(values):
    """-> mean and its standard error over seeds (nan for a single one)."""
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else math.nan
    return mean, spread / math.sqrt(len(values))


CRITICAL_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}           # two-sided, 5 %, by degrees of freedom: seeds - 1


def verdict(own, other, sign):
    """"same", "opposite" or "within noise": the difference seed by seed, in Student's t-test at the 5 % level.

    own, other: {seed: value}; sign: "+" where the row is expected above the other. Pairs share pictures and start, so
    that much of the noise falls out. Two standard errors would be too easy: with three seeds chance alone exceeds
    them in 18 % of all comparisons.
    """
    seeds = sorted(own.keys() & other.keys())
    if len(seeds) < 2:
        return "too few seeds", math.nan, math.nan
    mean, error = mean_and_error([own[s] - other[s] for s in seeds])
    if abs(mean) <= CRITICAL_T.get(len(seeds) - 1, 2.6) * error:
        return "within noise", mean, error
    return "same" if (mean > 0) == (sign == "+") else "opposite", mean, error


def write_table(seeds, out):
    """results/ablations.md and .jsonl from the logs: a line per row, then the paper's claims, one by one."""
    results = {row.name: {s: r for s in seeds if (r := read_row(row, s)) is not None} for row in ROWS}
    done = [row for row in ROWS if results[row.name]]
    if not done:
        raise engine.UserError(f"{RUNS} holds no finished run of seeds {seeds}: run python ablate.py first")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".jsonl").write_text("".join(
        json.dumps(dict(row=row.name, seed=s) | {k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()})
        + "\n" for row in done for s, r in results[row.name].items()))
    titles = " | ".join(title for title, _ in COLUMNS.values())
    lines = [f"| row | seeds | {titles} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for row in done:
        cells = []
        for key, (_, digits) in COLUMNS.items():
            values = [r[key] for r in results[row.name].values() if key in r]
            mean, error = mean_and_error(values) if values else (None, None)
            spread = "" if not values or math.isnan(error) else f" ± {error:.{digits}f}"
            cells.append("--" if mean is None else f"{mean:.{digits}f}{spread}")
        lines.append(f"| {row.name} | {len(results[row.name])} | " + " | ".join(cells) + " |")
    lines += ["", "| expected | column | here: difference, seed by seed | verdict |", "|---|---|---|---|"]
    for row in done:
        for key, sign, other in row.claims:
            own, against = ({s: r[key] for s, r in results[name].items() if key in r} for name in (row.name, other))
            word, mean, error = verdict(own, against, sign)
            lines.append(f"| {row.name} {'above' if sign == '+' else 'below'} {other} ({row.source}) | "
                         f"{COLUMNS[key][0]} | {mean:+.1f} ± {error:.1f} | {word} |")
    head = out.read_text().split("<!-- tables -->")[0] if out.exists() else "# Ablations\n\n"
    out.write_text(head + "<!-- tables -->\n\n" + "\n".join(lines) + "\n")
    print("\n".join(lines))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", nargs="+", default=[row.name for row in ROWS], help="names of rows; default: all")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--table", action="store_true", help="run nothing, only write the table")
    p.add_argument("--results", type=Path, default=RUNS / "ablations.md", help="the table to write; .jsonl beside it")
    p.add_argument("--list", action="store_true", help="print the rows and what the paper says of each")
    args, run_flags = p.parse_known_args(argv)               # further flags go to both stages and the probe
    engine.check_ranges(args, [("seeds", 0, 2**32 - 1)])
    if unknown := set(args.rows) - {row.name for row in ROWS}:
        raise engine.UserError(f"there is no row {', '.join(sorted(unknown))}: python ablate.py --list names them")
    if args.list:
        print("\n".join(f"{row.name:42} {' '.join([*row.vqkd, *row.pretrain])}" for row in ROWS))
        return
    if not args.table:
        with exchanged({"shapes.Shapes": DrawnOnce}):
            for row in (row for row in ROWS if row.name in args.rows):
                for seed in args.seeds:
                    print(f"--- {row.name}, seed {seed}", flush=True)
                    run_row(row, seed, run_flags)
    write_table(args.seeds, args.results)


if __name__ == "__main__":
    engine.run(main)
