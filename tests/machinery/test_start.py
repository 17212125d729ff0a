"""pretrain.py --init: pre-training goes on from weights, ours or released, on other images."""
import pytest
import torch
from checkpoints import RELEASED, released_file, same_tensors
from pictures import noise, save, sentence

import pretrain
from model import PRESETS, ViT
from pretrain import BEiT
from support.files import UserError, read_file, write_file
from support.positions import resize_relative_table
from support.start import SHARED_TABLE, go_on_from

SIZES = dict(image_size=32, patch_size=8, width=24, depth=2, heads=3, codes=20, early_layer=1)


def file_of(path, model, kind="pretrain"):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    write_file(path, dict(kind=kind, model=model.state_dict(), arch=model.arch()))
    return path


@pytest.mark.parametrize("name", [name for name, (kind, _) in RELEASED.items()
                                  if kind == "pretrain"])
def test_released_weights_of_pre_training_are_all_taken(tmp_path, name):
    path, given = released_file(name, tmp_path / "pt.pth")
    given = {k: v for k, v in given.items() if not k.endswith("index")}
    depth = sum(k.endswith("norm1.weight") and k.startswith("cls_pt") for k in given)
    model = BEiT(**SIZES, head_depth=depth, shared_head="cls_pt_lm_head.weight" not in given)
    assert "fresh: none; unused: none" in go_on_from(path, model)
    assert same_tensors(model.state_dict(), given)


def test_another_grid_resizes_the_positions_and_another_codebook_starts_a_new_head(tmp_path):
    old = BEiT(**SIZES)
    path = file_of(tmp_path / "pretrain.pt", old)
    new = BEiT(**SIZES | dict(image_size=(32, 48), codes=30))
    fresh = new.lm_head.weight.clone()
    text = go_on_from(path, new)
    assert "fresh: lm_head; unused: lm_head" in text
    assert "positions resized from 4x4 patches" in text and "\n" not in text
    table = old.state_dict()[SHARED_TABLE]
    assert torch.equal(new.state_dict()[SHARED_TABLE], resize_relative_table(table, (4, 4), (4, 6)))
    assert torch.equal(new.lm_head.weight, fresh)
    rest = [name for name in old.state_dict() if not name.startswith(("lm_head", "rel_pos"))]
    assert all(torch.equal(new.state_dict()[name], old.state_dict()[name]) for name in rest)


@pytest.mark.parametrize("depths, fresh, unused", [
    ((2, 2), "none", "none"), ((2, 1), "cls_pt_layers", "cls_pt_layers"),
    ((0, 2), "cls_pt_layers", "none"), ((2, 0), "none", "cls_pt_layers")])
def test_the_shallow_head_is_kept_if_it_has_the_same_blocks(tmp_path, depths, fresh, unused):
    path = file_of(tmp_path / "pretrain.pt", BEiT(**SIZES, head_depth=depths[0]))
    text = go_on_from(path, BEiT(**SIZES, head_depth=depths[1]))
    assert f"fresh: {fresh}; unused: {unused})" in text


def test_a_backbone_without_heads_is_enough(tmp_path):
    vit = ViT(32, 8, 24, 2, 3, positions="shared", pool=None)
    del vit.norm
    path = file_of(tmp_path / "backbone.pt", vit, "backbone")
    model = BEiT(**SIZES)
    assert "fresh: cls_pt_layers, lm_head, mask_token, norm; unused: none" in go_on_from(
        path, model)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, vit.blocks[1].mlp.fc1.weight)


OTHERS = {
    "heads": (BEiT(**SIZES | dict(heads=2)), "has 2 attention heads, --model has 3"),
    "width": (BEiT(**SIZES | dict(width=12)), "wrong shape .* --model and --patch-size"),
    "depth": (BEiT(**SIZES | dict(depth=3)), "has the unknown blocks.2"),
    "shallow": (BEiT(**SIZES | dict(depth=1)), "lacks blocks.1"),
    "patches": (BEiT(**SIZES | dict(image_size=16, patch_size=4)), "wrong shape patch_embed"),
    "classifier": (ViT(32, 8, 24, 2, 3, num_classes=5), "of another stage .finetune."),
}


@pytest.mark.parametrize("name", OTHERS)
def test_weights_of_another_network_are_one_sentence(tmp_path, name):
    other, says = OTHERS[name]
    path = file_of(tmp_path / "x.pt", other)
    with pytest.raises(UserError, match=says):
        go_on_from(path, BEiT(**SIZES))


@pytest.fixture
def run(tmp_path):
    """A folder with a tokenizer and pre-trained weights of tiny, and one with pictures."""
    import vqkd
    args = vqkd.parse_args(["--codes", "16", "--encoder-depth", "1"])
    tokenizer = vqkd.build(args, (7,))
    file_of(tmp_path / "run" / "vqkd.pt", tokenizer, "vqkd")
    preset = {name: value for name, value in PRESETS["tiny"].items() if name != "position_std"}
    file_of(tmp_path / "run" / "first.pt", BEiT(**preset, codes=16, early_layer=4))
    for i in range(20):
        save(tmp_path / "pictures" / f"{i}.png", noise(50, 50, seed=i))
    return tmp_path


def test_the_script_goes_on_from_weights_on_other_images(run, capsys):
    flags = f"--workers 0 --device cpu --amp no --batch-size 8 --data {run / 'pictures'}".split()
    flags += f"--tokenizer {run / 'run' / 'vqkd.pt'} --init {run / 'run' / 'first.pt'}".split()
    flags += ["--steps", "1", "--lr", "0", "--min-lr", "0", "--out", str(run / "new")]
    pretrain.main(flags)
    assert "weights from " in capsys.readouterr().out
    before = read_file(run / "run" / "first.pt")["model"]
    after = read_file(run / "new" / "pretrain.pt")["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)    # at a rate of 0


def test_fresh_does_not_move_the_file_that_the_run_is_to_read(run):
    (run / "run" / "first.pt").rename(run / "run" / "pretrain.pt")
    flags = ["--init", str(run / "run" / "pretrain.pt"), "--out", str(run / "run"), "--fresh"]
    assert "--fresh would set --init" in sentence(pretrain.main, flags)
    assert (run / "run" / "pretrain.pt").exists()
