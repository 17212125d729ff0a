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
    python -m results.ablate --collect                   # only records and page, from the logs

Further flags go to both stages and the probe. Two shells with different seeds take half the time:
give both --no-page, then collect.
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
from results import make
from results.runs import FACTS, seconds_of
from results.tables import (
    RESULTS, cell, fill, made_on, read_lines, table, write_lines)
from support import data, teachers
from support.args import Parser, whole
from support.files import UserError
from support.probe import mean_and_error
from support.process import launch
from support.shapes import Shapes

RUNS = Path("runs/ablations")
# Shorter than tiny. What is a share of its recipe (warm-ups, steps without codes) shrinks, too.
SHORT = {"vqkd": "--steps 480", "pretrain": "--steps 600",
         "linprobe": "--limit 6000 --blocks 2"}


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


def commands(row, seed, run_flags=()):
    """-> {stage: its command line} of a row and seed"""
    tokenizer = folder(tokenizer_of(row), seed) / "vqkd.pt"
    flags = {"vqkd": f"{row.vqkd} --out {tokenizer.parent}",
             "pretrain": f"{row.pretrain} --tokenizer {tokenizer} --out {folder(row.name, seed)}",
             "linprobe": f"--out {folder(row.name, seed)}"}
    # No workers: one that is started anew (spawn) imports the modules without the exchange.
    common = f"--seed {seed} --workers 0"
    return {stage: " ".join(f"python {stage}.py {SHORT[stage]} {own} {common}".split()
                            + list(run_flags)) for stage, own in flags.items()}


def run_row(row, seed, run_flags):
    """Both stages and the probe for one row and seed. Finished ones are left as they are."""
    stages = dict(vqkd=vqkd, pretrain=pretrain, linprobe=linprobe)
    for stage, line in commands(row, seed, run_flags).items():
        change = {} if stage == "linprobe" else changes(row)
        with exchanged(change):
            call(stages[stage], *line.split()[2:])


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
    """-> the record of a finished run: where it comes from and {column: value}; or None."""
    home = folder(row.name, seed)
    logs = dict(vqkd=folder(tokenizer_of(row), seed), pretrain=home, linprobe=home)
    if "pretrain.load_tokenizer" in changes(row):
        del logs["vqkd"]                     # this row uses no codes
    lines = commands(row, seed)
    record = dict(row=row.name, seed=seed, seconds=0, recipes={},
                  command=f'python -m results.ablate --rows "{row.name}" --seeds {seed}')
    for stage, place in logs.items():
        log = read_lines(place / f"{stage}.jsonl")
        summary = next((line for line in log if "summary" in line), None)
        if summary is None:
            return None
        first = log[0]
        record |= {name: first[name] for name in FACTS if name in first}
        record |= dict(amp=first["args"]["amp"])
        record["recipes"][lines[stage]] = first["args"]
        if stage != "linprobe":
            record["seconds"] += round(seconds_of(log), 1)
        record |= {key: value for key, value in summary.items() if key in COLUMNS}
    if "cosine" in record:
        record["cosine"] = round(100 * record["cosine"], 4)
    return record


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
    cells = [cell([record[key] for record in records if key in record], digits)
             for key, (_, digits) in COLUMNS.items()]
    return [name, len(records), *cells]


def claim_line(row, claim, results):
    """One line on something that is expected of a row, and whether it holds here."""
    key, sign, other = claim
    own = {seed: record[key] for seed, record in results[row.name].items() if key in record}
    against = {seed: record[key] for seed, record in results[other].items() if key in record}
    word, mean, error = verdict(own, against, sign)
    side = "above" if sign == "+" else "below"
    return [f"{row.name} {side} {other} ({row.source})", COLUMNS[key][0],
            f"{mean:+.1f} ± {error:.1f}", word]


PAGE = """# The paper's ablations at tiny size

`python -m results.ablate` (built-in pictures, `--model tiny`): every row is a small change to one
short run, over the seeds that its column counts; mean ± standard error. Short means
`vqkd.py {vqkd}` and `pretrain.py {pretrain}`, then a probe with `{linprobe}`. {made_on} Other work
shared the machine, so the seconds are those of a busy one. Records:
[ablations.jsonl](ablations.jsonl).

**Read it with care: these runs are short and the seeds scatter**, so a difference must be large to
be seen. Verdicts are Student's t-tests at the 5 % level on differences seed by seed. Where all
codes are in use, perplexity stands in for the paper's "codebook usage".
*Probe, chosen*: block, read-out, norm and rate best on a tenth of the training images; *paper's
reading*: [CLS] of the last layer where patch aggregation trained it, else the patch mean. "Hidden
named right" compares rows with the same tokenizer only, "cosine" rows with the same teacher. A
direction that the paper's text does not state has no line below, or is marked as our reading of
its argument. The comparison of aggregation and of the pixel teacher at full length is in
[README.md](README.md).

{rows}

Of {claims} expectations {same} hold beyond noise, {opposite} are opposite beyond noise, the others
lie within it.

{verdicts}
"""


def page(records):
    """The text of results/ablations.md: a line per row, then what is expected, line by line."""
    found = {row.name: {x["seed"]: x for x in records if x["row"] == row.name} for row in ROWS}
    done = [row for row in ROWS if found[row.name]]
    titles = ["row", "seeds", *(title for title, _ in COLUMNS.values())]
    rows = table(titles, [table_line(row.name, list(found[row.name].values())) for row in done])
    claims = [claim_line(row, claim, found) for row in done for claim in row.claims]
    words = [claim[-1] for claim in claims]
    verdicts = table(["expected", "column", "here: difference, seed by seed", "verdict"], claims)
    return fill(PAGE, **SHORT, made_on=made_on(records), rows="\n".join(rows),
                claims=len(claims), same=words.count("same"),
                opposite=words.count("opposite"), verdicts="\n".join(verdicts))


def collect():
    """ablations.jsonl and the page, from the logs of all seeds."""
    seeds = sorted({int(path.name.rpartition("-")[2]) for path in RUNS.glob("*-*")})
    found = [read_row(row, seed) for row in ROWS for seed in seeds]
    records = [record for record in found if record]
    if not records:
        raise UserError(f"{RUNS} holds no finished run: run python -m results.ablate first")
    write_lines(RESULTS / "ablations.jsonl", records)
    make.main(["ablate"])


def main(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--rows", nargs="+", default=[row.name for row in ROWS], help="names; default: all")
    add("--seeds", nargs="+", type=whole(0, 2**32 - 1), default=[0, 1, 2])
    add("--collect", action="store_true", help="run nothing, only write records and page")
    add("--no-page", action="store_true", help="only run")
    add("--list", action="store_true", help="print the rows and their flags")
    args, run_flags = p.parse_known_args(argv)
    if unknown := set(args.rows) - {row.name for row in ROWS}:
        raise UserError(f"there is no row {', '.join(sorted(unknown))}: "
                        f"python -m results.ablate --list names them")
    if args.list:
        for row in ROWS:
            print(f"{row.name:42} {row.vqkd} {row.pretrain}".rstrip())
        return
    if not args.collect:
        with exchanged({"data.Shapes": DrawnOnce}):
            for row in [row for row in ROWS if row.name in args.rows]:
                for seed in args.seeds:
                    print(f"--- {row.name}, seed {seed}", flush=True)
                    run_row(row, seed, run_flags)
    if not args.no_page:
        collect()


if __name__ == "__main__":
    launch(main)
