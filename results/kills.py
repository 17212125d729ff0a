"""Stop and kill training runs at random moments, and start them again by the same command.

    python -m results.kills                  # half an hour; -> results/kills.md, kills.jsonl
    python -m results.kills --page           # only the page, from the records

25 trials send a stop signal to all processes of a run. The others send SIGKILL, until each moment
of MOMENTS was met often enough with a resume file in the folder. What a kill left behind says
which moment it met. Each trial is compared with a run that nobody broke off: weights and codebook
bit for bit, and all log lines but for their clocks.

Records are kept in runs/kills.jsonl as they come (runs that change a file of git's would call
themselves dirty). Started again, the command makes the trials that are missing there.
"""
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from results.tables import RESULTS, ROOT, RUNS, read_lines, table, write_lines
from support.args import Parser, whole
from support.files import read_file
from support.process import launch

RECORDS = RUNS / "kills.jsonl"
# 4 epochs of 4 steps. A resume file after every third step, an evaluation after every fourth.
EPOCH = 4
STEPS = 4 * EPOCH
FEW = (f"--device cpu --limit 32 --batch-size 8 --steps {STEPS} --save-every 3 --log-every 1 "
       f"--seed 3")
STAGES = {
    "vqkd": "--amp bf16 --codes 16 --continuous-steps 3 --restart-dead-codes 4",
    "pretrain": "--amp no --micro-batch 4 --tokenizer TOKENIZER --drop-path 0.1",
    "finetune": "--amp bf16 --checkpoint BACKBONE --mixup 0.8 --cutmix 1 --erasing 0.25",
    "segment": "--amp no --micro-batch 4 --checkpoint BACKBONE --train-images 32 --evaluations 4"}
STOPS = 25
SIGNALS = "SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT"
WAYS = (0, 1), (2, 1), (0, 2), (2, 2)        # loader workers, processes
MOMENTS = "in a step", "writing a checkpoint", "between epochs", "after an evaluation"
STOP_TITLES = ["stage", "signal", "loader workers", "processes", "steps done", "exit code", "wrong"]
# By itself, torchrun hands on all of them but SIGUSR1.
TORCHRUN = f"-m torch.distributed.run --standalone --signals-to-handle {','.join(SIGNALS)}"

PAGE = """# Stopped or killed, and started again

`python -m results.kills` breaks runs off and starts them again by the same command. Each is then
compared with a run that nobody broke off: every tensor of the hand-over bit by bit, every line of
the log but for `images_per_s` and `time`. All trials: [kills.jsonl](kills.jsonl).

## Stop signals, sent to all processes of a run at a random moment of the training

A run has to exit with 128 + signal (under torchrun: not 0), without a traceback, and leave a
resume file that holds all steps done. **{stops} trials, {stops_wrong} with anything wrong.**

{stop_table}

## SIGKILL, to the launcher and all its processes at once

The moment is read from what the kill left: a half-written file; a line of an evaluation as the
last of the log; the last step of an epoch as its last line; any other step. **{kills} trials that
left a resume file, {kills_wrong} with anything wrong.** {not_counted} more left none (the first
comes after step 3) or came too late; they ended with {not_counted_wrong} differences.

{kill_table}

Runs of {steps} steps, workers 0 and 2, one and two processes, float32 and bfloat16; what is
compared with never had workers. {dates}, commit {commits}, {machines}, one thread, torch {torch}.
"""


# --- one run --------------------------------------------------------------------------------------
def command(stage, workers, processes):
    """The words of the command line behind `python`. TOKENIZER, BACKBONE and OUT are files."""
    words = []
    if processes > 1:
        words = [*TORCHRUN.split(), f"--nproc-per-node={processes}"]
    return [*words, f"{stage}.py", *FEW.split(), *STAGES[stage].split(),
            "--workers", str(workers), "--out", "OUT"]


def start(words, folder, out):
    """Run a command in a process group of its own; what it prints goes to OUT.stderr."""
    first = folder / "first"
    files = {"TOKENIZER": first / "vqkd.pt", "BACKBONE": first / "pretrain.pt", "OUT": out}
    words = [sys.executable, *(str(files.get(word, word)) for word in words)]
    # Each process of torchrun has its errors in a file of its own: those of the launcher hold its
    # traceback of the signal, which is no concern of ours.
    if "torch.distributed.run" in words:
        words[3:3] = ["--redirects", "3", "--log-dir", f"{out}.ranks"]
    with open(f"{out}.stderr", "w") as errors:
        return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors,
                                start_new_session=True, preexec_fn=hear_hangups,
                                env=os.environ | dict(OMP_NUM_THREADS="1"))


def hear_hangups():
    """Under nohup, runs would ignore SIGHUP, as they should."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def printed_errors(out):
    """What the run printed on stderr, but for what torchrun itself did."""
    ranks = sorted(Path(f"{out}.ranks").rglob("stderr.log")) or [Path(f"{out}.stderr")]
    return "\n".join(path.read_text() for path in ranks)


def clear(out):
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(f"{out}.ranks", ignore_errors=True)


def finish(words, folder, out):
    """Run a command to its end. RuntimeError if it fails."""
    shutil.rmtree(f"{out}.ranks", ignore_errors=True)
    code = start(words, folder, out).wait(timeout=600)
    if code:
        raise RuntimeError(f"{' '.join(words)}: exit code {code}\n{printed_errors(out)[-3000:]}")


def family(pid):
    """The process, its children and theirs. Linux; in no time, so that the moment is not missed."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):                   # a thread that has just ended
            for child in children.read_text().split():
                found += family(int(child))
    return found


def send(process, number):
    """A signal to the process group of each process of the run. Then wait until all have ended."""
    everyone = family(process.pid)
    groups = set()
    for pid in everyone:
        with contextlib.suppress(ProcessLookupError):
            groups.add(os.getpgid(pid))
    for group in sorted(groups, reverse=True):               # the launcher last
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)
    process.wait(timeout=120)
    while any(is_running(pid) for pid in everyone):
        time.sleep(0.01)


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"                      # nobody has asked for its exit code yet


# --- the moment -----------------------------------------------------------------------------------
def logged(log, step, evaluation=False):
    """Whether a line about this step stands in the log, or one about the evaluation after it."""
    lines = [line for line in read_text(log).splitlines() if f'"step": {step},' in line]
    return any(('"split": "val"' in line) == evaluation for line in lines)


def steps_logged(log):
    """How many steps the log holds: one line each, with a speed."""
    return read_text(log).count('"images_per_s": ')


def read_text(path):
    return path.read_text() if path.exists() else ""


def wait_for_moment(process, moment, out, stage, draw):
    """Return when the run is there, or has ended.  draw: random.Random"""
    log = out / f"{stage}.jsonl"
    resume = out / f"{stage}.resume.pt"
    epoch = draw.randint(1, 3)
    step = draw.choice([3, 4, 5, 6, 8, 9, 10])
    tests = {
        "in a step": lambda: logged(log, step),
        "writing a checkpoint": lambda: resume.exists() and Path(f"{resume}.tmp").exists(),
        "between epochs": lambda: logged(log, epoch * EPOCH - 1),
        "after an evaluation": lambda: logged(log, epoch * EPOCH - 1, evaluation=True)}
    while process.poll() is None and not tests[moment]():
        time.sleep(0.0005)
    if moment == "in a step":
        time.sleep(draw.uniform(0, 0.05))


def moment_met(out, stage):
    """Which of MOMENTS a kill met, read from what it left.  None: no resume file, or too late"""
    if (out / f"{stage}.pt").exists() or not (out / f"{stage}.resume.pt").exists():
        return None
    if (out / f"{stage}.resume.pt.tmp").exists():
        return "writing a checkpoint"
    lines = [line for line in read_text(out / f"{stage}.jsonl").splitlines() if line[-1:] == "}"]
    last = json.loads(lines[-1])
    if last.get("split") == "val":
        return "after an evaluation"
    if (last["step"] + 1) % EPOCH == 0:
        return "between epochs"
    return "in a step"


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
            found.append(f"log line of step {a.get('step', 'none')}")
    if len(log) != len(other_log):
        found.append("length of the log")
    return found


def trial(case, folder, unbroken, draw):
    """Break a run off, look at what it left, let it go on, compare.  -> record"""
    stage, workers, processes = case["stage"], case["workers"], case["processes"]
    out = folder / "parts"
    clear(out)
    words = command(stage, workers, processes)
    process = start(words, folder, out)
    wait_for_moment(process, case["aim"], out, stage, draw)
    send(process, getattr(signal, case["signal"]))
    left = sorted(f.name for f in out.glob("*resume*"))
    met = moment_met(out, stage)
    steps_done = steps_logged(out / f"{stage}.jsonl")
    wrong = []
    if case["signal"] != "SIGKILL":
        wrong = stopped_badly(process.returncode, case, printed_errors(out))
        wrong += lost(out / f"{stage}.resume.pt", steps_done)
    finish(words, folder, out)
    wrong += differences(unbroken, contents(out, stage))
    about = read_lines(out / f"{stage}.jsonl")[0]
    facts = {name: about[name] for name in ("commit", "machine", "threads", "torch")}
    return case | dict(
        met=met, steps_done=steps_done, exit_code=process.returncode, left=left, wrong=wrong,
        command=" ".join(["python", *words]), amp=about["args"]["amp"], **facts,
        date=time.strftime("%Y-%m-%d"))


def lost(resume, steps_done):
    """What a resume file does not hold, as sentences."""
    if not resume.exists():
        return ["no resume file"]
    step = read_file(resume)["step"]
    return [] if step == steps_done else [f"{steps_done} steps done, {step} saved"]


def stopped_badly(code, case, errors):
    """What a stop signal did that it must not do, as sentences."""
    wrong = []
    expected = 128 + getattr(signal, case["signal"])
    if case["processes"] == 1 and code != expected:
        wrong.append(f"exit code {code}, not {expected}")
    if code == 0:
        wrong.append("exit code 0")
    if "Traceback" in errors:
        wrong.append("traceback")
    return wrong


# --- all trials -----------------------------------------------------------------------------------
def stop_cases():
    """25 trials: any two of stage, signal and way meet in the first 16, the rest are others."""
    for number in range(STOPS):
        stage = number % 4
        kind = number // 4 % 4
        workers, processes = WAYS[(stage + kind + number // 16) % 4]
        yield dict(number=number, stage=[*STAGES][stage], signal=SIGNALS[kind], workers=workers,
                   processes=processes, aim="in a step")


def kill_cases():
    """Without end: the moments in turn, each with every stage and way."""
    for number in range(STOPS, 10**6):
        turn = number - STOPS
        stage = turn // 4 % 4
        workers, processes = WAYS[(turn + turn // 4 + turn // 16) % 4]
        yield dict(number=number, stage=[*STAGES][stage], signal="SIGKILL", workers=workers,
                   processes=processes, aim=MOMENTS[turn % 4])


def missing(records, each):
    """The cases still to try: all stops, and kills until each moment was met `each` times."""
    done = {record["number"] for record in records}
    yield from (case for case in stop_cases() if case["number"] not in done)
    for case in kill_cases():
        met = collections.Counter(x["met"] for x in records if x["signal"] == "SIGKILL")
        if all(met[moment] >= each for moment in MOMENTS):
            return
        if case["number"] not in done and met[case["aim"]] < each:
            yield case


def run_trials(records, seed, each):
    """Append to `records` and to runs/kills.jsonl, trial by trial."""
    RECORDS.parent.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp())
    for stage in ("vqkd", "pretrain"):       # what the other stages start from
        finish(command(stage, 0, 1), folder, folder / "first")
    unbroken = {}                            # (stage, processes): contents
    for case in missing(records, each):
        key = case["stage"], case["processes"]
        if key not in unbroken:
            out = folder / f"{key[0]}{key[1]}"
            finish(command(key[0], 0, key[1]), folder, out)
            unbroken[key] = contents(out, key[0])
        draw = random.Random(f"{seed} {case['number']}")
        record = trial(case | dict(seed=seed), folder, unbroken[key], draw)
        records.append(record)
        with open(RECORDS, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
    shutil.rmtree(folder)


# --- the page -------------------------------------------------------------------------------------
def count_wrong(records):
    return sum(bool(record["wrong"]) for record in records)


def page(records):
    """The text of kills.md."""
    stops = [x for x in records if x["signal"] != "SIGKILL"]
    kills = [x for x in records if x["signal"] == "SIGKILL" and x["met"]]
    not_counted = [x for x in records if x["signal"] == "SIGKILL" and not x["met"]]
    stop_rows = [[x["stage"], x["signal"], x["workers"], x["processes"], x["steps_done"],
                  x["exit_code"], "; ".join(x["wrong"]) or "nothing"] for x in stops]
    kill_rows = []
    for stage in STAGES:
        of_stage = [x for x in kills if x["stage"] == stage]
        met = collections.Counter(x["met"] for x in of_stage)
        kill_rows.append([stage, *(met[moment] for moment in MOMENTS), count_wrong(of_stage)])
    met = collections.Counter(x["met"] for x in kills)
    kill_rows.append(["all", *(met[moment] for moment in MOMENTS), count_wrong(kills)])

    def values(name, length=None):
        return ", ".join(sorted({x[name][:length] for x in records}))
    return PAGE.format(
        stops=len(stops), stops_wrong=count_wrong(stops),
        stop_table="\n".join(table(STOP_TITLES, stop_rows)),
        kills=len(kills), kills_wrong=count_wrong(kills),
        kill_table="\n".join(table(["stage", *MOMENTS, "wrong"], kill_rows)),
        not_counted=len(not_counted), not_counted_wrong=count_wrong(not_counted),
        steps=STEPS, dates=values("date"), commits=values("commit", 7),
        machines=values("machine"), torch=values("torch"))


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("--seed", type=whole(0), default=0, help="of the moments")
    p.add_argument("--each", type=whole(1), default=5, help="SIGKILLs at each moment; default 5")
    p.add_argument("--fresh", action="store_true", help="forget the trials in runs/kills.jsonl")
    p.add_argument("--page", action="store_true", help="only write the page")
    args = p.parse_args(argv)
    if not args.page:
        if args.fresh:
            RECORDS.unlink(missing_ok=True)
        records = read_lines(RECORDS)
        run_trials(records, args.seed, args.each)
        write_lines(RESULTS / "kills.jsonl", records)
    text = page(read_lines(RESULTS / "kills.jsonl"))
    (RESULTS / "kills.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    launch(main)
