"""What a run is made from is known by content: checkpoints, images, labels; not by their names."""
import argparse
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pictures import noise, save

import finetune
import linprobe
import pretrain
import segment
import vqkd
from support import inputs
from support.args import fill_in, run_parser
from support.files import UserError, write_file
from support.process import Process
from support.run import contents, find_resume_file
from test_run import RECIPE, Small

PROCESS = Process()


def weights(path, value=1.0, commit="a"):
    write_file(path, dict(kind="vqkd", model=dict(w=torch.full((50,), value)), commit=commit))
    return path


def photographs(root, classes=("cat", "dog")):
    """Two pictures per class; class after class has a size of its own."""
    for split in ("train", "val"):
        for side, name in enumerate(classes, 8):
            for i in range(2):
                save(root / split / name / f"{name}{i}.png", noise(side, side, seed=i))
    return root


def scenes(root, label=3):
    for split in ("training", "validation"):
        save(root / "images" / split / "a.png", noise(64, 64))
        (root / "annotations" / split).mkdir(parents=True)
        Image.fromarray(np.full((64, 64), label, np.uint8)).save(
            root / "annotations" / split / "a.png", compress_level=0)
    return root


def holds(folder):
    return inputs.made_from(argparse.Namespace(data=str(folder)), PROCESS)["data"]


# --- what content is ------------------------------------------------------------------------------
def test_a_checkpoint_is_known_by_its_tensors_and_not_by_name_or_commit(tmp_path):
    first = inputs.checksum(weights(tmp_path / "a.pt"))
    assert first == inputs.checksum(weights(tmp_path / "other" / "b.pt", commit="b"))
    assert first != inputs.checksum(weights(tmp_path / "a.pt", value=1.0001))


def test_any_other_file_is_known_by_its_bytes(tmp_path):
    (tmp_path / "a").write_text("cat\ndog\n")
    (tmp_path / "b").write_text("dog\ncat\n")
    shutil.copy(tmp_path / "a", tmp_path / "c")
    sums = [inputs.checksum(tmp_path / name) for name in "abc"]
    assert sums[0] == sums[2] != sums[1]


def test_a_copy_of_a_folder_is_the_same_and_another_file_beside_the_pictures_changes_nothing(
        tmp_path):
    before = holds(photographs(tmp_path / "one"))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "train" / "notes.txt").write_text("looked at all of them")
    save(tmp_path / "two" / "test" / "x.png", noise())       # not a split that stages read
    assert holds(tmp_path / "two") == before


def exchange(root):
    for split in ("train", "val"):
        (root / split / "cat").rename(root / split / "x")
        (root / split / "dog").rename(root / split / "cat")
        (root / split / "x").rename(root / split / "dog")


CHANGES = {
    "labels exchanged": exchange,
    "one picture in another class": lambda root: (root / "train/cat/cat1.png").rename(
        root / "train/dog/cat1.png"),
    "a picture less": lambda root: (root / "val/dog/dog1.png").unlink(),
    "another picture of the same name": lambda root: save(root / "val/dog/dog1.png", noise(9, 9)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_labels_and_pictures_are_other_data(tmp_path, change):
    before = holds(photographs(tmp_path))
    CHANGES[change](tmp_path)
    assert holds(tmp_path) != before


@pytest.mark.parametrize("small", [2**26, 0])
def test_a_label_map_that_keeps_its_size_is_noticed_in_a_large_folder_too(
        tmp_path, monkeypatch, small):
    monkeypatch.setattr(inputs, "SMALL", small)
    scenes(tmp_path / "a", label=3)
    scenes(tmp_path / "b", label=4)
    maps = [tmp_path / x / "annotations/training/a.png" for x in "ab"]
    assert maps[0].stat().st_size == maps[1].stat().st_size
    assert holds(tmp_path / "a") != holds(tmp_path / "b")


def test_of_very_many_files_some_are_asked_for_their_size_and_all_for_their_name(
        tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "SIZES", 2)
    before = holds(photographs(tmp_path))
    (tmp_path / "train/dog/dog1.png").rename(tmp_path / "train/dog/dog2.png")
    assert holds(tmp_path) != before


# --- every stage ----------------------------------------------------------------------------------
STAGES = {
    "vqkd": (vqkd, ["--init", "FILE"], "init"),
    "vqkd's teacher": (vqkd, ["--teacher", "hog+timm:some_vit@FILE"], "teacher"),
    "pretrain": (pretrain, ["--tokenizer", "FILE"], "tokenizer"),
    "finetune": (finetune, ["--checkpoint", "FILE"], "checkpoint"),
    "finetune's names": (finetune, ["--classes", "FILE"], "classes"),
    "linprobe": (linprobe, ["--checkpoint", "FILE"], "checkpoint"),
    "segment": (segment, ["--checkpoint", "FILE"], "checkpoint"),
}


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_knows_the_files_that_it_reads(tmp_path, name):
    stage, flags, key = STAGES[name]
    found = []
    for value, file in ((1.0, "a.pt"), (1.0, "b.pt"), (2.0, "a.pt")):
        weights(tmp_path / file, value)
        words = [word.replace("FILE", str(tmp_path / file)) for word in flags]
        found.append(inputs.made_from(stage.parse_args(words), PROCESS)[key])
    assert found[0] == found[1] != found[2]


def test_a_file_that_is_missing_is_left_out(tmp_path):
    args = pretrain.parse_args(["--out", str(tmp_path)])
    assert list(inputs.made_from(args, PROCESS)) == ["data"]


def test_built_in_pictures_are_known_by_how_they_are_drawn(tmp_path, monkeypatch):
    args = pretrain.parse_args(["--out", str(tmp_path)])
    before = inputs.made_from(args, PROCESS)["data"]
    assert before.startswith("shapes, levels ")
    draw = inputs.draw_shapes
    monkeypatch.setattr(inputs, "draw_shapes", lambda *a: (draw(*a)[0] // 2, *draw(*a)[1:]))
    inputs.describe_drawings.cache_clear()
    after = inputs.made_from(args, PROCESS)["data"]
    inputs.describe_drawings.cache_clear()
    assert before != after


# --- going on, and already done -------------------------------------------------------------------
def arguments(out, data="shapes"):
    """Of a stage that reads OUT/vqkd.pt."""
    args = run_parser("a stage").parse_args(["--out", str(out), "--data", str(data)])
    fill_in(args, ["tiny"], RECIPE)
    args.tokenizer = out / "vqkd.pt"
    return args


def leave(out, data="shapes", name="pretrain.resume.pt", **without):
    """The file that a run in OUT leaves."""
    args = arguments(out, data)
    file = contents("pretrain", Small(), args) | dict(step=3)
    made_from = inputs.made_from(args, PROCESS)
    write_file(out / name, file | (without or dict(made_from=made_from)))


def go_on(out, data="shapes"):
    return find_resume_file("pretrain", arguments(out, data), PROCESS)


@pytest.mark.parametrize("name", ["pretrain.resume.pt", "pretrain.pt"])
@pytest.mark.parametrize("change", ["tokenizer", "data"])
def test_a_run_from_other_inputs_is_refused_and_nothing_is_overwritten(tmp_path, name, change):
    out = tmp_path / "run"
    weights(out / "vqkd.pt")
    leave(out, photographs(tmp_path / "d"), name)
    before = (out / name).read_bytes()
    if change == "tokenizer":
        weights(out / "vqkd.pt", value=2.0)
    else:
        exchange(tmp_path / "d")
    with pytest.raises(UserError, match=f"was made from other inputs .--{change} .* was .*, is .*"
                                        f"put them back, or choose another --out, or add --fresh"):
        go_on(out, tmp_path / "d")
    assert (out / name).read_bytes() == before


def test_a_run_goes_on_where_its_folder_and_its_data_are_moved_to(tmp_path, capsys):
    weights(tmp_path / "one" / "vqkd.pt")
    leave(tmp_path / "one", photographs(tmp_path / "d"))
    (tmp_path / "one").rename(tmp_path / "two")
    (tmp_path / "d").rename(tmp_path / "e")
    assert go_on(tmp_path / "two", tmp_path / "e")["step"] == 3
    assert capsys.readouterr().err == ""


def test_a_finished_run_that_was_copied_is_done_there_too(tmp_path, capsys):
    weights(tmp_path / "one" / "vqkd.pt")
    leave(tmp_path / "one", name="pretrain.pt")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    with pytest.raises(SystemExit) as ended:
        go_on(tmp_path / "two")
    assert ended.value.code == 0 and "already done" in capsys.readouterr().out


def test_a_file_from_before_inputs_were_kept_goes_on_with_a_note_wherever_it_is_moved(
        tmp_path, capsys):
    weights(tmp_path / "one" / "vqkd.pt")
    leave(tmp_path / "one", step=3)          # without made_from
    (tmp_path / "one").rename(tmp_path / "two")
    assert go_on(tmp_path / "two")["step"] == 3
    note = capsys.readouterr().err
    assert note.startswith("note: ") and "--tokenizer" in note and "--data shapes" in note


def test_inputs_that_are_gone_are_named_and_a_finished_run_stays_done(tmp_path, capsys):
    weights(tmp_path / "vqkd.pt")
    leave(tmp_path, photographs(tmp_path / "d"), "pretrain.pt")
    (tmp_path / "vqkd.pt").unlink()
    shutil.rmtree(tmp_path / "d")
    with pytest.raises(SystemExit):
        go_on(tmp_path, tmp_path / "d")
    found = capsys.readouterr()
    assert "already done" in found.out
    assert found.err.count("(not there)") == 2


def test_the_tokenizer_of_another_place_is_another_argument_if_it_cannot_be_compared(tmp_path):
    leave(tmp_path / "one")                  # without vqkd.pt
    args = arguments(tmp_path / "one")
    args.tokenizer = tmp_path / "elsewhere.pt"
    with pytest.raises(UserError, match="other arguments .--tokenizer .*elsewhere.pt"):
        find_resume_file("pretrain", args, PROCESS)
