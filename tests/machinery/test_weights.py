"""Weights in: what a file is, what a backbone takes from it, what another grid changes."""

import argparse

import numpy as np
import pytest
import torch
from torch import nn

from checkpoints import SIZES, finetuned, images, pretrained, randomise, tokenizer
from extras import convert
from model import ViT, imagenet_normalize
from support.files import UserError, write_file
from support.positions import geometric_offsets, resize_pos_embed, resize_relative_table
from support.weights import load_backbone


# --- what is loaded -------------------------------------------------------------------------------
def test_a_classifier_takes_everything_from_pretraining_but_norm_and_heads():
    state = pretrained()
    model, _, report = load_backbone({"model": state}, num_classes=7)
    assert {k.split(".")[0] for k in report.missing} == {"fc_norm", "head"}
    assert {k.split(".")[0] for k in report.unexpected} == {
        "mask_token",
        "lm_head",
        "norm",
        "cls_pt_layers",
    }
    assert set(report.loaded) | set(report.missing) == set(model.state_dict())
    for k, v in model.state_dict().items():
        if k in state:
            assert torch.equal(v, state[k])


def test_the_shared_table_is_copied_into_every_block():
    state = pretrained()
    model, *_ = load_backbone({"model": state})
    tables = [block.attn.relative_position_bias_table for block in model.blocks]
    assert all(torch.equal(t, state["rel_pos_bias.relative_position_bias_table"]) for t in tables)
    assert tables[0].data_ptr() != tables[1].data_ptr()  # trained apart from here on


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
    vit.load_state_dict(
        {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    )
    model, _, report = load_backbone({"model": state, "arch": SIZES}, pool=None)
    assert report.missing == [] and {k.split(".")[0] for k in report.unexpected} == {
        "decoder",
        "quantize",
        "encode_task_layer",
        "decode_task_layer",
    }
    torch.testing.assert_close(
        model.eval()(imagenet_normalize(images())), vit(2 * images() - 1), atol=1e-5, rtol=1e-4
    )


def test_other_classes_get_a_fresh_head_and_keep_the_fine_tuned_norm():
    state = finetuned(classes=21)  # as from ImageNet-21k to ImageNet-1k
    model, _, report = load_backbone(state, num_classes=7)
    assert report.missing == ["head.weight", "head.bias"] and report.unexpected == []
    assert torch.equal(
        model.fc_norm.weight, state["fc_norm.weight"]
    ) and model.head.weight.shape == (7, 24)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"model": s, "args": argparse.Namespace(lr=1)},
        lambda s: {"module": s},
        lambda s: s,
    ],
)
def test_released_files_load_however_they_wrap_their_weights(tmp_path, wrap):
    torch.save(wrap(pretrained(released_index=True)), tmp_path / "released.pth")
    model, _, report = load_backbone(tmp_path / "released.pth")
    assert (model.grid, model.width, model.depth, model.heads, model.patch_size) == (
        (4, 4),
        24,
        2,
        3,
        8,
    )
    assert not any("index" in k for k in report.unexpected)


def test_num_classes_none_keeps_the_head_of_the_file():
    state = finetuned(classes=5)
    model, _, report = load_backbone(state, num_classes=None)
    assert report.missing == report.unexpected == [] and torch.equal(
        model.head.bias, state["head.bias"]
    )
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
    model, *_ = load_backbone(
        {"kind": "pretrain", "arch": arch, "model": state}, image_size=(48, 40)
    )
    assert model(images(48, 40)).shape == (2, 31, 24)
    with pytest.raises(UserError, match="not square and without"):
        load_backbone(state)


# --- other sizes ----------------------------------------------------------------------------------
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
    torch.testing.assert_close(
        resized[:-3].view(11, 13, 2)[6, 6], table[:-3].view(7, 9, 2)[4, 4]
    )  # offset 1, too


def test_a_side_that_stays_is_resized_as_if_it_were_alone():
    profile = torch.randn(7)  # a table that depends on dy only
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
    assert geometric_offsets(3, 10) == pytest.approx(
        [-2.5, -1, 0, 1, 2.5], abs=1e-5
    )  # 8 would reach the edge
    assert geometric_offsets(4, 2)[4:] == pytest.approx(
        [1, 2.01, 3.0301], abs=1e-5
    )  # never shrinking


def test_a_constant_table_and_constant_positions_stay_constant():
    resized = resize_relative_table(torch.full((52, 2), 1.5), (4, 4), (7, 7))
    torch.testing.assert_close(resized, torch.full((13 * 13 + 3, 2), 1.5))
    positions = torch.full((1, 17, 6), 1.5)
    torch.testing.assert_close(
        resize_pos_embed(positions, (4, 4), (7, 7)), torch.full((1, 50, 6), 1.5)
    )


def test_a_table_that_is_cubic_in_the_offset_stays_that_cubic():
    def cubic(dy, dx):  # one head, and nothing for [CLS]
        y, x = torch.meshgrid(torch.tensor(dy / 9), torch.tensor(dx / 10), indexing="ij")
        return torch.cat([(y**3 - 2 * x**3 + y * x**2 + y**2 - x + 1).flatten(), torch.zeros(3)])[
            :, None
        ]

    old = cubic(geometric_offsets(7, 9), geometric_offsets(6, 10))
    new = cubic(np.arange(-8.0, 9), np.arange(-9.0, 10))  # at whole offsets again
    torch.testing.assert_close(resize_relative_table(old, (7, 6), (9, 10)), new, atol=1e-4, rtol=0)


def test_absolute_positions_are_resized_bicubically_and_cls_stays():
    positions = torch.randn(1, 1 + 12, 5)
    resized, grid = resize_pos_embed(positions, (3, 4), (6, 5)), positions[0, 1:].T.view(1, 5, 3, 4)
    assert torch.equal(resized[:, 0], positions[:, 0])
    cubic = torch.nn.functional.interpolate(grid, size=(6, 5), mode="bicubic", align_corners=False)
    torch.testing.assert_close(resized[0, 1:].T.view(1, 5, 6, 5), cubic)


# --- timm -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("shared", [False, True])
def test_timms_beit_gives_the_same_logits_from_the_same_weights(shared):
    timm_beit = pytest.importorskip("timm.models.beit")
    theirs = timm_beit.Beit(
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=3,
        num_heads=4,
        num_classes=11,
        global_pool="avg",
        qkv_bias=True,
        init_values=0.1,
        use_abs_pos_emb=False,
        use_rel_pos_bias=not shared,
        use_shared_rel_pos_bias=shared,
    ).eval()
    theirs.load_state_dict(state := randomise(theirs.state_dict()))
    ours, _, report = load_backbone(state, num_classes=11)
    assert report.missing == report.unexpected == []
    with torch.no_grad():
        expected, logits = theirs(images()), ours.eval()(images())
    assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()


# --- errors ---------------------------------------------------------------------------------------
def without(state, *names):
    return {k: v for k, v in state.items() if k not in names}


@pytest.mark.parametrize(
    "state, sentence",
    [
        (pretrained() | {"blocks.0.attn.k_bias": torch.zeros(24)}, "unknown blocks.0.attn.k_bias"),
        (without(pretrained(), "blocks.1.mlp.fc2.bias"), "lacks blocks.1.mlp.fc2.bias"),
        (without(pretrained(), "cls_token"), "lacks cls_token"),
        (
            pretrained() | {"blocks.1.gamma_1": torch.zeros(7)},
            "in a wrong shape blocks.1.gamma_1 .7,. instead of .24,.",
        ),
        (
            pretrained() | {"blocks.1.gamma_1": torch.full((24,), torch.nan)},
            "numbers that are not finite in blocks.1.gamma_1",
        ),
        (
            pretrained() | {"rel_pos_bias.relative_position_bias_table": torch.zeros(50, 3)},
            "not a grid",
        ),
        (
            without(pretrained(), "rel_pos_bias.relative_position_bias_table"),
            "one kind of positions",
        ),
        ({"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}, "no Vision Transformer"),
        ({"step": 3}, "holds no weights"),
        (without(tokenizer(), "encoder.fc_norm.bias"), "lacks fc_norm.bias"),
        (without(tokenizer(), "encoder.patch_embed.proj.bias"), "lacks patch_embed.proj.bias"),
        (tokenizer(), "does not tell the number of attention heads"),
        (finetuned() | {"norm.weight": torch.zeros(24)}, "unknown norm.weight"),
        (finetuned(pool="cls"), r"trained with \[CLS\] pooling"),
    ],
)
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
    write_file(tmp_path / "some.pt", dict(model=without(pretrained(), "cls_token")))
    with pytest.raises(UserError, match="some.pt .pretrain. lacks cls_token"):
        load_backbone(tmp_path / "some.pt")
    with pytest.raises(UserError, match="36x36 is not a multiple of the patch size 8"):
        load_backbone(pretrained(), image_size=36)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "hostile.pt")
    with pytest.raises(UserError, match="hostile.pt holds objects other than tensors"):
        load_backbone(tmp_path / "hostile.pt")
    with pytest.raises(UserError, match="hostile.pt holds objects other than tensors"):
        convert.main([str(tmp_path / "hostile.pt"), str(tmp_path / "new.pt"), "--to", "ours"])
    assert not (tmp_path / "new.pt").exists()
