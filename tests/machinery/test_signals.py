"""A stopped job keeps its work: whoever sends which signal, to whom, however often.

The slow tests stop whole commands, each in a process group of its own, and start them again.
"""
import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT, log_lines, stage
from support import data
from support.files import read_file
from support.process import STOP_SIGNALS, StopSignal, ignore_stop_signals, signals_wait

SHARED = "--device cpu --amp no --limit 64 --batch-size 16 --log-every 1 --save-every 1000".split()
STAGES = {
    "vqkd": "--codes 16 --continuous-steps 2",
    "pretrain": "--mask-patches 10",         # and a tokenizer
    "finetune": "--init scratch --evaluations 1",
    "segment": "--init scratch --evaluations 1"}


@pytest.fixture(autouse=True)
def handlers_as_they_were():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)             # though these tests run under nohup
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# --- the handler ----------------------------------------------------------------------------------
@pytest.fixture
def exits(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_outside_the_loop_ends_the_process_and_in_the_loop_it_is_noted(exits, number):
    handler = StopSignal()
    handler(number, None)
    assert exits == [128 + number]
    handler.in_loop = True
    handler(number, None)
    assert exits == [128 + number]
    assert handler.received == number


def test_a_signal_that_is_sent_twice_or_followed_by_another_does_not_cut_saving_short(exits):
    handler = StopSignal()
    handler.in_loop = True
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        handler(number, None)
    assert exits == []
    assert handler.received == signal.SIGUSR1


def test_a_second_ctrl_c_after_a_second_ends_the_process_at_once_but_not_under_torchrun(
        exits, monkeypatch):
    handler = StopSignal()
    handler.in_loop = True
    handler(signal.SIGINT, None)
    handler.first -= 2
    monkeypatch.setenv("RANK", "0")
    handler(signal.SIGINT, None)
    assert exits == []
    monkeypatch.delenv("RANK")
    handler(signal.SIGINT, None)
    assert exits == [130]


def test_under_nohup_a_closed_terminal_does_not_stop_a_run():
    handler = StopSignal()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    handler.handle(STOP_SIGNALS)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGUSR1) is handler


def test_a_signal_to_a_worker_that_has_hardly_begun_waits_until_it_ignores_signals():
    with signals_wait():
        pid = os.fork()
        if not pid:
            time.sleep(0.5)
            ignore_stop_signals()
            time.sleep(0.1)                  # whatever waited would come now
            os._exit(7)
    for number in STOP_SIGNALS:
        subprocess.run(["bash", "-c", f"kill -{number} {pid}"], check=True)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_loader_workers_outlive_stop_signals_of_others_and_end_when_their_parent_says_so():
    dataset = data.open_data("shapes", "train", limit=64)
    batches = iter(data.make_loader(dataset, data.TrainBatches(64, 8, 30), 2, "cpu"))
    first = next(batches)
    workers = list(batches._workers)
    for number in STOP_SIGNALS:
        for worker in workers:               # kill is another process, as launchers and shells are
            subprocess.run(["bash", "-c", f"kill -{number} {worker.pid}"], check=True)
    rest = list(batches)
    assert len([first, *rest]) == 30
    assert all(worker.is_alive() for worker in workers)
    workers[0].terminate()
    workers[0].join(timeout=20)
    assert workers[0].exitcode == 0


# --- whole commands -------------------------------------------------------------------------------
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node=2".split()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    out = tmp_path_factory.mktemp("signals")
    stage("vqkd.py", *SHARED, *STAGES["vqkd"].split(), "--steps", 4, "--workers", 0, "--out", out)
    return out / "vqkd.pt"


def flags_of(name, tokenizer, steps, workers):
    flags = [*SHARED, *STAGES[name].split(), "--steps", steps, "--workers", workers]
    return [*flags, "--tokenizer", tokenizer] if name == "pretrain" else flags


def start(name, flags, out, launch=()):
    words = [sys.executable, *launch, ROOT / f"{name}.py", *flags, "--out", out]
    return subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True,
                            env=os.environ | dict(OMP_NUM_THREADS="1"))


def wait_for_step(process, log, step):
    while not (log.exists() and f'"step": {step}' in log.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def descendants(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    children = list(map(int, found.stdout.split()))
    return [pid] + [grandchild for child in children for grandchild in descendants(child)]


def outcome(out, name):
    """Weights and log. Clocks and the first line, which holds the folder's name, are left out."""
    lines = [{k: v for k, v in line.items() if k not in ("images_per_s", "time")}
             for line in log_lines(out / f"{name}.jsonl")[1:]]
    return read_file(out / f"{name}.pt")["model"], lines


def same(one, two, name):
    (weights, log), (other_weights, other_log) = outcome(one, name), outcome(two, name)
    assert log == other_log
    assert all(torch.equal(weights[k], other_weights[k]) for k in weights)


@pytest.mark.slow
@pytest.mark.parametrize("name, number", [
    ("vqkd", signal.SIGUSR1), ("pretrain", signal.SIGTERM), ("finetune", signal.SIGHUP),
    ("segment", signal.SIGTERM)])
def test_a_signal_to_the_whole_process_group_saves_and_the_same_command_ends_with_the_same_bits(
        tokenizer, tmp_path, name, number):
    flags = flags_of(name, tokenizer, steps=30, workers=1)
    process = start(name, flags, tmp_path / "run")
    wait_for_step(process, tmp_path / "run" / f"{name}.jsonl", 3)
    for _ in range(2):                       # as timeout and shells do
        os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert f"{number.name}: saved after step" in errors
    assert not (tmp_path / "run" / f"{name}.pt").exists()
    stage(f"{name}.py", *flags, "--out", tmp_path / "run")
    stage(f"{name}.py", *flags, "--out", tmp_path / "whole")
    same(tmp_path / "run", tmp_path / "whole", name)


@pytest.mark.slow
@pytest.mark.parametrize("name, number, everybody", [
    ("vqkd", signal.SIGTERM, False), ("vqkd", signal.SIGHUP, False),
    ("vqkd", signal.SIGTERM, True), ("segment", signal.SIGUSR1, True)], ids=str)
def test_under_torchrun_a_signal_saves_whether_its_launcher_gets_it_or_all_processes(
        tmp_path, name, number, everybody):
    flags = flags_of(name, None, steps=30, workers=1)
    process = start(name, flags, tmp_path / "run", launch=TORCHRUN)
    wait_for_step(process, tmp_path / "run" / f"{name}.jsonl", 3)
    if everybody:                            # as SLURM does; torchrun itself dies of SIGUSR1
        for pid in reversed(descendants(process.pid)):
            with contextlib.suppress(ProcessLookupError):    # some may end through the others
                os.kill(pid, number)
    else:
        os.killpg(process.pid, number)       # ranks have groups of their own
    _, errors = process.communicate(timeout=90)
    assert process.returncode
    assert f"{number.name}: saved after step" in errors
    assert "Traceback" not in errors.split(": saved after step")[0]      # torchrun has one later
    assert "error:" not in errors
    process = start(name, flags, tmp_path / "whole", launch=TORCHRUN)
    stage(f"{name}.py", *flags, "--out", tmp_path / "run", processes=2)
    assert process.communicate(timeout=300) and process.returncode == 0
    same(tmp_path / "run", tmp_path / "whole", name)
