"""Teachers: known answers for the hand-made ones, the networks' own forward for the others.

The networks are tiny, random and lie in files.
"""
import functools
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from support import teachers
from support.files import UserError
from support.teachers import HogTeacher, PixelTeacher, build_teacher, to_teacher


def textured(b=2, h=48, w=48):
    """Smooth random images, so that gradients are well away from rounding."""
    coarse = torch.rand(b, 3, h // 8 + 1, w // 8 + 1)
    return F.interpolate(coarse, (h, w), mode="bicubic", align_corners=True).clamp(0, 1)


# --- hog ------------------------------------------------------------------------------------------
def histograms(images, patch_size=8, bins=9):
    """HOG as (B, gh, gw, 4, 4, bins): the 4 x 4 cells that describe each patch, row by row."""
    gh, gw = images.shape[-2] // patch_size, images.shape[-1] // patch_size
    return HogTeacher(patch_size, bins)(images).view(len(images), gh, gw, bins, 4, 4).movedim(3, -1)


def vertical_edge(low=0.2, high=0.8):
    image = torch.full((1, 3, 48, 48), low)
    image[..., 20:] = high  # in the middle of patch column 2 (pixels 16 to 23)
    return image


def test_a_vertical_edge_votes_for_one_orientation_only():
    # 4 x 4 cells of 9 orientations; the patch is the middle 2 x 2
    t = histograms(vertical_edge())[0, 3, 2]
    empty = t[..., 1:]
    # all others equal: nothing there but the mean
    assert (empty - empty.flatten()[0]).abs().max() < 1e-6
    own = t[1:3, 1:3, 0]                            # between the two columns of cells: both see it
    assert (own > 0.3).all() and (own > empty.max()).all()
    assert torch.allclose(t[:, 0, 0], empty[0, 0, 0].expand(4))    # the ring's left column does not


def test_the_surroundings_show_what_the_patch_itself_does_not():
    image = torch.full((1, 3, 48, 48), 0.2)
    image[..., 26:] = 0.8   # two pixels beyond patch column 2: within its ring
    t = histograms(image)[0, 3, 2]
    assert t[1:3, 3, 0].min() > 0.3 and t[1:3, 1:3].abs().max() < 0.1
    assert histograms(image)[0, 3, 0].abs().max() == 0  # too far away for patch column 0


def test_a_slanted_edge_is_shared_between_the_two_nearest_bins():
    ramp = torch.arange(48.0)
    cases = (0, 0, 1.0), (10, 0, 0.5), (15, 0, 0.25), (40, 2, 1.0), (170, 8, 0.5)
    for degrees, bin_, share in cases:
        a = torch.tensor(degrees).deg2rad()
        slope = torch.cos(a) * (ramp - 24) + torch.sin(a) * (ramp[:, None] - 24)
        image = 0.5 + 0.004 * slope.expand(1, 3, 48, 48)
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
    # A quarter turn is bins/2 steps: a permutation if the number of bins is even.
    turned = histograms(images.rot90(1, (-2, -1)), bins=8)
    back = turned.rot90(-1, (1, 2)).rot90(-1, (3, 4))[..., (torch.arange(8) + 4) % 8]
    torch.testing.assert_close(back, histograms(images, bins=8), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size, patch", [
    ((48, 48), 8), ((32, 64), 8), ((42, 28), 14), ((45, 27), 9), ((21, 35), 7)])
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
    alone = torch.cat([hog(i[None]) for i in images])
    torch.testing.assert_close(alone, hog(images), atol=0, rtol=0)


# --- pixel ----------------------------------------------------------------------------------------
def test_pixel_targets_are_the_patch_without_its_mean_and_contrast():
    images = textured()
    t = PixelTeacher(8)(images)
    by_hand = images[1, :, 8:16, 24:32].flatten()                   # row 1, column 3 of six
    by_hand = (by_hand - by_hand.mean()) / (by_hand.var() + 1e-6).sqrt()
    torch.testing.assert_close(t[1, 1 * 6 + 3], by_hand, atol=1e-5, rtol=0)
    changed = PixelTeacher(8)(0.5 * images + 0.2)
    assert F.cosine_similarity(changed, t, dim=-1).min() > 0.9999


# --- the teacher's door ---------------------------------------------------------------------------
def test_scaling_is_the_authors(golden):
    case = golden("vqkd_encode_decode")
    images = (case["scaling_input"] + 1) / 2    # pixels in [-1, 1], and some beyond
    clip = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for name, (mean, std) in (("scaling_clip", clip), ("scaling_imagenet", imagenet)):
        ours = to_teacher(images, images.shape[-2:], mean, std)
        assert (ours - case[name]).abs().max() / case[name].abs().max() <= 2e-6


# --- networks: tiny and random, in files ----------------------------------------------------------
def fill(model):
    """Every parameter random, norms included: a step left out would show."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
        p.data += p.ndim == 1
    return model.eval()


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """-> (model name, file, the model): 2 x 3 patches of 8 pixels.

    open_clip knows the model with and without QuickGELU.
    """
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("clip")
    config = dict(embed_dim=24,
                  vision_cfg=dict(image_size=[16, 24], patch_size=8, width=32, layers=2,
                                  head_width=16),
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
        embed_dim=20, quick_gelu=True,
        vision_cfg=dict(image_size=42, patch_size=14, width=32, layers=2, head_width=16),
        text_cfg=dict(context_length=8, vocab_size=64, width=16, heads=2, layers=1))))
    open_clip.add_model_config(folder)
    model = fill(open_clip.create_model("tiny-test-14"))
    torch.save(model.state_dict(), folder / "clip+hand+made.pt")
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
    mean = torch.tensor(model.visual.image_mean).view(3, 1, 1)
    std = torch.tensor(model.visual.image_std).view(3, 1, 1)
    assert abs(mean[0].item() - 0.48145466) < 1e-6                  # CLIP's own, not ImageNet's
    expected = clip_patches(model.visual, (images - mean) / std)
    assert teacher.dim == 24 and torch.equal(teacher(images), expected)


def test_clip_under_autocast_gives_the_features_of_float32_but_for_rounding(tiny_clip):
    name, file, _ = tiny_clip
    teacher = build_teacher(f"open_clip:{name}@{file}", (2, 3), 8, "cpu")
    images = textured(2, 16, 24)
    exact = teacher(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = teacher(images)
    assert 0 < (rounded - exact).abs().max() < 0.03 * exact.abs().max()


def test_clip_positions_are_interpolated_to_the_students_grid(tiny_clip):
    open_clip = pytest.importorskip("open_clip")
    name, file, _ = tiny_clip
    # open_clip resizes squares only
    square = open_clip.create_model(name, force_image_size=(32, 32)).visual
    own = open_clip.create_model(name, force_image_size=(40, 24))
    state = {k.removeprefix("visual."): v for k, v in torch.load(file, weights_only=True).items()
             if k.startswith("visual.") and not k.endswith("positional_embedding")}
    for target in (square, own.visual):
        target.load_state_dict(state, strict=False)
        nn.init.normal_(target.positional_embedding)
    source = {"visual.positional_embedding": square.positional_embedding.data.clone()}
    open_clip.factory.resize_pos_embed(source, own)
    own.visual.positional_embedding.data = source["visual.positional_embedding"]
    ours = teachers.resize_positions(square.positional_embedding.data, (4, 4), (5, 3))
    torch.testing.assert_close(ours, own.visual.positional_embedding.data, atol=1e-6, rtol=0)

    teacher = build_teacher(f"open_clip:{name}@{file}", (5, 3), 6, "cpu")  # student: 30 x 18 pixels
    assert teacher.size == (40, 24) and teacher(textured(2, 30, 18)).shape == (2, 15, 24)
    before = torch.load(file, weights_only=True)["visual.positional_embedding"]
    # [CLS] has no place to interpolate
    assert torch.equal(teacher.tower.positional_embedding[0], before[0])


def test_clip_away_from_its_native_size_is_open_clips_own_forward_at_that_size(square_clip):
    open_clip = pytest.importorskip("open_clip")
    name, file = square_clip
    # student: 40 px; teacher: 70 px
    teacher = build_teacher(f"open_clip:{name}@{file}", (5, 5), 8, "cpu")
    # 3 x 3 -> 5 x 5
    tower = open_clip.create_model(name, pretrained=file, force_image_size=70).visual.eval()
    images = textured(2, 40, 40)
    enlarged = to_teacher(images, (70, 70), tower.image_mean, tower.image_std)
    torch.testing.assert_close(teacher(images), clip_patches(tower, enlarged), atol=1e-5, rtol=1e-5)


def test_the_larger_clip_that_the_help_names_exists_and_has_the_activation_of_its_weights():
    open_clip = pytest.importorskip("open_clip")
    with pytest.raises(UserError, match="open_clip:ViT-L-14-quickgelu@openai"):
        build_teacher("larger", (6, 6), 8, "cpu")
    assert "open_clip:ViT-L-14-quickgelu@openai" in teachers.__doc__
    assert open_clip.get_model_config("ViT-L-14-quickgelu")["quick_gelu"]
    assert open_clip.get_pretrained_cfg("ViT-L-14-quickgelu", "openai")["quick_gelu"]


def test_the_teachers_patches_are_the_students_patches(tiny_clip):
    """Without blocks in between, a patch's feature depends on that patch of the student."""
    name, file, _ = tiny_clip
    # 16 x 24 pixels to 32 x 48
    teacher = build_teacher(f"open_clip:{name}@{file}", (4, 6), 4, "cpu")
    teacher.tower.transformer = nn.Identity()
    images = torch.full((1, 3, 16, 24), 0.5)
    changed = images.clone()
    changed[..., 5:7, 13:15] = 1.0  # inside row 1, column 3
    moved = (teacher(changed) - teacher(images)).abs().sum(-1)[0]
    assert moved.argmax() == 1 * 6 + 3 and moved[[0, 5, 18, 23]].max() < 1e-4


def test_openai_weights_without_quickgelu_are_refused(tiny_clip, tmp_path, capsys):
    name, file, model = tiny_clip
    with pytest.raises(UserError, match="QuickGELU.*ViT-B-16-quickgelu@openai"):
        # before anything is downloaded
        build_teacher("open_clip:ViT-B-16@openai", (14, 14), 16, "cpu")
    with pytest.raises(UserError, match="QuickGELU.*-quickgelu@"):
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
    """make(name, classes) -> (file, the model without its head).

    The file has a head, as published ones do.
    """
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
        # final norm inside, [CLS] dropped
        expected = model.forward_features((images - 0.5) / 0.5)[:, 1:]
    assert teacher.dim == 64 and torch.equal(teacher(images), expected)


def test_timm_positions_are_interpolated_to_the_students_grid(tiny_vit):
    timm = pytest.importorskip("timm")
    file, _ = tiny_vit()
    teacher = build_teacher(f"timm:test_vit@{file}", (3, 5), 8, "cpu")  # student: 24 x 40 pixels
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
    ("vit_base_patch14_reg4_dinov2", 1, 14),     # four registers, positions on patches only
    ("vit_wee_patch16_reg1_gap_256", 0, 16),     # one register, no class token, norm behind pooling
    ("vit_large_patch16_siglip_256", 0, 16),     # patches only, and attention pooling after them
    ("vit_large_patch14_clip_224", 1, 14)])      # ViT-L of timm: pre-norm, patch 14
def test_registers_and_a_missing_class_token_do_not_shift_the_patches(
        name, class_token, patch, tmp_path, monkeypatch):
    """Published architectures, made narrow and shallow; native grid 4 x 4, student's grid 3 x 5."""
    timm = pytest.importorskip("timm")
    create = functools.partial(timm.create_model, embed_dim=32, depth=2, num_heads=2,
                               img_size=4 * patch)
    model = fill(create(name, num_classes=0))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    monkeypatch.setattr(timm, "create_model", create)
    registers = model.num_prefix_tokens - class_token
    assert registers == sum(int(n[3:]) for n in name.split("_") if n.startswith("reg"))

    native = build_teacher(f"timm:{name}@{tmp_path}/weights.pt", (4, 4), 8, "cpu")
    images = textured(2, 4 * patch, 4 * patch)
    with torch.no_grad():
        x = to_teacher(images, images.shape[-2:], native.mean, native.std)
        tokens = model.forward_features(x)
        expected = model.fc_norm(tokens)[:, -16:]   # whatever comes first, the patches come last
    assert torch.equal(native(images), expected)

    # Elsewhere: timm's own resizing while loading. Without blocks, pixels of one patch move the
    # feature of that patch.
    teacher = build_teacher(f"timm:{name}@{tmp_path}/weights.pt", (3, 5), 8, "cpu")
    own = create(name, num_classes=0).eval()
    own.set_input_size((3 * patch, 5 * patch))
    rename = timm.models.vision_transformer.checkpoint_filter_fn
    own.load_state_dict(rename(torch.load(tmp_path / "weights.pt"), own))
    images = textured(2, 24, 40)
    enlarged = to_teacher(images, (3 * patch, 5 * patch), teacher.mean, teacher.std)
    with torch.no_grad():
        expected = own.fc_norm(own.forward_features(enlarged))[:, -15:]
    torch.testing.assert_close(teacher(images), expected, atol=1e-5, rtol=1e-5)
    teacher.model.blocks = nn.Identity()
    changed = images.clone()
    changed[0, :, 9:15, 25:31] = 1 - changed[0, :, 9:15, 25:31]     # inside row 1, column 3
    assert (teacher(changed) - teacher(images)).abs().sum(-1)[0].argmax() == 1 * 5 + 3


# --- several teachers -----------------------------------------------------------------------------
def test_several_teachers_stand_side_by_side_whatever_their_widths_and_patch_sizes(
        square_clip, tiny_vit):
    clip, clip_file = square_clip   # patch 14; a file name with + in it
    vit = f"timm:test_vit@{tiny_vit()[0]}"                          # patch 16
    name = f"open_clip:{clip}@{clip_file}+{vit}+hog+pixel"
    teacher = build_teacher(name, (4, 6), 8, "cpu")
    assert teacher.name == name and teacher.names == ("tiny-test-14", "test_vit", "hog", "pixel")
    assert teacher.dims == (20, 64, 144, 192) and teacher.dim == 420
    images = textured(2, 32, 48)
    t = teacher(images)
    assert t.shape == (2, 24, 420) and t.dtype == torch.float32
    specs = f"open_clip:{clip}@{clip_file}", vit, "hog", "pixel"
    for part, spec in zip(t.split(teacher.dims, dim=-1), specs, strict=True):
        alone = build_teacher(spec, (4, 6), 8, "cpu")
        assert torch.equal(part, alone(images))
        assert alone.dims == (alone.dim,) and len(alone.names) == 1
    # Whatever a teacher's patch size: row 1, column 3 of the student moves row 1, column 3 most.
    teacher.teachers[0].tower.transformer = teacher.teachers[1].model.blocks = nn.Identity()
    changed = images.clone()
    changed[..., 9:15, 25:31] = 1 - changed[..., 9:15, 25:31]
    for part in (teacher(changed) - teacher(images))[0].split(teacher.dims, dim=-1):
        assert part.abs().sum(-1).argmax() == 1 * 6 + 3


@pytest.mark.parametrize("name, parts", [
    ("clip+dino", ["clip", "dino"]), ("hog+pixel", ["hog", "pixel"]), ("clip", ["clip"]),
    ("open_clip:A@a+b/c+d.pt+timm:B@+clip.pt+dino",
     ["open_clip:A@a+b/c+d.pt", "timm:B@+clip.pt", "dino"]),
    ("timm:B@dino+hogs/x+timm:C@y", ["timm:B@dino+hogs/x", "timm:C@y"])])
def test_only_a_plus_before_a_teachers_name_splits(name, parts):
    assert teachers.split_names(name) == parts


def test_labels_of_teachers_differ_and_no_teacher_comes_twice(tiny_clip):
    name, file, _ = tiny_clip
    copy = shutil.copy(file, f"{file}.copy")
    two = build_teacher(f"open_clip:{name}@{file}+open_clip:{name}@{copy}", (2, 3), 8, "cpu")
    assert two.names == (f"{name}_1", f"{name}_2")
    for same in ("hog+pixel+hog", "clip+open_clip:ViT-B-16-quickgelu@openai",
                 "timm:vit_base_patch16_224.dino+dino"):
        with pytest.raises(UserError, match="twice"):
            build_teacher(same, (2, 3), 8, "cpu")
    with pytest.raises(UserError, match="sift is not known"):
        build_teacher("hog+sift", (2, 3), 8, "cpu")


def test_nothing_of_a_teacher_can_be_trained_or_saved(tiny_clip, tiny_vit):
    name, file, _ = tiny_clip
    for spec in ("hog", "pixel", f"open_clip:{name}@{file}", f"timm:test_vit@{tiny_vit()[0]}"):
        teacher = build_teacher(spec, (2, 3), 8, "cpu")
        # as an attribute of a module it registers nothing
        assert not isinstance(teacher, nn.Module)
        holder = nn.Module()
        holder.teacher = teacher
        assert not list(holder.parameters()) and not holder.state_dict()
        networks = [v for v in vars(teacher).values() if isinstance(v, nn.Module)]
        assert not any(p.requires_grad for m in networks for p in m.parameters())
        assert not any(m.training for network in networks for m in network.modules())
        names = [n for m in networks for n, _ in m.named_parameters()]
        assert not any("text" in n or "token_embedding" in n for n in names)
        images = textured(1, 16, 24).requires_grad_()
        t = teacher(images)
        assert not t.requires_grad and t.dtype == torch.float32
        # serves in a loss all the same
        (t * torch.ones(teacher.dim, requires_grad=True)).sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            low = teacher(images)
        assert low.dtype == torch.float32 and F.cosine_similarity(low, t, dim=-1).mean() > 0.99


# --- errors ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, says", [
    ("sift", "clip, dino, open_clip:NAME@TAG_OR_FILE, timm:NAME@FILE, hog, pixel"),
    ("open_clip:ViT-B-16", "not known"),
    ("open_clip:ViT-Z-99@openai", "no model ViT-Z-99"),
    ("open_clip:ViT-B-16@nowhere.pt", "nowhere.pt is no file and none of the tags .*openai"),
    ("timm:vit_unheard_of@x.pt", "no model vit_unheard_of"),
    ("timm:test_vit@nowhere.pt", "no file nowhere.pt"),
])
def test_a_wrong_name_is_one_helpful_sentence(name, says):
    with pytest.raises(UserError, match=says) as error:
        build_teacher(name, (6, 6), 8, "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, own_file", [("clip", r"open_clip:ViT-B-16-quickgelu@FILE"),
                                            ("dino", r"timm:vit_base_patch16_224.dino@FILE")])
def test_weights_that_cannot_be_downloaded_name_the_alternatives(
        name, own_file, tmp_path, monkeypatch, capsys):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as error:
        build_teacher(name, (6, 6), 8, "cpu")
    sentence = str(error.value)
    assert own_file in sentence and "\n" not in sentence
    others = "hog", "pixel", "open_clip:NAME@TAG_OR_FILE", "timm:NAME@FILE"
    assert all(other in sentence for other in others)
    assert "downloaded the first time" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_files_that_do_not_fit_are_refused(tiny_clip, tiny_vit, tmp_path):
    name, file, _ = tiny_clip
    vit, model = tiny_vit()
    part = model.state_dict()
    del part["blocks.0.attn.qkv.weight"]
    torch.save(part, tmp_path / "part.pt")
    (tmp_path / "text.pt").write_text("no weights")
    torch.save(dict(model=UserError("code")), tmp_path / "hostile.pt")
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "traced.pt")
    for wrong, says in ((f"timm:test_vit@{tmp_path}/part.pt", "missing .*qkv"),
                        (f"timm:test_vit@{file}", "could not"),
                        (f"timm:test_vit@{tmp_path}/text.pt", "could not be loaded"),
                        (f"timm:test_vit@{tmp_path}/hostile.pt", "could not be loaded"),
                        (f"open_clip:{name}@{vit}", "could not be loaded"),
                        (f"open_clip:{name}@{tmp_path}/traced.pt", "TorchScript archive")):
        with pytest.raises(UserError, match=says) as error:
            build_teacher(wrong, (2, 3), 8, "cpu")
        assert "\n" not in str(error.value)


def test_networks_without_patch_tokens_are_refused(tiny_vit):
    file, _ = tiny_vit("test_resnet")
    with pytest.raises(UserError, match="no plain ViT"):
        build_teacher(f"timm:test_resnet@{file}", (6, 6), 8, "cpu")
