#!/usr/bin/env bash
# Every run behind results/README.md, at tiny size on the built-in shapes. On 2 cores run two of
# these loops side by side, OMP_NUM_THREADS=1 each: about 50 minutes. Then: python -m results.table
set -euo pipefail
cd "$(dirname "$0")/.."
# The recipe of tiny until 2026-11-25. The present one takes less time and ends at the same figures
# (results/speed.md).
vqkd="--batch-size 64 --micro-batch 64 --lr 2e-3 --epochs 5 --warmup-epochs 1"
vqkd="$vqkd --continuous-steps 376"
pretrain="--batch-size 64 --micro-batch 64 --epochs 4"
for s in 0 1 2; do
    python vqkd.py $vqkd --seed $s --out runs/hog-$s
    python pretrain.py $pretrain --seed $s --out runs/hog-$s
    python linprobe.py --source all --seed $s --out runs/hog-$s
    # Without patch aggregation, same tokenizer.
    python pretrain.py $pretrain --seed $s --out runs/noagg-$s --tokenizer runs/hog-$s/vqkd.pt \
        --no-aggregation
    python linprobe.py --seed $s --out runs/noagg-$s
    # Codes distilled from pixels instead of features.
    python vqkd.py $vqkd --seed $s --out runs/pixel-$s --teacher pixel
    python pretrain.py $pretrain --seed $s --out runs/pixel-$s
    python linprobe.py --seed $s --out runs/pixel-$s
    # Both: the BEiT-like baseline of the paper's main comparison.
    python pretrain.py $pretrain --seed $s --out runs/beit-$s --tokenizer runs/pixel-$s/vqkd.pt \
        --no-aggregation
    python linprobe.py --seed $s --out runs/beit-$s
    # Fine-tuning with 100 labels a class, against the best of three rates from scratch.
    python finetune.py --labels-per-class 100 --seed $s --out runs/hog-$s
    for r in 3e-4 1e-3 3e-3; do
        python finetune.py --labels-per-class 100 --init scratch --lr $r --seed $s \
            --out runs/scratch-$r-$s
    done
done
# A cold start, as base has it: quantizer from the first step, slow codes, no restarts.
cold="--continuous-steps 0 --restart-dead-codes 0 --decay 0.99"
python vqkd.py $vqkd --out runs/cold $cold --epochs 3
# Collapsed on purpose: the learning rate is too high.
python vqkd.py $vqkd --out runs/collapsed $cold --lr 3e-2 --warmup-epochs 0 --epochs 2
cp runs/hog-0/vqkd.jsonl results/healthy-vqkd.jsonl
cp runs/cold/vqkd.jsonl results/cold-start-vqkd.jsonl
cp runs/collapsed/vqkd.jsonl results/collapsed-vqkd.jsonl
cp runs/hog-0/pretrain.jsonl results/healthy-pretrain.jsonl
cp runs/noagg-0/pretrain.jsonl results/no-aggregation-pretrain.jsonl
python -m extras.visualize results/{healthy,cold-start,collapsed}-vqkd.jsonl \
    results/{healthy,no-aggregation}-pretrain.jsonl --out results/curves.png
