"""Kill training runs with SIGKILL at random moments and start them again by the same command.

Each is compared with a run that nobody killed: weights and codebook bit for bit, and all log lines
but for their clocks.

    python -m results.kills --kills 50       # half an hour; -> results/kills.md, kills.jsonl

Each trial takes the next of the set-ups below and one of three moments: any moment of the run,
while a checkpoint is being written (its .tmp is there), or just after an evaluation.
"""
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

from results.tables import RESULTS, ROOT, read_lines, write_lines
from support.args import Parser, whole
from support.files import read_file
from support.process import launch

FEW = "--device cpu --limit 64 --batch-size 16 --steps 14 --save-every 2 --log-every 1 --seed 3"
STAGES = {
    "vqkd": "--codes 16 --continuous-steps 3 --restart-dead-codes 4",
    "pretrain": "--tokenizer TOKENIZER --drop-path 0.1",
    "finetune": "--checkpoint BACKBONE --mixup 0.8 --cutmix 1 --erasing 0.25",
    "segment": "--checkpoint BACKBONE --train-images 64",
}
SETUPS = [  # stage, flags, processes
    ("vqkd", "--workers 0 --amp no", 1),
    ("vqkd", "--workers 3 --amp bf16", 1),
    ("vqkd", "--workers 1 --amp no", 2),
    ("vqkd", "--workers 0 --amp no --micro-batch 4", 1),
    ("pretrain", "--workers 1 --amp bf16", 1),
    ("pretrain", "--workers 0 --amp no --micro-batch 8", 1),
    ("pretrain", "--workers 3 --amp no", 1),
    ("pretrain", "--workers 0 --amp no --micro-batch 4", 2),
    ("finetune", "--workers 1 --amp no", 1),
    ("finetune", "--workers 0 --amp bf16 --micro-batch 8", 1),
    ("segment", "--workers 0 --amp no", 1),
    ("segment", "--workers 1 --amp no --micro-batch 8", 1),
]
MOMENTS = ("any moment", "writing a checkpoint", "after an evaluation")

PAGE = """# Killed and started again

{commands}: {kills} times SIGKILL (the launcher and all its
processes at once), then the same command again; compared with a run that nobody killed, every
tensor of the hand-over bit by bit and every line of the log but for `images_per_s` and `time`.
**{wrong} differences.** Columns: how many kills at any moment of the run (start-up included),
while a checkpoint was being written, just after an evaluation.

| stage | flags | processes | {moments} | differences |
|---|---|---|---|---|---|---|
{lines}

{date}, commit {commit}, {cores} cores, torch {torch}, OMP_NUM_THREADS=1, {seconds:.0f} s.
Every trial, with the resume files that the kill left behind: kills.jsonl.
"""


# --- one run --------------------------------------------------------------------------------------
def command(setup, folder, out):
    """The words of the command line. TOKENIZER and BACKBONE become files in folder/first."""
    stage, flags, processes = setup
    words = [sys.executable]
    if processes > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words += [str(ROOT / f"{stage}.py"), *FEW.split(), *STAGES[stage].split(), *flags.split()]
    first = folder / "first"
    files = {"TOKENIZER": first / "vqkd.pt", "BACKBONE": first / "pretrain.pt"}
    return [str(files.get(word, word)) for word in words] + ["--out", str(out)]


def start(words):
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            env=os.environ | dict(OMP_NUM_THREADS="1"))


def finish(words):
    process = start(words)
    _, errors = process.communicate(timeout=600)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {process.returncode}\n{errors[-3000:]}")


def kill(process, moment, out, stage, seconds):
    """Wait for the moment, then SIGKILL. -> whether the run was still alive"""
    log = out / f"{stage}.jsonl"
    begin = time.time()
    evaluations = random.randint(1, 3)

    def reached():
        if moment == "any moment":
            return time.time() - begin > seconds
        if moment == "writing a checkpoint":
            return (out / f"{stage}.resume.pt.tmp").exists() and random.random() < 0.3
        return log.exists() and log.read_text().count('"split": "val"') >= evaluations

    while process.poll() is None and not reached():
        time.sleep(0.0005)
    alive = process.poll() is None
    if alive:
        # The launcher and all its processes at once, as if the machine failed. What they have in
        # common is the name of this temporary folder on their command lines.
        subprocess.run(["pkill", "-9", "-f", str(out)])
    process.communicate()
    return alive


# --- comparing ------------------------------------------------------------------------------------
def contents(out, stage):
    """What is compared: every tensor of the hand-over, every log line but for its clocks."""
    first, *lines = read_lines(out / f"{stage}.jsonl")
    log = [{k: v for k, v in first.items() if k not in ("time", "args")}]
    log += [{k: v for k, v in x.items() if k not in ("time", "images_per_s")} for x in lines]
    return read_file(out / f"{stage}.pt", kind=stage)["model"], log


def differences(one, two):
    """Names of tensors and steps of log lines that differ."""
    weights, log = one
    other_weights, other_log = two
    found = [name for name in weights if not torch.equal(weights[name], other_weights[name])]
    for a, b in zip(log, other_log, strict=False):
        if a != b:
            found.append(a.get("step", "first"))
    if len(log) != len(other_log):
        found.append("log length")
    return found


def trial(setup, moment, folder, whole_run, seconds):
    """Kill a run once or twice, let it finish, compare. -> record"""
    stage, flags, processes = setup
    out = folder / "parts"
    words = command(setup, folder, out)
    kills = 0
    for _ in range(random.choice((1, 1, 2))):
        kills += kill(start(words), moment, out, stage, random.uniform(0.2, 1.0) * seconds)
    left = sorted(f.name for f in out.glob("*resume*"))
    finish(words)
    wrong = differences(whole_run, contents(out, stage))
    shutil.rmtree(out)
    return dict(stage=stage, flags=flags, processes=processes, moment=moment, killed=kills,
                found=left, differences=wrong)


def report(rows, seconds):
    """kills.jsonl and kills.md, from the records of one call."""
    write_lines(RESULTS / "kills.jsonl", rows)
    count = collections.Counter()
    for row in rows:
        key = row["stage"], row["flags"], row["processes"]
        count[key, row["moment"]] += row["killed"]
        count[key, "differences"] += len(row["differences"])
    lines = []
    for stage, flags, processes in dict.fromkeys(key for key, _ in count):
        numbers = [count[(stage, flags, processes), column] for column in (*MOMENTS, "differences")]
        cells = [stage, f"`{flags}`", processes, *numbers]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    kills = sum(row["killed"] for row in rows)
    (RESULTS / "kills.md").write_text(PAGE.format(
        commands=f"`python -m results.kills --kills {kills} --seed {rows[0]['seed']}`",
        kills=kills, wrong=sum(len(row["differences"]) for row in rows),
        moments=" | ".join(MOMENTS), lines="\n".join(lines), date=time.strftime("%Y-%m-%d"),
        commit=rows[0]["commit"], cores=os.cpu_count(), torch=torch.__version__, seconds=seconds))


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("--kills", type=whole(1), default=50, help="so many in all; default 50")
    p.add_argument("--seed", type=whole(0), default=0, help="of moments and repeats")
    args = p.parse_args(argv)
    random.seed(args.seed)
    folder = Path(tempfile.mkdtemp())
    begin = time.time()
    for stage in ("vqkd", "pretrain"):       # what the other stages start from
        finish(command((stage, "--workers 0", 1), folder, folder / "first"))

    whole_runs, rows = {}, []                # whole_runs: setup -> contents, seconds
    for number in range(10**6):
        setup = SETUPS[number % len(SETUPS)]
        moment = MOMENTS[number // len(SETUPS) % len(MOMENTS)]
        if setup not in whole_runs:
            clock = time.time()
            out = folder / f"whole{number}"
            finish(command(setup, folder, out))
            whole_runs[setup] = contents(out, setup[0]), time.time() - clock
        unbroken, seconds = whole_runs[setup]
        row = trial(setup, moment, folder, unbroken, seconds)
        first_line = unbroken[1][0]
        rows.append(row | dict(seed=args.seed, commit=first_line["commit"][:7]))
        print(json.dumps(rows[-1]), flush=True)
        if sum(row["killed"] for row in rows) >= args.kills:
            break
    shutil.rmtree(folder)
    report(rows, time.time() - begin)


if __name__ == "__main__":
    launch(main)
