"""The ablations: what a row exchanges, what the verdict says, what the table holds."""
import json
import math
import re

import pytest
import torch

import pretrain
import vqkd
from conftest import stage
from results import ablate
from support import teachers
from support.shapes import Shapes


# --- the rows -------------------------------------------------------------------------------------
def test_an_exchange_ends_with_its_block_even_after_an_error():
    before = vqkd.l2, pretrain.sample_block_mask
    with pytest.raises(KeyError):
        with ablate.exchanged(ablate.without_l2() | ablate.single_patches()):
            assert (vqkd.l2, pretrain.sample_block_mask) != before
            raise KeyError
    assert (vqkd.l2, pretrain.sample_block_mask) == before


def test_without_l2_the_nearest_code_is_the_nearest_by_distance_and_not_by_angle():
    codes = torch.tensor([[10.0, 0.0], [0.6, 0.8]])
    h = torch.tensor([[1.0, 0.1]])           # by angle nearer to the first, else to the second
    assert vqkd.nearest_code(h, codes).item() == 0
    with ablate.exchanged(ablate.without_l2()):
        assert vqkd.nearest_code(h, codes).item() == 1
        sums, counts = torch.tensor([[0.0, 0.0], [4.0, 8.0]]), torch.tensor([0.0, 2.0])
        moved = vqkd.ema_update(codes, sums, counts, 0.75)
        # The first code has no vector. The second becomes 0.75 v + 0.25 (2, 4).
        torch.testing.assert_close(moved, torch.tensor([[10.0, 0.0], [0.95, 1.6]]))
        x = torch.tensor([[0.0, 1.0], [0.0, 3.0], [9.0, 9.0]])
        centres, counts = vqkd.kmeans(x, torch.tensor([[0.0, 2.5], [8.0, 8.0]]))
        torch.testing.assert_close(centres, torch.tensor([[0.0, 2.0], [9.0, 9.0]]))
        assert counts.tolist() == [2, 1]


def test_single_patches_hide_the_same_number_without_blocks():
    mask = ablate.single_patches()["pretrain.sample_block_mask"]
    drawn = torch.stack([mask(6, 6, 13, 2) for _ in range(200)])
    assert drawn.shape == (200, 6, 6) and (drawn.sum((1, 2)) == 13).all()
    share = drawn.float().mean(0)
    assert (share - 13 / 36).abs().max() < 0.15              # every cell alike

    def neighbours(m):
        return (m[:, :, 1:] & m[:, :, :-1]).float().mean()

    blocks = torch.stack([pretrain.sample_block_mask(6, 6, 13, 2) for _ in range(200)])
    assert neighbours(drawn) < 0.6 * neighbours(blocks)


def test_regression_asks_for_features_of_mean_square_one(tmp_path):
    args = vqkd.parse_args(["--encoder-depth", "1"])
    tokenizer = vqkd.build(args, (144,))
    torch.save(dict(model=tokenizer.state_dict(), arch=dict(heads=4)), tmp_path / "vqkd.pt")
    change = ablate.regress("pixel")
    target = change["pretrain.load_tokenizer"](tmp_path / "vqkd.pt")
    images = torch.rand(2, 3, 48, 48)
    z = target.encode(images)
    assert z.shape == (2, 36) and len(target.quantize.cluster_size) == 192
    hidden = z[:, 5:12].flatten()                            # (M,), as the loop chooses them
    t = teachers.build_teacher("pixel", (6, 6), 8, "cpu")(images)[:, 5:12].flatten(0, 1)
    t = t * t.square().mean(-1, keepdim=True).rsqrt()        # mean square 1
    loss, (loss_mim, loss_cls) = change["pretrain.mim_loss"](torch.zeros_like(t), t, hidden)
    # The first head guesses 0 and pays 1. The second is right and pays nothing.
    assert loss.item() == pytest.approx(1) and loss_mim.item() == pytest.approx(1)
    assert loss_cls.item() == pytest.approx(0, abs=1e-10)


def test_rows_that_change_only_stage_2_share_the_base_tokenizer():
    rows = {row.name: ablate.tokenizer_of(row) for row in ablate.ROWS}
    assert rows["no aggregation"] == rows["l = 2"] == rows["regress pixels"] == "base"
    assert rows["BEiT-like: teacher pixel, no aggregation"] == "teacher pixel"
    for name in ("without l2", "without k-means start"):
        assert rows[name] == name
    folders = {str(ablate.folder(name, 0)) for name in rows}
    assert len(folders) == len(ablate.ROWS)                  # no two share a folder


def test_every_claim_names_a_row_and_a_column():
    names = {row.name for row in ablate.ROWS}
    for row in ablate.ROWS:
        for key, sign, other in row.claims:
            assert key in ablate.COLUMNS and sign in "+-" and other in names


# --- the verdict ----------------------------------------------------------------------------------
def test_the_verdict_is_about_the_difference_seed_by_seed():
    # The seeds differ widely, the difference of the rows hardly: t = 7.
    own, other = {0: 50.0, 1: 70.0, 2: 90.0}, {0: 51.0, 1: 71.5, 2: 91.0}
    word, mean, error = ablate.verdict(own, other, "-")
    assert word == "same" and mean == pytest.approx(-3.5 / 3) and error == pytest.approx(0.5 / 3)
    assert ablate.verdict(own, other, "+")[0] == "opposite"
    nothing = {0: 0.0, 1: 0.0, 2: 0.0}
    assert ablate.verdict({0: 1.0, 1: -1.0, 2: 0.5}, nothing, "+")[0] == "within noise"
    assert ablate.verdict({0: 1.0}, {0: 0.0, 1: 0.0}, "+")[0] == "too few seeds"


def test_chance_gives_a_verdict_in_five_percent_of_comparisons():
    draws = torch.randn(4000, 3)
    nothing = dict.fromkeys(range(3), 0.0)
    words = [ablate.verdict(dict(enumerate(d)), nothing, "+")[0] for d in draws.tolist()]
    assert 0.035 < 1 - words.count("within noise") / len(words) < 0.065


def test_the_table_holds_the_mean_of_what_the_logs_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "RUNS", tmp_path)
    for seed, shift in ((0, 0.0), (1, 2.0)):
        for name, probe in (("base", 60.0), ("no aggregation", 50.0)):
            home = ablate.folder(name, seed)
            home.mkdir()
            logs = dict(vqkd=dict(cosine=0.5, codes_used=64, perplexity=50.0 + shift, time=30.0),
                        pretrain=dict(mask_acc=20.0, time=60.0),
                        linprobe=dict(source="pretrain", top1=probe + shift, paper_top1=40.0,
                                      knn=30.0, time=9.0))
            for stage_name, summary in logs.items():
                first = dict(commit="c", machine="m", threads=1, torch="2", cpu="a CPU", cores=2,
                             args=dict(amp="no"), time=0.01)
                lines = [first, dict(summary=1, **summary)]
                if stage_name == "vqkd":     # stopped at 12 s and resumed: 12 + 18 = 30 s in all
                    lines[1:1] = [dict(step=5, time=12.0), dict(step=6, time=1.0)]
                    lines[-1]["time"] = 18.0
                text = "".join(json.dumps(x) + "\n" for x in lines)
                (home / f"{stage_name}.jsonl").write_text(text)
    rows = [row for row in ablate.ROWS if row.name in ("base", "no aggregation")]
    text = ablate.page([ablate.read_row(row, seed) for row in rows for seed in (0, 1)])
    assert "| base | 2 | 50.0 ± 0.0 | 64.0 ± 0.0 | 51.0 ± 1.0 | 20.0 ± 0.0 | 61.0 ± 1.0 |" in text
    assert "| 90 ± 0 |" in text
    assert "| no aggregation below base (paper) | probe, chosen | -10.0 ± 0.0 | same |" in text
    assert "Of 2 expectations 1 hold beyond noise, 0 are opposite" in text
    assert ablate.read_row(rows[0], seed=2) is None


# --- the command ----------------------------------------------------------------------------------
@pytest.mark.slow
def test_rows_run_share_their_tokenizer_and_are_not_run_twice(tmp_path, monkeypatch):
    flags = ["--rows", "base", "no aggregation", "regress pixels", "--seeds", 0, "--no-page",
             "--steps", 104, "--limit", 64, "--batch-size", 2]
    first = stage("results.ablate", *flags, cwd=tmp_path)
    assert len(re.findall("^vqkd: .* parameters", first.stdout, re.M)) == 1
    assert len(re.findall("^pretrain: .* parameters", first.stdout, re.M)) == 3
    again = stage("results.ablate", *flags, cwd=tmp_path)
    assert not re.search("^(vqkd|pretrain): .* parameters", again.stdout, re.M)
    assert "already done" in again.stdout
    monkeypatch.chdir(tmp_path)              # runs/ablations lies below it
    rows = {row.name: ablate.read_row(row, 0) for row in ablate.ROWS}
    assert rows["base"]["perplexity"] == rows["no aggregation"]["perplexity"] > 1
    assert "perplexity" not in rows["regress pixels"]
    assert 0 <= rows["regress pixels"]["top1"] <= 100
    assert math.isfinite(rows["base"]["mask_acc"])


def test_an_unknown_row_is_named(tmp_path):
    done = stage("results.ablate", "--rows", "deeper", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "deeper" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert "no aggregation" in stage("results.ablate", "--list", cwd=tmp_path).stdout


def test_shapes_are_drawn_once_for_all_rows():
    ablate.DrawnOnce.kept.clear()
    a, b = (ablate.DrawnOnce("val", limit=20) for _ in range(2))
    assert a.arrays is b.arrays and torch.equal(a.images, Shapes("val", limit=20).images)
    assert ablate.DrawnOnce("train", limit=20).arrays is not a.arrays
