"""What the tests share: one thread, a way to run a stage as a user would, the golden files."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs whole stages or several processes; not quick")


@pytest.fixture(autouse=True)
def same_random_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture
def golden():
    """golden("name") -> the dict of that file; without the files the test is skipped."""
    folder = os.environ.get("BEIT2_GOLDEN")
    if not folder:
        pytest.skip("BEIT2_GOLDEN is not set: the tensors of the authors' code are not at hand")
    return lambda name: torch.load(Path(folder) / f"{name}.pt", weights_only=True)


def stage(script, *flags, processes=1, check=True, cwd=None):
    """Run a command as a user would.  -> CompletedProcess

    script: "vqkd.py" (python, or torchrun for several processes) or "extras.bench" (python -m).
    """
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    folders = "extras", "results", "assignments"
    module = isinstance(script, str) and script.partition(".")[0] in folders
    command += ["-m", script] if module else [str(ROOT / script)]
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run([*command, *map(str, flags)], capture_output=True, text=True,
                          timeout=600, cwd=cwd, env=environment)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def log_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
