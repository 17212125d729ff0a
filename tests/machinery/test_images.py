"""Pictures and folders of strangers: each odd one is read by one rule or refused in a sentence."""
import hashlib
import os
import pickle
import struct
import warnings
import zlib
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import ODD_NAMES, fill, noise, photo, save, sentence
from PIL import Image, ImageFile
from torch._utils import ExceptionWrapper
from torchvision import datasets

import segment
import vqkd
from model import ViT
from support import data, transforms
from support.files import UserError
from support.find import IMAGE_ENDINGS, find_images
from support.images import (
    Folder, Photo, open_class_folders, open_images, open_photo, read_image, shown)
from support.labels import columns_of
from support.process import launch
from support.scenes import SegmentTransform, open_scenes, read_numbers


# --- one rule for all pictures --------------------------------------------------------------------
def sixteen_bits(path, pixels, kind):
    """A PNG of 16 bits a channel, which Pillow does not write.

    pixels (H, W, C); kind 0 grey, 2 RGB, 4 grey and alpha
    """
    def chunk(name, contents):
        check = struct.pack(">I", zlib.crc32(name + contents))
        return struct.pack(">I", len(contents)) + name + contents + check

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def full(mode, colour, **options):
    return lambda path: save(path, Image.new(mode, (4, 4), colour), **options)


def deep(kind, *levels):
    return lambda path: sixteen_bits(path, np.full((4, 4, len(levels)), levels), kind)


def grey_tif(path):
    save(path, Image.fromarray(np.full((4, 4), 57344, np.uint16)))


def ten_bits(path):
    path.write_bytes(b"P5 4 4 1023\n" + np.full((4, 4), 1023, ">u2").tobytes())


def palette(path):
    save(path, Image.new("RGB", (4, 4), "red").quantize(4))


def animated(path):
    red = Image.new("RGB", (4, 4), "red")
    save(path, Image.new("RGB", (4, 4), (0, 255, 0)), save_all=True, append_images=[red])


@pytest.mark.parametrize("name, make, pixel", [
    ("grey.png", full("L", 77), [77, 77, 77]),
    ("bits.png", full("1", 1), [255, 255, 255]),
    ("grey16.png", deep(0, 57344), [223, 223, 223]),                     # 223.1 of 255
    ("grey16.tif", grey_tif, [223, 223, 223]),
    ("grey10.pgm", ten_bits, [255, 255, 255]),
    ("rgb16.png", deep(2, 57344, 0, 65535), [224, 0, 255]),              # high bytes
    ("clear16.png", deep(4, 9, 0), [255, 255, 255]),
    ("clear.png", full("RGBA", (200, 0, 0, 0)), [255, 255, 255]),        # not the hidden colour
    ("half.png", full("RGBA", (0, 0, 0, 127)), [128, 128, 128]),         # laid over white
    ("greyclear.png", full("LA", (9, 0)), [255, 255, 255]),
    ("keyed.png", full("RGB", (9, 8, 7), transparency=(9, 8, 7)), [255, 255, 255]),
    ("palette.png", palette, [255, 0, 0]),
    ("palette.gif", full("P", 0), [0, 0, 0]),
    ("animated.gif", animated, [0, 255, 0]),
    ("animated.webp", animated, [0, 255, 0]),
    ("cmyk.jpg", full("CMYK", (0, 255, 255, 0)), [254, 0, 0]),
    ("cmyk.tif", full("CMYK", (0, 255, 255, 0)), [255, 0, 0]),
    ("really a gif.jpg", full("RGB", "red", format="gif"), [255, 0, 0])])
def test_an_image_of_any_kind_is_read_by_the_stated_rule(tmp_path, name, make, pixel):
    make(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.shape == (3, 4, 4) and image.dtype == torch.uint8
    assert image.permute(1, 2, 0).is_contiguous()
    tolerance = 3 if name.endswith((".jpg", ".webp")) else 0             # they compress with loss
    difference = image.flatten(1).int() - torch.tensor(pixel)[:, None]
    assert difference.abs().max() <= tolerance


def test_pixels_keep_their_places_in_sixteen_bits_transparency_and_a_turned_photograph(tmp_path):
    gradient = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    save(tmp_path / "sixteen.png", Image.fromarray(gradient))
    clear = np.zeros((8, 8, 4), np.uint8)                    # transparent, a colour hidden below
    clear[..., 0] = 200
    clear[:4, :, 3] = 255
    save(tmp_path / "alpha.png", Image.fromarray(clear))
    turned = Image.Exif()
    turned[0x0112] = 6                                       # camera upright: turn right by 90
    red_left = np.zeros((8, 16, 3), np.uint8)
    red_left[:, :8, 0] = 255
    save(tmp_path / "upright.jpg", Image.fromarray(red_left), exif=turned, quality=100,
         subsampling=0)

    def pixel(name, y, x):
        return read_image(tmp_path / name)[:, y, x].tolist()

    assert pixel("sixteen.png", 7, 0) == [223] * 3           # 57344 of 65535 is 223.1 of 255
    assert pixel("sixteen.png", 0, 0) == [0] * 3
    assert pixel("alpha.png", 0, 0) == [200, 0, 0] and pixel("alpha.png", 7, 0) == [255] * 3
    assert read_image(tmp_path / "upright.jpg").shape == (3, 16, 8)
    assert np.allclose(pixel("upright.jpg", 2, 4), [255, 0, 0], atol=8)  # the left is now on top


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_exif_orientation_ends_upright(tmp_path, turn):
    upright = np.zeros((8, 16, 3), np.uint8)                 # three colours, a quarter is black
    upright[:4, :8], upright[:4, 8:], upright[4:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    undo = [None, lambda x: x, np.fliplr, lambda x: x[::-1, ::-1], np.flipud,
            lambda x: x.swapaxes(0, 1), np.rot90, lambda x: x[::-1, ::-1].swapaxes(0, 1),
            lambda x: np.rot90(x, -1)]
    stored = np.ascontiguousarray(undo[turn](upright))
    note = Image.Exif()
    note[0x0112] = turn
    save(tmp_path / "a.png", Image.fromarray(stored), exif=note)
    assert (read_image(tmp_path / "a.png").permute(1, 2, 0).numpy() == upright).all()


def bands(path, channels, kind=np.uint8, extra=0, alpha=0):
    """An uncompressed TIFF 4 x 4; of the channels `extra` are not named, `alpha` is a mask."""
    size = np.dtype(kind).itemsize
    pixels = np.full((4, 4, channels), 100, kind).tobytes()
    words = [(258, [8 * size] * channels), (338, [0] * extra + [2] * alpha)]
    tags = {256: 4, 257: 4, 259: 1, 262: 1 + (channels > 2), 277: channels, 278: 4,
            279: len(pixels)}
    long = {tag: np.array(values, "<u2").tobytes() for tag, values in words if values}
    start = 8 + 2 + 12 * (len(tags) + len(long) + 1) + 4
    entries, behind = [], b""
    for tag, contents in long.items():
        value = contents.ljust(4, b"\0")
        if len(contents) > 4:
            value = struct.pack("<I", start + len(behind))
            behind += contents
        entries.append((tag, struct.pack("<HHI", tag, 3, len(contents) // 2) + value))
    tags[273] = start + len(behind)
    entries += [(tag, struct.pack("<HHII", tag, 4, 1, value)) for tag, value in tags.items()]
    table = b"".join(entry for _, entry in sorted(entries))
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4)
                     + behind + pixels)
    return path


@pytest.mark.parametrize("channels, options, says", [
    (4, dict(extra=1), "it has 4 channels, networks here read three: choose three"),
    (6, dict(extra=3), "it has 6 channels"),
    (5, dict(extra=1, alpha=1), "other channels than grey or RGB"),
    (13, dict(extra=10, kind=np.uint16), "other channels than grey or RGB"),
    (2, dict(extra=1), "it has 2 channels")])
def test_a_picture_of_other_channels_is_one_sentence(tmp_path, channels, options, says):
    assert says in sentence(read_image, bands(tmp_path / "scene.tif", channels, **options))


@pytest.mark.parametrize("channels, options", [(1, {}), (3, {}), (4, dict(alpha=1))])
def test_a_tiff_of_grey_or_rgb_is_read_with_a_mask_or_without(tmp_path, channels, options):
    assert read_image(bands(tmp_path / "scene.tif", channels, **options)).shape == (3, 4, 4)


def test_sixteen_bits_of_which_twelve_are_used_are_one_sentence(tmp_path):
    for highest in (4095, 4096):
        save(tmp_path / f"{highest}.png", Image.fromarray(np.full((4, 4), highest, np.uint16)))
    assert "reach only 4095 of 65535: scale" in sentence(read_image, tmp_path / "4095.png")
    assert (read_image(tmp_path / "4096.png") == 16).all()


def test_a_damaged_exif_note_costs_neither_the_image_nor_a_warning(tmp_path):
    image, note = noise(), Image.Exif()
    note[0x0112], note[0x010F] = 3, "a camera"               # taken upside down
    image.save(tmp_path / "plain.jpg")
    want = read_image(tmp_path / "plain.jpg")
    text_as_height = note.tobytes().replace(b"\x01\x0f", b"\x01\x01")
    cases = [(text_as_height, want.flip(1, 2)), (note.tobytes()[:30], want),
             (b"Exif\0\0no note at all", want)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for raw, right in cases:
            image.save(tmp_path / "a.jpg", exif=raw)
            assert torch.equal(read_image(tmp_path / "a.jpg"), right)


@pytest.mark.parametrize("height, width", [(61, 90), (64, 96), (17, 9), (1, 1)])
@pytest.mark.parametrize("mode, options", [
    ("RGB", dict(subsampling=0)), ("RGB", dict(subsampling=2)), ("RGB", dict(progressive=True)),
    ("L", {}), ("CMYK", {}), ("RGB", dict(turn=6)), ("RGB", dict(turn=3)), ("RGB", dict(turn=7))])
def test_a_photo_knows_its_size_and_comes_at_a_fraction_of_it(
        tmp_path, mode, options, height, width):
    note = Image.Exif()
    note[0x0112] = options.get("turn", 1)
    image = Image.fromarray(photo(height, width).permute(1, 2, 0).numpy()).convert(mode)
    path = save(tmp_path / "a.jpg", image, quality=95, exif=note, **options)
    whole = read_image(path).float()
    for s in (1, 2, 4, 8):
        opened = open_photo(path)
        assert opened.shape == whole.shape
        small = opened.decode(s)
        means = F.avg_pool2d(whole, s, ceil_mode=True)
        assert small.shape == means.shape and small.dtype == torch.uint8
        if height == 64:                     # the coarse pixels of 61 x 90 may begin elsewhere
            assert (small - means).abs().mean() < 1.5


def test_only_a_jpeg_waits_to_be_decoded(tmp_path):
    png = save(tmp_path / "a.png", noise())
    named_wrongly = save(tmp_path / "b.jpg", noise(), format="png")
    for path in (png, named_wrongly):
        assert torch.equal(open_photo(path), read_image(path))
    opened = open_photo(save(tmp_path / "c.jpg", noise()))
    assert torch.equal(opened.decode(), read_image(tmp_path / "c.jpg"))
    seen = []
    for transform in (seen.append, None):
        image, _ = Folder(str(tmp_path / "c.jpg"), None, transform, labelled=False)[0]
    assert type(seen[0]) is Photo and torch.is_tensor(image)


@pytest.mark.parametrize("value, kind, words", [
    (np.nan, np.float32, "floating-point"), (np.inf, np.float32, "floating-point"),
    (0.5, np.float32, "floating-point"), (70_000, np.int32, "32-bit"), (-1, np.int32, "32-bit")])
def test_pixels_of_unknown_range_are_refused_so_that_none_is_infinite_or_nan(
        tmp_path, value, kind, words):
    save(tmp_path / "a.tif", Image.fromarray(np.full((4, 4), value, kind)))
    assert words in sentence(read_image, tmp_path / "a.tif")


# --- pictures that cannot be read -----------------------------------------------------------------
@pytest.mark.parametrize("ending",
                         [e for e in IMAGE_ENDINGS if e not in (".jpeg", ".tiff", ".pgm")])
@pytest.mark.parametrize("share", [0, 0.3, 0.7, 0.97])
def test_a_truncated_image_is_one_sentence_in_a_full_and_in_a_quick_look(tmp_path, ending, share):
    path = save(tmp_path / f"cut{ending}", noise(64, 64))
    contents = path.read_bytes()
    path.write_bytes(contents[:int(share * len(contents))])
    for s in (1, 8):
        text = sentence(read_image, path, s=s)
        assert text.startswith(f"cannot read the image {path} (")
        assert text.endswith("remove it or replace it")


@pytest.mark.parametrize("make", [
    lambda p: p.write_text("this is no picture"), lambda p: p.symlink_to(p.parent / "nowhere"),
    lambda p: p.mkdir(), lambda p: p.symlink_to(p),
    lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    lambda p: Image.new("L", (4, 4)).save(p, format="ico")],
    ids="text, dangling link, folder, link to itself, program for a printer, icon".split(", "))
def test_what_is_no_picture_behind_an_images_ending_is_one_sentence(tmp_path, make):
    make(tmp_path / "x.jpg")
    assert "x.jpg" in sentence(read_image, tmp_path / "x.jpg")


def test_an_image_without_permission_is_one_sentence(tmp_path, monkeypatch):
    path = save(tmp_path / "x.png", noise())
    path.chmod(0)
    if os.geteuid() == 0:                                    # nothing is forbidden to root
        refusal = PermissionError(13, "Permission denied")
        monkeypatch.setattr(Image, "open", mock.Mock(side_effect=refusal))
    assert "x.png ([Errno 13] Permission denied" in sentence(read_image, path)


def test_an_unreadable_image_is_named_with_the_remedy_also_from_a_worker(tmp_path):
    broken = fill(tmp_path) / "train" / "dog" / "broken.jpg"
    broken.write_bytes(b"this is no picture")
    dataset = data.open_data(str(tmp_path), "train", transforms.EvalTransform(8))
    batches = data.eval_batches(len(dataset), 4)
    with pytest.raises(UserError, match="broken.jpg.*remove it"):
        list(data.make_loader(dataset, batches, 0, "cpu"))
    with pytest.raises(UserError) as caught:
        list(data.make_loader(dataset, batches, 1, "cpu"))
    assert "broken.jpg" in str(caught.value).splitlines()[-1]            # the sentence comes last
    save(broken, Image.fromarray(photo(64, 64).permute(1, 2, 0).numpy()))
    broken.write_bytes(broken.read_bytes()[:800])            # cut off half-way
    with pytest.raises(UserError, match="broken.jpg"):
        read_image(broken)
    for s in (1, 2, 4, 8):
        with pytest.raises(UserError, match="broken.jpg"):
            open_photo(broken).decode(s)


# --- extreme sizes --------------------------------------------------------------------------------
@pytest.mark.parametrize("side", [10_000, 20_000])           # Pillow warns, Pillow refuses
def test_a_file_that_unpacks_to_too_many_pixels_is_refused_before_it_takes_the_memory(
        tmp_path, monkeypatch, side):
    path = save(tmp_path / "bomb.png", Image.new("1", (side, side)))
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(ImageFile.ImageFile, "load",
                        lambda image: pytest.fail("it is being unpacked"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for read in (read_image, read_numbers):
            assert "bomb.png (Image size" in sentence(read, path)


@pytest.mark.parametrize("height, width", [(1, 1), (3, 2), (10, 20_000)])
def test_a_scene_of_any_size_can_be_trained_on_and_predicted(height, width):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    labels = torch.zeros(height, width, dtype=torch.uint8)
    out, target = SegmentTransform(48)(image, labels)
    assert out.shape == (3, 48, 48) and target.shape == (48, 48)
    model = segment.UPerNet(ViT(48, 8, 24, 4, 3), 5, channels=8).eval()
    with torch.no_grad():
        p = torch.cat(list(segment.predict(model, image[None] / 255)), dim=2)
    assert p.shape == (1, 5, height, width)


def test_a_long_image_is_read_whole_and_an_image_smaller_than_a_patch_is_encoded(tmp_path):
    save(tmp_path / "long.png", Image.new("RGB", (20_000, 30), (1, 2, 3)))
    assert read_image(tmp_path / "long.png").shape == (3, 30, 20_000)
    save(tmp_path / "dot.png", Image.new("RGB", (1, 1), (1, 2, 3)))
    dataset = open_images(tmp_path, transforms.EvalTransform(48))
    images = torch.stack([dataset[i][0] for i in range(2)])
    ids = vqkd.build(vqkd.parse_args([]), [144]).encode(images / 255)
    assert ids.shape == (2, 36)


# --- folders --------------------------------------------------------------------------------------
@pytest.fixture
def tree(tmp_path):
    """train/ and val/ with two classes whose names hold a space and an umlaut.

    Colours tell the files apart.
    """
    root = tmp_path / "my images"
    for split, n in (("train", 4), ("val", 2)):
        for k, name in enumerate(("große Katze", "dog")):
            folder = root / split / name
            for i in range(n):
                save(folder / f"bild {i} ü.png", Image.new("RGB", (20, 10), (k * 100, i * 10, 7)))
            (folder / "notes.txt").write_text("no image")
            (folder / "._bild.png").write_text("what a Mac leaves behind")
    return root


def test_a_folder_of_classes_gives_images_and_labels(tree):
    train = data.open_data(str(tree), "train")
    assert train.classes == ["dog", "große Katze"] and len(train) == 8
    assert train.labels.tolist() == [0] * 4 + [1] * 4
    image, label = train[1]
    assert image.shape == (3, 10, 20) and label == 0
    assert image[:, 0, 0].tolist() == [100, 10, 7]
    assert len(data.open_data(str(tree), "val")) == 4
    few = data.open_data(str(tree), "train", limit=2)
    assert few.labels.tolist() == [0, 1]                     # a limit takes from all classes
    assert pickle.loads(pickle.dumps(train))[1][0].equal(image)


def test_without_labels_a_folder_may_have_any_depth(tree, tmp_path):
    assert len(data.open_data(str(tree), "train", labelled=False)) == 8
    assert len(data.open_data(str(tree), "val", labelled=False)) == 4
    one = data.open_data(str(tree), "train", labelled=False)
    assert one[0][1] == -1 and one.labels is None and one.classes is None
    flat = tmp_path / "flat"
    for i in range(41):
        folder = flat / ("a" if i < 20 else "b/c")
        save(folder / f"{i:02d}.JPG", Image.new("RGB", (8, 8)), format="jpeg")
    train, val, again = (data.open_data(str(flat), split, labelled=False)
                         for split in ("train", "val", "val"))
    assert len(val) == 3 and len(train) == 38
    assert not set(train.names) & set(val.names) and again.names == val.names


def test_without_a_val_folder_a_share_of_train_is_held_out(tmp_path):
    for i in range(3):
        save(tmp_path / "train" / "a" / f"{i}.png", Image.new("RGB", (8, 8)))
    save(tmp_path / "elsewhere.png", Image.new("RGB", (8, 8)))
    train, val = (data.open_data(str(tmp_path), split, labelled=False)
                  for split in ("train", "val"))
    assert len(train) == 2 and len(val) == 1
    assert all("train" in name for name in train.names + val.names)


def test_one_image_or_a_folder_can_be_opened_for_looking(tree):
    assert len(open_images(tree)) == 12
    assert open_images(tree).names == sorted(open_images(tree).names)
    one = open_images(tree / "val" / "dog" / "bild 0 ü.png", transforms.EvalTransform(16))
    assert len(one) == 1 and one[0][0].shape == (3, 16, 16) and one[0][1] == -1


def test_folders_that_cannot_be_used_say_what_is_missing(tree, tmp_path):
    def message(path, split="train", **options):
        return sentence(data.open_data, str(path), split, **options)

    nowhere = message(tmp_path / "nowhere")
    assert "no such folder" in nowhere and "shapes" in nowhere
    (tmp_path / "empty").mkdir()
    assert "train/CLASS/*" in message(tmp_path / "empty")
    assert "no image for train" in message(tmp_path / "empty", labelled=False)
    assert "holds no image" in sentence(open_images, tmp_path / "empty")
    save(tmp_path / "single" / "one.png", Image.new("RGB", (8, 8)))
    assert "2 or more" in message(tmp_path / "single", labelled=False)
    (tree / "train" / "bird").mkdir()
    assert "bird" in message(tree)                           # val has no such class
    (tree / "val" / "bird").mkdir()
    assert "holds no image" in message(tree) and "bird" in message(tree, "val")
    assert "--limit 0" in message("shapes", limit=0)


def test_a_folder_is_walked_into_whatever_its_name_and_other_files_are_passed_over(tmp_path):
    save(tmp_path / "a" / "x.jpg" / "1.PNG", noise())        # a folder called x.jpg
    save(tmp_path / "a" / "again" / "1.PNG", noise())        # the same name twice is two images
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
    unlabelled = data.open_data(str(tmp_path), "val", labelled=False)
    assert len(unlabelled) == 7                              # no labels, no classes


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


# --- odd names ------------------------------------------------------------------------------------
@pytest.mark.parametrize("odd", ODD_NAMES, ids=ascii)
def test_names_may_hold_anything_and_an_error_about_them_is_one_line(tmp_path, odd, capsys):
    root = fill(tmp_path / odd, (odd, "plain"), each=2)
    train = data.open_data(str(root), "train")
    assert train.classes == sorted([odd, "plain"]) and train.labels.tolist() == [0, 0, 1, 1]
    assert len(open_class_folders(str(root / "val"))) == 4
    broken = root / "train" / odd / f"{odd}.png"
    broken.write_bytes(b"")
    broken_train = data.open_data(str(root), "train", transforms.EvalTransform(16), labelled=False)

    def main():
        try:
            [broken_train[i] for i in range(len(broken_train))]
        except UserError:                    # as it arrives from a worker, with its traceback
            ExceptionWrapper(where="in DataLoader worker process 0").reraise()

    with pytest.raises(SystemExit) as caught:
        launch(main)
    line, = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert line.startswith("error: cannot read the image ") and "remove it" in line
    assert shown(f"{odd}.png (") in line
    for call in (lambda: data.open_data(str(broken), "train"),
                 lambda: open_scenes(str(broken), "train"),
                 lambda: open_class_folders(str(broken.parent)),
                 lambda: data.open_data(str(root / "val"), "val"),
                 lambda: columns_of(train, ["plain"], "x.pt")):
        assert shown(odd) in sentence(call)


def test_ordinary_names_are_shown_as_they_are():
    for name in ("a b/ü'\"🐈.png", "C:\\pictures\\x.png"):
        assert shown(name) == name
    assert shown("a\nb") == "a\\nb" and shown(os.fsdecode(b"\xff")) == "\\udcff"
    assert shown("M\udcc3\udcbcnze") == "Münze"              # as it is read in another locale
    assert shown("\ud800") == "\\ud800"


# --- CIFAR ----------------------------------------------------------------------------------------
CIFAR = [("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)]


def write_cifar(monkeypatch, root, kind, n=20):
    """Small files in the layout of the true ones, which were not at hand.

    Pickles of {data (n, 3072), labels}, a row red, then green, then blue. torchvision checks md5
    sums, so it is told those of the files written here.
    """
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    key = "labels" if kind is datasets.CIFAR10 else "fine_labels"
    classes = 10 if kind is datasets.CIFAR10 else 100
    rows = {}

    def write(name, contents):
        (folder / name).write_bytes(pickle.dumps(contents, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for listed in ("train_list", "test_list"):
        sums = []
        for name, _ in getattr(kind, listed):
            pixels = generator.integers(0, 256, (n, 3072), dtype=np.uint8)
            labels = generator.integers(0, classes, n).tolist()
            rows.setdefault(listed, []).append((pixels, labels))
            sums.append([name, write(name, {"data": pixels, key: labels})])
        monkeypatch.setattr(kind, listed, sums)
    names = {kind.meta["key"]: [f"class {i}" for i in range(classes)]}
    checksum = write(kind.meta["filename"], names)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": checksum})
    return rows


@pytest.mark.parametrize("name, kind", CIFAR)
def test_cifar_is_read_from_torchvisions_python_files(monkeypatch, tmp_path, name, kind):
    rows = write_cifar(monkeypatch, tmp_path, kind)
    train = data.open_data(name, "train", data_dir=str(tmp_path))
    val = data.open_data(name, "val", data_dir=str(tmp_path), limit=7)
    assert len(train) == 20 * len(rows["train_list"]) and len(val) == 7
    assert len(train.classes) == len(val.classes)
    assert train.name == name and train.labels.dtype == torch.int64
    pixels, labels = rows["train_list"][0]
    image, label = train[3]
    assert torch.equal(image, torch.from_numpy(pixels[3].reshape(3, 32, 32)))
    assert label == labels[3]
    pickled = pickle.dumps(train)
    assert len(pickled) < 20_000 and torch.equal(pickle.loads(pickled)[3][0], image)


@pytest.mark.parametrize("name, kind", CIFAR)
def test_cifar_with_another_checksum_than_the_published_one_is_refused(
        monkeypatch, tmp_path, name, kind):
    write_cifar(monkeypatch, tmp_path, kind)
    data.open_data(name, "train", data_dir=str(tmp_path))
    path = tmp_path / kind.base_folder / kind.train_list[0][0]
    contents = bytearray(path.read_bytes())
    contents[1000] ^= 1                                      # one pixel a little different
    path.write_bytes(contents)
    with pytest.raises(UserError, match=f"{name} is not in .*, or not complete .*--download"):
        data.open_data(name, "train", data_dir=str(tmp_path))


def test_missing_cifar_says_how_to_get_it(tmp_path):
    with pytest.raises(UserError, match="--download.*cifar-10-python.tar.gz.*--data-dir"):
        data.open_data("cifar10", "train", data_dir=str(tmp_path))
