"""UPerNet: which blocks it reads, the pyramid, the head, sizes and names."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import PRESETS, ViT
from segment import UPerNet, load_segmenter, resize, taps_of
from support.files import UserError, write_file
from support.run import count_parameters


def small(image_size=48, classes=5, **options):
    """A UPerNet of width 24 and four blocks: milliseconds an image."""
    return UPerNet(ViT(image_size, 8, 24, 4, 3, **options), classes, channels=8)


def on_meta(preset, image_size, classes=150):
    with torch.device("meta"):
        return UPerNet(ViT(**PRESETS[preset] | dict(image_size=image_size)), classes)


# --- sizes and names ------------------------------------------------------------------------------
@pytest.mark.parametrize("depth, taps", [
    (12, (3, 5, 7, 11)), (24, (7, 11, 15, 23)), (6, (1, 2, 3, 5))])
def test_taps_lie_a_third_half_two_thirds_and_all_the_way_up(depth, taps):
    assert taps_of(depth) == taps


def test_base_has_163_million_parameters_and_maps_of_128_64_32_and_16_at_a_crop_of_512():
    model = on_meta("base", 512)
    assert count_parameters(model) == 163_080_812            # 163 M in the papers' tables
    images = torch.zeros(2, 3, 512, 512, device="meta")
    assert [tuple(x.shape) for x in model.maps(images)] == [
        (2, 768, side, side) for side in (128, 64, 32, 16)]
    logits, logits_aux = model(images)
    assert logits.shape == (2, 150, 128, 128)
    assert logits_aux.shape == (2, 150, 32, 32)


@pytest.mark.slow
def test_large_has_441_million_parameters_at_a_crop_of_640_and_440_at_512():
    # Only the position tables differ.
    assert round(count_parameters(on_meta("large", 640)) / 1e6) == 441
    assert round(count_parameters(on_meta("large", 512)) / 1e6) == 440


def test_parameters_have_the_names_of_the_released_files():
    names = set(small().state_dict())
    assert {"backbone.cls_token", "backbone.blocks.3.attn.relative_position_bias_table",
            "backbone.fpn1.0.weight", "backbone.fpn1.1.running_mean", "backbone.fpn1.3.bias",
            "backbone.fpn2.0.weight", "decode_head.psp_modules.3.1.conv.weight",
            "decode_head.psp_modules.0.1.bn.bias", "decode_head.bottleneck.conv.weight",
            "decode_head.lateral_convs.2.bn.weight", "decode_head.fpn_convs.0.conv.weight",
            "decode_head.fpn_bottleneck.bn.running_var", "decode_head.conv_seg.weight",
            "auxiliary_head.convs.0.conv.weight", "auxiliary_head.convs.0.bn.weight",
            "auxiliary_head.conv_seg.bias"} <= names
    assert not any(name.startswith(("backbone.norm", "backbone.fc_norm")) for name in names)


@pytest.mark.parametrize("build", [
    dict(), dict(mlp_ratio=3.0), dict(positions="absolute"), dict(image_size=(32, 56))])
def test_a_network_comes_back_from_its_file_with_all_its_sizes(tmp_path, build):
    model = small(classes=7, **build).eval()
    path = tmp_path / "segment.pt"
    write_file(path, dict(kind="segment", model=model.state_dict(), arch=model.arch()))
    again, _ = load_segmenter(path)
    stated = model.arch()
    assert (stated["channels"], stated["num_classes"]) == (8, 7)
    assert all(again.arch()[name] == value for name, value in stated.items())
    images = torch.randn(1, 3, *model.backbone.image_size)
    with torch.no_grad():
        assert torch.equal(again.eval()(images), model(images))


def test_a_file_with_another_head_is_refused(tmp_path):
    state = {name: x for name, x in small().state_dict().items() if "bottleneck" not in name}
    write_file(tmp_path / "segment.pt", dict(kind="segment", model=state))
    with pytest.raises(UserError, match="segment.pt .segment. lacks .*bottleneck"):
        load_segmenter(tmp_path / "segment.pt")


# --- the pyramid ----------------------------------------------------------------------------------
def test_every_parameter_gets_a_gradient_and_convolutions_have_no_bias():
    model = small()
    logits, logits_aux = model(torch.randn(2, 3, 48, 48))
    (logits.square().mean() + logits_aux.square().mean()).backward()
    # Several processes would wait for a missing gradient for ever.
    assert all(p.grad is not None for p in model.parameters())
    biased = [name for name, layer in model.named_modules()
              if isinstance(layer, nn.Conv2d) and layer.bias is not None]
    assert biased == ["backbone.patch_embed.proj", "decode_head.conv_seg",
                      "auxiliary_head.conv_seg"]
    assert 0.008 < model.auxiliary_head.conv_seg.weight.std().item() < 0.012     # N(0, 0.01)


def test_taps_are_raw_block_outputs_without_cls():
    model = small().eval()
    images = torch.randn(2, 3, 48, 48)
    tokens = model.backbone.features(images, [model.taps[2]])[0]
    third = model.maps(images)[2]                            # the identity of the pyramid
    torch.testing.assert_close(third[:, :, 2, 5], tokens[:, 1 + 2 * 6 + 5])
    fourth = model.maps(images)[3]
    top = model.backbone.features(images)[-1][:, 1:].unflatten(1, (6, 6))
    torch.testing.assert_close(fourth[:, :, 1, 0], top[:, 2:4, 0:2].flatten(1, 2).amax(dim=1))


@torch.no_grad()
def test_the_finest_map_is_two_deconvolutions_with_a_norm_and_gelu_between_them():
    model = small().eval()
    images = torch.randn(2, 3, 48, 48)

    def tap(block):
        tokens = model.backbone.features(images, [block])[0]
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (6, 6))

    first, norm, _, second = model.backbone.fpn1
    torch.testing.assert_close(model.maps(images)[0], second(F.gelu(norm(first(tap(0))))))
    torch.testing.assert_close(model.maps(images)[1], model.backbone.fpn2[0](tap(1)))


# --- the head -------------------------------------------------------------------------------------
@torch.no_grad()
def test_each_level_is_its_lateral_plus_the_coarser_level_and_all_four_are_read_at_the_finest():
    head = small().decode_head.eval()
    seen = {}
    maps = [torch.rand(1, 24, side, side) for side in (24, 12, 6, 3)]
    head.bottleneck.register_forward_hook(
        lambda module, inputs, output: seen.update(pooled=inputs[0], level3=output))
    head.fpn_bottleneck.register_forward_hook(
        lambda module, inputs, output: seen.update(read=inputs[0]))
    for i, smooth in enumerate(head.fpn_convs):
        smooth.register_forward_hook(lambda module, inputs, output, i=i: seen.update({
            f"level{i}": inputs[0], f"smooth{i}": output}))
    head(maps)
    for i in (0, 1, 2):
        coarser = resize(seen[f"level{i + 1}"], maps[i].shape[-2:])
        torch.testing.assert_close(seen[f"level{i}"], head.lateral_convs[i](maps[i]) + coarser)
    four = [resize(seen[name], (24, 24)) for name in ("smooth0", "smooth1", "smooth2", "level3")]
    torch.testing.assert_close(seen["read"], torch.cat(four, dim=1))
    # Pyramid pooling: the map itself, then its mean over the whole map, the same everywhere, ...
    torch.testing.assert_close(seen["pooled"][:, :24], maps[3])
    whole = head.psp_modules[0][1](maps[3].mean(dim=(2, 3), keepdim=True))
    torch.testing.assert_close(seen["pooled"][:, 24:32], whole.expand(-1, -1, 3, 3))


def test_the_pyramid_pools_1_2_3_and_6_regions_a_side_and_dropout_takes_whole_channels():
    model = small()
    assert [pool[0].output_size for pool in model.decode_head.psp_modules] == [1, 2, 3, 6]
    for dropout in (model.decode_head.dropout, model.auxiliary_head.dropout):
        dropped = dropout(torch.ones(4, 200, 3, 3)).flatten(2)
        assert torch.equal(dropped.amin(-1), dropped.amax(-1))
        assert 0.05 < (dropped == 0).float().mean() < 0.15


def test_the_auxiliary_head_reads_the_third_map_and_only_in_training():
    model = small()
    images = torch.randn(2, 3, 48, 48)
    seen = []
    model.auxiliary_head.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0]))
    assert [tuple(x.shape) for x in model(images)] == [(2, 5, 24, 24), (2, 5, 6, 6)]
    third = model.backbone.features(images, [model.taps[2]])[0][:, 1:].transpose(1, 2)
    torch.testing.assert_close(seen[0].flatten(2), third)
    assert model.eval()(images).shape == (2, 5, 24, 24)
    assert len(seen) == 1


def test_images_need_not_be_square():
    model = small(image_size=(32, 56)).eval()
    assert model(torch.randn(1, 3, 32, 56)).shape == (1, 5, 16, 28)
