"""What each stage does to an image: its windows, flips, colours and boxes; any size; torchvision's
own functions give the same pixels wherever they stand in."""
import functools
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import photo, save
from PIL import Image, ImageOps
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF

from model import IMAGENET_MEAN, IMAGENET_STD
from support import data, transforms
from support.images import open_photo, read_image
from support.process import seed_all
from support.scenes import SegmentTransform


# --- windows and flips ----------------------------------------------------------------------------
def test_crops_have_the_area_and_aspect_asked_for():
    transform = transforms.VQKDTransform(48, scale=(0.08, 1.0))
    image = photo(200, 200)
    areas, aspects = [], []
    for i in range(400):
        seed_all(i)
        window = transform.crop.window.make_params([image])
        areas.append(window["height"] * window["width"] / 200 ** 2)
        aspects.append(window["width"] / window["height"])
    assert 0.07 < min(areas) < 0.15 and 0.85 < max(areas) <= 1
    assert 0.73 < min(aspects) < 0.8 and 1.25 < max(aspects) < 1.37
    out = transform(image)
    assert out.shape == (3, 48, 48) and out.dtype == torch.uint8


@pytest.mark.parametrize("height, width, scale, whole", [
    # What torchvision's ten tries end at, too: no aspect drawn is exactly 1.
    (48, 48, (1.0, 1.0), True),
    (48, 48, (0.6, 1.0), False), (48, 72, (1.0, 1.0), False), (72, 48, (1.0, 1.0), False)])
def test_only_of_a_square_image_a_crop_of_scale_one_is_all(height, width, scale, whole):
    image = photo(height, width)
    crop = transforms.RandomCrop([48], scale)
    sizes = set()
    for seed in range(20):
        seed_all(seed)
        window = crop.window.make_params([image])
        sizes.add((window["height"], window["width"]))
        expected = VF.resized_crop(image, **window, size=[48, 48], **transforms.BICUBIC)
        seed_all(seed)
        assert torch.equal(crop(image), expected)
    assert (sizes == {(height, width)}) == whole


@pytest.mark.parametrize("height, width", [(48, 48), (60, 80), (300, 200), (9, 90), (1, 1)])
def test_a_window_and_its_flip_are_torchvisions_to_the_last_bit(height, width):
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    ours = transforms.VQKDTransform(48, (0.2, 1.0))
    theirs = v2.Compose([v2.RandomResizedCrop(48, (0.2, 1.0), interpolation=3, antialias=True),
                         v2.RandomHorizontalFlip()])
    for seed in range(40):
        seed_all(seed)
        expected = theirs(image)
        seed_all(seed)
        assert torch.equal(ours(image), expected)


@pytest.mark.parametrize("transform", [
    transforms.VQKDTransform(48, (0.5, 1.0)), transforms.MIMTransform(48, scale=(0.5, 1.0)),
    transforms.FinetuneTransform(48, (0.5, 1.0), None, 0.0)])
def test_half_of_the_images_are_flipped(transform):
    assert 0.4 <= flipped_share(transform) <= 0.6


def test_half_of_the_scenes_are_flipped_with_their_labels():
    transform = SegmentTransform(48, jitter=1.0, distortion=False)
    labels = torch.arange(48, dtype=torch.uint8).expand(48, 48)
    assert 0.4 <= flipped_share(lambda image: transform(image, labels)[0]) <= 0.6


def flipped_share(transform):
    rising = photo(48, 48)                                   # red falls to the right if flipped
    flipped = 0
    for _ in range(400):
        red = transform(rising)[0].float()
        flipped += bool(red[:, :8].mean() > red[:, -8:].mean())
    return flipped / 400


# --- masked image modelling -----------------------------------------------------------------------
def test_both_views_of_masked_image_modelling_show_one_window():
    transform = transforms.MIMTransform(48, 24)
    for i in range(20):
        seed_all(i)
        large, small = transform(photo(64, 64))
        assert large.shape == (3, 48, 48) and small.shape == (3, 24, 24)
        halved = F.avg_pool2d(large.float(), 2)
        assert (halved - small.float()).abs().max() < 6      # same place, colours and orientation
    assert torch.is_tensor(transforms.MIMTransform(48, 48)(photo()))     # one size, one tensor


def test_held_out_images_are_shown_to_backbone_and_tokenizer_as_to_all_other_stages():
    image = photo(300, 400)
    views = transforms.MIMEvalTransform(224, 112)(image)
    for view, size in zip(views, (224, 112), strict=True):
        assert torch.equal(view, transforms.EvalTransform(size)(image))
    one = transforms.MIMEvalTransform(224, 224)(image)       # one size, one tensor
    assert torch.equal(one, views[0])


def plain_order(image, transform, seed, shake):
    """Stage 2 as the recipe does it: colours of the whole image, then the flip, then the window."""
    size, = transform.crop.sizes
    seed_all(seed)
    image = shake(image, *transforms.draw_jitter(0.4)).round().byte()
    image = v2.RandomHorizontalFlip()(image)
    window = transform.crop.draw(image)
    return VF.resized_crop(image, **window, size=[size, size], **transforms.BICUBIC)


def of_whole(image, order, factors):
    return transforms.jitter(image, image, order, factors)


def by_torchvision(image, order, factors):
    """-> float32 in [0, 255]; torchvision does not round floats"""
    adjust = VF.adjust_brightness, VF.adjust_contrast, VF.adjust_saturation
    image = image / 255
    for which in order:
        image = adjust[which](image, factors[which])
    return 255 * image


@pytest.mark.parametrize("height, width", [(48, 48), (60, 80), (127, 100), (9, 90), (1, 1)])
def test_a_window_shows_the_colours_of_the_whole_images_jitter_to_the_last_bit(height, width):
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    transform = transforms.MIMTransform(48)
    for seed in range(40):
        expected = plain_order(image, transform, seed, of_whole)
        seed_all(seed)
        assert torch.equal(transform(image), expected)


def test_without_jitter_no_draw_is_made_for_it():
    image, transform = photo(60, 80), transforms.MIMTransform(48, color_jitter=0)
    theirs = v2.Compose([v2.RandomHorizontalFlip(), transforms.RandomCrop([48], (0.2, 1.0))])
    for seed in range(20):
        seed_all(seed)
        expected = theirs(image)
        seed_all(seed)
        assert torch.equal(transform(image), expected)


def test_colour_jitter_is_torchvisions_brightness_contrast_and_saturation_in_random_order():
    orders = set()
    for seed in range(30):
        seed_all(seed)
        image = torch.randint(256, (3, 40, 50), dtype=torch.uint8)
        seed_all(seed)
        order, factors = transforms.draw_jitter(0.4)
        assert all(0.6 <= factor <= 1.4 for factor in factors)
        orders.add(tuple(order))
        got = of_whole(image, order, factors)
        assert got.dtype == torch.uint8
        want = by_torchvision(image, order, factors)
        torch.testing.assert_close(got.float(), want, atol=0.55, rtol=0)
        channels_last = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        assert torch.equal(of_whole(channels_last, order, factors), got)
    assert len(orders) == 6


def test_colour_jitter_never_changes_the_hue_of_a_picture_or_the_image_it_was_given():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[0], image[1], image[2] = 140, 110, 80              # orange: green between blue and red
    for seed in range(20):
        torch.manual_seed(seed)
        r, g, b = of_whole(image, *transforms.draw_jitter(0.4))[:, 0, 0].tolist()
        assert r > g > b and abs((r - g) - (g - b)) <= 2
    assert image[0].eq(140).all() and image[1].eq(110).all()


# --- photographs, decoded as far as needed --------------------------------------------------------
def leaves(height, width, count=400, seed=0):
    """A picture (H, W, 3) of discs that hide one another: sharp edges at all scales, as in a photo.

    Radii r have the density r^-3, as things have that are seen from all distances.
    """
    draw = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0)
    for _ in range(count):
        radius = min(width / 4, width / 150 / np.sqrt(draw.random()))
        x, y = draw.random() * width, draw.random() * height
        rows = np.arange(max(0, int(y - radius)), min(height, int(y + radius) + 2))
        columns = np.arange(max(0, int(x - radius)), min(width, int(x + radius) + 2))
        inside = (rows[:, None] - y) ** 2 + (columns - x) ** 2 < radius ** 2
        colour = draw.normal(120, 60) + draw.normal(0, 25, 3)
        pixels[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1][inside] = colour
    pixels += draw.normal(0, 3, pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """{width: a JPEG of width x 3/4 width}"""
    folder = tmp_path_factory.mktemp("photographs")
    sizes = {500: 375, 1500: 1125}
    return {width: save(folder / f"{width}.jpg", Image.fromarray(leaves(height, width)), quality=92)
            for width, height in sizes.items()}


def differences(transform, path, expected, seeds=16):
    """A Photo's views against expected(seed), in levels of 255.

    -> the mean absolute difference, the share of values that differ by more than 3
    """
    found = []
    for seed in range(seeds):
        view = expected(seed).float()
        seed_all(seed)
        found.append((transform(open_photo(path)) - view).abs())
    found = torch.stack(found)
    return found.mean().item(), (found > 3).float().mean().item()


def on_coarse_pixels(monkeypatch):
    """Windows that are drawn from now on have edges that no decoding has to round."""
    draw = transforms.RandomCrop.draw

    def drawn(crop, image):
        return {edge: at // 8 * 8 for edge, at in draw(crop, image).items()}

    monkeypatch.setattr(transforms.RandomCrop, "draw", drawn)


@pytest.mark.parametrize("width, rounded, mean, share", [
    (500, True, 0.06, 0), (1500, False, 0.7, 0.03), (1500, True, 2.0, 0.15)])
def test_a_photographs_view_is_nearly_that_of_the_plain_order(
        photographs, monkeypatch, width, rounded, mean, share):
    if not rounded:
        on_coarse_pixels(monkeypatch)
    image, transform = read_image(photographs[width]), transforms.MIMTransform(224)

    def expected(seed):
        return plain_order(image, transform, seed, by_torchvision)

    found = differences(transform, photographs[width], expected)
    assert found[0] < mean and found[1] <= share


@pytest.mark.parametrize("width, rounded, mean, share", [
    (500, True, 0, 0), (1500, False, 0.7, 0.03), (1500, True, 2.2, 0.17)])
@pytest.mark.parametrize("make", [
    transforms.VQKDTransform, functools.partial(transforms.FinetuneTransform, randaugment=None,
                                                erasing=0.0)])
def test_a_window_of_a_photograph_is_nearly_that_of_its_pixels(
        photographs, monkeypatch, make, width, rounded, mean, share):
    if not rounded:
        on_coarse_pixels(monkeypatch)
    image, transform = read_image(photographs[width]), make(224)

    def expected(seed):
        seed_all(seed)
        return transform(image)

    found = differences(transform, photographs[width], expected)
    assert found[0] <= mean and found[1] <= share


def test_a_photograph_is_decoded_no_further_than_its_window_needs(photographs):
    for side, s in [(335, 1), (336, 2), (671, 2), (672, 4), (1100, 4)]:
        window = dict(top=5, left=9, height=side, width=side)
        pixels, whole = transforms.cut(open_photo(photographs[1500]), window, 112)
        assert whole.shape == (3, -(-1125 // s), -(-1500 // s))
        top, left = where(pixels, whole)
        assert abs(top - 5 / s) <= 0.5 and abs(left - 9 / s) <= 0.5
        assert abs(top + pixels.shape[1] - (5 + side) / s) <= 0.5
        assert abs(left + pixels.shape[2] - (9 + side) / s) <= 0.5


def where(part, whole):
    """-> row and column of `whole`, whose channels lie side by side, where `part` begins"""
    return divmod((part.storage_offset() - whole.storage_offset()) // 3, whole.shape[2])


def test_evaluation_of_a_photograph_is_that_of_its_pixels(photographs):
    plain, both = transforms.EvalTransform(224), transforms.MIMEvalTransform(224, 112)
    for path in photographs.values():
        image = read_image(path)
        assert torch.equal(plain(open_photo(path)), plain(image))
        for ours, expected in zip(both(open_photo(path)), both(image), strict=True):
            assert torch.equal(ours, expected)


# --- fine-tuning ----------------------------------------------------------------------------------
def test_fine_tuning_erases_a_quarter_of_the_images_with_normal_noise_after_normalisation():
    transform = transforms.FinetuneTransform(64, scale=(1.0, 1.0), randaugment=None)
    grey = torch.full((3, 64, 64), 100, dtype=torch.uint8)
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    erased, values = [], []
    for i in range(600):
        seed_all(i)
        image = transform(grey)
        assert image.dtype == torch.float32
        changed = ((image - 100 / 255).abs() > 1e-3).all(0)
        erased.append(changed.float().mean().item())
        if changed.any():
            rows, cols = torch.where(changed)
            box = image[:, rows.min():rows.max() + 1, cols.min():cols.max() + 1]
            values.append((box - mean) / std)
    erased = np.array(erased)
    assert 0.18 < (erased > 0).mean() < 0.32
    assert 0.01 < erased[erased > 0].min() and erased.max() < 0.35
    drawn = torch.cat([v.flatten(1) for v in values], 1)                         # (3, pixels)
    torch.testing.assert_close(drawn.mean(1), torch.zeros(3), atol=0.01, rtol=0)
    torch.testing.assert_close(drawn.std(1), torch.ones(3), atol=0.01, rtol=0)


def test_fine_tuning_erases_boxes_of_2_to_33_percent():
    box = transforms.FinetuneTransform(48).box
    assert box.scale == (0.02, 1 / 3) and box.ratio == (0.3, 1 / 0.3)


def test_fine_tuning_uses_the_authors_randaugment():
    augment = transforms.FinetuneTransform(48).augment
    assert augment.num_layers == 2 and len(augment.ops) == 15
    assert augment.choice_weights is None                    # drawn with replacement
    for op in augment.ops:
        assert (op.prob, op.magnitude, op.magnitude_std) == (0.5, 9, 0.5)
        assert op.hparams["translate_pct"] == 0.45
        assert op.hparams["img_mean"] == op.kwargs["fillcolor"] == (124, 116, 104)
        assert op.kwargs["resample"] == Image.Resampling.BICUBIC
    assert "PosterizeIncreasing" in {op.name for op in augment.ops}              # inc1


@pytest.mark.parametrize("bits", range(1, 9))
def test_posterizing_is_pillows_to_the_last_bit(bits):
    image = Image.fromarray(photo().permute(1, 2, 0).numpy())
    expected = np.asarray(ImageOps.posterize(image, bits))
    assert (np.asarray(transforms.posterize(image, bits)) == expected).all()


def test_randaugment_survives_the_strongest_posterizing():
    transform = transforms.FinetuneTransform(48, erasing=0.0)
    op = next(op for op in transform.augment.ops if op.name == "PosterizeIncreasing")
    op.prob, op.magnitude, op.magnitude_std = 1.0, 10, 0     # keeps 0 bits: black
    image = Image.fromarray(photo(48, 48).permute(1, 2, 0).numpy())
    assert np.asarray(op(image)).max() == 0
    assert transform(photo()).dtype == torch.uint8           # without erasing: bytes


# --- evaluation -----------------------------------------------------------------------------------
def test_evaluation_resizes_the_short_side_and_crops_the_centre():
    image = photo(300, 500)
    out = transforms.EvalTransform(224)(image)
    assert out.shape == (3, 224, 224)
    # 256 / 300 of the size. The centre are 224 of 427 columns: red runs from 101.3 / 426.7 to
    # 325.3 / 426.7 of 255.
    assert abs(out[0, 100, 0].item() - 101.3 / 426.7 * 255) < 2
    assert abs(out[0, 100, -1].item() - 325.3 / 426.7 * 255) < 2
    assert abs(out[1, 0, 100].item() - 16 / 256 * 255) < 2
    whole = transforms.EvalTransform(384)(image)             # the whole image becomes the square
    assert whole.shape == (3, 384, 384)
    assert whole[0, 0, 0] < 2 and whole[0, 0, -1] > 253


@pytest.mark.parametrize("size", [64, 112, 224])
@pytest.mark.parametrize("height, width", [(65, 80), (300, 400), (400, 300), (500, 100)])
def test_evaluation_is_torchvisions_resize_and_centre_crop_to_the_last_bit(size, height, width):
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    theirs = v2.Compose([v2.Resize(size * 256 // 224, interpolation=3), v2.CenterCrop(size)])
    assert torch.equal(transforms.EvalTransform(size)(image), theirs(image))


@pytest.mark.parametrize("size, margin", [(224, 256), (112, 128), (64, 73)])
def test_the_centre_crop_leaves_the_margin_of_224_in_256(size, margin, monkeypatch):
    resize, sizes = VF.resize, []

    def watched(image, to, **how):
        sizes.append(to)
        return resize(image, to, **how)

    monkeypatch.setattr(VF, "resize", watched)
    transforms.EvalTransform(size)(photo(300, 400))
    assert sizes == [[margin, margin * 400 // 300]]


def test_evaluation_shows_shapes_and_cifar_whole():
    shape = data.open_data("shapes", "val", limit=1)[0][0]
    assert torch.equal(transforms.EvalTransform(48)(shape), shape)
    out = transforms.EvalTransform(48)(photo(32, 32))
    assert out.shape == (3, 48, 48)
    assert out[0, 0, 0] < 4 and out[0, 0, -1] > 251


def test_the_middle_of_a_strip_is_what_the_crop_of_the_whole_would_show():
    strip = torch.randint(256, (3, 9, 90), dtype=torch.uint8)
    whole = VF.center_crop(VF.resize(strip, [256], **transforms.BICUBIC), [224, 224])
    assert torch.equal(transforms.EvalTransform(224)(strip), whole)


# --- any size -------------------------------------------------------------------------------------
TRANSFORMS = {
    "vqkd": lambda: transforms.VQKDTransform(48), "mim": lambda: transforms.MIMTransform(48),
    "finetune": lambda: transforms.FinetuneTransform(48),
    "eval": lambda: transforms.EvalTransform(48),
    "eval 224": lambda: transforms.EvalTransform(224),
    "eval 384": lambda: transforms.EvalTransform(384)}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("height, width", [(1, 1), (3, 2), (5, 40), (20_000, 1), (10, 20_000)])
def test_an_image_of_any_size_becomes_a_small_square_and_nothing_large_on_the_way(
        monkeypatch, name, height, width):
    resize = VF.resize

    def watched(image, size, *rest, **options):
        out = resize(image, size, *rest, **options)
        assert out[0].numel() < 2e6
        return out

    monkeypatch.setattr(VF, "resize", watched)
    out = TRANSFORMS[name]()(torch.randint(256, (3, height, width), dtype=torch.uint8))
    assert out.shape[0] == 3 and out.shape[1] == out.shape[2] >= 48
    assert out.isfinite().all()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_worker_that_starts_afresh_gets_a_copy_that_shows_the_same(name):
    transform = TRANSFORMS[name]()
    copy = pickle.loads(pickle.dumps(transform))             # as under spawn
    for seed in range(10):
        seed_all(seed)
        expected = transform(photo())
        seed_all(seed)
        assert torch.equal(copy(photo()), expected)
