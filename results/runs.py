"""Run the commands of a study, some at a time, and keep what their logs say as records.

    python vqkd.py --seed 0 --out runs/hog-0  -->  runs/hog-0/vqkd.jsonl  -->  one record

A study is a list of commands, each exactly what a reader would type. A command waits for those
before it whose folder it names. It can be stopped at any time and started again: a finished run
says "already done", another one goes on.
"""
import concurrent.futures
import os
import re
import shlex
import subprocess
import sys
import time

from results import make
from results.tables import RESULTS, ROOT, RUNS, read_lines, write_lines
from support.args import Parser, whole
from support.files import UserError

# What the first line of a log says of the run.
FACTS = ("commit torch machine cpu gpu cores device threads processes images steps chance "
         "made_from").split()


# --- running --------------------------------------------------------------------------------------
def folders(command):
    """The folders of runs that a command names: its own, and those that it reads."""
    return set(re.findall(r"\bruns/([\w.-]+)", command))


def run(command, threads):
    """One command, as a reader types it. UserError with its last words if it fails."""
    python, *words = shlex.split(command)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    begin = time.time()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, text=True,
                          capture_output=True)
    last = (done.stderr if done.returncode else done.stdout).strip().splitlines()[-1:]
    if done.returncode:
        raise UserError(f"{command} ended with exit code {done.returncode}: {' '.join(last)[:600]}")
    print(f"{time.time() - begin:6.0f} s  {command}", flush=True)


def run_all(commands, jobs, threads):
    """Every command, `jobs` at a time with `threads` each (None: torch's choice)."""
    tasks = []                               # folder, its future

    def wait_and_run(command, before):
        for task in before:
            task.result()
        run(command, threads)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for command in commands:
            # Tasks begin in this order, so what one waits for has begun before it.
            before = [task for out, task in tasks if out in folders(command)]
            tasks.append((place(command)[0], pool.submit(wait_and_run, command, before)))
        try:
            for _, task in tasks:
                task.result()
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise


# --- from logs to records -------------------------------------------------------------------------
def place(command):
    """-> name of the run, of its log.  python vqkd.py --out runs/hog-0 -> ("hog-0", "vqkd")"""
    words = shlex.split(command)
    if "extras.robustness" in words:
        return folders(command).pop(), "finetune_eval"
    flags = dict(zip(words, words[1:], strict=False))
    stage = words[1].removesuffix(".py")
    if stage == "linprobe" and flags.get("--source", "all") not in ("all", "pretrain"):
        stage = f"linprobe_{flags['--source']}"
    return flags.get("--out", "runs/tiny").removeprefix("runs/"), stage


def record_of(command, curves=()):
    """What the log of a finished command says.  UserError if it has not finished

    curves: quantities of which all lines are kept, too, to be drawn.
    """
    run_name, stage = place(command)
    lines = read_lines(RUNS / run_name / f"{stage}.jsonl")
    begins = [i for i, line in enumerate(lines) if "kind" in line]
    if not any("summary" in line for line in lines[begins[-1]:] if begins):
        raise UserError(f"runs/{run_name}/{stage}.jsonl has no result: run {command}")
    first, *lines = lines[begins[-1]:]       # measurements add a block of lines each time
    record = dict(run=run_name, stage=stage, command=command, seed=first["args"]["seed"],
                  amp=first["args"]["amp"])
    record |= {name: first[name] for name in FACTS if name in first}
    record["seconds"] = round(seconds_of(lines), 1)
    record["warned"] = [line["step"] for line in lines if "warning" in line]
    record["args"] = first["args"]
    record["result"] = result_of([line for line in lines if "summary" in line])
    if curves:
        record["curves"] = curves_of(lines, curves)
    return record


def result_of(summaries):
    """The figures of the summary; of a probe {source: figures}."""
    results = {line.get("source"): figures(line) for line in summaries}
    return results.get(None, results)


def figures(summary):
    """A summary without its clocks; the commitment term of Eq. (2) is no commit of git."""
    left_out = "summary", "time", "seconds", "source"
    found = {name: value for name, value in summary.items() if name not in left_out}
    if "commit" in found:
        found["commitment"] = found.pop("commit")
    return found


def curves_of(lines, names):
    """-> {"train": lines of steps, "val": evaluations}, each line with step and these quantities"""
    kept = dict(train=[], val=[])
    for line in lines:
        found = {name: round(line[name], 4) for name in names if name in line}
        if found and "step" in line and "summary" not in line:
            kept["val" if line.get("split") == "val" else "train"].append(
                dict(step=line["step"]) | found)
    return kept


def seconds_of(lines):
    """The clock of a log starts at 0 again where a run was resumed. The parts are added up."""
    times = [line["time"] for line in lines if "time" in line] + [0.0]
    return sum(a for a, b in zip(times, times[1:], strict=False) if b < a)


# --- reading records ------------------------------------------------------------------------------
def find(records, run_name, stage):
    """The record of a run's stage. UserError if there is none"""
    found = [x for x in records if x.get("run") == run_name and x.get("stage") == stage]
    if not found:
        raise UserError(f"there is no record of runs/{run_name}, {stage}")
    return found[-1]


def of_seeds(records, name, seeds, stage, source=None):
    """The results of NAME-0, NAME-1, ... ; source: of a probe, whose features"""
    found = [find(records, f"{name}-{seed}", stage)["result"] for seed in seeds]
    return [x[source] for x in found] if source else found


# --- the command ----------------------------------------------------------------------------------
def study(name, doc, commands, curves=None, jobs=2, threads=1, argv=None):
    """`python -m results.NAME`: run what has not run, write NAME.jsonl, then the page.

    curves: {run: quantities to keep, see record_of}. The records are written at the end.
    """
    p = Parser(doc)
    p.add_argument("--jobs", type=whole(1, 1000), default=jobs,
                   help=f"commands at the same time; default {jobs}")
    p.add_argument("--list", action="store_true", help="print the commands and stop")
    args = p.parse_args(argv)
    if args.list:
        print("\n".join(commands))
        return
    run_all(commands, args.jobs, threads)
    kept = curves or {}
    records = [record_of(command, kept.get(place(command)[0], ())) for command in commands]
    write_lines(RESULTS / f"{name.replace('_', '-')}.jsonl", records)
    make.main([page for page, about in make.PAGES.items() if f"{name.replace('_', '-')}.jsonl"
               in about.records])
