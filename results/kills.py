"""Kill training runs with SIGKILL at random moments, start them again by the same command, and compare with runs that
nobody killed: weights and codebook bit for bit, log lines but for their clocks.

    python results/kills.py --kills 50         # -> results/kills.md, kills.jsonl; about half an hour on 2 cores

Each trial takes the next of the set-ups below and one of three moments: any moment of the run, while a checkpoint is
being written (its .tmp is there), or just after an evaluation (between two epochs).
"""
import argparse
import collections
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from support import engine  # noqa: E402

FEW = "--device cpu --limit 64 --batch-size 16 --steps 14 --save-every 2 --log-every 1 --seed 3".split()
VQKD = ["vqkd.py", "--codes", "16", "--continuous-steps", "3", "--restart-dead-codes", "4"]
PRETRAIN = ["pretrain.py", "--tokenizer", "TOKENIZER", "--drop-path", "0.1"]
FINETUNE = ["finetune.py", "--checkpoint", "BACKBONE", "--mixup", "0.8", "--cutmix", "1", "--erasing", "0.25"]
SEGMENT = ["segment.py", "--checkpoint", "BACKBONE", "--train-images", "64"]
SETUPS = [               # command, flags, processes
    (VQKD, "--workers 0 --amp no", 1), (VQKD, "--workers 3 --amp bf16", 1), (VQKD, "--workers 1 --amp no", 2),
    (VQKD, "--workers 0 --amp no --micro-batch 4", 1), (PRETRAIN, "--workers 1 --amp bf16", 1),
    (PRETRAIN, "--workers 0 --amp no --micro-batch 8", 1), (PRETRAIN, "--workers 3 --amp no", 1),
    (PRETRAIN, "--workers 0 --amp no --micro-batch 4", 2), (FINETUNE, "--workers 1 --amp no", 1),
    (FINETUNE, "--workers 0 --amp bf16 --micro-batch 8", 1), (SEGMENT, "--workers 0 --amp no", 1),
    (SEGMENT, "--workers 1 --amp no --micro-batch 8", 1)]
MOMENTS = ("any moment", "writing a checkpoint", "after an evaluation")


def command(setup, files, out):
    (script, *flags), more, processes = setup
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *launch, str(ROOT / script), *FEW, *[files.get(x, x) for x in flags], *more.split(),
            "--out", str(out)]


def start(words):
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            env=os.environ | dict(OMP_NUM_THREADS="1"))


def finish(words):
    process = start(words)
    errors = process.communicate(timeout=600)[1]
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {process.returncode}\n{errors[-3000:]}")


def kill(process, moment, out, stage, seconds):
    """Wait for the moment, then SIGKILL. -> whether the run was still alive"""
    log, begin = out / f"{stage}.jsonl", time.time()
    def validated():
        return log.exists() and log.read_text().count('"split": "val"')
    evaluations = random.randint(1, 3)
    reached = {
        "any moment": lambda: time.time() - begin > seconds,
        "writing a checkpoint": lambda: (out / f"{stage}.resume.pt.tmp").exists() and random.random() < 0.3,
        "after an evaluation": lambda: validated() >= evaluations}[moment]
    while process.poll() is None and not reached():
        time.sleep(0.0005)
    alive = process.poll() is None
    if alive:
        # The launcher and all its processes at once, as a lost machine would: they have the folder's name in common.
        subprocess.run(["pkill", "-9", "-f", str(out)])
    process.communicate()
    return alive


def contents(out, stage):
    """What is compared: every tensor of the hand-over, every line of the log but for its clocks."""
    lines = [json.loads(line) for line in (out / f"{stage}.jsonl").read_text().splitlines()]
    first = {k: v for k, v in lines[0].items() if k not in ("time", "args")}
    return (engine.read_file(out / f"{stage}.pt", kind=stage)["model"],
            [first] + [{k: v for k, v in line.items() if k not in ("time", "images_per_s")} for line in lines[1:]])


def differences(one, two):
    (weights, log), (weights_, log_) = one, two
    return ([k for k in weights if not torch.equal(weights[k], weights_[k])]
            + [a.get("step", "first") for a, b in zip(log, log_) if a != b] + ["log length"] * (len(log) != len(log_)))


def report(rows, seconds):
    """kills.jsonl and kills.md, from the rows of one run or of several."""
    here = ROOT / "results"
    (here / "kills.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    count = collections.Counter()
    for row in rows:
        key = row["stage"], row["flags"], row["processes"]
        count[key, row["moment"]] += row["killed"]
        count[key, "differences"] += len(row["differences"])
    lines = [f"| {key[0]} | `{key[1]}` | {key[2]} | " + " | ".join(
        str(count[key, column]) for column in (*MOMENTS, "differences")) + " |" for key in dict.fromkeys(k for k, _ in count)]
    runs = [f"`python results/kills.py --kills {sum(r['killed'] for r in rows if r['seed'] == seed)} --seed {seed}`"
            for seed in sorted({row["seed"] for row in rows})]
    kills, wrong = sum(row["killed"] for row in rows), sum(len(row["differences"]) for row in rows)
    (here / "kills.md").write_text(f"""# Killed and started again

{' and '.join(runs)}: {kills} times SIGKILL (the launcher and all its
processes at once), then the same command again; compared with a run that nobody killed, every tensor of the hand-over
bit by bit and every line of the log but for `images_per_s` and `time`. **{wrong} differences.** Columns: how many kills
at any moment of the run (start-up included), while a checkpoint was being written, just after an evaluation.

| stage | flags | processes | {' | '.join(MOMENTS)} | differences |
|---|---|---|---|---|---|---|
""" + "\n".join(lines) + f"""

{time.strftime('%Y-%m-%d')}, commit {rows[0]['commit']}, {os.cpu_count()} cores, torch {torch.__version__}, OMP_NUM_THREADS=1, {seconds:.0f} s.
Every trial, with the resume files that the kill left behind: kills.jsonl.
""")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=50)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    random.seed(args.seed)
    folder, begin = Path(tempfile.mkdtemp()), time.time()
    files = dict(TOKENIZER=str(folder / "first" / "vqkd.pt"), BACKBONE=str(folder / "first" / "pretrain.pt"))
    finish(command((VQKD, "--workers 0", 1), files, folder / "first"))
    finish(command((PRETRAIN, "--workers 0", 1), files, folder / "first"))
    whole, seconds, rows, trial = {}, {}, [], 0
    while sum(row["killed"] for row in rows) < args.kills:
        number, moment = trial % len(SETUPS), MOMENTS[trial // len(SETUPS) % len(MOMENTS)]
        setup, trial = SETUPS[number], trial + 1
        stage = setup[0][0].removesuffix(".py")
        if number not in whole:
            clock = time.time()
            finish(command(setup, files, folder / f"whole{number}"))
            whole[number], seconds[number] = contents(folder / f"whole{number}", stage), time.time() - clock
        out = folder / "parts"
        words, kills = command(setup, files, out), 0
        for _ in range(random.choice((1, 1, 2))):            # sometimes killed twice
            kills += kill(start(words), moment, out, stage, random.uniform(0.2, 1.0) * seconds[number])
        left = sorted(f.name for f in out.iterdir()) if out.exists() else []
        finish(words)
        rows.append(dict(stage=stage, flags=setup[1], processes=setup[2], moment=moment, killed=kills,
                         found=[name for name in left if "resume" in name],
                         differences=differences(whole[number], contents(out, stage))))
        print(json.dumps(rows[-1]), flush=True)
        shutil.rmtree(out)
    shutil.rmtree(folder)

    for row in rows:
        row.update(seed=args.seed, commit=whole[0][1][0]["commit"][:7])
    report(rows, time.time() - begin)


if __name__ == "__main__":
    main()
