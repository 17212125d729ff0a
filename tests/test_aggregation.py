"""Patch aggregation (Section 2.3): the network of stage 2, its two streams and its start."""
import pytest
import torch
import torch.nn.functional as F

from model import PRESETS
from pretrain import BEiT, aggregate, mim_loss, parse_args
from support.run import count_parameters


def tiny(early_layer=2, head_depth=2, **options):
    return BEiT(32, 8, 32, 4, 4, 64, early_layer=early_layer, head_depth=head_depth, **options)


def batch():
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[:, [1, 5, 6]] = True
    return torch.randn(3, 3, 32, 32), mask


def of_hidden(tokens, mask):
    """(B, T, K) -> (M, K): the hidden patches, image after image."""
    patches = tokens[:, 1:]
    return torch.cat([patches[i, mask[i]] for i in range(len(mask))])


# --- aggregation ----------------------------------------------------------------------------------
def test_cls_head_sees_late_patches_only_through_cls():
    last, early = torch.randn(2, 10, 8, requires_grad=True), torch.randn(2, 10, 8)
    aggregate(last, early).sum().backward()
    assert last.grad[:, :1].abs().sum() > 0      # [CLS] learns from this head ...
    assert last.grad[:, 1:].abs().sum() == 0     # ... the last layer's patches do not


def test_aggregation_gives_gradients_to_cls_of_layer_L_and_to_the_patches_of_layer_l():
    last = torch.randn(2, 10, 8, requires_grad=True)
    early = torch.randn(2, 10, 8, requires_grad=True)
    g = torch.randn(2, 10, 8)
    aggregate(last, early).backward(g)
    assert torch.equal(last.grad[:, 0], g[:, 0])
    assert torch.equal(early.grad[:, 1:], g[:, 1:])
    assert early.grad[:, 0].abs().sum() == 0     # layer l's own [CLS] is not read


def test_aggregation_leaves_both_layers_as_they_are():
    last, early = torch.randn(2, 10, 8), torch.randn(2, 10, 8)
    before = last.clone(), early.clone()
    aggregate(last, early)
    assert torch.equal(last, before[0]) and torch.equal(early, before[1])


@pytest.mark.parametrize("block", [0, 1, 2, 3])
def test_the_second_loss_alone_trains_all_blocks_those_after_layer_l_through_cls(block):
    model, (x, mask) = tiny(), batch()
    _, logits_cls = model(x, mask)
    F.cross_entropy(logits_cls, torch.randint(0, 64, (9,))).backward()
    assert model.blocks[block].mlp.fc1.weight.grad.abs().sum() > 0


def test_aggregate_takes_cls_of_the_last_layer_and_patches_of_layer_l():
    last, early = torch.randn(2, 10, 8), torch.randn(2, 10, 8)
    s = aggregate(last, early)
    assert torch.equal(s[:, 0], last[:, 0])
    assert torch.equal(s[:, 1:], early[:, 1:])


def test_layer_l_counts_from_one():
    model, (x, mask) = tiny().eval(), batch()
    early = model.features(x, [1], mask)[0]                  # l = 2 is block index 1
    s = aggregate(model.features(x, [3], mask)[0], early)
    for block in model.cls_pt_layers:
        s = block(s, model.relative_position_index, model.shared_bias())
    torch.testing.assert_close(model.streams(x, mask)[1], s)


def test_the_stream_of_the_last_layer_comes_before_the_final_norm():
    model, (x, mask) = tiny().eval(), batch()
    torch.nn.init.normal_(model.norm.weight)                 # so that it shows
    torch.testing.assert_close(model.streams(x, mask)[0], model.features(x, [3], mask)[0])


def test_the_shallow_head_names_hidden_patches_with_the_shared_positions_norm_and_code_head():
    model, (x, mask) = tiny().eval(), batch()
    table = model.rel_pos_bias.relative_position_bias_table
    for p in (table, model.norm.weight, model.norm.bias):
        torch.nn.init.normal_(p)                             # so that each of them shows
    early, last = model.features(x, [1, 3], mask)
    s = torch.cat([last[:, :1], early[:, 1:]], dim=1)
    for block in model.cls_pt_layers:
        s = block(s, model.relative_position_index, model.shared_bias())
    every = model.lm_head(model.norm(s))
    torch.testing.assert_close(model(x, mask)[1], of_hidden(every, mask))


@pytest.mark.parametrize("options, heads", [(dict(), 1), (dict(shared_head=False), 2)])
def test_the_code_head_is_shared_unless_told_otherwise(options, heads):
    layers = [m for m in tiny(**options).modules() if isinstance(m, torch.nn.Linear)]
    assert sum(layer.out_features == 64 for layer in layers) == heads


@pytest.mark.parametrize("options", [dict(head_depth=0), dict(), dict(shared_head=False)])
def test_without_aggregation_there_is_one_head_and_every_parameter_has_a_gradient(options):
    model, (x, mask) = tiny(**options), batch()
    logits, logits_cls = model(x, mask)
    assert (logits_cls is None) == (len(model.cls_pt_layers) == 0)
    mim_loss(logits, logits_cls, torch.randint(0, 64, (9,)))[0].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


# --- masked image modelling -----------------------------------------------------------------------
def test_the_hidden_pixels_change_nothing():
    model, (x, mask) = tiny().eval(), batch()
    patches = F.unfold(x, 8, stride=8)
    patches[:, :, mask[0]] = torch.randn(3, 192, 3)          # other pixels in hidden patches
    other = F.fold(patches, 32, 8, stride=8)
    assert not torch.equal(other, x)
    for a, b in zip(model(x, mask), model(other, mask), strict=True):
        torch.testing.assert_close(a, b)


def test_cls_is_never_masked():
    model, (x, mask) = tiny(), batch()
    torch.nn.init.ones_(model.mask_token)
    tokens = model.embed(x, mask)
    torch.testing.assert_close(tokens[:, 0], model.cls_token[0].expand(3, -1))
    assert (tokens[:, 1:][mask] == 1).all()
    assert not (tokens[:, 1:][~mask] == 1).any()


def test_logits_come_for_hidden_patches_only_in_row_order():
    model, (x, mask) = tiny().eval(), batch()
    last, _ = model.streams(x, mask)
    every = model.lm_head(model.norm(last))
    torch.testing.assert_close(model(x, mask)[0], of_hidden(every, mask))


@pytest.mark.parametrize("early_layer, head_depth", [(2, 0), (2, 1), (2, 2), (3, 2)])
def test_tokens_that_nobody_reads_can_be_left_out_of_the_last_blocks(early_layer, head_depth):
    model = BEiT(32, 8, 32, 3, 4, 64, early_layer=early_layer, head_depth=head_depth)
    torch.nn.init.normal_(model.rel_pos_bias.relative_position_bias_table)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 3:9] = True
    mask[1, [0, 2, 5, 11, 14, 15]] = True
    x, z = torch.randn(2, 3, 32, 32), torch.randint(0, 64, (12,))

    def all_tokens():
        last, side = model.streams(x, mask)                  # (B, T, D)
        streams = [last] if side is None else [last, side]
        logits = [of_hidden(model.lm_head(model.norm(tokens)), mask) for tokens in streams]
        return (*logits, None)[:2]

    answers = []
    for forward in (all_tokens, lambda: model(x, mask)):
        logits, logits_cls = forward()
        mim_loss(logits, logits_cls, z)[0].backward()
        answers.append([logits, logits_cls] + [p.grad for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    for a, b in zip(*answers, strict=True):
        torch.testing.assert_close(a, b)


# --- how it starts --------------------------------------------------------------------------------
def test_stage_2_starts_from_a_normal_cut_at_one_standard_deviation():
    model = BEiT(32, 8, 128, 2, 4, 64, early_layer=1, head_depth=2)
    # The aggregation blocks are included.
    for name in ("blocks.0.attn.qkv", "cls_pt_layers.1.mlp.fc1", "lm_head", "patch_embed.proj"):
        w = model.get_submodule(name).weight
        assert w.abs().max() <= 0.02, name
        assert abs(w.std() - 0.0108) < 2e-4, name
    # What a block adds is divided by sqrt(2 * layer); the head's blocks count on from l.
    blocks = ((model.blocks[1], 2), (model.cls_pt_layers[0], 2), (model.cls_pt_layers[1], 3))
    for block, layer in blocks:
        assert abs(block.mlp.fc2.weight.std() * (2 * layer) ** 0.5 - 0.0108) < 2e-4
    assert model.mask_token.abs().max() > 0


def test_token_vectors_are_cut_as_the_weights_are():
    model = BEiT(32, 8, 512, 1, 4, 64, early_layer=1, head_depth=1)
    for token in (model.cls_token, model.mask_token):
        assert 0.019 < token.max() <= 0.02
        assert -0.02 <= token.min() < -0.019


@pytest.mark.parametrize("early_layer, rates", [(2, [0.2, 0.3]), (3, [0.225, 0.3])])
def test_the_shallow_head_drops_paths_as_often_as_the_blocks_after_layer_l(early_layer, rates):
    model = tiny(early_layer=early_layer, drop_path=0.3)
    assert [block.drop_path for block in model.cls_pt_layers] == pytest.approx(rates)


@pytest.mark.parametrize("preset, early_layer, millions", [
    ("base", 9, 106.14), ("large", 21, 336.73)])
def test_the_papers_models_have_106_and_337_million_parameters_in_pre_training(
        preset, early_layer, millions):
    with torch.device("meta"):                               # shapes without numbers
        model = BEiT(**PRESETS[preset], codes=8192, early_layer=early_layer, head_depth=2)
    assert round(count_parameters(model) / 1e6, 2) == millions


@pytest.mark.parametrize("options", [
    dict(), dict(shared_head=False, early_layer=3), dict(head_depth=0), dict(mlp_ratio=3.0)])
def test_the_network_can_be_built_again_from_the_sizes_it_states(options):
    model = tiny(**options)
    sizes = model.arch()
    del sizes["pool"]                                        # the same in every BEiT
    again = BEiT(**sizes)
    assert again.arch() == model.arch()
    again.load_state_dict(model.state_dict())                # every name and shape is equal


@pytest.mark.parametrize("model, epochs, beta2, drop_path, early_layer", [
    ("base", 300, 0.98, 0.0, 9), ("base", 1600, 0.999, 0.1, 9),
    ("large", 300, 0.98, 0.0, 21), ("large", 1600, 0.999, 0.1, 21)])
def test_recipes_are_the_papers_table(model, epochs, beta2, drop_path, early_layer):
    args = parse_args(["--model", model, "--epochs", str(epochs)])
    assert (args.beta2, args.drop_path) == (beta2, drop_path)
    assert (args.early_layer, args.head_depth) == (early_layer, 2)
    assert (args.lr, args.min_lr, args.warmup_epochs) == (1.5e-3, 1e-5, 10)
    assert (args.batch_size, args.weight_decay, args.clip_grad) == (2048, 0.05, 3.0)
    assert (args.mask_patches, args.mask_min_block) == (75, 16)
    assert (args.crop_scale, args.color_jitter) == (0.2, 0.4)
