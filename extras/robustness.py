"""Robustness: measure one classifier on several data sets whose images look unlike its training.

    python -m extras.robustness runs/tiny/finetune.pt --data shapes shapes:noise shapes:sketch
    python -m extras.robustness runs/base/finetune.pt --data /imagenet-a /imagenet-r /sketch

A data set is shapes, shapes:noise (or blur, textures, grey, contrast, sketch), cifar10, cifar100,
or a folder with val/CLASS/* or CLASS/*. Its classes are found among those of the classifier by
name. ImageNet-A and -R have only 200 of the 1,000 classes. Papers report the accuracy among these
200 logits; the table shows it beside the accuracy among all logits.

The table is printed, and a line per data set is added to finetune_eval.jsonl beside the classifier
(or in the folder --out).
"""
# Shapes:  B images, C classes of the classifier
import json
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F

from finetune import class_logits, hits
from support import data, transforms, weights
from support.args import run_parser
from support.files import Log, rounded
from support.labels import open_for_classifier
from support.process import launch
from support.run import Run

TRAINING_FLAGS = ("model", "data", "patch_size", "batch_size", "epochs", "steps", "compile",
                  "log_every", "save_every", "dry_run")


def restrict(logits, columns):
    """Logits (B, C) of which only `columns` can win.  -> (B, C), all other columns -inf"""
    kept = torch.full_like(logits, -math.inf)
    kept[:, columns] = logits[:, columns]
    return kept


@torch.no_grad()
def measure(model, dataset, columns, run):
    """Cross-entropy and accuracies in percent; restricted_*: among the logits `columns` alone.

    Every image counts once, over all processes.
    """
    model.eval()
    columns = columns.to(run.device)
    totals = data.zeros_to_sum(6, run.device)
    for images, labels in run.eval_batches(dataset):
        labels = labels.to(run.device)
        logits = class_logits(model, images, run)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        among_all = hits(logits, labels)
        among_few = hits(restrict(logits, columns), labels)
        count = labels.new_tensor(len(labels))
        totals += torch.stack([loss, *among_all, *among_few, count]).to(totals.dtype)
    loss, *right, count = run.sum(totals).tolist()
    top1, top5, few1, few5 = [100 * k / count for k in right]
    return dict(loss=loss / count, top1=top1, top5=top5, restricted_top1=few1,
                restricted_top5=few5, images=round(count))


def parse_args(argv=None):
    p = run_parser(__doc__, without=TRAINING_FLAGS)
    add = p.add_argument_group("robustness").add_argument
    add("checkpoint", type=Path, help="the classifier: finetune.pt, or a released file")
    add("--data", nargs="+", required=True, help="the data sets to measure it on")
    add("--classes", type=Path, help="file of class names in the order of the logits, one a line "
        "or a JSON list; default: those in the checkpoint (released files have none)")
    p.set_defaults(workers=min(8, os.cpu_count() or 1), micro_batch=64)
    args = p.parse_args(argv)
    args.out = args.out or args.checkpoint.parent
    return args


def main(argv=None):
    args = parse_args(argv)
    checkpoint = weights.read(args.checkpoint, remedy="make it with python finetune.py")
    args.model = checkpoint.file.get("preset")   # for the first line of the log
    run = Run("finetune_eval", args)
    model, file, _ = weights.load_backbone(checkpoint, pool=None, num_classes=None,
                                           image_size=args.image_size)
    args.image_size = model.arch()["image_size"]
    still = transforms.EvalTransform(args.image_size)
    sets = []
    for name in args.data:                   # all of them, before the first is measured
        sets.append(open_for_classifier(name, still, args, file, model.num_classes))
    data.leave_out_bad(args, run, *[dataset for dataset, _ in sets])
    log = Log(args.out / "finetune_eval.jsonl", args, run, append=True)
    return table(model.to(run.device), args, sets, log, run)


def table(model, args, sets, log, run):
    """Measure all data sets, with a row and a log line for each.  -> {name: result}"""
    w = max(len(name) for name in args.data)
    run.print(f"{'data':{w}}   images  classes    top-1    top-5    "
              f"among these classes: top-1    top-5")
    results = {}
    for name, (dataset, columns) in zip(args.data, sets, strict=True):
        r = measure(model, dataset, columns, run)
        results[name] = r
        log(data=name, classes=len(columns), **r)
        run.print(f"{name:{w}} {r['images']:8} {len(columns):8} {r['top1']:8.2f} {r['top5']:8.2f} "
                  f"{r['restricted_top1']:29.2f} {r['restricted_top5']:8.2f}")
    among = rounded({name: r["restricted_top1"] for name, r in results.items()})
    summary = dict(summary=1, checkpoint=str(args.checkpoint), restricted_top1=among)
    log(**summary)
    run.print(json.dumps(summary))
    return results


if __name__ == "__main__":
    launch(main)
