"""Curves from logs."""
import json

import pytest

import visualize
from engine import UserError


def write(path, *lines):
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return path


def test_curves_become_a_png_with_a_panel_per_quantity(tmp_path):
    a = write(tmp_path / "a.jsonl", dict(args={}, chance=4.16), dict(step=0, loss_mim=4.2, mask_acc=1.0),
              dict(step=1, loss_mim=4.0, mask_acc=2.0), dict(step=1, split="val", loss_mim=4.1), dict(summary=1, step=1))
    b = write(tmp_path / "b.jsonl", dict(args={}), dict(step=0, cosine=0.1, perplexity=3.0))
    visualize.main([str(a), str(b), "--out", str(tmp_path / "c.png")])
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_training_and_held_out_lines_are_kept_apart(tmp_path):
    path = write(tmp_path / "a.jsonl", dict(args={}), dict(step=0, loss_mim=4.2), dict(step=0, split="val", loss_mim=4.1),
                 dict(summary=1, step=0))
    _, train, val = visualize.read_log(path)
    assert [x["loss_mim"] for x in train] == [4.2] and [x["loss_mim"] for x in val] == [4.1]


def test_what_is_no_log_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a JSON log"):
        visualize.read_log(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="curve"):
        visualize.draw_curves([write(tmp_path / "a.jsonl", dict(args={}))], tmp_path / "c.png")
