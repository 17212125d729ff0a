"""Every file of a folder is used, or counted with the reason."""
import json
import os
import unicodedata

import numpy as np
import pytest
from conftest import log_lines
from pictures import fill, noise, save, sentence
from PIL import Image

import vqkd
from support import data
from support.find import LeftOut, find_images, label_folders, more_formats, read_text
from support.images import open_class_folders, open_images
from support.labels import columns_of, read_classes
from support.process import Process
from support.scenes import open_scenes

COMPOSED = ["café", "Münze"]                 # é and ü are one character each
APART = [unicodedata.normalize("NFD", name) for name in COMPOSED]


def below(root, paths):
    return [os.path.relpath(path, root) for path in paths]


def found(root):
    """-> names of the pictures below root; {reason: names of the other files}"""
    left_out = LeftOut()
    paths = find_images(root, left_out)
    return below(root, paths), {k: sorted(below(root, v)) for k, v in left_out.items()}


def label_map(path, numbers=(0, 1, 2), size=(20, 20)):
    cells = np.random.default_rng(1).integers(0, len(numbers), size)
    return save(path, Image.fromarray(np.array(numbers, np.uint8)[cells]))


# --- endings --------------------------------------------------------------------------------------
@pytest.mark.parametrize("ending, kind", [
    (".jfif", "jpeg"), (".jpe", "jpeg"), (".JFIF", "jpeg"), (".PnG", "png"), (".pnm", "ppm"),
    (".avif", "avif"), ("", "jpeg"), ("", "png"), ("", "gif"), ("", "bmp"), ("", "webp"),
    ("", "tiff"), ("", "avif")])
def test_a_picture_is_found_and_read_by_its_ending_or_without_one_by_how_it_begins(
        tmp_path, ending, kind):
    if kind == "avif" and ".avif" not in more_formats():
        pytest.skip("Pillow was built without AVIF")
    save(tmp_path / f"a photo{ending}", noise(), format=kind)
    assert found(tmp_path) == ([f"a photo{ending}"], {})
    assert open_images(tmp_path)[0][0].shape == (3, 20, 20)


def test_files_of_other_kinds_are_counted_by_their_ending(tmp_path):
    save(tmp_path / "a.png", noise())
    for name in ("notes.txt", "more.TXT", "a.npy", "a.png.part", "README", "b.HEIC", "BM of mine"):
        (tmp_path / name).write_text("no picture")
    names, others = found(tmp_path)
    assert names == ["a.png"]
    assert others.pop(".heic (pip install pillow-heif reads them)") == ["b.HEIC"]
    assert others == {".txt": ["more.TXT", "notes.txt"], ".npy": ["a.npy"],
                      ".part": ["a.png.part"],
                      "without an ending, no pictures": ["BM of mine", "README"]}


def test_hidden_files_and_folders_and_what_a_mac_leaves_are_counted(tmp_path):
    save(tmp_path / "a.png", noise())
    for name in (".DS_Store", "._a.png", ".thumbnails/a.png"):
        save(tmp_path / "b" / name, noise(), format="png")
    names, others = found(tmp_path)
    assert names == ["a.png"]
    assert others == {"hidden": ["b/.DS_Store", "b/._a.png", "b/.thumbnails"]}


def test_links_and_pipes_are_used_or_counted(tmp_path):
    save(tmp_path / "a.png", noise())
    save(tmp_path / "store" / "b.png", noise())
    (tmp_path / "more").symlink_to("store")
    (tmp_path / "store" / "up").symlink_to("..")
    (tmp_path / "cat").symlink_to("nowhere")
    (tmp_path / "itself").symlink_to("itself")
    os.mkfifo(tmp_path / "pipe.png")                         # to open it would wait for ever
    names, others = found(tmp_path)
    assert names == ["a.png", "more/b.png", "store/b.png"]
    assert others == {"links to nowhere": ["cat", "itself"],
                      "links back to a folder above": ["more/up", "store/up"],
                      "neither file nor folder": ["pipe.png"]}


# --- what a run says ------------------------------------------------------------------------------
def said(capsys, *datasets):
    capsys.readouterr()
    args = vqkd.parse_args([])
    data.leave_out_bad(args, Process(), *datasets)
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if line.startswith("note: ")]


def test_one_line_says_what_is_left_out_of_both_splits(tmp_path, capsys):
    fill(tmp_path)
    (tmp_path / "README").write_text("about these images")
    save(tmp_path / "test" / "1.png", noise())
    save(tmp_path / "train" / "stray.png", noise())
    (tmp_path / "val" / "dog" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "cat" / ".hidden").write_text("no image")
    sets = [data.open_data(str(tmp_path), split) for split in ("train", "val")]
    assert [len(s) for s in sets] == [6, 6]
    line, = said(capsys, *sets)
    for words in ("2 outside the folders that are read (README)", "1 .txt (val/dog/notes.txt)",
                  "1 outside the class folders (train/stray.png)", "1 hidden (train/cat/.hidden)"):
        assert words in line
    assert not sets[0].left_out                              # no burden for workers
    assert said(capsys, *sets) == []
    unlabelled = [data.open_data(str(tmp_path), split, labelled=False) for split in
                  ("train", "val")]
    assert [len(s) for s in unlabelled] == [7, 6]
    line, = said(capsys, *unlabelled)
    assert "stray" not in line and "2 outside the folders that are read (README)" in line


def test_a_folder_of_images_alone_is_no_reason_for_a_line(tmp_path, capsys):
    fill(tmp_path)
    assert said(capsys, data.open_data(str(tmp_path), "train")) == []


def test_the_commonest_reasons_are_named_and_the_rest_is_added_up(tmp_path):
    left_out = LeftOut()
    for k in range(9):
        for i in range(k + 1):
            left_out.add(f".{k}", tmp_path / f"{i}.{k}")
    text = left_out.text(tmp_path)
    assert "9 .8 (0.8), 8 .7 (0.7)" in text and text.endswith(", 6 others")


# --- class folders --------------------------------------------------------------------------------
def test_a_class_folder_that_is_a_link_to_nowhere_is_named(tmp_path):
    fill(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "cow").symlink_to(tmp_path / "store" / "cow")
    text = sentence(data.open_data, str(tmp_path), "train")
    assert "train/cow" in text and "store/cow" in text and "mend or remove the link" in text
    assert "cow" in sentence(open_class_folders, str(tmp_path / "val"))


def test_images_below_a_class_folder_have_its_label_at_any_depth(tmp_path):
    fill(tmp_path)
    save(tmp_path / "train" / "cat" / "black" / "young" / "1.png", noise())
    train = data.open_data(str(tmp_path), "train")
    assert train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_a_name_is_the_same_name_whether_its_accents_are_apart_or_not(tmp_path):
    for split, names in (("train", COMPOSED), ("val", APART)):
        for i, name in enumerate(names):
            save(tmp_path / split / name / "1.png", noise(seed=i))
    save(tmp_path / "train" / APART[0] / "2.png", noise(seed=2))         # one class, two folders
    train, val = (data.open_data(str(tmp_path), split) for split in ("train", "val"))
    assert train.classes == val.classes == sorted(COMPOSED)
    assert [train.labels.tolist(), val.labels.tolist()] == [[0, 1, 1], [0, 1]]
    assert open_class_folders(str(tmp_path / "val")).classes == sorted(COMPOSED)
    for names in (COMPOSED, APART):
        assert columns_of(train, [*names, "other"], "x.pt").tolist() == [1, 0]


# --- text files -----------------------------------------------------------------------------------
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("names", [COMPOSED, APART], ids=["composed", "apart"])
@pytest.mark.parametrize("form", ["lines", "windows", "json"])
def test_a_list_of_classes_reads_as_it_looks_whichever_editor_saved_it(
        tmp_path, encoding, names, form):
    end = "\r\n" if form == "windows" else "\n"
    text = json.dumps(names, ensure_ascii=False) if form == "json" else end.join([*names, ""])
    (tmp_path / "names.txt").write_bytes(text.encode(encoding))
    assert read_classes(tmp_path / "names.txt") == COMPOSED


def test_a_list_of_classes_in_another_encoding_is_one_sentence(tmp_path):
    (tmp_path / "names.txt").write_bytes("café\nzwei\n".encode("latin-1"))
    assert "names.txt cannot be read" in sentence(read_classes, tmp_path / "names.txt")
    with pytest.raises(UnicodeDecodeError):
        read_text(tmp_path / "names.txt")


# --- label maps -----------------------------------------------------------------------------------
@pytest.mark.parametrize("folders, maps", [
    (["images", "annotations"], ["annotations"]), (["images", "Masks", "labels"],
                                                   ["Masks", "labels"]),
    (["JPEGImages", "SegmentationClass", "SegmentationObject"],
     ["SegmentationClass", "SegmentationObject"]),
    (["leftImg8bit", "gtFine"], ["gtFine"]), (["train_images", "train_masks"], ["train_masks"]),
    (["train", "train_labels"], ["train_labels"]),
    (["mask", "no mask"], []), (["labels", "cats"], []), (["images", "cats"], []),
    (["masks"], []), (["a_images", "b_masks"], [])])
def test_folders_of_label_maps_are_known_by_the_images_beside_them(folders, maps):
    assert label_folders(folders) == set(maps)


def test_label_maps_beside_their_images_are_counted_and_not_taken(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.png", "d.jpg", "d.png", "her mask.jpg"):
        save(tmp_path / name, noise())
    for name in ("a_mask.png", "b.png", "c-labelIds.png"):
        label_map(tmp_path / name)
    names, others = found(tmp_path)
    assert names == ["a.jpg", "b.jpg", "c.png", "d.jpg", "d.png", "her mask.jpg"]    # d is colour
    assert others == {"label maps": ["a_mask.png", "b.png", "c-labelIds.png"]}


@pytest.mark.parametrize("images, maps, train, val", [
    ("images/{}", "annotations/{}", "training", "validation"),
    ("images/{}", "masks/{}", "train", "val"), ("{}/images", "{}/masks", "train", "val")])
def test_stages_1_and_2_take_the_images_of_a_segmentation_data_set(
        tmp_path, capsys, images, maps, train, val):
    for split, count in ((train, 5), (val, 2)):
        for i in range(count):
            save(tmp_path / images.format(split) / f"{i}.jpg", noise(seed=i))
            label_map(tmp_path / maps.format(split) / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    sets = [data.open_data(str(tmp_path), split, labelled=False) for split in ("train", "val")]
    for dataset, folder, count in zip(sets, (train, val), (5, 2), strict=True):
        assert len(dataset) == count
        assert all(f"/{images.format(folder)}/" in name for name in dataset.names)
    line, = said(capsys, *sets)
    assert "7 label maps" in line and "1 outside the folders that are read (notes.txt)" in line
    assert len(open_images(tmp_path)) == 7


def test_a_segmentation_data_set_without_splits_holds_images_out(tmp_path):
    for i in range(21):
        save(tmp_path / "images" / f"{i:02d}.jpg", noise(seed=i))
        label_map(tmp_path / "masks" / f"{i:02d}.png")
    sets = [data.open_data(str(tmp_path), split, labelled=False) for split in ("train", "val")]
    assert [len(s) for s in sets] == [19, 2]


def test_the_tokenizer_of_a_segmentation_data_set_trains_on_its_images(tmp_path, capsys):
    for split, count in (("training", 6), ("validation", 3)):
        for i in range(count):
            save(tmp_path / "d é" / "images" / split / f"{i}.jpg", noise(48, 48, seed=i))
            label_map(tmp_path / "d é" / "annotations" / split / f"{i}.png")
    vqkd.main(["--data", str(tmp_path / "d é"), "--out", str(tmp_path / "run"), "--steps", "2",
               "--batch-size", "4", "--workers", "0", "--continuous-steps", "1", "--amp", "no",
               "--codes", "8"])
    assert log_lines(tmp_path / "run" / "vqkd.jsonl")[0]["images"] == 6
    said = capsys.readouterr()
    assert "9 label maps" in said.err and "d é" in said.err
    assert "looked at 6 of 6 images (train); 3 of 3 images (val)" in said.out


# --- pairs of images and label maps ---------------------------------------------------------------
def test_label_maps_are_paired_by_name_and_those_without_an_image_are_counted(tmp_path, capsys):
    for split in ("training", "validation"):
        pairs = [("a.b.JPG", "a.b.PNG"), (COMPOSED[0], f"{APART[0]}.tif"), ("x/c.png", "x/c.png")]
        for i, (name, of_map) in enumerate(pairs):
            save(tmp_path / "images" / split / name, noise(seed=i), format="png")
            label_map(tmp_path / "annotations" / split / of_map)
    label_map(tmp_path / "annotations" / "training" / "lonely.png")
    (tmp_path / "objectInfo150.txt").write_text("Idx\tName\n1\ta\n2\tb\n", encoding="utf-16")
    (tmp_path / "annotations" / "list.txt").write_text("no image")
    sets = [open_scenes(str(tmp_path), split, classes=2) for split in ("train", "val")]
    assert [len(s) for s in sets] == [3, 3]
    assert sets[0].classes == ["a", "b"]
    assert all(image.shape[1:] == labels.shape for image, labels in sets[0])
    line, = said(capsys, *sets)
    assert "1 annotations without an image (annotations/training/lonely.png)" in line
    assert "1 outside the folders that are read (annotations/list.txt)" in line
