"""Patch aggregation and the two losses, Eqs. (3) and (4); what the loop of stage 2 does with pixels and gradients."""
import math

import pytest
import torch
import torch.nn.functional as F

from extras import bench
from support import engine
from support.run import contents
import vqkd
from conftest import log_lines
from model import PRESETS, ViT, count_parameters, imagenet_normalize
from pretrain import BEiT, aggregate, main, mim_loss, nearest_visible_code, parse_args


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


def test_token_vectors_are_cut_as_the_weights_are():
    model = BEiT(32, 8, 512, 1, 4, 64, early_layer=1, head_depth=1)
    for token in (model.cls_token, model.mask_token):
        assert 0.019 < token.max() <= 0.02 and -0.02 <= token.min() < -0.019


@pytest.mark.parametrize("preset, early_layer, millions", [("base", 9, 106.14), ("large", 21, 336.73)])
def test_the_papers_models_have_106_and_337_million_parameters_in_pre_training(preset, early_layer, millions):
    with torch.device("meta"):                               # shapes without numbers
        model = BEiT(**PRESETS[preset], codes=8192, early_layer=early_layer, head_depth=2)
    assert round(count_parameters(model) / 1e6, 2) == millions


def test_the_nearest_visible_patch_lends_its_code():
    z = torch.arange(9)[None]
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 0, 0, 1]], dtype=torch.bool)
    guess = nearest_visible_code(z, mask, (3, 3))[0]
    assert torch.equal(guess[~mask[0]], z[0][~mask[0]])                      # a visible patch is its own nearest
    assert guess[4] in (1, 3, 7) and guess[5] == 2 and guess[8] == 7


def test_the_shallow_head_names_hidden_patches_with_the_shared_positions_norm_and_code_head():
    model, (x, mask) = tiny().eval(), batch()
    for p in (model.rel_pos_bias.relative_position_bias_table, model.norm.weight, model.norm.bias):
        torch.nn.init.normal_(p)                             # so that each of them shows
    early, last = model.features(x, [1, 3], mask)
    s = torch.cat([last[:, :1], early[:, 1:]], dim=1)
    for block in model.cls_pt_layers:
        s = block(s, model.relative_position_index, model.shared_bias())
    every = model.lm_head(model.norm(s))[:, 1:]
    torch.testing.assert_close(model(x, mask)[1], torch.cat([every[i, mask[i]] for i in range(3)]))


@pytest.mark.parametrize("early_layer, rates", [(2, [0.2, 0.3]), (3, [0.225, 0.3])])
def test_the_shallow_head_drops_paths_as_often_as_the_blocks_after_layer_l(early_layer, rates):
    model = BEiT(32, 8, 32, 4, 4, 64, early_layer=early_layer, head_depth=2, drop_path=0.3)
    assert [block.drop_path for block in model.cls_pt_layers] == pytest.approx(rates)


@pytest.mark.parametrize("model, epochs, beta2, drop_path, early_layer", [
    ("base", 300, 0.98, 0.0, 9), ("base", 1600, 0.999, 0.1, 9), ("large", 300, 0.98, 0.0, 21),
    ("large", 1600, 0.999, 0.1, 21)])
def test_recipes_are_the_papers_table(model, epochs, beta2, drop_path, early_layer):
    args = parse_args(["--model", model, "--epochs", str(epochs)])
    assert (args.beta2, args.drop_path, args.early_layer, args.head_depth) == (beta2, drop_path, early_layer, 2)
    assert (args.lr, args.min_lr, args.batch_size, args.weight_decay, args.clip_grad, args.warmup_epochs) == (
        1.5e-3, 1e-5, 2048, 0.05, 3.0, 10)
    assert (args.mask_patches, args.mask_min_block, args.crop_scale, args.color_jitter) == (75, 16, 0.2, 0.4)


# ------------------------------------------------------------------------------------------------------------ the loop
@pytest.fixture
def run(tmp_path):
    """run(flags) trains a tiny backbone on a tokenizer of random weights. -> its weights and the log's lines"""
    flags = "--limit 16 --batch-size 8 --workers 0 --amp no --device cpu --log-every 1".split()
    args = vqkd.parse_args([*flags, "--codes", "16", "--encoder-depth", "1"])
    tokenizer = vqkd.build(args, (144,))
    tokenizer.quantize.embedding.weight.copy_(vqkd.l2(torch.randn(16, 16)))
    engine.write_file(tmp_path / "vqkd.pt", contents("vqkd", tokenizer, args))

    def train(name, *more):
        main([*flags, "--tokenizer", str(tmp_path / "vqkd.pt"), "--out", str(tmp_path / name), *more])
        return engine.read_file(tmp_path / name / "pretrain.pt")["model"], log_lines(tmp_path / name / "pretrain.jsonl")
    return train


def test_the_tokenizer_sees_pixels_from_minus_one_to_one_and_the_backbone_imagenets(run, monkeypatch):
    embed, seen = ViT.embed, {"tokenizer": [], "backbone": []}

    def watch(model, x, mask=None):
        seen["backbone" if isinstance(model, BEiT) else "tokenizer"].append(x)
        return embed(model, x, mask)
    monkeypatch.setattr(ViT, "embed", watch)
    run("a", "--steps", "1")
    for x in seen["tokenizer"]:
        assert -1 <= x.min() < -0.5 and 0.5 < x.max() <= 1
    for x in seen["backbone"]:
        assert x.min() < -1.2 and x.max() > 1.2
    # One update, then the evaluation; the guesser of the commonest codes looks at training images, too.
    plain = [(x + 1) / 2 for x in seen["tokenizer"]]
    for x in seen["backbone"]:
        assert any(torch.allclose(imagenet_normalize(p), x, atol=1e-5) for p in plain if p.shape == x.shape)


def test_gradients_are_clipped_to_the_norm_asked_for(run):
    still = ["--warmup-epochs", "0", "--weight-decay", "0", "--lr", "1e-2", "--min-lr", "1e-2"]
    start, _ = run("start", *still, "--steps", "1", "--lr", "0", "--min-lr", "0")
    # AdamW divides by the gradient's own size, plus 1e-8: what is far smaller than that moves nothing.
    clipped, lines = run("clipped", *still, "--steps", "1", "--clip-grad", "1e-12")
    free, _ = run("free", *still, "--steps", "1", "--clip-grad", "0")
    assert next(line["grad_norm"] for line in lines if "grad_norm" in line) > 0.01       # as it was before
    assert max((clipped[k] - start[k]).abs().max() for k in start) < 1e-5
    assert max((free[k] - start[k]).abs().max() for k in start) > 5e-3


def test_the_targets_are_the_codes_of_the_hidden_patches_in_training_and_in_evaluation(run, monkeypatch):
    import pretrain
    encode, forward, loss, seen = vqkd.VQKD.encode, BEiT.forward, pretrain.mim_loss, {}
    checked = []

    def watch_encode(tokenizer, images):
        seen["z"] = encode(tokenizer, images)
        return seen["z"]

    def watch_forward(model, x, mask, *rest):
        seen["mask"] = mask
        return forward(model, x, mask, *rest)

    def watch_loss(logits, logits_cls, z):
        checked.append(torch.equal(z, seen["z"][seen["mask"]]) and logits.shape == (len(z), 16))
        return loss(logits, logits_cls, z)
    monkeypatch.setattr(vqkd.VQKD, "encode", watch_encode)
    monkeypatch.setattr(BEiT, "forward", watch_forward)
    monkeypatch.setattr(pretrain, "mim_loss", watch_loss)
    run("targets", "--steps", "2")
    assert checked == [True] * 3                             # two batches of training, one of evaluation


@pytest.mark.parametrize("early_layer, head_depth", [(2, 0), (2, 1), (2, 2), (3, 2)])
def test_tokens_that_nobody_reads_can_be_left_out_of_the_last_blocks(early_layer, head_depth):
    model, mask = BEiT(32, 8, 32, 3, 4, 64, early_layer=early_layer, head_depth=head_depth), torch.zeros(2, 16).bool()
    mask[0, 3:9], mask[1, [0, 2, 5, 11, 14, 15]] = True, True
    torch.nn.init.normal_(model.rel_pos_bias.relative_position_bias_table)
    x, z, answers = torch.randn(2, 3, 32, 32), torch.randint(0, 64, (12,)), []
    for whole in (True, False):
        with bench.plain(whole):
            logits, logits_cls = model(x, mask)
            mim_loss(logits, logits_cls, z)[0].backward()
        answers.append([logits, logits_cls] + [p.grad for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    for a, b in zip(*answers):
        torch.testing.assert_close(a, b)
