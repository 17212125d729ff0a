#!/usr/bin/env bash
# The runs behind results/health.md: ten healthy seeds of the tiny tokenizer and three naive ones.
# With --log-every 1 every step is in the log. On one core: about half an hour.
# Then: python -m results.health
set -euo pipefail
cd "$(dirname "$0")/.."
# The recipe of tiny until 2026-11-25. The present one takes less time and ends at the same figures
# (results/speed.md).
vqkd="--batch-size 64 --micro-batch 64 --lr 2e-3 --epochs 5 --warmup-epochs 1"
vqkd="$vqkd --continuous-steps 376 --workers 0"
tokenizer() {                        # tokenizer NAME SEED FLAGS: the run runs/NAME-SEED
    name=$1
    seed=$2
    shift 2
    python vqkd.py $vqkd --log-every 1 --seed $seed --out runs/$name-$seed "$@"
}
for s in 0 1 2; do
    tokenizer naive $s --continuous-steps 0 --restart-dead-codes 0 --decay 0.99 \
        --warmup-epochs 0 --lr 3e-3 --epochs 2
done
# Cold: quantizer from the first step, as base has it, but with the warm-up of the rate.
for s in 0 1 2; do
    tokenizer cold $s --continuous-steps 0 --restart-dead-codes 0 --decay 0.99 --epochs 2
done
for s in 0 1 2 3 4 5 6 7 8 9; do tokenizer hog $s; done
for s in 0 1 2; do tokenizer pixel $s --teacher pixel; done
tokenizer norestart 0 --restart-dead-codes 0
for r in 0 20; do                    # do restarts of dead codes heal a collapse?
    tokenizer slow$r 0 --continuous-steps 0 --decay 0.97 --warmup-epochs 0 --lr 3e-3 --epochs 2 \
        --restart-dead-codes $r
done
# The codebook of a finished tokenizer grown and shrunk, then one epoch more.
for k in 128 32; do
    python vqkd.py $vqkd --init runs/hog-0/vqkd.pt --codes $k --epochs 1 --lr 5e-4 \
        --out runs/resized-$k
done
cp runs/naive-0/vqkd.jsonl results/naive-vqkd.jsonl
python -m extras.visualize runs/hog-0/vqkd.jsonl runs/naive-0/vqkd.jsonl --out results/health.png
