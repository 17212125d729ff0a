"""The folder OUT: one run at a time, nobody else's files, no folder with another purpose."""
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import vqkd
from conftest import ROOT, log_lines, stage
from support.args import fill_in, run_parser
from support.files import Lock, UserError, refuse_unwritable, set_aside
from support.process import Process
from support.run import find_resume_file

FEW = "--device cpu --amp no --limit 64 --batch-size 16 --log-every 1 --workers 0".split()
HOLD = """
import sys
sys.path.insert(0, sys.argv[1])
from support.files import Lock
lock = Lock(sys.argv[2])
print("held", flush=True)
sys.stdin.read()
"""


def names(folder):
    return sorted(f.name for f in folder.iterdir())


# --- a folder to write into -----------------------------------------------------------------------
@pytest.mark.parametrize("command, flags, name", [
    ("linprobe", "--checkpoint x.pt", "run"), ("extras.features", "x.pt photos", "x.npz"),
    ("extras.visualize", "RUN", "figures"), ("extras.visualize", "RUN/vqkd.jsonl", "x.png"),
    ("extras.bench", "--stage all", "x.jsonl")])
def test_a_folder_that_takes_no_file_is_refused_before_anything_is_computed(
        tmp_path, command, flags, name):
    main = importlib.import_module(command).main
    (tmp_path / "file").write_text("")
    words = flags.replace("RUN", str(tmp_path)).split()
    for folder in ("/proc", tmp_path / "file"):
        with pytest.raises(UserError, match=f"cannot write .*{folder}"):
            main([*words, "--out", f"{folder}/{name}"])


def test_a_run_whose_folder_takes_no_file_ends_at_its_start_also_if_it_only_measures(tmp_path):
    for stage_name in ("finetune", "finetune_eval", "segment_eval"):
        args = vqkd.parse_args(["--out", "/proc/self"])
        with pytest.raises(UserError, match="cannot write into /proc/self"):
            find_resume_file(stage_name, args, Process())
    refuse_unwritable(tmp_path / "to" / "be" / "made")
    assert names(tmp_path) == []


# --- one run at a time ----------------------------------------------------------------------------
@pytest.fixture
def other(tmp_path):
    """other("vqkd"): another process that holds the lock of a stage in tmp_path."""
    processes = []

    def hold(name):
        words = [sys.executable, "-c", HOLD, ROOT, tmp_path / f"{name}.lock"]
        process = subprocess.Popen(list(map(str, words)), stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process
    yield hold
    for process in processes:
        process.kill()
        process.communicate()


def test_a_second_run_in_a_folder_is_refused_until_the_first_one_ends_however_it_ends(
        tmp_path, other):
    process = other("vqkd")
    with pytest.raises(UserError, match=f"process {process.pid} on .* is writing .*vqkd.lock"):
        Lock(tmp_path / "vqkd.lock")
    Lock(tmp_path / "pretrain.lock").release()               # another stage is no harm
    process.send_signal(signal.SIGKILL)
    process.wait()
    Lock(tmp_path / "vqkd.lock").release()
    assert names(tmp_path) == []


def test_fresh_moves_nothing_that_another_run_is_just_writing(tmp_path, other):
    for name in ("vqkd.pt", "pretrain.jsonl"):
        (tmp_path / name).write_text("")
    other("pretrain")
    before = names(tmp_path)
    args = vqkd.parse_args(["--out", str(tmp_path), "--fresh"])
    with pytest.raises(UserError, match="is writing .*pretrain.lock"):
        find_resume_file("vqkd", args, Process())
    assert names(tmp_path) == before
    other("vqkd")
    with pytest.raises(UserError, match="is writing .*vqkd.lock"):
        find_resume_file("vqkd", args, Process())


def test_a_forked_worker_does_not_give_the_lock_up(tmp_path):
    lock = Lock(tmp_path / "vqkd.lock")
    pid = os.fork()
    if not pid:
        lock.release()
        os._exit(0)
    os.waitpid(pid, 0)
    assert names(tmp_path) == ["vqkd.lock"]
    lock.release()


def test_a_folder_that_a_refused_command_made_goes_again(tmp_path):
    args = vqkd.parse_args(["--out", str(tmp_path / "new" / "run")])
    process = Process()
    find_resume_file("vqkd", args, process)
    assert names(tmp_path / "new" / "run") == ["vqkd.lock"]
    process.leave_folder()
    assert names(tmp_path / "new") == []


# --- what --fresh moves ---------------------------------------------------------------------------
def test_fresh_moves_what_this_project_wrote_and_nothing_else(tmp_path):
    out = tmp_path / "run"
    ours = ["bad_images.txt", "finetune_21k.pt", "finetune_eval.jsonl", "linprobe_random.jsonl",
            "pretrain.jsonl", "segment.png", "tokens.npz", "vqkd.jsonl", "vqkd.pt",
            "vqkd.resume.pt", "vqkd.resume.pt.prev"]
    theirs = ["model.py", "notes.txt", "vqkd.py", "vqkd.txt"]
    (out / "linprobe.features").mkdir(parents=True)
    (out / "photos").mkdir()
    for name in [*ours, *theirs]:
        (out / name).write_text(name)
    set_aside("vqkd", out)
    assert names(out) == sorted([*theirs, "photos"])
    assert names(tmp_path / "run.1") == sorted([*ours, "linprobe.features"])


def test_a_folder_in_which_fresh_may_not_write_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "vqkd.pt").write_text("")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="--fresh cannot move .*Permission denied.*--out"):
        set_aside("vqkd", tmp_path / "run")


# --- folders with another purpose -----------------------------------------------------------------
def out_of(*flags):
    args = run_parser("a stage").parse_args(list(map(str, flags)))
    fill_in(args, ["tiny"], {})
    return args.out


def test_a_folder_with_another_purpose_is_refused_as_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("home", "images"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for out in (".", "..", "/", tmp_path, "home", "link", "home/../home", ROOT, ROOT.parent):
        with pytest.raises(UserError, match=f"--out {out} is .*give a folder of its own"):
            out_of("--out", out)
    with pytest.raises(UserError, match="--out images is the folder of --data"):
        out_of("--data", tmp_path / "images", "--out", "images")
    for out in ("runs/tiny", "home/run", ROOT / "runs" / "tiny", "images/run", "shapes"):
        assert out_of("--out", out) == Path(out)


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="needs a folder nobody may write in")
@pytest.mark.parametrize("command", [
    ["vqkd.py"], ["finetune.py", "--init", "scratch"], ["segment.py", "--init", "scratch"],
    ["linprobe.py", "--source", "random"]], ids=lambda words: words[0])
def test_an_out_that_cannot_be_made_is_one_sentence_in_every_stage(command):
    done = stage(*command, "--steps", 1, "--limit", 12, "--device", "cpu", "--out",
                 "/sys/kernel/run", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write /sys/kernel/run/")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_same_command_twice_at_once_is_one_whole_run_and_one_sentence(tmp_path, processes):
    flags = [*FEW, "--steps", 40, "--continuous-steps", 1, "--out", tmp_path]
    launch = "-m torch.distributed.run --standalone --nproc-per-node=2".split()
    words = [sys.executable, *(launch if processes > 1 else []), ROOT / "vqkd.py", *flags]
    both = [subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
            for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in both]
    codes = [process.returncode for process in both]
    first = codes.index(0)
    assert codes[1 - first] == (2 if processes == 1 else 1)
    assert errors[1 - first].count("error: ") == 1
    assert "is writing there" in errors[1 - first]
    steps = [line["step"] for line in log_lines(tmp_path / "vqkd.jsonl")
             if "loss" in line and "split" not in line]
    assert steps == list(range(40))
    assert names(tmp_path) == ["vqkd.jsonl", "vqkd.pt"]
