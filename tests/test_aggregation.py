"""Patch aggregation and the two losses, Eqs. (3) and (4)."""
import math

import pytest
import torch
import torch.nn.functional as F

from pretrain import BEiT, aggregate, mim_loss, nearest_visible_code


def tiny(**options):
    return BEiT(32, 8, 32, 4, 4, 64, early_layer=2, head_depth=2, **options)


def batch():
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[:, [1, 5, 6]] = True
    return torch.randn(3, 3, 32, 32), mask


def test_cls_head_sees_late_patches_only_through_cls():
    last, early = torch.randn(2, 10, 8, requires_grad=True), torch.randn(2, 10, 8)
    aggregate(last, early).sum().backward()
    assert last.grad[:, :1].abs().sum() > 0      # [CLS] learns from this head ...
    assert last.grad[:, 1:].abs().sum() == 0     # ... the last layer's patches do not


def test_aggregate_takes_cls_of_the_last_layer_and_patches_of_layer_l():
    last, early = torch.randn(2, 10, 8), torch.randn(2, 10, 8)
    s = aggregate(last, early)
    assert torch.equal(s[:, 0], last[:, 0]) and torch.equal(s[:, 1:], early[:, 1:])


def test_layer_l_counts_from_one():
    model, (x, mask) = tiny().eval(), batch()
    early = model.features(x, [1], mask)[0]                                  # l = 2 is block index 1
    s = aggregate(model.features(x, [3], mask)[0], early)
    for block in model.cls_pt_layers:
        s = block(s, model.relative_position_index, model.shared_bias())
    torch.testing.assert_close(model.streams(x, mask)[1], s)


def test_untrained_model_is_as_good_as_a_uniform_guess():
    model, (x, mask) = tiny(), batch()
    loss, (loss_mim, loss_cls) = mim_loss(*model(x, mask), torch.randint(0, 64, (9,)))
    assert abs(loss.item() - 2 * math.log(64)) < 0.1                         # two heads, ln K each
    assert loss_mim + loss_cls == pytest.approx(loss.item())


def test_the_hidden_pixels_change_nothing():
    model, (x, mask) = tiny().eval(), batch()
    patches = F.unfold(x, 8, stride=8)
    patches[:, :, mask[0]] = torch.randn(3, 192, 3)                          # other pixels where patches are hidden
    other = F.fold(patches, 32, 8, stride=8)
    assert not torch.equal(other, x)
    for a, b in zip(model(x, mask), model(other, mask)):
        torch.testing.assert_close(a, b)


def test_cls_is_never_masked():
    model, (x, mask) = tiny(), batch()
    torch.nn.init.ones_(model.mask_token)
    tokens = model.embed(x, mask)
    torch.testing.assert_close(tokens[:, 0], model.cls_token[0].expand(3, -1))
    assert (tokens[:, 1:][mask] == 1).all() and not (tokens[:, 1:][~mask] == 1).any()


def test_logits_come_for_hidden_patches_only_in_row_order():
    model, (x, mask) = tiny().eval(), batch()
    last, _ = model.streams(x, mask)
    every = model.lm_head(model.norm(last))[:, 1:]
    torch.testing.assert_close(model(x, mask)[0], torch.cat([every[i, mask[i]] for i in range(3)]))


@pytest.mark.parametrize("options, heads", [(dict(), 1), (dict(shared_head=False), 2)])
def test_the_code_head_is_shared_unless_told_otherwise(options, heads):
    model = tiny(**options)
    assert sum(isinstance(m, torch.nn.Linear) and m.out_features == 64 for m in model.modules()) == heads


def test_without_aggregation_there_is_one_head_and_every_parameter_has_a_gradient():
    for model in (BEiT(32, 8, 32, 4, 4, 64, early_layer=2, head_depth=0), tiny(), tiny(shared_head=False)):
        x, mask = batch()
        logits, logits_cls = model(x, mask)
        assert (logits_cls is None) == (len(model.cls_pt_layers) == 0)
        mim_loss(logits, logits_cls, torch.randint(0, 64, (9,)))[0].backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_stage_2_starts_from_a_normal_cut_at_one_standard_deviation():
    model = BEiT(32, 8, 128, 2, 4, 64, early_layer=1, head_depth=2)
    for name in ("blocks.0.attn.qkv", "cls_pt_layers.1.mlp.fc1", "lm_head", "patch_embed.proj"):
        w = model.get_submodule(name).weight                                # the aggregation blocks included
        assert w.abs().max() <= 0.02 and abs(w.std() - 0.0108) < 2e-4, name
    # What a block adds to the stream is divided by sqrt(2 * layer); head blocks count on from l.
    for block, layer in ((model.blocks[1], 2), (model.cls_pt_layers[0], 2), (model.cls_pt_layers[1], 3)):
        assert abs(block.mlp.fc2.weight.std() * (2 * layer) ** 0.5 - 0.0108) < 2e-4
    assert model.mask_token.abs().max() > 0


def test_the_nearest_visible_patch_lends_its_code():
    z = torch.arange(9)[None]
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 0, 0, 1]], dtype=torch.bool)
    guess = nearest_visible_code(z, mask, (3, 3))[0]
    assert torch.equal(guess[~mask[0]], z[0][~mask[0]])                      # a visible patch is its own nearest
    assert guess[4] in (1, 3, 7) and guess[5] == 2 and guess[8] == 7
