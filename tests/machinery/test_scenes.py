"""Images with labels for every pixel: augmentation, folders in ADE20K's layout, built-in shapes."""
import colorsys

import numpy as np
import pytest
import torch
from PIL import Image

from model import IMAGENET_MEAN, imagenet_normalize
from support import data
from support.files import UserError
from support.process import seed_all
from support.scenes import (
    IGNORE, SegmentTransform, class_table, distort, draw_scenes, fit_size, is_varied, open_scenes,
    read_numbers, saturate, to_labels)


@pytest.fixture
def scenes(tmp_path):
    """A folder in ADE20K's layout: 8 training and 3 validation images of several sizes."""
    for split, count in (("training", 8), ("validation", 3)):
        for kind in ("images", "annotations"):
            (tmp_path / "ade" / kind / split).mkdir(parents=True)
        for i in range(count):
            labels = np.zeros((40 + 9 * i, 90 - 7 * i), dtype=np.uint8)
            labels[5:20] = 1
            labels[20:30] = 2
            labels[30:, 10:] = 3
            image = Image.fromarray(np.stack([60 * labels] * 3, -1))
            image.save(tmp_path / "ade" / "images" / split / f"{i}.jpg")
            Image.fromarray(labels).save(tmp_path / "ade" / "annotations" / split / f"{i}.png")
    return tmp_path / "ade"


def two_halves(height, width):
    labels = torch.full((height, width), 3, dtype=torch.uint8)
    labels[:, width // 2:] = 7
    return labels


# --- augmentation ---------------------------------------------------------------------------------
def test_images_fit_into_the_long_and_the_short_side():
    assert fit_size(480, 640, 2048, 512) == (512, 683)
    assert fit_size(100, 1000, 2048, 512) == (205, 2048)
    assert fit_size(683, 512, 1024, 256) == (342, 256)


def test_crops_on_one_class_are_drawn_again():
    labels = torch.zeros(40, 400, dtype=torch.uint8)
    labels[:, 200:] = 1
    transform = SegmentTransform(40)
    varied = 0
    for i in range(50):
        seed_all(i)
        top, left = transform.draw_corner(labels)
        varied += 0.25 < labels[top:top + 40, left:left + 40].float().mean() < 0.75
    assert varied / 50 > 0.25                # 19 of 361 places fit: 0.05 by one draw, 0.4 by ten


def test_images_are_resized_by_half_to_double_before_the_crop():
    transform = SegmentTransform(48)
    draw_corner = transform.draw_corner
    sides = []

    def note(labels):
        sides.append(labels.shape[0])
        return draw_corner(labels)
    transform.draw_corner = note
    for i in range(200):
        seed_all(i)
        transform(torch.zeros(3, 48, 96, dtype=torch.uint8), two_halves(48, 96))
    assert 24 <= min(sides) < 28
    assert 92 < max(sides) <= 96
    assert 54 < np.mean(sides) < 66


@pytest.mark.parametrize("counts, varied", [
    ({0: 75, 1: 25}, False), ({0: 74, 1: 26}, True), ({0: 100}, False),
    ({0: 30, IGNORE: 70}, False), ({0: 30, 1: 20, IGNORE: 50}, True),
    ({0: 40, 1: 10, IGNORE: 50}, False), ({IGNORE: 100}, False)])
def test_a_varied_crop_has_two_classes_and_none_on_three_quarters_of_its_labelled_pixels(
        counts, varied):
    labels = torch.cat([torch.full((n,), c, dtype=torch.uint8) for c, n in counts.items()])
    assert is_varied(labels.view(10, 10)) == varied


def test_distortion_keeps_range_size_and_kind_and_changes_the_picture():
    image = torch.randint(256, (3, 20, 30), dtype=torch.uint8)
    changed = 0
    for i in range(40):
        seed_all(i)
        out = distort(image)
        assert out.dtype == torch.uint8
        assert out.shape == image.shape
        changed += not torch.equal(out, image)
    assert 30 <= changed < 40                # none of the four is drawn once in sixteen times
    grey = torch.full((3, 5, 5), 120, dtype=torch.uint8)
    for i in range(20):                      # grey has no hue and no saturation to change
        seed_all(i)
        out = distort(grey).float()
        assert (out.amax(dim=0) - out.amin(dim=0)).max() <= 1


def test_hue_moves_by_a_tenth_of_the_circle_at_most():
    image = torch.tensor([140, 110, 80], dtype=torch.uint8).view(3, 1, 1)        # 30 degrees
    moved = []
    for i in range(300):
        seed_all(i)
        red, green, blue = (distort(image).flatten() / 255).tolist()
        hue = 360 * colorsys.rgb_to_hsv(red, green, blue)[0]
        moved.append((hue - 30 + 180) % 360 - 180)
    assert -41 < min(moved) < -25            # 18 of 180 steps are 36 degrees
    assert 25 < max(moved) < 41


def test_saturation_is_that_of_hsv_and_stops_at_full_colour():
    image = torch.rand(3, 4, 5)
    factor = 1.4
    changed = saturate(image, factor).flatten(1).T.tolist()
    for before, after in zip(image.flatten(1).T.tolist(), changed, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before)
        assert after == pytest.approx(colorsys.hsv_to_rgb(h, min(1, factor * s), v), abs=1e-5)


def test_image_and_labels_move_alike_and_nothing_but_the_image_is_distorted():
    labels = two_halves(60, 90)
    image = (30 * labels)[None].expand(3, -1, -1)
    for i in range(20):
        seed_all(i)
        out, target = SegmentTransform(48, jitter=2.0, distortion=False)(image, labels)
        assert out.shape == (3, 48, 48)
        assert target.shape == (48, 48)
        assert out.dtype == target.dtype == torch.uint8
        assert set(target.unique().tolist()) <= {3, 7, IGNORE}
        known = target != IGNORE
        agree = (out[0][known].float() / 30 - target[known].float()).abs() < 0.1
        assert agree.float().mean() > 0.9    # bilinear against nearest along the one edge
        seed_all(i)
        _, same = SegmentTransform(48, jitter=2.0)(image, labels)
        assert torch.equal(same, target)


@pytest.mark.parametrize("height, width", [(30, 40), (48, 40), (30, 48), (48, 48)])
def test_padding_lies_right_and_below_with_the_mean_colour_and_no_label(height, width):
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    labels = two_halves(height, width)
    out, target = SegmentTransform(48).pad(image, labels)
    expected = torch.tensor([round(255 * m) for m in IMAGENET_MEAN], dtype=torch.uint8)
    expected = expected.view(3, 1, 1).repeat(1, 48, 48)
    expected[:, :height, :width] = image
    assert torch.equal(out, expected)
    assert torch.equal(target[:height, :width], labels)
    assert (target[height:] == IGNORE).all()
    assert (target[:, width:] == IGNORE).all()
    padded = imagenet_normalize(data.to_float(out[None], torch.device("cpu")))[0]
    for border in (padded[:, height:], padded[:, :, width:]):            # 0 but for bytes
        assert (border.abs() < 0.01).all()


# --- data sets ------------------------------------------------------------------------------------
def test_shapes_have_a_background_and_the_class_of_each_object_plus_one():
    scenes = open_scenes("shapes", "val", limit=10)
    assert len(scenes) == 10
    assert len(scenes.classes) == 11
    assert scenes.classes[0] == "background"
    for i in range(10):
        image, labels = scenes[i]
        assert image.shape == (3, 48, 48)
        assert labels.dtype == torch.uint8
        assert labels.unique().tolist() == [0, int(scenes.shapes.labels[i]) + 1]


def test_ade_labels_shift_by_one_and_0_and_255_are_ignored(tmp_path):
    numbers = np.array([[0, 1, 2], [150, 255, 7]], dtype=np.uint8)
    Image.fromarray(numbers).save(tmp_path / "a.png")
    numbers = read_numbers(tmp_path / "a.png")
    assert to_labels(numbers, 150).tolist() == [[255, 0, 1], [149, 255, 6]]
    with pytest.raises(UserError, match="a.png holds label 150, but there are 149 classes"):
        to_labels(numbers, 149, name="a.png")


def test_a_folder_gives_pairs_and_a_sample_is_a_function_of_seed_epoch_and_index(scenes):
    train = open_scenes(scenes, "train", SegmentTransform(48), classes=3)
    assert len(train) == 8
    assert train.classes == ["class 1", "class 2", "class 3"]
    one, again, other = train[2, 5], train[2, 5], train[3, 5]
    assert torch.equal(one[0], again[0])
    assert torch.equal(one[1], again[1])
    assert not torch.equal(one[0], other[0])
    assert len(open_scenes(scenes, "val", classes=3, limit=2)) == 2


def test_classes_have_the_names_of_ade20ks_list_if_it_fits(scenes):
    def names():
        return open_scenes(scenes, "val", classes=3).classes
    path = scenes / "objectInfo150.txt"
    path.write_text("Idx\tName\n1\twall\n2\tbuilding, edifice\n3\tsky\n")
    assert names() == ["wall", "building", "sky"]
    path.write_text("Idx\tName\n1\twall\n")
    assert names() == ["class 1", "class 2", "class 3"]
    path.write_bytes(b"Idx\tName\n1\tcaf\xe9\n2\tb\n3\tc\n")             # not UTF-8
    assert names() == ["class 1", "class 2", "class 3"]


def test_a_folder_gives_every_image_once_and_a_limit_spreads_over_all(scenes):
    def names(limit=None):
        dataset = open_scenes(str(scenes), "train", classes=3, limit=limit)
        return [path.decode()[-5:] for path in dataset.paths]
    assert names() == [f"{i}.jpg" for i in range(8)]
    assert names(3) == ["0.jpg", "4.jpg", "7.jpg"]


def test_annotations_that_do_not_fit_are_one_sentence(scenes):
    target = scenes / "annotations" / "training" / "3.png"

    def fourth(classes=3):
        return open_scenes(scenes, "train", classes=classes)[3]

    with pytest.raises(UserError, match="holds label 3, but there are 2 classes: give --classes"):
        fourth(classes=2)
    with Image.open(target) as picture:
        Image.new("L", (5, 6)).save(target)
        with pytest.raises(UserError, match="3.png is 5x6, its image .*3.jpg 69x67"):
            fourth()
        picture.convert("RGB").save(target)
    with pytest.raises(UserError, match="pixels of kind RGB"):
        fourth()
    target.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot read the annotation"):
        fourth()
    target.unlink()
    with pytest.raises(UserError, match="there is no annotation .*3.png for .*3.jpg"):
        fourth()
    assert (scenes / "images" / "training" / "3.jpg").exists()
    with pytest.raises(UserError, match="holds no image: label maps want ADE20K's layout"):
        open_scenes(scenes / "images", "train")


# --- photographs with an EXIF note ----------------------------------------------------------------
UNDO = {1: lambda x: x, 2: np.fliplr, 3: lambda x: x[::-1, ::-1], 4: np.flipud,
        5: lambda x: x.swapaxes(0, 1), 6: np.rot90, 7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1)}        # from upright to what the camera stores


def photograph(root, turn, drawn, height=32, width=48):
    """A photograph with the note `turn`, and its label map, drawn "upright" or as "stored"."""
    upright = np.ones((height, width), np.uint8)
    upright[:height // 2, :width // 3] = 2
    stored = np.ascontiguousarray(UNDO[turn](upright))
    exif = Image.Exif()
    exif[0x0112] = turn
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.stack([100 * stored] * 3, axis=-1))
        image.save(root / "images" / split / "a.jpg", exif=exif, quality=100)
        labels = upright if drawn == "upright" else stored
        Image.fromarray(labels).save(root / "annotations" / split / "a.png")
    return open_scenes(str(root), "train", classes=2)


@pytest.mark.parametrize("turn", [1, 5, 6, 7, 8])
@pytest.mark.parametrize("drawn", ["upright", "stored"])
def test_a_photograph_and_its_label_map_turn_together(tmp_path, turn, drawn):
    image, labels = photograph(tmp_path, turn, drawn)[0]
    assert image.shape == (3, 32, 48)
    assert torch.equal((image[0] > 150).int(), labels.int())             # pixel for pixel


@pytest.mark.parametrize("turn, width", [(2, 48), (3, 48), (4, 48), (6, 32)])
def test_a_label_map_that_would_fit_before_and_after_the_turn_is_one_sentence(
        tmp_path, turn, width):
    dataset = photograph(tmp_path, turn, "stored", width=width)
    for read in (lambda: dataset[0], lambda: dataset.look(0)):
        with pytest.raises(UserError, match="the EXIF note of .*a.jpg turns it, and .*a.png would "
                                            "fit before and after: save the photograph upright"):
            read()


def test_a_label_map_saved_as_jpeg_is_one_sentence(scenes):
    path = scenes / "annotations" / "training" / "3.png"
    with Image.open(path) as picture:
        picture.save(path, format="jpeg")
    with pytest.raises(UserError, match="3.png is a JPEG, which changes the numbers"):
        open_scenes(str(scenes), "train", classes=3)[3]


# --- results --------------------------------------------------------------------------------------
def test_the_table_lists_the_best_class_first_and_one_that_never_occurs_last():
    iou = torch.tensor([10.0, float("nan"), 30.0])
    lines = class_table(["a", "b", "c"], iou, iou).splitlines()
    assert [line.split()[0] for line in lines] == ["class", "c", "a", "b"]


def test_the_picture_shows_image_labels_and_prediction_one_below_the_other(scenes, tmp_path):
    dataset = open_scenes(scenes, "val", classes=3)
    draw_scenes(dataset, lambda images: torch.zeros(1, *images.shape[2:], dtype=torch.long),
                tmp_path / "sheet.png", cell=60)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * 64 - 4, 3 * 64 - 4)
        pixels = np.array(sheet)
    assert (pixels[64:66, :60] == 255).all()                 # the first rows have no label
    predicted = pixels[2 * 64 + 2:2 * 64 + 24, 2:58].reshape(-1, 3)
    assert len(np.unique(predicted, axis=0)) == 1            # one class, one colour
