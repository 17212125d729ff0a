"""Data of which nothing can be learned is a sentence before a run; odd data is a warning."""
import numpy as np
import pytest
import torch
from pictures import fill, noise, save, sentence
from PIL import Image

import finetune
import linprobe
import segment
import vqkd
from support import data
from support.checks import check_teacher, in_words, ranges
from support.images import open_images
from support.process import Process
from support.scenes import open_scenes

QUICK = ["--workers", "0", "--amp", "no", "--device", "cpu", "--steps", "2"]


def scenes(root, train, val=None, count=6, split_names=("training", "validation")):
    """ADE20K's layout with images of noise; the numbers of the label maps are those given."""
    for split, numbers in zip(split_names, (train, val or train), strict=True):
        for i in range(count):
            save(root / "images" / split / f"{i}.jpg", noise(48, 48, seed=i))
            cells = np.random.default_rng(i).integers(0, len(numbers), (12, 12))
            cells.flat[:len(numbers)] = range(len(numbers))  # each of them occurs
            labels = np.kron(np.array(numbers, np.uint8)[cells], np.ones((4, 4), np.uint8))
            save(root / "annotations" / split / f"{i}.png", Image.fromarray(labels))
    return root


def run(tmp_path, classes, *flags):
    """segment.py on tmp_path/d.  -> the folder of the run"""
    segment.main([*QUICK, "--init", "scratch", "--data", str(tmp_path / "d"), "--batch-size", "4",
                  "--classes", str(classes), "--out", str(tmp_path / "run"), *flags])
    return tmp_path / "run"


# --- numbers of label maps ------------------------------------------------------------------------
@pytest.mark.parametrize("numbers, classes, words", [
    ([0, 1], 2, ["only class number 1 has pixels", "0 (", "--zero class"]),
    ([0, 255], 2, ["no pixel has a label", "255 (", "1 to 2 are classes"]),
    ([0], 3, ["no pixel has a label", "0 (100 %)"]), ([255], 3, ["no pixel has a label"]),
    ([2], 3, ["only class number 2 has pixels", "2 (100 %)"]),
    ([*range(19), 255], 19, ["number 0 has", "number 19 never occurs", "--zero class",
                             "--zero unlabelled"]),
    ([0, 1, 2], 3, ["number 3 never occurs"]),
    ([1, 2, 3, 34], 19, ["hold 34", "1 to 19 are classes", "--classes N"]),
    ([0, 128], 2, ["hold 128", "0 (", "--classes N"])])
def test_numbers_that_make_every_figure_meaningless_are_one_sentence_before_anything_is_written(
        tmp_path, numbers, classes, words):
    scenes(tmp_path / "d", numbers)
    text = sentence(run, tmp_path, classes)
    assert all(word in text for word in words), text
    assert str(tmp_path / "d") in text and "6 of 6" in text + "6 of 6" * ("never" in text)
    assert not (tmp_path / "run" / "segment.jsonl").exists()
    assert not (tmp_path / "run" / "segment.pt").exists()


def test_with_zero_class_masks_of_0_and_1_have_two_classes(tmp_path, capsys):
    scenes(tmp_path / "d", [0, 1])
    run(tmp_path, 2, "--zero", "class")
    dataset = open_scenes(str(tmp_path / "d"), "train", classes=2, zero="class")
    assert dataset.classes == ["class 0", "class 1"]
    assert torch.equal(dataset[0][1].unique(), torch.tensor([0, 1], dtype=torch.uint8))
    assert "error" not in capsys.readouterr().err
    out = ["--out", str(tmp_path / "run"), "--data", str(tmp_path / "d")]
    segment.main([*QUICK[:-2], "--eval", *out])              # the file remembers --zero
    scenes(tmp_path / "d", [0, 1, 2])
    assert "hold 2" in sentence(segment.main, [*QUICK[:-2], "--eval", *out])


def test_with_zero_class_255_alone_has_no_label(tmp_path):
    scenes(tmp_path / "d", [*range(5), 255])
    assert "number 5 never occurs" in sentence(run, tmp_path, 5)
    run(tmp_path, 5, "--zero", "class")
    labels = open_scenes(str(tmp_path / "d"), "train", classes=5, zero="class")[0][1]
    assert labels.unique().tolist() == [0, 1, 2, 3, 4, 255]


def test_who_says_that_0_is_no_class_is_believed(tmp_path):
    scenes(tmp_path / "d", [0, 1, 2])
    assert (run(tmp_path, 3, "--zero", "unlabelled") / "segment.pt").exists()


def looked_at(capsys, *datasets):
    """-> what is printed, and the warnings"""
    capsys.readouterr()
    data.leave_out_bad(vqkd.parse_args([]), Process(), *datasets)
    captured = capsys.readouterr()
    return captured.out, captured.err


def both(root, classes, **options):
    return [open_scenes(str(root), split, classes=classes, **options) for split in ("train", "val")]


def test_one_line_says_what_was_looked_at(tmp_path, capsys):
    scenes(tmp_path, [0, 1, 2, 3])
    out, err = looked_at(capsys, *both(tmp_path, 3, limit=5))
    assert err == ""
    line, = out.splitlines()
    assert "5 of 5 images (train)" in line and "5 of 5 label maps (val): numbers 0 (" in line


def test_odd_label_maps_are_a_warning(tmp_path, capsys):
    scenes(tmp_path, [1, 2, 3], [2, 3, 4])
    save(tmp_path / "annotations" / "training" / "3.png", Image.new("L", (48, 48)))
    _, err = looked_at(capsys, *both(tmp_path, 30))
    assert "1 label maps have no labelled pixel (6 of 6 label maps (train) looked at)" in err
    assert "class numbers 4 are among the held-out label maps" in err
    assert "4 of --classes 30 occur" in err
    scenes(tmp_path, [0, 1, 4], [0, 1, 4])
    _, err = looked_at(capsys, *both(tmp_path, 5))
    assert "number 5 never occurs" in err and "--zero class" in err


def test_splits_without_a_common_class_are_one_sentence(tmp_path):
    scenes(tmp_path / "d", [1, 2], [3, 4])
    assert "no class is in both" in sentence(run, tmp_path, 4)


def test_many_label_maps_are_looked_at_in_a_sample_that_spreads(tmp_path, capsys, monkeypatch):
    scenes(tmp_path, [1, 2], count=9)
    monkeypatch.setattr("support.checks.MAPS_LOOKED_AT", 3)
    read = []
    dataset = open_scenes(str(tmp_path), "train", classes=2)
    numbers = dataset.numbers
    dataset.numbers = lambda index: (read.append(index), numbers(index))[1]
    out, _ = looked_at(capsys, dataset)
    assert read == [0, 4, 8] and "3 of 9 label maps" in out


def test_numbers_in_words():
    assert ranges([0, 1, 2, 3, 7, 9, 10]) == "0 to 3, 7, 9 to 10"
    assert ranges(list(range(0, 40, 2))) == "0, 2, 4, 6, 8, 10, ..."
    assert in_words({0: 1, 255: 3}) == "numbers 0 (25 %), 255 (75 %)"
    assert in_words(dict.fromkeys(range(20), 1)) == "numbers 0 to 19 (20 different)"


# --- images and classes ---------------------------------------------------------------------------
def colours(root, count=4):
    for split in ("train", "val"):
        for k, name in enumerate(("cat", "dog")):
            for i in range(count):
                save(root / split / name / f"{i}.jpg", Image.new("RGB", (48, 48), (9 * i, k, 99)))
    return root


@pytest.mark.parametrize("main, flags", [
    (vqkd.main, []), (finetune.main, ["--init", "scratch"]),
    (linprobe.main, ["--source", "random"])], ids=["vqkd", "finetune", "linprobe"])
def test_images_of_one_colour_each_are_one_sentence(tmp_path, main, flags):
    colours(tmp_path / "d")
    text = sentence(main, [*QUICK, *flags, "--data", str(tmp_path / "d"), "--batch-size", "4",
                           "--out", str(tmp_path / "run")])
    assert "one colour only" in text and "8 of 8 images (train)" in text
    assert not list((tmp_path / "run").glob("*.pt"))


def test_images_that_are_only_measured_may_have_one_colour(tmp_path, capsys):
    colours(tmp_path)
    _, err = looked_at(capsys, data.open_data(str(tmp_path), "val"), open_images(tmp_path / "val"))
    assert err.count("warning: 8 images have one colour only") == 2


def test_some_images_of_one_colour_and_always_the_same_picture_are_warnings(tmp_path, capsys):
    colours(fill(tmp_path / "d"), count=1)
    train = data.open_data(str(tmp_path / "d"), "train")
    _, err = looked_at(capsys, train)
    assert "warning: 2 images have one colour only" in err and "cat/0.jpg" in err
    for i in range(4):
        save(tmp_path / "same" / f"{i}.png", noise())
    _, err = looked_at(capsys, data.open_data(str(tmp_path / "same"), "train", labelled=False))
    assert "always the same picture (3 of 3 images (train) looked at)" in err


def test_fine_texture_is_no_single_colour(tmp_path, capsys):
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255       # an eighth of its size it is grey
    for i in range(3):
        save(tmp_path / f"{i}.jpg", Image.fromarray(board.astype(np.uint8)), quality=100)
    _, err = looked_at(capsys, data.open_data(str(tmp_path), "train", labelled=False))
    assert "one colour" not in err


@pytest.mark.parametrize("main, flags", [
    (finetune.main, ["--init", "scratch"]), (linprobe.main, ["--source", "random"])],
    ids=["finetune", "linprobe"])
def test_a_single_class_is_one_sentence(tmp_path, main, flags):
    fill(tmp_path / "d", classes=["cat"], each=8)
    text = sentence(main, [*QUICK, *flags, "--data", str(tmp_path / "d"), "--batch-size", "4",
                           "--out", str(tmp_path / "run")])
    assert "has one class, cat" in text and "two or more" in text


def test_held_out_classes_that_training_never_shows_are_a_warning(tmp_path, capsys):
    fill(tmp_path, classes=["ant", "bee", "cow"], each=2)
    sets = [data.open_data(str(tmp_path), "train", limit=2), data.open_data(str(tmp_path), "val")]
    _, err = looked_at(capsys, *sets)
    assert "1 of 3 held-out classes have no training image (bee): they count as mistakes" in err
    assert looked_at(capsys, *[data.open_data(str(tmp_path), s) for s in ("train", "val")])[1] == ""


# --- teachers -------------------------------------------------------------------------------------
class Teacher:
    """Features (B, 9, 5) and (B, 9, 3) that a test says."""

    name, names, dims = "clip+dino", ("clip", "dino"), (5, 3)

    def __init__(self, change):
        self.change = change

    def __call__(self, images):
        t = torch.randn(len(images), 9, 8)
        self.change(t)
        return t


def constant(t):
    t[..., :5] = torch.randn(5)


def same_in_an_image(t):
    t[..., 5:] = t[:, :1, 5:].clone()


def nan(t):
    t[1, 2, 6] = torch.nan


def zero(t):
    t[..., 5:] = 0


@pytest.mark.parametrize("change, words", [
    (constant, "clip gives the same features at all patches of 4 images"),
    (zero, "dino gives the same features at all patches of 4 images"),
    (same_in_an_image, "dino gives the same features at all 9 patches of an image"),
    (nan, "the features of dino are NaN or infinite in 1 of 4 images")])
def test_a_teacher_that_teaches_nothing_is_one_sentence(change, words):
    text = sentence(check_teacher, Teacher(change), torch.rand(4, 3, 8, 8), Process())
    assert words in text and "--teacher clip+dino" in text and "weights" in text


def test_a_teacher_whose_features_differ_passes():
    check_teacher(Teacher(lambda t: None), torch.rand(4, 3, 8, 8), Process())


def test_a_tokenizer_does_not_begin_with_such_a_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr("support.teachers.HogTeacher.__call__",
                        lambda teacher, images: torch.ones(len(images), 36, teacher.dim))
    text = sentence(vqkd.main, [*QUICK, "--limit", "40", "--batch-size", "8", "--out",
                                str(tmp_path / "run")])
    assert "--teacher hog: hog gives the same features" in text
    assert not (tmp_path / "run" / "vqkd.jsonl").exists()
