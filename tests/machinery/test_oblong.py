"""Images that are no squares: --image-size HEIGHT WIDTH, in every stage."""
import json

import numpy as np
import pytest
import torch
from pictures import fill, noise, photo, save, sentence
from torchvision.transforms.v2 import functional as VF

import finetune
import linprobe
import pretrain
import segment
import vqkd
from extras import convert, features, robustness
from support import scenes, transforms
from support.files import read_file
from support.positions import resize_relative_table
from support.start import SHARED_TABLE

FLAGS = "--image-size 32 48 --limit 16 --workers 0 --device cpu --amp no".split()
TRAIN = [*FLAGS, "--batch-size", "8", "--steps", "3"]


# --- the flag -------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", [vqkd, pretrain, linprobe, segment])
def test_one_number_is_a_square_and_two_are_height_and_width(stage):
    sizes = [stage.parse_args(["--image-size", *words]).image_size
             for words in (["64"], ["64", "64"], ["32", "64"])]
    assert sizes == [64, 64, (32, 64)]


@pytest.mark.parametrize("words, says", [
    ("32 48 64", "one number, or height and width, not 3"), ("32 50", "50 is not a multiple of"),
    ("4 48", "--patch-size must lie in"), ("48 8000", "--image-size must lie in .*, not 8000")])
def test_a_size_that_gives_no_grid_is_one_sentence(words, says):
    import re
    text = sentence(vqkd.parse_args, ["--image-size", *words.split()])
    assert re.search(says, text)


def test_as_large_a_share_of_the_patches_is_hidden():
    args = pretrain.parse_args(["--image-size", "32", "96"])             # 4 x 12 patches
    assert (args.mask_patches, args.mask_min_block) == (48 * 75 // 196, 48 * 16 // 196)


# --- transforms -----------------------------------------------------------------------------------
def test_a_window_has_the_aspect_of_the_view_give_or_take_a_third():
    crop = transforms.RandomCrop([(32, 64)], (0.1, 0.5))
    aspects = []
    for _ in range(200):
        window = crop.draw(photo(400, 400))
        aspects.append(window["width"] / window["height"])
    assert 1.45 < min(aspects) < 1.6 and 2.5 < max(aspects) < 2.75      # 3/4 and 4/3 of 2
    assert crop(photo(400, 400)).shape == (3, 32, 64)


def test_the_whole_image_is_the_window_if_it_has_the_aspect_of_the_view():
    crop = transforms.RandomCrop([(32, 48)], (1.0, 1.0))
    assert crop.draw(photo(200, 300)) == dict(top=0, left=0, height=200, width=300)


@pytest.mark.parametrize("shape, resized", [
    ((300, 400), [128, 170]),                # the height decides
    ((400, 300), [194, 146]),                # the width
    ((112, 146), [128, 166])])
def test_evaluation_covers_the_view_with_a_margin_and_keeps_the_aspect(
        shape, resized, monkeypatch):
    sizes, resize = [], VF.resize
    monkeypatch.setattr(VF, "resize", lambda image, to, **how: (
        sizes.append(to), resize(image, to, **how))[1])
    view = transforms.EvalTransform((112, 128))(photo(*shape))
    assert sizes == [resized] and view.shape == (3, 112, 128)


def test_backbone_and_tokenizer_see_one_window():
    view, small = transforms.MIMTransform((64, 96), (32, 48), color_jitter=0)(photo(300, 300))
    assert view.shape == (3, 64, 96) and small.shape == (3, 32, 48)
    halved = VF.resize(view, [32, 48], **transforms.BICUBIC).float()
    assert (halved - small.float()).abs().mean() < 1


def test_a_crop_of_a_scene_and_its_labels_have_height_and_width():
    image, labels = photo(200, 150), torch.arange(200 * 150).view(200, 150) % 7
    crop = scenes.SegmentTransform((48, 64), jitter=2.0, distortion=False)
    image, labels = crop(image, labels.byte())
    assert image.shape == (3, 48, 64) and labels.shape == (48, 64)
    image, labels = scenes.SegmentTransform((48, 64), 1.0, False)(
        photo(48, 48), torch.ones(48, 48, dtype=torch.uint8))
    assert (labels[:, 48:] == scenes.IGNORE).all() and (labels[:, :48] == 1).all()


# --- every stage ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All stages at 32 x 48 pixels, one after the other."""
    out = tmp_path_factory.mktemp("oblong")
    flags = [*TRAIN, "--out", str(out)]
    vqkd.main([*flags, "--continuous-steps", "1", "--codes", "16"])
    pretrain.main(flags)
    finetune.main([*flags, "--mixup", "0.8", "--erasing", "0.5"])
    linprobe.main([*FLAGS, "--steps", "2", "--blocks", "1", "--out", str(out)])
    segment.main(flags)
    return out


@pytest.mark.parametrize("stage", ["vqkd", "pretrain", "finetune", "segment"])
def test_every_stage_trains_and_says_its_size(run, stage):
    file = read_file(run / f"{stage}.pt", kind=stage)
    assert tuple(file["arch"]["image_size"]) == (32, 48)
    first = json.loads((run / f"{stage}.jsonl").read_text().splitlines()[0])
    assert first["args"]["image_size"] == [32, 48]


def test_a_finished_run_is_done_and_another_shape_is_another_run(run, capsys):
    with pytest.raises(SystemExit):
        pretrain.main([*TRAIN, "--out", str(run)])
    assert "already done" in capsys.readouterr().out
    flags = [*TRAIN, "--out", str(run)]
    flags[1], flags[2] = "48", "32"
    vqkd_file = ["--tokenizer", str(run / "vqkd.pt")]
    assert "--image-size [32, 48] -> [48, 32]" in sentence(pretrain.main, [*flags, *vqkd_file])
    flags[-1] = str(run / "other")
    text = sentence(pretrain.main, [*flags, *vqkd_file])
    assert "has (4, 6) patches, the backbone (6, 4)" in text
    assert "python vqkd.py --image-size 48 32 --patch-size 8" in text


def test_a_classifier_is_measured_at_its_own_size_and_at_others(run):
    flags = ["--workers", "0", "--device", "cpu", "--amp", "no", "--limit", "16"]
    result = finetune.main([*flags, "--eval", "--out", str(run)])
    again = robustness.main([str(run / "finetune.pt"), *flags, "--data", "shapes"])
    assert again["shapes"]["top1"] == result["top1"]
    assert finetune.main([*flags, "--eval", "--out", str(run), "--image-size", "48", "32"])
    assert segment.main([*flags, "--eval", "--out", str(run)])["miou"] >= 0


def test_a_square_backbone_is_taken_to_another_shape(run, tmp_path):
    vqkd.main([*TRAIN[3:], "--continuous-steps", "1", "--codes", "16", "--out", str(tmp_path)])
    pretrain.main([*TRAIN[3:], "--out", str(tmp_path)])
    finetune.main([*TRAIN, "--steps", "1", "--lr", "0", "--min-lr", "0", "--out", str(tmp_path)])
    table = read_file(tmp_path / "pretrain.pt")["model"][SHARED_TABLE]
    found = read_file(tmp_path / "finetune.pt")["model"]
    name = "blocks.0.attn.relative_position_bias_table"
    assert torch.equal(found[name], resize_relative_table(table, (6, 6), (4, 6)))


def test_tokens_and_features_of_pictures_and_other_layouts_follow(run, tmp_path):
    save(tmp_path / "p" / "a.png", noise(100, 90))
    features.main([str(run / "vqkd.pt"), str(tmp_path / "p"), "--out", str(tmp_path / "z.npz")])
    assert np.load(tmp_path / "z.npz")["ids"].shape == (1, 4, 6)
    features.main([str(run / "finetune.pt"), str(tmp_path / "p"), "--what", "classes",
                   "--out", str(tmp_path / "c.npz")])
    assert np.load(tmp_path / "c.npz")["class"].shape == (1, 5)
    convert.main([str(run / "finetune.pt"), str(tmp_path / "48x64.pt"), "--to", "ours",
                  "--image-size", "48", "64"])
    file = read_file(tmp_path / "48x64.pt")
    assert tuple(file["arch"]["image_size"]) == (48, 64)
    assert len(file["model"]["blocks.0.attn.relative_position_bias_table"]) == 11 * 15 + 3


def test_photographs_and_a_teacher_of_several_parts_do_as_well(tmp_path):
    fill(tmp_path / "d", each=12)
    flags = [*TRAIN, "--teacher", "hog+pixel", "--continuous-steps", "1", "--codes", "16"]
    vqkd.main([*flags, "--data", str(tmp_path / "d"), "--cache-teacher", str(tmp_path / "cache"),
               "--out", str(tmp_path / "o")])
    assert len(list((tmp_path / "cache").glob("*-32x48px-*.npy"))) == 2
