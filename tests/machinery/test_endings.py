"""How a command ends, and where its words go: streams that close, locales, what becomes a sentence.
"""
import errno
import io
import os
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, stage
from support.files import Lock, UserError, refuse_unwritable
from support.process import Stream, explain, launch

FEW = ("--device cpu --amp no --limit 64 --batch-size 16 --steps 4 --continuous-steps 1 "
       "--log-every 1").split()
ENVIRONMENT = os.environ | dict(OMP_NUM_THREADS="1")


def words(script, *flags):
    return list(map(str, [sys.executable, ROOT / script, *FEW, *flags]))


# --- streams --------------------------------------------------------------------------------------
def test_a_stream_outlives_its_reader_and_leaves_nothing_behind_that_fails():
    read_end, write_end = os.pipe()
    raw = open(write_end, "w", encoding="ascii")
    stream = Stream(raw)
    print("one", file=stream)
    assert os.read(read_end, 99) == b"one\n"
    os.close(read_end)
    for _ in range(3):
        print("lost", file=stream, flush=True)
    raw.flush()                              # as Python does at its end
    raw.close()


def test_a_stream_writes_any_text_in_any_locale():
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print("a \u2192 b, \udcc3", file=Stream(raw))
    assert raw.buffer.getvalue() == b"a \\u2192 b, \\udcc3\n"


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_without_a_stream_and_in_a_notebook_a_command_runs(stream, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream)
    launch(lambda: print("words"))
    assert stream is None or stream.getvalue() == "words\n"
    assert sys.stdout is stream


# --- sentences ------------------------------------------------------------------------------------
SHM = "unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)"
BUS = ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
       "workers are out of shared memory.")
KILLED = "DataLoader worker (pid 7) is killed by signal: Killed. "


@pytest.mark.parametrize("error, says, code", [
    (RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\nTrace\n{SHM}"),
     "--workers 0, or make it larger", 2),
    (RuntimeError(BUS), "--workers 0, or make it larger", 2),
    (RuntimeError(KILLED), "worker .pid 7. is killed by signal: Killed: if memory is short, lower "
                           "--workers.* goes on", 1),
    (PermissionError(13, "Permission denied", "there/index.html"),
     "cannot read or write there/index.html .Permission denied.", 2)])
def test_what_a_machine_lacks_is_a_sentence_with_the_remedy(error, says, code, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as caught:
        launch(main)
    assert caught.value.code == code
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(says, err)


def test_a_failed_compilation_is_a_sentence_that_names_the_flag():
    broken = type("InvalidCxxCompiler", (RuntimeError,), dict(__module__="torch._inductor.exc"))
    text, code = explain(broken("No working C++ compiler found:\n(None, 'g++')"), rank=0)
    assert code == 2
    assert text.startswith("--compile failed (No working C++ compiler found: (None, 'g++'))")
    assert "leave out --compile" in text


def test_a_full_disk_is_a_sentence_wherever_it_is_met(tmp_path, monkeypatch):
    full = "No space left on device"
    text, code = explain(OSError(errno.ENOSPC, full), rank=0)
    assert code == 2
    assert text == f"cannot write ({full}): free some space, or choose another --out"

    # Linux: whoever writes to this file finds the disk full.
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **options: open("/dev/full", "wb"))
    with pytest.raises(UserError, match=f"cannot write into {tmp_path} .{full}"):
        refuse_unwritable(tmp_path)


def test_a_lock_needs_no_space(tmp_path, monkeypatch):
    def write(*args):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "write", write)
    lock = Lock(tmp_path / "vqkd.lock")
    assert lock.path.exists()
    lock.release()


# --- whole commands -------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("shell", ["| head -n 1", ">&-", ">&- 2>&-", "2>&1 | true"])
def test_a_run_whose_reader_leaves_ends_well(tmp_path, shell):
    command = " ".join(words("vqkd.py", "--workers", 0, "--out", tmp_path))
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} {shell}"],
                          capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert (tmp_path / "vqkd.pt").exists()


@pytest.mark.slow
def test_in_the_c_locale_every_stage_takes_and_writes_names_with_accents(tmp_path):
    environment = ENVIRONMENT | dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    out = tmp_path / "\u00dcbung"
    flags = "--device cpu --amp no --limit 64 --steps 2 --workers 0 --out".split()
    for name in ("vqkd", "pretrain", "finetune", "linprobe", "segment"):
        command = [sys.executable, ROOT / f"{name}.py", *flags, out]
        done = subprocess.run(list(map(str, command)), capture_output=True, env=environment,
                              timeout=300)
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare") or subprocess.run(
    ["unshare", "-rm", "true"], capture_output=True).returncode, reason="needs user namespaces")
@pytest.mark.parametrize("size", ["4k", "64k"])              # no room for semaphores; for images
def test_a_small_shared_memory_is_one_sentence(tmp_path, size):
    mount = f'mount -t tmpfs -o size={size} none /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, "sh",
         *words("vqkd.py", "--workers", 2, "--out", tmp_path)],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "--workers 0" in done.stderr
    assert "Traceback" not in done.stderr
    stage("vqkd.py", *FEW, "--workers", 0, "--out", tmp_path)
