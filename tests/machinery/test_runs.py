"""Stages 1 and 2 as a user runs them: in a row, killed and started again, on two processes."""
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import to_pil_image

import vqkd
from support import data
from support.files import read_file
from conftest import ROOT, log_lines, stage

pytestmark = pytest.mark.slow
FEW = "--limit 128 --batch-size 32 --amp no --workers 0 --device cpu --log-every 1".split()
VQKD = [*FEW, "--codes", 16, "--continuous-steps", 2]  # k-means after two steps


def train_losses(path):
    return [
        line["loss"]
        for line in log_lines(path)
        if "loss" in line and "split" not in line and "summary" not in line
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a tokenizer and a backbone, made by the two commands."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    stage("vqkd.py", *VQKD, "--steps", 16, "--out", out)
    stage("pretrain.py", *FEW, "--steps", 12, "--out", out)
    return out


# --- one after the other --------------------------------------------------------------------------
def test_both_stages_learn_and_leave_only_their_hand_over_and_log(run):
    assert sorted(f.name for f in run.iterdir()) == [
        "pretrain.jsonl",
        "pretrain.pt",
        "vqkd.jsonl",
        "vqkd.pt",
    ]
    for name, steps in (("vqkd", 16), ("pretrain", 12)):
        losses, lines = train_losses(run / f"{name}.jsonl"), log_lines(run / f"{name}.jsonl")
        assert len(losses) == steps and np.mean(losses[-3:]) < np.mean(losses[:3])
        assert "args" in lines[0] and lines[-1]["summary"] == 1 and lines[-1]["step"] == steps
        file = read_file(run / f"{name}.pt", kind=name)
        assert (file["preset"], file["data"], file["image_size"], file["step"]) == (
            "tiny",
            "shapes",
            48,
            steps,
        )
    assert log_lines(run / "vqkd.jsonl")[-1]["codes_used"] > 8
    assert train_losses(run / "pretrain.jsonl")[0] < 1.2 * 2 * np.log(
        16
    )  # an untrained guess costs ln K per head


@pytest.mark.parametrize("name, flags, steps", [("vqkd", VQKD, 16), ("pretrain", FEW, 12)])
def test_the_same_command_again_is_done_and_another_one_is_refused(run, name, flags, steps):
    before = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in run.iterdir()}
    again = stage(f"{name}.py", *flags, "--steps", steps, "--out", run)
    assert (
        again.stdout.startswith("already done")
        and again.stdout.count("\n") == 1
        and not again.stderr
    )
    other = stage(f"{name}.py", *flags, "--steps", steps, "--seed", 1, "--out", run, check=False)
    assert (
        other.returncode == 2 and "--seed 0 -> 1" in other.stderr and other.stderr.count("\n") == 1
    )
    assert {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in run.iterdir()} == before


def test_extras_features_writes_the_ids_that_the_tokenizer_gives(run, tmp_path):
    images = data.open_data("shapes", "val", limit=3, labelled=False)
    (tmp_path / "images").mkdir()
    for i in range(3):
        to_pil_image(images[i][0]).save(tmp_path / "images" / f"{i}.png")
    stage("extras.features", run / "vqkd.pt", tmp_path / "images", "--out",
          tmp_path / "tokens.npz", "--device", "cpu")
    written = np.load(tmp_path / "tokens.npz")
    ids = vqkd.load_tokenizer(run / "vqkd.pt").encode(
        torch.stack([images[i][0] for i in range(3)]) / 255
    )
    assert written["ids"].shape == (3, 6, 6) and np.array_equal(
        written["ids"].reshape(3, -1), ids.numpy()
    )
    assert [os.path.basename(name) for name in written["names"]] == ["0.png", "1.png", "2.png"]


def test_a_tokenizer_goes_on_from_another_and_tells_the_code_use_before_and_after(run, tmp_path):
    done = stage("vqkd.py", *VQKD, "--steps", 4, "--init", run / "vqkd.pt", "--out", tmp_path)
    assert (
        "before" in done.stdout and "after" in done.stdout and "codes used on shapes" in done.stdout
    )
    before = next(
        line for line in log_lines(tmp_path / "vqkd.jsonl") if line.get("note") == "before"
    )
    end = log_lines(run / "vqkd.jsonl")[-1]
    assert (
        before["cosine"] == pytest.approx(end["cosine"], abs=1e-4)
        and before["codes_used"] == end["codes_used"]
    )


@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("pretrain.py", [], "python vqkd.py"),
        ("pretrain.py", ["--tokenizer", ROOT / "README.md"], "README.md"),
        ("pretrain.py", ["--data", "no/such/folder"], ""),
        ("vqkd.py", ["--data", "no/such/folder"], "no/such/folder"),
        ("vqkd.py", ["--init", "no/such.pt"], "no/such.pt"),
        ("vqkd.py", ["--steps", 1, "--continuous-steps", 0, "--out", "/dev/null/run"], "/dev/null"),
        ("vqkd.py", ["--lr", "nan"], "--lr"),
        ("vqkd.py", ["--batch-size", "100000"], "--batch-size"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(script, flags, words, tmp_path):
    done = stage(script, "--limit", 64, "--workers", 0, "--out", tmp_path, *flags, check=False)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, (
        done.stderr
    )
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("*.pt"))


# --- killed and started again ---------------------------------------------------------------------
@pytest.mark.parametrize("name", ["vqkd", "pretrain"])
def test_a_killed_run_started_again_ends_with_the_same_bits_and_the_same_log(run, name, tmp_path):
    flags = VQKD if name == "vqkd" else [*FEW, "--tokenizer", run / "vqkd.pt"]
    flags = [*flags, "--steps", 14, "--save-every", 3]
    stage(f"{name}.py", *flags, "--out", tmp_path / "whole")
    parts = tmp_path / "parts"
    command = [sys.executable, ROOT / f"{name}.py", *flags, "--out", parts]
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.DEVNULL,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
    )
    while not (parts / f"{name}.resume.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (parts / f"{name}.pt").exists()
    stage(f"{name}.py", *flags, "--out", parts)
    one, two = (read_file(folder / f"{name}.pt")["model"] for folder in (tmp_path / "whole", parts))
    assert all(torch.equal(one[k], two[k]) for k in one)
    one, two = (
        [
            {k: v for k, v in line.items() if k not in ("images_per_s", "time")}
            for line in log_lines(folder / f"{name}.jsonl")[1:]
        ]
        for folder in (tmp_path / "whole", parts)
    )
    assert one == two


# --- one process or several -----------------------------------------------------------------------
WITNESS = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch, vqkd
from support.process import launch
evaluate = vqkd.evaluate
def keep_codebook(model, *rest):
    torch.save(model.quantize.state_dict(), f"{sys.argv[2]}.{os.environ['RANK']}")
    return evaluate(model, *rest)
vqkd.evaluate = keep_codebook
launch(lambda: vqkd.main(sys.argv[3:]))
"""


def agree(one, two):
    """Final weights to 1e-5; so is what the whole validation set gives."""
    for name in ("vqkd", "pretrain"):
        if (one / f"{name}.pt").exists():
            a, b = (read_file(folder / f"{name}.pt") for folder in (one, two))
            for k in a["model"]:
                assert (a["model"][k] - b["model"][k]).abs().max() <= 1e-5, k
            for k in ("cosine", "commit", "loss", "loss_mim", "loss_cls"):
                assert a["result"].get(k, 0) == pytest.approx(b["result"].get(k, 0), abs=1e-4)


def test_two_processes_and_accumulation_train_the_tokenizer_of_one_process_with_equal_codebooks(
    tmp_path,
):
    flags = [
        *FEW,
        "--codes",
        16,
        "--continuous-steps",
        1,
        "--steps",
        3,
    ]  # two steps with the quantizer
    stage("vqkd.py", *flags, "--out", tmp_path / "one")
    stage("vqkd.py", *flags, "--micro-batch", 8, "--out", tmp_path / "parts")
    (tmp_path / "witness.py").write_text(WITNESS)
    stage(
        tmp_path / "witness.py",
        ROOT,
        tmp_path / "codes",
        *flags,
        "--out",
        tmp_path / "two",
        processes=2,
    )
    agree(tmp_path / "one", tmp_path / "parts")
    agree(tmp_path / "one", tmp_path / "two")
    a, b = (torch.load(tmp_path / f"codes.{rank}") for rank in (0, 1))
    assert a.keys() == {"embedding.weight", "cluster_size"} and all(
        torch.equal(a[k], b[k]) for k in a
    )


@pytest.mark.parametrize(
    "variant",
    [[], ["--no-aggregation"], ["--separate-head"]],
    ids=lambda v: v[0] if v else "default",
)
def test_two_processes_and_accumulation_train_the_backbone_of_one_process(run, variant, tmp_path):
    flags = [*FEW, "--tokenizer", run / "vqkd.pt", "--steps", 3, *variant]
    stage("pretrain.py", *flags, "--out", tmp_path / "one")
    stage("pretrain.py", *flags, "--micro-batch", 8, "--out", tmp_path / "parts")
    stage("pretrain.py", *flags, "--out", tmp_path / "two", processes=2)
    agree(tmp_path / "one", tmp_path / "parts")
    agree(tmp_path / "one", tmp_path / "two")


def test_under_torchrun_a_finished_run_is_done_for_all_and_a_mistake_is_said_once(run):
    flags = [*VQKD, "--out", run]
    done = stage("vqkd.py", *flags, "--steps", 16, processes=2)
    assert done.stdout.count("already done") == 1
    other = stage("vqkd.py", *flags, "--steps", 17, processes=2, check=False)
    assert (
        other.returncode
        and other.stderr.count("error: ") == 1
        and "--steps 16 -> 17" in other.stderr
    )


# --- the paper's size -----------------------------------------------------------------------------
def test_the_base_models_run_at_224_pixels(tmp_path):
    flags = (
        "--model base --steps 2 --batch-size 2 --data shapes --limit 8 --amp no --workers 0 "
        "--device cpu "
        "--log-every 1"
    ).split()
    stage(
        "vqkd.py",
        *flags,
        "--teacher",
        "hog",
        "--codes",
        64,
        "--continuous-steps",
        1,
        "--out",
        tmp_path,
    )
    stage("pretrain.py", *flags, "--out", tmp_path)
    first = train_losses(tmp_path / "pretrain.jsonl")[0]
    assert abs(first - 2 * np.log(64)) < 0.5  # two heads, ln K each
