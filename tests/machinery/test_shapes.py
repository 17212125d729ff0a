"""The built-in pictures: functions of their index, balanced, with known factors, not too easy."""
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from support import data
from support.shapes import SHAPES, TEXTURES, Shapes, draw_shapes, hashed


@pytest.fixture(scope="module")
def shapes():
    return data.open_data("shapes", "train", limit=1000)


# Known answers: what draw_shapes gives for training images 2000 to 2099 (seed 0).
FIRST_LABELS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
MASK_AREAS = [1140, 967, 853, 712, 789, 608, 510, 602, 487, 641]
PIXELS = [(0, 5, 40, [94, 101, 77]), (13, 24, 24, [170, 193, 225]), (37, 10, 10, [223, 175, 188]),
          (59, 30, 20, [67, 22, 25]), (88, 44, 3, [37, 1, 57]), (99, 20, 35, [164, 175, 175])]
IMAGE_MEAN = 130.113
IMAGE_STD = 75.469
FACTOR_MEANS = [0.531189, 0.471149, 0.481189, 0.50679, -1.15496, 0.528083, 0.783784, 2.25,
                -0.106088, -0.206168]


# --- functions of their index ---------------------------------------------------------------------
def test_a_shape_is_a_function_of_seed_split_and_index():
    together = draw_shapes(0, "train", np.arange(300))
    for index in (0, 7, 299):
        alone = draw_shapes(0, "train", [index])
        for k in range(3):                                   # images, masks, labels
            assert (alone[k][0] == together[k][index]).all()
    backwards = draw_shapes(0, "train", np.arange(300)[::-1])[0][::-1]
    assert (backwards == together[0]).all()


def test_other_seeds_splits_and_indices_give_other_images():
    first = draw_shapes(0, "train", np.arange(200))[0]
    assert len({image.tobytes() for image in first}) == 200
    for seed, split in ((1, "train"), (0, "val")):
        other = draw_shapes(seed, split, np.arange(200))[0]
        assert not {image.tobytes() for image in first} & {image.tobytes() for image in other}


def test_hashed_numbers_are_uniform_and_uncorrelated():
    u = hashed(0, 0, np.arange(20000), draws=4)              # a mean has standard error 0.002
    assert u.min() >= 0 and u.max() < 1
    assert np.abs(u.mean(0) - 0.5).max() < 0.01
    assert np.abs(u.var(0) - 1 / 12).max() < 0.002
    neighbours = np.corrcoef(np.concatenate([u[:-1], u[1:]], 1).T) - np.eye(8)
    assert np.abs(neighbours).max() < 0.035


def test_the_drawings_are_those_that_all_our_records_were_made_with():
    images, masks, labels, factors = draw_shapes(0, "train", np.arange(2000, 2100))
    assert labels[:20].tolist() == FIRST_LABELS
    assert np.abs(masks.sum((1, 2))[:10].astype(int) - MASK_AREAS).max() <= 1    # pixels
    # Sines differ in their last digit from processor to processor, hence one level of tolerance.
    for index, y, x, colour in PIXELS:
        assert np.abs(images[index, :, y, x].astype(int) - colour).max() <= 1
    assert abs(images.mean() - IMAGE_MEAN) < 0.01
    assert abs(images.std() - IMAGE_STD) < 0.01
    means = [factors[name].mean() for name in sorted(factors)]
    np.testing.assert_allclose(means, FACTOR_MEANS, rtol=1e-4)


# --- the data set ---------------------------------------------------------------------------------
def test_shapes_have_twelve_thousand_and_two_thousand_images_of_ten_balanced_classes():
    assert Shapes.SIZES == {"train": 12_000, "val": 2_000}
    few = data.open_data("shapes", "val", limit=30)
    assert len(few) == 30 and few.name == "shapes"
    assert few.classes == list(SHAPES) and len(few.classes) == 10
    assert few.labels.bincount().tolist() == [3] * 10
    image, label = few[0]
    assert image.shape == (3, 48, 48) and image.dtype == torch.uint8
    assert label == few.labels[0]
    # The class does not follow from the index: every tenth image is not always the same shape.
    assert len(data.open_data("shapes", "val", limit=200).labels[::10].unique()) > 5


def test_the_mask_separates_object_and_background_in_brightness(shapes):
    masks = shapes.masks(slice(None)).bool()                                     # (n, S, S)
    grey = shapes.images.float().mean(1) / 255
    inside = (grey * masks).sum((1, 2)) / masks.sum((1, 2))
    outside = (grey * ~masks).sum((1, 2)) / (~masks).sum((1, 2))
    assert ((inside - outside).abs() > 0.2).all()
    brightness = torch.from_numpy(shapes.factors["brightness"])
    assert ((inside - brightness).abs() < 0.06).all()        # the factors say what was drawn
    assert 0.4 < (inside > outside).float().mean() < 0.6     # either may be the brighter
    centre = (masks * torch.arange(48.0)).sum((1, 2)) / masks.sum((1, 2)) - 23.5
    assert np.corrcoef(centre.numpy(), shapes.factors["x"])[0, 1] > 0.8
    assert shapes.masks(3).shape == (48, 48) and shapes.masks(3).dtype == torch.uint8


def test_objects_fill_60_to_95_percent_of_the_half_width_and_turn_little(shapes):
    f = shapes.factors
    assert 0.60 <= f["scale"].min() < 0.62
    assert 0.93 < f["scale"].max() <= 0.95
    assert 14 < np.abs(f["rotation"]).max() <= 15
    assert set(f["texture"]) == set(range(len(TEXTURES)))
    turned = Shapes("val", limit=500, max_rotation=180)
    assert np.abs(turned.factors["rotation"]).max() > 170


def test_a_linear_classifier_on_pixels_learns_little():
    train = data.open_data("shapes", "train", limit=4000)
    val = data.open_data("shapes", "val", limit=1000)
    x, v = (F.avg_pool2d(d.images.float() / 255, 2).flatten(1) for d in (train, val))
    x, v = x - x.mean(0), v - x.mean(0)                                          # (n, 1728)
    target = F.one_hot(train.labels, 10).float() - 0.1
    best = 0
    for ridge in (1e2, 1e3, 1e4):
        weight = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1]), x.T @ target)
        best = max(best, ((v @ weight).argmax(1) == val.labels).float().mean().item())
    assert 0.12 < best < 0.35


def test_a_pickled_copy_is_small_and_draws_the_same_images(shapes):
    pickled = pickle.dumps(shapes)
    copy = pickle.loads(pickled)
    assert len(pickled) < 100_000
    assert torch.equal(copy.images, shapes.images) and torch.equal(copy[5][0], shapes[5][0])
