"""Nothing is lost when a run is stopped, killed or restarted, or when a disk is full.

Whole commands, tiny. results/kills.py kills many more runs.
"""
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import vqkd
from support.files import describe_run, read_file, write_file
from support.process import Process
from support.run import find_resume_file
from conftest import ROOT, log_lines, stage

FEW = ("--device cpu --limit 64 --batch-size 16 --amp no --log-every 1 --codes 16 "
       "--continuous-steps 2").split()
ENVIRONMENT = os.environ | dict(OMP_NUM_THREADS="1")


def start(out, *flags, launch=(), **options):
    """A tokenizer run in the background."""
    words = [sys.executable, *launch, ROOT / "vqkd.py", *FEW, *flags, "--out", out]
    return subprocess.Popen(
        list(map(str, words)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=ENVIRONMENT,
        **options,
    )


def wait_for(process, condition):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def steps_logged(out):
    log = out / "vqkd.jsonl"
    return (
        [x["step"] for x in log_lines(log) if "loss" in x and "split" not in x]
        if log.exists()
        else []
    )


def outcome(out):
    """Weights and log. Clocks and the first line, which holds the folder's name, are left out."""
    return read_file(out / "vqkd.pt")["model"], [
        {k: v for k, v in line.items() if k not in ("images_per_s", "time")}
        for line in log_lines(out / "vqkd.jsonl")[1:]
    ]


def same(one, two):
    (weights, log), (weights_, log_) = outcome(one), outcome(two)
    assert all(torch.equal(weights[k], weights_[k]) for k in weights) and log == log_


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("resume") / "whole"
    stage("vqkd.py", *FEW, "--steps", 12, "--workers", 0, "--out", out)
    return out


# --- stopped, killed ------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("number, workers", [(signal.SIGTERM, 0), (signal.SIGINT, 3)])
def test_a_stopped_run_saves_exits_cleanly_and_goes_on_whatever_the_number_of_workers(
    whole, tmp_path, number, workers
):
    flags = ["--steps", 12, "--workers", workers, "--save-every", 1000]
    process = start(tmp_path / "run", *flags)
    wait_for(process, lambda: len(steps_logged(tmp_path / "run")) >= 4)
    os.killpg(process.pid, number)  # Ctrl-C reaches the loader's workers, too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors, errors
    state = read_file(tmp_path / "run" / "vqkd.resume.pt")
    assert (
        f"{number.name}: saved after step {state['step'] - 1}; the same command goes on" in errors
    )
    assert steps_logged(tmp_path / "run")[-1] == state["step"] - 1  # nothing was lost
    stage("vqkd.py", *FEW, *flags, "--out", tmp_path / "run")
    same(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(whole, tmp_path):
    flags = ["--steps", 12, "--workers", 1, "--save-every", 1]
    process, out = start(tmp_path / "run", *flags), tmp_path / "run"
    wait_for(process, lambda: (out / "vqkd.resume.pt").exists())
    wait_for(process, (out / "vqkd.resume.pt.tmp").exists)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    stage("vqkd.py", *FEW, *flags, "--out", out)
    same(whole, out)
    assert sorted(f.name for f in out.iterdir()) == ["vqkd.jsonl", "vqkd.pt"]


def test_fresh_counts_for_the_first_start_only_when_torchrun_starts_a_run_again(
    tmp_path, monkeypatch
):
    args = vqkd.parse_args(["--out", str(tmp_path / "run"), "--fresh"])
    write_file(tmp_path / "run" / "vqkd.resume.pt", describe_run("vqkd", args) | dict(step=7))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert find_resume_file("vqkd", args, Process())["step"] == 7
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert (
        find_resume_file("vqkd", args, Process()) is None
        and (tmp_path / "run.1" / "vqkd.resume.pt").exists()
    )


# --- several processes ----------------------------------------------------------------------------
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node=2".split()


@pytest.mark.slow
def test_a_rank_that_dies_is_restarted_and_the_run_ends_as_if_nothing_had_happened(tmp_path):
    flags = ["--steps", 12, "--workers", 0, "--save-every", 2]
    done = start(tmp_path / "whole", *flags, launch=TORCHRUN)
    process = start(tmp_path / "run", *flags, "--fresh", launch=[*TORCHRUN, "--max-restarts=1"])
    wait_for(process, lambda: len(steps_logged(tmp_path / "run")) >= 6)
    ranks = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    output = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert done.wait(timeout=300) == 0
    same(tmp_path / "whole", tmp_path / "run")


FAILING = """
import os, sys
sys.path.insert(0, sys.argv[1])
import vqkd
from support.files import UserError
from support.process import launch
real = vqkd.CodebookHealth.notice_collapse
def fail(self, counts, run):
    if run.step == 4 and os.environ["RANK"] == "1":
        raise UserError("this rank fails on purpose: put it right")
    return real(self, counts, run)
vqkd.CodebookHealth.notice_collapse = fail
launch(lambda: vqkd.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_when_one_rank_fails_the_others_end_with_a_message_within_a_minute(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    begin = time.time()
    done = stage(
        tmp_path / "failing.py",
        ROOT,
        *FEW,
        "--steps",
        12,
        "--workers",
        0,
        "--out",
        tmp_path,
        processes=2,
        check=False,
    )
    assert done.returncode and time.time() - begin < 60
    assert "error: this rank fails on purpose: put it right" in done.stderr
    assert (
        "error: rank 0 lost another process" in done.stderr
        and "Traceback" not in done.stderr.split("error: rank 0")[0]
    )


@pytest.mark.slow
def test_four_processes_train_the_tokenizer_of_one_and_two_machines_are_as_good_as_one(
    whole, tmp_path
):
    flags = [*FEW, "--steps", 3, "--workers", 0]
    stage("vqkd.py", *flags, "--out", tmp_path / "one")
    stage("vqkd.py", *flags, "--out", tmp_path / "four", processes=4)
    # Two launchers that meet on the loopback address stand in for two machines.
    rendezvous = [
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        "--rdzv-id=two",
        "--rdzv-endpoint=127.0.0.1:29417",
    ]
    agents = [
        start(
            tmp_path / "two", "--steps", 3, "--workers", 0, launch=[*rendezvous, f"--node-rank={n}"]
        )
        for n in (0, 1)
    ]
    for agent in agents:
        output = agent.communicate(timeout=300)
        assert agent.returncode == 0, output
    a = read_file(tmp_path / "one" / "vqkd.pt")
    for name in ("four", "two"):
        b = read_file(tmp_path / name / "vqkd.pt")
        for k in a["model"]:
            difference = (a["model"][k] - b["model"][k]).abs().max()
            assert difference <= 1e-5, (name, k)
        assert a["result"]["cosine"] == pytest.approx(b["result"]["cosine"], abs=1e-4)


@pytest.mark.slow
def test_a_data_set_smaller_than_the_number_of_processes_is_one_sentence(tmp_path):
    done = stage(
        "vqkd.py",
        "--device",
        "cpu",
        "--limit",
        1,
        "--batch-size",
        2,
        "--out",
        tmp_path,
        processes=2,
        check=False,
    )
    assert done.returncode and done.stderr.count("error: ") == 1
    assert "error: 1 training images do not fill one batch of 2: lower --batch-size" in done.stderr


# --- disk -----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint_and_says_so(whole, tmp_path):
    out, limit = tmp_path / "run", 2_000_000  # no file may grow beyond; a resume file has 13 MB
    flags = ["--steps", 12, "--workers", 0, "--save-every", 4]
    process = start(out, *flags)
    wait_for(process, (out / "vqkd.resume.pt").exists)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = (out / "vqkd.resume.pt").read_bytes()
    full = [
        "bash",
        "-c",
        f'ulimit -f {limit // 1024}; exec "$@"',
        "bash",
        sys.executable,
        ROOT / "vqkd.py",
        *FEW,
        *flags,
        "--out",
        out,
    ]
    done = subprocess.run(
        list(map(str, full)), capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )
    assert (
        done.returncode == 2
        and "error: could not write" in done.stderr
        and "untouched" in done.stderr
    ), done.stderr
    assert "Traceback" not in done.stderr and not list(out.glob("*.tmp"))
    assert (out / "vqkd.resume.pt").read_bytes() == before
    stage("vqkd.py", *FEW, *flags, "--out", out)  # there is room again
    same(whole, out)


@pytest.mark.skipif(
    not os.path.isdir("/sys/kernel"),
    reason="needs a folder in which nobody may write, not even root",
)
def test_a_folder_that_may_not_be_written_is_one_sentence():
    done = stage(
        "vqkd.py", *FEW, "--steps", 3, "--workers", 0, "--out", "/sys/kernel/run", check=False
    )
    assert (
        done.returncode == 2
        and "error: cannot write /sys/kernel/run/" in done.stderr
        and done.stderr.count("\n") == 1
    )


@pytest.mark.slow
def test_a_folder_moved_while_running_ends_the_run_with_a_sentence_and_goes_on_when_put_back(
    whole, tmp_path
):
    flags = ["--steps", 12, "--workers", 0, "--save-every", 2]
    process, out = start(tmp_path / "run", *flags), tmp_path / "run"
    wait_for(process, (out / "vqkd.resume.pt").exists)
    out.rename(tmp_path / "elsewhere")
    _, errors = process.communicate(timeout=120)
    assert (
        process.returncode == 2 and "put the folder back" in errors and errors.count("\n") == 1
    ), errors
    if out.exists():  # made again by a checkpoint that fell into that moment
        for f in out.iterdir():
            f.unlink()
        out.rmdir()
    (tmp_path / "elsewhere").rename(out)
    stage("vqkd.py", *FEW, *flags, "--out", out)
    same(whole, out)
