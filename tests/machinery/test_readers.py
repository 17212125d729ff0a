"""Every reader of a checkpoint takes the sizes of a network from its file.

Models of unusual sizes are saved as the stages save them and read back. Their outputs must be the
same bit for bit.
"""
import random
import re

import pytest
import torch

import segment
import vqkd
from extras import convert, visualize
from model import ViT, imagenet_normalize
from pretrain import BEiT, hidden_patches
from support import weights
from support.files import UserError, write_file
from support.run import contents


def fill(model, seed=0):
    """Random numbers in every parameter and statistic, so that a forgotten one shows."""
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in model.state_dict().items():
        state[name] = value
        if value.is_floating_point():
            state[name] = 0.3 * torch.randn(value.shape, generator=g)
        if name.endswith("running_var"):
            state[name] = state[name].abs() + 0.5
    model.load_state_dict(state)
    return model.eval()


def save(stage, model, path, **about):
    """Write a file as Run.finish writes it."""
    args = vqkd.parse_args(["--out", str(path.parent)])
    write_file(path, contents(stage, model, args) | about)
    return path


def pictures(size, seed=1):
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def arch(model):
    """What a file states. The ratio that is read may be another one with the same hidden width."""
    return {k: v for k, v in model.arch().items() if k != "mlp_ratio"}


def same(ours, theirs):
    return ours.shape == theirs.shape and torch.equal(ours, theirs)


# Sizes of networks; ratios with which int(width * ratio) is not exact, and non-square grids.
TOKENIZERS = {
    "thin MLP, 3 heads, 3 + 2 blocks": dict(
        image_size=(32, 32), width=24, depth=3, heads=3, decoder_depth=2, codes=21, code_dim=5,
        teacher_dims=[7], mlp_ratio=2),
    "decoder of other sizes, two teachers": dict(
        image_size=(32, 32), width=24, depth=1, heads=2, decoder_depth=3, codes=33, code_dim=7,
        teacher_dims=[6, 4], mlp_ratio=1.5, decoder=dict(width=30, heads=5, mlp_ratio=2.7)),
    "grid of 4 x 6": dict(
        image_size=(32, 48), width=49, depth=2, heads=7, decoder_depth=1, codes=16, code_dim=8,
        teacher_dims=[5], mlp_ratio=2.2),
}
BACKBONES = {
    "thin MLP, l = 1 of 3": dict(
        image_size=(32, 32), width=24, depth=3, heads=2, codes=19, early_layer=1, mlp_ratio=2),
    "separate head of 1 block, l = L": dict(
        image_size=(32, 32), width=24, depth=2, heads=6, codes=11, early_layer=2, head_depth=1,
        shared_head=False, mlp_ratio=3.3),
    "grid of 4 x 6, no layer scale": dict(
        image_size=(32, 48), width=21, depth=4, heads=3, codes=8, early_layer=2, head_depth=3,
        layer_scale=0, mlp_ratio=2.5),
    "no shallow head": dict(
        image_size=(32, 32), width=24, depth=2, heads=3, codes=9, early_layer=1, head_depth=0),
    "absolute positions": dict(
        image_size=(40, 24), width=24, depth=2, heads=3, codes=9, early_layer=1, mlp_ratio=5,
        positions="absolute"),
}
CLASSIFIERS = {
    "thin MLP, mean": dict(image_size=(32, 32), width=24, depth=3, heads=2, mlp_ratio=2),
    "grid of 4 x 6, [CLS]": dict(
        image_size=(32, 48), width=27, depth=2, heads=9, mlp_ratio=1.3, pool="cls"),
    "absolute positions, no layer scale, grey images": dict(
        image_size=(48, 32), width=24, depth=2, heads=3, mlp_ratio=6, positions="absolute",
        layer_scale=0, in_channels=1),
}
SEGMENTERS = {
    "thin MLP": dict(
        image_size=(32, 32), width=24, depth=12, heads=2, mlp_ratio=2, pool=None,
        classes=7, channels=12, aux_channels=5),
    "grid of 4 x 6": dict(
        image_size=(32, 48), width=21, depth=6, heads=3, mlp_ratio=2.9, layer_scale=0, pool=None,
        classes=3, channels=21, aux_channels=256),
}


@pytest.mark.parametrize("sizes", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_is_read_with_the_sizes_of_its_file(tmp_path, sizes):
    model = fill(vqkd.VQKD(patch_size=8, **sizes))
    path = save("vqkd", model, tmp_path / "vqkd.pt")
    images = pictures(sizes["image_size"])
    read = vqkd.load_tokenizer(path)
    assert all(same(a, b) for a, b in zip(read(images), model(images), strict=True))
    assert same(read.encode(images), model.encode(images))
    assert arch(read) == arch(model) and not read.training
    assert not any(p.requires_grad for p in read.parameters())

    encoder, _, report = weights.load_backbone(path, pool=None)          # the probe of the encoder
    assert report.missing == []
    tokens = encoder.eval()(imagenet_normalize(images))
    torch.testing.assert_close(tokens, model.encoder(images * 2 - 1), atol=1e-4, rtol=1e-4)

    on_top = fill(vqkd.VQKD(patch_size=8, **sizes), seed=5)              # --init
    vqkd.continue_from(on_top, path)
    assert same(on_top.encode(images), model.encode(images))


@pytest.mark.parametrize("sizes", BACKBONES.values(), ids=BACKBONES)
def test_a_pretrained_backbone_is_read_with_the_sizes_of_its_file(tmp_path, sizes):
    model = fill(BEiT(patch_size=8, **sizes))
    path = save("pretrain", model, tmp_path / "pretrain.pt")
    images = pictures(sizes["image_size"])
    mask = torch.zeros(2, model.num_patches, dtype=torch.bool)
    mask[:, 3:7] = True
    read, _ = visualize.load_beit(path)
    logits, logits_cls = read(images, mask, hidden_patches(mask))
    expected, expected_cls = model(images, mask, hidden_patches(mask))
    assert same(logits, expected)
    if sizes.get("head_depth") == 0:
        assert logits_cls is None and expected_cls is None
    else:
        assert same(logits_cls, expected_cls)
    assert arch(read) == arch(model) and read.early_layer == sizes["early_layer"]

    vit, _, report = weights.load_backbone(path, pool=None)              # the linear probe
    assert report.missing == []
    torch.testing.assert_close(vit.eval()(images), model.norm(model.features(images)[-1]))


@pytest.mark.parametrize("sizes", CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_a_classifier_is_read_with_the_sizes_of_its_file(tmp_path, sizes):
    model = fill(ViT(patch_size=8, num_classes=13, **sizes))
    path = save("finetune", model, tmp_path / "finetune.pt")
    images = pictures(sizes["image_size"])[:, :sizes.get("in_channels", 3)]
    read, _, report = weights.load_backbone(path, pool=None, num_classes=None)
    assert report.missing == report.unexpected == []
    assert same(read.eval()(images), model(images)) and arch(read) == arch(model)
    whole = weights.build(ViT, weights.read(path))
    assert same(whole.eval()(images), model(images))


def save_segmenter(sizes, path):
    model = fill(segment.upernet(patch_size=8, **sizes))
    args = vqkd.parse_args(["--out", str(path.parent)])
    about = contents("segment", model.backbone, args)        # arch: that of the backbone
    write_file(path, about | dict(model=model.state_dict()))
    return model


@pytest.mark.parametrize("sizes", SEGMENTERS.values(), ids=SEGMENTERS)
def test_a_segmenter_is_read_with_the_sizes_of_its_file(tmp_path, sizes):
    model = save_segmenter(sizes, tmp_path / "segment.pt")
    read, _ = segment.load_segmenter(tmp_path / "segment.pt")
    images = pictures(sizes["image_size"])
    assert same(read.eval()(images), model(images))
    assert arch(read.backbone) == arch(model.backbone)
    assert not any(p.is_meta for p in [*read.parameters(), *read.buffers()])


@pytest.mark.parametrize("stage, make, sizes", [
    *(("vqkd", vqkd.VQKD, sizes) for sizes in TOKENIZERS.values()),
    *(("pretrain", BEiT, sizes) for sizes in BACKBONES.values()),
    *(("finetune", ViT, sizes | dict(num_classes=13)) for sizes in CLASSIFIERS.values())])
def test_every_layout_keeps_a_network_of_unusual_sizes(tmp_path, stage, make, sizes, capsys):
    path = save(stage, fill(make(patch_size=8, **sizes)), tmp_path / "ours.pt")
    convert.main([str(path), str(tmp_path / "released.pth"), "--to", "released"])
    convert.main([str(tmp_path / "released.pth"), str(tmp_path / "again.pt"), "--to", "ours"])
    convert.main(["--check", str(tmp_path / "again.pt")])
    assert f"MLP ratio {weights.read(path).backbone['mlp_ratio']:g}" in capsys.readouterr().out
    before = weights.read(path)
    after = weights.read(tmp_path / "again.pt")
    # A second teacher has no place in the released layout.
    kept = {k: v for k, v in before.weights.items() if not k.startswith("more_decode_task_layers")}
    assert after.weights.keys() == kept.keys()
    assert all(torch.equal(after.weights[k], v) for k, v in kept.items())
    before.facts.pop("teacher_dims", None)
    after.facts.pop("teacher_dims", None)
    assert after.facts == before.facts


@pytest.mark.parametrize("sizes", SEGMENTERS.values(), ids=SEGMENTERS)
def test_the_released_layout_keeps_a_segmenter_of_unusual_sizes(tmp_path, sizes):
    model = save_segmenter(sizes, tmp_path / "segment.pt")
    released = tmp_path / "released.pth"
    convert.main([str(tmp_path / "segment.pt"), str(released), "--to", "released"])
    read, _ = segment.load_segmenter(released)
    images = pictures(sizes["image_size"])
    assert same(read.eval()(images), model(images))


def test_any_hidden_width_comes_back_from_the_ratio_that_is_read():
    draw = random.Random(0)
    for _ in range(2000):
        width = draw.randint(1, 2048)
        hidden = draw.randint(1, 8 * width)
        state = {"blocks.0.mlp.fc1.weight": torch.empty(hidden, width, device="meta")}
        assert int(width * weights.mlp_ratio(state)) == hidden


def released_pretrain(path, depth, args=None):
    """A backbone whose file states nothing but, perhaps, the arguments of the authors' script."""
    model = fill(BEiT(32, 8, 24, depth, 3, codes=10, early_layer=1, head_depth=1))
    torch.save(dict(model=model.state_dict()) | ({"args": args} if args else {}), path)
    return path


@pytest.mark.parametrize("depth, args, early", [
    (12, None, 9), (24, None, 21), (6, None, 4), (1, None, 1),
    (12, dict(early_layers=7), 7), (12, dict(early_layer=3), 3)])
def test_the_early_layer_is_stated_or_that_of_the_released_models(tmp_path, depth, args, early):
    path = released_pretrain(tmp_path / "released.pth", depth, args)
    assert visualize.load_beit(path)[0].early_layer == early


@pytest.mark.parametrize("stated, sentence", [
    (dict(early_layer=5), "early layer 5 of 2"), (dict(depth=3), "lacks blocks.2.gamma_1"),
    (dict(image_size=40), "not a grid of 5x5"), (dict(image_size="large"), "odd shapes"),
    (dict(depth="two"), "odd shapes"), (dict(image_size=36), "36x36 is not a multiple")])
def test_a_file_that_states_what_its_tensors_deny_is_refused(tmp_path, stated, sentence):
    model = BEiT(32, 8, 24, 2, 3, codes=10, early_layer=1)
    torch.save(dict(model=model.state_dict(), arch=stated), tmp_path / "odd.pt")
    with pytest.raises(UserError, match=sentence) as error:
        visualize.load_beit(tmp_path / "odd.pt")
    assert "odd.pt" in str(error.value) or "36x36" in str(error.value)


@pytest.mark.parametrize("damage, sentence", [
    ("missing", "vqkd.pt .vqkd. lacks decoder.fc_norm.bias"),
    ("extra", "has the unknown decoder.blocks.0.gamma_1"),
    ("misshapen", r"has in a wrong shape decode_task_layer.0.bias \(3,\) instead of \(24,\)"),
    ("not finite", "numbers that are not finite in quantize.embedding.weight")])
def test_what_does_not_fit_a_network_is_one_sentence(tmp_path, damage, sentence):
    sizes = TOKENIZERS["thin MLP, 3 heads, 3 + 2 blocks"]
    model = fill(vqkd.VQKD(patch_size=8, **sizes))
    state = model.state_dict()
    if damage == "missing":
        del state["decoder.fc_norm.bias"]
    elif damage == "extra":
        state["decoder.blocks.0.gamma_1"] = torch.ones(24)
    elif damage == "misshapen":
        state["decode_task_layer.0.bias"] = torch.zeros(3)
    else:
        state["quantize.embedding.weight"] = torch.full((21, 5), torch.inf)
    torch.save(dict(model=state, arch=model.arch()), tmp_path / "vqkd.pt")
    for load in (vqkd.load_tokenizer, lambda path: vqkd.continue_from(model, path)):
        with pytest.raises(UserError, match=sentence) as error:
            load(tmp_path / "vqkd.pt")
        assert "\n" not in str(error.value)


def test_going_on_from_a_tokenizer_with_other_heads_is_refused(tmp_path):
    # Shapes are the same for any number of heads; the tokens would be others.
    sizes = dict(patch_size=8, image_size=32, width=24, depth=1, decoder_depth=1, codes=16,
                 code_dim=4, teacher_dims=[5])
    path = save("vqkd", vqkd.VQKD(heads=3, **sizes), tmp_path / "vqkd.pt")
    with pytest.raises(UserError, match="3 attention heads"):
        vqkd.continue_from(vqkd.VQKD(heads=4, **sizes), path)


def test_a_file_of_another_kind_is_refused_by_every_reader(tmp_path):
    backbone = save("pretrain", BEiT(32, 8, 24, 2, 3, codes=10, early_layer=1), tmp_path / "a.pt")
    classifier = save("finetune", ViT(32, 8, 24, 2, 3, num_classes=4), tmp_path / "b.pt")
    for load, path, sentence in [
            (vqkd.load_tokenizer, backbone, "a.pt is no VQ-KD tokenizer: make one"),
            (visualize.load_beit, classifier, "b.pt has no head over the codes"),
            (segment.load_segmenter, classifier, "b.pt is no segmenter")]:
        with pytest.raises(UserError, match=re.escape(sentence)):
            load(path)
