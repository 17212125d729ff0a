"""Segmentation: transforms of image and label map, UPerNet's shapes and size, loss, windows, scores, and the stage."""
import colorsys
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import log_lines, stage
from PIL import Image
from torch import nn

from support import data, engine
from support.scenes import open_scenes, saturate
import segment
from support.scenes import IGNORE, SegmentTransform, distort, fit_size, read_labels
from support.engine import UserError
from model import IMAGENET_MEAN, PRESETS, ViT, count_parameters, imagenet_normalize
from pretrain import BEiT
from segment import (UPerNet, confusion, layer_of, pixel_cross_entropy, poly_schedule, predict, recipe_for, scores,
                     slide, taps_of, window_starts)

TINY = PRESETS["tiny"]
QUICK = ["--limit", "24", "--batch-size", "8", "--workers", "0", "--amp", "no", "--device", "cpu"]


def small(image_size=48, classes=5, **options):
    """A UPerNet of two blocks' width and four blocks' depth: milliseconds an image."""
    return UPerNet(ViT(image_size, 8, 24, 4, 3, **options), classes, channels=8)


@pytest.fixture
def pretrained(tmp_path):
    """A folder with a pretrain.pt of random weights, as pretrain.py leaves it."""
    model = BEiT(48, 8, TINY["width"], TINY["depth"], TINY["heads"], 64, early_layer=4)
    engine.write_file(tmp_path / "pretrain.pt", dict(
        kind="pretrain", preset="tiny", model=model.state_dict(), epochs=8, classes=None,
        arch=dict(image_size=48, patch_size=8, width=model.width, depth=model.depth, heads=model.heads)))
    return tmp_path


@pytest.fixture
def scenes(tmp_path):
    """A folder in ADE20K's layout: 8 training and 3 validation images of several sizes, 3 classes."""
    for split, count in (("training", 8), ("validation", 3)):
        for kind in ("images", "annotations"):
            (tmp_path / "ade" / kind / split).mkdir(parents=True)
        for i in range(count):
            labels = np.zeros((40 + 9 * i, 90 - 7 * i), dtype=np.uint8)
            labels[5:20], labels[20:30], labels[30:, 10:] = 1, 2, 3
            Image.fromarray(np.stack([60 * labels] * 3, -1)).save(tmp_path / "ade" / "images" / split / f"{i}.jpg")
            Image.fromarray(labels).save(tmp_path / "ade" / "annotations" / split / f"{i}.png")
    return tmp_path / "ade"


# ---------------------------------------------------------------------------------------------------------- the network
@pytest.mark.parametrize("depth, taps", [(12, (3, 5, 7, 11)), (24, (7, 11, 15, 23)), (6, (1, 2, 3, 5))])
def test_taps_lie_a_third_half_two_thirds_and_all_the_way_up(depth, taps):
    assert taps_of(depth) == taps


def on_meta(preset, image_size, classes=150):
    vit = ViT(**PRESETS[preset] | dict(image_size=image_size)).to("meta")
    with torch.device("meta"):
        return UPerNet(vit, classes)


def test_base_has_163_million_parameters_and_maps_of_128_64_32_and_16_at_a_crop_of_512():
    model = on_meta("base", 512)
    assert count_parameters(model) == 163_080_812            # 163 M in the papers' tables, auxiliary head included
    maps = model.maps(torch.zeros(2, 3, 512, 512, device="meta"))
    assert [tuple(x.shape) for x in maps] == [(2, 768, side, side) for side in (128, 64, 32, 16)]
    logits, logits_aux = model(torch.zeros(2, 3, 512, 512, device="meta"))
    assert logits.shape == (2, 150, 128, 128) and logits_aux.shape == (2, 150, 32, 32)


@pytest.mark.slow
def test_large_has_441_million_parameters_at_a_crop_of_640_and_440_at_512():
    assert round(count_parameters(on_meta("large", 640)) / 1e6) == 441       # only the position tables differ
    assert round(count_parameters(on_meta("large", 512)) / 1e6) == 440


def test_parameters_have_the_names_of_the_released_files():
    names = set(small().state_dict())
    assert {"backbone.cls_token", "backbone.blocks.3.attn.relative_position_bias_table", "backbone.fpn1.0.weight",
            "backbone.fpn1.1.running_mean", "backbone.fpn1.3.bias", "backbone.fpn2.0.weight",
            "decode_head.psp_modules.3.1.conv.weight", "decode_head.psp_modules.0.1.bn.bias",
            "decode_head.bottleneck.conv.weight", "decode_head.lateral_convs.2.bn.weight",
            "decode_head.fpn_convs.0.conv.weight", "decode_head.fpn_bottleneck.bn.running_var",
            "decode_head.conv_seg.weight", "auxiliary_head.convs.0.conv.weight", "auxiliary_head.convs.0.bn.weight",
            "auxiliary_head.conv_seg.bias"} <= names
    assert not any("norm." in name for name in names if name.startswith(("backbone.norm", "backbone.fc_norm")))


def test_every_parameter_gets_a_gradient_and_convolutions_have_no_bias():
    model = small()
    logits, logits_aux = model(torch.randn(2, 3, 48, 48))
    (logits.square().mean() + logits_aux.square().mean()).backward()
    assert all(p.grad is not None for p in model.parameters())               # else DDP would wait for it for ever
    biased = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
    assert biased == ["backbone.patch_embed.proj", "decode_head.conv_seg", "auxiliary_head.conv_seg"]
    assert 0.008 < model.auxiliary_head.conv_seg.weight.std().item() < 0.012         # N(0, 0.01)


def test_taps_are_raw_block_outputs_without_cls():
    model = small().eval()
    images = torch.randn(2, 3, 48, 48)
    tokens = model.backbone.features(images, blocks=[model.taps[2]])[0]
    third = model.maps(images)[2]                            # the identity of the pyramid
    torch.testing.assert_close(third[:, :, 2, 5], tokens[:, 1 + 2 * 6 + 5])
    fourth = model.maps(images)[3]
    top = model.backbone.features(images)[-1][:, 1:].unflatten(1, (6, 6))
    torch.testing.assert_close(fourth[:, :, 1, 0], top[:, 2:4, 0:2].flatten(1, 2).amax(dim=1))


@torch.no_grad()
def test_each_level_is_its_lateral_plus_the_coarser_level_and_all_four_are_read_at_the_finest():
    head, seen = small().decode_head.eval(), {}
    maps = [torch.rand(1, 24, side, side) for side in (24, 12, 6, 3)]
    head.bottleneck.register_forward_hook(lambda module, inputs, output: seen.update(pooled=inputs[0], level3=output))
    head.fpn_bottleneck.register_forward_hook(lambda module, inputs, output: seen.update(read=inputs[0]))
    for i, smooth in enumerate(head.fpn_convs):
        smooth.register_forward_hook(lambda module, inputs, output, i=i: seen.update({
            f"level{i}": inputs[0], f"smooth{i}": output}))
    head(maps)
    for i in (0, 1, 2):
        torch.testing.assert_close(seen[f"level{i}"], head.lateral_convs[i](maps[i]) + segment.resize(
            seen[f"level{i + 1}"], maps[i].shape[-2:]))
    four = [segment.resize(seen[name], (24, 24)) for name in ("smooth0", "smooth1", "smooth2", "level3")]
    torch.testing.assert_close(seen["read"], torch.cat(four, dim=1))
    # Pyramid pooling: the map itself, then its mean over the whole map (side 1), which is the same everywhere, ...
    torch.testing.assert_close(seen["pooled"][:, :24], maps[3])
    whole = head.psp_modules[0][1](maps[3].mean(dim=(2, 3), keepdim=True))
    torch.testing.assert_close(seen["pooled"][:, 24:32], whole.expand(-1, -1, 3, 3))


@torch.no_grad()
def test_the_finest_map_is_two_deconvolutions_with_a_norm_and_gelu_between_them():
    model, images = small().eval(), torch.randn(2, 3, 48, 48)
    first, norm, _, second = model.backbone.fpn1
    tap = model.backbone.features(images, blocks=[0])[0][:, 1:].transpose(1, 2).unflatten(2, (6, 6))
    torch.testing.assert_close(model.maps(images)[0], second(F.gelu(norm(first(tap)))))
    tap = model.backbone.features(images, blocks=[1])[0][:, 1:].transpose(1, 2).unflatten(2, (6, 6))
    torch.testing.assert_close(model.maps(images)[1], model.backbone.fpn2[0](tap))


def test_the_pyramid_pools_1_2_3_and_6_regions_a_side_and_dropout_takes_whole_channels():
    model = small()
    assert [pool[0].output_size for pool in model.decode_head.psp_modules] == [1, 2, 3, 6]
    for dropout in (model.decode_head.dropout, model.auxiliary_head.dropout):
        dropped = dropout(torch.ones(4, 200, 3, 3)).flatten(2)
        assert torch.equal(dropped.amin(-1), dropped.amax(-1)) and 0.05 < (dropped == 0).float().mean() < 0.15


def test_images_need_not_be_square():
    model = small(image_size=(32, 56)).eval()
    logits = model(torch.randn(1, 3, 32, 56))
    assert logits.shape == (1, 5, 16, 28)
    assert predict(model, torch.rand(1, 3, 50, 61)).shape == (1, 5, 50, 61)


# -------------------------------------------------------------------------------------------------- loss, rates, groups
def test_ignored_pixels_add_nothing_to_the_loss_but_stay_below_the_line():
    logits, labels = torch.randn(2, 5, 6, 6), torch.randint(5, (2, 6, 6))
    labels[0] = IGNORE
    known = F.cross_entropy(logits[1:], labels[1:])
    torch.testing.assert_close(pixel_cross_entropy(logits, labels), known / 2)
    assert F.cross_entropy(logits, labels, ignore_index=IGNORE) == pytest.approx(known.item())       # torch's mean
    assert pixel_cross_entropy(logits, torch.full_like(labels, IGNORE)) == 0


def test_logits_are_brought_to_the_size_of_the_labels():
    logits = torch.zeros(1, 2, 2, 2)
    logits[:, 0] = 3.0
    assert pixel_cross_entropy(logits, torch.zeros(1, 8, 8, dtype=torch.long)).item() == pytest.approx(
        math.log(1 + math.exp(-3)))


def test_the_rate_is_a_line_to_zero_bent_by_its_warm_up():
    total, warmup = 160_000, 1500
    rates = {step: poly_schedule(step, 5e-5, total, warmup) for step in (0, 750, 1500, 80_000, 159_999)}
    assert rates[0] == 0
    assert rates[750] == pytest.approx(5e-5 * 0.5 * (1 - 750 / total))
    assert rates[1500] == pytest.approx(5e-5 * (1 - 1500 / total))
    assert rates[80_000] == pytest.approx(2.5e-5) and rates[159_999] == pytest.approx(5e-5 / total)
    assert poly_schedule(0, 1.0, 10, 0) == 1.0


@pytest.mark.parametrize("name, layer", [
    ("backbone.cls_token", 0), ("backbone.patch_embed.proj.weight", 0), ("backbone.blocks.0.norm1.weight", 1),
    ("backbone.blocks.11.attn.relative_position_bias_table", 12), ("backbone.fpn1.0.weight", 13),
    ("decode_head.conv_seg.weight", 13), ("auxiliary_head.convs.0.bn.weight", 13)])
def test_the_layer_of_a_parameter_counts_from_the_embeddings_and_pyramid_and_heads_are_on_top(name, layer):
    assert layer_of(name, depth=12) == layer


def test_cls_and_tables_are_decayed_and_vectors_are_not():
    model = small(layer_scale=0.1)
    groups = segment.rate_groups(model, 0.05, 0.75)
    at = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert set(at) == {name for name, _ in model.named_parameters()}
    assert at["backbone.cls_token"] == (pytest.approx(0.75 ** 5), 0.05)
    assert at["backbone.blocks.3.attn.relative_position_bias_table"] == (0.75, 0.05)
    assert at["backbone.blocks.0.gamma_1"] == (pytest.approx(0.75 ** 4), 0.0)
    assert at["backbone.fpn1.0.weight"] == at["decode_head.bottleneck.conv.weight"] == (1.0, 0.05)
    assert at["backbone.fpn1.1.weight"] == at["auxiliary_head.conv_seg.bias"] == (1.0, 0.0)


@pytest.mark.parametrize("preset, init, lr, decay, drop", [
    ("base", "pretrain", 5e-5, 0.75, 0.15), ("base", "21k", 5e-5, 0.85, 0.15),
    ("large", "pretrain", 4e-5, 0.9, 0.2), ("large", "21k", 3e-5, 0.9, 0.2)])
def test_recipes_are_the_papers_table(preset, init, lr, decay, drop):
    row = recipe_for(preset, init)
    assert [row[k] for k in ("lr", "layer_decay", "drop_path")] == [lr, decay, drop]
    common = [row[k] for k in ("batch_size", "steps", "warmup_steps", "weight_decay", "image_size", "jitter")]
    assert common == [16, 160_000, 1500, 0.05, 512, 2.0] and row["distortion"] is True


def test_a_run_cut_short_keeps_its_share_of_warm_up():
    args = segment.parse_args(["--model", "base", "--init", "scratch", "--steps", "1600"])
    assert args.warmup_steps == 15 and args.layer_decay == 1.0
    assert segment.parse_args(["--model", "base", "--init", "scratch"]).warmup_steps == 1500


# -------------------------------------------------------------------------------------------------------------- windows
def test_the_last_window_is_shifted_inwards():
    assert window_starts(512, 512, 341) == [0]
    assert window_starts(513, 512, 341) == [0, 1]
    assert window_starts(853, 512, 341) == [0, 341]
    assert window_starts(2048, 512, 341) == [0, 341, 682, 1023, 1364, 1536]


def test_one_window_that_covers_the_image_is_the_whole_image():
    model, images = small().eval(), torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        whole = F.interpolate(model(images), size=(48, 48), mode="bilinear", align_corners=False)
        torch.testing.assert_close(slide(model, images, (48, 48), (32, 32)), whole)


def test_overlaps_are_averaged_as_logits():
    calls = []

    def numbered(window):                                    # the first window says 1 everywhere, the second 2, ...
        calls.append(window.shape[-2:])
        return torch.full((1, 1, 3, 3), float(len(calls)))
    logits = slide(numbered, torch.zeros(1, 3, 6, 10), (6, 6), (4, 4))
    assert calls == [(6, 6), (6, 6)]
    expected = torch.tensor([1, 1, 1, 1, 1.5, 1.5, 2, 2, 2, 2]).expand(1, 1, 6, 10)
    torch.testing.assert_close(logits, expected)


@torch.no_grad()
def test_windows_lie_two_thirds_of_a_crop_apart_on_an_image_fitted_to_its_shorter_side(monkeypatch):
    seen = []
    monkeypatch.setattr(segment, "slide", lambda model, images, window, stride: (
        seen.append((images, window, stride)), slide(model, images, window, stride))[1])
    images = torch.rand(1, 3, 96, 240)                       # to fit 192 x 48: halved
    predict(small().eval(), images)
    (view, window, stride), = seen
    assert window == (48, 48) and list(stride) == [32, 32] and round(512 * 2 / 3) == 341
    torch.testing.assert_close(view, imagenet_normalize(segment.resize(images, (48, 120))))


@torch.no_grad()
def test_a_prediction_has_the_size_of_its_image_and_sums_to_one_whatever_its_aspect():
    model = small().eval()
    for size in ((48, 48), (30, 200), (300, 20), (77, 61)):  # the second and third are too flat for a window
        for options in ({}, dict(scales=(0.5, 1.25), flip=True)):
            p = predict(model, torch.rand(1, 3, *size), **options)
            assert p.shape == (1, 5, *size)
            torch.testing.assert_close(p.sum(dim=1), torch.ones(1, *size))


@torch.no_grad()
def test_mirroring_the_image_mirrors_the_average_over_both():
    model, image = small().eval(), torch.rand(1, 3, 48, 60)
    torch.testing.assert_close(predict(model, image.flip(-1), flip=True), predict(model, image, flip=True).flip(-1))


# --------------------------------------------------------------------------------------------------------------- scores
def test_scores_are_those_of_a_plain_loop_over_pixels():
    predicted, labels = torch.randint(4, (3, 9, 9)), torch.randint(4, (3, 9, 9))         # no pixel of class 4 of 5
    labels[torch.rand(labels.shape) < 0.2] = IGNORE
    hit, either, of_class, right, known = [0] * 5, [0] * 5, [0] * 5, 0, 0
    for p, t in zip(predicted.flatten().tolist(), labels.flatten().tolist()):
        if t == IGNORE:
            continue
        known, right = known + 1, right + (p == t)
        for c in range(5):
            hit[c] += p == c and t == c
            either[c] += p == c or t == c
            of_class[c] += t == c
    figures, iou, acc = scores(sum(confusion(p, t, 5) for p, t in zip(predicted, labels)), background=True)
    expected = [100 * hit[c] / either[c] for c in range(4)]
    assert figures["miou"] == pytest.approx(sum(expected) / 4) and iou[:4].tolist() == pytest.approx(expected)
    assert figures["miou_objects"] == pytest.approx(sum(expected[1:]) / 3) and math.isnan(iou[4])
    assert figures["m_acc"] == pytest.approx(sum(100 * hit[c] / of_class[c] for c in range(4)) / 4)
    assert figures["a_acc"] == pytest.approx(100 * right / known)


# ----------------------------------------------------------------------------------------------------------- transforms
def test_images_fit_into_the_long_and_the_short_side():
    assert fit_size(480, 640, 2048, 512) == (512, 683)
    assert fit_size(100, 1000, 2048, 512) == (205, 2048)
    assert fit_size(683, 512, 1024, 256) == (342, 256)


def two_halves(height, width, left=3):
    labels = torch.full((height, width), left, dtype=torch.uint8)
    labels[:, width // 2:] = 7
    return labels


def test_crops_on_one_class_are_drawn_again():
    labels = torch.zeros(40, 400, dtype=torch.uint8)
    labels[:, 200:] = 1
    transform, crops = SegmentTransform(40, cat_max=0.75), []
    for i in range(50):
        engine.seed_all(i)
        top, left = transform.draw(labels)
        crops.append(labels[top:top + 40, left:left + 40].float().mean().item())
    share = sum(0.25 < crop < 0.75 for crop in crops) / 50
    assert share > 0.25                                      # 19 of 361 places fit: 0.05 by one draw, 0.4 by ten


def test_images_are_resized_by_half_to_double_before_the_crop():
    transform, sides = SegmentTransform(48), []
    monitor = transform.draw
    transform.draw = lambda labels: (sides.append(labels.shape[0]), monitor(labels))[1]
    for i in range(200):
        engine.seed_all(i)
        transform(torch.zeros(3, 48, 96, dtype=torch.uint8), two_halves(48, 96))
    assert 24 <= min(sides) < 28 and 92 < max(sides) <= 96 and 54 < np.mean(sides) < 66


@pytest.mark.parametrize("counts, varied", [
    ({0: 75, 1: 25}, False), ({0: 74, 1: 26}, True), ({0: 100}, False), ({0: 30, IGNORE: 70}, False),
    ({0: 30, 1: 20, IGNORE: 50}, True), ({0: 40, 1: 10, IGNORE: 50}, False), ({IGNORE: 100}, False)])
def test_a_varied_crop_has_two_classes_and_none_on_three_quarters_of_its_labelled_pixels(counts, varied):
    labels = torch.cat([torch.full((n,), c, dtype=torch.uint8) for c, n in counts.items()])
    assert SegmentTransform(10).varied(labels.view(10, 10)) == varied


def test_distortion_keeps_range_size_and_kind_and_changes_the_picture():
    image, changed = torch.randint(256, (3, 20, 30), dtype=torch.uint8), 0
    for i in range(40):
        engine.seed_all(i)
        out = distort(image)
        assert out.dtype == torch.uint8 and out.shape == image.shape
        changed += not torch.equal(out, image)
    assert 30 <= changed < 40                                # all four stay away once in sixteen times
    grey = torch.full((3, 5, 5), 120, dtype=torch.uint8)
    for i in range(20):                                      # grey has no hue and no saturation to change
        engine.seed_all(i)
        out = distort(grey).float()
        assert (out.amax(dim=0) - out.amin(dim=0)).max() <= 1


def test_hue_moves_by_a_tenth_of_the_circle_at_most():
    image, hues = torch.tensor([140, 110, 80], dtype=torch.uint8).view(3, 1, 1), []
    for i in range(300):
        engine.seed_all(i)
        hues.append(360 * colorsys.rgb_to_hsv(*(distort(image).flatten() / 255).tolist())[0] % 360)
    moved = [(hue - 30 + 180) % 360 - 180 for hue in hues]   # from 30 degrees; 18 of 180 steps are 36
    assert -41 < min(moved) < -25 and 25 < max(moved) < 41


def test_saturation_is_that_of_hsv_and_stops_at_full_colour():
    image, factor = torch.rand(3, 4, 5), 1.4
    out = saturate(image, factor)
    for pixel, changed in zip(image.flatten(1).T.tolist(), out.flatten(1).T.tolist()):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        assert changed == pytest.approx(colorsys.hsv_to_rgb(h, min(1, factor * s), v), abs=1e-5)


def test_image_and_labels_move_alike_and_nothing_but_the_image_is_distorted():
    labels = two_halves(60, 90)
    image = (30 * labels)[None].expand(3, -1, -1)
    for i in range(20):
        engine.seed_all(i)
        out, target = SegmentTransform(48, jitter=2.0, distortion=False)(image, labels)
        assert out.shape == (3, 48, 48) and target.shape == (48, 48) and out.dtype == target.dtype == torch.uint8
        assert set(target.unique().tolist()) <= {3, 7, IGNORE}
        known = target != IGNORE
        agree = (out[0][known].float() / 30 - target[known].float()).abs() < 0.1
        assert agree.float().mean() > 0.9                    # bilinear against nearest along the one edge
        engine.seed_all(i)
        distorted, same = SegmentTransform(48, jitter=2.0)(image, labels)
        assert torch.equal(same, target)


def test_padding_lies_right_and_below_with_the_mean_colour_and_no_label():
    image, labels = torch.zeros(3, 30, 40, dtype=torch.uint8), two_halves(30, 40)
    out, target = SegmentTransform(48, distortion=False).pad(image, labels)
    assert torch.equal(target[:30, :40], labels) and (out[:, :30, :40] == 0).all()
    assert (target[30:] == IGNORE).all() and (target[:, 40:] == IGNORE).all()
    padded = imagenet_normalize(data.to_float(out[None], torch.device("cpu")))[0]
    assert padded[:, 30:].abs().max() < 0.01 and padded[:, :, 40:].abs().max() < 0.01    # 0 but for bytes
    assert out[:, 40, 40].tolist() == [round(255 * m) for m in IMAGENET_MEAN]


def test_shapes_have_a_background_and_the_class_of_each_object_plus_one():
    scenes = open_scenes("shapes", "val", limit=10)
    assert len(scenes) == 10 and len(scenes.classes) == 11 and scenes.classes[0] == "background"
    for i in range(10):
        image, labels = scenes[i]
        assert image.shape == (3, 48, 48) and labels.dtype == torch.uint8
        assert labels.unique().tolist() == [0, int(scenes.shapes.labels[i]) + 1]


def test_ade_labels_shift_by_one_and_0_and_255_are_ignored(tmp_path):
    numbers = np.array([[0, 1, 2], [150, 255, 7]], dtype=np.uint8)
    Image.fromarray(numbers).save(tmp_path / "a.png")
    assert read_labels(tmp_path / "a.png", 150).tolist() == [[255, 0, 1], [149, 255, 6]]
    with pytest.raises(UserError, match="a.png holds label 150, but there are 149 classes"):
        read_labels(tmp_path / "a.png", 149)


def test_a_folder_gives_pairs_and_a_sample_is_a_function_of_seed_epoch_and_index(scenes):
    train = open_scenes(scenes, "train", SegmentTransform(48), classes=3)
    assert len(train) == 8 and train.classes == ["class 1", "class 2", "class 3"]
    one, again, other = train[2, 5], train[2, 5], train[3, 5]
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1]) and not torch.equal(one[0], other[0])
    assert len(open_scenes(scenes, "val", classes=3, limit=2)) == 2
    (scenes / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n2\tbuilding, edifice\n3\tsky\n")
    assert open_scenes(scenes, "val", classes=3).classes == ["wall", "building", "sky"]
    (scenes / "objectInfo150.txt").write_bytes(b"Idx\tName\n1\tcaf\xe9\n2\tb\n3\tc\n")           # not UTF-8
    assert open_scenes(scenes, "val", classes=3).classes == ["class 1", "class 2", "class 3"]


def test_a_folder_gives_every_image_once_and_a_limit_spreads_over_all(scenes):
    def names(limit=None):
        return [path.decode()[-5:] for path in open_scenes(str(scenes), "train", classes=3, limit=limit).paths]
    assert names() == [f"{i}.jpg" for i in range(8)] and names(3) == ["0.jpg", "4.jpg", "7.jpg"]


# ------------------------------------------------------------------------------------------------------------ the stage
def figures(path):
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "time")} for line in log_lines(path)[1:]]


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_killed_run_started_again_ends_with_the_same_bits_and_log(pretrained, monkeypatch, capsys):
    flags = QUICK + ["--steps", "5", "--log-every", "1", "--save-every", "2", "--micro-batch", "4", "--jitter", "1.5",
                     "--drop-path", "0.3", "--checkpoint", str(pretrained / "pretrain.pt")]
    whole, parts = pretrained / "whole", pretrained / "parts"
    segment.main(flags + ["--out", str(whole)])
    assert "BatchNorm sees 4 of its 8 images" in capsys.readouterr().out

    save = engine.save_resume

    def save_and_die(*args):
        save(*args)
        raise Killed
    monkeypatch.setattr(engine, "save_resume", save_and_die)
    for _ in range(2):                                       # killed after 2 and after 4 of 5 steps
        with pytest.raises(Killed):
            segment.main(flags + ["--out", str(parts)])
    segment.main(flags + ["--out", str(parts)])
    one, two = (engine.read_file(folder / "segment.pt") for folder in (whole, parts))
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
    assert figures(whole / "segment.jsonl") == figures(parts / "segment.jsonl")
    assert not (parts / "segment.resume.pt").exists()


def test_a_run_does_not_go_on_with_other_classes(scenes, tmp_path):
    flags = [*QUICK, "--batch-size", "4", "--init", "scratch", "--data", str(scenes), "--classes", "3"]
    args = segment.parse_args([*flags, "--out", str(tmp_path)])
    args.micro_batch = args.batch_size
    engine.save_resume("segment", args, engine.describe_run("segment", args) | dict(classes=["a", "b", "c"], step=1))
    with pytest.raises(UserError, match="classes of .*ade are no longer those of the run in .*: restore .* --fresh"):
        segment.main([*flags, "--out", str(tmp_path)])


def test_a_run_of_few_epochs_keeps_the_share_of_warm_up(tmp_path, monkeypatch):
    seen, scratch = [], ["--init", "scratch", "--out", str(tmp_path)]

    def look(step, base, total, warmup):
        seen.append((total, warmup))
        raise Killed
    monkeypatch.setattr(segment, "poly_schedule", look)
    for flags in (["--epochs", "10"], ["--steps", "30"], ["--epochs", "10", "--warmup-steps", "7"]):
        with pytest.raises(Killed):
            segment.main([*QUICK, *scratch, *flags])
    assert seen == [(30, 3), (30, 3), (30, 7)]               # 24 images, 8 a step; a tenth for tiny


def test_the_auxiliary_loss_counts_four_tenths(tmp_path):
    segment.main([*QUICK, "--init", "scratch", "--steps", "1", "--log-every", "1", "--out", str(tmp_path)])
    line = next(line for line in log_lines(tmp_path / "segment.jsonl") if "loss_aux" in line)
    assert line["loss"] == pytest.approx(line["loss_main"] + 0.4 * line["loss_aux"], abs=1e-5) and line["loss_aux"] > 1


@pytest.mark.slow
def test_the_script_lowers_the_loss_and_its_file_says_what_it_is(pretrained, capsys):
    flags = [*QUICK, "--out", pretrained, "--steps", 12, "--log-every", 1]
    done = stage("segment.py", *flags)
    lines = log_lines(pretrained / "segment.jsonl")
    losses = [line["loss_main"] for line in lines if "lr" in line]
    assert losses[0] == pytest.approx(math.log(11), abs=0.2) and sum(losses[-3:]) / 3 < losses[0] - 0.1
    assert all(line["loss"] == pytest.approx(line["loss_main"] + 0.4 * line["loss_aux"], abs=1e-5)
               for line in lines if "lr" in line)
    summary = json.loads(done.stdout.splitlines()[-1])
    assert {"miou", "m_acc", "a_acc", "miou_objects"} <= summary.keys() and summary["summary"] == 1
    assert lines[-1]["miou"] == pytest.approx(summary["miou"], abs=1e-3) and set(lines[-1]["iou"]) >= {"background"}
    file = engine.read_file(pretrained / "segment.pt", kind="segment")
    assert len(file["classes"]) == 11 and file["preset"] == "tiny" and file["arch"]["channels"] == 64
    with Image.open(pretrained / "segment.png") as picture:
        assert picture.size[0] > 1000

    flags = [str(flag) for flag in flags]
    with pytest.raises(SystemExit) as finished:              # the same command again
        segment.main(flags)
    assert finished.value.code == 0 and "already done" in capsys.readouterr().out
    result = segment.main([*QUICK, "--out", str(pretrained), "--eval"])
    assert result == pytest.approx(file["result"])
    before = log_lines(pretrained / "segment_eval.jsonl")
    assert segment.main([*QUICK, "--limit", "4", "--out", str(pretrained), "--eval", "--multi-scale"])["a_acc"] > 0
    lines = log_lines(pretrained / "segment_eval.jsonl")     # the second measurement is added to the first
    assert lines[:len(before)] == before and ["args" in line for line in lines] == [True, False, True, False]
    with pytest.raises(UserError, match="--image-size 64: .* reads windows of 48 px"):
        segment.main([*QUICK, "--out", str(pretrained), "--eval", "--image-size", "64"])
    with pytest.raises(UserError, match="is a segmenter already"):
        segment.main([*QUICK, "--out", str(pretrained / "new"), "--checkpoint", str(pretrained / "segment.pt")])


@pytest.mark.slow
def test_a_folder_trains_and_its_images_of_all_sizes_count_once(scenes, tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(segment, "scores", lambda matrix, *rest: counted.append(matrix) or scores(matrix, *rest))
    result = segment.main([*QUICK, "--batch-size", "4", "--data", str(scenes), "--classes", "3", "--init", "scratch",
                           "--steps", "2", "--out", str(tmp_path / "out"), "--jitter", "2"])
    pixels = sum((40 + 9 * i) * (90 - 7 * i) for i in range(3))
    known = sum(int((open_scenes(scenes, "val", classes=3)[i][1] != IGNORE).sum()) for i in range(3))
    assert known < pixels and counted[-1].sum() == known and 0 <= result["miou"] <= 100
    again = segment.main([*QUICK, "--data", str(scenes), "--eval", "--out", str(tmp_path / "out")])
    assert again == pytest.approx(result)                    # --classes is read from the file
    with pytest.raises(UserError, match="knows 3 classes, shapes has 11"):
        segment.main([*QUICK, "--eval", "--out", str(tmp_path / "out")])


@pytest.mark.slow
def test_two_processes_start_as_one_does_and_agree_on_their_statistics(pretrained):
    run = [*QUICK, "--limit", 33, "--steps", 3, "--log-every", 1, "--drop-path", 0]
    run += ["--checkpoint", pretrained / "pretrain.pt"]
    for name, processes in (("one", 1), ("two", 2)):
        stage("segment.py", *run, "--out", pretrained / name, processes=processes)
    one, two = ([line["loss"] for line in log_lines(pretrained / name / "segment.jsonl") if "lr" in line]
                for name in ("one", "two"))
    assert one != two and two == pytest.approx(one, rel=0.1)         # of the first half of each batch in place of all
    two = engine.read_file(pretrained / "two" / "segment.pt")
    assert all(torch.isfinite(v).all() for v in two["model"].values())
    # Evaluation alone: rank 0's file, so equal figures only if the ranks had equal statistics.
    again = segment.main([*map(str, run[:-2]), "--eval", "--out", str(pretrained / "two")])
    assert again == pytest.approx(two["result"], abs=1e-3)


# --------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("flags, sentence", [
    ([], "there is no file .*pretrain.pt; make it with python pretrain.py"),
    (["--init", "21k"], "there is no file .*finetune_21k.pt; make it with python finetune.py --intermediate --model"),
    (["--init", "scratch", "--checkpoint", "x.pt"], "leave out --checkpoint"),
    (["--init", "scratch", "--model", "huge"], "--model huge"),
    (["--init", "scratch", "--image-size", "50"], "50x50 is not a multiple of the patch size 8"),
    (["--init", "scratch", "--image-size", "8"], "1x1 patches is too small"),
    (["--init", "scratch", "--jitter", "0.5"], "--jitter must lie in"),
    (["--init", "scratch", "--multi-scale"], "--multi-scale belongs to --eval"),
    (["--eval"], "there is no file .*segment.pt; make it with python segment.py"),
    (["--init", "scratch", "--data", "/nowhere"], "/nowhere"),
    (["--init", "scratch", "--data", "cifar10"], "cifar10: these images have no label maps"),
    (["--init", "scratch", "--classes", "5"], "shapes have 11"),
    (["--init", "scratch", "--limit", "4"], "4 training images do not fill"),
    (["--init", "scratch", "--micro-batch", "1"], "BatchNorm needs two images"),
])
def test_mistakes_are_one_sentence(tmp_path, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        segment.main(QUICK + ["--out", str(tmp_path)] + flags)
    assert not (tmp_path / "segment.pt").exists()


def test_annotations_that_do_not_fit_are_one_sentence(scenes):
    image, target = scenes / "images" / "training" / "3.jpg", scenes / "annotations" / "training" / "3.png"
    with pytest.raises(UserError, match="holds label 3, but there are 2 classes: give --classes"):
        open_scenes(scenes, "train", classes=2)[3]
    with Image.open(target) as picture:
        Image.new("L", (5, 6)).save(target)
        with pytest.raises(UserError, match="3.png is 5x6, its image .*3.jpg 69x67"):
            open_scenes(scenes, "train", classes=3)[3]
        picture.convert("RGB").save(target)
    with pytest.raises(UserError, match="pixels of kind RGB"):
        open_scenes(scenes, "train", classes=3)[3]
    target.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot read the annotation"):
        open_scenes(scenes, "train", classes=3)[3]
    target.unlink()
    with pytest.raises(UserError, match="there is no annotation .*3.png for .*3.jpg"):
        open_scenes(scenes, "train", classes=3)
    assert image.exists()
    with pytest.raises(UserError, match="holds no image: label maps want ADE20K's layout"):
        open_scenes(scenes / "images", "train")


def test_checkpoints_of_another_kind_or_size_are_refused(pretrained):
    out = ["--out", str(pretrained)]
    with pytest.raises(UserError, match="is no classifier: use --init pretrain"):
        segment.main(QUICK + out + ["--init", "21k", "--checkpoint", str(pretrained / "pretrain.pt")])
    with pytest.raises(UserError, match="is no segmenter"):
        segment.main(QUICK + out + ["--eval", "--checkpoint", str(pretrained / "pretrain.pt")])
    with pytest.raises(UserError, match="width 128, --model base has 768"):
        segment.main(QUICK + out + ["--model", "base"])
    with pytest.raises(UserError, match="--patch-size 16"):
        segment.main(QUICK + out + ["--patch-size", "16"])
    engine.write_file(pretrained / "classifier.pt", dict(model=ViT(**TINY, num_classes=4).state_dict()))
    with pytest.raises(UserError, match="is a classifier: start with --init 21k"):
        segment.main(QUICK + out + ["--checkpoint", str(pretrained / "classifier.pt")])


def test_the_backbone_comes_from_the_file_with_its_tables_resized_to_the_crop(pretrained):
    args = segment.parse_args(["--out", str(pretrained), "--image-size", "64"])
    model, report = segment.build(args, classes=11)
    assert model.backbone.grid == (8, 8) and not report.missing
    source = engine.read_file(pretrained / "pretrain.pt")["model"]
    assert torch.equal(model.backbone.blocks[2].mlp.fc1.weight, source["blocks.2.mlp.fc1.weight"])
    assert model.backbone.blocks[0].attn.relative_position_bias_table.shape == (15 * 15 + 3, TINY["heads"])


def test_a_mistake_exits_with_code_2_and_no_traceback(tmp_path):
    done = stage("segment.py", "--out", tmp_path, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "pretrain.pt" in done.stderr


def test_dry_run_needs_neither_data_nor_checkpoint(tmp_path, capsys):
    assert segment.main(["--data", "/nowhere", "--dry-run", "--out", str(tmp_path)]) is None
    assert "layer_decay        0.75" in capsys.readouterr().out
    assert segment.main(["--init", "21k", "--data", "/nowhere", "--dry-run", "--out", str(tmp_path)]) is None
    assert "finetune_21k.pt" in capsys.readouterr().out
