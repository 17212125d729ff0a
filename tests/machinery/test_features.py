"""Features computed once: what is in the file, when it is read, when it is computed again."""
import os
import pickle
import shutil
import types

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms.v2 import functional as VF

from conftest import ROOT, stage
from support import data, features, teachers, transforms
from support.features import WithCrops, cache_features, store_features
from support.files import UserError
from support.images import Folder
from support.process import Process
from support.shapes import Shapes
from support.teachers import HogTeacher, build_teacher

ALONE = Process()


def shapes(split="train", size=24, **options):
    return Shapes(split, transforms.EvalTransform(size), **dict(dict(limit=10), **options))


def cache(folder, teacher=None, dataset=None, flip=True, process=ALONE, **options):
    teacher = teacher or build_teacher("hog+pixel", (3, 3), 8, "cpu")
    options = dict(dict(batch_size=4), **options)
    return cache_features(teacher, dataset or shapes(), folder, process, flip=flip, **options)


def as_batch(image):
    return image[None].float() / 255


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory):
    """A tiny random ViT of timm, as a file."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(2)
    model = timm.create_model("test_vit", num_classes=7)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    file = str(tmp_path_factory.mktemp("timm") / "test_vit.pt")
    torch.save(model.state_dict(), file)
    return file


# --- a teacher's features beside the images -------------------------------------------------------
def test_cached_features_are_the_teachers_for_the_image_and_for_its_mirror_image(tmp_path, capsys):
    teacher = build_teacher("hog+pixel", (3, 3), 8, "cpu")
    dataset = shapes()
    cached = cache(tmp_path)
    said = capsys.readouterr().out
    assert "10 x 2 x 9 x 336 numbers" in said and " GB" in said and "no random crops" in said
    turned = {False: 0, True: 0}
    for key in [(epoch, i) for epoch in range(3) for i in range(10)]:
        (image, t), label = cached[key]
        whole, same_label = dataset[key]
        mirrored = torch.equal(image, whole.flip(-1))
        assert (mirrored or torch.equal(image, whole)) and label == same_label
        assert image.dtype == torch.uint8
        expected = teacher(as_batch(image))[0]
        assert t.shape == (9, 336) and t.dtype == torch.float16 and torch.equal(t, expected.half())
        turned[mirrored] += 1
        again = cached[key]                                  # a function of (seed, epoch, index)
        assert torch.equal(again[0][0], image) and torch.equal(again[0][1], t)
    assert min(turned.values()) >= 6                         # a fair coin: 15 of 30 expected
    first = [cached[(epoch, 0)][0][0] for epoch in range(8)]         # tossed again every epoch
    assert any(not torch.equal(image, first[0]) for image in first)

    val = cache(tmp_path, dataset=shapes("val"), flip=False)
    assert "crops" not in capsys.readouterr().out
    assert val.file.shape == (10, 1, 9, 336) and len(val) == 10
    assert val.seed == 0 and val.labels is val.dataset.labels
    assert all(torch.equal(val[(e, 3)][0][0], val.dataset[3][0]) for e in range(8))


def count_calls(monkeypatch):
    """-> a list that grows by the batch size with every call of a timm teacher."""
    calls = []
    forward = teachers.TimmTeacher.__call__

    def counted(self, images):
        calls.append(len(images))
        return forward(self, images)
    monkeypatch.setattr(teachers.TimmTeacher, "__call__", counted)
    return calls


def test_a_second_run_reads_the_file_and_asks_the_teacher_about_one_image(
        tmp_path, vit_file, monkeypatch):
    teacher = build_teacher(f"timm:test_vit@{vit_file}", (3, 3), 8, "cpu")
    calls = count_calls(monkeypatch)
    first = cache(tmp_path, teacher)
    assert calls == [1, 1, 4, 4, 4, 4, 2, 2]                 # every batch and its mirror image
    second = cache(tmp_path, teacher)
    assert calls[8:] == [1, 1]                               # is the teacher still the same?
    assert second.file.path == first.file.path
    assert np.array_equal(second.file.table(), first.file.table())
    assert list(tmp_path.iterdir()) == [first.file.path]     # nothing temporary is left


def test_whatever_changes_the_features_asks_for_another_file(tmp_path, vit_file, monkeypatch):
    folder = tmp_path / "images"
    (folder / "val").mkdir(parents=True)
    for i in range(3):
        VF.to_pil_image(shapes().image(i)).save(folder / "val" / f"{i}.png")

    def pictures():
        return Folder(str(folder), "val", transforms.EvalTransform(24), labelled=False)

    def name_of(**change):
        options = dict(teacher=build_teacher("hog", (3, 3), 8, "cpu"), dataset=shapes()) | change
        return cache(tmp_path / "cache", **options).file.path.stem

    vit = build_teacher(f"timm:test_vit@{vit_file}", (3, 3), 8, "cpu")
    copied = shutil.copy(vit_file, tmp_path)
    variants = dict(
        teacher=dict(teacher=build_teacher("pixel", (3, 3), 8, "cpu")),
        network=dict(teacher=vit),
        several=dict(teacher=build_teacher("hog+pixel", (3, 3), 8, "cpu")),
        patch=dict(teacher=build_teacher("hog", (6, 6), 4, "cpu")),
        grid=dict(teacher=build_teacher("hog", (6, 6), 8, "cpu"), dataset=shapes(size=48)),
        file=dict(teacher=build_teacher(f"timm:test_vit@{copied}", (3, 3), 8, "cpu")),
        split=dict(dataset=shapes("val")),
        limit=dict(dataset=shapes(limit=20)),
        flip=dict(flip=False),
        rotation=dict(dataset=shapes(max_rotation=180)),
        folder=dict(dataset=pictures()),
        amp=dict(process=Process(amp="bf16")))
    names = {key: name_of(**change) for key, change in variants.items()}
    names["same"] = name_of()
    hashes = {name.rpartition("-")[2] for name in names.values()}
    assert len(hashes) == len(variants) + 1                  # they differ by their hash alone
    # The same again is the same, the seed of the run changes nothing, names begin readably.
    assert name_of(dataset=shapes(seed=5)) == names["same"]
    assert names["same"].startswith("hog-shapes-train-24px-")
    assert names["several"].startswith("hog+pixel-")
    assert names["folder"].startswith("hog-images-val-24px-")

    # One other weight under the same name.
    state = torch.load(vit_file)
    state["blocks.1.mlp.fc2.weight"][3, 5] += 1e-3
    torch.save(state, copied)
    other = build_teacher(f"timm:test_vit@{copied}", (3, 3), 8, "cpu")
    assert name_of(teacher=other) != names["file"]
    # A picture with another date.
    os.utime(folder / "val" / "1.png", (1, 1))
    assert name_of(dataset=pictures()) != names["folder"]
    # A teacher whose code has changed.
    plain = HogTeacher.__call__
    monkeypatch.setattr(HogTeacher, "__call__", lambda self, images: 1.1 * plain(self, images))
    assert name_of() != names["same"]


def test_a_killed_run_leaves_nothing_that_counts_as_finished(tmp_path, monkeypatch):
    plain = teachers.SideBySide.__call__

    def dies(self, images):
        if len(images) > 1:                                  # after the first image
            raise KeyboardInterrupt
        return plain(self, images)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(teachers.SideBySide, "__call__", dies)
        cache(tmp_path)
    assert [p.suffix for p in tmp_path.iterdir()] == [".tmp"]
    (image, t), _ = cache(tmp_path)[0]
    expected = build_teacher("hog+pixel", (3, 3), 8, "cpu")(as_batch(image))[0]
    assert torch.equal(t, expected.half())


def test_a_damaged_file_is_a_sentence_that_says_what_to_delete(tmp_path):
    path = cache(tmp_path).file.path
    whole = path.read_bytes()
    np.save(tmp_path / "other.npy", np.zeros((2, 3), np.float16))
    other = (tmp_path / "other.npy").read_bytes()
    for damaged in (whole[:-100], whole[:20], b"", b"no array", other):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"hog\+pixel-shapes.*damaged.*delete it") as error:
            cache(tmp_path)
        assert "\n" not in str(error.value)


def test_a_full_disk_a_wrong_folder_and_random_crops_are_refused_before_the_work_begins(
        tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot write there"):
        cache(tmp_path / "file")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1000))
        with pytest.raises(UserError, match=r"--cache-teacher .* 10 x 2 x 9 x 336 numbers take "
                                            r"0\.000121 GB and 1e-06 GB are free"):
            cache(tmp_path)
    with pytest.raises(ValueError, match="EvalTransform"):
        cache(tmp_path, dataset=Shapes("train", transforms.VQKDTransform(24), limit=10))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_fills_up_on_the_way_is_a_sentence_too(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(features.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*\.tmp .*No space.*free some space"):
        cache(tmp_path)
    assert [p.suffix for p in tmp_path.iterdir()] == [".tmp"]


def test_features_that_float16_cannot_hold_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(teachers.SideBySide, "__call__",
                        lambda self, images: torch.full((len(images), 9, 336), 1e5))
    with pytest.raises(UserError, match="beyond what float16 can hold"):
        cache(tmp_path)


def test_a_worker_maps_the_file_itself_and_sees_the_same(tmp_path):
    cached = cache(tmp_path)
    copy = pickle.loads(pickle.dumps(cached))
    # Images and features stay out of what is sent to a worker.
    assert len(pickle.dumps(cached)) < 20_000 < cached.file.table().nbytes
    for key in ((0, 1), (4, 7)):
        pairs = zip(cached[key][0], copy[key][0], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    (images, t), labels = next(iter(data.make_loader(copy, [[(0, 1), (0, 2)]], 0, "cpu")))
    assert images.shape == (2, 3, 24, 24) and len(labels) == 2
    assert t.shape == (2, 9, 336) and t.dtype == torch.float16


# --- features for a probe -------------------------------------------------------------------------
def test_rows_of_the_file_are_the_images_in_order_each_followed_by_its_crops(tmp_path):
    dataset = shapes()
    file = store_features(tmp_path, "--cache", "pixels", lambda images: images.flatten(1),
                          WithCrops(dataset, 2), ALONE, dtype="float32", batch_size=4)
    assert file.shape == (30, 3 * 24 * 24) and file.dtype == "float32"
    crops = shapes()
    crops.transform = transforms.VQKDTransform(24)
    for index in (0, 7):
        expected = [dataset[index][0], crops[(0, index)][0], crops[(1, index)][0]]
        expected = torch.stack(expected).flatten(1).float() / 255
        assert torch.equal(file[index * 3:index * 3 + 3], expected)
        assert not torch.equal(expected[1], expected[2])


def test_rows_come_by_slice_by_index_or_by_column_as_copies_in_memory(tmp_path):
    file = store_features(tmp_path, "--cache", "pixels", lambda images: images.flatten(2),
                          shapes(), ALONE, dtype="float32")
    whole = torch.from_numpy(np.array(file.table()))
    rows = torch.tensor([7, 0, 7])
    assert torch.equal(file[rows], whole[rows])
    assert torch.equal(file[2:5], whole[2:5])
    assert torch.equal(file[:, 1, 3:9], whole[:, 1, 3:9])
    file[rows].zero_()                                       # the file itself cannot be changed
    assert torch.equal(file[rows], whole[rows])


def test_crops_belong_to_the_seed_of_the_run_and_whole_images_do_not(tmp_path):
    def path_of(seed, augment):
        dataset = WithCrops(shapes(seed=seed), augment)
        return store_features(tmp_path, "--cache", "pixels", lambda images: images.flatten(1),
                              dataset, ALONE).path
    assert path_of(0, 0) == path_of(5, 0)
    assert len({path_of(0, 0), path_of(0, 1), path_of(0, 2), path_of(5, 1)}) == 4


# --- several processes ----------------------------------------------------------------------------
BUILD = """
import sys
sys.path[:0] = [sys.argv[1]]
from support import process, teachers, transforms
from support.features import cache_features
from support.shapes import Shapes
def build():
    here = process.join_processes("cpu")
    teacher = teachers.build_teacher("hog+pixel", (3, 3), 8, "cpu")
    dataset = Shapes("train", transforms.EvalTransform(24), limit=11)
    cached = cache_features(teacher, dataset, sys.argv[2], here, flip=True, batch_size=2)
    open(f"{sys.argv[2]}.{here.rank}", "wb").write(cached.file.table().tobytes())
process.launch(build)
"""


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(tmp_path):
    (tmp_path / "build.py").write_text(BUILD)
    done = stage(tmp_path / "build.py", ROOT, tmp_path / "two", processes=2)
    assert done.stdout.count("computing features once") == 1
    one = cache(tmp_path / "one", dataset=shapes(limit=11)).file
    (two,) = (tmp_path / "two").iterdir()
    assert two.name == one.path.name and two.read_bytes() == one.path.read_bytes()
    for rank in (0, 1):
        assert (tmp_path / f"two.{rank}").read_bytes() == one.table().tobytes()
