#!/usr/bin/env bash
# The runs behind results/health.md: ten healthy seeds of the tiny tokenizer and three naive ones, --log-every 1 so that
# no step goes unseen. On one core: about half an hour. Then: python -m results.health
set -euo pipefail
cd "$(dirname "$0")/.."
# The recipe of tiny until 2026-11-25; the present one takes less time and ends at the same figures (results/speed.md).
vqkd="--batch-size 64 --micro-batch 64 --lr 2e-3 --epochs 5 --warmup-epochs 1 --continuous-steps 376"
naive="--continuous-steps 0 --restart-dead-codes 0 --decay 0.99 --warmup-epochs 0 --lr 3e-3"
python vqkd.py $vqkd --workers 0 --log-every 1 --seed 0 --out runs/naive-0 $naive --epochs 2
for s in 1 2; do python vqkd.py $vqkd --workers 0 --log-every 1 --seed $s --out runs/naive-$s $naive --epochs 2; done
# Cold: quantizer from the first step, as base has it, but with the warm-up of the rate.
cold="--continuous-steps 0 --restart-dead-codes 0 --decay 0.99 --epochs 2"
for s in 0 1 2; do python vqkd.py $vqkd --workers 0 --log-every 1 --seed $s --out runs/cold-$s $cold; done
for s in 0 1 2 3 4 5 6 7 8 9; do python vqkd.py $vqkd --workers 0 --log-every 1 --seed $s --out runs/hog-$s; done
for s in 0 1 2; do python vqkd.py $vqkd --workers 0 --log-every 1 --seed $s --out runs/pixel-$s --teacher pixel; done
python vqkd.py $vqkd --workers 0 --log-every 1 --seed 0 --out runs/norestart-0 --restart-dead-codes 0
for r in 0 20; do                    # do restarts of dead codes heal a collapse?
    python vqkd.py $vqkd --workers 0 --log-every 1 --seed 0 --out runs/slow$r-0 --continuous-steps 0 --decay 0.97 --warmup-epochs 0 \
        --lr 3e-3 --epochs 2 --restart-dead-codes $r
done
# The codebook of a finished tokenizer grown and shrunk, then one epoch more.
for k in 128 32; do
    python vqkd.py $vqkd --workers 0 --init runs/hog-0/vqkd.pt --codes $k --epochs 1 --lr 5e-4 --out runs/resized-$k
done
cp runs/naive-0/vqkd.jsonl results/naive-vqkd.jsonl
python -m extras.visualize runs/hog-0/vqkd.jsonl runs/naive-0/vqkd.jsonl --out results/health.png
