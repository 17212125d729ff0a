"""Weights in and out: what a file is, what is loaded from it, what another grid changes, and the way to other code.

The files are small, but have the names, wrappers and by-catch of the real ones.
"""
import argparse
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from extras import convert as converter
from support import engine
import vqkd
from support import weights
from conftest import stage
from support.engine import UserError
from model import ViT, imagenet_normalize, relative_position_index
from pretrain import BEiT
from support.positions import geometric_offsets, resize_pos_embed, resize_relative_table
from support.weights import load_backbone

SIZES = dict(image_size=32, patch_size=8, width=24, depth=2, heads=3)


def randomise(state, seed=0):
    """The same names with random numbers (LayerNorms and biases too, so that a forgotten one shows)."""
    g = torch.Generator().manual_seed(seed)
    return {k: 0.3 * torch.randn(v.shape, generator=g) for k, v in state.items()}


def pretrained(released_index=False, **changes):
    """A state dict with the names of pre-training: code head, mask token, aggregation blocks, one shared table."""
    vit = ViT(**(SIZES | changes), positions="shared", pool=None)
    state = dict(vit.state_dict())
    state |= {f"cls_pt_layers.0.{k}": v for k, v in vit.blocks[0].state_dict().items()}
    state |= {"mask_token": torch.zeros(1, 1, 24)}
    state |= {"lm_head.weight": torch.zeros(20, 24), "lm_head.bias": torch.zeros(20)}
    state = randomise(state)
    if released_index:
        state["rel_pos_bias.relative_position_index"] = vit.relative_position_index
    return state


def finetuned(classes=5, pool="mean"):
    return randomise(ViT(**SIZES, pool=pool, num_classes=classes).state_dict(), seed=1)


def tokenizer():
    vit = ViT(**SIZES, positions="absolute", layer_scale=0.0)
    state = {f"encoder.{k}": v for k, v in vit.state_dict().items()}
    state |= {f"decoder.{k}": v for k, v in vit.state_dict().items()}
    state |= {"quantize.embedding.weight": torch.zeros(16, 8), "encode_task_layer.0.weight": torch.zeros(24, 24),
              "decode_task_layer.0.weight": torch.zeros(24, 24)}
    return randomise(state, seed=2)


def images(height=32, width=32):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(3))


# ------------------------------------------------------------------------- files with the names of the released ones
def with_index(state):
    """As released: the index buffer beside every position table."""
    full = {}
    for k, v in state.items():
        full[k] = v
        if k.endswith("relative_position_bias_table"):
            full[k.replace("bias_table", "index")] = relative_position_index(4, 4)
    return full


def released_tokenizer(decoder_depth, teacher_dim):
    """With a copy of the teacher, its scaling layer and the embedding's dead entries, as published."""
    model = vqkd.VQKD(32, 8, 64, 2, 1, decoder_depth, codes=16, code_dim=8, teacher_dims=(teacher_dim,))
    state = randomise(model.state_dict(), seed=4)
    return dict(model=state | {
        "quantize.embedding.cluster_size": torch.zeros(16), "quantize.embedding.embed_avg": torch.rand(16, 8),
        "quantize.embedding.initted": torch.ones(1), "teacher_model.visual.conv1.weight": torch.rand(8, 3, 4, 4),
        "scaling_layer.shift": torch.rand(1, 3, 1, 1)})


def released_pretrain(**changes):
    model = BEiT(32, 8, 24, 2, 3, codes=20, early_layer=1, **changes)
    return dict(model=with_index(randomise(model.state_dict(), seed=5)))


class ConvModule(nn.Sequential):
    def __init__(self, inputs, outputs, kernel):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(inputs, outputs, kernel, bias=False), nn.BatchNorm2d(outputs)


def upernet(width=24, channels=12, classes=7):
    """A segmentation network as mmseg names it."""
    vit = ViT(**SIZES, pool=None)
    del vit.norm
    up = [nn.ConvTranspose2d(width, width, 2, 2) for _ in range(3)]
    vit.fpn1, vit.fpn2 = nn.Sequential(up[0], nn.BatchNorm2d(width), nn.GELU(), up[1]), nn.Sequential(up[2])
    head, auxiliary = nn.Module(), nn.Module()
    head.psp_modules = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), ConvModule(width, channels, 1))
                                     for n in (1, 2, 3, 6))
    head.bottleneck = ConvModule(width + 4 * channels, channels, 3)
    head.lateral_convs = nn.ModuleList(ConvModule(width, channels, 1) for _ in range(3))
    head.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in range(3))
    head.fpn_bottleneck, head.conv_seg = ConvModule(4 * channels, channels, 3), nn.Conv2d(channels, classes, 1)
    auxiliary.convs = nn.ModuleList([ConvModule(width, 5, 3)])
    auxiliary.conv_seg = nn.Conv2d(5, classes, 1)
    whole = nn.ModuleDict(dict(backbone=vit, decode_head=head, auxiliary_head=auxiliary))
    state = {k: v if v.dtype == torch.long else 0.3 * torch.randn(v.shape) for k, v in whole.state_dict().items()}
    return dict(state_dict=with_index(state), meta=dict(CLASSES=("wall", "sky"), time="now"))


RELEASED = {             # what the release holds: (kind, the file without its by-catch)
    "tokenizer, 1 layer, CLIP": ("vqkd", lambda: released_tokenizer(1, 512)),
    "tokenizer, 3 layers, CLIP": ("vqkd", lambda: released_tokenizer(3, 512)),
    "tokenizer, 1 layer, DINO": ("vqkd", lambda: released_tokenizer(1, 768)),
    "pt1k": ("pretrain", released_pretrain),
    "pt1k, separate head": ("pretrain", lambda: released_pretrain(shared_head=False)),
    "pt1k, no aggregation": ("pretrain", lambda: released_pretrain(head_depth=0)),
    "ft21k": ("finetune", lambda: dict(model=with_index(finetuned(classes=218)))),
    "ft1k": ("finetune", lambda: dict(module=with_index(finetuned(classes=10)))),
    "ft1k, [CLS]": ("finetune", lambda: dict(model=with_index(finetuned(classes=10, pool="cls")))),
    "UPerNet": ("segment", upernet),
}
ARGS = dict(lr=1.5e-3, epochs=1600, opt_betas=[0.9, 0.999], data_path="/imagenet", distributed=True, clip_grad=None)


def released_file(name, path):
    """Write it as it is published: arguments as a Namespace, optimiser state, counters. -> path, tensors"""
    contents = RELEASED[name][1]() | dict(
        args=argparse.Namespace(**ARGS), epoch=7, scaler=dict(scale=1.0),
        optimizer=dict(state={0: dict(step=3, exp_avg=torch.rand(2))}, param_groups=[dict(lr=0.1, params=[0])]))
    torch.save(contents, path)
    return path, weights.unwrap(contents)


def convert(source, target, to, *flags):
    converter.main([str(source), str(target), "--to", to, *map(str, flags)])
    return engine.read_file(target) if target.suffix != ".safetensors" else weights.open_file(target)


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) and v.dtype == b[k].dtype for k, v in a.items())


# ------------------------------------------------------------------------------------------------------ what is loaded
def test_a_classifier_takes_everything_from_pretraining_but_norm_and_heads():
    state = pretrained()
    model, _, report = load_backbone({"model": state}, num_classes=7)
    assert {k.split(".")[0] for k in report.missing} == {"fc_norm", "head"}
    assert {k.split(".")[0] for k in report.unexpected} == {"mask_token", "lm_head", "norm", "cls_pt_layers"}
    assert set(report.loaded) | set(report.missing) == set(model.state_dict())
    for k, v in model.state_dict().items():
        if k in state:
            assert torch.equal(v, state[k])


def test_the_shared_table_is_copied_into_every_block():
    state = pretrained()
    model, *_ = load_backbone({"model": state})
    tables = [block.attn.relative_position_bias_table for block in model.blocks]
    assert all(torch.equal(t, state["rel_pos_bias.relative_position_bias_table"]) for t in tables)
    assert tables[0].data_ptr() != tables[1].data_ptr()      # trained apart from here on


@pytest.mark.parametrize("pool", [None, "cls"])
def test_a_probe_sees_exactly_the_tokens_of_pretraining_final_norm_included(pool):
    state = pretrained()
    vit = ViT(**SIZES, positions="shared", pool=None).eval()
    vit.load_state_dict({k: v for k, v in state.items() if k in vit.state_dict()})
    model, _, report = load_backbone({"model": state}, pool=pool)
    assert report.missing == [] and "norm.weight" in report.loaded
    torch.testing.assert_close(model.eval()(images()), vit(images()))


def test_the_tokenizers_encoder_takes_imagenet_pixels_and_gives_the_same_tokens():
    state = tokenizer()
    vit = ViT(**SIZES, positions="absolute", layer_scale=0.0).eval()
    vit.load_state_dict({k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")})
    model, _, report = load_backbone({"model": state, "arch": SIZES}, pool=None)
    assert report.missing == [] and {k.split(".")[0] for k in report.unexpected} == {
        "decoder", "quantize", "encode_task_layer", "decode_task_layer"}
    torch.testing.assert_close(model.eval()(imagenet_normalize(images())), vit(2 * images() - 1), atol=1e-5, rtol=1e-4)


def test_other_classes_get_a_fresh_head_and_keep_the_fine_tuned_norm():
    state = finetuned(classes=21)                            # as from ImageNet-21k to ImageNet-1k
    model, _, report = load_backbone(state, num_classes=7)
    assert report.missing == ["head.weight", "head.bias"] and report.unexpected == []
    assert torch.equal(model.fc_norm.weight, state["fc_norm.weight"]) and model.head.weight.shape == (7, 24)


@pytest.mark.parametrize("wrap", [
    lambda s: {"model": s, "args": argparse.Namespace(lr=1)}, lambda s: {"module": s}, lambda s: s])
def test_released_files_load_however_they_wrap_their_weights(tmp_path, wrap):
    torch.save(wrap(pretrained(released_index=True)), tmp_path / "released.pth")
    model, _, report = load_backbone(tmp_path / "released.pth")
    assert (model.grid, model.width, model.depth, model.heads, model.patch_size) == ((4, 4), 24, 2, 3, 8)
    assert not any("index" in k for k in report.unexpected)


def test_num_classes_none_keeps_the_head_of_the_file():
    state = finetuned(classes=5)
    model, _, report = load_backbone(state, num_classes=None)
    assert report.missing == report.unexpected == [] and torch.equal(model.head.bias, state["head.bias"])
    with pytest.raises(UserError, match="no classifier"):
        load_backbone(pretrained(), num_classes=None)


def test_half_precision_files_are_loaded_as_float32():
    model, *_ = load_backbone({k: v.half() for k, v in pretrained().items()})
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_our_own_files_may_have_a_grid_that_is_not_square():
    state = pretrained(image_size=(32, 48))
    arch = SIZES | dict(image_size=(32, 48))
    model, _, report = load_backbone({"kind": "pretrain", "arch": arch, "model": state}, pool=None)
    assert model.grid == (4, 6) and report.missing == []
    model, *_ = load_backbone({"kind": "pretrain", "arch": arch, "model": state}, image_size=(48, 40))
    assert model(images(48, 40)).shape == (2, 31, 24)
    with pytest.raises(UserError, match="not square and without"):
        load_backbone(state)


# --------------------------------------------------------------------------------------------------------- other sizes
def test_resizing_to_the_same_grid_changes_nothing():
    table, positions = torch.randn(7 * 9 + 3, 2), torch.randn(1, 21, 6)
    assert torch.equal(resize_relative_table(table, (4, 5), (4, 5)), table)
    assert torch.equal(resize_pos_embed(positions, (4, 5), (4, 5)), positions)


def test_a_table_of_another_grid_than_stated_is_refused():
    with pytest.raises(UserError, match="has 52 rows, .* 4x5 patches"):
        resize_relative_table(torch.zeros(52, 2), (4, 5), (6, 7))


def test_the_three_cls_rows_are_copied_and_offset_zero_stays():
    table = torch.randn(7 * 9 + 3, 2)
    resized = resize_relative_table(table, (4, 5), (6, 7))
    assert resized.shape == (11 * 13 + 3, 2) and torch.equal(resized[-3:], table[-3:])
    torch.testing.assert_close(resized[:-3].view(11, 13, 2)[5, 6], table[:-3].view(7, 9, 2)[3, 4])
    torch.testing.assert_close(resized[:-3].view(11, 13, 2)[6, 6], table[:-3].view(7, 9, 2)[4, 4])   # offset 1, too


def test_a_side_that_stays_is_resized_as_if_it_were_alone():
    profile = torch.randn(7)                                 # a table that depends on dy only
    table = torch.cat([profile[:, None].expand(7, 9).reshape(-1, 1), torch.zeros(3, 1)])
    resized = resize_relative_table(table, (4, 5), (6, 5))[:-3].view(11, 9)
    torch.testing.assert_close(resized, resized[:, :1].expand(11, 9), atol=1e-5, rtol=1e-5)


def test_the_geometric_grid_reaches_the_edge_of_the_new_one():
    old = geometric_offsets(14, 24)
    assert len(old) == 27 and old[13] == 0 and old[14] == 1
    assert old[-1] == pytest.approx(23, abs=1e-3) and np.allclose(old, -old[::-1])
    steps = np.diff(old[13:])
    assert np.allclose(steps[1:] / steps[:-1], steps[1]) and steps[1] > 1


def test_the_ratio_of_the_geometric_grid_stays_between_1_01_and_1_5():
    assert geometric_offsets(3, 10) == pytest.approx([-2.5, -1, 0, 1, 2.5], abs=1e-5)            # 8 would reach the edge
    assert geometric_offsets(4, 2)[4:] == pytest.approx([1, 2.01, 3.0301], abs=1e-5)             # never shrinking


def test_a_constant_table_and_constant_positions_stay_constant():
    resized = resize_relative_table(torch.full((52, 2), 1.5), (4, 4), (7, 7))
    torch.testing.assert_close(resized, torch.full((13 * 13 + 3, 2), 1.5))
    positions = torch.full((1, 17, 6), 1.5)
    torch.testing.assert_close(resize_pos_embed(positions, (4, 4), (7, 7)), torch.full((1, 50, 6), 1.5))


def test_a_table_that_is_cubic_in_the_offset_stays_that_cubic():
    def cubic(dy, dx):                                       # one head, and nothing for [CLS]
        y, x = torch.meshgrid(torch.tensor(dy / 9), torch.tensor(dx / 10), indexing="ij")
        return torch.cat([(y ** 3 - 2 * x ** 3 + y * x ** 2 + y ** 2 - x + 1).flatten(), torch.zeros(3)])[:, None]
    old = cubic(geometric_offsets(7, 9), geometric_offsets(6, 10))
    new = cubic(np.arange(-8.0, 9), np.arange(-9.0, 10))     # at whole offsets again
    torch.testing.assert_close(resize_relative_table(old, (7, 6), (9, 10)), new, atol=1e-4, rtol=0)


def test_absolute_positions_are_resized_bicubically_and_cls_stays():
    positions = torch.randn(1, 1 + 12, 5)
    resized, grid = resize_pos_embed(positions, (3, 4), (6, 5)), positions[0, 1:].T.view(1, 5, 3, 4)
    assert torch.equal(resized[:, 0], positions[:, 0])
    cubic = torch.nn.functional.interpolate(grid, size=(6, 5), mode="bicubic", align_corners=False)
    torch.testing.assert_close(resized[0, 1:].T.view(1, 5, 6, 5), cubic)


# --------------------------------------------------------------------------------------------------------------- timm
@pytest.mark.parametrize("shared", [False, True])
def test_timms_beit_gives_the_same_logits_from_the_same_weights(shared):
    timm_beit = pytest.importorskip("timm.models.beit")
    theirs = timm_beit.Beit(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=11, global_pool="avg", qkv_bias=True,
        init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=not shared, use_shared_rel_pos_bias=shared).eval()
    theirs.load_state_dict(state := randomise(theirs.state_dict()))
    ours, _, report = load_backbone(state, num_classes=11)
    assert report.missing == report.unexpected == []
    with torch.no_grad():
        expected, logits = theirs(images()), ours.eval()(images())
    assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()


# ------------------------------------------------------------------------------------------------------ file to file
@pytest.mark.parametrize("name", RELEASED)
def test_a_released_file_goes_to_ours_and_back_bit_for_bit(tmp_path, name, capsys):
    source, tensors = released_file(name, tmp_path / "released.pth")
    ours = convert(source, tmp_path / "ours.pt", "ours")
    assert ours["kind"] == RELEASED[name][0] and ours["args"] == ARGS and "optimizer" not in ours
    back = convert(tmp_path / "ours.pt", tmp_path / "back.pth", "released")
    kept = {k: v for k, v in tensors.items() if not k.startswith(("teacher_model.", "scaling_layer."))}
    assert same_tensors(weights.unwrap(back), kept)
    assert vars(back["args"]) == ARGS and "kind" not in back
    assert ("state_dict" in back) == (ours["kind"] == "segment")
    assert back.get("meta") == (dict(CLASSES=("wall", "sky"), time="now") if name == "UPerNet" else None)
    again = convert(tmp_path / "back.pth", tmp_path / "again.pt", "ours")
    assert same_tensors(again["model"], ours["model"]) and again["arch"] == ours["arch"]
    said = capsys.readouterr().out
    assert "optimizer" in said and ("teacher_model" in said) == (ours["kind"] == "vqkd")


@pytest.mark.parametrize("name", RELEASED)
def test_what_stages_load_is_the_same_from_the_released_file_and_from_ours(tmp_path, name):
    source, _ = released_file(name, tmp_path / "released.pth")
    convert(source, tmp_path / "ours.pt", "ours")
    kind = RELEASED[name][0]
    if kind == "vqkd":
        a, b = (vqkd.load_tokenizer(f) for f in (source, tmp_path / "ours.pt"))
        assert torch.equal(a.encode(images()), b.encode(images()))
    else:
        classes = None if kind == "finetune" else 0
        (a, _, report), (b, _, _) = (load_backbone(f, pool=None, num_classes=classes)
                                     for f in (source, tmp_path / "ours.pt"))
        assert report.missing == (["norm.weight", "norm.bias"] if kind == "segment" else [])
    assert same_tensors(a.state_dict(), b.state_dict())


def test_our_own_files_come_back_with_all_they_say(tmp_path):
    # A tokenizer's 4 heads of 16 cannot be read off its shapes, a grid of 4 x 6 patches not off a table.
    tok = vqkd.VQKD(32, 8, 64, 2, 4, 1, codes=16, code_dim=8, teacher_dims=(36,))
    vit = ViT(**(SIZES | dict(image_size=(32, 48))), num_classes=3)
    arch = dict(image_size=32, patch_size=8, width=64, depth=2, heads=4, positions="absolute", layer_scale=0)
    for kind, state, arch, more in (
            ("vqkd", tok.state_dict(), arch, dict(args=dict(codes=16, out="runs/tiny"), result=dict(cosine=0.5))),
            ("finetune_21k", vit.state_dict(), SIZES | dict(image_size=(32, 48)), dict(args={}, classes=list("abc")))):
        ours = dict(kind=kind, model=randomise(state), arch=arch, commit="unknown", **more)
        torch.save(ours, tmp_path / f"{kind}.pt")
        convert(tmp_path / f"{kind}.pt", tmp_path / f"{kind}.pth", "released")
        back = convert(tmp_path / f"{kind}.pth", tmp_path / f"{kind}2.pt", "ours")
        assert same_tensors(back.pop("model"), ours.pop("model"))
        assert back.pop("arch").items() >= ours.pop("arch").items()
        assert back.items() >= ours.items()
    assert vqkd.load_tokenizer(tmp_path / "vqkd2.pt").encoder.heads == 4


def test_a_converted_file_is_not_taken_for_a_finished_run(tmp_path):
    torch.save(dict(kind="finetune", model=finetuned(), arch=SIZES, args={}, source_hash={}), tmp_path / "made.pt")
    convert(tmp_path / "made.pt", tmp_path / "finetune.pt", "ours")
    with pytest.raises(UserError, match="finetune.pt was made by another command"):
        engine.start_or_resume("finetune", argparse.Namespace(out=tmp_path, fresh=False), engine.Process(0, 1, "cpu"))


def test_timms_own_training_checkpoints_state_their_arch_as_a_word(tmp_path):
    torch.save(dict(arch="beitv2_base_patch16_224", state_dict=finetuned(), epoch=3), tmp_path / "timm.pth")
    model, *_ = load_backbone(tmp_path / "timm.pth", num_classes=None)
    ours = convert(tmp_path / "timm.pth", tmp_path / "ours.pt", "ours")
    assert ours["arch"]["depth"] == model.depth == 2 and same_tensors(ours["model"], model.state_dict())


def test_the_released_code_gets_the_dead_entries_it_asks_for(tmp_path):
    tok = vqkd.VQKD(32, 8, 64, 2, 1, 1, codes=16, code_dim=8, teacher_dims=(36, 20))
    torch.save(dict(kind="vqkd", model=tok.state_dict(), arch=dict(heads=1)), tmp_path / "ours.pt")
    state = convert(tmp_path / "ours.pt", tmp_path / "new.pth", "released")["model"]
    assert state["quantize.embedding.initted"].item() == 1 and state["quantize.embedding.cluster_size"].shape == (16,)
    assert torch.equal(state["quantize.embedding.embed_avg"], tok.quantize.embedding.weight)
    assert not any(k.startswith("more_decode") for k in state)       # our second teacher has no place there


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["ft21k", "ft1k, [CLS]", "pt1k"])
def test_timm_loads_our_file_strictly_and_says_the_same_as_we_do(tmp_path, name, suffix):
    timm = pytest.importorskip("timm")
    source, _ = released_file(name, tmp_path / "released.pth")
    out = tmp_path / f"timm{suffix}"
    state = convert(source, out, "timm")
    theirs = timm.create_model("beitv2_base_patch16_224", **converter.timm_arguments(converter.examine(source).arch)).eval()
    theirs.load_state_dict(state, strict=True)
    ours, *_ = load_backbone(source, pool=None, num_classes=None if "ft" in name else 0)
    with torch.no_grad():
        expected = theirs(images()) if "ft" in name else theirs.forward_features(images())
        given = ours.eval()(images())
    assert (given - expected).abs().max() <= 2e-5 * expected.abs().max()

    back = convert(out, tmp_path / "back.pt", "ours")        # and the way back
    assert back["kind"] == ("finetune" if "ft" in name else "backbone")
    assert same_tensors(back["model"], state)
    again, _, report = load_backbone(tmp_path / "back.pt", pool=None, num_classes=None if "ft" in name else 0)
    assert report.missing == report.unexpected == [] and same_tensors(again.state_dict(), ours.state_dict())


def test_timm_is_told_of_absolute_positions_no_layer_scale_and_other_sizes(tmp_path):
    timm = pytest.importorskip("timm")
    model = ViT(**SIZES, positions="absolute", layer_scale=0.0, mlp_ratio=2.0, in_channels=1, num_classes=5)
    torch.save(dict(kind="finetune", model=randomise(model.state_dict()), arch=SIZES), tmp_path / "ours.pt")
    state = convert(tmp_path / "ours.pt", tmp_path / "timm.pth", "timm")
    options = converter.timm_arguments(converter.examine(tmp_path / "ours.pt").arch)
    timm.create_model("beitv2_base_patch16_224", **options).load_state_dict(state, strict=True)


def test_pretraining_goes_to_timm_with_its_table_in_every_block_and_without_its_heads(tmp_path, capsys):
    source, tensors = released_file("pt1k", tmp_path / "released.pth")
    state = convert(source, tmp_path / "timm.pth", "timm")
    for i in range(2):
        assert torch.equal(state[f"blocks.{i}.attn.relative_position_bias_table"],
                           tensors["rel_pos_bias.relative_position_bias_table"])
    said = capsys.readouterr().out
    assert all(k in said for k in ("mask_token", "lm_head (2)", "cls_pt_layers", "global_pool='token'"))


@pytest.mark.parametrize("name", ["tokenizer, 1 layer, CLIP", "UPerNet"])
def test_what_timm_has_no_place_for_is_refused(tmp_path, name):
    source, _ = released_file(name, tmp_path / "released.pth")
    with pytest.raises(UserError, match="timm has no place"):
        convert(source, tmp_path / "timm.pth", "timm")
    assert os.listdir(tmp_path) == ["released.pth"]


@pytest.mark.parametrize("name", ["ft1k", "pt1k", "tokenizer, 3 layers, CLIP", "UPerNet"])
def test_another_image_size_is_what_load_backbone_would_have_made_of_it(tmp_path, name):
    source, _ = released_file(name, tmp_path / "released.pth")
    file = convert(source, tmp_path / "large.pt", "ours", "--image-size", 48)
    resized, _, report = load_backbone(file, pool=None)
    ours, *_ = load_backbone(source, pool=None, image_size=48)
    assert resized.grid == (6, 6)
    for k in report.loaded:
        assert torch.equal(resized.state_dict()[k], ours.state_dict()[k]), k
    for size, sentence in ((44, "not a multiple"), (8, "two at least")):
        with pytest.raises(UserError, match=sentence):
            convert(source, tmp_path / "odd.pt", "ours", "--image-size", size)


def test_our_own_file_says_its_new_size_and_how_many_blocks_it_should_have(tmp_path):
    ours = dict(kind="finetune", model=finetuned(), arch=dict(SIZES), image_size=32, args={})
    torch.save(ours, tmp_path / "ours.pt")
    larger = convert(tmp_path / "ours.pt", tmp_path / "48.pt", "ours", "--image-size", 48)
    assert larger["image_size"] == larger["arch"]["image_size"] == 48
    ours["model"] = {k: v for k, v in ours["model"].items() if not k.startswith("blocks.1.")}
    torch.save(ours, tmp_path / "short.pt")
    with pytest.raises(UserError, match=r"lacks blocks.1.gamma_1, .* and \d+ more"):
        converter.main(["--check", str(tmp_path / "short.pt")])


def test_half_precision_stays_half(tmp_path):
    torch.save({k: v.half() for k, v in finetuned().items()}, tmp_path / "half.pth")
    assert convert(tmp_path / "half.pth", tmp_path / "ours.pt", "ours")["model"]["head.bias"].dtype == torch.half


@pytest.mark.parametrize("name", RELEASED)
def test_check_says_what_a_file_is_and_which_commands_take_it(tmp_path, name, capsys):
    source, tensors = released_file(name, tmp_path / "released.pth")
    converter.main(["--check", str(source)])
    said = capsys.readouterr().out
    kind = RELEASED[name][0]
    command, size = dict(vqkd=("pretrain.py", "16 codes"), pretrain=("linprobe.py", "20 codes"), segment=(
        "segment.py", "7 classes"), finetune=("--eval", f"{len(tensors.get('head.bias', []))} classes"))[kind]
    assert f"({kind})" in said and command in said and size in said and "32x32, patch 8" in said
    assert str(source) in said.split("good for")[1] and "released" in said


# A renamed, a missing, an extra and a misshapen tensor of every kind: a name, and what becomes of it.
DAMAGE = [
    ("tokenizer, 1 layer, CLIP", "encoder.blocks.1.mlp.fc1.bias"),
    ("tokenizer, 3 layers, CLIP", "decoder.blocks.2.norm1.bias"),
    ("tokenizer, 3 layers, CLIP", "quantize.cluster_size"),
    ("tokenizer, 1 layer, DINO", "encode_task_layer.2.bias"),
    ("tokenizer, 1 layer, DINO", "decode_task_layer.0.weight"),
    ("pt1k", "cls_pt_layers.1.gamma_2"), ("pt1k", "mask_token"), ("pt1k, separate head", "cls_pt_norm.bias"),
    ("ft21k", "fc_norm.bias"), ("ft21k", "blocks.0.gamma_1"), ("ft1k, [CLS]", "norm.weight"), ("ft1k", "head.weight"),
    ("UPerNet", "decode_head.fpn_convs.2.bn.running_var"), ("UPerNet", "backbone.fpn1.3.bias"),
    ("UPerNet", "auxiliary_head.convs.0.conv.weight"), ("UPerNet", "backbone.blocks.1.attn.q_bias"),
]


@pytest.mark.parametrize("damage", ["renamed", "missing", "extra", "misshapen", "not finite"])
@pytest.mark.parametrize("name, key", DAMAGE)
def test_a_damaged_file_is_refused_by_the_name_that_is_wrong_and_nothing_is_written(tmp_path, name, key, damage):
    source, _ = released_file(name, tmp_path / "released.pth")
    contents = engine.read_file(source)
    tensors = weights.unwrap(contents)
    named = [key]
    if damage == "extra":
        named = [f"{key}_too"]
        tensors[named[0]] = torch.zeros(3)
    elif damage == "misshapen":
        tensors[key] = torch.zeros(*tensors[key].shape, 2)
    elif damage == "not finite":
        tensors[key] = torch.full_like(tensors[key], torch.nan)
    else:
        value = tensors.pop(key)
        if damage == "renamed":
            part = key.rsplit(".", 1)
            named.append(".".join([*part[:-1], f"x_{part[-1]}"]))
            tensors[named[1]] = value
    torch.save(contents, source)
    for arguments in ([source, tmp_path / "new.pt", "--to", "ours"], ["--check", source]):
        with pytest.raises(UserError) as error:
            converter.main([str(a) for a in arguments])
        assert all(k in str(error.value) for k in named) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["released.pth"]


def test_an_index_that_orders_its_offsets_in_another_way_is_refused(tmp_path):
    source, _ = released_file("pt1k", tmp_path / "released.pth")
    contents = engine.read_file(source)
    contents["model"]["rel_pos_bias.relative_position_index"] = relative_position_index(4, 4).T.contiguous()
    torch.save(contents, source)
    with pytest.raises(UserError, match="offsets in another way in rel_pos_bias.relative_position_index"):
        converter.main(["--check", str(source)])


def test_nothing_is_overwritten_and_the_command_line_is_checked(tmp_path):
    source, _ = released_file("ft1k", tmp_path / "released.pth")
    before = source.read_bytes()
    (tmp_path / "there.pt").write_text("precious")
    (tmp_path / "link.pt").symlink_to(source)
    for target, sentence in (("there.pt", "there.pt exists"), ("released.pth", "is IN itself"),
                             ("link.pt", "is IN itself")):
        with pytest.raises(UserError, match=sentence):
            convert(source, tmp_path / target, "ours")
    assert (tmp_path / "there.pt").read_text() == "precious" and source.read_bytes() == before
    with pytest.raises(UserError, match="safetensors file holds tensors alone"):
        convert(source, tmp_path / "new.safetensors", "released")
    with pytest.raises(UserError, match="give IN OUT --to"):
        converter.main([str(source)])
    with pytest.raises(UserError, match="no file"):
        converter.main([str(tmp_path / "absent.pth"), str(tmp_path / "new.pt"), "--to", "ours"])
    (tmp_path / "text.safetensors").write_text("no tensors here")
    with pytest.raises(UserError, match="text.safetensors is truncated"):
        converter.main(["--check", str(tmp_path / "text.safetensors")])
    assert {f.name for f in tmp_path.iterdir()} == {"released.pth", "there.pt", "link.pt", "text.safetensors"}


def test_from_the_shell_an_error_is_one_sentence_and_exit_code_2(tmp_path):
    source, _ = released_file("UPerNet", tmp_path / "released.pth")
    done = stage("extras.convert", source, tmp_path / "ours.pt", "--to", "ours")
    assert "segment" in done.stdout and (tmp_path / "ours.pt").is_file()
    done = stage("extras.convert", source, tmp_path / "ours.pt", "--to", "ours", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_what_segment_py_writes_is_known_name_by_name(tmp_path):
    segment = pytest.importorskip("segment")
    model = segment.UPerNet(ViT(**SIZES | dict(depth=12), pool=None), 7, 16)
    torch.save(dict(kind="segment", model=model.state_dict(), arch=SIZES | dict(depth=12), classes=list("abcdefg")),
               tmp_path / "segment.pt")
    back = convert(tmp_path / "segment.pt", tmp_path / "released.pth", "released")
    state = back["state_dict"]
    assert back["meta"] == dict(CLASSES=tuple("abcdefg"))
    assert same_tensors({k: v for k, v in state.items() if not k.endswith("_index")}, model.state_dict())


@pytest.mark.skipif("BEIT2_GOLDEN" not in os.environ, reason="BEIT2_GOLDEN is not set")
@pytest.mark.parametrize("file, wanted", [
    ("vqkd_encode_decode", "vqkd"), ("mim_forward", "pretrain"), ("mim_forward_separate_head", "pretrain"),
    ("encoder_forward", "finetune"), ("pretrain", "pretrain"), ("pretrain_abs", "pretrain"), ("finetuned", "finetune")])
def test_the_authors_own_names_go_to_ours_and_back_bit_for_bit(tmp_path, file, wanted):
    load = lambda name: torch.load(Path(os.environ["BEIT2_GOLDEN"]) / f"{name}.pt", weights_only=True)   # noqa: E731
    inputs = load("finetune_load")["inputs"]
    state = inputs[file] if file in inputs else load(file)["state_dict"]
    # 48 wide with 4 heads, 12 with 3: not 64 a head, as all released models have; a tokenizer does not tell.
    torch.save(dict(model=state, arch=dict(heads=3 if file in inputs else 4)), tmp_path / "released.pth")
    ours = convert(tmp_path / "released.pth", tmp_path / "ours.pt", "ours")
    back = convert(tmp_path / "ours.pt", tmp_path / "back.pth", "released")
    # finetune_load.pt leaves the index buffers out of some files; the released code's own have them.
    assert ours["kind"] == wanted and same_tensors(
        {k: v for k, v in back["model"].items() if k in state or not k.endswith("_index")}, state)


@pytest.mark.slow
def test_base_size_logits_equal_timms_in_both_directions_at_224_and_384(tmp_path):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("beitv2_base_patch16_224").eval()
    state = {k: (1.0 if "table" in k else 0.03) * v for k, v in randomise(theirs.state_dict()).items()}
    theirs.load_state_dict(state)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    convert(tmp_path / "timm.pth", tmp_path / "ours.pt", "ours")                 # timm -> ours
    larger = convert(tmp_path / "ours.pt", tmp_path / "384.safetensors", "timm", "--image-size", 384)    # ours -> timm
    assert same_tensors(convert(tmp_path / "ours.pt", tmp_path / "back.pth", "timm"), state)
    theirs_384 = timm.create_model("beitv2_base_patch16_224", img_size=384).eval()
    theirs_384.load_state_dict(larger, strict=True)
    for size, network in ((224, theirs), (384, theirs_384)):
        ours, *_ = load_backbone(tmp_path / "ours.pt", num_classes=None, image_size=size)
        with torch.no_grad():
            expected, logits = network(images(size, size)), ours.eval()(images(size, size))
        assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()


# ------------------------------------------------------------------------------------------------------------- errors
def without(state, *names):
    return {k: v for k, v in state.items() if k not in names}


@pytest.mark.parametrize("state, sentence", [
    (pretrained() | {"blocks.0.attn.k_bias": torch.zeros(24)}, "unknown blocks.0.attn.k_bias"),
    (without(pretrained(), "blocks.1.mlp.fc2.bias"), "lacks blocks.1.mlp.fc2.bias"),
    (without(pretrained(), "cls_token"), "lacks cls_token"),
    (pretrained() | {"blocks.1.gamma_1": torch.zeros(7)}, "in a wrong shape blocks.1.gamma_1 .7,. instead of .24,."),
    (pretrained() | {"blocks.1.gamma_1": torch.full((24,), torch.nan)}, "numbers that are not finite in blocks.1.gamma_1"),
    (pretrained() | {"rel_pos_bias.relative_position_bias_table": torch.zeros(50, 3)}, "not a grid"),
    (without(pretrained(), "rel_pos_bias.relative_position_bias_table"), "one kind of positions"),
    ({"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}, "no Vision Transformer"),
    ({"step": 3}, "holds no weights"),
    (without(tokenizer(), "encoder.fc_norm.bias"), "lacks fc_norm.bias"),
    (without(tokenizer(), "encoder.patch_embed.proj.bias"), "lacks patch_embed.proj.bias"),
    (tokenizer(), "does not tell the number of attention heads"),
    (finetuned() | {"norm.weight": torch.zeros(24)}, "unknown norm.weight"),
    (finetuned(pool="cls"), r"trained with \[CLS\] pooling"),
])
def test_what_does_not_belong_is_one_sentence_that_names_it(state, sentence):
    arch = {} if "attention heads" in sentence else dict(arch=dict(heads=3))
    with pytest.raises(UserError, match=sentence) as error:
        load_backbone({"model": state, **arch})
    assert "\n" not in str(error.value)


def test_a_mean_pooled_classifier_cannot_be_read_at_cls():
    with pytest.raises(UserError, match="trained with mean pooling"):
        load_backbone(finetuned(), pool="cls", num_classes=5)


def test_errors_name_the_file_and_a_size_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing.pt"):
        load_backbone(tmp_path / "nothing.pt")
    engine.write_file(tmp_path / "some.pt", dict(model=without(pretrained(), "cls_token")))
    with pytest.raises(UserError, match="some.pt .pretrain. lacks cls_token"):
        load_backbone(tmp_path / "some.pt")
    with pytest.raises(UserError, match="36x36 is not a multiple of the patch size 8"):
        load_backbone(pretrained(), image_size=36)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "hostile.pt")
    with pytest.raises(UserError, match="hostile.pt holds objects other than tensors"):
        load_backbone(tmp_path / "hostile.pt")
    with pytest.raises(UserError, match="hostile.pt holds objects other than tensors"):
        converter.main([str(tmp_path / "hostile.pt"), str(tmp_path / "new.pt"), "--to", "ours"])
    assert not (tmp_path / "new.pt").exists()
