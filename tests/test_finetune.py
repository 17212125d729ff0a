"""Fine-tuning: mixed targets, pooling, recipes, and the stage as a student runs it."""
import argparse
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import log_lines, stage
from PIL import Image

import finetune
from finetune import hits, mix, recipe_for, smooth_targets, soft_cross_entropy
from model import PRESETS, ViT
from pretrain import BEiT
from support import transforms
from support.files import UserError, describe_run, read_file, write_file
from support.labels import choose_labels
from support.process import Process, seed_all
from support.run import Run

TINY = PRESETS["tiny"]
QUICK = ["--limit", "60", "--batch-size", "20", "--workers", "0", "--amp", "no", "--device", "cpu"]


@pytest.fixture
def pretrained(tmp_path):
    """A folder with a pretrain.pt of random weights, as pretrain.py leaves it."""
    torch.manual_seed(0)
    model = BEiT(48, 8, TINY["width"], TINY["depth"], TINY["heads"], 64, early_layer=4)
    write_file(tmp_path / "pretrain.pt", dict(
        kind="pretrain", preset="tiny", model=model.state_dict(), epochs=8, classes=None,
        arch=dict(image_size=48, patch_size=8, width=model.width, depth=model.depth,
                  heads=model.heads)))
    return tmp_path


def tiny_vit(**options):
    return ViT(16, 8, 24, 2, 3, **options).eval()


def started(*flags):
    """-> the arguments with all defaults, and the checkpoint to start from."""
    args = finetune.parse_args(list(flags))
    checkpoint = finetune.read_start(args)
    return finetune.complete(args, checkpoint), checkpoint


def build(*flags, classes):
    args, checkpoint = started(*flags)
    return finetune.build(args, checkpoint, classes)


def column(preset, *start, **more):
    """The recipe of one preset, flag by flag."""
    number = finetune.MODELS.index(preset)
    return {name: row[number] for name, row in recipe_for(preset, *start, **more).items()}


# --- targets --------------------------------------------------------------------------------------
def test_smoothing_leaves_a_distribution_with_the_stated_share_on_every_other_class():
    targets = smooth_targets(torch.tensor([2, 0]), classes=5, smoothing=0.1)
    torch.testing.assert_close(targets[0], torch.tensor([0.02, 0.02, 0.92, 0.02, 0.02]))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(2))


def test_soft_cross_entropy_is_label_smoothing_where_nothing_is_mixed():
    logits, labels = torch.randn(6, 5), torch.randint(5, (6,))
    torch.testing.assert_close(soft_cross_entropy(logits, smooth_targets(labels, 5, 0.1)),
                               F.cross_entropy(logits, labels, label_smoothing=0.1))


def test_soft_cross_entropy_of_bfloat16_logits_is_computed_in_float32():
    logits, targets = (20 * torch.randn(40, 5)).bfloat16(), torch.randn(40, 5).softmax(dim=1)
    loss = soft_cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, soft_cross_entropy(logits.float(), targets))


def test_soft_cross_entropy_of_a_confident_mistake_is_large_and_finite():
    logits = torch.tensor([[1000.0, 0.0, 0.0]])
    targets = smooth_targets(torch.tensor([1]), 3, 0.0)
    assert soft_cross_entropy(logits, targets).item() == pytest.approx(1000)


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_targets_are_mixed_exactly_as_much_as_the_pixels_are(alphas):
    pytest.importorskip("timm")
    labels = torch.arange(6)             # image i is i everywhere, so its mean tells the mixture
    plain = labels.view(6, 1, 1, 1).expand(6, 3, 20, 20).float()
    for draw in range(20):
        seed_all(draw)
        images, targets = mix(plain.clone(), labels, 6, *alphas, smoothing=0.0)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))
        torch.testing.assert_close(images.mean(dim=(1, 2, 3)), targets @ labels.float(),
                                   atol=1e-4, rtol=1e-4)
        for i in range(6):                                   # its partner is image 5 - i
            assert set(targets[i].nonzero()[:, 0].tolist()) <= {i, 5 - i}


def test_mixed_targets_keep_the_smoothing():
    pytest.importorskip("timm")
    seed_all(1)
    _, targets = mix(torch.rand(6, 3, 20, 20), torch.arange(6), 6, 0.8, 1.0, smoothing=0.1)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))
    torch.testing.assert_close(targets.min(dim=1).values, torch.full((6,), 0.1 / 6))
    for i in range(6):
        own_and_partner = targets[i, i] + targets[i, 5 - i]
        torch.testing.assert_close(own_and_partner, torch.tensor(0.9 + 2 * 0.1 / 6))


def test_mixing_is_a_function_of_the_seed_and_switched_off_by_zero():
    pytest.importorskip("timm")
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    twice = []
    for _ in range(2):
        seed_all(0, 7)
        twice.append(mix(images.clone(), labels, 4, 0.8, 1.0, 0.1)[0])
    assert torch.equal(*twice) and not torch.equal(twice[0], images)
    assert torch.equal(mix(images, labels, 4, 0.0, 0.0, 0.1)[0], images)


def test_one_coin_and_one_ratio_are_drawn_for_the_whole_batch():
    pytest.importorskip("timm")
    for draw in range(10):
        seed_all(draw)
        _, targets = mix(torch.rand(6, 3, 20, 20), torch.arange(6), 6, 0.8, 1.0, smoothing=0.0)
        torch.testing.assert_close(targets.diagonal(), targets[0, 0].expand(6))


def test_mixup_and_cutmix_take_half_of_the_batches_each():
    pytest.importorskip("timm")
    plain, boxes = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 20, 20), 0
    for draw in range(100):
        seed_all(draw)
        images, _ = mix(plain.clone(), torch.arange(4), 4, 0.8, 1.0, smoothing=0.0)
        # CutMix shows a box of the partner. MixUp blends all pixels alike.
        boxes += images[0].unique().numel() > 1
    assert 35 <= boxes <= 65


def test_top1_and_top5_count_what_they_say():
    logits = torch.tensor([[9., 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4]])
    first, fifth = hits(logits, torch.tensor([0, 4, 5]))
    assert (first.item(), fifth.item()) == (1, 2)
    fewer_than_five = logits[:, :3]
    assert hits(fewer_than_five, torch.tensor([0, 1, 2]))[1].item() == 3


# --- labels ---------------------------------------------------------------------------------------
def test_few_labels_are_exactly_so_many_of_every_class_and_a_function_of_the_seed():
    labels = torch.arange(100) % 7
    chosen = choose_labels(labels, 5, seed=3)
    assert labels[chosen].bincount().tolist() == [5] * 7 and len(set(chosen.tolist())) == 35
    assert torch.equal(chosen, choose_labels(labels, 5, seed=3))
    assert not torch.equal(chosen, choose_labels(labels, 5, seed=4))
    with pytest.raises(UserError, match="has only 14"):
        choose_labels(labels, 15)


# --- recipes --------------------------------------------------------------------------------------
PAPER = "lr", "epochs", "warmup_epochs", "layer_decay", "drop_path", "mixup", "cutmix"
SAME_FOR_ALL = "batch_size", "weight_decay", "smoothing", "min_lr", "erasing", "crop_scale"


@pytest.mark.parametrize("preset, length, init, lr, epochs, warmup, decay, drop, mixup, cutmix", [
    ("base", 300, "pretrain", 5e-4, 100, 20, 0.65, 0.1, 0.8, 1.0),
    ("base", 1600, "pretrain", 5e-4, 100, 20, 0.60, 0.2, 0.8, 1.0),
    ("base", 300, "21k", 5e-5, 30, 20, 0.75, 0.1, 0, 0),
    ("large", 300, "pretrain", 5e-4, 50, 5, 0.8, 0.2, 0.8, 1.0),
    ("large", 1600, "pretrain", 2e-4, 50, 5, 0.8, 0.2, 0.8, 1.0),
    ("large", 1600, "21k", 7e-5, 20, 5, 0.8, 0.25, 0, 0)])
def test_recipes_are_the_papers_table(
        preset, length, init, lr, epochs, warmup, decay, drop, mixup, cutmix):
    row = column(preset, length, init)
    assert [row[k] for k in PAPER] == [
        lr, epochs, warmup, decay, drop, mixup, cutmix]
    assert [row[k] for k in SAME_FOR_ALL] == [1024, 0.05, 0.1, 1e-6, 0.25, 0.08]
    assert row["randaugment"] == "rand-m9-mstd0.5-inc1"


def test_scratch_has_one_rate_for_all_layers_and_an_unknown_length_counts_as_300():
    assert column("base", None, "scratch")["layer_decay"] == 1.0
    assert recipe_for("base", None) == recipe_for("base", 300) == finetune.RECIPE


@pytest.mark.parametrize("preset, drop", [("base", 0.1), ("large", 0.2)])
def test_the_recipe_of_intermediate_fine_tuning_is_the_papers_and_evaluates_nothing(preset, drop):
    row = column(preset, 1600, intermediate=True)
    assert [row[k] for k in PAPER] == [
        6e-4, 90, 20, 0.75, drop, 0.8, 1.0]
    assert row["batch_size"] == 4096 and row["evaluations"] == 0
    assert row["data"] == "datasets/imagenet21k"


OURS, RELEASED = dict(epochs=1600), dict(args=argparse.Namespace(epochs=1600))


@pytest.mark.parametrize("stated", [OURS, RELEASED])
def test_flags_win_over_the_length_of_pretraining_read_from_the_checkpoint(tmp_path, stated):
    model = BEiT(224, 16, 768, 1, 12, 8, early_layer=1)
    write_file(tmp_path / "pretrain.pt", dict(model=model.state_dict(), **stated))
    args, _ = started("--model", "base", "--out", str(tmp_path), "--drop-path", "0.3")
    assert (args.layer_decay, args.drop_path, args.lr, args.image_size) == (0.60, 0.3, 5e-4, 224)


# --- pooling --------------------------------------------------------------------------------------
def logits_with(model, change):
    """Logits when `change` has edited the last block's output."""
    def hook(module, inputs, output):
        output = output.clone()
        change(output)
        return output
    handle = model.blocks[-1].register_forward_hook(hook)
    try:
        return model(torch.ones(1, 3, 16, 16))
    finally:
        handle.remove()


def test_mean_pooling_ignores_cls_and_cls_pooling_ignores_patches():
    def nothing(tokens):
        pass

    def alter_cls(tokens):
        tokens[:, 0] += torch.randn(24)

    def alter_patches(tokens):
        tokens[:, 1:] += torch.randn(24)

    cases = ("mean", alter_cls, alter_patches), ("cls", alter_patches, alter_cls)
    for pool, unread, read in cases:
        model = tiny_vit(pool=pool, num_classes=5)
        assert torch.equal(logits_with(model, unread), logits_with(model, nothing))
        assert not torch.equal(logits_with(model, read), logits_with(model, nothing))


def test_the_mean_is_taken_before_the_norm():
    model = tiny_vit(num_classes=5)
    images = torch.ones(2, 3, 16, 16)
    tokens, = model.features(images, blocks=[-1])
    by_hand = model.head(model.fc_norm(tokens[:, 1:].mean(dim=1)))
    torch.testing.assert_close(model(images), by_hand)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_new_head_knows_nothing_and_the_norm_is_fresh_only_for_mean_pooling(pretrained, pool):
    model, report = build("--out", str(pretrained), "--pool", pool, classes=list(range(10)))
    loss = F.cross_entropy(model.eval()(torch.randn(4, 3, 48, 48)), torch.arange(4))
    assert loss.item() == pytest.approx(math.log(10), abs=1e-3)
    fresh = {"fc_norm", "head"} if pool == "mean" else {"head"}
    assert {k.split(".")[0] for k in report.missing} == fresh


def test_a_head_is_kept_for_the_same_classes_and_begun_afresh_for_others(tmp_path):
    model = ViT(**TINY, num_classes=3)
    names = ["cat", "cow", "dog"]
    write_file(tmp_path / "21k.pt", dict(kind="finetune", model=model.state_dict(), classes=names))
    start = "--init", "21k", "--checkpoint", str(tmp_path / "21k.pt")
    kept, _ = build(*start, classes=names)
    assert torch.equal(kept.head.weight, model.head.weight)
    for classes in (["ant", "bee", "fly"], ["ant", "bee"]):
        fresh, report = build(*start, classes=classes)
        assert report.missing == ["head.weight", "head.bias"]
        assert "head.weight" not in report.loaded
        assert 0 < fresh.head.weight.abs().max() < 1e-3
        alike = F.cosine_similarity(fresh.head.weight[:2], model.head.weight[:2])
        assert alike.abs().max() < 0.5   # nothing of the other head is left
        assert torch.equal(fresh.fc_norm.weight, model.fc_norm.weight)


@pytest.mark.parametrize("pool, other", [("cls", "mean"), ("mean", "cls")])
@pytest.mark.parametrize("classes", [["ant", "bee", "fly"], ["ant", "bee"]])
def test_another_pooling_than_a_classifiers_is_refused_whatever_its_classes(
        tmp_path, pool, other, classes):
    # The norm of the file was trained. So it must not be dropped silently.
    model = ViT(**TINY, pool=pool, num_classes=3)
    write_file(tmp_path / "21k.pt", dict(model=model.state_dict(), classes=["cat", "cow", "dog"]))
    run = ["--init", "21k", "--checkpoint", str(tmp_path / "21k.pt"), "--pool"]
    with pytest.raises(UserError, match="trained with .* pooling"):
        build(*run, other, classes=classes)
    assert build(*run, pool, classes=classes)[1].missing == ["head.weight", "head.bias"]


def picture_folders(root, classes):
    for number, name in enumerate(classes):
        for i in range(4):
            (root / name).mkdir(parents=True, exist_ok=True)
            random = np.random.default_rng((number, i))
            pixels = random.integers(0, 256, (48, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")


def test_a_21k_file_hands_over_fc_norm_and_everything_but_the_head(pretrained, monkeypatch):
    many, few = pretrained / "many", pretrained / "few"
    picture_folders(many, "abcdef")      # ROOT/CLASS/*, no validation images, as in ImageNet-21k
    for split in ("train", "val"):
        picture_folders(few / split, "bdx")
    run = [*QUICK[2:], "--batch-size", "6", "--out", str(pretrained)]
    to_21k = [*run, "--intermediate", "--steps", "3", "--lr", "1e-2", "--data", str(many)]
    assert finetune.main(to_21k) == {}
    middle = read_file(pretrained / "finetune_21k.pt", kind="finetune_21k")
    assert middle["classes"] == list("abcdef") and not (pretrained / "finetune.pt").exists()
    assert (middle["model"]["fc_norm.weight"] != 1).any()    # it has learned

    model, report = build(*run, "--init", "21k", classes=list("bdx"))    # finds the file by itself
    own = model.state_dict()
    assert report.missing == ["head.weight", "head.bias"] and report.unexpected == []
    assert own["head.weight"].shape == (3, 128) and own["head.weight"].abs().max() < 1e-3
    for name, value in middle["model"].items():
        assert name.startswith("head.") or torch.equal(own[name], value), name

    result = finetune.main([*run, "--init", "21k", "--steps", "2", "--data", str(few)])
    last = read_file(pretrained / "finetune.pt", kind="finetune")
    assert result["images"] == 12 and last["classes"] == ["b", "d", "x"]


def test_a_class_list_gives_the_head_its_classes_and_their_order(pretrained):
    picture_folders(pretrained / "some", "db")
    # The folders are some of these classes, in another order.
    (pretrained / "names").write_text("d\nc\nb\na\n")
    args, _ = started("--out", str(pretrained), "--data", str(pretrained / "some"),
                      "--evaluations", "0", "--classes", str(pretrained / "names"))
    train_set, val_set = finetune.open_images(args, Process())
    assert val_set is None and train_set.classes == ["d", "c", "b", "a"]
    assert train_set.labels.tolist() == 4 * [2] + 4 * [0]                        # b, then d
    assert [train_set[0, i][1] for i in (0, 7)] == [2, 0]


# --- other resolutions ----------------------------------------------------------------------------
@pytest.mark.parametrize("size, side", [(384, 24), (512, 32)])
def test_base_at_a_higher_resolution_is_built_from_a_checkpoint_of_224(tmp_path, size, side):
    source = BEiT(224, 16, 768, 1, 12, 8, early_layer=1).state_dict()
    table = source["rel_pos_bias.relative_position_bias_table"]
    table.copy_(torch.randn(table.shape))
    write_file(tmp_path / "pretrain.pt", dict(model=source))
    flags = "--model", "base", "--out", str(tmp_path), "--image-size", str(size)
    model, report = build(*flags, classes=list("abcde"))
    resized = model.blocks[0].attn.relative_position_bias_table
    assert model.grid == (side, side) and resized.shape == ((2 * side - 1) ** 2 + 3, 12)
    torch.testing.assert_close(resized[-3:], table[-3:])     # the rows of [CLS]
    centre, old_centre = (len(resized) - 3) // 2, (len(table) - 3) // 2          # offset (0, 0)
    torch.testing.assert_close(resized[centre], table[old_centre], atol=1e-4, rtol=1e-4)
    assert {k.split(".")[0] for k in report.missing} == {"fc_norm", "head"}


@pytest.mark.parametrize("size", [80, 96])
def test_a_classifier_can_be_trained_and_measured_at_another_resolution(pretrained, size):
    out = ["--out", str(pretrained)]
    finetune.main(QUICK + out + ["--steps", "2", "--image-size", str(size)])
    file = read_file(pretrained / "finetune.pt")
    table = file["model"]["blocks.5.attn.relative_position_bias_table"]
    assert file["image_size"] == size and len(table) == (2 * size // 8 - 1) ** 2 + 3
    evaluated = finetune.main(QUICK + out + ["--eval"])      # at the size of the file
    assert evaluated["top1"] == pytest.approx(file["result"]["top1"])
    for other in ("48", "112"):
        assert finetune.main(QUICK + out + ["--eval", "--image-size", other])["images"] == 60
    # Going on at another size from a classifier of the same classes keeps its head.
    model, report = build("--init", "21k", "--checkpoint", str(pretrained / "finetune.pt"),
                          "--image-size", "48", classes=file["classes"])
    assert report.missing == [] and torch.equal(model.head.weight, file["model"]["head.weight"])


def test_from_384_on_an_image_is_resized_straight_to_the_size_and_below_with_a_margin():
    image = torch.zeros(3, 600, 600, dtype=torch.uint8)
    image[:, :20] = 255                                      # a border that the margin cuts off
    for size, seen in ((224, False), (384, True), (512, True)):
        shown = transforms.EvalTransform(size)(image)
        assert shown.shape == (3, size, size) and bool((shown[:, 0] > 200).all()) == seen


def test_a_tokenizers_encoder_can_be_fine_tuned_and_its_norm_goes_along(tmp_path):
    encoder = ViT(**TINY | dict(depth=4, layer_scale=0.0), positions="absolute")
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    state["quantize.embedding.weight"] = torch.zeros(64, 16)
    write_file(tmp_path / "vqkd.pt", dict(kind="vqkd", model=state, arch=dict(TINY, depth=4)))
    model, report = build("--checkpoint", str(tmp_path / "vqkd.pt"), classes=list(range(10)))
    assert model.depth == 4 and model.heads == TINY["heads"]
    assert report.missing == ["head.weight", "head.bias"]


# --- the stage ------------------------------------------------------------------------------------
def figures(path):
    clocks = "images_per_s", "time"
    return [{k: v for k, v in line.items() if k not in clocks} for line in log_lines(path)[1:]]


class Killed(Exception):
    pass


def test_a_killed_run_started_again_ends_with_the_same_bits_and_log(pretrained, monkeypatch):
    flags = QUICK + ["--steps", "7", "--log-every", "1", "--save-every", "3", "--evaluations", "3",
                     "--micro-batch", "10", "--drop-path", "0.3", "--mixup", "0.8", "--cutmix", "1",
                     "--erasing", "0.25", "--checkpoint", str(pretrained / "pretrain.pt")]
    whole, parts = pretrained / "whole", pretrained / "parts"
    finetune.main(flags + ["--out", str(whole)])

    save = Run.save

    def save_and_die(run):
        save(run)
        raise Killed
    monkeypatch.setattr(Run, "save", save_and_die)
    for _ in range(2):                                       # killed after 3 and after 6 of 7 steps
        with pytest.raises(Killed):
            finetune.main(flags + ["--out", str(parts)])
    assert (parts / "finetune.resume.pt.prev").exists()
    finetune.main(flags + ["--out", str(parts)])
    one, two = (read_file(folder / "finetune.pt") for folder in (whole, parts))
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
    assert figures(whole / "finetune.jsonl") == figures(parts / "finetune.jsonl")
    assert not (parts / "finetune.resume.pt").exists()


def test_a_run_does_not_go_on_with_other_classes(tmp_path):
    for split in ("train", "val"):
        picture_folders(tmp_path / "data" / split, "abc")
    flags = [*QUICK, "--batch-size", "4", "--init", "scratch", "--data", str(tmp_path / "data"),
             "--out", str(tmp_path)]
    args, _ = started(*flags)
    args.micro_batch = args.batch_size
    write_file(tmp_path / "finetune.resume.pt", describe_run("finetune", args) | dict(
        classes=["a", "b", "d"], epochs=args.epochs, step=1))
    words = "classes of .*data are no longer those of the run in .*: restore .* --fresh"
    with pytest.raises(UserError, match=words):
        finetune.main(flags)


def test_the_script_lowers_the_loss_and_its_file_says_what_it_is(pretrained, capsys):
    flags = [*QUICK, "--out", str(pretrained), "--steps", "20", "--log-every", "1", "--lr", "3e-3"]
    done = stage("finetune.py", *flags)
    lines = log_lines(pretrained / "finetune.jsonl")
    losses = [line["loss"] for line in lines if "lr" in line]
    assert losses[0] == pytest.approx(math.log(10), abs=0.01)
    assert sum(losses[-3:]) / 3 < losses[0] - 0.1
    summary = json.loads(done.stdout.splitlines()[-1])
    assert lines[-1]["summary"] == summary["summary"] == 1
    assert lines[-1]["top1"] == pytest.approx(summary["top1"], abs=1e-3)
    assert {"top1", "top5", "best_top1", "best_epoch", "loss", "images"} <= summary.keys()
    file = read_file(pretrained / "finetune.pt", kind="finetune")
    assert len(file["classes"]) == 10
    assert file["preset"] == "tiny" and file["args"]["init"] == "pretrain"
    ViT(**file["arch"]).load_state_dict(file["model"])

    with pytest.raises(SystemExit) as finished:              # the same command again
        finetune.main(flags)
    assert finished.value.code == 0 and "already done" in capsys.readouterr().out
    result = finetune.main(QUICK + ["--out", str(pretrained), "--eval"])
    assert all(result[k] == file["result"][k] for k in ("top1", "top5", "images"))
    assert result["loss"] == pytest.approx(file["result"]["loss"])


def test_scratch_needs_no_file_and_few_labels_are_few(tmp_path):
    result = finetune.main([
        *QUICK, "--limit", "200", "--init", "scratch", "--out", str(tmp_path), "--steps", "2",
        "--labels-per-class", "4", "--micro-batch", "7"])
    assert result["images"] == 200 and log_lines(tmp_path / "finetune.jsonl")[0]["images"] == 40


@pytest.mark.slow
def test_two_processes_train_and_count_as_one_does(pretrained):
    run = [*QUICK[2:], "--limit", 41, "--steps", 3, "--log-every", 1, "--drop-path", 0]
    first = ["--checkpoint", pretrained / "pretrain.pt"]
    stage("finetune.py", *run, *first, "--out", pretrained / "one")
    stage("finetune.py", *run, *first, "--out", pretrained / "two", processes=2)
    one, two = (read_file(pretrained / name / "finetune.pt") for name in ("one", "two"))
    # Every image counts once, although 41 is odd.
    assert one["result"]["images"] == two["result"]["images"] == 41
    assert two["result"]["top1"] == pytest.approx(one["result"]["top1"])
    assert two["result"]["loss"] == pytest.approx(one["result"]["loss"], abs=1e-5)
    for k in one["model"]:
        # The mean: where the gradient is almost zero, Adam makes a whole step of rounding errors.
        assert (two["model"][k] - one["model"][k]).abs().mean() < 2e-6, k
    # Evaluation alone: the same weights, so the same counts to the last image.
    stage("finetune.py", *run, "--eval", "--out", pretrained / "one", processes=2)
    again = log_lines(pretrained / "one" / "finetune_eval.jsonl")[-1]
    for name in ("top1", "top5", "images", "loss"):
        assert again[name] == pytest.approx(one["result"][name], abs=1e-5), name


# --- errors ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, sentence", [
    ([], "there is no file .*pretrain.pt; make it with python pretrain.py"),
    (["--init", "21k"], "there is no file .*finetune_21k.pt; make it with python finetune.py "
                        "--intermediate --model tiny"),
    (["--init", "scratch", "--intermediate"], "--intermediate starts from pre-training"),
    (["--init", "scratch", "--checkpoint", "x.pt"], "leave out --checkpoint"),
    (["--init", "scratch", "--model", "huge"], "--model huge"),
    (["--init", "scratch", "--image-size", "50"], "50 is not a multiple of --patch-size 8"),
    (["--init", "scratch", "--layer-decay", "0"], "--layer-decay: must lie in"),
    (["--init", "scratch", "--mixup", "nan"], "--mixup: must lie in"),
    (["--eval"], "there is no file .*finetune.pt"),
    (["--init", "scratch", "--data", "/nowhere"], "/nowhere"),
    (["--init", "scratch", "--randaugment", "nonsense"], "--randaugment nonsense"),
    (["--init", "scratch", "--limit", "4"], "4 training images do not fill"),
    (["--init", "scratch", "--labels-per-class", "50"], "--labels-per-class 50"),
    (["--init", "scratch", "--batch-size", "15", "--mixup", "1"], "MixUp pairs"),
])
def test_mistakes_are_one_sentence(tmp_path, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        finetune.main(QUICK + ["--out", str(tmp_path)] + flags)
    assert not (tmp_path / "finetune.pt").exists()


def test_checkpoints_of_another_kind_or_size_are_refused(pretrained):
    out = ["--out", str(pretrained)]
    with pytest.raises(UserError, match="is no classifier"):
        finetune.main([*QUICK, *out, "--init", "21k", "--checkpoint",
                       str(pretrained / "pretrain.pt")])
    with pytest.raises(UserError, match="width 128, --model base has 768"):
        finetune.main(QUICK + out + ["--model", "base"])
    with pytest.raises(UserError, match="--patch-size 16"):
        finetune.main(QUICK + out + ["--patch-size", "16"])
    write_file(pretrained / "classifier.pt", dict(model=ViT(**TINY, num_classes=4).state_dict()))
    with pytest.raises(UserError, match="is a classifier already: use --init 21k"):
        finetune.main(QUICK + out + ["--checkpoint", str(pretrained / "classifier.pt")])
    with pytest.raises(UserError, match="knows 4 classes, shapes has 10"):
        finetune.main(QUICK + out + ["--eval", "--checkpoint", str(pretrained / "classifier.pt")])


def test_a_mistake_exits_with_code_2_and_no_traceback(tmp_path):
    done = stage("finetune.py", "--out", tmp_path, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "pretrain.pt" in done.stderr


def test_dry_run_needs_neither_data_nor_checkpoint(tmp_path, capsys):
    flags = ["--model", "base", "--data", "/nowhere", "--dry-run", "--out", str(tmp_path)]
    assert finetune.main(flags) is None
    said = capsys.readouterr().out
    assert re.search(r"layer_decay +0\.65\n", said) and "1000 classes" in said


def test_parsing_the_arguments_opens_no_file(tmp_path):
    args = finetune.parse_args(["--checkpoint", str(tmp_path / "missing.pt"), "--data", "/nowhere"])
    assert (args.layer_decay, args.image_size) == (None, None)       # these depend on the file


def test_several_data_sets_are_answered_with_the_command_that_measures_them(tmp_path):
    words = "python -m extras.robustness CHECKPOINT --data shapes shapes:blur"
    for flag in ("--init=scratch", "--eval"):
        with pytest.raises(UserError, match=words):
            finetune.main([flag, "--out", str(tmp_path), "--data", "shapes", "shapes:blur"])


def test_the_best_evaluation_is_kept_and_not_the_last():
    best = finetune.Best()
    for epoch, top1 in enumerate([10.0, 30.0, 20.0, 30.0]):
        best.update({"top1": top1}, epoch)
    assert best.state_dict() == {"best_top1": 30.0, "best_epoch": 1}
    again = finetune.Best()
    again.load_state_dict(best.state_dict())
    assert again.facts == best.facts
