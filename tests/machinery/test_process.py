"""Seeds, precision, exit codes, imports, memory."""
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT
from support.files import UserError
from support.process import Process, launch, resolve_amp, seed_all


def test_the_same_seeds_give_the_same_draws_from_all_three_generators():
    def draws(*numbers):
        seed_all(*numbers)
        return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()
    first = draws(0, 1, 2)
    assert draws(0, 1, 2) == first
    for other in ((0, 2, 1), (0, 12), (1, 1, 2)):
        assert all(a != b for a, b in zip(draws(*other), first, strict=True))


def test_bf16_products_are_bf16_and_others_float32():
    x = torch.ones(2, 2)
    for amp, dtype in (("bf16", torch.bfloat16), ("no", torch.float32)):
        with Process(amp=amp).autocast():
            assert (x @ x).dtype == dtype


@pytest.mark.parametrize("device, matrix_units, chosen", [
    ("cuda", False, "bf16"), ("cpu", True, "bf16"), ("cpu", False, "no"), ("mps", True, "no")])
def test_automatic_precision_depends_on_the_processor_alone(
        monkeypatch, device, matrix_units, chosen):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrix_units)
    assert resolve_amp("auto", torch.device(device)) == chosen
    for asked in ("no", "bf16"):
        assert resolve_amp(asked, torch.device(device)) == asked


@pytest.mark.parametrize("error, says", [
    (UserError("--lr is wrong"), "error: --lr is wrong\n"),
    (UserError("Caught UserError in worker 0.\nTraceback ...\nfiles.UserError: a.jpg is broken"),
     "error: a.jpg is broken\n")])
def test_a_user_error_is_one_sentence_and_exit_code_2(error, says, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as caught:
        launch(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == says


def test_an_error_that_is_no_mistake_of_the_user_keeps_its_traceback():
    def main():
        raise RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        launch(main)


def run_code(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    return done.stdout


def test_no_command_imports_what_it_may_not_need():
    commands = ("vqkd, pretrain, finetune, linprobe, segment, extras.visualize, extras.convert, "
                "results.factors, results.ablate")
    # Each of these takes as long to import as torch itself.
    slow = "torchvision open_clip timm scipy matplotlib torch._dynamo".split()
    code = f"import sys, {commands}; print([name for name in {slow} if name in sys.modules])"
    assert run_code(code) == "[]\n"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_that_a_step_frees_is_not_fetched_from_the_kernel_again():
    code = """
import resource, torch
from support.process import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**24)                                       # 64 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for keep in (False, True):
    keep_freed_memory(keep), faults()
    print(min(faults() for _ in range(20)))
"""
    returned, kept = map(int, run_code(code).split())
    assert 4 * kept < returned
