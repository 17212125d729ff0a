#!/usr/bin/env bash
# The runs behind results/downstream.md: segmentation and robustness on shapes, tiny, three seeds,
# from the tokenizers of health.sh (runs/hog-SEED/vqkd.pt). On one core about 45 minutes.
# Then: python -m results.downstream
set -euo pipefail
cd "$(dirname "$0")/.."
# The recipe of tiny until 2026-11-25. The present one takes less time and ends at the same figures
# (results/speed.md).
pretrain="--batch-size 64 --micro-batch 64 --epochs 4 --workers 0"
for s in 0 1 2; do python pretrain.py $pretrain --seed $s --out runs/hog-$s; done
for s in 0 1 2; do
    python segment.py --workers 0 --seed $s --out runs/hog-$s
    for r in 3e-3 6e-3 1e-2; do
        python segment.py --workers 0 --seed $s --init scratch --lr $r --out runs/scratch-$r-$s
    done
done
finetune="--workers 0 --labels-per-class 100"
for s in 0 1 2; do
    python finetune.py $finetune --seed $s --out runs/hog-$s
    for r in 3e-3 1e-2; do
        python finetune.py $finetune --init scratch --lr $r --seed $s --out runs/scratch-$r-$s
    done
done
shifts="shapes shapes:noise shapes:blur shapes:textures shapes:grey shapes:contrast shapes:sketch"
for s in 0 1 2; do
    for run in hog-$s scratch-3e-3-$s scratch-1e-2-$s; do
        python -m extras.robustness runs/$run/finetune.pt --workers 0 --data $shifts
    done
done
cp runs/hog-0/segment.png results/segment.png
