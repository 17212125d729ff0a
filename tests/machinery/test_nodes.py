"""Several machines: two launchers on this one, as torchrun --nnodes=2 starts them on two."""
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT, log_lines

SHORT = ["--limit", 128, "--batch-size", 16, "--device", "cpu", "--workers", 0, "--log-every", 1]
STAGES = {
    "vqkd.py": ["--steps", 6, "--continuous-steps", 1],
    "pretrain.py": ["--steps", 4],
    "finetune.py": ["--steps", 4],
    "segment.py": ["--steps", 4, "--train-images", 64],
}


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def launcher(port, script, *flags, restarts=0):
    """One of two machines: torchrun with one process, in a session of its own."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
             "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=test",
             f"--max-restarts={restarts}", ROOT / script, *flags]
    return subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True,
                            env=os.environ | dict(OMP_NUM_THREADS="1"))


def two_machines(port, script, *flags, restarts=0):
    """The first holds the meeting place. The second starts when that is open."""
    first = launcher(port, script, *flags, restarts=restarts)
    deadline = time.time() + 60
    while time.time() < deadline:
        with socket.socket() as s:
            if s.connect_ex(("localhost", port)) == 0:
                break
        time.sleep(0.2)
    return first, launcher(port, script, *flags, restarts=restarts)


def wait_for_step(log, step):
    deadline = time.time() + 200
    while time.time() < deadline and not (log.exists() and f'"step": {step},' in log.read_text()):
        time.sleep(0.1)


def trained_steps(path):
    return [line["step"] for line in log_lines(path) if "lr" in line]


def kill_all(out):
    """Launchers and their processes, which have a session of their own, at once (Linux)."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:                      # it has ended meanwhile
            continue
        if str(out) in words:
            os.kill(int(folder.name), signal.SIGKILL)


@pytest.mark.slow
def test_every_stage_trains_on_two_machines(tmp_path):
    for script, flags in STAGES.items():
        both = two_machines(free_port(), script, *SHORT, *flags, "--out", tmp_path)
        texts = [machine.communicate(timeout=300)[0] for machine in both]
        assert [machine.returncode for machine in both] == [0, 0], "\n".join(texts)
        name = script.removesuffix(".py")
        assert (tmp_path / f"{name}.pt").exists()
        assert trained_steps(tmp_path / f"{name}.jsonl") == list(range(flags[1]))


@pytest.mark.slow
def test_when_machines_died_the_same_commands_go_on_where_the_run_was(tmp_path):
    steps = 60
    flags = [*SHORT, "--steps", steps, "--continuous-steps", 1, "--save-every", 5,
             "--out", tmp_path]
    log = tmp_path / "vqkd.jsonl"
    first, second = two_machines(free_port(), "vqkd.py", *flags)
    wait_for_step(log, 12)
    kill_all(tmp_path)
    for machine in (first, second):
        machine.communicate()
    assert (tmp_path / "vqkd.resume.pt").exists()

    both = two_machines(free_port(), "vqkd.py", *flags)
    texts = [machine.communicate(timeout=400)[0] for machine in both]
    assert [machine.returncode for machine in both] == [0, 0], "\n".join(texts)
    assert trained_steps(log) == list(range(steps))
    assert (tmp_path / "vqkd.pt").exists()
