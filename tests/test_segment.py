"""Segmentation: loss, rates, windows, scores, and the stage as a whole."""
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, log_lines, stage
from PIL import Image

import segment
from model import PRESETS, ViT, imagenet_normalize
from pretrain import BEiT
from segment import (
    UPerNet, confusion, layer_of, pixel_cross_entropy, poly_schedule, predict, scores, slide,
    window_starts)
from support import data
from support.files import UserError, read_file, write_file
from support.process import Process
from support.run import Run
from support.scenes import IGNORE, bands, open_scenes

TINY = PRESETS["tiny"]
QUICK = ["--limit", "24", "--batch-size", "8", "--workers", "0", "--amp", "no", "--device", "cpu"]
SCRATCH = ["--init", "scratch"]


def small(**options):
    """A UPerNet of width 24 and four blocks: milliseconds an image."""
    return UPerNet(ViT(48, 8, 24, 4, 3, **options), classes=5, channels=8)


@pytest.fixture
def pretrained(tmp_path):
    """A folder with a pretrain.pt of random weights, as pretrain.py leaves it."""
    model = BEiT(48, 8, TINY["width"], TINY["depth"], TINY["heads"], 64, early_layer=4)
    write_file(tmp_path / "pretrain.pt", dict(
        kind="pretrain", preset="tiny", model=model.state_dict(), epochs=8, arch=model.arch()))
    return tmp_path


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


# --- loss, rates, groups --------------------------------------------------------------------------
def test_ignored_pixels_add_nothing_to_the_loss_but_stay_below_the_line():
    logits = torch.randn(2, 5, 6, 6)
    labels = torch.randint(5, (2, 6, 6))
    labels[0] = IGNORE
    known = F.cross_entropy(logits[1:], labels[1:])
    torch.testing.assert_close(pixel_cross_entropy(logits, labels), known / 2)
    torch_mean = F.cross_entropy(logits, labels, ignore_index=IGNORE)
    assert torch_mean == pytest.approx(known.item())
    assert pixel_cross_entropy(logits, torch.full_like(labels, IGNORE)) == 0


def test_logits_are_brought_to_the_size_of_the_labels():
    logits = torch.zeros(1, 2, 2, 2)
    logits[:, 0] = 3.0
    loss = pixel_cross_entropy(logits, torch.zeros(1, 8, 8, dtype=torch.long))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-3)))


def test_the_rate_is_a_line_to_zero_bent_by_its_warm_up():
    total, warmup = 160_000, 1500
    steps = (0, 750, 1500, 80_000, 159_999)
    rates = {step: poly_schedule(step, 5e-5, total, warmup) for step in steps}
    assert rates[0] == 0
    assert rates[750] == pytest.approx(5e-5 * 0.5 * (1 - 750 / total))
    assert rates[1500] == pytest.approx(5e-5 * (1 - 1500 / total))
    assert rates[80_000] == pytest.approx(2.5e-5)
    assert rates[159_999] == pytest.approx(5e-5 / total)
    assert poly_schedule(0, 1.0, 10, 0) == 1.0


@pytest.mark.parametrize("name, layer", [
    ("backbone.cls_token", 0), ("backbone.patch_embed.proj.weight", 0),
    ("backbone.blocks.0.norm1.weight", 1),
    ("backbone.blocks.11.attn.relative_position_bias_table", 12), ("backbone.fpn1.0.weight", 13),
    ("decode_head.conv_seg.weight", 13), ("auxiliary_head.convs.0.bn.weight", 13)])
def test_the_layer_of_a_parameter_counts_from_the_embeddings_and_pyramid_and_heads_are_on_top(
        name, layer):
    assert layer_of(name, depth=12) == layer


def test_cls_and_tables_are_decayed_and_vectors_are_not():
    model = small(layer_scale=0.1)
    at = {}
    for group in segment.rate_groups(model, 0.05, 0.75):
        for name in group["names"]:
            at[name] = group["lr_scale"], group["weight_decay"]
    assert set(at) == {name for name, _ in model.named_parameters()}
    assert at["backbone.cls_token"] == (pytest.approx(0.75 ** 5), 0.05)
    assert at["backbone.blocks.3.attn.relative_position_bias_table"] == (0.75, 0.05)
    assert at["backbone.blocks.0.gamma_1"] == (pytest.approx(0.75 ** 4), 0.0)
    assert at["backbone.fpn1.0.weight"] == (1.0, 0.05)
    assert at["decode_head.bottleneck.conv.weight"] == (1.0, 0.05)
    assert at["backbone.fpn1.1.weight"] == (1.0, 0.0)
    assert at["auxiliary_head.conv_seg.bias"] == (1.0, 0.0)


@pytest.mark.parametrize("preset, init, lr, decay, drop", [
    ("base", "pretrain", 5e-5, 0.75, 0.15), ("base", "21k", 5e-5, 0.85, 0.15),
    ("large", "pretrain", 4e-5, 0.9, 0.2), ("large", "21k", 3e-5, 0.9, 0.2)])
def test_recipes_are_the_papers_table(preset, init, lr, decay, drop):
    args = segment.parse_args(["--model", preset, "--init", init])
    assert (args.lr, args.layer_decay, args.drop_path) == (lr, decay, drop)
    assert (args.batch_size, args.steps, args.weight_decay) == (16, 160_000, 0.05)
    assert (args.image_size, args.jitter, args.distortion) == (512, 2.0, True)
    assert args.warmup_share * args.steps == 1500


def test_from_random_weights_all_layers_learn_at_one_rate():
    assert segment.parse_args(["--model", "base", *SCRATCH]).layer_decay == 1.0


@pytest.mark.parametrize("flags, expected", [
    ([], (160_000, 1500)), (["--steps", "1600"], (1600, 15)),
    (["--epochs", "10"], (10_000, 94)),                      # 16,000 images, 16 per step
    (["--epochs", "10", "--warmup-steps", "7"], (10_000, 7))])
def test_a_run_cut_short_keeps_its_share_of_warm_up(flags, expected):
    args = segment.parse_args(["--model", "base", *SCRATCH, *flags])
    assert data.resolve_steps(args, 16_000)[:2] == expected


# --- windows --------------------------------------------------------------------------------------
def test_the_last_window_is_shifted_inwards():
    assert window_starts(512, 512, 341) == [0]
    assert window_starts(513, 512, 341) == [0, 1]
    assert window_starts(853, 512, 341) == [0, 341]
    assert window_starts(2048, 512, 341) == [0, 341, 682, 1023, 1364, 1536]


@torch.no_grad()
def test_one_window_that_covers_the_image_is_the_whole_image():
    model = small().eval()
    images = torch.randn(2, 3, 48, 48)
    whole = F.interpolate(model(images), size=(48, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(slide(model, images, (48, 48), (32, 32)), whole)


def test_overlaps_are_averaged_as_logits():
    calls = []

    def numbered(window):                    # the first window says 1 everywhere, the second 2
        calls.append(window.shape[-2:])
        return torch.full((1, 1, 3, 3), float(len(calls)))
    logits = slide(numbered, torch.zeros(1, 3, 6, 10), (6, 6), (4, 4))
    assert calls == [(6, 6), (6, 6)]
    expected = torch.tensor([1, 1, 1, 1, 1.5, 1.5, 2, 2, 2, 2]).expand(1, 1, 6, 10)
    torch.testing.assert_close(logits, expected)


@torch.no_grad()
def test_windows_lie_two_thirds_of_a_crop_apart_on_an_image_fitted_to_its_shorter_side(
        monkeypatch):
    seen = []

    def note(model, images, window, stride):
        seen.append((images, window, stride))
        return slide(model, images, window, stride)
    monkeypatch.setattr(segment, "slide", note)
    images = torch.rand(1, 3, 96, 240)                       # to fit 192 x 48: halved
    list(predict(small().eval(), images))
    (view, window, stride), = seen
    assert window == (48, 48)
    assert list(stride) == [32, 32]
    assert round(512 * 2 / 3) == 341
    halved = segment.resize(images, (48, 120))
    torch.testing.assert_close(view, imagenet_normalize(halved))


@torch.no_grad()
@pytest.mark.parametrize("size", [(48, 48), (30, 200), (300, 20), (77, 61)])
@pytest.mark.parametrize("options", [{}, dict(scales=(0.5, 1.25), flip=True)])
def test_a_prediction_has_the_size_of_its_image_and_sums_to_one_whatever_its_aspect(size, options):
    # The second and third size are too flat for a window.
    p = torch.cat(list(predict(small().eval(), torch.rand(1, 3, *size), **options)), dim=2)
    assert p.shape == (1, 5, *size)
    torch.testing.assert_close(p.sum(dim=1), torch.ones(1, *size))


@torch.no_grad()
def test_windows_need_not_be_square():
    model = UPerNet(ViT((32, 56), 8, 24, 4, 3), classes=5, channels=8).eval()
    band, = predict(model, torch.rand(1, 3, 50, 61))
    assert band.shape == (1, 5, 50, 61)


@torch.no_grad()
def test_mirroring_the_image_mirrors_the_average_over_both():
    model = small().eval()
    image = torch.rand(1, 3, 48, 60)
    p, = predict(model, image, flip=True)
    of_mirrored, = predict(model, image.flip(-1), flip=True)
    torch.testing.assert_close(of_mirrored, p.flip(-1))


@torch.no_grad()
@pytest.mark.parametrize("size", [(48, 60), (150, 101), (31, 200), (1, 1)])
@pytest.mark.parametrize("multi_scale", [False, True])
def test_bands_of_a_prediction_put_together_are_the_prediction_at_once(
        monkeypatch, size, multi_scale):
    model = small().eval()
    images = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
    options = dict(scales=segment.SCALES, flip=True) if multi_scale else {}
    whole, = predict(model, images / 255, **options)
    called = segment.name_pixels(model, images, Process(), multi_scale)
    assert torch.equal(called.long(), whole.argmax(dim=1))
    monkeypatch.setattr(segment, "bands", lambda size, depth: bands(size, depth, most=7000))
    parts = list(predict(model, images / 255, **options))
    assert len(parts) > 1 or size == (1, 1)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, atol=1e-6, rtol=1e-5)
    assert torch.equal(segment.name_pixels(model, images, Process(), multi_scale), called)


@pytest.mark.parametrize("side, multi_scale, megabytes", [(1000, False, 450), (600, True, 600)])
def test_a_prediction_holds_the_logits_of_all_pixels_once_or_never(side, multi_scale, megabytes):
    # 150 numbers a pixel are 600 and 216 MB. Only several views need them, to be added up.
    code = f"""
import resource, torch, segment
from model import ViT
from support.process import Process
torch.set_num_threads(1)
model = segment.UPerNet(ViT(48, 8, 24, 4, 3), 150, channels=8).eval()
images = torch.zeros(1, 3, {side}, {side}, dtype=torch.uint8)
segment.name_pixels(model, images[:, :, :100, :100], Process())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
segment.name_pixels(model, images, Process(), {multi_scale})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert float(done.stdout) < megabytes, done.stderr


# --- scores ---------------------------------------------------------------------------------------
def test_scores_are_those_of_a_plain_loop_over_pixels():
    predicted = torch.randint(4, (3, 9, 9))
    labels = torch.randint(4, (3, 9, 9))                     # no pixel of class 4 of 5
    labels[torch.rand(labels.shape) < 0.2] = IGNORE
    hit, either, of_class = [0] * 5, [0] * 5, [0] * 5
    right = known = 0
    for p, t in zip(predicted.flatten().tolist(), labels.flatten().tolist(), strict=True):
        if t == IGNORE:
            continue
        known += 1
        right += p == t
        for c in range(5):
            hit[c] += p == c and t == c
            either[c] += p == c or t == c
            of_class[c] += t == c
    matrix = sum(confusion(p, t, 5) for p, t in zip(predicted, labels, strict=True))
    figures, iou, acc = scores(matrix, background=True)
    expected = [100 * hit[c] / either[c] for c in range(4)]
    recall = [100 * hit[c] / of_class[c] for c in range(4)]
    assert iou[:4].tolist() == pytest.approx(expected)
    assert acc[:4].tolist() == pytest.approx(recall)
    assert math.isnan(iou[4])
    assert figures["miou"] == pytest.approx(sum(expected) / 4)
    assert figures["miou_objects"] == pytest.approx(sum(expected[1:]) / 3)
    assert figures["m_acc"] == pytest.approx(sum(recall) / 4)
    assert figures["a_acc"] == pytest.approx(100 * right / known)


# --- the stage ------------------------------------------------------------------------------------
def figures(path):
    """The log without its clocks, and without the first line, which holds the arguments."""
    return [{name: value for name, value in line.items() if name not in ("images_per_s", "time")}
            for line in log_lines(path)[1:]]


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_killed_run_started_again_ends_with_the_same_bits_and_log(
        pretrained, monkeypatch, capsys):
    flags = [*QUICK, "--steps", "5", "--log-every", "1", "--save-every", "2", "--micro-batch", "4",
             "--jitter", "1.5", "--drop-path", "0.3",
             "--checkpoint", str(pretrained / "pretrain.pt")]
    whole = pretrained / "whole"
    parts = pretrained / "parts"
    segment.main([*flags, "--out", str(whole)])
    assert "BatchNorm sees 4 of the 8 images" in capsys.readouterr().out

    save = Run.save

    def save_and_die(run):
        save(run)
        raise Killed
    monkeypatch.setattr(Run, "save", save_and_die)
    for _ in range(2):                       # killed after 2 and after 4 of 5 steps
        with pytest.raises(Killed):
            segment.main([*flags, "--out", str(parts)])
    segment.main([*flags, "--out", str(parts)])
    one = read_file(whole / "segment.pt")["model"]
    two = read_file(parts / "segment.pt")["model"]
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert figures(whole / "segment.jsonl") == figures(parts / "segment.jsonl")
    assert not (parts / "segment.resume.pt").exists()


def test_a_run_does_not_go_on_with_other_classes(scenes, tmp_path, monkeypatch):
    flags = [*QUICK, *SCRATCH, "--batch-size", "4", "--save-every", "1", "--steps", "2",
             "--data", str(scenes), "--classes", "3", "--out", str(tmp_path)]
    save = Run.save

    def save_and_die(run):
        save(run)
        raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "save", save_and_die)
        segment.main(flags)
    (scenes / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n2\tbuilding\n3\tsky\n")
    with pytest.raises(UserError, match="the classes of .*ade are no longer those of the run in "
                                        ".*: restore .* --fresh"):
        segment.main(flags)


def test_the_auxiliary_loss_counts_four_tenths(tmp_path):
    segment.main([*QUICK, *SCRATCH, "--steps", "1", "--log-every", "1", "--out", str(tmp_path)])
    line = next(line for line in log_lines(tmp_path / "segment.jsonl") if "loss_aux" in line)
    expected = line["loss_main"] + 0.4 * line["loss_aux"]
    assert line["loss"] == pytest.approx(expected, abs=1e-5)
    assert line["loss_aux"] > 1


def test_a_run_is_evaluated_as_often_as_asked(tmp_path):
    segment.main([*QUICK, *SCRATCH, "--steps", "5", "--evaluations", "2", "--out", str(tmp_path)])
    evaluated = [line["step"] for line in log_lines(tmp_path / "segment.jsonl") if "split" in line]
    assert evaluated == [2, 4]


@pytest.mark.slow
def test_the_script_lowers_the_loss_and_its_file_says_what_it_is(pretrained, capsys):
    flags = [*QUICK, "--out", str(pretrained), "--steps", "12", "--log-every", "1"]
    done = stage("segment.py", *flags)
    lines = log_lines(pretrained / "segment.jsonl")
    logged = [line for line in lines if "lr" in line]
    losses = [line["loss_main"] for line in logged]
    assert losses[0] == pytest.approx(math.log(11), abs=0.2)
    assert sum(losses[-3:]) / 3 < losses[0] - 0.1
    for line in logged:
        expected = line["loss_main"] + 0.4 * line["loss_aux"]
        assert line["loss"] == pytest.approx(expected, abs=1e-5)
    summary = json.loads(done.stdout.splitlines()[-1])
    assert {"miou", "m_acc", "a_acc", "miou_objects"} <= summary.keys()
    assert summary["summary"] == 1
    assert lines[-1]["miou"] == pytest.approx(summary["miou"], abs=1e-3)
    assert "background" in lines[-1]["iou"]
    file = read_file(pretrained / "segment.pt", kind="segment")
    assert len(file["classes"]) == 11
    assert file["preset"] == "tiny"
    assert file["arch"]["channels"] == 64
    with Image.open(pretrained / "segment.png") as picture:
        assert picture.size[0] > 1000

    with pytest.raises(SystemExit) as finished:              # the same command again
        segment.main(flags)
    assert finished.value.code == 0
    assert "already done" in capsys.readouterr().out
    with pytest.raises(UserError, match="is a segmenter already: measure it with --eval"):
        segment.main([*QUICK, "--out", str(pretrained / "new"),
                      "--checkpoint", str(pretrained / "segment.pt")])


@pytest.mark.slow
def test_a_file_is_measured_as_its_run_was_and_measurements_are_added_up(pretrained):
    segment.main([*QUICK, "--steps", "2", "--out", str(pretrained)])
    file = read_file(pretrained / "segment.pt")
    measure = [*QUICK, "--out", str(pretrained), "--eval"]
    assert segment.main(measure) == pytest.approx(file["result"])
    before = log_lines(pretrained / "segment_eval.jsonl")
    assert segment.main([*measure, "--limit", "4", "--multi-scale"])["a_acc"] > 0
    lines = log_lines(pretrained / "segment_eval.jsonl")
    assert lines[:len(before)] == before
    assert ["args" in line for line in lines] == [True, False, True, False]


@pytest.mark.slow
def test_a_folder_trains_and_its_images_of_all_sizes_count_once(scenes, tmp_path, monkeypatch):
    counted = []

    def note(matrix, background):
        counted.append(matrix)
        return scores(matrix, background)
    monkeypatch.setattr(segment, "scores", note)
    out = ["--out", str(tmp_path / "out")]
    result = segment.main([*QUICK, *SCRATCH, *out, "--batch-size", "4", "--data", str(scenes),
                           "--classes", "3", "--steps", "2", "--jitter", "2"])
    val_set = open_scenes(scenes, "val", classes=3)
    pixels = sum((40 + 9 * i) * (90 - 7 * i) for i in range(3))
    known = sum(int((val_set[i][1] != IGNORE).sum()) for i in range(3))
    assert known < pixels
    assert counted[-1].sum() == known
    assert 0 <= result["miou"] <= 100
    again = segment.main([*QUICK, *out, "--data", str(scenes), "--eval"])
    assert again == pytest.approx(result)                    # --classes is read from the file
    with pytest.raises(UserError, match="knows 3 classes, shapes has 11"):
        segment.main([*QUICK, *out, "--eval"])


@pytest.mark.slow
def test_two_processes_start_as_one_does_and_agree_on_their_statistics(pretrained):
    run = [*QUICK, "--limit", "33", "--steps", "3", "--log-every", "1", "--drop-path", "0"]
    losses = {}
    for name, processes in (("one", 1), ("two", 2)):
        stage("segment.py", *run, "--checkpoint", pretrained / "pretrain.pt",
              "--out", pretrained / name, processes=processes)
        lines = log_lines(pretrained / name / "segment.jsonl")
        losses[name] = [line["loss"] for line in lines if "lr" in line]
    # Two processes log the loss of the first half of each batch.
    assert losses["one"] != losses["two"]
    assert losses["two"] == pytest.approx(losses["one"], rel=0.1)
    two = read_file(pretrained / "two" / "segment.pt")
    assert all(torch.isfinite(x).all() for x in two["model"].values())
    # --eval reads rank 0's file: equal figures only if both ranks had equal statistics.
    again = segment.main([*run, "--eval", "--out", str(pretrained / "two")])
    assert again == pytest.approx(two["result"], abs=1e-3)


# --- starting, and mistakes -----------------------------------------------------------------------
def test_the_backbone_comes_from_the_file_with_its_tables_resized_to_the_crop(pretrained):
    args = segment.parse_args(["--out", str(pretrained), "--image-size", "64"])
    model, _ = segment.build(args, segment.read_start(args), 11)
    assert model.backbone.grid == (8, 8)
    source = read_file(pretrained / "pretrain.pt")["model"]
    weight = model.backbone.blocks[2].mlp.fc1.weight
    assert torch.equal(weight, source["blocks.2.mlp.fc1.weight"])
    table = model.backbone.blocks[0].attn.relative_position_bias_table
    assert table.shape == (15 * 15 + 3, TINY["heads"])


def test_no_file_is_opened_before_training(tmp_path):
    (tmp_path / "pretrain.pt").write_text("no checkpoint")
    assert segment.parse_args(["--out", str(tmp_path)]).checkpoint == tmp_path / "pretrain.pt"


@pytest.mark.parametrize("flags, sentence", [
    ([], "there is no file .*pretrain.pt; make it with python pretrain.py"),
    (["--init", "21k"],
     "there is no file .*finetune_21k.pt; make it with python finetune.py --intermediate --model"),
    ([*SCRATCH, "--checkpoint", "x.pt"], "leave out --checkpoint"),
    ([*SCRATCH, "--model", "huge"], "--model huge"),
    ([*SCRATCH, "--image-size", "50"], "50 is not a multiple of --patch-size 8"),
    ([*SCRATCH, "--image-size", "8"], r"--image-size must lie in \[16, 1024\], not 8"),
    ([*SCRATCH, "--jitter", "0.5"], "--jitter: must lie in"),
    ([*SCRATCH, "--multi-scale"], "--multi-scale belongs to --eval"),
    ([*SCRATCH, "--download"], "--download"),
    (["--eval"], "there is no file .*segment.pt; make it with python segment.py"),
    (["--eval", "--image-size", "64"], "--eval reads --image-size and .* in the file"),
    ([*SCRATCH, "--data", "/nowhere"], "/nowhere"),
    ([*SCRATCH, "--data", "cifar10"], "cifar10: these images have no label maps"),
    ([*SCRATCH, "--classes", "5"], "shapes have 11"),
    ([*SCRATCH, "--limit", "4"], "4 training images do not fill"),
    ([*SCRATCH, "--micro-batch", "1"], "BatchNorm needs two images"),
])
def test_mistakes_are_one_sentence(tmp_path, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        segment.main([*QUICK, "--out", str(tmp_path), *flags])
    assert not (tmp_path / "segment.pt").exists()


def test_checkpoints_of_another_kind_or_size_are_refused(pretrained):
    def refused(match, *flags):
        with pytest.raises(UserError, match=match):
            segment.main([*QUICK, "--out", str(pretrained), *map(str, flags)])

    start = pretrained / "pretrain.pt"
    refused("is no classifier: use --init pretrain",
            "--init", "21k", "--checkpoint", start)
    refused("is no segmenter", "--eval", "--checkpoint", start)
    refused("width 128, --model base has 768", "--model", "base", "--data", "shapes")
    refused("--patch-size 16: the weights in .* have 8; leave the flag out", "--patch-size", "16")
    write_file(pretrained / "classifier.pt", dict(model=ViT(**TINY, num_classes=4).state_dict()))
    refused("is a classifier already: use --init 21k",
            "--checkpoint", pretrained / "classifier.pt")


def test_a_mistake_exits_with_code_2_and_no_traceback(tmp_path):
    done = stage("segment.py", "--out", tmp_path, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "pretrain.pt" in done.stderr


def test_dry_run_needs_neither_data_nor_checkpoint(tmp_path, capsys):
    flags = ["--data", "/nowhere", "--dry-run", "--out", str(tmp_path)]
    assert segment.main(flags) is None
    said = capsys.readouterr().out
    assert "layer_decay              0.75" in said
    assert "600 steps of 16 images" in said
    assert segment.main([*flags, "--init", "21k"]) is None
    assert "finetune_21k.pt" in capsys.readouterr().out
