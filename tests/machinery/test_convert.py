"""Checkpoints from one layout to another: ours, the released code's, timm's."""

import argparse
import importlib
import os

import pytest
import torch

import segment
import vqkd
from checkpoints import (
    ARGS,
    RELEASED,
    SIZES,
    finetuned,
    images,
    randomise,
    released_file,
    same_tensors,
)
from conftest import stage
from extras import convert as converter
from model import ViT, relative_position_index
from support import weights
from support.files import UserError, read_file
from support.process import Process
from support.run import find_resume_file
from support.weights import load_backbone


def convert(source, target, to, *flags):
    converter.main([str(source), str(target), "--to", to, *map(str, flags)])
    return read_file(target) if target.suffix != ".safetensors" else weights.open_file(target)


# --- file to file ---------------------------------------------------------------------------------
@pytest.mark.parametrize("name", RELEASED)
def test_a_released_file_goes_to_ours_and_back_bit_for_bit(tmp_path, name, capsys):
    source, tensors = released_file(name, tmp_path / "released.pth")
    ours = convert(source, tmp_path / "ours.pt", "ours")
    assert ours["kind"] == RELEASED[name][0] and ours["args"] == ARGS and "optimizer" not in ours
    back = convert(tmp_path / "ours.pt", tmp_path / "back.pth", "released")
    kept = {
        k: v for k, v in tensors.items() if not k.startswith(("teacher_model.", "scaling_layer."))
    }
    assert same_tensors(weights.unwrap(back), kept)
    assert vars(back["args"]) == ARGS and "kind" not in back
    assert ("state_dict" in back) == (ours["kind"] == "segment")
    assert back.get("meta") == (
        dict(CLASSES=("wall", "sky"), time="now") if name == "UPerNet" else None
    )
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
        (a, _, report), (b, _, _) = (
            load_backbone(f, pool=None, num_classes=classes) for f in (source, tmp_path / "ours.pt")
        )
        assert report.missing == (["norm.weight", "norm.bias"] if kind == "segment" else [])
    assert same_tensors(a.state_dict(), b.state_dict())


def test_our_own_files_come_back_with_all_they_say(tmp_path):
    # No shape tells that a tokenizer has 4 heads of 16, and no table that a grid has 4 x 6 patches.
    tok = vqkd.VQKD(32, 8, 64, 2, 4, 1, codes=16, code_dim=8, teacher_dims=(36,))
    vit = ViT(**(SIZES | dict(image_size=(32, 48))), num_classes=3)
    files = {
        "vqkd": dict(
            model=randomise(tok.state_dict()), args=dict(codes=16, out="runs/tiny"),
            arch=dict(image_size=32, patch_size=8, width=64, depth=2, heads=4,
                      positions="absolute", layer_scale=0),
            result=dict(cosine=0.5)),
        "finetune_21k": dict(
            model=randomise(vit.state_dict()), args={},
            arch=SIZES | dict(image_size=(32, 48)), classes=list("abc")),
    }
    for kind, ours in files.items():
        ours |= dict(kind=kind, commit="unknown")
        torch.save(ours, tmp_path / f"{kind}.pt")
        convert(tmp_path / f"{kind}.pt", tmp_path / f"{kind}.pth", "released")
        back = convert(tmp_path / f"{kind}.pth", tmp_path / f"{kind}2.pt", "ours")
        assert same_tensors(back.pop("model"), ours.pop("model"))
        assert back.pop("arch").items() >= ours.pop("arch").items()
        assert back.items() >= ours.items()
    assert vqkd.load_tokenizer(tmp_path / "vqkd2.pt").encoder.heads == 4


def test_a_converted_file_is_not_taken_for_a_finished_run(tmp_path):
    torch.save(
        dict(kind="finetune", model=finetuned(), arch=SIZES, args={}, source_hash={}),
        tmp_path / "made.pt",
    )
    convert(tmp_path / "made.pt", tmp_path / "finetune.pt", "ours")
    with pytest.raises(UserError, match="finetune.pt was made by another command"):
        find_resume_file("finetune", argparse.Namespace(out=tmp_path, fresh=False), Process())


def test_timms_own_training_checkpoints_state_their_arch_as_a_word(tmp_path):
    torch.save(
        dict(arch="beitv2_base_patch16_224", state_dict=finetuned(), epoch=3), tmp_path / "timm.pth"
    )
    model, *_ = load_backbone(tmp_path / "timm.pth", num_classes=None)
    ours = convert(tmp_path / "timm.pth", tmp_path / "ours.pt", "ours")
    assert ours["arch"]["depth"] == model.depth == 2 and same_tensors(
        ours["model"], model.state_dict()
    )


def test_the_released_code_gets_the_dead_entries_it_asks_for(tmp_path):
    tok = vqkd.VQKD(32, 8, 64, 2, 1, 1, codes=16, code_dim=8, teacher_dims=(36, 20))
    torch.save(dict(kind="vqkd", model=tok.state_dict(), arch=dict(heads=1)), tmp_path / "ours.pt")
    state = convert(tmp_path / "ours.pt", tmp_path / "new.pth", "released")["model"]
    assert state["quantize.embedding.initted"].item() == 1 and state[
        "quantize.embedding.cluster_size"
    ].shape == (16,)
    assert torch.equal(state["quantize.embedding.embed_avg"], tok.quantize.embedding.weight)
    assert not any(
        k.startswith("more_decode") for k in state
    )  # our second teacher has no place there


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["ft21k", "ft1k, [CLS]", "pt1k"])
def test_timm_loads_our_file_strictly_and_says_the_same_as_we_do(tmp_path, name, suffix):
    timm = pytest.importorskip("timm")
    source, _ = released_file(name, tmp_path / "released.pth")
    out = tmp_path / f"timm{suffix}"
    state = convert(source, out, "timm")
    theirs = timm.create_model(
        "beitv2_base_patch16_224", **converter.timm_arguments(converter.examine(source).arch)
    ).eval()
    theirs.load_state_dict(state, strict=True)
    ours, *_ = load_backbone(source, pool=None, num_classes=None if "ft" in name else 0)
    with torch.no_grad():
        expected = theirs(images()) if "ft" in name else theirs.forward_features(images())
        given = ours.eval()(images())
    assert (given - expected).abs().max() <= 2e-5 * expected.abs().max()

    back = convert(out, tmp_path / "back.pt", "ours")  # and the way back
    assert back["kind"] == ("finetune" if "ft" in name else "backbone")
    assert same_tensors(back["model"], state)
    again, _, report = load_backbone(
        tmp_path / "back.pt", pool=None, num_classes=None if "ft" in name else 0
    )
    assert report.missing == report.unexpected == [] and same_tensors(
        again.state_dict(), ours.state_dict()
    )


def test_timm_is_told_of_absolute_positions_no_layer_scale_and_other_sizes(tmp_path):
    timm = pytest.importorskip("timm")
    model = ViT(
        **SIZES, positions="absolute", layer_scale=0.0, mlp_ratio=2.0, in_channels=1, num_classes=5
    )
    torch.save(
        dict(kind="finetune", model=randomise(model.state_dict()), arch=SIZES), tmp_path / "ours.pt"
    )
    state = convert(tmp_path / "ours.pt", tmp_path / "timm.pth", "timm")
    options = converter.timm_arguments(converter.examine(tmp_path / "ours.pt").arch)
    timm.create_model("beitv2_base_patch16_224", **options).load_state_dict(state, strict=True)


def test_pretraining_goes_to_timm_with_its_table_in_every_block_and_without_its_heads(
    tmp_path, capsys
):
    source, tensors = released_file("pt1k", tmp_path / "released.pth")
    state = convert(source, tmp_path / "timm.pth", "timm")
    for i in range(2):
        assert torch.equal(
            state[f"blocks.{i}.attn.relative_position_bias_table"],
            tensors["rel_pos_bias.relative_position_bias_table"],
        )
    said = capsys.readouterr().out
    assert all(
        k in said for k in ("mask_token", "lm_head (2)", "cls_pt_layers", "global_pool='token'")
    )


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
    assert (
        convert(tmp_path / "half.pth", tmp_path / "ours.pt", "ours")["model"]["head.bias"].dtype
        == torch.half
    )


@pytest.mark.parametrize("name", RELEASED)
def test_check_says_what_a_file_is_and_which_commands_take_it(tmp_path, name, capsys):
    source, tensors = released_file(name, tmp_path / "released.pth")
    converter.main(["--check", str(source)])
    said = capsys.readouterr().out
    kind = RELEASED[name][0]
    command, size = dict(
        vqkd=("pretrain.py", "16 codes"),
        pretrain=("linprobe.py", "20 codes"),
        segment=("segment.py", "7 classes"),
        finetune=("--eval", f"{len(tensors.get('head.bias', []))} classes"),
    )[kind]
    assert f"({kind})" in said and command in said and size in said and "32x32, patch 8" in said
    assert str(source) in said.split("good for")[1] and "released" in said


@pytest.mark.parametrize("use", [use for _, *uses in converter.ABOUT.values() for use in uses])
def test_a_command_that_check_recommends_knows_its_flags(use, capsys):
    words = use.split()
    if words[0] == "-m":
        words = words[1:]
    stage_or_extra = importlib.import_module(words[0].removesuffix(".py"))
    with pytest.raises(SystemExit):
        stage_or_extra.parse_args(["--help"])
    known = capsys.readouterr().out
    assert all(word in known for word in words[1:] if word.startswith("--"))


# Names of every kind of file that are renamed, lost, doubled, misshapen or filled with NaN.
DAMAGE = [
    ("tokenizer, 1 layer, CLIP", "encoder.blocks.1.mlp.fc1.bias"),
    ("tokenizer, 3 layers, CLIP", "decoder.blocks.2.norm1.bias"),
    ("tokenizer, 3 layers, CLIP", "quantize.cluster_size"),
    ("tokenizer, 1 layer, DINO", "encode_task_layer.2.bias"),
    ("tokenizer, 1 layer, DINO", "decode_task_layer.0.weight"),
    ("pt1k", "cls_pt_layers.1.gamma_2"),
    ("pt1k", "mask_token"),
    ("pt1k, separate head", "cls_pt_norm.bias"),
    ("ft21k", "fc_norm.bias"),
    ("ft21k", "blocks.0.gamma_1"),
    ("ft1k, [CLS]", "norm.weight"),
    ("ft1k", "head.weight"),
    ("UPerNet", "decode_head.fpn_convs.2.bn.running_var"),
    ("UPerNet", "backbone.fpn1.3.bias"),
    ("UPerNet", "auxiliary_head.convs.0.conv.weight"),
    ("UPerNet", "backbone.blocks.1.attn.q_bias"),
]


@pytest.mark.parametrize("damage", ["renamed", "missing", "extra", "misshapen", "not finite"])
@pytest.mark.parametrize("name, key", DAMAGE)
def test_a_damaged_file_is_refused_by_the_name_that_is_wrong_and_nothing_is_written(
    tmp_path, name, key, damage
):
    source, _ = released_file(name, tmp_path / "released.pth")
    contents = read_file(source)
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
    contents = read_file(source)
    contents["model"]["rel_pos_bias.relative_position_index"] = relative_position_index(
        4, 4
    ).T.contiguous()
    torch.save(contents, source)
    with pytest.raises(
        UserError, match="offsets in another way in rel_pos_bias.relative_position_index"
    ):
        converter.main(["--check", str(source)])


def test_nothing_is_overwritten_and_the_command_line_is_checked(tmp_path):
    source, _ = released_file("ft1k", tmp_path / "released.pth")
    before = source.read_bytes()
    (tmp_path / "there.pt").write_text("precious")
    (tmp_path / "link.pt").symlink_to(source)
    for target, sentence in (
        ("there.pt", "there.pt exists"),
        ("released.pth", "is IN itself"),
        ("link.pt", "is IN itself"),
    ):
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
    assert {f.name for f in tmp_path.iterdir()} == {
        "released.pth",
        "there.pt",
        "link.pt",
        "text.safetensors",
    }


def test_from_the_shell_an_error_is_one_sentence_and_exit_code_2(tmp_path):
    source, _ = released_file("UPerNet", tmp_path / "released.pth")
    done = stage("extras.convert", source, tmp_path / "ours.pt", "--to", "ours")
    assert "segment" in done.stdout and (tmp_path / "ours.pt").is_file()
    done = stage("extras.convert", source, tmp_path / "ours.pt", "--to", "ours", check=False)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    )


def test_what_segment_py_writes_is_known_name_by_name(tmp_path):
    model = segment.UPerNet(ViT(**SIZES | dict(depth=12), pool=None), 7, 16)
    torch.save(
        dict(
            kind="segment",
            model=model.state_dict(),
            arch=SIZES | dict(depth=12),
            classes=list("abcdefg"),
        ),
        tmp_path / "segment.pt",
    )
    back = convert(tmp_path / "segment.pt", tmp_path / "released.pth", "released")
    state = back["state_dict"]
    assert back["meta"] == dict(CLASSES=tuple("abcdefg"))
    assert same_tensors(
        {k: v for k, v in state.items() if not k.endswith("_index")}, model.state_dict()
    )


@pytest.mark.parametrize(
    "file, wanted",
    [
        ("vqkd_encode_decode", "vqkd"),
        ("mim_forward", "pretrain"),
        ("mim_forward_separate_head", "pretrain"),
        ("encoder_forward", "finetune"),
        ("pretrain", "pretrain"),
        ("pretrain_abs", "pretrain"),
        ("finetuned", "finetune"),
    ],
)
def test_the_authors_own_names_go_to_ours_and_back_bit_for_bit(tmp_path, golden, file, wanted):
    inputs = golden("finetune_load")["inputs"]
    if file in inputs:
        state = inputs[file]
        heads = golden("finetune_load")["config"]["heads"]
    else:
        state = golden(file)["state_dict"]
        heads = golden(file)["config"]["num_heads"]
    # A tokenizer does not tell its heads, and these have not 64 numbers each.
    torch.save(dict(model=state, arch=dict(heads=heads)), tmp_path / "released.pth")
    ours = convert(tmp_path / "released.pth", tmp_path / "ours.pt", "ours")
    back = convert(tmp_path / "ours.pt", tmp_path / "back.pth", "released")
    # finetune_load.pt leaves the index buffers out of some files; released files have them.
    assert ours["kind"] == wanted and same_tensors(
        {k: v for k, v in back["model"].items() if k in state or not k.endswith("_index")}, state
    )


@pytest.mark.slow
def test_base_size_logits_equal_timms_in_both_directions_at_224_and_384(tmp_path):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("beitv2_base_patch16_224").eval()
    state = {
        k: (1.0 if "table" in k else 0.03) * v for k, v in randomise(theirs.state_dict()).items()
    }
    theirs.load_state_dict(state)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    convert(tmp_path / "timm.pth", tmp_path / "ours.pt", "ours")  # timm -> ours
    larger = convert(
        tmp_path / "ours.pt", tmp_path / "384.safetensors", "timm", "--image-size", 384
    )  # ours -> timm
    assert same_tensors(convert(tmp_path / "ours.pt", tmp_path / "back.pth", "timm"), state)
    theirs_384 = timm.create_model("beitv2_base_patch16_224", img_size=384).eval()
    theirs_384.load_state_dict(larger, strict=True)
    for size, network in ((224, theirs), (384, theirs_384)):
        ours, *_ = load_backbone(tmp_path / "ours.pt", num_classes=None, image_size=size)
        with torch.no_grad():
            expected, logits = network(images(size, size)), ours.eval()(images(size, size))
        assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()
