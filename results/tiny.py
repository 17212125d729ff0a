"""What the whole method gives at tiny size, three seeds: results/README.md.

    python -m results.tiny                   # runs what has not run: hours on two cores
    python -m results.tiny --list            # the commands
"""
import statistics
import subprocess
import sys

from extras.curves import draw_logs
from results.runs import find, of_seeds, study
from results.tables import ROOT, RUNS, cell, fill, made_on, table
from support.files import UserError
from support.process import launch

SEEDS = (0, 1, 2)
FINETUNE_RATES = "3e-4", "1e-3", "3e-3"      # from scratch
SEGMENT_RATES = "3e-3", "6e-3", "1e-2"
SHIFTS = "shapes shapes:noise shapes:blur shapes:textures shapes:grey shapes:contrast shapes:sketch"
OF_EACH_SEED = [
    "python vqkd.py --seed SEED --out runs/hog-SEED",
    "python vqkd.py --teacher pixel --seed SEED --out runs/pixel-SEED",
    "python pretrain.py --seed SEED --out runs/hog-SEED",
    "python pretrain.py --no-aggregation --tokenizer runs/hog-SEED/vqkd.pt --seed SEED "
    "--out runs/noagg-SEED",
    "python pretrain.py --seed SEED --out runs/pixel-SEED",
    "python pretrain.py --no-aggregation --tokenizer runs/pixel-SEED/vqkd.pt --seed SEED "
    "--out runs/beit-SEED",
    "python linprobe.py --source all --seed SEED --out runs/hog-SEED",
    *[f"python linprobe.py --seed SEED --out runs/{name}-SEED"
      for name in ("noagg", "pixel", "beit")],
    "python finetune.py --labels-per-class 100 --seed SEED --out runs/hog-SEED",
    *[f"python finetune.py --labels-per-class 100 --init scratch --lr {rate} --seed SEED "
      f"--out runs/scratch-{rate}-SEED" for rate in FINETUNE_RATES],
    "python segment.py --seed SEED --out runs/hog-SEED",
    *[f"python segment.py --init scratch --lr {rate} --seed SEED "
      f"--out runs/scratch-{rate}-SEED" for rate in SEGMENT_RATES],
    f"python -m extras.robustness runs/hog-SEED/finetune.pt --data {SHIFTS}",
    *[f"python -m extras.robustness runs/scratch-{rate}-SEED/finetune.pt --data {SHIFTS}"
      for rate in FINETUNE_RATES],
]
COMMANDS = [line.replace("SEED", str(seed)) for line in OF_EACH_SEED for seed in SEEDS]
DRAWN = "hog-0", "noagg-0"
CURVES = "cosine perplexity loss_mim loss_cls mask_acc guess_position guess_nearest".split()

PAGE = """# What was measured

The built-in pictures, `--model tiny`, today's default recipe, seeds {seeds}: mean ± standard error
over seeds. `python -m results.tiny` ran the commands below, kept a record of each in
[tiny.jsonl](tiny.jsonl), and made this page from the records. {made_on} Two runs shared the
machine, so the seconds are those of a busy one.

![curves](curves.png)

Lines are training batches, dots the held-out images. Pictures of the tokenizer and the backbone of
seed 0, made by `python -m extras.visualize runs/hog-0`: [codes](codes.png),
[token maps](tokens.png), [predictions](prediction.png).

Other pages: [codebook health](health.md), [what codes keep and ignore](factors.md),
[ablations](ablations.md), [mistakes and what they look like](mistakes.md), [speed](speed.md),
[on a GPU](gpu.md), [killed and started again](kills.md), [bugs that tests notice](mutations.md),
[marks of the homework](homework.md). `python -m results.make` writes them all from their records.

## Tokenizer (VQ-KD), all held-out images, K = {codes}

{tokenizers}

## Pre-training, percent of hidden patches named right

{pretraining}

The two guessers have learned nothing of images: one names the commonest code of the place, one the
code of the nearest visible patch. Codes of different teachers are different, so accuracies compare
within a teacher only.

## Linear probe and nearest neighbours, top-1 in percent

{probes}

*Chosen*: block, read-out, norm and rate that are best on a tenth of the training images. The
*paper's* reading: [CLS] of the last layer if patch aggregation trained it, else the mean of the
last layer's patches. With {few} labels a class, the same readings by ridge regression, the mean of
{draws} draws of images. Pixels: images without their mean, nothing learned, neighbours by |cosine|.
HOG is made by hand; it is the teacher, and so a ceiling for what is distilled from it. With all
labels, {images} drawings fill their space: there a nearest neighbour is a memory.

## Fine-tuning with 100 labels a class, top-1 in percent

{finetuning}

## Segmentation from 200 labelled images, mIoU in percent

{segmentation}

UPerNet; the background counts as a class, but for its own column. From scratch: the same number of
updates, the best of {segment_rates} rates is the one to compare with. {segment_worth}

![image, truth, prediction](segment.png)

## Robustness: top-1 of the fine-tuned classifiers on shifted pictures, percent

{robustness}

Training saw none of the shifts: noise, blur, other textures of the background, grey, low contrast,
outlines only.

## Every command, with the seconds of its run

{commands}
"""


def over_seeds(records, name, stage, key, source=None, unit=1, digits=1):
    """The cell of one figure of NAME-0, NAME-1, NAME-2."""
    found = of_seeds(records, name, SEEDS, stage, source)
    return cell([unit * x[key] for x in found if key in x], digits)


def mean_of(records, name, stage, key):
    return statistics.fmean(x[key] for x in of_seeds(records, name, SEEDS, stage))


def best_scratch(records, stage, key, rates):
    """The name of the runs from scratch whose rate is the best of several."""
    names = [f"scratch-{rate}" for rate in rates]
    return max(names, key=lambda name: mean_of(records, name, stage, key))


def tokenizer_table(records):
    rows = []
    for name in ("hog", "pixel"):
        cells = [over_seeds(records, name, "vqkd", key) for key in ("codes_used", "perplexity")]
        rows.append([name, *cells, over_seeds(records, name, "vqkd", "cosine", unit=100)])
    return table(["teacher", "codes used", "perplexity", "cosine x 100"], rows)


PRETRAINED = {"hog": "teacher hog, patch aggregation (default)", "noagg": "hog, `--no-aggregation`",
              "pixel": "`--teacher pixel`",
              "beit": "`--teacher pixel`, `--no-aggregation` (BEiT-like)"}


def pretraining_table(records):
    keys = "mask_acc", "mask_acc_cls", "guess_position", "guess_nearest"
    rows = [[label, *(over_seeds(records, name, "pretrain", key) for key in keys)]
            for name, label in PRETRAINED.items()]
    return table(["run", "last layer", "[CLS] head", "guess: commonest of the place",
                  "guess: nearest visible"], rows)


def probe_table(records):
    sources = [(name, "pretrain", label) for name, label in PRETRAINED.items()]
    names = list(find(records, "hog-0", "linprobe")["result"])
    sources += [("hog", name, name) for name in names if name != "pretrain"]
    few = find(records, "hog-0", "linprobe")["args"]["labels_per_class"]
    keys = {"top1": "all labels: chosen", "paper_top1": "paper's", "knn1": "1-NN", "knn20": "20-NN",
            f"top1_{few}": f"{few} a class: chosen", f"paper_top1_{few}": "paper's",
            f"knn1_{few}": "1-NN"}
    rows = [[label, *(over_seeds(records, name, "linprobe", key, source) for key in keys)]
            for name, source, label in sources]
    return table(["features", *keys.values()], rows)


def starts(stage, rates):
    """-> {name of the runs: what the table calls them}"""
    return {"hog": "pre-trained"} | {f"scratch-{rate}": f"scratch, lr {rate}" for rate in rates}


def finetuning_table(records):
    rows = [[label, over_seeds(records, name, "finetune", "top1")]
            for name, label in starts("finetune", FINETUNE_RATES).items()]
    return table(["start", "top-1"], rows)


def segmentation_table(records):
    keys = {"miou": "mIoU", "miou_objects": "without background", "m_acc": "mAcc", "a_acc": "aAcc"}
    rows = [[label, *(over_seeds(records, name, "segment", key) for key in keys)]
            for name, label in starts("segment", SEGMENT_RATES).items()]
    return table(["start", *keys.values()], rows)


def segmentation_worth(records):
    """One sentence: how much the pre-trained start is above the best one from scratch."""
    scratch = best_scratch(records, "segment", "miou", SEGMENT_RATES)
    ours, best = (mean_of(records, name, "segment", "miou") for name in ("hog", scratch))
    return f"Pre-training is worth {ours - best:.1f} points of mIoU."


def robustness_table(records):
    names = starts("finetune", FINETUNE_RATES)
    rows = []
    for shift in SHIFTS.split():
        found = {name: [x["restricted_top1"][shift] for x in
                        of_seeds(records, name, SEEDS, "finetune_eval")] for name in names}
        rows.append([shift, *(cell(values) for values in found.values())])
    return table(["held-out images", *names.values()], rows)


def page(records):
    """The text of results/README.md."""
    rows = [[f"`{x['command']}`", f"{x['seconds']:.0f}"] for x in records if x["seed"] == 0]
    parts = dict(
        tokenizers=tokenizer_table(records), pretraining=pretraining_table(records),
        probes=probe_table(records), finetuning=finetuning_table(records),
        segmentation=segmentation_table(records), robustness=robustness_table(records),
        commands=table(["seed 0; the other seeds alike", "s"], rows))
    probe = find(records, "hog-0", "linprobe")
    facts = {name: probe["result"]["pretrain"][name] for name in ("draws", "images")}
    return fill(
        PAGE, seeds=", ".join(map(str, SEEDS)), made_on=made_on(records), **facts,
        few=probe["args"]["labels_per_class"],
        codes=find(records, "hog-0", "vqkd")["args"]["codes"], segment_rates=len(SEGMENT_RATES),
        segment_worth=segmentation_worth(records),
        **{name: "\n".join(lines) for name, lines in parts.items()})


# --- pictures -------------------------------------------------------------------------------------
def curves(records, path):
    """Seed 0 with and without patch aggregation."""
    logs = {f"{x['run']}/{x['stage']}": (x, x["curves"]["train"], x["curves"]["val"])
            for x in records if "curves" in x}
    draw_logs(logs, path)


def visualized(name):
    """A function that draws one picture of extras.visualize from the files of runs/hog-0."""
    def draw(records, path):
        if not (RUNS / "hog-0" / "vqkd.pt").exists():
            raise UserError(f"{path.name} needs the checkpoints of runs/hog-0: python -m "
                            f"results.tiny")
        subprocess.run([sys.executable, "-m", "extras.visualize", "runs/hog-0", "--only", name,
                        "--out", str(path.parent)], cwd=ROOT, check=True)
    return draw


def segments(records, path):
    """What segment.py has drawn at its end."""
    source = RUNS / "hog-0" / "segment.png"
    if not source.exists():
        raise UserError(f"{path.name} needs {source.relative_to(ROOT)}: python -m results.tiny")
    path.write_bytes(source.read_bytes())


PICTURES = {"curves.png": curves, "segment.png": segments}
PICTURES |= {f"{name}.png": visualized(name) for name in ("codes", "tokens", "prediction")}


def main(argv=None):
    study("tiny", __doc__, COMMANDS, dict.fromkeys(DRAWN, CURVES), argv=argv)


if __name__ == "__main__":
    launch(main)
