"""What codes keep and ignore: the measures, on cases whose answer is known."""
import json

import numpy as np
import pytest
import torch

import vqkd
from results import factors, measures
from support.files import write_file
from support.run import contents
from support.shapes import draw_shapes


# --- measures -------------------------------------------------------------------------------------
def test_a_variable_tells_all_of_itself_and_chance_tells_nothing():
    rng = np.random.default_rng(0)
    f = rng.integers(0, 8, 3000)
    assert measures.adjusted_information(f[:, None], f) == pytest.approx(1)
    # The numbers of the codes do not matter.
    assert measures.adjusted_information(5 + 2 * f[:, None], f) == pytest.approx(1)
    z = rng.integers(0, 64, (3000, 4))
    # Counting finds some information where there is none: about 63 * 7 / 6000.
    assert measures.information(z[:, 0], f) > 0.05
    assert abs(measures.adjusted_information(z, f)) < 0.01


def test_a_code_that_tells_one_bit_of_three_tells_a_third():
    f = np.random.default_rng(0).integers(0, 8, 4000)
    assert measures.adjusted_information(f[:, None] // 4, f) == pytest.approx(1 / 3, abs=0.01)


def test_only_patches_that_are_seen_count():
    rng = np.random.default_rng(0)
    f, seen = rng.integers(0, 4, 2000), np.arange(2000) % 2 == 0
    z = np.where(seen, f, rng.integers(0, 4, 2000))[:, None]
    assert measures.adjusted_information(z, f, seen[:, None]) == pytest.approx(1)
    assert measures.adjusted_information(z, f) < 0.5


def test_quantile_bins_are_equally_full():
    bins = measures.quantile_bins(np.random.default_rng(0).normal(size=800))
    assert np.bincount(bins).tolist() == 8 * [100]


def test_effective_dimension_of_a_round_cloud_and_of_a_line():
    assert measures.effective_dimension(torch.randn(20000, 12)) == pytest.approx(12, rel=0.02)
    line = torch.randn(500, 1) * torch.randn(1, 12) + 3      # off the origin, which must not count
    assert measures.effective_dimension(line) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("features", [20, 400])      # fewer and more than the 250 images of the fit
def test_a_planted_factor_is_decoded_and_noise_is_not(features):
    x, rng = torch.randn(800, features), np.random.default_rng(0)
    planted, name = (x[:, 0] + 2).numpy()[:, None], (x[:, 1] > 0).long().numpy()
    noise = rng.normal(size=(800, 2))
    coin = np.eye(2)[rng.integers(0, 2, 800)]
    values = dict(planted=(planted, None), noise=(noise, None), name=(np.eye(2)[name], None),
                  coin=(coin, None))
    result = measures.decoded(x, values, 300)
    few = features == 20
    assert result["planted"] > (0.99 if few else 0.3)
    assert result["name"] > (0.85 if few else 0.65)
    assert abs(result["noise"]) < 0.1 and abs(result["coin"] - 0.5) < 0.07


def test_ridge_solves_the_same_problem_with_few_and_with_many_features():
    x, y, x_new = torch.randn(30, 40), torch.randn(30, 2), torch.randn(5, 40)
    centred = (x - x.mean(0)).double()
    strength = 0.1 * centred.square().sum() / 30             # in units of the mean eigenvalue
    w = torch.linalg.solve(centred.T @ centred + strength * torch.eye(40),
                           centred.T @ (y - y.mean(0)).double())
    expected = (x_new - x.mean(0)).double() @ w + y.double().mean(0)
    ridge = measures.ridge(x, y, x_new, [0.1])[0]
    torch.testing.assert_close(ridge, expected, rtol=1e-4, atol=1e-4)
    # With more images than features the unit is trace / F instead of trace / n.
    tall = measures.ridge(torch.cat([x, x]), torch.cat([y, y]), x_new, [0.1 * 40 / 30])[0]
    torch.testing.assert_close(tall, expected, rtol=1e-4, atol=1e-4)


def test_a_moved_code_is_kept_in_the_bag_and_not_at_its_place():
    z = torch.tensor([[0, 1, 2, 3]])
    assert measures.kept(z, z) == dict(place=1, bag=1)
    assert measures.kept(z, z.roll(1, 1)) == dict(place=0, bag=1)
    assert measures.kept(z, torch.tensor([[0, 0, 2, 7]])) == dict(place=0.5, bag=0.5)


def test_only_patches_that_are_seen_count_as_kept():
    z, changed = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 1, 5, 2]])
    seen = torch.tensor([[False, True, True, True]])
    shares = measures.kept(z, changed, seen)
    assert shares == dict(place=pytest.approx(1 / 3), bag=pytest.approx(2 / 3))


def test_a_t_test_with_two_degrees_of_freedom_decides():
    words = [factors.judge(difference, 1.0) for difference in (5.0, 4.0, -5.0)]
    assert words == ["holds", "within noise", "opposite"]
    assert factors.judge(3.0, float("nan")) == "one seed, no verdict"


# --- one factor at a time -------------------------------------------------------------------------
OWN = {  # what is drawn anew: which factors of draw_shapes may differ
    "class": set(),
    "colour": {"hue", "saturation", "background_hue"},
    "light": {"brightness", "background"},
    "polarity": {"brightness", "background"},
    "rotation": {"rotation"},
    "large rotation": {"rotation"},
    "scale": {"scale"},
    "position": {"x", "y"},
    "texture": {"texture"},
    "noise": set(),
}


@pytest.mark.parametrize("name", OWN)
def test_an_altered_image_differs_in_the_named_factor_only(name):
    images, masks, labels, f = factors.draw("val", 40)
    altered, altered_masks, altered_labels, g = factors.draw("val", 40, name)
    assert {k for k in f if (f[k] != g[k]).any()} == OWN[name]
    assert (labels != altered_labels).all() if name == "class" else (labels == altered_labels).all()
    # Not all of them: a disc does not show that it was turned.
    assert (images != altered).flatten(1).any(1).float().mean() > 0.75
    if name in ("colour", "light", "polarity", "texture", "noise"):
        assert (masks == altered_masks).all()
    else:
        assert (masks != altered_masks).any()
    if name in ("light", "polarity"):
        swapped = (f["brightness"] > f["background"]) != (g["brightness"] > g["background"])
        assert swapped.all() if name == "polarity" else not swapped.any()


@pytest.mark.parametrize("name", ["scale", "position"])
def test_an_altered_object_stays_inside_the_picture(name):
    g = factors.draw("val", 200, name)[3]
    room = 25.5 - 24 * g["scale"]
    assert 0.6 <= g["scale"].min() and g["scale"].max() <= 0.9501
    assert (np.abs(g["x"]) <= room + 1e-3).all() and (np.abs(g["y"]) <= room + 1e-3).all()


def test_no_change_draws_the_same_image_and_an_unknown_factor_is_refused():
    plain = draw_shapes(0, "val", np.arange(20))
    change = dict(plain[3], noise=np.arange(20)) | {"class": plain[2]}
    same = draw_shapes(0, "val", np.arange(20), change=change)
    assert all((a == b).all() for a, b in zip(plain[:3], same[:3], strict=True))
    with pytest.raises(ValueError, match="mood"):
        draw_shapes(0, "val", [0], change=dict(mood=[1]))


def test_codes_of_the_class_alone_keep_everything_but_the_class():
    def encode(altered=None):
        return torch.from_numpy(np.repeat(factors.draw("val", 60, altered)[2][:, None], 36, axis=1))
    for name in ("colour", "light", "rotation"):
        assert measures.kept(encode(), encode(name)) == dict(place=1, bag=1)
    assert measures.kept(encode(), encode("class")) == dict(place=0, bag=0)
    _, masks, labels, f = factors.draw("val", 500)
    codes = np.repeat(labels[:, None], 36, 1)
    result = measures.told(codes, measures.factor_values(labels, f), np.ones((500, 36)))
    assert result["class"] == pytest.approx(1) and abs(result["colour"]) < 0.05


# --- report ---------------------------------------------------------------------------------------
def test_an_untrained_run_is_measured_once_and_reported(tmp_path, monkeypatch):
    runs = []
    for teacher in ("hog", "pixel"):
        torch.manual_seed(0)
        args = vqkd.parse_args(["--teacher", teacher, "--encoder-depth", "1",
                                "--out", str(tmp_path / teacher)])
        model = vqkd.build(args, (144 if teacher == "hog" else 192,))
        model.quantize.embedding.weight.normal_()
        write_file(tmp_path / teacher / "vqkd.pt", contents("vqkd", model, args))
        runs.append(str(tmp_path / teacher))
    command = [*runs, "--out", str(tmp_path / "factors"), "--images", "120", "60", "40"]
    factors.main(command)
    monkeypatch.setattr(factors, "measure", None)    # the second time all is read from the log
    factors.main(command)
    records = [json.loads(line) for line in (tmp_path / "factors.jsonl").read_text().splitlines()]
    assert [r["teacher"] for r in records] == ["hog", "pixel"]
    assert (tmp_path / "factors.png").stat().st_size > 10000
    assert records[0]["kept/unrelated/above"] == 0
    page = (tmp_path / "factors.md").read_text()
    assert "| colour |" in page and page.count("no verdict") == 3 * len(measures.CLAIM) + 1
