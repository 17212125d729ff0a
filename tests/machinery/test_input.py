"""What strangers' folders and mistyped flags may hold: each odd image is read by one rule or refused in one sentence,
bad ones can be left out, every number has its range, and nothing comes over the network unasked."""
import argparse
import contextlib
import os
import socket
import struct
import warnings
import zlib
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import log_lines, stage
from PIL import Image, ImageFile
from torch._utils import ExceptionWrapper
from torchvision.transforms.v2 import functional as VF

from results import ablate
from support import data, engine, transforms
from support.scenes import SegmentTransform, open_scenes, read_labels
from support.images import IMAGE_ENDINGS, find_images, open_class_folders, open_images, read_image, shown
from results import factors
import finetune
import linprobe
import pretrain
import segment
from support import teachers
from extras import visualize
import vqkd
from support.engine import UserError
from support.labels import columns_of
from support.run import contents
from model import PRESETS, ViT

QUICK = ["--workers", "0", "--amp", "no", "--device", "cpu", "--batch-size", "8", "--micro-batch", "8"]
SKIP = ["--on-bad-image", "skip"]
ODD_NAMES = ["two words", "it's \"quoted\"", "two\nlines", "\rback\tand\x1bforth", "line\u2028separator",
             "große Katze 🐈", os.fsdecode(b"no \xff text")]


def noise(height=20, width=20, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def fill(root, classes=("cat", "dog"), each=3):
    """root/train/CLASS/* and root/val/CLASS/* with pictures of noise."""
    for k, (split, name) in enumerate((split, name) for split in ("train", "val") for name in classes):
        for i in range(each):
            save(root / split / name / f"{i}.png", noise(seed=100 * k + i))
    return root


def sixteen_bits(path, pixels, kind):
    """A PNG of 16 bits a channel, which Pillow does not write.  pixels (H, W, C); kind 0 grey, 2 RGB, 4 grey + alpha"""
    def chunk(name, contents):
        return struct.pack(">I", len(contents)) + name + contents + struct.pack(">I", zlib.crc32(name + contents))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


def sentence(call, *arguments, **options):
    """The UserError of a call, which is one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- one rule for all images
def full(mode, colour):
    return lambda path: save(path, Image.new(mode, (4, 4), colour))


def animated(path):
    save(path, Image.new("RGB", (4, 4), (0, 255, 0)), save_all=True, append_images=[Image.new("RGB", (4, 4), "red")])


@pytest.mark.parametrize("name, make, pixel", [
    ("grey.png", full("L", 77), [77, 77, 77]), ("bits.png", full("1", 1), [255, 255, 255]),
    ("grey16.png", lambda p: sixteen_bits(p, np.full((4, 4, 1), 57344), 0), [223, 223, 223]),    # 223.1 of 255
    ("grey16.tif", lambda p: save(p, Image.fromarray(np.full((4, 4), 57344, np.uint16))), [223, 223, 223]),
    ("grey10.pgm", lambda p: p.write_bytes(b"P5 4 4 1023\n" + np.full((4, 4), 1023, ">u2").tobytes()), [255] * 3),
    ("rgb16.png", lambda p: sixteen_bits(p, np.full((4, 4, 3), [57344, 0, 65535]), 2), [224, 0, 255]),   # high bytes
    ("clear16.png", lambda p: sixteen_bits(p, np.full((4, 4, 2), [9, 0]), 4), [255, 255, 255]),
    ("clear.png", full("RGBA", (200, 0, 0, 0)), [255, 255, 255]),            # not the colour that is hidden below
    ("half.png", full("RGBA", (0, 0, 0, 127)), [128, 128, 128]),             # laid over white
    ("greyclear.png", full("LA", (9, 0)), [255, 255, 255]),
    ("keyed.png", lambda p: save(p, Image.new("RGB", (4, 4), (9, 8, 7)), transparency=(9, 8, 7)), [255, 255, 255]),
    ("palette.png", lambda p: save(p, Image.new("RGB", (4, 4), "red").quantize(4)), [255, 0, 0]),
    ("palette.gif", full("P", 0), [0, 0, 0]), ("animated.gif", animated, [0, 255, 0]),
    ("animated.webp", animated, [0, 255, 0]), ("cmyk.jpg", full("CMYK", (0, 255, 255, 0)), [254, 0, 0]),
    ("cmyk.tif", full("CMYK", (0, 255, 255, 0)), [255, 0, 0]), ("really a gif.jpg", lambda p: save(
        p, Image.new("RGB", (4, 4), "red"), format="gif"), [255, 0, 0])])
def test_an_image_of_any_kind_is_read_by_the_stated_rule(tmp_path, name, make, pixel):
    make(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.shape == (3, 4, 4) and image.dtype == torch.uint8
    assert (image.flatten(1).int() - torch.tensor(pixel)[:, None]).abs().max() <= 3 * name.endswith((".jpg", ".webp"))


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_exif_orientation_ends_upright(tmp_path, turn):
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:4, :8], upright[:4, 8:], upright[4:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)    # a quarter is black
    stored = [None, lambda x: x, np.fliplr, lambda x: x[::-1, ::-1], np.flipud, lambda x: x.swapaxes(0, 1),
              np.rot90, lambda x: x[::-1, ::-1].swapaxes(0, 1), lambda x: np.rot90(x, -1)][turn](upright)
    note = Image.Exif()
    note[0x0112] = turn
    save(tmp_path / "a.png", Image.fromarray(np.ascontiguousarray(stored)), exif=note)
    assert (read_image(tmp_path / "a.png").permute(1, 2, 0).numpy() == upright).all()


def test_a_damaged_exif_note_costs_neither_the_image_nor_a_warning(tmp_path):
    note, image = Image.Exif(), noise()
    note[0x0112], note[0x010F] = 3, "a camera"               # taken upside down
    image.save(tmp_path / "plain.jpg")
    want = read_image(tmp_path / "plain.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for raw, right in ((note.tobytes().replace(b"\x01\x0f", b"\x01\x01"), want.flip(1, 2)),      # text as a height
                           (note.tobytes()[:30], want), (b"Exif\0\0no note at all", want)):
            image.save(tmp_path / "a.jpg", exif=raw)
            assert torch.equal(read_image(tmp_path / "a.jpg"), right)


@pytest.mark.parametrize("pixels, words", [
    (np.full((4, 4), np.nan, np.float32), "floating-point"), (np.full((4, 4), np.inf, np.float32), "floating-point"),
    (np.full((4, 4), 0.5, np.float32), "floating-point"), (np.full((4, 4), 70_000, np.int32), "32-bit"),
    (np.full((4, 4), -1, np.int32), "32-bit")])
def test_pixels_of_unknown_range_are_refused_so_that_none_is_infinite_or_nan(tmp_path, pixels, words):
    save(tmp_path / "a.tif", Image.fromarray(pixels))
    assert words in sentence(read_image, tmp_path / "a.tif")


@pytest.mark.parametrize("ending", [e for e in IMAGE_ENDINGS if e not in (".jpeg", ".tiff", ".pgm")])
@pytest.mark.parametrize("share", [0, 0.3, 0.7, 0.97])
def test_a_truncated_image_is_one_sentence_in_a_full_and_in_a_quick_look(tmp_path, ending, share):
    path = save(tmp_path / f"cut{ending}", noise(64, 64))
    contents = path.read_bytes()
    path.write_bytes(contents[:int(share * len(contents))])
    for draft in (False, True):
        text = sentence(read_image, path, draft=draft)
        assert text.startswith(f"cannot read the image {path} (") and text.endswith("remove it or replace it")


@pytest.mark.parametrize("make", [
    lambda p: p.write_text("this is no picture"), lambda p: p.symlink_to(p.parent / "nowhere"), lambda p: p.mkdir(),
    lambda p: p.symlink_to(p), lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    lambda p: Image.new("L", (4, 4)).save(p, format="ico")],
    ids="text, dangling link, folder, link to itself, program for a printer, icon".split(", "))
def test_what_is_no_picture_behind_an_images_ending_is_one_sentence(tmp_path, make):
    make(tmp_path / "x.jpg")
    assert "x.jpg" in sentence(read_image, tmp_path / "x.jpg")


def test_an_image_without_permission_is_one_sentence(tmp_path, monkeypatch):
    path = save(tmp_path / "x.png", noise())
    path.chmod(0)
    if os.geteuid() == 0:                                    # whom nothing is forbidden
        monkeypatch.setattr(Image, "open", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    assert "x.png ([Errno 13] Permission denied" in sentence(read_image, path)


# ---------------------------------------------------------------------------------------------------- extreme sizes
@pytest.mark.parametrize("side", [10_000, 20_000])           # Pillow only warns of the first, and refuses the second
def test_a_file_that_unpacks_to_too_many_pixels_is_refused_before_it_takes_the_memory(tmp_path, monkeypatch, side):
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("it is being unpacked"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for read in (read_image, lambda path: read_labels(path, 150)):
            assert "bomb.png (Image size" in sentence(read, tmp_path / "bomb.png")


TRANSFORMS = {"vqkd": lambda: transforms.VQKDTransform(48), "mim": lambda: transforms.MIMTransform(48),
              "finetune": lambda: transforms.FinetuneTransform(48), "eval": lambda: transforms.EvalTransform(48),
              "eval 224": lambda: transforms.EvalTransform(224), "eval 384": lambda: transforms.EvalTransform(384)}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("height, width", [(1, 1), (3, 2), (5, 40), (20_000, 1), (10, 20_000)])
def test_an_image_of_any_size_becomes_a_small_square_and_nothing_large_on_the_way(monkeypatch, name, height, width):
    resize = VF.resize

    def watched(image, size, *rest, **options):
        out = resize(image, size, *rest, **options)
        assert out[0].numel() < 2e6
        return out

    monkeypatch.setattr(VF, "resize", watched)
    transform, image = TRANSFORMS[name](), torch.randint(256, (3, height, width), dtype=torch.uint8)
    out = transform(image)
    assert out.shape[0] == 3 and out.shape[1] == out.shape[2] >= 48 and out.isfinite().all()


def test_the_middle_of_a_strip_is_what_the_crop_of_the_whole_would_show():
    strip = torch.randint(256, (3, 9, 90), dtype=torch.uint8)
    whole = VF.center_crop(VF.resize(strip, [256], **transforms.BICUBIC), [224, 224])
    assert torch.equal(transforms.EvalTransform(224)(strip), whole)


@pytest.mark.parametrize("height, width", [(1, 1), (3, 2), (10, 20_000)])
def test_a_scene_of_any_size_can_be_trained_on_and_predicted(height, width):
    image, labels = torch.zeros(3, height, width, dtype=torch.uint8), torch.zeros(height, width, dtype=torch.uint8)
    out, target = SegmentTransform(48)(image, labels)
    assert out.shape == (3, 48, 48) and target.shape == (48, 48)
    model = segment.UPerNet(ViT(48, 8, 24, 4, 3), 5, channels=8).eval()
    with torch.no_grad():
        assert segment.predict(model, image[None] / 255).shape == (1, 5, height, width)


def test_a_long_image_is_read_whole_and_an_image_smaller_than_a_patch_is_encoded(tmp_path):
    save(tmp_path / "long.png", Image.new("RGB", (20_000, 30), (1, 2, 3)))
    assert read_image(tmp_path / "long.png").shape == (3, 30, 20_000)
    save(tmp_path / "dot.png", Image.new("RGB", (1, 1), (1, 2, 3)))
    ids = vqkd.build(vqkd.parse_args([]), [144]).encode(torch.stack([
        open_images(tmp_path, transforms.EvalTransform(48))[i][0] for i in range(2)]) / 255)
    assert ids.shape == (2, 36)


# -------------------------------------------------------------------------------------------------------- odd folders
def test_a_folder_is_walked_into_whatever_its_name_and_other_files_are_passed_over(tmp_path):
    save(tmp_path / "a" / "x.jpg" / "1.PNG", noise())                        # a folder called x.jpg
    save(tmp_path / "a" / "again" / "1.PNG", noise())                        # the same name twice is two images
    for hidden in (".thumbnails/1.png", ".1.png", "._1.png"):
        save(tmp_path / "a" / hidden, noise())
    for other in ("notes.txt", "1.npy", "png", "1.png.part"):
        (tmp_path / "a" / other).write_text("no image")
    found = [os.path.relpath(path, tmp_path) for path in find_images(tmp_path)]
    assert found == ["a/again/1.PNG", "a/x.jpg/1.PNG"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    def found():
        return {os.path.relpath(path, tmp_path) for path in find_images(tmp_path)}

    save(tmp_path / "a" / "1.png", noise())
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    assert found() == {"a/1.png"}
    (tmp_path / "a" / "up").unlink()
    save(tmp_path / "b" / "2.png", noise())
    (tmp_path / "a" / "other").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "back").symlink_to(tmp_path / "a")     # a circle of two
    assert found() == {"a/1.png", "a/other/2.png", "b/2.png", "b/back/1.png"}


def test_a_class_that_only_one_split_has_is_named(tmp_path):
    fill(tmp_path)
    save(tmp_path / "val" / "bird" / "1.png", noise())
    (tmp_path / "train" / "bird").write_text("a file where a class folder belongs")
    assert "only one of them has bird" in sentence(data.open_data, str(tmp_path), "train")
    assert len(data.open_data(str(tmp_path), "val", labelled=False)) == 7                # no labels, no classes


def test_a_class_folder_without_images_is_named(tmp_path):
    fill(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "bird").mkdir()
        (tmp_path / split / "bird" / "notes.txt").write_text("no image")
    assert "train/bird holds no image" in sentence(data.open_data, str(tmp_path), "train")


def test_a_folder_that_may_not_be_read_is_named_and_not_passed_over(tmp_path, monkeypatch):
    fill(tmp_path)
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    for labelled in (True, False):
        text = sentence(data.open_data, str(tmp_path), "train", labelled=labelled)
        assert "train/dog (Permission denied)" in text and "permissions" in text


@pytest.mark.parametrize("odd", ODD_NAMES, ids=ascii)
def test_names_may_hold_anything_and_an_error_about_them_is_one_line(tmp_path, odd, capsys):
    root = fill(tmp_path / odd, (odd, "plain"), each=2)
    train = data.open_data(str(root), "train")
    assert train.classes == sorted([odd, "plain"]) and train.labels.tolist() == [0, 0, 1, 1]
    assert len(open_class_folders(str(root / "val"))) == 4
    broken = root / "train" / odd / f"{odd}.png"
    broken.write_bytes(b"")
    train = data.open_data(str(root), "train", transforms.EvalTransform(16), labelled=False)

    def main():
        try:
            [train[i] for i in range(len(train))]
        except UserError:                                    # as it arrives from a loader's worker, with its traceback
            ExceptionWrapper(where="in DataLoader worker process 0").reraise()

    with pytest.raises(SystemExit) as caught:
        engine.run(main)
    line, = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and line.startswith("error: cannot read the image ") and "remove it" in line
    assert shown(f"{odd}.png (") in line
    for call in (lambda: data.open_data(str(broken), "train"), lambda: open_scenes(str(broken), "train"),
                 lambda: open_class_folders(str(broken.parent)), lambda: data.open_data(str(root / "val"), "val"),
                 lambda: columns_of(train_of(root), ["plain"], "x.pt")):
        assert shown(odd) in sentence(call)


def train_of(root):
    return data.open_data(str(root), "train")


def test_ordinary_names_are_shown_as_they_are():
    for name in ("a b/ü'\"🐈.png", "C:\\pictures\\x.png"):
        assert shown(name) == name
    assert shown("a\nb") == "a\\nb" and shown(os.fsdecode(b"\xff")) == "\\udcff"


@pytest.fixture
def tokenizer(tmp_path):
    """A folder with a vqkd.pt of random weights."""
    args = vqkd.parse_args(["--codes", "8"])
    engine.write_file(tmp_path / "run" / "vqkd.pt", contents("vqkd", vqkd.build(args, [144]), args))
    return tmp_path / "run"


def test_images_of_any_name_are_encoded_under_their_names(tokenizer, tmp_path):
    for i, odd in enumerate(ODD_NAMES):
        save(tmp_path / "images" / odd / f"{odd}.png", noise(seed=i))
    vqkd.main([*QUICK, "--out", str(tokenizer), "--encode", str(tmp_path / "images")])
    with np.load(tokenizer / "tokens.npz") as tokens:
        assert tokens["ids"].shape == (len(ODD_NAMES), 6, 6)
        assert sorted(tokens["names"]) == sorted(str(tmp_path / "images" / odd / f"{odd}.png") for odd in ODD_NAMES)


# --------------------------------------------------------------------------------------------------- --on-bad-image
def options(out, *flags):
    return vqkd.parse_args([*QUICK, "--out", str(out), *flags])


def spoil(root):
    """Makes three of the files below root unreadable. -> their paths, sorted"""
    bad = [root / path for path in ("train/cat/1.png", "train/dog/link.png", "val/dog/two\nlines.png")]
    bad[0].write_bytes(bad[0].read_bytes()[:300])
    bad[1].symlink_to(root / "nowhere")
    bad[2].write_text("no picture")
    return bad


def test_an_unreadable_image_stops_the_run_unless_it_is_to_be_skipped(tmp_path):
    spoil(fill(tmp_path))
    train = data.open_data(str(tmp_path), "train")
    data.leave_out_bad(options(tmp_path / "out"), engine.Process(), train)
    assert len(train) == 7 and "1.png" in sentence(lambda: [train[i] for i in range(7)])
    assert engine.differences(dict(on_bad_image="stop"), dict(on_bad_image="skip"))      # a resumed run keeps to it


@pytest.mark.parametrize("workers", ["0", "2"])
def test_unreadable_images_are_left_out_reported_and_listed_with_the_reason(tmp_path, capsys, workers):
    bad = spoil(fill(tmp_path))
    train, val = (data.open_data(str(tmp_path), split) for split in ("train", "val"))
    data.leave_out_bad(options(tmp_path / "out", *SKIP, "--workers", workers), engine.Process(), train, val)
    assert train.labels.tolist() == [0, 0, 1, 1, 1] and val.labels.tolist() == [0, 0, 0, 1, 1, 1]
    for dataset in (train, val):
        assert not set(dataset.names) & set(map(str, bad))
        assert all(dataset[i][0].shape == (3, 20, 20) for i in range(len(dataset)))
    file = tmp_path / "out" / "bad_images.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3 and all(shown(path) in line for path, line in zip(bad, lines))
    assert "truncated" in lines[0] and "No such file" in lines[1] and "cannot identify" in lines[2]
    line, = capsys.readouterr().err.splitlines()
    assert "3 of 14 images" in line and str(bad[0]) in line and str(file) in line
    for path in bad:
        path.unlink()
    data.leave_out_bad(options(tmp_path / "out", *SKIP), engine.Process(), data.open_data(str(tmp_path), "train"))
    assert not file.exists()                                 # what is no longer true does not stay


def test_a_limit_chooses_first_and_bad_images_leave_it_smaller(tmp_path):
    spoil(fill(tmp_path))
    train = data.open_data(str(tmp_path), "train", limit=7)
    data.leave_out_bad(options(tmp_path / "out", *SKIP), engine.Process(), train)
    assert len(train) == 5


def test_a_folder_without_any_readable_image_ends_the_run(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"")
    text = sentence(data.leave_out_bad, options(tmp_path / "out", *SKIP), engine.Process(), open_images(tmp_path))
    assert "none of the 3 images" in text and "0.png" in text


def test_skipping_leaves_data_sets_without_files_alone(tmp_path):
    shapes = data.open_data("shapes", "val", limit=10)
    data.leave_out_bad(options(tmp_path / "out", *SKIP), engine.Process(), shapes, None)
    assert len(shapes) == 10 and not (tmp_path / "out").exists()


def test_the_codes_of_readable_images_are_written(tokenizer, tmp_path):
    spoil(fill(tmp_path / "images"))
    flags = [*QUICK, "--out", str(tokenizer), "--encode", str(tmp_path / "images")]
    assert "remove it" in sentence(vqkd.main, flags)
    vqkd.main(flags + SKIP)
    with np.load(tokenizer / "tokens.npz") as tokens:
        assert len(tokens["ids"]) == len(tokens["names"]) == 11


def test_an_evaluation_counts_each_readable_image_once(tmp_path):
    model = ViT(**PRESETS["tiny"], num_classes=2)
    engine.write_file(tmp_path / "finetune.pt", dict(kind="finetune", model=model.state_dict(), classes=["cat", "dog"]))
    spoil(fill(tmp_path / "images"))
    result = finetune.main([*QUICK, *SKIP, "--eval", "--out", str(tmp_path), "--data", str(tmp_path / "images")])
    assert result["images"] == 6 and (tmp_path / "bad_images.txt").read_text().count("\n") == 1


def scenes(root):
    """ADE20K's layout with 10 training and 3 validation images; one image and one annotation are damaged."""
    for split, n in (("training", 10), ("validation", 3)):
        for i in range(n):
            save(root / "images" / split / f"{i}.jpg", noise(40, 50, i))
            save(root / "annotations" / split / f"{i}.png", Image.fromarray(np.full((40, 50), i % 3, np.uint8)))
    for path in (root / "images/training/3.jpg", root / "annotations/training/5.png"):
        path.write_bytes(path.read_bytes()[:-30])
    return root


def test_a_scene_is_left_out_with_its_label_map_where_either_is_damaged(tmp_path):
    train = open_scenes(str(scenes(tmp_path)), "train", classes=2)
    data.leave_out_bad(options(tmp_path / "out", *SKIP), engine.Process(), train)
    assert [os.path.basename(name) for name in train.paths] == [b"%d.jpg" % i for i in (0, 1, 2, 4, 6, 7, 8, 9)]
    assert all(train[i][1].shape == (40, 50) for i in range(8)) and len(train.targets) == 8
    train = open_scenes(str(tmp_path), "train", classes=1)              # a wrong number is no damage:
    data.leave_out_bad(options(tmp_path / "out", *SKIP), engine.Process(), train)
    assert "give --classes" in sentence(lambda: train[2])                    # it ends the run


@pytest.mark.slow
def test_every_stage_runs_over_a_folder_with_bad_images_that_are_to_be_skipped(tmp_path):
    root, out = fill(tmp_path / "images", each=8), tmp_path / "out"
    spoil(root)
    flags = [*QUICK, *SKIP, "--out", str(out), "--data", str(root)]
    vqkd.main([*flags, "--steps", "2", "--continuous-steps", "1", "--codes", "8"])
    pretrain.main([*flags, "--steps", "1"])
    linprobe.main([*flags, "--steps", "1", "--blocks", "1", "--augment", "1"])
    finetune.main([*flags, "--steps", "1"])
    for name, images in (("vqkd", 15), ("pretrain", 15), ("finetune", 15)):
        assert log_lines(out / f"{name}.jsonl")[0]["images"] == images
    assert log_lines(out / "linprobe.jsonl")[-1]["images"] == 15
    segment.main([*QUICK, *SKIP, "--out", str(out), "--data", str(scenes(tmp_path / "scenes")), "--classes", "2",
                  "--steps", "1"])
    assert log_lines(out / "segment.jsonl")[0]["images"] == 8
    assert (out / "bad_images.txt").read_text().count("\n") == 2


@pytest.mark.slow
def test_two_processes_leave_out_the_same_images_as_one(tmp_path, capsys):
    spoil(fill(tmp_path / "images", each=8))
    flags = [*QUICK, *SKIP, "--data", str(tmp_path / "images"), "--codes", "8", "--steps", "2", "--continuous-steps=1"]
    vqkd.main([*flags, "--out", str(tmp_path / "1")])
    done = stage("vqkd.py", *flags, "--out", tmp_path / "2", processes=2)
    for said in (capsys.readouterr().err, done.stderr):
        assert said.count("3 of 34 images cannot be read") == 1
    one, two = ((tmp_path / name / "bad_images.txt").read_text() for name in "12")
    assert one == two and one.count("\n") == 3
    assert [log_lines(tmp_path / name / "vqkd.jsonl")[0]["images"] for name in "12"] == [15, 15]


# -------------------------------------------------------------------------------------------------- numbers and flags
CALLS = {                # what reads the flags of a command, and others that it needs to get as far as the ranges
    "vqkd": (vqkd.parse_args, []), "pretrain": (pretrain.parse_args, []),
    "finetune": (finetune.parse_args, ["--init", "scratch"]), "linprobe": (linprobe.parse_args, []),
    "segment": (segment.parse_args, ["--init", "scratch"]), "visualize": (visualize.parse_args, []),
    "ablate": (ablate.main, ["--list"]), "factors": (factors.main, ["/nowhere"])}


def numeric_flags():
    """(command, its flag, type, how many numbers) of every numeric flag that the parsers know."""
    class Parser(Exception):
        pass

    def caught(parser, *arguments, **options):
        raise Parser(parser)

    for name, (call, flags) in CALLS.items():
        with mock.patch.object(argparse.ArgumentParser, "parse_known_args", caught), pytest.raises(Parser) as found:
            call(flags)
        for action in found.value.args[0]._actions:
            kind = getattr(action.type, "kind", action.type)            # whole(...), number(...) or plain
            if kind in (int, float):
                yield name, action.option_strings[0], kind, action.nargs if isinstance(action.nargs, int) else 1


@pytest.mark.parametrize("command, flag, kind, count", list(numeric_flags()))
def test_a_number_out_of_all_reason_is_refused_by_the_name_of_its_flag(command, flag, kind, count):
    call, others = CALLS[command]
    for value in ["-1", "0", str(10**15)] if kind is int else ["-1", "0", "1e30", "nan", "inf", "-inf"]:
        try:
            call([*others, f"{flag}={value}"] if count == 1 else [*others, flag, *[value] * count])
        except UserError as error:
            assert flag in str(error) and "\n" not in str(error)
        else:
            assert value == "0", f"{flag} {value} was taken"


def test_the_parsers_have_the_numeric_flags_that_this_file_is_about():
    found = {(command, flag) for command, flag, _, _ in numeric_flags()}
    assert len(found) > 100 and {command for command, _ in found} == set(CALLS)
    assert {("vqkd", "--codes"), ("pretrain", "--mask-patches"), ("linprobe", "--rates"), ("ablate", "--seeds"),
            ("segment", "--jitter"), ("finetune", "--mixup"), ("factors", "--images")} <= found


@pytest.mark.parametrize("call, flags, words", [
    (vqkd.parse_args, "--image-size 1000000", r"--image-size must lie in \[8, 1024\]"),
    (pretrain.parse_args, "--patch-size 1 --image-size 224", "--image-size must lie in"),    # 50,176 patches squared
    (finetune.main, "--init scratch --patch-size 49", r"--patch-size must lie in \[1, 48\]"),
    (linprobe.parse_args, "--source random --image-size 50", "image size 50x50 is not a multiple of the patch size 8"),
    (segment.parse_args, "--init scratch --image-size 50", "image size 50x50 is not a multiple of the patch size 8"),
    (vqkd.parse_args, "--steps 10 --epochs 2", "--steps 10 and --epochs 2"),
    (linprobe.parse_args, "--steps 10 --epochs 2", "--steps 10 and --epochs 2"),
    (segment.parse_args, "--init scratch --steps 10 --epochs 2", "--steps 10 and --epochs 2"),
    (vqkd.parse_args, "--cache-teacher x --crop-scale 0.5", "--cache-teacher .* leave out --crop-scale"),
    (pretrain.parse_args, "--no-aggregation --separate-head", "--separate-head: --no-aggregation"),
    (pretrain.parse_args, "--no-aggregation --head-depth 1", "--head-depth: --no-aggregation"),
    (pretrain.parse_args, "--no-aggregation --early-layer 2", "--early-layer: --no-aggregation"),
    (pretrain.parse_args, "--head-depth 0 --separate-head", "--separate-head: .*--head-depth 0"),
    (pretrain.parse_args, "--mask-patches 5 --mask-min-block 6", r"--mask-min-block must lie in \[1, 5\]"),
    (pretrain.parse_args, "--early-layer 7", r"--early-layer must lie in \[1, 6\]"),
    (linprobe.parse_args, "--source tokenizer --checkpoint x.pt", "--source tokenizer does not read --checkpoint"),
    (segment.parse_args, "--init scratch --multi-scale", "--multi-scale belongs to --eval"),
    (finetune.parse_args, "--init scratch --intermediate", "leave out --init scratch"),
    (finetune.parse_args, "--init scratch --checkpoint x.pt", "leave out --checkpoint x.pt")])
def test_flags_that_contradict_each_other_are_one_sentence(call, flags, words):
    with pytest.raises(UserError, match=words) as caught:
        call(flags.split())
    assert "\n" not in str(caught.value)


def test_few_hidden_patches_need_no_smallest_block_and_a_micro_batch_is_only_a_ceiling():
    args = pretrain.parse_args(["--mask-patches", "1", "--batch-size", "4", "--micro-batch", "64"])
    assert args.mask_min_block == 1 and int(pretrain.sample_block_mask(6, 6, 1, 1).sum()) == 1
    assert data.split_batch(args.batch_size, args.micro_batch, 2) == (2, 1)


@pytest.mark.parametrize("main, flags", [(vqkd.main, []), (finetune.main, ["--init", "scratch"]),
                                         (segment.main, ["--init", "scratch"])])
def test_a_limit_below_one_batch_is_one_sentence(tmp_path, main, flags):
    text = sentence(main, [*QUICK, *flags, "--limit", "5", "--out", str(tmp_path)])
    assert "5 training images do not fill one batch of 8: lower --batch-size" in text


@pytest.mark.parametrize("flags", [["--steps", "1.5"], ["--lr", "fast"], ["--on-bad-image", "ask"], ["--stepz", "1"]])
def test_a_flag_that_argparse_does_not_understand_is_one_sentence(flags):
    assert flags[0] in sentence(vqkd.parse_args, flags)      # launch exits with code 2


# -------------------------------------------------------------------------------------------------------- the network
@contextlib.contextmanager
def offline():
    """Whoever looks up a name or opens a connection fails, and is noted down."""
    asked = []

    def refuse(*arguments, **options):
        asked.append(arguments)
        raise OSError("no network here")

    with mock.patch.object(socket.socket, "connect", refuse), mock.patch.object(socket, "create_connection", refuse), \
            mock.patch.object(socket, "getaddrinfo", refuse):
        yield asked


def test_opening_a_data_set_asks_no_network(tmp_path):
    with offline() as asked:
        data.open_data("shapes", "val", limit=10)
        data.open_data(str(fill(tmp_path)), "train")[0]
        for name in ("cifar10", "cifar100"):
            assert "add --download" in sentence(data.open_data, name, "train", data_dir=str(tmp_path))
        for name in ("hog", "pixel"):
            teachers.build_teacher(name, (6, 6), 8, "cpu")
    assert not asked


def test_download_is_what_asks_the_network(tmp_path):
    with offline() as asked:
        text = sentence(data.open_data, "cifar10", "train", data_dir=str(tmp_path), download=True)
    assert asked and "no network here" in text


@pytest.mark.parametrize("name, module", [("clip", "open_clip"), ("dino", "timm")])
def test_a_named_teacher_with_weights_is_what_fetches_them(monkeypatch, name, module):
    library = pytest.importorskip(module)
    ask = mock.Mock(side_effect=OSError("no network here"))
    monkeypatch.setattr(library, "create_model", ask)
    text = sentence(teachers.build_teacher, name, (14, 14), 16, "cpu")
    assert "no network here" in text and "hog and pixel need no weights" in text
    assert ask.call_args.kwargs["pretrained"]


@pytest.mark.slow
def test_the_five_stages_run_on_built_in_images_without_a_network(tmp_path):
    flags = [*QUICK, "--limit", "16", "--out", str(tmp_path)]
    with offline() as asked:
        vqkd.main([*flags, "--steps", "2", "--continuous-steps", "1", "--codes", "8"])
        pretrain.main([*flags, "--steps", "1"])
        linprobe.main([*flags, "--steps", "1", "--blocks", "1"])
        finetune.main([*flags, "--steps", "1"])
        segment.main([*flags, "--steps", "1"])
    assert not asked
