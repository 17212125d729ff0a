"""The Vision Transformer: patches, relative positions, attention, stochastic depth, read-outs."""
import math

import pytest
import torch
import torch.nn.functional as F

from extras.panels import attention_maps
from model import (
    PRESETS, Attention, Block, Mlp, ViT, attention, attention_weights, drop_path,
    imagenet_normalize, relative_position_index)


def small(**options):
    return ViT(32, 8, 32, 3, 4, **options)


def randomise(model):
    """Random numbers in every parameter, so that tables and norms show in the result."""
    for name, p in model.named_parameters():
        is_norm = "norm" in name and name.endswith("weight")
        torch.nn.init.normal_(p, mean=1.0 if is_norm else 0.0, std=0.3)


# --- relative positions ---------------------------------------------------------------------------
def test_relative_position_rows_depend_on_the_offset_alone():
    gh, gw = 3, 5
    index = relative_position_index(gh, gw)[1:, 1:].view(gh, gw, gh, gw)
    assert index[0, 0, 1, 2] == index[1, 2, 2, 4]            # the same offset at another place
    assert index[0, 0, 1, 2] != index[1, 2, 0, 0]            # the offset back
    assert index[0, 0, 0, 0] == (gh - 1) * (2 * gw - 1) + gw - 1     # no offset: the middle row


def test_every_offset_has_a_row_and_cls_has_three():
    index = relative_position_index(14, 14)
    assert index.shape == (197, 197)
    assert index.unique().numel() == 732                     # 27 * 27 + 3
    assert (index[0, 1:] == 729).all()
    assert (index[1:, 0] == 730).all()
    assert index[0, 0] == 731


def test_position_tables_start_at_zero_in_the_papers_presets():
    for name in ("base", "large"):
        assert "position_std" not in PRESETS[name]
    assert (small().blocks[0].attn.relative_position_bias_table == 0).all()


def test_absolute_positions_are_added_to_every_token_cls_included():
    model, x = small(positions="absolute"), torch.randn(2, 3, 32, 32)
    torch.nn.init.zeros_(model.pos_embed)
    bare = model.embed(x)
    torch.nn.init.normal_(model.pos_embed)
    torch.testing.assert_close(model.embed(x) - bare, model.pos_embed.expand(2, -1, -1))


# --- attention ------------------------------------------------------------------------------------
def test_fused_attention_equals_the_equation():
    layer, x = Attention(32, 4), torch.randn(2, 10, 32)
    torch.nn.init.normal_(layer.q_bias)
    q, k, v = layer.queries_keys_values(x)
    bias = torch.randn(4, 10, 10)
    written = ((q @ k.transpose(-1, -2)) / math.sqrt(8) + bias).softmax(-1) @ v
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
    torch.testing.assert_close(attention_weights(q, k, bias) @ v, written)
    torch.testing.assert_close(fused, written)
    torch.testing.assert_close(attention(q, k, v, bias), written)
    torch.testing.assert_close(attention(q, k, v), attention_weights(q, k) @ v)
    torch.testing.assert_close(layer(x, shared=bias),
                               layer.proj(written.transpose(1, 2).flatten(2)))
    without_bias = attention_weights(q, k) @ v
    torch.testing.assert_close(layer(x), layer.proj(without_bias.transpose(1, 2).flatten(2)))


def test_queries_are_the_tokens_that_are_computed_and_they_see_all_tokens():
    block, x = Block(32, 4), torch.randn(2, 10, 32)
    shared, queries = torch.randn(4, 10, 10), torch.tensor([[0, 3, 7], [0, 1, 9]])
    every = block(x, None, shared)
    some = block(x, None, shared, queries)
    torch.testing.assert_close(some, torch.stack([every[0, queries[0]], every[1, queries[1]]]))


def test_a_key_bias_would_change_nothing_so_there_is_none():
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    same_for_all_keys = torch.randn(1, 2, 1, 8)
    torch.testing.assert_close(attention_weights(q, k + same_for_all_keys),
                               attention_weights(q, k))
    assert not any("k_bias" in name for name, _ in Attention(32, 4).named_parameters())


def test_attention_weights_are_distributions():
    weights = attention_maps(small(), torch.randn(2, 3, 32, 32), block=1)
    assert weights.shape == (2, 4, 17, 17)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 17))


@pytest.mark.parametrize("positions", ["absolute", "shared", "per_block"])
@pytest.mark.parametrize("block", [0, 2])
def test_the_attention_to_look_at_is_that_of_the_forward_pass(positions, block):
    model, x, seen = small(positions=positions, pool=None).eval(), torch.randn(2, 3, 32, 32), []
    randomise(model)
    attn = model.blocks[block].attn
    attn.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[:3]))
    model(x)
    tokens, index, shared = seen[0]
    q, k, _ = attn.queries_keys_values(tokens)
    torch.testing.assert_close(attention_maps(model, x, block),
                               attention_weights(q, k, attn.bias(index, shared)))


# --- a block --------------------------------------------------------------------------------------
def test_drop_path_skips_whole_samples_and_keeps_the_mean():
    x = torch.ones(20000, 1, 1)
    y = drop_path(x, 0.25, training=True)
    assert sorted(y.unique().tolist()) == pytest.approx([0, 4 / 3])
    assert abs(y.mean() - 1) < 0.02
    assert drop_path(x, 0.25, training=False) is x


def test_drop_path_keeps_or_skips_a_sample_as_a_whole():
    y = drop_path(torch.ones(200, 5, 4), 0.5, training=True).flatten(1)
    assert torch.equal(y.amin(dim=1), y.amax(dim=1))
    assert len(y.unique()) == 2


@pytest.mark.parametrize("branch", ["gamma_1", "gamma_2"])
def test_both_branches_of_a_block_are_dropped_by_chance_each(branch):
    block = Block(32, 4, layer_scale=1.0, drop_path=0.5).train()
    x = torch.randn(1, 5, 32).expand(300, 5, 32)
    other = block.gamma_2 if branch == "gamma_1" else block.gamma_1
    torch.nn.init.zeros_(other)                              # the other branch adds nothing
    dropped = (block(x) == x).flatten(1).all(dim=1).float().mean()
    assert 0.4 < dropped < 0.6


def test_drop_path_grows_linearly_with_depth():
    rates = [block.drop_path for block in ViT(32, 8, 32, 5, 4, drop_path=0.2).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_layer_scale_zero_means_none_and_a_small_one_is_nearly_the_identity():
    x = torch.randn(2, 5, 32)
    assert Block(32, 4, layer_scale=0).gamma_1 is None
    torch.testing.assert_close(Block(32, 4, layer_scale=1e-5)(x), x, atol=1e-3, rtol=0)


def test_gelu_is_the_exact_one():
    mlp = Mlp(1, 1)
    for layer in (mlp.fc1, mlp.fc2):
        torch.nn.init.ones_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    # The normal distribution up to 1. The tanh approximation would give 0.8411920.
    assert mlp(torch.ones(1, 1)).item() == pytest.approx(0.8413447, abs=1e-6)


def test_layer_norm_adds_one_millionth_to_the_variance():
    x = torch.tensor([[1e-3, -1e-3] * 16])                   # variance 1e-6, as large as eps
    expected = torch.tensor([[1.0, -1.0] * 16]) / math.sqrt(2)
    for norm in (small().blocks[0].norm1, small().fc_norm, small(pool=None).norm):
        torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=0)


# --- the model ------------------------------------------------------------------------------------
def test_features_give_the_blocks_asked_for_in_that_order():
    model, x = small().eval(), torch.randn(2, 3, 32, 32)
    every = model.features(x)
    last, first = model.features(x, [2, 0])
    assert len(every) == 3
    assert torch.equal(last, every[2])
    assert torch.equal(first, every[0])


def test_mean_pooling_normalises_after_the_mean_and_leaves_cls_out():
    model, x = small(num_classes=7).eval(), torch.randn(2, 3, 32, 32)
    tokens, = model.features(x, [-1])
    torch.testing.assert_close(model(x), model.head(model.fc_norm(tokens[:, 1:].mean(1))))


def test_cls_pooling_reads_the_normalised_cls_token():
    model, x = small(num_classes=7, pool="cls").eval(), torch.randn(2, 3, 32, 32)
    tokens, = model.features(x, [-1])
    torch.testing.assert_close(model(x), model.head(model.norm(tokens)[:, 0]))


@pytest.mark.parametrize("pool, norm", [("mean", "fc_norm"), (None, "norm")])
def test_without_a_head_every_token_is_normalised(pool, norm):
    model, x = small(pool=pool).eval(), torch.randn(2, 3, 32, 32)
    torch.nn.init.normal_(getattr(model, norm).weight)
    torch.testing.assert_close(model(x), getattr(model, norm)(model.features(x, [-1])[0]))


@pytest.mark.parametrize("positions", ["absolute", "shared", "per_block"])
def test_images_need_not_be_square(positions):
    model = ViT((16, 40), 8, 32, 2, 4, positions=positions)
    assert model.grid == (2, 5)
    assert model(torch.randn(1, 3, 16, 40)).shape == (1, 11, 32)
    with pytest.raises(ValueError, match="16x40"):
        model(torch.randn(1, 3, 40, 16))


def test_a_size_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(ValueError, match="not a multiple"):
        ViT(30, 8, 32, 2, 4)


def test_patches_are_numbered_row_by_row():
    model = small()
    image = torch.zeros(1, 3, 32, 32)
    image[:, :, 8:16, 16:24] = 1                             # row 1, column 2 of a 4 x 4 grid
    changed = (model.patch_embed(image) - model.patch_embed(image * 0)).abs().sum(-1)[0]
    assert changed.argmax() == 6
    assert (changed > 0).sum() == 1


@pytest.mark.parametrize("options", [
    dict(), dict(positions="shared", pool=None), dict(positions="absolute", layer_scale=0),
    dict(mlp_ratio=3.0, num_classes=7, pool="cls"), dict(in_channels=5)])
@pytest.mark.parametrize("image_size", [32, (16, 40)])
def test_a_model_can_be_built_again_from_the_sizes_it_states(image_size, options):
    model = ViT(image_size, 8, 32, 3, 4, **options)
    again = ViT(**model.arch())
    assert again.arch() == model.arch()
    again.load_state_dict(model.state_dict())                # every name and shape is equal


# --- initialisation -------------------------------------------------------------------------------
def test_both_branches_of_a_block_start_smaller_the_deeper_it_sits():
    for layer, block in enumerate(ViT(32, 8, 256, 4, 4).blocks, start=1):
        for branch in (block.attn.proj, block.mlp.fc2):
            assert abs(branch.weight.std() * math.sqrt(2 * layer) - 0.02) < 5e-4
        assert abs(block.attn.qkv.weight.std() - 0.02) < 5e-4        # no end of a branch


def test_the_patch_convolution_of_stages_1_and_3_starts_as_the_framework_makes_it():
    weight = ViT(32, 8, 256, 1, 4).patch_embed.proj.weight
    bound = (3 * 8 * 8) ** -0.5                              # uniform up to this bound
    assert 0.99 * bound < weight.max() <= bound
    assert abs(weight.std() - bound / math.sqrt(3)) < 1e-3


def test_presets_are_the_papers_table():
    table = dict(base=(224, 16, 768, 12, 12, 0.1), large=(224, 16, 1024, 24, 16, 1e-5))
    for name, sizes in table.items():                        # pixels, patch, width, depth, heads,
        assert tuple(PRESETS[name].values()) == sizes        # layer scale


# --- pixels ---------------------------------------------------------------------------------------
def test_imagenet_normalisation_maps_the_mean_to_zero():
    grey = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    torch.testing.assert_close(imagenet_normalize(grey), torch.zeros(1, 3, 2, 2))


def test_imagenet_normalisation_maps_one_standard_deviation_to_one():
    values = torch.tensor([0.485 + 0.229, 0.456 + 0.224, 0.406 + 0.225])
    lighter = values.view(1, 3, 1, 1).expand(1, 3, 2, 2)
    torch.testing.assert_close(imagenet_normalize(lighter), torch.ones(1, 3, 2, 2))


# --- against another implementation ---------------------------------------------------------------
@pytest.mark.parametrize("shared", [False, True])
def test_logits_equal_timms_beit_on_the_same_random_weights(shared):
    from timm.models.beit import Beit
    theirs = Beit(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=5,
        init_values=0.1, qkv_bias=True, use_abs_pos_emb=False, use_rel_pos_bias=not shared,
        use_shared_rel_pos_bias=shared, global_pool="avg").eval()
    randomise(theirs)
    positions = "shared" if shared else "per_block"
    ours = ViT(32, 8, 48, 3, 4, positions=positions, num_classes=5).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert (ours(x) - theirs(x)).abs().max() <= 2e-5 * theirs(x).abs().max()
