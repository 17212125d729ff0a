"""Fine-tuning against numbers of the authors' code: finetune_load.pt and schedules.pt.

The environment variable BEIT2_GOLDEN names the folder that holds these files.
"""
import os
from pathlib import Path

import pytest
import torch

import finetune
from model import ViT
from support import weights
from support.optim import param_groups

GOLDEN = os.environ.get("BEIT2_GOLDEN")
pytestmark = pytest.mark.skipif(not GOLDEN, reason="BEIT2_GOLDEN names no folder")


def golden(name):
    return torch.load(Path(GOLDEN) / name, weights_only=True)


def close(a, b, rel=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= rel * b.abs().max()


CASES = golden("finetune_load.pt")["cases"] if GOLDEN else {}


@pytest.mark.parametrize("tag", CASES)
def test_every_loading_case_gives_the_authors_values_and_names(tag):
    file = golden("finetune_load.pt")
    config, case = file["config"], file["cases"][tag]
    source = (case["src_window"],) * 2
    model = ViT(case["dst_window"] * config["patch"], config["patch"], config["dim"],
                config["depth"], config["heads"], num_classes=case["num_classes"],
                positions="absolute" if case["use_abs_pos_emb"] else "per_block")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = file["inputs"][case["input"]]
    # 3 heads of 4: absolute positions do not tell, and the released models have 64 numbers a head.
    checkpoint = weights.read(dict(model=state, arch=dict(heads=config["heads"])))
    report = weights.load_state(model, checkpoint, source)
    after = model.state_dict()
    assert set(report.loaded) == set(case["loaded"])
    assert set(report.missing) == set(case["not_loaded_keys"])
    assert set(report.unexpected) == set(case["dropped_keys"])
    same = case["src_window"] == case["dst_window"]
    for name, value in case["loaded"].items():
        if same or not name.endswith(("relative_position_bias_table", "pos_embed")):
            assert torch.equal(after[name], value), name
        else:
            close(after[name], value)
    for name in case["not_loaded_keys"]:
        assert torch.equal(after[name], before[name]), name


@pytest.mark.parametrize("tag", [t for t, c in CASES.items() if c["use_rel_pos_bias"]])
def test_load_backbone_finds_the_architecture_by_itself(tag):
    file = golden("finetune_load.pt")
    case, size = file["cases"][tag], file["cases"][tag]["dst_window"] * file["config"]["patch"]
    model, _, report = weights.load_backbone({"model": file["inputs"][case["input"]]},
                                             num_classes=case["num_classes"], image_size=size)
    assert set(report.loaded) == set(case["loaded"]) and model.heads == file["config"]["heads"]
    for name, value in case["loaded"].items():
        close(model.state_dict()[name], value)


def test_tables_of_other_sizes_are_the_authors():
    for case in golden("finetune_load.pt")["tables"]:
        source, target = (case["src_window"],) * 2, (case["dst_window"],) * 2
        close(weights.resize_relative_table(case["table"], source, target), case["resized"])


@pytest.mark.parametrize(
    "tag", ["finetune", "finetune_abs_pos", "finetune_no_wd_on_rel_pos", "finetune_no_layer_decay"])
def test_every_parameter_has_the_authors_rate_and_decay(tag):
    case = golden("schedules.pt")["param_groups"][tag]
    named = [(name, torch.nn.Parameter(torch.zeros(shape)))
             for name, shape in case["shapes"].items()]
    skip = {name.rsplit(".", 1)[-1] for name in case["skip_list"]}   # ours go by the last part
    options = {}
    if "layer_scales" in case:
        options = dict(layer_id=lambda name: finetune.layer_of(name, case["depth"]),
                       layer_decay=case["layer_decay"], depth=case["depth"])
    groups = param_groups(named, case["weight_decay"], skip=skip, **options)
    ours = {name: (group["lr_scale"], group["weight_decay"])
            for group in groups for name in group["names"]}
    assert ours.keys() == case["per_param"].keys()
    for name, (scale, decay) in case["per_param"].items():
        assert ours[name] == pytest.approx((scale, decay), rel=1e-12), name
