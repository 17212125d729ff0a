"""What eight mistakes look like in training: curves of short runs over those of healthy ones.

Which of them can one see, and where?

    run = a stage, one mistake   --> its log --> results/mistakes.jsonl --> a panel of the picture

A mistake is made by exchanging a function of the stage from outside, so that the stage files need
not know. A finished run is not run again: you can stop at any time and repeat the command.

    python -m results.mistakes                    # all runs, the picture, the page
    python -m results.mistakes --runs "no l2" "healthy tokenizer"
"""
import collections
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import linprobe
import pretrain
import vqkd
from extras.panels import panels, save
from model import imagenet_normalize
from results import make
from results.ablate import DrawnOnce, call, exchanged
from results.runs import FACTS, curves_of, result_of, seconds_of
from results.tables import RESULTS, fill, made_on, read_lines, table, write_lines
from support import weights
from support.args import Parser
from support.files import UserError
from support.process import launch

RUNS = Path("runs/mistakes")
# The recipe of tiny, but shorter, in float32 and without the restarts, which would hide a collapse.
# No workers: one that is started anew (spawn) imports the modules without the exchange.
COMMON = "--workers 0 --amp no --log-every 10"
FLAGS = {
    "vqkd": "--steps 400 --continuous-steps 60 --warmup-epochs 0.15 --restart-dead-codes 0",
    "pretrain": "--steps 1000 --warmup-epochs 0.5",
    "linprobe": "--limit 3000 --blocks 1 --epochs 10 --workers 0 --amp no",
}


# --- mistakes -------------------------------------------------------------------------------------
# Each returns {"module.name": what stands there instead}, see results.ablate.exchanged.
def no_l2():
    """l2 is forgotten: vectors and codes keep their lengths, and long codes have large products."""
    return {"vqkd.l2": lambda x: x}


class UpdatedFirst(vqkd.Codebook):
    """The codes move first, then the vectors look theirs up."""

    def forward(self, h):
        if self.training:
            z = vqkd.nearest_code(h, self.embedding.weight)
            sums, counts = vqkd.code_sums(h, z, len(self.cluster_size))
            super().update(sums, counts, self.decay)
        return super().forward(h)

    def update(self, sums, counts, decay):
        """The loop's own call comes too late, and moves nothing."""
        self.decay = decay

    decay = 0.97                             # of tiny, until the loop says otherwise


def update_first():
    return {"vqkd.Codebook": UpdatedFirst}


def stop_gradient_on_the_wrong_side():
    """|| sg[l2(h)] - l2(v) ||^2 is trained. v is no parameter, so this term moves nothing."""
    right = vqkd.vqkd_loss

    def loss(o, t, h, v, *more, **named):
        return right(o, t, v, h, *more, **named)
    return {"vqkd.vqkd_loss": loss}


def no_straight_through():
    """The decoder gets the code itself, through which no gradient comes back."""
    return {"vqkd.straight_through": lambda h, v: v}


class ReadsOneBefore(pretrain.BEiT):
    """[CLS] is forgotten in the count: the token before each hidden patch is read."""

    def streams(self, x, mask, queries=None):
        before = F.pad(queries[:, 1:] - 1, (1, 0))           # (B, 1 + m); token 0 stays [CLS]
        return super().streams(x, mask, before)


def mask_shifted():
    return {"pretrain.BEiT": ReadsOneBefore}


def targets_from_the_masked_image():
    """In training the tokenizer gets the image with its hidden patches black."""
    right = pretrain.masked_views

    def views_and_mask(image, views, grid, count, min_block):
        view, mask = right(image, views, grid, count, min_block)
        if isinstance(views, pretrain.transforms.MIMEvalTransform):
            return view, mask                # measured as it should be
        p = view.shape[-1] // grid[1]
        hidden = mask.view(grid).repeat_interleave(p, 0).repeat_interleave(p, 1)
        return (view, view.masked_fill(hidden, 0)), mask
    return {"pretrain.masked_views": views_and_mask}


class Backbone:
    """A teacher for want of CLIP: the last block of a backbone that stage 2 has trained."""

    def __init__(self, path, normalise):
        self.model, _, _ = weights.load_backbone(weights.read(path), pool=None)
        self.model.eval().requires_grad_(False)
        self.normalise = normalise
        self.name = "backbone"
        self.dim = self.model.width
        self.grid = self.model.grid
        self.names = self.name,
        self.dims = self.dim,
        self.widths = {self.name: self.dim}

    @torch.no_grad()
    def __call__(self, images):
        return self.model(self.normalise(images))[:, 1:].float()


def backbone_teacher(normalise):
    """The teacher of the two last tokenizers: the healthy backbone of seed 0."""
    def build(*_):
        return Backbone(RUNS / "healthy-backbone" / "pretrain.pt", normalise)
    return {"teachers.build_teacher": build}


# --- the runs -------------------------------------------------------------------------------------
# show: what the panel draws. healthy: the runs that lie below. said: what one sees, one sentence.
Run = collections.namedtuple("Run", "name stage change flags show healthy said",
                             defaults=(None, "", None, (), ""))
TOKENIZERS = "healthy tokenizer", "healthy tokenizer, seed 1"
BACKBONES = "healthy backbone", "healthy backbone, seed 1"
SEEING = "healthy tokenizer of a network"
ALL = [
    Run("healthy tokenizer", "vqkd"),
    Run("healthy tokenizer, seed 1", "vqkd", flags="--seed 1"),
    Run("no l2", "vqkd", no_l2, "", "perplexity", TOKENIZERS,
        "At the first step with codes all vectors share one code, and the warning of a collapse "
        "comes by itself."),
    Run("look-up after the update", "vqkd", update_first, "", "cosine", TOKENIZERS,
        "Nothing can be seen: a code moves so little in a step that the curve lies on the healthy "
        "one of its seed. Only a test finds this."),
    Run("sg on the wrong side", "vqkd", stop_gradient_on_the_wrong_side, "", "commit",
        TOKENIZERS, "Nothing pulls the vectors to their codes: the term stays about twice as high, "
        "while cosine and probe look healthy."),
    Run("no straight-through", "vqkd", no_straight_through, "", "cosine", TOKENIZERS,
        "From the first step with codes the decoder teaches the encoder nothing: the cosine stands "
        "still, and few codes do most of the work."),
    Run("healthy backbone", "pretrain"),
    Run("healthy backbone, seed 1", "pretrain", flags="--seed 1"),
    Run("mask shifted by one", "pretrain", mask_shifted, "", "loss_mim", BACKBONES,
        "Nothing can be seen: attention can give an answer one place earlier as well. Only a test "
        "finds this."),
    Run("aggregation from the last layer", "pretrain", None, "--early-layer 6", "loss_cls",
        BACKBONES, "Nothing can be seen: the head now gets by without [CLS], and its loss is as "
        "low. The probe's [CLS] is where to look, in longer runs."),
    Run("targets from the masked image", "pretrain", targets_from_the_masked_image, "",
        "loss_mim", BACKBONES, "The loss is far too good at once, because black patches have codes "
        "that are easy to name; on held-out images, measured rightly, it is above ln K."),
    Run(SEEING, "vqkd", lambda: backbone_teacher(imagenet_normalize)),
    Run("teacher with the wrong normalisation", "vqkd", lambda: backbone_teacher(lambda x: x), "",
        "cosine", (SEEING,), "The cosine looks better than the healthy one: to a teacher that sees "
        "faint pictures much looks alike, and that is easy to copy. The probe does not follow."),
]
CURVES = {
    "vqkd": ("loss", "cosine", "commit", "perplexity"),
    "pretrain": ("loss_mim", "loss_cls", "mask_acc", "mask_acc_cls"),
}
TITLES = {
    "cosine": "cosine to the teacher", "commit": "commitment term", "perplexity": "perplexity",
    "loss_mim": "loss, last layer", "loss_cls": "loss, [CLS] head",
}


def folder(name):
    """The folder of a run: runs/mistakes/no-l2"""
    words = "".join(c if c.isalnum() else " " for c in name).split()
    return RUNS / "-".join(words)


def command(run):
    """The command line of a run's stage."""
    words = [f"python {run.stage}.py", FLAGS[run.stage], COMMON, run.flags]
    if run.stage == "pretrain":
        words.append(f"--tokenizer {folder('healthy tokenizer') / 'vqkd.pt'}")
    return " ".join([*filter(None, words), f"--out {folder(run.name)}"])


def do(run):
    """One stage with its mistake, then a probe of what it has learned without it."""
    stage, source = (vqkd, "tokenizer") if run.stage == "vqkd" else (pretrain, "pretrain")
    change = run.change() if run.change else {}
    try:
        with exchanged(change):
            call(stage, *command(run).split()[2:])
    except UserError as error:               # a loss that is not finite, for example
        print(error)
        return
    call(linprobe, *FLAGS["linprobe"].split(), "--source", source, "--out", folder(run.name))


def record(run, home):
    """What the logs of a run say: where it came from, its last evaluation, its probe, its curves"""
    first, *lines = read_lines(home / f"{run.stage}.jsonl")
    facts = dict(run=run.name, stage=run.stage, seed=first["args"]["seed"],
                 command=f'python -m results.mistakes --runs "{run.name}"',
                 amp=first["args"]["amp"], recipes={command(run): first["args"]})
    facts |= {name: first[name] for name in FACTS if name in first}
    facts["seconds"] = round(seconds_of(lines))
    facts["warned"] = [x["step"] for x in lines if "warning" in x][:1]
    facts["result"] = result_of([x for x in lines if "summary" in x][:1])
    log = "linprobe.jsonl" if run.stage == "pretrain" else "linprobe_tokenizer.jsonl"
    # The first summary of a probe is of the network; raw pixels follow.
    for probe in [x for x in read_lines(home / log) if "summary" in x][:1]:
        facts["result"] |= {key: probe[key] for key in ("top1", "paper_top1")}
    return facts | dict(curves=curves_of(lines, CURVES[run.stage]))


# --- picture and page -----------------------------------------------------------------------------
def mistakes():
    return [run for run in ALL if run.healthy]


def draw(records, out):
    """A panel per mistake: the healthy runs in grey, the mistake in red."""
    runs = {x["run"]: x for x in records}
    figure, axes = panels(2, 4, 3.6, 2.9, "Eight mistakes (red) over healthy runs (grey), tiny, "
                          "training batches", 0.6, left=0.04, right=0.99, bottom=0.08, wspace=0.2,
                          hspace=0.35)
    for axis, run in zip(axes.flat, mistakes(), strict=True):
        axis.axis("on")
        for name in (*run.healthy, run.name):
            points = [(x["step"], x[run.show]) for x in runs[name]["curves"]["train"]
                      if run.show in x]
            wrong = name == run.name
            axis.plot(*zip(*points, strict=True), color="#d7301f" if wrong else "#999999",
                      lw=1.4 if wrong else 1.0)
        axis.set_title(f"{run.name}", fontsize=10)
        axis.set_xlabel("step", fontsize=8, labelpad=1)
        axis.set_ylabel(TITLES[run.show], fontsize=8, labelpad=2)
        axis.tick_params(labelsize=7)
    save(figure, out)


PICTURES = {"mistakes.png": draw}

PAGE = """# What eight mistakes look like

`python -m results.mistakes`: each mistake (red) is made in one run of tiny, shorter than its
recipe, and lies over healthy runs (grey). {made_on} Records: [mistakes.jsonl](mistakes.jsonl).

![eight mistakes](mistakes.png)

{said}

{rows}
"""
DIGITS = dict(steps=0, cosine=3, commitment=4, perplexity=1, loss_mim=3, loss_cls=3, mask_acc=1,
              top1=1, paper_top1=1, seconds=0)
NAMES = ["run", "steps", "cosine", "commitment", "perplexity", "loss, last layer",
         "loss, [CLS] head", "named right", "probe, chosen", "probe, paper's reading", "seconds"]


def page(records):
    """The text of results/mistakes.md. UserError if a run is missing"""
    found = {x["run"]: x for x in records}
    missing = [run.name for run in ALL if run.name not in found]
    if missing:
        raise UserError(f"there is no record of {', '.join(missing)}")
    said = [f"{number}. **{run.name}** ({run.stage}.py; drawn: {TITLES[run.show]}). {run.said}"
            for number, run in enumerate(mistakes(), 1)]
    rows = []
    for run in ALL:
        facts = found[run.name] | found[run.name]["result"]
        rows.append([run.name, *(f"{facts[key]:.{n}f}" if key in facts else ""
                                 for key, n in DIGITS.items())])
    return fill(PAGE, made_on=made_on(records), said="\n".join(said).replace(" \n", "\n").strip(),
                rows="\n".join(table(NAMES, rows)))


def main(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--runs", nargs="+", default=[run.name for run in ALL], help="names; default: all")
    add("--results", type=Path, default=RESULTS / "mistakes.jsonl", help="the records")
    args = p.parse_args(argv)
    if unknown := set(args.runs) - {run.name for run in ALL}:
        raise UserError(f"there is no run {', '.join(sorted(unknown))}: "
                        f"choose from {', '.join(run.name for run in ALL)}")
    torch.set_num_threads(1)                 # the same numbers whatever the number of cores
    # Records of another day stay out: what has run says so by itself.
    with exchanged({"data.Shapes": DrawnOnce}):
        for run in [run for run in ALL if run.name in args.runs]:
            print(f"--- {run.name}", flush=True)
            do(run)
    records = [record(run, folder(run.name)) for run in ALL
               if (folder(run.name) / f"{run.stage}.jsonl").exists()]
    write_lines(args.results, records)
    make.write(make.PAGES["mistakes"], sys.modules[__name__], args.results.parent)


if __name__ == "__main__":
    launch(main)
