"""extras/slurm.sh: a run at its time limit saves, asks for the queue, and goes on from there."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT, log_lines

# Stand-ins for the commands of a cluster.
SRUN = '#!/bin/sh\nexec "$@"\n'
SCONTROL = '#!/bin/sh\nif [ "$1" = show ]; then echo localhost; else echo "$@" >> "$ASKED"; fi\n'


def start(folder, *words):
    """The job script as SLURM starts it, in a session of its own."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = folder / name
        path.write_text(text)
        path.chmod(0o755)
    bin_folder = Path(sys.executable).parent                 # torchrun lies beside python
    env = os.environ | dict(PATH=f"{folder}:{bin_folder}:{os.environ['PATH']}", SLURM_JOB_ID="7",
                            SLURM_GPUS_ON_NODE="1", ASKED=str(folder / "asked"))
    words = [str(ROOT / "extras" / "slurm.sh"), *map(str, words)]
    return subprocess.Popen(words, cwd=ROOT, env=env,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True)


@pytest.mark.slow
def test_a_job_at_its_time_limit_saves_asks_for_the_queue_and_goes_on_there(tmp_path):
    out = tmp_path / "run"
    flags = ["vqkd.py", "--out", out, "--steps", 150, "--continuous-steps", 1, "--limit", 320,
             "--log-every", 5, "--device", "cpu"]
    job = start(tmp_path, *flags)
    log = out / "vqkd.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not (log.exists() and '"step": 10' in log.read_text()):
        time.sleep(0.2)
    os.kill(job.pid, signal.SIGUSR1)                         # SLURM tells the script alone
    text, _ = job.communicate(timeout=120)
    assert (out / "vqkd.resume.pt").exists(), text
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert "saved after step" in text        # torchrun adds a traceback of its own

    stopped_at = max(line["step"] for line in log_lines(log) if "step" in line)
    # The job starts anew from the queue, this time with enough time.
    job = start(tmp_path, *flags)
    text, _ = job.communicate(timeout=400)
    assert job.returncode == 0, text
    steps = [line["step"] for line in log_lines(log) if "lr" in line]
    assert steps == sorted(set(steps)) and steps[-1] == 149 > stopped_at
    assert (tmp_path / "asked").read_text() == "requeue 7\n"     # not a second time
