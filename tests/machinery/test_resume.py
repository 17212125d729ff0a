"""Nothing lost: stopped, killed, restarted, full disks, lost processes. Whole commands, tiny. More kills: results/kills.py."""
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from extras import convert
from support import engine, files
from support.run import contents
import vqkd
from support import weights
from conftest import ROOT, log_lines, stage

FEW = "--device cpu --limit 64 --batch-size 16 --amp no --log-every 1 --codes 16 --continuous-steps 2".split()
ENVIRONMENT = os.environ | dict(OMP_NUM_THREADS="1")


def start(out, *flags, launch=(), **options):
    """A tokenizer run in the background."""
    words = [sys.executable, *launch, ROOT / "vqkd.py", *FEW, *flags, "--out", out]
    return subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, env=ENVIRONMENT, **options)


def wait_for(process, condition):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def steps_logged(out):
    log = out / "vqkd.jsonl"
    return [x["step"] for x in log_lines(log) if "loss" in x and "split" not in x] if log.exists() else []


def outcome(out):
    """Weights, and the log without its clocks and without the first line, which holds the name of the folder."""
    return engine.read_file(out / "vqkd.pt")["model"], [
        {k: v for k, v in line.items() if k not in ("images_per_s", "time")} for line in log_lines(out / "vqkd.jsonl")[1:]]


def same(one, two):
    (weights, log), (weights_, log_) = outcome(one), outcome(two)
    assert all(torch.equal(weights[k], weights_[k]) for k in weights) and log == log_


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("resume") / "whole"
    stage("vqkd.py", *FEW, "--steps", 12, "--workers", 0, "--out", out)
    return out


# ------------------------------------------------------------------------------------------------------ stopped, killed
@pytest.mark.slow
@pytest.mark.parametrize("number, workers", [(signal.SIGTERM, 0), (signal.SIGINT, 3)])
def test_a_stopped_run_saves_exits_cleanly_and_goes_on_whatever_the_number_of_workers(whole, tmp_path, number, workers):
    flags = ["--steps", 12, "--workers", workers, "--save-every", 1000]
    process = start(tmp_path / "run", *flags)
    wait_for(process, lambda: len(steps_logged(tmp_path / "run")) >= 4)
    os.killpg(process.pid, number)                           # Ctrl-C reaches the loader's workers, too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors, errors
    state = engine.read_file(tmp_path / "run" / "vqkd.resume.pt")
    assert f"{number.name}: saved after step {state['step'] - 1}; the same command goes on" in errors
    assert steps_logged(tmp_path / "run")[-1] == state["step"] - 1           # nothing was lost
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


def test_at_any_moment_of_writing_one_whole_resume_file_is_there(tmp_path, monkeypatch):
    """Writing stops with an error at each of its moments in turn; what a resumed run would read is always whole."""
    args = vqkd.parse_args(["--out", str(tmp_path)])
    def save(step):
        engine.save_resume("vqkd", args, engine.describe_run("vqkd", args) | dict(step=step, x=torch.ones(9)))
    save(1)
    save(2)
    def die(*_, **__):
        raise KeyboardInterrupt
    for owner, name in ((torch, "save"), (os, "fsync")):     # in the file, before it is on the disk
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(owner, name, die)
            save(3)
        assert engine.start_or_resume("vqkd", args, engine.Process(0, 1, torch.device("cpu")))["step"] == 2
    calls, rename = [], os.replace
    def second_dies(*names):                                 # between the two renames
        calls.append(names)
        rename(*names) if len(calls) == 1 else die()
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(os, "replace", second_dies)
        save(4)
    assert not (tmp_path / "vqkd.resume.pt").exists()
    assert engine.start_or_resume("vqkd", args, engine.Process(0, 1, torch.device("cpu")))["step"] == 2


def test_where_no_resume_file_can_be_read_nothing_is_overwritten(tmp_path):
    args = vqkd.parse_args(["--out", str(tmp_path)])
    for name in ("vqkd.resume.pt", "vqkd.resume.pt.prev"):
        (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(engine.UserError, match="no resume file in .* can be read .*--fresh to start over"):
        engine.start_or_resume("vqkd", args, engine.Process(0, 1, torch.device("cpu")))
    assert (tmp_path / "vqkd.resume.pt").read_bytes() == b"damaged"


def test_fresh_counts_for_the_first_start_only_when_torchrun_starts_a_run_again(tmp_path, monkeypatch):
    args = vqkd.parse_args(["--out", str(tmp_path / "run"), "--fresh"])
    alone = engine.Process(0, 1, torch.device("cpu"))
    def save():
        engine.save_resume("vqkd", args, engine.describe_run("vqkd", args) | dict(step=7))
    save()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert engine.start_or_resume("vqkd", args, alone)["step"] == 7
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert engine.start_or_resume("vqkd", args, alone) is None and (tmp_path / "run.1" / "vqkd.resume.pt").exists()


# ----------------------------------------------------------------------------------------------------- several processes
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node=2".split()


@pytest.mark.slow
def test_a_rank_that_dies_is_restarted_and_the_run_ends_as_if_nothing_had_happened(tmp_path):
    flags = ["--steps", 12, "--workers", 0, "--save-every", 2]
    done = start(tmp_path / "whole", *flags, launch=TORCHRUN)
    process = start(tmp_path / "run", *flags, "--fresh", launch=[*TORCHRUN, "--max-restarts=1"])
    wait_for(process, lambda: len(steps_logged(tmp_path / "run")) >= 6)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    output = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert done.wait(timeout=300) == 0
    same(tmp_path / "whole", tmp_path / "run")


FAILING = """
import os, sys
sys.path.insert(0, sys.argv[1])
import vqkd
from support import engine
real = vqkd.CodebookWatch.look
def fail(self, counts, run):
    if run.step == 4 and os.environ["RANK"] == "1":
        raise engine.UserError("this rank fails on purpose: put it right")
    return real(self, counts, run)
vqkd.CodebookWatch.look = fail
engine.run(lambda: vqkd.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_when_one_rank_fails_the_others_end_with_a_message_within_a_minute(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    begin = time.time()
    done = stage(tmp_path / "failing.py", ROOT, *FEW, "--steps", 12, "--workers", 0, "--out", tmp_path, processes=2, check=False)
    assert done.returncode and time.time() - begin < 60
    assert "error: this rank fails on purpose: put it right" in done.stderr
    assert "error: rank 0 lost another process" in done.stderr and "Traceback" not in done.stderr.split("error: rank 0")[0]


@pytest.mark.slow
def test_four_processes_train_the_tokenizer_of_one_and_two_machines_are_as_good_as_one(whole, tmp_path):
    flags = [*FEW, "--steps", 3, "--workers", 0]
    stage("vqkd.py", *flags, "--out", tmp_path / "one")
    stage("vqkd.py", *flags, "--out", tmp_path / "four", processes=4)
    # Two launchers that meet on the loopback address stand in for two machines.
    rendezvous = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
                  "--rdzv-id=two", "--rdzv-endpoint=127.0.0.1:29417"]
    agents = [start(tmp_path / "two", "--steps", 3, "--workers", 0, launch=[*rendezvous, f"--node-rank={n}"]) for n in (0, 1)]
    for agent in agents:
        output = agent.communicate(timeout=300)
        assert agent.returncode == 0, output
    a = engine.read_file(tmp_path / "one" / "vqkd.pt")
    for name in ("four", "two"):
        b = engine.read_file(tmp_path / name / "vqkd.pt")
        for k in a["model"]:
            torch.testing.assert_close(a["model"][k], b["model"][k], rtol=0, atol=1e-5, msg=lambda m: f"{name} {k}: {m}")
        assert a["result"]["cosine"] == pytest.approx(b["result"]["cosine"], abs=1e-4)


@pytest.mark.slow
def test_a_data_set_smaller_than_the_number_of_processes_is_one_sentence(tmp_path):
    done = stage("vqkd.py", "--device", "cpu", "--limit", 1, "--batch-size", 2, "--out", tmp_path, processes=2, check=False)
    assert done.returncode and done.stderr.count("error: ") == 1
    assert "error: 1 training images do not fill one batch of 2: lower --batch-size" in done.stderr


# ----------------------------------------------------------------------------------------------------------------- disk
@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint_and_says_so(whole, tmp_path):
    out, limit = tmp_path / "run", 2_000_000                 # no file may grow beyond; a resume file has 13 MB
    flags = ["--steps", 12, "--workers", 0, "--save-every", 4]
    process = start(out, *flags)
    wait_for(process, (out / "vqkd.resume.pt").exists)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = (out / "vqkd.resume.pt").read_bytes()
    full = ["bash", "-c", f"ulimit -f {limit // 1024}; exec \"$@\"", "bash", sys.executable, ROOT / "vqkd.py", *FEW, *flags,
            "--out", out]
    done = subprocess.run(list(map(str, full)), capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 2 and "error: could not write" in done.stderr and "untouched" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not list(out.glob("*.tmp"))
    assert (out / "vqkd.resume.pt").read_bytes() == before
    stage("vqkd.py", *FEW, *flags, "--out", out)             # there is room again
    same(whole, out)


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="needs a folder in which nobody may write, not even root")
def test_a_folder_that_may_not_be_written_is_one_sentence():
    done = stage("vqkd.py", *FEW, "--steps", 3, "--workers", 0, "--out", "/sys/kernel/run", check=False)
    assert done.returncode == 2 and "error: cannot write /sys/kernel/run/" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_folder_deleted_or_moved_while_running_ends_the_run_with_a_sentence_and_a_moved_one_goes_on(whole, tmp_path):
    flags = ["--steps", 12, "--workers", 0, "--save-every", 2]
    process, out = start(tmp_path / "run", *flags), tmp_path / "run"
    wait_for(process, (out / "vqkd.resume.pt").exists)
    out.rename(tmp_path / "elsewhere")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "put the folder back" in errors and errors.count("\n") == 1, errors
    if out.exists():                                         # made again by a checkpoint that fell into that moment
        for f in out.iterdir():
            f.unlink()
        out.rmdir()
    (tmp_path / "elsewhere").rename(out)
    stage("vqkd.py", *FEW, *flags, "--out", out)
    same(whole, out)


# ------------------------------------------------------------------------------------------------------ strangers' files
def test_a_flipped_bit_is_found_by_the_checksum(tmp_path):
    files.write_file(tmp_path / "a.pt", dict(kind="vqkd", model=dict(w=torch.arange(1000.0))))
    assert len(engine.read_file(tmp_path / "a.pt")["checksum"]) == 64
    raw = bytearray((tmp_path / "a.pt").read_bytes())
    at = raw.index(torch.tensor(500.0).numpy().tobytes())
    raw[at + 2] ^= 1
    (tmp_path / "a.pt").write_bytes(raw)
    with pytest.raises(engine.UserError, match="a.pt is damaged .*checksum"):
        engine.read_file(tmp_path / "a.pt")


def test_the_checksum_says_where_what_and_how_large_and_not_only_the_bytes():
    w = torch.arange(6.0)
    digests = {files.checksum(x) for x in (
        dict(a=w), dict(b=w), dict(a=w.view(2, 3)), dict(a=w.view(torch.int32)), dict(a=dict(a=w)), dict(a=w + 1e-7))}
    assert len(digests) == 6 and files.checksum(dict(a=w, n=1)) == files.checksum(dict(a=w, n=2))


def bomb(path):
    """A zip whose one record unpacks to a thousand times its size."""
    import zipfile
    torch.save(dict(model=torch.zeros(2**22)), path)
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, part in parts.items():
            new.writestr(name, part)


@pytest.mark.parametrize("make, words", [
    (bomb, "unpacks to more than it holds"),
    (lambda p: torch.save(dict(model=dict(w=torch.zeros(1).expand(10**12))), p), "without the numbers"),
    (lambda p: torch.save(dict(model=dict(w=torch.empty(10**12, device="meta"))), p), "odd kind"),
    (lambda p: torch.save(dict(model=dict(w=torch.eye(3).to_sparse())), p), "odd kind"),
    (lambda p: torch.save(dict(model={f"w{i}": torch.zeros(2**20)[:] for i in range(1)} | dict(
        v=torch.zeros(1, 1).expand(2**20, 2**20))), p), "without the numbers")])
def test_a_file_that_would_fill_the_memory_is_refused(tmp_path, make, words):
    make(tmp_path / "a.pt")
    with pytest.raises(engine.UserError, match=words):
        engine.read_file(tmp_path / "a.pt")


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_weights_of_a_wrong_kind_are_refused_by_name(tmp_path, dtype):
    args = vqkd.parse_args(["--codes", "16", "--out", str(tmp_path)])
    file = contents("vqkd", vqkd.build(args, [144]), args)
    key = "encoder.blocks.0.attn.qkv.weight"
    file["model"][key] = file["model"][key].to(dtype)
    files.write_file(tmp_path / "vqkd.pt", file)
    for read in (vqkd.load_tokenizer, convert.examine, weights.load_backbone):
        with pytest.raises(engine.UserError, match=f"{dtype} numbers in {key}"):
            read(tmp_path / "vqkd.pt")


def test_check_verifies_the_checksum(tmp_path, capsys):
    args = vqkd.parse_args(["--codes", "16", "--out", str(tmp_path)])
    files.write_file(tmp_path / "vqkd.pt", contents("vqkd", vqkd.build(args, [144]), args))
    convert.main(["--check", str(tmp_path / "vqkd.pt")])
    assert "checksum     agrees with the tensors" in capsys.readouterr().out
    torch.save(torch.load(tmp_path / "vqkd.pt") | dict(checksum="0" * 64), tmp_path / "vqkd.pt")
    with pytest.raises(engine.UserError, match="damaged"):
        convert.main(["--check", str(tmp_path / "vqkd.pt")])


def test_a_file_of_another_stage_is_refused_before_anything_is_written(tmp_path):
    args = vqkd.parse_args(["--codes", "16", "--out", str(tmp_path)])
    files.write_file(tmp_path / "vqkd.pt", contents("vqkd", vqkd.build(args, [144]), args))
    before = sorted(f.name for f in tmp_path.iterdir())
    (tmp_path / "pretrain.pt").write_bytes((tmp_path / "vqkd.pt").read_bytes())
    done = stage("pretrain.py", "--limit", 64, "--out", tmp_path, check=False)
    assert done.returncode == 2 and "is a 'vqkd' file where a 'pretrain' file is needed" in done.stderr
    (tmp_path / "pretrain.pt").unlink()
    assert sorted(f.name for f in tmp_path.iterdir()) == before
