"""Files that survive a crash, strangers' files, logs."""
import argparse
import json
import os
import subprocess
import zipfile

import pytest
import torch

from support import files
from support.files import Log, UserError, read_file, set_aside, tensors, write_file
from support.process import Process

ALONE = Process()


def arguments(**given):
    return argparse.Namespace(**(dict(model="tiny", data="shapes", image_size=48) | given))


# --- checkpoints ----------------------------------------------------------------------------------
def test_a_failed_write_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.pt"
    write_file(path, dict(kind="vqkd", x=torch.ones(3)))

    def disk_full(contents, f):
        f.write(b"half a fi")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(UserError, match="could not write .*No space left"):
        write_file(path, dict(kind="vqkd", x=torch.zeros(3)))
    assert torch.equal(read_file(path, kind="vqkd")["x"], torch.ones(3))
    assert [f.name for f in path.parent.iterdir()] == ["a.pt"]


class Hostile:
    def __reduce__(self):
        return (open, ("/tmp/beit2_was_here", "w"))


def truncated(path):
    torch.save(dict(x=torch.ones(999)), path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize("make, words", [
    (lambda p: None, "there is no file .*; make it so"),
    (lambda p: p.write_bytes(b""), "a.pt"),
    (lambda p: p.write_text("hello, this is no checkpoint"), "a.pt"),
    (truncated, "truncated"),
    (lambda p: torch.save(dict(x=Hostile()), p), "objects other than tensors"),
    (lambda p: torch.save([1, 2], p), "holds a list"),
    (lambda p: torch.save(dict(kind="pretrain"), p), "'pretrain' file where a 'vqkd' file"),
    (lambda p: torch.save(dict(x=1), p), "'foreign' file where")])
def test_what_is_no_checkpoint_of_this_kind_is_refused_with_a_sentence(make, words, tmp_path):
    make(tmp_path / "a.pt")
    with pytest.raises(UserError, match=words) as caught:
        read_file(tmp_path / "a.pt", kind="vqkd", remedy="make it so")
    assert "\n" not in str(caught.value)
    assert not os.path.exists("/tmp/beit2_was_here")


def test_the_namespace_of_a_released_checkpoint_is_allowed(tmp_path):
    released = dict(model=dict(w=torch.ones(2)), args=argparse.Namespace(lr=0.1))
    torch.save(released, tmp_path / "a.pt")
    assert read_file(tmp_path / "a.pt")["args"].lr == 0.1


@pytest.mark.parametrize("byte", [0, 2, 3])
def test_a_flipped_bit_in_a_tensor_is_found(tmp_path, byte):
    path = tmp_path / "a.pt"
    write_file(path, dict(kind="vqkd", model=dict(w=torch.arange(1000.0))))
    raw = bytearray(path.read_bytes())
    at = raw.index(torch.tensor(500.0).numpy().tobytes())
    raw[at + byte] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="a.pt is damaged .*checksum"):
        read_file(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_flipped_byte_anywhere_in_the_file_changes_no_tensor_unnoticed(tmp_path, share):
    path = tmp_path / "a.pt"
    w = torch.arange(1000.0)
    write_file(path, dict(kind="vqkd", model=dict(w=w)))
    raw = bytearray(path.read_bytes())
    raw[int(share * len(raw))] ^= 255
    path.write_bytes(raw)
    try:
        assert torch.equal(read_file(path)["model"]["w"], w)
    except UserError as error:
        assert "\n" not in str(error)


def bomb(path):
    """A zip whose one record unpacks to a thousand times its size."""
    torch.save(dict(model=torch.zeros(2**22)), path)
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, part in parts.items():
            new.writestr(name, part)


def saved(**weights):
    return lambda path: torch.save(dict(model=weights), path)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("make, words", [
    (bomb, "unpacks to more than it holds"),
    (saved(w=torch.zeros(1).expand(10**12)), "without the numbers"),
    (saved(w=torch.empty(10**12, device="meta")), "odd kind"),
    (saved(w=torch.eye(3).to_sparse()), "odd kind"),
    (saved(w=torch.zeros(2**20), v=torch.zeros(1, 1).expand(2**20, 2**20)), "without the numbers")])
def test_a_file_that_would_fill_the_memory_is_refused(tmp_path, make, words):
    make(tmp_path / "a.pt")
    with pytest.raises(UserError, match=words):
        read_file(tmp_path / "a.pt")


def test_tensors_are_found_in_nested_dicts_lists_and_tuples():
    x = torch.ones(1)
    found = list(tensors(dict(a=x, b=[x, dict(c=x)], d=(1, x), e="text")))
    assert [place for place, _ in found] == ["a", "b.0", "b.1.c", "d.1"]


# --- results set aside ----------------------------------------------------------------------------
def names(folder):
    return sorted(f.name for f in folder.iterdir())


def test_fresh_moves_the_folder_of_a_tokenizer_but_only_the_files_of_a_later_stage(tmp_path):
    out = tmp_path / "tiny"
    out.mkdir()
    for name in ("vqkd.pt", "pretrain.pt", "pretrain.jsonl"):
        (out / name).write_text("")
    set_aside("pretrain", out)
    assert names(out) == ["vqkd.pt"]
    assert names(tmp_path / "tiny.1") == ["pretrain.jsonl", "pretrain.pt"]
    set_aside("vqkd", out)
    assert not out.exists()
    assert names(tmp_path / "tiny.2") == ["vqkd.pt"]
    set_aside("vqkd", out)                                   # nothing there: nothing happens
    assert not (tmp_path / "tiny.3").exists()


# --- the commit -----------------------------------------------------------------------------------
def test_a_commit_is_dirty_if_a_python_file_differs_but_not_if_a_page_does(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROOT", tmp_path)

    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b",
                        *words], check=True, capture_output=True)
    assert files.commit() == "unknown"
    git("init", "-q")
    (tmp_path / "support").mkdir()
    for name in ("a page", "support/a.py"):
        (tmp_path / name).write_text("one")
    git("add", "-A")
    git("commit", "-q", "-m", "one")
    (tmp_path / "a page").write_text("two")
    assert len(files.commit()) == 40
    (tmp_path / "support/a.py").write_text("two")
    assert files.commit().endswith("-dirty")


# --- the log --------------------------------------------------------------------------------------
def test_a_resumed_log_holds_no_step_twice(tmp_path):
    path = tmp_path / "vqkd.jsonl"
    log = Log(path, arguments(), ALONE, images=5)
    for step in range(4):
        log(step=step, loss=1 / 3)
    with open(path, "a") as f:
        f.write('{"step": 4, "lo')                           # the run was killed while it wrote
    Log(path, arguments(), ALONE, start_step=2)(step=2, loss=0.5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("step") for line in lines] == [None, 0, 1, 2]
    assert lines[0]["images"] == 5
    assert lines[0]["args"]["model"] == "tiny"
    assert lines[1]["loss"] == 0.333333


def test_a_fresh_start_begins_a_fresh_log_and_a_measurement_adds_to_those_before_it(tmp_path):
    path = tmp_path / "vqkd.jsonl"
    Log(path, arguments(), ALONE, images=17)(step=0)         # it ended at a bad image, which is
    Log(path, arguments(), ALONE, images=16)                 # taken away then
    [line] = path.read_text().splitlines()
    assert json.loads(line)["images"] == 16
    Log(path, arguments(), ALONE, append=True)(loss=1)
    assert len(path.read_text().splitlines()) == 3


def test_only_rank_0_writes_a_log(tmp_path):
    Log(tmp_path / "other.jsonl", arguments(), Process(1, 2))(step=0)
    assert not (tmp_path / "other.jsonl").exists()


def test_a_log_refuses_to_go_on_with_other_data_and_says_so_of_another_place(tmp_path, capsys):
    path = tmp_path / "vqkd.jsonl"

    def start(step, **facts):
        return Log(path, arguments(), ALONE, step, **facts)
    start(0, images=5, steps=9)(step=0, loss=1.0)
    before = path.read_text()
    start(1, images=5, steps=9)
    assert path.read_text() == before
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="shapes is not what it was .*images 5 -> 6.*--fresh"):
        start(1, images=6, steps=9)
    threads = torch.get_num_threads()
    path.write_text(before.replace(f'"threads": {threads}', '"threads": 99'))
    start(1, images=5, steps=9)
    assert f"in another place (threads 99 -> {threads})" in capsys.readouterr().err


def test_a_log_that_cannot_be_written_is_a_sentence(tmp_path):
    log = Log(tmp_path / "run" / "vqkd.jsonl", arguments(), ALONE)
    (tmp_path / "run").rename(tmp_path / "moved")            # while the run goes on
    with pytest.raises(UserError, match="cannot write .*vqkd.jsonl .No such file.*put the folder"):
        log(step=1)
    with pytest.raises(UserError, match="cannot write .*choose another --out"):
        Log("/proc/no/vqkd.jsonl", arguments(), ALONE)
