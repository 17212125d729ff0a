"""--on-bad-image: unreadable pictures end a run, or are left out, counted and listed."""
import os

import numpy as np
import pytest
from conftest import log_lines, stage
from pictures import ODD_NAMES, fill, noise, save, sentence
from PIL import Image

import finetune
import linprobe
import pretrain
import segment
import vqkd
from extras import features
from model import PRESETS, ViT
from support import data
from support.files import write_file
from support.images import open_images, shown
from support.process import Process
from support.run import contents, differences
from support.scenes import open_scenes

QUICK = ["--workers", "0", "--amp", "no", "--device", "cpu",
         "--batch-size", "8", "--micro-batch", "8"]
SKIP = ["--on-bad-image", "skip"]


@pytest.fixture
def tokenizer(tmp_path):
    """A folder with a vqkd.pt of random weights."""
    args = vqkd.parse_args(["--codes", "8"])
    write_file(tmp_path / "run" / "vqkd.pt", contents("vqkd", vqkd.build(args, [144]), args))
    return tmp_path / "run"


def leave_out(out, datasets, *flags):
    """What a stage does before its first step. -> the list of bad images, which may not exist"""
    args = vqkd.parse_args([*QUICK, "--out", str(out), *flags])
    data.leave_out_bad(args, Process(), *datasets)
    return out / "bad_images.txt"


def spoil(root):
    """Make three of the files below root unreadable. -> their paths, sorted"""
    bad = [root / "train/cat/1.png", root / "train/dog/link.png", root / "val/dog/two\nlines.png"]
    bad[0].write_bytes(bad[0].read_bytes()[:300])
    bad[1].symlink_to(root / "nowhere")
    bad[2].write_text("no picture")
    return bad


# --- one data set ---------------------------------------------------------------------------------
def test_an_unreadable_image_stops_the_run_unless_it_is_to_be_skipped(tmp_path):
    spoil(fill(tmp_path))
    train = data.open_data(str(tmp_path), "train")
    leave_out(tmp_path / "out", [train])
    assert len(train) == 7
    assert "1.png" in sentence(lambda: [train[i] for i in range(7)])
    # A resumed run keeps to it.
    assert differences(dict(on_bad_image="stop"), dict(on_bad_image="skip"))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_unreadable_images_are_left_out_reported_and_listed_with_the_reason(
        tmp_path, capsys, workers):
    bad = spoil(fill(tmp_path))
    train, val = (data.open_data(str(tmp_path), split) for split in ("train", "val"))
    file = leave_out(tmp_path / "out", [train, val], *SKIP, "--workers", workers)
    assert train.labels.tolist() == [0, 0, 1, 1, 1]
    assert val.labels.tolist() == [0, 0, 0, 1, 1, 1]
    for dataset in (train, val):
        assert not set(dataset.names) & set(map(str, bad))
        assert all(dataset[i][0].shape == (3, 20, 20) for i in range(len(dataset)))
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3
    assert all(shown(path) in line for path, line in zip(bad, lines, strict=True))
    assert "truncated" in lines[0] and "No such file" in lines[1]
    assert "cannot identify" in lines[2]
    line, = capsys.readouterr().err.splitlines()
    assert "3 of 14 images" in line and str(bad[0]) in line and str(file) in line
    for path in bad:
        path.unlink()
    leave_out(tmp_path / "out", [data.open_data(str(tmp_path), "train")], *SKIP)
    assert not file.exists()                                 # an old list does not stay


def test_a_limit_chooses_first_and_bad_images_leave_it_smaller(tmp_path):
    spoil(fill(tmp_path))
    train = data.open_data(str(tmp_path), "train", limit=7)
    leave_out(tmp_path / "out", [train], *SKIP)
    assert len(train) == 5


def test_a_folder_without_any_readable_image_ends_the_run(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"")
    text = sentence(leave_out, tmp_path / "out", [open_images(tmp_path)], *SKIP)
    assert "none of the 3 images" in text and "0.png" in text


def test_a_list_that_cannot_be_written_is_one_sentence(tmp_path):
    spoil(fill(tmp_path / "images"))
    (tmp_path / "out").write_text("a file where the folder belongs")
    train = data.open_data(str(tmp_path / "images"), "train")
    assert "choose another --out" in sentence(leave_out, tmp_path / "out", [train], *SKIP)


def test_skipping_leaves_data_sets_without_files_alone(tmp_path):
    shapes = data.open_data("shapes", "val", limit=10)
    leave_out(tmp_path / "out", [shapes, None], *SKIP)       # None: nothing to evaluate on
    assert len(shapes) == 10 and not (tmp_path / "out").exists()


def scenes(root):
    """ADE20K's layout, 10 training and 3 validation images; one image, one annotation damaged."""
    for split, n in (("training", 10), ("validation", 3)):
        for i in range(n):
            labels = Image.fromarray(np.full((40, 50), i % 3, np.uint8))
            save(root / "images" / split / f"{i}.jpg", noise(40, 50, i))
            save(root / "annotations" / split / f"{i}.png", labels)
    for path in (root / "images/training/3.jpg", root / "annotations/training/5.png"):
        path.write_bytes(path.read_bytes()[:-30])
    return root


def test_a_scene_is_left_out_with_its_label_map_where_either_is_damaged(tmp_path):
    train = open_scenes(str(scenes(tmp_path)), "train", classes=2)
    leave_out(tmp_path / "out", [train], *SKIP)
    kept = [os.path.basename(name) for name in train.paths]
    assert kept == [b"%d.jpg" % i for i in (0, 1, 2, 4, 6, 7, 8, 9)]
    assert len(train.targets) == 8
    assert all(train[i][1].shape == (40, 50) for i in range(8))
    train = open_scenes(str(tmp_path), "train", classes=1)
    # A wrong class number is no damage: it ends the run.
    assert "give --classes" in sentence(leave_out, tmp_path / "out", [train], *SKIP)
    assert "give --classes" in sentence(lambda: train[2])


# --- stages ---------------------------------------------------------------------------------------
def test_images_of_any_name_are_encoded_under_their_names(tokenizer, tmp_path):
    paths = [tmp_path / "images" / odd / f"{odd}.png" for odd in ODD_NAMES]
    for i, path in enumerate(paths):
        save(path, noise(seed=i))
    features.main([str(tokenizer / "vqkd.pt"), str(tmp_path / "images")])
    with np.load(tokenizer / "tokens.npz") as tokens:
        assert tokens["ids"].shape == (len(ODD_NAMES), 6, 6)
        assert sorted(tokens["names"]) == sorted(map(str, paths))


def test_the_codes_of_readable_images_are_written(tokenizer, tmp_path):
    spoil(fill(tmp_path / "images"))
    flags = [str(tokenizer / "vqkd.pt"), str(tmp_path / "images")]
    assert "remove it" in sentence(features.main, flags)
    features.main(flags + SKIP)
    with np.load(tokenizer / "tokens.npz") as tokens:
        assert len(tokens["ids"]) == len(tokens["names"]) == 11


def test_an_evaluation_counts_each_readable_image_once(tmp_path):
    model = ViT(**PRESETS["tiny"], num_classes=2)
    write_file(tmp_path / "finetune.pt",
               dict(kind="finetune", model=model.state_dict(), classes=["cat", "dog"]))
    root = fill(tmp_path / "images")
    spoil(root)
    flags = [*QUICK, *SKIP, "--out", str(tmp_path), "--data", str(root)]
    result = finetune.main([*flags, "--eval"])
    assert result["images"] == 6
    assert (tmp_path / "bad_images.txt").read_text().count("\n") == 1


@pytest.mark.slow
def test_every_stage_runs_over_a_folder_with_bad_images_that_are_to_be_skipped(tmp_path):
    root, out = fill(tmp_path / "images", each=8), tmp_path / "out"
    spoil(root)
    flags = [*QUICK, *SKIP, "--out", str(out), "--data", str(root)]
    vqkd.main([*flags, "--steps", "2", "--continuous-steps", "1", "--codes", "8"])
    pretrain.main([*flags, "--steps", "1"])
    linprobe.main([*flags, "--steps", "1", "--blocks", "1", "--augment", "1"])
    finetune.main([*flags, "--steps", "1"])
    for name in ("vqkd", "pretrain", "finetune"):
        assert log_lines(out / f"{name}.jsonl")[0]["images"] == 15
    assert log_lines(out / "linprobe.jsonl")[-1]["images"] == 15
    flags[-1] = str(scenes(tmp_path / "scenes"))
    segment.main([*flags, "--classes", "2", "--steps", "1"])
    assert log_lines(out / "segment.jsonl")[0]["images"] == 8
    assert (out / "bad_images.txt").read_text().count("\n") == 2


@pytest.mark.slow
def test_two_processes_leave_out_the_same_images_as_one(tmp_path, capsys):
    spoil(fill(tmp_path / "images", each=8))
    flags = [*QUICK, *SKIP, "--data", str(tmp_path / "images"), "--codes", "8",
             "--steps", "2", "--continuous-steps", "1"]
    vqkd.main([*flags, "--out", str(tmp_path / "1")])
    done = stage("vqkd.py", *flags, "--out", tmp_path / "2", processes=2)
    for said in (capsys.readouterr().err, done.stderr):
        assert said.count("3 of 34 images cannot be read") == 1
    one, two = ((tmp_path / name / "bad_images.txt").read_text() for name in "12")
    assert one == two and one.count("\n") == 3
    for name in "12":
        assert log_lines(tmp_path / name / "vqkd.jsonl")[0]["images"] == 15
