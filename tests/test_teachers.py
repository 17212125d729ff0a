"""Teachers: known answers for the hand-made ones; the networks' own forward for the others, as tiny random files."""
import functools
import json
import os
import pickle
import shutil
import types

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as VF

from support import data, engine, teachers, transforms
from support.features import cache_features, cache_name
from support.shapes import Shapes
from support.images import Folder
from conftest import ROOT, stage
from support.teachers import HogTeacher, PixelTeacher, build_teacher, to_teacher


def textured(b=2, h=48, w=48):
    """Smooth random images, so that gradients are well away from rounding."""
    coarse = torch.rand(b, 3, h // 8 + 1, w // 8 + 1)
    return F.interpolate(coarse, (h, w), mode="bicubic", align_corners=True).clamp(0, 1)


# --------------------------------------------------------------------------------------------------------------- hog
def histograms(images, patch_size=8, bins=9):
    """HOG laid out as (B, gh, gw, 4, 4, bins): for every patch the 4 x 4 cells it is described by, row by row."""
    gh, gw = images.shape[-2] // patch_size, images.shape[-1] // patch_size
    return HogTeacher(patch_size, bins)(images).view(len(images), gh, gw, bins, 4, 4).movedim(3, -1)


def vertical_edge(low=0.2, high=0.8):
    image = torch.full((1, 3, 48, 48), low)
    image[..., 20:] = high                          # in the middle of patch column 2 (pixels 16 to 23)
    return image


def test_a_vertical_edge_votes_for_one_orientation_only():
    t = histograms(vertical_edge())[0, 3, 2]        # 4 x 4 cells of 9 orientations; the patch is the middle 2 x 2
    empty = t[..., 1:]
    assert (empty - empty.flatten()[0]).abs().max() < 1e-6          # all others equal: nothing there but the mean
    own = t[1:3, 1:3, 0]                            # between the two columns of cells: both see it
    assert (own > 0.3).all() and (own > empty.max()).all()
    assert torch.allclose(t[:, 0, 0], empty[0, 0, 0].expand(4))     # the ring's left column does not


def test_the_surroundings_show_what_the_patch_itself_does_not():
    image = torch.full((1, 3, 48, 48), 0.2)
    image[..., 26:] = 0.8                           # two pixels beyond patch column 2: within its ring
    t = histograms(image)[0, 3, 2]
    assert t[1:3, 3, 0].min() > 0.3 and t[1:3, 1:3].abs().max() < 0.1
    assert histograms(image)[0, 3, 0].abs().max() == 0              # too far away for patch column 0


def test_a_slanted_edge_is_shared_between_the_two_nearest_bins():
    ramp = torch.arange(48.0)
    for degrees, bin_, share in ((0, 0, 1.0), (10, 0, 0.5), (15, 0, 0.25), (40, 2, 1.0), (170, 8, 0.5)):
        a = torch.tensor(degrees).deg2rad()
        image = 0.5 + 0.004 * (torch.cos(a) * (ramp - 24) + torch.sin(a) * (ramp[:, None] - 24)).expand(1, 3, 48, 48)
        cell = histograms(image)[0, 3, 3, 1, 1]
        cell = cell - cell.min()
        assert abs(cell[bin_] / cell.sum() - share) < 1e-3
        assert abs(cell[(bin_ + 1) % 9] / cell.sum() - (1 - share)) < 1e-3


def test_contrast_brightness_polarity_and_colour_hardly_move_hog():
    images, hog = textured(), HogTeacher(8)
    t = hog(images)
    for other in (0.5 * images + 0.3, images - 0.2, 1 - images, images.flip(1)):
        assert F.cosine_similarity(hog(other), t, dim=-1).min() > 0.9999
    assert F.cosine_similarity(hog(textured()), t, dim=-1).mean() < 0.5         # another image does


def test_a_constant_image_gives_zeros_and_no_nan():
    for teacher in (HogTeacher(8), PixelTeacher(8)):
        t = teacher(torch.full((2, 3, 48, 48), 0.7))
        assert torch.isfinite(t).all() and t.abs().max() < 1e-2


def test_turning_the_image_permutes_patches_cells_and_orientations():
    images = textured(h=48, w=64)
    # Mirrored: angle a becomes -a, so bin k becomes bin -k.
    mirrored = histograms(images.flip(-1)).flip(2).flip(4)[..., (-torch.arange(9)) % 9]
    torch.testing.assert_close(mirrored, histograms(images), atol=1e-5, rtol=0)
    # A quarter turn is bins/2 steps, a permutation where the number of bins is even (nine bins: half way between two).
    turned = histograms(images.rot90(1, (-2, -1)), bins=8)
    back = turned.rot90(-1, (1, 2)).rot90(-1, (3, 4))[..., (torch.arange(8) + 4) % 8]
    torch.testing.assert_close(back, histograms(images, bins=8), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size, patch", [((48, 48), 8), ((32, 64), 8), ((42, 28), 14), ((45, 27), 9), ((21, 35), 7)])
def test_hand_made_teachers_take_any_patch_and_any_shape(size, patch):
    grid = (size[0] // patch, size[1] // patch)
    for name in ("hog", "pixel"):
        teacher = build_teacher(name, grid, patch, "cpu")
        t = teacher(textured(2, *size))
        assert t.shape == (2, grid[0] * grid[1], teacher.dim) and t.dtype == torch.float32
        assert teacher.name == name and t.norm(dim=-1).min() > 0.5
    with pytest.raises(ValueError, match="not a multiple"):
        teacher(torch.rand(1, 3, size[0] + 1, size[1]))


def test_hog_is_centred_so_that_different_patches_point_different_ways():
    t = HogTeacher(8)(textured(8))
    assert t.mean(dim=-1).abs().max() < 1e-6
    a, b = t[:, 0], t[:, 20]                        # two places in each image
    assert F.cosine_similarity(a, b, dim=-1).mean().abs() < 0.2


def test_one_image_does_not_change_anothers_target():
    images, hog = textured(4), HogTeacher(8)
    torch.testing.assert_close(torch.cat([hog(i[None]) for i in images]), hog(images), atol=0, rtol=0)


# ------------------------------------------------------------------------------------------------------------- pixel
def test_pixel_targets_are_the_patch_without_its_mean_and_contrast():
    images = textured()
    t = PixelTeacher(8)(images)
    by_hand = images[1, :, 8:16, 24:32].flatten()                   # row 1, column 3 of six
    by_hand = (by_hand - by_hand.mean()) / (by_hand.var() + 1e-6).sqrt()
    torch.testing.assert_close(t[1, 1 * 6 + 3], by_hand, atol=1e-5, rtol=0)
    changed = PixelTeacher(8)(0.5 * images + 0.2)
    assert F.cosine_similarity(changed, t, dim=-1).min() > 0.9999


# -------------------------------------------------------------------------------------------------- the teacher's door
def test_scaling_is_the_authors(golden):
    case = golden("vqkd_encode_decode")
    images = (case["scaling_input"] + 1) / 2                        # pixels in [-1, 1], and some beyond
    clip = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for name, (mean, std) in (("scaling_clip", clip), ("scaling_imagenet", imagenet)):
        ours = to_teacher(images, images.shape[-2:], mean, std)
        assert (ours - case[name]).abs().max() / case[name].abs().max() <= 2e-6


# ------------------------------------------------------------------------------- networks: tiny and random, in files
def fill(model):
    """Every parameter random, norms included: a step left out would show."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
        p.data += p.ndim == 1
    return model.eval()


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """-> (model name, file, the model): 2 x 3 patches of 8 pixels, known to open_clip with and without QuickGELU."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("clip")
    config = dict(embed_dim=24, vision_cfg=dict(image_size=[16, 24], patch_size=8, width=32, layers=2, head_width=16),
                  text_cfg=dict(context_length=8, vocab_size=64, width=16, heads=2, layers=1))
    for name, quick in (("tiny-test-quickgelu", True), ("tiny-test", False)):
        (folder / f"{name}.json").write_text(json.dumps(dict(config, quick_gelu=quick)))
    open_clip.add_model_config(folder)
    torch.manual_seed(1)
    model = fill(open_clip.create_model("tiny-test-quickgelu"))
    torch.save(model.state_dict(), folder / "weights.pt")
    return "tiny-test-quickgelu", str(folder / "weights.pt"), model


@pytest.fixture(scope="module")
def square_clip(tmp_path_factory):
    """-> (model name, file): 3 x 3 patches of 14 pixels, the patch size of ViT-L-14."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("clip14")
    (folder / "tiny-test-14.json").write_text(json.dumps(dict(
        embed_dim=20, vision_cfg=dict(image_size=42, patch_size=14, width=32, layers=2, head_width=16), quick_gelu=True,
        text_cfg=dict(context_length=8, vocab_size=64, width=16, heads=2, layers=1))))
    open_clip.add_model_config(folder)
    torch.save(fill(open_clip.create_model("tiny-test-14")).state_dict(), folder / "clip+hand+made.pt")
    return "tiny-test-14", str(folder / "clip+hand+made.pt")


def clip_patches(tower, x):
    """ln_post and projection on the patches, from open_clip's own forward."""
    tower.output_tokens = True
    with torch.no_grad():
        return tower(x)[1] @ tower.proj


def test_clip_at_its_native_size_is_open_clips_own_forward(tiny_clip):
    name, file, model = tiny_clip
    teacher = build_teacher(f"open_clip:{name}@{file}", (2, 3), 8, "cpu")
    images = textured(2, 16, 24)
    mean, std = torch.tensor(model.visual.image_mean).view(3, 1, 1), torch.tensor(model.visual.image_std).view(3, 1, 1)
    assert abs(mean[0].item() - 0.48145466) < 1e-6                  # CLIP's own, not ImageNet's
    expected = clip_patches(model.visual, (images - mean) / std)
    assert teacher.dim == 24 and torch.equal(teacher(images), expected)


def test_clip_under_autocast_gives_the_features_of_float32_but_for_rounding(tiny_clip):
    name, file, _ = tiny_clip
    teacher, images = build_teacher(f"open_clip:{name}@{file}", (2, 3), 8, "cpu"), textured(2, 16, 24)
    exact = teacher(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = teacher(images)
    assert 0 < (rounded - exact).abs().max() < 0.03 * exact.abs().max()


def test_clip_positions_are_interpolated_to_the_students_grid(tiny_clip):
    open_clip = pytest.importorskip("open_clip")
    name, file, _ = tiny_clip
    square = open_clip.create_model(name, force_image_size=(32, 32)).visual         # open_clip resizes squares only
    own = open_clip.create_model(name, force_image_size=(40, 24))
    state = {k: v for k, v in torch.load(file, weights_only=True).items() if not k.endswith("positional_embedding")}
    for target in (square, own.visual):
        target.load_state_dict({k[7:]: v for k, v in state.items() if k.startswith("visual.")}, strict=False)
        nn.init.normal_(target.positional_embedding)
    source = {"visual.positional_embedding": square.positional_embedding.data.clone()}
    open_clip.factory.resize_pos_embed(source, own)
    own.visual.positional_embedding.data = source["visual.positional_embedding"]
    ours = teachers.resize_positions(square.positional_embedding.data, (4, 4), (5, 3))
    torch.testing.assert_close(ours, own.visual.positional_embedding.data, atol=1e-6, rtol=0)

    teacher = build_teacher(f"open_clip:{name}@{file}", (5, 3), 6, "cpu")           # student: 30 x 18 pixels
    assert teacher.size == (40, 24) and teacher(textured(2, 30, 18)).shape == (2, 15, 24)
    before = torch.load(file, weights_only=True)["visual.positional_embedding"]
    assert torch.equal(teacher.tower.positional_embedding[0], before[0])            # [CLS] has no place to interpolate


def test_clip_away_from_its_native_size_is_open_clips_own_forward_at_that_size(square_clip):
    open_clip = pytest.importorskip("open_clip")
    name, file = square_clip
    teacher = build_teacher(f"open_clip:{name}@{file}", (5, 5), 8, "cpu")           # student: 40 px; teacher: 70 px
    tower = open_clip.create_model(name, pretrained=file, force_image_size=70).visual.eval()     # 3 x 3 -> 5 x 5
    images = textured(2, 40, 40)
    enlarged = to_teacher(images, (70, 70), tower.image_mean, tower.image_std)
    torch.testing.assert_close(teacher(images), clip_patches(tower, enlarged), atol=1e-5, rtol=1e-5)


def test_the_larger_clip_that_the_help_names_exists_and_has_the_activation_of_its_weights():
    open_clip = pytest.importorskip("open_clip")
    with pytest.raises(engine.UserError, match="open_clip:ViT-L-14-quickgelu@openai"):
        build_teacher("larger", (6, 6), 8, "cpu")
    assert "open_clip:ViT-L-14-quickgelu@openai" in teachers.__doc__
    assert open_clip.get_model_config("ViT-L-14-quickgelu")["quick_gelu"]
    assert open_clip.get_pretrained_cfg("ViT-L-14-quickgelu", "openai")["quick_gelu"]


def test_the_teachers_patches_are_the_students_patches(tiny_clip):
    """Without blocks in between, a patch's feature depends on the pixels of that patch of the student."""
    name, file, _ = tiny_clip
    teacher = build_teacher(f"open_clip:{name}@{file}", (4, 6), 4, "cpu")           # 16 x 24 pixels to 32 x 48
    teacher.tower.transformer = nn.Identity()
    images = torch.full((1, 3, 16, 24), 0.5)
    changed = images.clone()
    changed[..., 5:7, 13:15] = 1.0                                                  # inside row 1, column 3
    moved = (teacher(changed) - teacher(images)).abs().sum(-1)[0]
    assert moved.argmax() == 1 * 6 + 3 and moved[[0, 5, 18, 23]].max() < 1e-4


def test_openai_weights_without_quickgelu_are_refused(tiny_clip, tmp_path, capsys):
    name, file, model = tiny_clip
    with pytest.raises(engine.UserError, match="QuickGELU.*ViT-B-16-quickgelu@openai"):
        build_teacher("open_clip:ViT-B-16@openai", (14, 14), 16, "cpu")             # before anything is downloaded
    with pytest.raises(engine.UserError, match="QuickGELU.*-quickgelu@"):
        renamed = tmp_path / "vit_openai.pt"
        renamed.write_bytes(open(file, "rb").read())
        build_teacher(f"open_clip:tiny-test@{renamed}", (2, 3), 8, "cpu")
    # A file that does not tell: they load, they differ, and the difference is announced.
    images = textured(2, 16, 24)
    right = build_teacher(f"open_clip:{name}@{file}", (2, 3), 8, "cpu")(images)
    assert "QuickGELU" not in capsys.readouterr().err
    wrong = build_teacher(f"open_clip:tiny-test@{file}", (2, 3), 8, "cpu")(images)
    assert "QuickGELU" in capsys.readouterr().err
    assert (right - wrong).abs().max() > 1e-3


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory):
    """make(name, classes) -> (file, the model without its head); the file has a head, as published ones do."""
    timm = pytest.importorskip("timm")

    def make(name="test_vit", classes=7):
        torch.manual_seed(2)
        model = fill(timm.create_model(name, num_classes=classes))
        file = str(tmp_path_factory.mktemp("timm") / f"{name}.pt")
        torch.save(model.state_dict(), file)
        model.reset_classifier(0)
        return file, model
    return make


def test_timm_at_its_native_size_is_timms_own_forward(tiny_vit):
    file, model = tiny_vit()
    teacher = build_teacher(f"timm:test_vit@{file}", (10, 10), 16, "cpu")
    images = textured(2, 160, 160)
    with torch.no_grad():
        expected = model.forward_features((images - 0.5) / 0.5)[:, 1:]              # final norm inside, [CLS] dropped
    assert teacher.dim == 64 and torch.equal(teacher(images), expected)


def test_timm_positions_are_interpolated_to_the_students_grid(tiny_vit):
    timm = pytest.importorskip("timm")
    file, _ = tiny_vit()
    teacher = build_teacher(f"timm:test_vit@{file}", (3, 5), 8, "cpu")              # student: 24 x 40 pixels
    images = textured(2, 24, 40)
    own = timm.create_model("test_vit", img_size=(48, 80), pretrained=True, num_classes=0,
                            pretrained_cfg_overlay=dict(file=file, num_classes=7)).eval()
    enlarged = F.interpolate(images, (48, 80), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        expected = own.forward_features((enlarged - 0.5) / 0.5)[:, 1:]
    torch.testing.assert_close(teacher(images), expected, atol=1e-5, rtol=1e-5)


def test_a_norm_behind_mean_pooling_is_applied_to_each_token(tiny_vit):
    file, model = tiny_vit("test_vit2")
    teacher = build_teacher(f"timm:test_vit2@{file}", (10, 10), 16, "cpu")
    images = textured(1, 160, 160)
    with torch.no_grad():
        tokens = model.forward_features((images - 0.5) / 0.5)
        expected = model.fc_norm(tokens)[:, 1:]
    assert isinstance(model.fc_norm, nn.LayerNorm) and torch.equal(teacher(images), expected)


@pytest.mark.parametrize("name, class_token, patch", [
    ("vit_base_patch14_reg4_dinov2", 1, 14),                        # four registers, positions on patches only
    ("vit_wee_patch16_reg1_gap_256", 0, 16),                        # one register, no class token, norm behind pooling
    ("vit_large_patch16_siglip_256", 0, 16),                        # patches only, and attention pooling after them
    ("vit_large_patch14_clip_224", 1, 14)])                        # ViT-L of timm: pre-norm, patch 14
def test_registers_and_a_missing_class_token_do_not_shift_the_patches(name, class_token, patch, tmp_path, monkeypatch):
    """Published architectures, made narrow and shallow; native grid 4 x 4, student's grid 3 x 5."""
    timm = pytest.importorskip("timm")
    create = functools.partial(timm.create_model, embed_dim=32, depth=2, num_heads=2, img_size=4 * patch)
    model = fill(create(name, num_classes=0))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    monkeypatch.setattr(timm, "create_model", create)
    registers = model.num_prefix_tokens - class_token
    assert registers == sum(int(n[3:]) for n in name.split("_") if n.startswith("reg"))

    native = build_teacher(f"timm:{name}@{tmp_path}/weights.pt", (4, 4), 8, "cpu")
    images = textured(2, 4 * patch, 4 * patch)
    with torch.no_grad():
        tokens = model.forward_features(to_teacher(images, images.shape[-2:], native.mean, native.std))
        expected = model.fc_norm(tokens)[:, -16:]                   # whatever comes first, the patches come last
    assert torch.equal(native(images), expected)

    # Elsewhere: timm's own resizing while loading. Pixels of one patch move that patch's feature, blocks left out.
    teacher = build_teacher(f"timm:{name}@{tmp_path}/weights.pt", (3, 5), 8, "cpu")
    own = create(name, num_classes=0).eval()
    own.set_input_size((3 * patch, 5 * patch))
    state = timm.models.vision_transformer.checkpoint_filter_fn(torch.load(tmp_path / "weights.pt"), own)
    own.load_state_dict(state)
    images = textured(2, 24, 40)
    enlarged = to_teacher(images, (3 * patch, 5 * patch), teacher.mean, teacher.std)
    with torch.no_grad():
        expected = own.fc_norm(own.forward_features(enlarged))[:, -15:]
    torch.testing.assert_close(teacher(images), expected, atol=1e-5, rtol=1e-5)
    teacher.model.blocks = nn.Identity()
    changed = images.clone()
    changed[0, :, 9:15, 25:31] = 1 - changed[0, :, 9:15, 25:31]     # inside row 1, column 3
    assert (teacher(changed) - teacher(images)).abs().sum(-1)[0].argmax() == 1 * 5 + 3


# ---------------------------------------------------------------------------------------------------- several teachers
def test_several_teachers_stand_side_by_side_whatever_their_widths_and_patch_sizes(square_clip, tiny_vit):
    clip, clip_file = square_clip                                   # patch 14; a file name with + in it
    vit = f"timm:test_vit@{tiny_vit()[0]}"                          # patch 16
    name = f"open_clip:{clip}@{clip_file}+{vit}+hog+pixel"
    teacher = build_teacher(name, (4, 6), 8, "cpu")
    assert teacher.name == name and teacher.names == ("tiny-test-14", "test_vit", "hog", "pixel")
    assert teacher.dims == (20, 64, 144, 192) and teacher.dim == 420
    images = textured(2, 32, 48)
    t = teacher(images)
    assert t.shape == (2, 24, 420) and t.dtype == torch.float32
    for part, spec in zip(t.split(teacher.dims, dim=-1), (f"open_clip:{clip}@{clip_file}", vit, "hog", "pixel")):
        alone = build_teacher(spec, (4, 6), 8, "cpu")
        assert torch.equal(part, alone(images)) and alone.dims == (alone.dim,) and len(alone.names) == 1
    # Whatever the patch size of a teacher: row 1, column 3 of the student moves row 1, column 3 most.
    teacher.teachers[0].tower.transformer = teacher.teachers[1].model.blocks = nn.Identity()
    changed = images.clone()
    changed[..., 9:15, 25:31] = 1 - changed[..., 9:15, 25:31]
    for part in (teacher(changed) - teacher(images))[0].split(teacher.dims, dim=-1):
        assert part.abs().sum(-1).argmax() == 1 * 6 + 3


@pytest.mark.parametrize("name, parts", [
    ("clip+dino", ["clip", "dino"]), ("hog+pixel", ["hog", "pixel"]), ("clip", ["clip"]),
    ("open_clip:A@a+b/c+d.pt+timm:B@+clip.pt+dino", ["open_clip:A@a+b/c+d.pt", "timm:B@+clip.pt", "dino"]),
    ("timm:B@dino+hogs/x+timm:C@y", ["timm:B@dino+hogs/x", "timm:C@y"])])
def test_only_a_plus_before_a_teachers_name_splits(name, parts):
    assert teachers.split_names(name) == parts


def test_labels_of_teachers_differ_and_no_teacher_comes_twice(tiny_clip):
    name, file, _ = tiny_clip
    copy = shutil.copy(file, f"{file}.copy")
    two = build_teacher(f"open_clip:{name}@{file}+open_clip:{name}@{copy}", (2, 3), 8, "cpu")
    assert two.names == (f"{name}_1", f"{name}_2")
    for same in ("hog+pixel+hog", "clip+open_clip:ViT-B-16-quickgelu@openai", "timm:vit_base_patch16_224.dino+dino"):
        with pytest.raises(engine.UserError, match="twice"):
            build_teacher(same, (2, 3), 8, "cpu")
    with pytest.raises(engine.UserError, match="sift is not known"):
        build_teacher("hog+sift", (2, 3), 8, "cpu")


def test_nothing_of_a_teacher_can_be_trained_or_saved(tiny_clip, tiny_vit):
    name, file, _ = tiny_clip
    for spec in ("hog", "pixel", f"open_clip:{name}@{file}", f"timm:test_vit@{tiny_vit()[0]}"):
        teacher = build_teacher(spec, (2, 3), 8, "cpu")
        assert not isinstance(teacher, nn.Module)                   # as an attribute of a module it registers nothing
        holder = nn.Module()
        holder.teacher = teacher
        assert not list(holder.parameters()) and not holder.state_dict()
        networks = [v for v in vars(teacher).values() if isinstance(v, nn.Module)]
        assert not any(p.requires_grad for m in networks for p in m.parameters())
        assert not any(m.training for network in networks for m in network.modules())
        assert not any("text" in n or "token_embedding" in n for m in networks for n, _ in m.named_parameters())
        images = textured(1, 16, 24).requires_grad_()
        t = teacher(images)
        assert not t.requires_grad and t.dtype == torch.float32
        (t * torch.ones(teacher.dim, requires_grad=True)).sum().backward()          # serves in a loss all the same
        with torch.autocast("cpu", torch.bfloat16):
            low = teacher(images)
        assert low.dtype == torch.float32 and F.cosine_similarity(low, t, dim=-1).mean() > 0.99


# ------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("name, says", [
    ("sift", "clip, dino, open_clip:NAME@TAG_OR_FILE, timm:NAME@FILE, hog, pixel"),
    ("open_clip:ViT-B-16", "not known"),
    ("open_clip:ViT-Z-99@openai", "no model ViT-Z-99"),
    ("open_clip:ViT-B-16@nowhere.pt", "nowhere.pt is no file and none of the tags .*openai"),
    ("timm:vit_unheard_of@x.pt", "no model vit_unheard_of"),
    ("timm:test_vit@nowhere.pt", "no file nowhere.pt"),
])
def test_a_wrong_name_is_one_helpful_sentence(name, says):
    with pytest.raises(engine.UserError, match=says) as error:
        build_teacher(name, (6, 6), 8, "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, own_file", [("clip", r"open_clip:ViT-B-16-quickgelu@FILE"),
                                            ("dino", r"timm:vit_base_patch16_224.dino@FILE")])
def test_weights_that_cannot_be_downloaded_name_the_alternatives(name, own_file, tmp_path, monkeypatch, capsys):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(engine.UserError) as error:
        build_teacher(name, (6, 6), 8, "cpu")
    sentence = str(error.value)
    assert own_file in sentence and "\n" not in sentence
    assert all(other in sentence for other in ("hog", "pixel", "open_clip:NAME@TAG_OR_FILE", "timm:NAME@FILE"))
    assert "downloaded the first time" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_files_that_do_not_fit_are_refused(tiny_clip, tiny_vit, tmp_path):
    name, file, _ = tiny_clip
    vit, model = tiny_vit()
    torch.save({k: v for k, v in model.state_dict().items() if k != "blocks.0.attn.qkv.weight"}, tmp_path / "part.pt")
    (tmp_path / "text.pt").write_text("no weights")
    torch.save(dict(model=engine.UserError("code")), tmp_path / "hostile.pt")
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "traced.pt")
    for wrong, says in ((f"timm:test_vit@{tmp_path}/part.pt", "missing .*qkv"), (f"timm:test_vit@{file}", "could not"),
                        (f"timm:test_vit@{tmp_path}/text.pt", "could not be loaded"),
                        (f"timm:test_vit@{tmp_path}/hostile.pt", "could not be loaded"),
                        (f"open_clip:{name}@{vit}", "could not be loaded"),
                        (f"open_clip:{name}@{tmp_path}/traced.pt", "TorchScript archive")):
        with pytest.raises(engine.UserError, match=says) as error:
            build_teacher(wrong, (2, 3), 8, "cpu")
        assert "\n" not in str(error.value)


def test_networks_without_patch_tokens_are_refused(tiny_vit):
    file, _ = tiny_vit("test_resnet")
    with pytest.raises(engine.UserError, match="no plain ViT"):
        build_teacher(f"timm:test_resnet@{file}", (6, 6), 8, "cpu")


# -------------------------------------------------------------------------------------------------------------- cache
ALONE = engine.Process(0, 1, torch.device("cpu"))


def shapes(split="train", size=24, **options):
    return Shapes(split, transforms.EvalTransform(size), **dict(dict(limit=10), **options))


def cache(folder, teacher=None, dataset=None, flip=True, **options):
    teacher = teacher or build_teacher("hog+pixel", (3, 3), 8, "cpu")
    return cache_features(teacher, dataset or shapes(), folder, ALONE, flip=flip, **dict(dict(batch_size=4), **options))


def as_batch(image):
    return image[None].float() / 255


def test_cached_features_are_the_teachers_for_the_image_and_for_its_mirror_image(tmp_path, capsys):
    teacher, dataset = build_teacher("hog+pixel", (3, 3), 8, "cpu"), shapes()
    cached = cache(tmp_path)
    said = capsys.readouterr().out
    assert "10 train images" in said and " GB" in said and "without random crops" in said
    turned = {False: 0, True: 0}
    for key in [(epoch, i) for epoch in range(3) for i in range(10)]:
        (image, t), label = cached[key]
        whole, same_label = dataset[key]
        mirrored = torch.equal(image, whole.flip(-1))
        assert (mirrored or torch.equal(image, whole)) and label == same_label and image.dtype == torch.uint8
        expected = teacher(as_batch(image))[0]
        assert t.shape == (9, 336) and t.dtype == torch.float16 and torch.equal(t, expected.half())
        turned[mirrored] += 1
        again = cached[key]
        assert torch.equal(again[0][0], image) and torch.equal(again[0][1], t)      # a function of (seed, epoch, index)
    assert min(turned.values()) >= 6                                                # a fair coin: 15 of 30 expected
    first = [cached[(epoch, 0)][0][0] for epoch in range(8)]                        # one image, tossed every epoch
    assert any(not torch.equal(image, first[0]) for image in first)
    val = cache(tmp_path, dataset=shapes("val"), flip=False)
    assert "crops" not in capsys.readouterr().out
    assert val.features.shape[1] == 1 and len(val) == 10 and val.seed == 0 and val.labels is val.dataset.labels
    assert all(torch.equal(val[(e, 3)][0][0], val.dataset[3][0]) for e in range(8))


def test_a_second_run_opens_the_file_and_asks_the_teacher_nothing(tmp_path, tiny_vit, monkeypatch):
    teacher = build_teacher(f"timm:test_vit@{tiny_vit()[0]}", (3, 3), 8, "cpu")
    calls = []
    monkeypatch.setattr(teachers.TimmTeacher, "__call__", lambda self, images, old=teachers.TimmTeacher.__call__: (
        calls.append(len(images)), old(self, images))[1])
    first = cache(tmp_path, teacher)
    assert calls == [4, 4, 4, 4, 2, 2]                              # every batch and its mirror image
    second = cache(tmp_path, teacher)
    assert len(calls) == 6 and second.path == first.path and np.array_equal(second.features, first.features)
    assert [p.name for p in tmp_path.iterdir()] == [os.path.basename(first.path)]               # nothing temporary left


def test_whatever_changes_the_features_asks_for_another_file(tmp_path, tiny_vit, monkeypatch):
    folder = tmp_path / "images"
    for i in range(3):
        (folder / "val").mkdir(parents=True, exist_ok=True)
        VF.to_pil_image(shapes().image(i)).save(folder / "val" / f"{i}.png")

    def files():
        return Folder(str(folder), "val", transforms.EvalTransform(24), labelled=False)

    hog, file = build_teacher("hog", (3, 3), 8, "cpu"), tiny_vit()[0]
    vit = build_teacher(f"timm:test_vit@{file}", (3, 3), 8, "cpu")
    variants = dict(
        teacher=dict(teacher=build_teacher("pixel", (3, 3), 8, "cpu")), network=dict(teacher=vit),
        several=dict(teacher=build_teacher("hog+pixel", (3, 3), 8, "cpu")),
        patch=dict(teacher=build_teacher("hog", (3, 3), 4, "cpu")),
        grid=dict(teacher=build_teacher("hog", (6, 6), 8, "cpu")),
        file=dict(teacher=build_teacher(f"timm:test_vit@{shutil.copy(file, tmp_path)}", (3, 3), 8, "cpu")),
        size=dict(dataset=shapes(size=48)),
        split=dict(dataset=shapes("val")), limit=dict(dataset=shapes(limit=20)), flip=dict(flip=False),
        rotation=dict(dataset=shapes(max_rotation=180)),
        folder=dict(dataset=files()), amp=dict(amp="bf16"))
    before = dict(teacher=hog, dataset=shapes(), flip=True, amp="no")
    names = {key: cache_name(**dict(before, **change)) for key, change in variants.items()}
    names["same"] = cache_name(**before)
    assert len({name.rpartition("-")[2] for name in names.values()}) == len(variants) + 1       # by their hash alone
    # The same again is the same, the seed of the run changes nothing, and the name begins readably.
    again = dict(before, teacher=build_teacher("hog", (3, 3), 8, "cpu"), dataset=shapes(seed=5))
    assert cache_name(**again) == names["same"] and names["same"].startswith("hog-shapes-train-24px-")
    assert names["several"].startswith("hog+pixel-") and names["folder"].startswith("hog-images-val-24px-")

    # Other weights under the same name; a picture with another content or date; a teacher whose code has changed.
    state = torch.load(file)
    state["blocks.1.mlp.fc2.weight"][3, 5] += 1e-3
    torch.save(state, file)
    other = build_teacher(vit.name, (3, 3), 8, "cpu")
    assert cache_name(**dict(before, teacher=other)) != names["network"]
    os.utime(folder / "val" / "1.png", (1, 1))
    assert cache_name(**dict(before, dataset=files())) != names["folder"]
    monkeypatch.setattr(HogTeacher, "__call__", lambda self, images, old=HogTeacher.__call__: 1.1 * old(self, images))
    assert cache_name(**before) != names["same"]


def test_a_killed_build_leaves_nothing_that_counts_as_finished(tmp_path, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(teachers.SideBySide, "__call__", dies)
        cache(tmp_path)
    assert [p.suffix for p in tmp_path.iterdir()] == [".tmp"]
    cached = cache(tmp_path)
    (image, t), _ = cached[0]
    assert torch.equal(t, build_teacher("hog+pixel", (3, 3), 8, "cpu")(as_batch(image))[0].half())


def test_a_damaged_cache_is_a_sentence_that_says_what_to_delete(tmp_path):
    path = cache(tmp_path).path
    whole = open(path, "rb").read()
    np.save(tmp_path / "other.npy", np.zeros((2, 3), np.float16))
    for damaged in (whole[:-100], whole[:20], b"", b"no array", (tmp_path / "other.npy").read_bytes()):
        open(path, "wb").write(damaged)
        with pytest.raises(engine.UserError, match=r"hog\+pixel-shapes.*damaged.*delete it") as error:
            cache(tmp_path)
        assert "\n" not in str(error.value)


def test_a_full_disk_a_wrong_folder_and_random_crops_are_refused_before_the_work_begins(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(engine.UserError, match="file: cannot write there"):
        cache(tmp_path / "file")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1000))
    with pytest.raises(engine.UserError, match=r"--cache-teacher .* 10 train images x 2 x 9 patches x 336 numbers take "
                                               r"0\.000121 GB and 1e-06 GB are free"):
        cache(tmp_path)
    with pytest.raises(ValueError, match="EvalTransform"):
        cache(tmp_path, dataset=Shapes("train", transforms.VQKDTransform(24), limit=10))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_features_that_float16_cannot_hold_are_refused(tmp_path, monkeypatch):
    teacher = build_teacher("hog+pixel", (3, 3), 8, "cpu")
    monkeypatch.setattr(teachers.SideBySide, "__call__", lambda self, images: torch.full((len(images), 9, 336), 1e5))
    with pytest.raises(engine.UserError, match="float16 cannot hold"):
        cache(tmp_path, teacher)


def test_a_worker_maps_the_file_itself_and_sees_the_same(tmp_path):
    cached = cache(tmp_path)
    copy = pickle.loads(pickle.dumps(cached))
    assert len(pickle.dumps(cached)) < 20_000 < cached.features.nbytes             # images and features stay out
    for key in ((0, 1), (4, 7)):
        assert all(torch.equal(a, b) for a, b in zip(cached[key][0], copy[key][0]))
    (images, t), labels = next(iter(data.make_loader(copy, [[(0, 1), (0, 2)]], 0, "cpu")))
    assert images.shape == (2, 3, 24, 24) and t.shape == (2, 9, 336) and t.dtype == torch.float16 and len(labels) == 2


BUILD = """
import sys
sys.path[:0] = [sys.argv[1]]
from support import data, engine, teachers
def build():
    process = engine.init_distributed("cpu")
    teacher = teachers.build_teacher("hog+pixel", (3, 3), 8, "cpu")
    dataset = Shapes("train", transforms.EvalTransform(24), limit=11)
    cached = cache_features(teacher, dataset, sys.argv[2], process, flip=True, batch_size=2)
    open(f"{sys.argv[2]}.{process.rank}", "wb").write(cached.features.tobytes())
engine.run(build)
"""


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(tmp_path):
    (tmp_path / "build.py").write_text(BUILD)
    done = stage(tmp_path / "build.py", ROOT, tmp_path / "two", processes=2)
    assert done.stdout.count("caching the teacher's features") == 1
    one = cache(tmp_path / "one", dataset=shapes(limit=11))
    (two,) = (tmp_path / "two").iterdir()
    assert two.name == os.path.basename(one.path) and two.read_bytes() == open(one.path, "rb").read()
    assert all((tmp_path / f"two.{rank}").read_bytes() == one.features.tobytes() for rank in (0, 1))
