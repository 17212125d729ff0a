"""Each sample is a pure function of numbers, batches do not depend on processes, and one rule reads every image."""
import hashlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms.v2 import functional as VF

from support import data, engine, transforms
from support.shapes import Shapes, TEXTURES, draw_shapes, hashed
from support.scenes import SegmentTransform
from support.images import open_images, read_image
from model import IMAGENET_MEAN, IMAGENET_STD


@pytest.fixture(scope="module")
def shapes():
    return data.open_data("shapes", "train", limit=1000)


def photo(height=60, width=80):
    """A smooth colour image on which every place differs: red rises to the right, green downwards."""
    x, y = torch.linspace(0, 255, width), torch.linspace(0, 255, height)
    red, green = x.expand(height, width), y[:, None].expand(height, width)
    return torch.stack([red, green, torch.full((height, width), 128.0)]).byte()


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


# -------------------------------------------------------------------------------------------------- built-in: shapes
def test_a_shape_is_a_function_of_seed_split_and_index():
    together = draw_shapes(0, "train", np.arange(300))
    for index in (0, 7, 299):
        alone = draw_shapes(0, "train", [index])
        assert all((a[0] == b[index]).all() for a, b in zip(alone[:3], together[:3]))
    backwards = draw_shapes(0, "train", np.arange(300)[::-1])[0][::-1]
    assert (backwards == together[0]).all()


def test_other_seeds_splits_and_indices_give_other_images():
    first = draw_shapes(0, "train", np.arange(200))[0]
    assert len({image.tobytes() for image in first}) == 200
    for other in (draw_shapes(1, "train", np.arange(200))[0], draw_shapes(0, "val", np.arange(200))[0]):
        assert not {image.tobytes() for image in first} & {image.tobytes() for image in other}


def test_hashed_numbers_are_uniform_and_uncorrelated():
    u = hashed(0, 0, np.arange(20000), draws=4)         # (20000, 4); a mean has standard error 0.002
    assert u.min() >= 0 and u.max() < 1
    assert np.abs(u.mean(0) - 0.5).max() < 0.01 and np.abs(u.var(0) - 1 / 12).max() < 0.002
    neighbours = np.corrcoef(np.concatenate([u[:-1], u[1:]], 1).T) - np.eye(8)
    assert np.abs(neighbours).max() < 0.035


def test_shapes_have_twelve_thousand_and_two_thousand_images_of_ten_balanced_classes():
    assert Shapes.SIZES == {"train": 12_000, "val": 2_000}
    few = data.open_data("shapes", "val", limit=30)
    assert len(few) == 30 and len(few.classes) == 10 and few.name == "shapes"
    assert few.labels.bincount().tolist() == [3] * 10
    image, label = few[0]
    assert image.shape == (3, 48, 48) and image.dtype == torch.uint8 and label == few.labels[0]
    # The class does not follow from the index: every tenth image is not always the same shape.
    assert len(data.open_data("shapes", "val", limit=200).labels[::10].unique()) > 5


def test_the_mask_separates_object_and_background_in_brightness(shapes):
    masks = shapes.masks(slice(None)).bool()                 # (n, S, S)
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
    assert 0.60 <= f["scale"].min() < 0.62 and 0.93 < f["scale"].max() <= 0.95
    assert 14 < np.abs(f["rotation"]).max() <= 15
    assert set(f["texture"]) == set(range(len(TEXTURES)))
    turned = Shapes("val", limit=500, max_rotation=180)
    assert np.abs(turned.factors["rotation"]).max() > 170


def test_a_linear_classifier_on_pixels_learns_little(shapes):
    train, val = data.open_data("shapes", "train", limit=4000), data.open_data("shapes", "val", limit=1000)
    x, v = (torch.nn.functional.avg_pool2d(d.images.float() / 255, 2).flatten(1) for d in (train, val))      # (n, 1728)
    x, v = x - x.mean(0), v - x.mean(0)
    target = torch.nn.functional.one_hot(train.labels, 10).float() - 0.1
    best = 0
    for ridge in (1e2, 1e3, 1e4):
        weight = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1]), x.T @ target)
        best = max(best, ((v @ weight).argmax(1) == val.labels).float().mean().item())
    assert 0.12 < best < 0.35


def test_a_pickled_copy_is_small_and_draws_the_same_images(shapes):
    copy = pickle.loads(pickle.dumps(shapes))
    assert len(pickle.dumps(shapes)) < 100_000
    assert torch.equal(copy.images, shapes.images) and torch.equal(copy[5][0], shapes[5][0])


# ------------------------------------------------------------------------------------ seeds, workers and transforms
def test_a_sample_depends_on_seed_epoch_and_index_and_on_nothing_before_it():
    def sample(key, seed=0):
        return data.open_data("shapes", "train", transforms.MIMTransform(48), limit=20, seed=seed)[key][0]

    ds = data.open_data("shapes", "train", transforms.MIMTransform(48), limit=20)
    want = ds[(3, 7)][0]
    ds[(0, 1)], torch.rand(5), np.random.rand()
    assert torch.equal(ds[(3, 7)][0], want) and torch.equal(sample((3, 7)), want)
    assert not torch.equal(sample((4, 7)), want) and not torch.equal(sample((3, 7), seed=1), want)
    assert torch.equal(sample(7), sample((0, 7)))            # an index alone is that of epoch 0
    plain = data.open_data("shapes", "train", limit=20, seed=1)
    assert torch.equal(plain[7][0], data.open_data("shapes", "train", limit=20)[7][0])   # the same pictures


@pytest.mark.parametrize("make", [transforms.MIMTransform, transforms.FinetuneTransform])
def test_the_number_of_workers_changes_no_image(make):
    ds = data.open_data("shapes", "train", make(48), limit=64)

    def stream(workers):
        return list(data.make_loader(ds, data.TrainBatches(64, 16, steps=6, seed=5), workers, torch.device("cpu")))

    alone = stream(0)
    assert len(alone) == 6 and alone[0][0].shape == (16, 3, 48, 48) and alone[0][1].dtype == torch.int64
    for workers in (1, 2):
        for (images, labels), (images_2, labels_2) in zip(alone, stream(workers), strict=True):
            assert torch.equal(images, images_2) and torch.equal(labels, labels_2)


def test_the_loader_leaves_the_training_loops_generator_alone():
    ds = data.open_data("shapes", "val", limit=8)            # no transform: nothing to seed
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    list(data.make_loader(ds, data.eval_batches(8, 4), 0, "cpu"))
    assert torch.equal(torch.rand(3), want)


def test_crops_have_the_area_and_aspect_asked_for():
    crop = transforms.VQKDTransform(48, scale=(0.08, 1.0))
    image = photo(200, 200)
    areas, aspects = [], []
    for i in range(400):
        engine.seed_all(i)
        w = crop.crop.window.make_params([image])
        areas.append(w["height"] * w["width"] / 200 ** 2)
        aspects.append(w["width"] / w["height"])
    assert 0.07 < min(areas) < 0.15 and 0.85 < max(areas) <= 1
    assert 0.73 < min(aspects) < 0.8 and 1.25 < max(aspects) < 1.37
    out = crop(image)
    assert out.shape == (3, 48, 48) and out.dtype == torch.uint8


@pytest.mark.parametrize("height, width, scale, whole", [
    (48, 48, (1.0, 1.0), True),          # what torchvision's ten tries end at, too, as no aspect drawn is 1 exactly
    (48, 48, (0.6, 1.0), False), (48, 72, (1.0, 1.0), False), (72, 48, (1.0, 1.0), False)])
def test_only_of_a_square_image_a_crop_of_scale_one_is_all(height, width, scale, whole):
    image, crop = photo(height, width), transforms.RandomCrop([48], scale)
    windows = []
    for seed in range(20):
        engine.seed_all(seed)
        windows.append(crop.window.make_params([image]))
        engine.seed_all(seed)
        expected = VF.resized_crop(image, **windows[-1], size=[48, 48], **transforms.BICUBIC)
        assert torch.equal(crop(image), expected)
    sizes = {(w["height"], w["width"]) for w in windows}
    assert (sizes == {(height, width)}) == whole


@pytest.mark.parametrize("transform", [
    transforms.VQKDTransform(48, (0.5, 1.0)), transforms.MIMTransform(48, scale=(0.5, 1.0)),
    transforms.FinetuneTransform(48, (0.5, 1.0), None, 0.0)])
def test_half_of_the_images_are_flipped(transform):
    rising = photo(48, 48)                                   # red rises to the right, unless flipped
    flipped = 0
    for _ in range(400):
        red = transform(rising)[0].float()
        flipped += bool(red[:, :8].mean() > red[:, -8:].mean())
    assert 0.4 <= flipped / 400 <= 0.6 and transform.flip.p == 0.5


def test_fine_tuning_erases_boxes_of_2_to_33_percent():
    box = transforms.FinetuneTransform(48).box
    assert box.scale == (0.02, 1 / 3) and box.ratio == (0.3, 1 / 0.3)


def test_both_views_of_masked_image_modelling_show_one_window():
    transform = transforms.MIMTransform(48, 24)
    for i in range(20):
        engine.seed_all(i)
        large, small = transform(photo(64, 64))
        assert large.shape == (3, 48, 48) and small.shape == (3, 24, 24)
        halved = torch.nn.functional.avg_pool2d(large.float(), 2)
        assert (halved - small.float()).abs().max() < 6      # the same place, colours and orientation
    assert torch.is_tensor(transforms.MIMTransform(48, 48)(photo()))           # one size, one tensor


def test_colour_jitter_acts_on_the_whole_image_before_the_crop(monkeypatch):
    transform, seen = transforms.MIMTransform(16), []
    for owner, name in ((transforms, "jitter"), (transform, "crop")):
        part = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda x, *how, name=name, part=part: (
            seen.append((name, tuple(x.shape), *how)), part(x, *how))[1])
    transform(photo(60, 80))
    assert seen == [("jitter", (3, 60, 80), 0.4), ("crop", (3, 60, 80))]
    seen.clear()
    transforms.MIMTransform(16, color_jitter=0)(photo(60, 80))
    assert not seen


def test_colour_jitter_is_torchvisions_brightness_contrast_and_saturation_in_random_order():
    adjust, orders = (VF.adjust_brightness, VF.adjust_contrast, VF.adjust_saturation), set()
    for seed in range(30):
        engine.seed_all(seed)
        image = torch.randint(256, (3, 40, 50), dtype=torch.uint8)
        engine.seed_all(seed)
        order, factors = torch.randperm(3).tolist(), (1 + 0.4 * (2 * torch.rand(3) - 1)).tolist()
        assert all(0.6 <= factor <= 1.4 for factor in factors)
        want = image / 255                                   # floats, which torchvision does not round in between
        for which in order:
            want = adjust[which](want, factors[which])
        orders.add(tuple(order))
        engine.seed_all(seed)
        got = transforms.jitter(image, 0.4)
        assert got.dtype == torch.uint8
        torch.testing.assert_close(got.float(), 255 * want, atol=0.55, rtol=0)
        engine.seed_all(seed)
        assert torch.equal(transforms.jitter(image.permute(1, 2, 0).contiguous().permute(2, 0, 1), 0.4), got)
    assert len(orders) == 6


def test_colour_jitter_never_changes_the_hue_of_a_picture_or_the_image_it_was_given():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[0], image[1], image[2] = 140, 110, 80              # an orange: green half-way between blue and red
    for seed in range(20):
        torch.manual_seed(seed)
        r, g, b = transforms.jitter(image, 0.4)[:, 0, 0].tolist()
        assert r > g > b and abs((r - g) - (g - b)) <= 2
    assert image[0].eq(140).all() and image[1].eq(110).all()


def test_fine_tuning_erases_a_quarter_of_the_images_with_normal_noise_after_normalisation():
    transform = transforms.FinetuneTransform(64, scale=(1.0, 1.0), randaugment=None)
    grey = torch.full((3, 64, 64), 100, dtype=torch.uint8)
    erased, values = [], []
    for i in range(600):
        engine.seed_all(i)
        image = transform(grey)
        assert image.dtype == torch.float32
        changed = ((image - 100 / 255).abs() > 1e-3).all(0)
        erased.append(changed.float().mean().item())
        if changed.any():
            rows, cols = torch.where(changed)
            box = image[:, rows.min():rows.max() + 1, cols.min():cols.max() + 1]
            values.append((box - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1))
    erased = np.array(erased)
    assert 0.18 < (erased > 0).mean() < 0.32
    assert 0.01 < erased[erased > 0].min() and erased.max() < 0.35
    noise = torch.cat([v.flatten(1) for v in values], 1)     # (3, pixels)
    torch.testing.assert_close(noise.mean(1), torch.zeros(3), atol=0.01, rtol=0)
    torch.testing.assert_close(noise.std(1), torch.ones(3), atol=0.01, rtol=0)


def test_fine_tuning_uses_the_authors_randaugment():
    augment = transforms.FinetuneTransform(48).augment
    assert augment.num_layers == 2 and len(augment.ops) == 15 and augment.choice_weights is None     # with replacement
    for op in augment.ops:
        assert (op.prob, op.magnitude, op.magnitude_std) == (0.5, 9, 0.5)
        assert op.hparams["translate_pct"] == 0.45 and op.hparams["img_mean"] == (124, 116, 104)
        assert op.kwargs["resample"] == Image.Resampling.BICUBIC and op.kwargs["fillcolor"] == (124, 116, 104)
    assert "PosterizeIncreasing" in {op.name for op in augment.ops}                                  # inc1


def test_randaugment_survives_the_strongest_posterizing():
    transform = transforms.FinetuneTransform(48, erasing=0.0)
    op = next(op for op in transform.augment.ops if op.name == "PosterizeIncreasing")
    op.prob, op.magnitude, op.magnitude_std = 1.0, 10, 0     # keeps 0 bits: black
    image = Image.fromarray(photo(48, 48).permute(1, 2, 0).numpy())
    assert np.asarray(op(image)).max() == 0
    assert transform(photo()).dtype == torch.uint8           # without erasing nothing leaves [0, 255]


def test_evaluation_resizes_the_short_side_and_crops_the_centre():
    image = photo(300, 500)
    out = transforms.EvalTransform(224)(image)
    assert out.shape == (3, 224, 224)
    # 256 / 300 of the size, centre 224 of 427 columns: red runs from 101.3 / 426.7 to 325.3 / 426.7 of 255.
    assert abs(out[0, 100, 0].item() - 101.3 / 426.7 * 255) < 2
    assert abs(out[0, 100, -1].item() - 325.3 / 426.7 * 255) < 2
    assert abs(out[1, 0, 100].item() - 16 / 256 * 255) < 2
    whole = transforms.EvalTransform(384)(image)                  # from 384 on the whole image is squeezed into the square
    assert whole.shape == (3, 384, 384) and whole[0, 0, 0] < 2 and whole[0, 0, -1] > 253


@pytest.mark.parametrize("size, margin", [(224, 256), (112, 128), (64, 73)])
def test_the_centre_crop_leaves_the_margin_of_224_in_256(size, margin, monkeypatch):
    resize, sizes = VF.resize, []
    monkeypatch.setattr(VF, "resize", lambda image, to, **how: (sizes.append(to), resize(image, to, **how))[1])
    transforms.EvalTransform(size)(photo(300, 400))
    assert sizes == [[margin]]


def test_evaluation_shows_shapes_and_cifar_whole(shapes):
    assert torch.equal(transforms.EvalTransform(48)(shapes[0][0]), shapes[0][0])
    small = photo(32, 32)
    out = transforms.EvalTransform(48)(small)
    assert out.shape == (3, 48, 48) and out[0, 0, 0] < 4 and out[0, 0, -1] > 251


# ---------------------------------------------------------------------------------------------- who gets which image
@pytest.mark.parametrize("world_size,accumulation", [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 3)])
def test_gathering_all_ranks_restores_the_batches_of_one_process(world_size, accumulation):
    n, batch, steps = 100, 24, 11
    single = list(data.TrainBatches(n, batch, steps, seed=3))
    ranks = [list(data.TrainBatches(n, batch, steps, rank=r, world_size=world_size, accumulation=accumulation, seed=3))
             for r in range(world_size)]
    for step in range(steps):
        gathered = [key for r in ranks for micro in r[step * accumulation:(step + 1) * accumulation] for key in micro]
        assert gathered == single[step]
    assert all(len(micro) == batch // world_size // accumulation for r in ranks for micro in r)
    sampler = data.TrainBatches(n, batch, steps, rank=0, world_size=world_size, accumulation=accumulation)
    assert len(sampler) == steps * accumulation


def test_an_epoch_shows_no_image_twice_and_drops_the_incomplete_batch():
    n, batch = 50, 8                                         # 6 whole batches an epoch, 2 images left out
    batches = list(data.TrainBatches(n, batch, steps=18))
    orders = []
    for epoch in range(3):
        keys = [key for b in batches[epoch * 6:(epoch + 1) * 6] for key in b]
        assert {e for e, _ in keys} == {epoch} and len({i for _, i in keys}) == 48
        orders.append([i for _, i in keys])
    assert orders[0] != orders[1] and set(orders[0]) != set(orders[1])      # others are left out next time
    assert list(data.TrainBatches(n, batch, steps=18, seed=1)) != batches


def test_resuming_continues_the_same_stream():
    options = dict(rank=1, world_size=2, accumulation=2, seed=4)
    whole = list(data.TrainBatches(50, 8, 20, **options))
    for start in (0, 5, 6, 19, 20):
        rest = data.TrainBatches(50, 8, 20, start_step=start, **options)
        assert list(rest) == whole[2 * start:] and len(rest) == len(whole) - 2 * start


@pytest.mark.parametrize("n,world_size", [(100, 1), (101, 2), (103, 4), (3, 4), (0, 2)])
def test_evaluation_counts_every_image_exactly_once(n, world_size):
    shards = [data.eval_batches(n, 16, r, world_size) for r in range(world_size)]
    assert [i for shard in shards for batch in shard for i in batch] == list(range(n))     # contiguous, in order
    sizes = [sum(map(len, shard)) for shard in shards]
    assert max(sizes) - min(sizes) <= 1 and all(0 < len(batch) <= 16 for shard in shards for batch in shard)


def test_batches_that_cannot_be_are_refused():
    with pytest.raises(engine.UserError, match="--batch-size"):
        data.TrainBatches(10, 16, 1)
    with pytest.raises(ValueError, match="not divisible"):
        data.TrainBatches(100, 16, 1, world_size=3)


# -------------------------------------------------------------------------------------------------------------- CIFAR
def write_cifar(monkeypatch, root, kind, n=20):
    """Small files in the layout of the true ones (which were not at hand): pickles of {data (n, 3072), labels}, a row
    red, then green, then blue. torchvision checks md5 sums, so it is told those of the files written here."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    generator, key = np.random.default_rng(0), "labels" if kind is datasets.CIFAR10 else "fine_labels"
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
    names = [f"class {i}" for i in range(classes)]
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": write(kind.meta["filename"], {kind.meta["key"]: names})})
    return rows


@pytest.mark.parametrize("name,kind", [("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)])
def test_cifar_is_read_from_torchvisions_python_files(monkeypatch, tmp_path, name, kind):
    rows = write_cifar(monkeypatch, tmp_path, kind)
    train = data.open_data(name, "train", data_dir=str(tmp_path))
    val = data.open_data(name, "val", data_dir=str(tmp_path), limit=7)
    assert len(train) == 20 * len(rows["train_list"]) and len(val) == 7 and len(train.classes) == len(val.classes)
    assert train.name == name and train.labels.dtype == torch.int64
    pixels, labels = rows["train_list"][0]
    image, label = train[3]
    assert torch.equal(image, torch.from_numpy(pixels[3].reshape(3, 32, 32))) and label == labels[3]
    assert len(pickle.dumps(train)) < 20_000 and torch.equal(pickle.loads(pickle.dumps(train))[3][0], image)


@pytest.mark.parametrize("name,kind", [("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)])
def test_cifar_with_another_checksum_than_the_published_one_is_refused(monkeypatch, tmp_path, name, kind):
    write_cifar(monkeypatch, tmp_path, kind)
    data.open_data(name, "train", data_dir=str(tmp_path))
    path = tmp_path / kind.base_folder / kind.train_list[0][0]
    contents = bytearray(path.read_bytes())
    contents[1000] ^= 1                                      # one pixel a little brighter or darker
    path.write_bytes(contents)
    with pytest.raises(engine.UserError, match=f"{name} is not in .*, or not complete .*--download"):
        data.open_data(name, "train", data_dir=str(tmp_path))


def test_missing_cifar_says_how_to_get_it(tmp_path):
    with pytest.raises(engine.UserError, match="--download.*cifar-10-python.tar.gz.*--data-dir"):
        data.open_data("cifar10", "train", data_dir=str(tmp_path))


# ------------------------------------------------------------------------------------------------------------ folders
@pytest.fixture
def tree(tmp_path):
    """train/ and val/ with two classes whose names hold a space and an umlaut; colours tell the files apart."""
    root = tmp_path / "my images"
    for split, n in (("train", 4), ("val", 2)):
        for k, name in enumerate(("große Katze", "dog")):
            for i in range(n):
                save(root / split / name / f"bild {i} ü.png", Image.new("RGB", (20, 10), (k * 100, i * 10, 7)))
            (root / split / name / "notes.txt").write_text("no image")
            (root / split / name / "._bild.png").write_text("what a Mac leaves behind")
    return root


def test_a_folder_of_classes_gives_images_and_labels(tree):
    train = data.open_data(str(tree), "train")
    assert train.classes == ["dog", "große Katze"] and len(train) == 8
    assert train.labels.tolist() == [0] * 4 + [1] * 4
    image, label = train[1]
    assert image.shape == (3, 10, 20) and label == 0 and image[:, 0, 0].tolist() == [100, 10, 7]
    assert len(data.open_data(str(tree), "val")) == 4
    assert data.open_data(str(tree), "train", limit=2).labels.tolist() == [0, 1]       # a limit takes from all classes
    assert pickle.loads(pickle.dumps(train))[1][0].equal(image)


def test_without_labels_a_folder_may_have_any_depth(tree, tmp_path):
    assert len(data.open_data(str(tree), "train", labelled=False)) == 8
    assert len(data.open_data(str(tree), "val", labelled=False)) == 4
    one = data.open_data(str(tree), "train", labelled=False)
    assert one[0][1] == -1 and one.labels is None and one.classes is None
    for i in range(41):
        save(tmp_path / "flat" / ("a" if i < 20 else "b/c") / f"{i:02d}.JPG", Image.new("RGB", (8, 8)), format="jpeg")
    train, val = (data.open_data(str(tmp_path / "flat"), split, labelled=False) for split in ("train", "val"))
    assert len(val) == 3 and len(train) == 38 and not set(train.names) & set(val.names)
    assert data.open_data(str(tmp_path / "flat"), "val", labelled=False).names == val.names


def test_without_a_val_folder_a_share_of_train_is_held_out(tmp_path):
    for i in range(3):
        save(tmp_path / "train" / "a" / f"{i}.png", Image.new("RGB", (8, 8)))
    save(tmp_path / "elsewhere.png", Image.new("RGB", (8, 8)))
    train, val = (data.open_data(str(tmp_path), split, labelled=False) for split in ("train", "val"))
    assert len(train) == 2 and len(val) == 1 and all("train" in name for name in train.names + val.names)


def test_one_image_or_a_folder_can_be_opened_for_looking(tree):
    assert len(open_images(tree)) == 12 and open_images(tree).names == sorted(open_images(tree).names)
    one = open_images(tree / "val" / "dog" / "bild 0 ü.png", transforms.EvalTransform(16))
    assert len(one) == 1 and one[0][0].shape == (3, 16, 16) and one[0][1] == -1


def test_every_kind_of_image_becomes_eight_bit_rgb(tmp_path):
    gradient = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    clear = np.zeros((8, 8, 4), np.uint8)                    # transparent, with a colour hidden below
    clear[..., 0] = 200
    clear[:4, :, 3] = 255
    turned = Image.Exif()
    turned[0x0112] = 6                                       # the camera was held upright: turn right by 90 degrees
    red_left = np.zeros((8, 16, 3), np.uint8)
    red_left[:, :8, 0] = 255
    palette = Image.new("RGB", (8, 8), (255, 0, 0)).quantize(4)
    save(tmp_path / "sixteen.png", Image.fromarray(gradient))
    save(tmp_path / "grey.png", Image.new("L", (8, 8), 77))
    save(tmp_path / "greyalpha.png", Image.new("LA", (8, 8), (0, 0)))
    save(tmp_path / "bits.png", Image.new("1", (8, 8), 1))
    save(tmp_path / "alpha.png", Image.fromarray(clear))
    save(tmp_path / "cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100)
    save(tmp_path / "palette.gif", palette)
    save(tmp_path / "upright.jpg", Image.fromarray(red_left), exif=turned, quality=100, subsampling=0)

    def pixel(name, y, x):
        image = read_image(tmp_path / name)
        assert image.dtype == torch.uint8 and image.shape[0] == 3 and image.permute(1, 2, 0).is_contiguous()
        return image[:, y, x].tolist()

    assert pixel("sixteen.png", 7, 0) == [223] * 3           # 57344 of 65535 is 223.1 of 255
    assert pixel("grey.png", 0, 0) == [77] * 3 and pixel("bits.png", 0, 0) == [255] * 3
    assert pixel("greyalpha.png", 0, 0) == [255] * 3         # fully transparent: the white below
    assert pixel("alpha.png", 0, 0) == [200, 0, 0] and pixel("alpha.png", 7, 0) == [255] * 3
    assert pixel("palette.gif", 0, 0) == [255, 0, 0]
    assert np.allclose(pixel("cmyk.jpg", 4, 4), [255, 0, 0], atol=4)
    assert read_image(tmp_path / "upright.jpg").shape == (3, 16, 8)
    assert np.allclose(pixel("upright.jpg", 2, 4), [255, 0, 0], atol=8)      # what was left is now at the top


def test_an_unreadable_image_is_named_with_the_remedy_also_from_a_worker(tree):
    broken = tree / "train" / "dog" / "broken.jpg"
    broken.write_bytes(b"this is no picture")
    ds = data.open_data(str(tree), "train", transforms.EvalTransform(8))
    loader = data.make_loader(ds, data.eval_batches(len(ds), 4), 0, "cpu")
    with pytest.raises(engine.UserError, match="broken.jpg.*remove it"):
        list(loader)
    with pytest.raises(engine.UserError) as caught:
        list(data.make_loader(ds, data.eval_batches(len(ds), 4), 1, "cpu"))
    assert "broken.jpg" in str(caught.value).splitlines()[-1]                # the last line is the sentence
    whole = Image.fromarray(photo(64, 64).permute(1, 2, 0).numpy())
    save(broken, whole)
    broken.write_bytes(broken.read_bytes()[:800])                            # cut off half-way
    with pytest.raises(engine.UserError, match="broken.jpg"):
        read_image(broken)


def test_folders_that_cannot_be_used_say_what_is_missing(tree, tmp_path):
    def message(path, split="train", **options):
        with pytest.raises(engine.UserError) as caught:
            data.open_data(str(path), split, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such folder" in message(tmp_path / "nowhere") and "shapes" in message(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "train/CLASS/*" in message(tmp_path / "empty")
    assert "no image for train" in message(tmp_path / "empty", labelled=False)
    save(tmp_path / "single" / "one.png", Image.new("RGB", (8, 8)))
    assert "2 or more" in message(tmp_path / "single", labelled=False)
    (tree / "train" / "bird").mkdir()
    assert "bird" in message(tree)                           # val has no such class
    (tree / "val" / "bird").mkdir()
    assert "holds no image" in message(tree) and "bird" in message(tree, "val")
    assert "--limit 0" in message("shapes", limit=0)
    with pytest.raises(engine.UserError, match="holds no image"):
        open_images(tmp_path / "empty")
