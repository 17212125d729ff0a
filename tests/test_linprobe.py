"""linprobe.py: a probe measures the features and nothing else."""
import math
import re

import pytest
import torch
from torch import nn

import linprobe
from conftest import ROOT, log_lines, stage
from linprobe import (
    READOUTS, Probe, accuracy, columns, hold_out, knn, mean_and_variance, readout, ridge,
    score_heads, summarise, train_heads)
from model import ViT, imagenet_normalize
from support import data, probe
from support.files import UserError, read_file, write_file
from support.labels import choose_labels
from support.optim import cosine_schedule
from support.probe import Source, draw_labels, load_source, load_sources, mean_and_error
from support.process import launch
from support.teachers import HogTeacher

SHORT = ("--source random --limit 200 --steps 20 --batch-size 64 --workers 0 --device cpu "
         "--amp no").split()
SETTINGS = [(1e-2, 0.0), (5e-2, 1e-4)]


def clusters(n=400, layers=2, width=6, classes=5, seed=0):
    """Features (n, layers, 2 * width) around one centre per class, far apart; labels (n,)."""
    g = torch.Generator().manual_seed(seed)
    everywhere = torch.Generator().manual_seed(99)           # the same centres for every seed
    centres = 4 * torch.randn(classes, layers, 2 * width, generator=everywhere)
    labels = torch.randint(classes, (n,), generator=g)
    return centres[labels] + 0.3 * torch.randn(n, layers, 2 * width, generator=g), labels


def all_of(features):
    return torch.arange(len(features))


def new_probe(features, classes, readouts=READOUTS, settings=SETTINGS):
    mean, variance = mean_and_variance(features, all_of(features))
    return Probe(mean, variance, readouts, settings, classes)


def trained(features, labels, classes, steps, batch_size, seed=0, **options):
    probe = new_probe(features, classes, **options)
    train_heads(probe, features, labels, all_of(features), steps, batch_size, seed)
    return probe


def logits_of(probe, features):
    """-> (B, L, S, H, C)"""
    with torch.no_grad():
        return torch.stack([x.permute(3, 0, 1, 2) for x in probe(features)], dim=-2)


def tiny_vit(**options):
    torch.manual_seed(0)
    return ViT(16, 8, 32, 3, 2, positions="shared", pool=None, **options).eval()


# --- read-outs ------------------------------------------------------------------------------------
def test_readouts_take_the_tokens_they_name():
    tokens = torch.randn(2, 5, 3)
    mean = (tokens[:, 1] + tokens[:, 2] + tokens[:, 3] + tokens[:, 4]) / 4
    torch.testing.assert_close(readout(tokens, "cls"), tokens[:, 0])
    torch.testing.assert_close(readout(tokens, "mean"), mean)
    both = readout(tokens, "both")
    torch.testing.assert_close(both, torch.cat([tokens[:, 0], mean], 1))
    for kind in READOUTS:                                    # a head finds them again in "both"
        torch.testing.assert_close(both[:, columns(kind, 6)], readout(tokens, kind))


def test_summary_holds_every_raw_block_and_last_the_final_norm():
    model, x = tiny_vit(), torch.randn(2, 3, 16, 16)
    model.norm.weight.data.fill_(2.0)                        # so that the norm shows
    features = summarise(model, x)
    assert features.shape == (2, 3 + 1, 2 * 32)
    for layer, tokens in enumerate(model.features(x)):
        torch.testing.assert_close(features[:, layer], readout(tokens, "both"))
    torch.testing.assert_close(features[:, 3], readout(model(x), "both"))
    torch.testing.assert_close(summarise(model, x, blocks=1), features[:, 2:])


def test_each_head_sees_its_read_out_and_no_other_channel():
    features, labels = clusters()
    probe = trained(features, labels, 5, steps=5, batch_size=64)
    plain = logits_of(probe, features)
    moved = {"cls": features.clone(), "mean": features.clone()}
    moved["cls"][..., :6] += 1
    moved["mean"][..., 6:] += 1
    sees = {half: (logits_of(probe, x) - plain).abs().amin(dim=(0, 1, 2)).amax(-1)   # per head
            for half, x in moved.items()}
    assert sees["cls"][:2].min() > 0 and sees["mean"][:2].max() == 0     # 0, 1: [CLS], two norms
    assert sees["cls"][2:4].max() == 0 and sees["mean"][2:4].min() > 0   # 2, 3: patch mean
    assert sees["cls"][4:].min() > 0 and sees["mean"][4:].min() > 0      # 4, 5: both
    for head, width in enumerate((6, 6, 6, 6, 12, 12)):
        weights = torch.stack(list(probe.groups[head].weight))
        assert weights.shape == (2, 2, 5, width)                         # (S, L, C, F')
        assert weights.abs().amax(dim=(0, 1, 2)).min() > 0               # every channel is used


def test_probing_leaves_the_network_as_it_was():
    args = linprobe.parse_args(["--source", "random"])
    source = load_source("random", args, torch.device("cpu"))
    before = {k: v.clone() for k, v in source.model.state_dict().items()}
    features = linprobe.encode(source, torch.rand(12, 3, 48, 48))
    assert not features.requires_grad and not source.model.training
    assert not any(p.requires_grad for p in source.model.parameters())
    trained(features, torch.arange(12) % 3, 3, steps=2, batch_size=12)
    assert all(torch.equal(before[k], v) for k, v in source.model.state_dict().items())
    assert all(p.grad is None for p in source.model.parameters())


def test_features_do_not_depend_on_the_batch_an_image_sits_in():
    model, x = tiny_vit(drop_path=0.5), torch.randn(6, 3, 16, 16)
    alone = summarise(model, x[4:5])
    torch.testing.assert_close(summarise(model, x)[4:5], alone, rtol=1e-4, atol=1e-6)


def test_backbone_and_tokenizer_get_the_pixels_they_were_trained_on(tmp_path):
    args = linprobe.parse_args(["--source", "random", "--out", str(tmp_path)])
    images = torch.rand(2, 3, 48, 48)
    random = load_source("random", args, torch.device("cpu"))
    expected = summarise(random.model, imagenet_normalize(images))
    torch.testing.assert_close(linprobe.encode(random, images), expected)
    arch = dict(image_size=48, patch_size=8, width=32, depth=2, heads=2, positions="absolute",
                layer_scale=0, pool="mean")
    encoder = ViT(**arch)
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    state["quantize.embedding.weight"] = torch.zeros(4, 2)
    write_file(tmp_path / "vqkd.pt", dict(kind="vqkd", arch=arch, model=state))
    tokenizer = load_source("tokenizer", args, torch.device("cpu"))
    expected = summarise(encoder.eval(), images * 2 - 1)
    torch.testing.assert_close(linprobe.encode(tokenizer, images), expected)
    assert tokenizer.paper == "mean" and random.paper == "cls"


def test_a_checkpoint_is_probed_at_its_own_image_size_unless_another_is_asked_for(tmp_path):
    arch = dict(image_size=32, patch_size=4, width=32, depth=1, heads=2, positions="shared",
                layer_scale=0.1)
    state = {**ViT(**arch, pool=None).state_dict(), "mask_token": torch.zeros(1, 1, 32)}
    write_file(tmp_path / "pretrain.pt", dict(kind="pretrain", arch=arch, model=state))
    # 36 is no multiple of tiny's patch size, but one of this file's.
    for flags, size in (([], 32), (["--image-size", "36"], 36)):
        args = linprobe.parse_args(["--out", str(tmp_path), *flags])
        source = load_source("pretrain", args, torch.device("cpu"))
        assert source.image_size == size and source.layers == ["1", "norm"]
        assert linprobe.encode(source, torch.rand(1, 3, size, size)).shape == (1, 2, 64)


# --- heads ----------------------------------------------------------------------------------------
def test_separable_classes_are_told_apart_by_every_head():
    features, labels = clusters()
    probe = trained(features, labels, 5, steps=300, batch_size=128)
    others = clusters(seed=1)
    top1, top5 = score_heads(probe, *others, all_of(others[0]))
    assert top1.shape == (2, len(SETTINGS), 6) and top1.min() > 99.99 and top5.min() > 99.99


def test_labels_that_have_nothing_to_do_with_the_images_give_chance():
    features, _ = clusters(2000)
    labels = torch.randint(5, (2000,), generator=torch.Generator().manual_seed(3))
    probe = trained(features[:1000], labels[:1000], 5, steps=50, batch_size=250)
    top1, _ = score_heads(probe, features, labels, torch.arange(1000, 2000))
    assert (top1 - 20).abs().max() < 6               # 4 to 5 standard errors of 1000 guesses


def test_heads_trained_together_equal_a_head_trained_alone():
    features, labels = clusters(classes=3)
    together = trained(features, labels, 3, steps=20, batch_size=100, seed=5)
    ours = logits_of(together, features)
    for layer, s, h in ((0, 0, 1), (1, 1, 4)):
        alone = trained(features[:, layer:layer + 1], labels, 3, steps=20, batch_size=100, seed=5,
                        readouts=[READOUTS[h // 2]], settings=SETTINGS[s:s + 1])
        weight, bias = alone.groups[h % 2].head(0, 0, alone.mean)
        expected, expected_bias = together.groups[h].head(layer, s, together.mean)
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bias, expected_bias, rtol=1e-4, atol=1e-5)
        theirs = logits_of(alone, features[:, layer:layer + 1])[:, 0, 0, h % 2]
        torch.testing.assert_close(theirs, ours[:, layer, s, h], rtol=1e-4, atol=1e-4)


def test_a_head_equals_a_torch_linear_layer_behind_batch_norm_without_affine():
    features, labels = clusters(64, layers=1, classes=3)
    probe = trained(features, labels, 3, steps=7, batch_size=64, readouts=["both"],
                    settings=[(1e-2, 1e-2)])
    norm = nn.BatchNorm1d(12, eps=1e-12, affine=False)
    linear = nn.Linear(12, 3)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.AdamW([dict(params=[linear.weight], weight_decay=1e-2),
                                   dict(params=[linear.bias], weight_decay=0.0)], lr=1e-2)
    for step in range(7):                                    # the whole data set is one batch
        for group in optimizer.param_groups:
            group["lr"] = cosine_schedule(step, 1e-2, 0.0, 7)
        nn.functional.cross_entropy(linear(norm(features[:, 0])), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    ours = logits_of(probe, features)[:, 0, 0, 1]
    torch.testing.assert_close(ours, linear(norm(features[:, 0])), rtol=1e-3, atol=1e-4)


def test_a_single_head_takes_raw_features_and_gives_the_logits_of_the_grid():
    features, labels = clusters()
    probe = trained(features + 3, labels, 5, steps=5, batch_size=64)
    grid = logits_of(probe, features)
    for layer, s, h in ((0, 0, 0), (1, 1, 3), (1, 0, 5)):
        weight, bias = probe.groups[h].head(layer, s, probe.mean)
        x = features[:, layer, columns(READOUTS[h // 2], 12)]
        torch.testing.assert_close(x @ weight.T + bias, grid[:, layer, s, h], rtol=1e-4, atol=1e-4)


def test_biases_are_not_decayed_and_weights_are():
    features, labels = clusters(64, layers=1, classes=3)
    probe = new_probe(features, 3, readouts=["both"], settings=[(1e-2, 0.0), (1e-2, 30.0)])
    constant = features * 0 + probe.mean + 1e-3              # weights matter little here
    train_heads(probe, constant, labels * 0, all_of(features), steps=20, batch_size=64)
    for group in probe.groups:
        torch.testing.assert_close(group.bias[0], group.bias[1], rtol=1e-2, atol=0)
        assert group.weight[1].abs().amax() < 0.9 * group.weight[0].abs().amax()


def test_norm_statistics_come_from_the_images_given_and_scale_as_stated():
    features = clusters()[0] * torch.linspace(0.3, 10, 12) + 3
    rows = torch.randperm(400)[:300]
    mean, variance = mean_and_variance(features, rows, chunk=37)
    given = features[rows].double()
    torch.testing.assert_close(mean, given.mean(0))
    torch.testing.assert_close(variance, given.var(0, unbiased=False))

    probe = Probe(mean, variance, READOUTS, SETTINGS, 5)
    x = given - probe.mean
    none, batchnorm = x * probe.groups[4].scale[:, 0], x * probe.groups[5].scale[:, 0]
    torch.testing.assert_close(none.mean(0), torch.zeros(2, 12).double(), atol=1e-4, rtol=0)
    ones = torch.ones(2, 12).double()
    torch.testing.assert_close(batchnorm.var(0, unbiased=False), ones, rtol=1e-3, atol=0)
    assert len(probe.groups[4].scale[0].unique()) == 1       # none: one number for all channels
    cls = x[..., :6] * probe.groups[0].scale[:, 0]
    overall = cls.var(0, unbiased=False).mean(1)
    torch.testing.assert_close(overall, ones[:, 0], rtol=1e-3, atol=0)


def test_scores_do_not_depend_on_the_other_images():
    features, labels = clusters()
    probe = trained(features, labels, 5, steps=3, batch_size=100)
    some = logits_of(probe, features[:7])
    torch.testing.assert_close(logits_of(probe, features)[:7], some)
    scores = [score_heads(probe, features, labels, all_of(features), chunk) for chunk in (33, 512)]
    torch.testing.assert_close(*scores)


def test_accuracy_counts_in_percent_and_more_guesses_never_hurt():
    logits = torch.tensor([[3.0, 2, 1, 0], [3, 2, 1, 0], [0, 1, 2, 3], [0, 1, 2, 3]])
    labels = torch.tensor([0, 1, 3, 0])
    found = [accuracy(logits, labels, k).item() for k in (1, 2, 3, 4, 5)]
    assert found == [50, 75, 75, 100, 100]
    many = torch.randn(50, 2, 3, 20)
    top1, top5 = (accuracy(many, torch.arange(50) % 20, k) for k in (1, 5))
    assert top1.shape == (2, 3) and (top5 >= top1).all()


def test_accuracy_of_a_grid_of_heads_is_that_of_each_head():
    logits, labels = torch.randn(30, 2, 3, 7), torch.randint(0, 7, (30,))
    for k in (1, 2):
        grid = accuracy(logits, labels, k)
        assert grid.shape == (2, 3)
        for i in range(2):
            for j in range(3):
                assert grid[i, j] == accuracy(logits[:, i, j], labels, k)


def test_held_out_images_are_a_tenth_and_take_no_part_in_fitting():
    fit, held = hold_out(105, seed=1)
    assert len(held) == 10 and sorted(torch.cat([fit, held]).tolist()) == list(range(105))
    assert torch.equal(held, hold_out(105, seed=1)[1])
    assert not torch.equal(held, hold_out(105, seed=2)[1])


def test_heads_learn_from_the_given_rows_alone():
    features, labels = clusters()
    rows = torch.randperm(400)[:300]
    changed = features.clone()
    left_out = torch.ones(400, dtype=torch.bool)
    left_out[rows] = False
    changed[left_out] = 100.0
    heads = []
    for x in (features, changed):
        probe = Probe(*mean_and_variance(x, rows), READOUTS, SETTINGS, 5)
        train_heads(probe, x, labels, rows, steps=12, batch_size=100)
        heads.append(logits_of(probe, features[:9]))
    assert torch.equal(*heads)


def test_each_head_gets_the_setting_that_is_best_on_held_out_images():
    settings = [(0.1, 0), (0.2, 1), (0.3, 2)]
    source = Source("x", None, 48, ["1", "norm"])
    probe = new_probe(clusters()[0], 5, settings=settings)
    held_out = torch.rand(2, 3, 6)                           # (L, S, H)
    table = linprobe.choose(held_out, probe, source)
    assert [row["held_out"] for row in table] == held_out.amax(dim=1).flatten().tolist()
    for row in table:
        layer, s, h = row["at"]
        assert held_out[layer, s, h] == row["held_out"]
        assert (row["rate"], row["weight_decay"]) == settings[s]
    of_paper = [(row["block"], row["readout"]) for row in table if row["paper"]]
    assert of_paper == [("norm", "cls")] * 2


# --- k-NN -----------------------------------------------------------------------------------------
def test_knn_finds_the_nearest_by_angle():
    bank, labels = torch.eye(4), torch.tensor([2, 0, 3, 1])
    queries = 7 * torch.eye(4) + 0.5                         # longer: length plays no part
    assert torch.equal(knn(bank, labels, queries, k=1, classes=4).argmax(1), labels)


def test_knn_neighbours_vote_with_the_weight_of_their_cosine():
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    scores = knn(bank, torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.0]]), k=3, classes=2)
    expected = torch.tensor([[1 / 0.07, 0.6 / 0.07]]).exp() * torch.tensor([1.0, 2.0])
    torch.testing.assert_close(scores, expected)
    assert scores.argmax() == 0                              # one close one outweighs two distant


def test_knn_goes_by_the_angle_however_long_the_vectors_are():
    bank, labels = torch.randn(40, 6), torch.randint(0, 3, (40,))
    queries = torch.randn(9, 6)
    scores = knn(bank, labels, queries, k=5, classes=3)
    assert scores.shape == (9, 3)
    for a, b in ((bank * torch.linspace(0.1, 9, 40)[:, None], queries), (bank, 7 * queries)):
        torch.testing.assert_close(knn(a, labels, b, k=5, classes=3), scores, rtol=1e-4, atol=0.1)


def test_knn_with_more_neighbours_than_images_lets_all_of_them_vote_at_any_temperature():
    bank, labels = torch.randn(6, 4), torch.tensor([0, 1, 1, 2, 2, 2])
    queries = torch.randn(3, 4)
    cosine = nn.functional.cosine_similarity(queries[:, None], bank, dim=-1)
    votes = [[sum(math.exp(cosine[i, j] / 0.5) for j in range(6) if labels[j] == c)
              for c in range(3)] for i in range(3)]
    scores = knn(bank, labels, queries, k=20, classes=3, temperature=0.5)
    torch.testing.assert_close(scores, torch.tensor(votes))


def test_knn_that_is_blind_to_the_sign_finds_a_picture_in_its_negative():
    bank = torch.eye(3)
    queries = torch.tensor([[-0.9, 0.1, 0.2], [0.1, -0.2, 0.15]])        # the negatives of 0 and 1
    labels = torch.tensor([0, 1, 2])
    assert knn(bank, labels, queries, k=1, classes=3).argmax(1).tolist() == [2, 2]
    blind = knn(bank, labels, queries, k=1, classes=3, sign_blind=True)
    assert blind.argmax(1).tolist() == [0, 1]


# --- pixels and few labels ------------------------------------------------------------------------
PIXELS = Source("pixels", None, 48, ["pixels"], paper="pixels")


def test_a_picture_its_negative_and_a_paler_one_are_one_picture_but_for_sign_and_length():
    picture = torch.rand(4, 3, 48, 48)
    x, negative, paler = (linprobe.encode(PIXELS, y)[:, 0] for y in (
        picture, 1 - picture, 0.3 * picture + 0.5))
    assert x.shape == (4, 24 * 24 * 3) and x.mean(dim=1).abs().max() < 1e-6
    torch.testing.assert_close(negative, -x, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(paler, 0.3 * x, rtol=1e-4, atol=1e-6)
    for size in ((96, 48), (224, 224), (16, 16)):
        assert linprobe.encode(PIXELS, torch.rand(1, 3, *size)).shape == (1, 1, 1728)


@pytest.mark.parametrize("m, width", [(30, 8), (8, 30), (12, 12)])
def test_ridge_solves_the_equations_of_least_squares_with_decay(m, width):
    x, y = torch.randn(m, width).double(), torch.randn(m, 3).double()
    weight = ridge(x, y)
    decay = x.square().sum(dim=1).mean() / 10
    residual = x.T @ (x @ weight - y) + decay * weight       # half the gradient at the minimum
    torch.testing.assert_close(residual, torch.zeros(width, 3).double(), rtol=0, atol=1e-9)


def few_args(*flags):
    return linprobe.parse_args(["--source", "random", *flags])


def test_every_draw_shows_as_many_images_of_each_class_and_other_seeds_make_other_draws():
    labels = torch.arange(400) % 7
    draws = draw_labels(few_args("--labels-per-class", "5"), labels, 20)
    assert [labels[rows].bincount().tolist() for rows in draws] == [[5] * 7] * 20
    again = draw_labels(few_args("--labels-per-class", "5"), labels, 20)
    assert torch.equal(torch.stack(draws), torch.stack(again))
    other = draw_labels(few_args("--labels-per-class", "5", "--seed", "1"), labels, 20)
    assert len({tuple(rows.tolist()) for rows in draws + other}) == 40


def test_without_enough_images_there_is_no_draw_unless_one_was_asked_for():
    labels = torch.arange(40) % 5
    assert draw_labels(few_args(), labels, 20) == []         # 10 of 8 by default
    assert draw_labels(few_args("--labels-per-class", "0"), labels, 20) == []
    with pytest.raises(UserError, match="--labels-per-class 9: class number 0 has only 8"):
        draw_labels(few_args("--labels-per-class", "9"), labels, 20)


def test_the_error_of_a_mean_is_the_deviation_of_the_draws_by_the_root_of_their_number():
    assert mean_and_error([1, 2, 3, 4]) == (2.5, pytest.approx(math.sqrt(5 / 3) / 2))
    assert mean_and_error([7.0] * 20) == (7, 0)


def test_few_labels_are_those_of_training_images_in_the_layer_and_read_out_of_the_row():
    train, val = clusters(), clusters(seed=1)
    train[0][:, 0, :6] = torch.randn(400, 6)                 # [CLS] of layer 0 knows nothing
    probe = new_probe(train[0], 5)
    draws = [choose_labels(train[1], 4, seed) for seed in range(3)]
    other = val[0], (val[1] + 1) % 5                         # no training image says this

    def scores(layer, h, val):
        row = dict(at=(layer, 0, h))
        source = Source("x", None, 48, ["1", "norm"])
        return linprobe.score_reading(row, source, probe, train, all_of(train[0]), val, draws)
    for name, found in scores(1, 2, val).items():
        assert torch.tensor(found).min() > 99, name
    assert scores(1, 2, other) == dict(
        knn1=0, knn10=0, knn20=0, few_top1=[0] * 3, few_knn1=[0] * 3)
    assert max(scores(0, 0, val)["few_top1"]) < 40


def test_neighbours_in_pixels_are_blind_to_the_sign_and_those_of_networks_are_not():
    features = torch.eye(5)[:, None]                         # (n, L, F): one picture a class
    train = features, torch.arange(5)
    negatives = -features + 0.01, torch.arange(5)
    probe = Probe(torch.zeros(1, 5), torch.ones(1, 5), ["pixels"], [(1e-3, 1.0)], 5)
    network = Source("random", None, 48, ["1"])
    found = {source.name: linprobe.score_reading(
        dict(at=(0, 0, 0)), source, probe, train, torch.arange(5), negatives, [torch.arange(5)])
        for source in (PIXELS, network)}
    assert found["pixels"]["knn1"] == 100 and found["pixels"]["few_knn1"] == [100]
    assert found["random"]["knn1"] == 0 and found["random"]["few_knn1"] == [0]


def test_few_labels_are_read_with_the_norm_that_the_row_has_in_its_own_layer():
    classes = torch.arange(400) % 4
    class_part = nn.functional.one_hot(classes, 4) + 0.6 * torch.randn(400, 4)
    noise = torch.randn(400, 4)
    features = torch.stack([torch.cat([class_part, size * noise], dim=1)         # (n, L, F)
                            for size in (1000.0, 1.0)], dim=1)
    mean, variance = mean_and_variance(features, torch.arange(400))
    probe = Probe(mean, variance, ["pixels"], [(1e-3, 1.0)], 4)
    draws = [choose_labels(classes, 10, seed) for seed in range(5)]

    def scores(layer, h):
        found = linprobe.score_reading(
            dict(at=(layer, 0, h)), Source("random", None, 48, ["1", "2"]), probe,
            (features, classes), torch.arange(400), (features, classes), draws)
        return sum(found["few_top1"]) / 5
    none, batchnorm = range(2)
    assert scores(0, none) < 40                              # the noise drowns the class
    assert scores(0, batchnorm) == pytest.approx(scores(1, batchnorm), abs=1)
    assert 45 < scores(0, batchnorm) < 75                    # not saturated


def test_a_class_without_images_is_never_guessed_from_few_labels():
    def of(*values):                                         # features (n, 1, 2)
        return torch.tensor(values)[:, None, None].expand(-1, 1, 2).contiguous()
    features, labels = of(1.0, 2.0, -3.0), torch.tensor([0, 1, 0])
    probe = new_probe(features, 9)                           # seven names more than classes
    found = linprobe.score_reading(
        dict(at=(0, 0, 0)), PIXELS, probe, (features, labels), all_of(features),
        (of(-1.0, 2.0), torch.tensor([0, 1])), [torch.tensor([0, 1])])
    assert found["few_top1"] == [100]


def test_a_tokenizer_behind_checkpoint_is_called_a_tokenizer(tmp_path):
    arch = dict(image_size=48, patch_size=8, width=32, depth=1, heads=2, positions="absolute",
                layer_scale=0, pool="mean")
    state = {f"encoder.{k}": v for k, v in ViT(**arch).state_dict().items()}
    state["quantize.embedding.weight"] = torch.zeros(4, 2)
    write_file(tmp_path / "x.pt", dict(kind="vqkd", arch=arch, model=state))
    args = linprobe.parse_args(["--checkpoint", str(tmp_path / "x.pt")])
    sources = load_sources(["pretrain"], args, torch.device("cpu"))
    assert [source.name for source in sources] == ["tokenizer", "pixels"]


def test_all_sources_of_tiny_end_with_hand_made_features_as_a_ceiling(monkeypatch):
    monkeypatch.setattr(probe, "load_source", lambda name, *_: Source(name, ViT, 48, ["norm"]))
    for model, last in (("tiny", ["pixels", "hog"]), ("base", ["pixels"])):
        args = linprobe.parse_args(["--source", "all", "--model", model])
        sources = load_sources(["random"], args, torch.device("cpu"))
        assert [source.name for source in sources] == ["random", *last]
    images = torch.rand(2, 3, 48, 48)
    hog = Source("hog", None, 48, ["hog"], paper="hog")
    teacher = HogTeacher(8)(images)                          # (B, 36, 144)
    torch.testing.assert_close(linprobe.encode(hog, images)[:, 0], teacher.flatten(1))


# --- whole probes ---------------------------------------------------------------------------------
@pytest.fixture
def shapes(monkeypatch):
    """The real data set with a dial: permuting the labels of the validation images."""
    real, dial = data.open_data, dict(permute=False)

    def open_data(name, split, *args, **kwargs):
        dataset = real(name, split, *args, **kwargs)
        if split == "val" and dial["permute"]:
            dataset.labels = dataset.labels.flip(0)
        return dataset
    monkeypatch.setattr(data, "open_data", open_data)
    return dial


def test_nothing_is_chosen_by_the_validation_labels(shapes, tmp_path, capsys):
    a = linprobe.main([*SHORT, "--out", str(tmp_path / "a")])
    shapes["permute"] = True
    b = linprobe.main([*SHORT, "--out", str(tmp_path / "b")])
    for key in ("block", "readout", "norm", "rate", "held_out", "paper_reading"):
        assert a[key] == b[key], key
    heads = [read_file(tmp_path / x / "linprobe_random.pt")["model"]["weight"] for x in "ab"]
    assert torch.equal(*heads)
    tables = []
    for x in "ab":
        lines = log_lines(tmp_path / x / "linprobe_random.jsonl")
        tables.append([line for line in lines if "held_out" in line])
    assert [r["rate"] for r in tables[0]] == [r["rate"] for r in tables[1]]
    # Only what is measured has changed.
    assert [r["top1"] for r in tables[0]] != [r["top1"] for r in tables[1]]


def test_the_handed_over_head_gives_the_reported_accuracy(tmp_path, capsys):
    summary = linprobe.main([*SHORT, "--out", str(tmp_path)])
    file = read_file(tmp_path / "linprobe_random.pt")
    args = linprobe.parse_args(["--source", "random"])
    source = load_source("random", args, torch.device("cpu"))
    val = data.open_data("shapes", "val", limit=200)
    features = linprobe.encode(source, data.to_float(val.images, "cpu"))
    x = features[:, source.layers.index(file["block"]), columns(file["readout"], 256)]
    logits = x @ file["model"]["weight"].T + file["model"]["bias"]
    top1 = accuracy(logits, val.labels).item()
    assert abs(top1 - summary["top1"]) < 1.01                # an image or two may round otherwise
    assert summary["top5"] >= summary["top1"] and summary["paper_top5"] >= summary["paper_top1"]
    assert not file["model"]["weight"].requires_grad


def test_the_features_go_with_the_probe_unless_they_are_to_be_kept(tmp_path, monkeypatch, capsys):
    first = linprobe.main([*SHORT, "--out", str(tmp_path / "a")])
    assert "computing features once: 200 x 7 x 256 numbers" in capsys.readouterr().out
    assert not list((tmp_path / "a").glob("**/*.npy"))
    again = ["--cache", str(tmp_path / "cache"), "--out"]
    linprobe.main([*SHORT, *again, str(tmp_path / "b")])
    assert len(list((tmp_path / "cache").glob("random-shapes-*.npy"))) == 2      # train and val
    images = []
    encode = linprobe.encode
    monkeypatch.setattr(linprobe, "encode", lambda source, x: (
        images.append(len(x)), encode(source, x))[1])
    last = linprobe.main([*SHORT, *again, str(tmp_path / "c")])
    assert images == [1, 1, 1, 1]            # train and val of two sources: still the same?
    different = [k for k in first if first[k] != last[k] and k != "seconds"]
    assert not different


def test_a_probe_of_an_earlier_network_is_refused_or_set_aside_and_further_views_are_features_too(
        tmp_path, capsys):
    out, results = tmp_path / "run", {}
    flags = "--limit 50 --steps 2 --workers 0 --device cpu --augment 2 --rates 0.1".split()
    flags += ["--out", str(out)]
    for seed in (1, 2):
        torch.manual_seed(seed)
        arch = dict(image_size=48, patch_size=8, width=32, depth=2, heads=2, positions="shared",
                    layer_scale=0.1)
        state = {**ViT(**arch, pool=None).state_dict(), "mask_token": torch.zeros(1, 1, 32)}
        write_file(out / "pretrain.pt", dict(kind="pretrain", arch=arch, model=state))
        if seed == 2:
            with pytest.raises(UserError, match="made from other inputs .the pretrain file was"):
                linprobe.main(flags)
            flags.append("--fresh")
        results[seed] = linprobe.main(flags)
    assert (tmp_path / "run.1" / "linprobe.pt").exists() and (out / "linprobe.pt").exists()
    assert results[1]["paper_reading"] == "norm mean"        # no blocks of patch aggregation
    assert "150 x 3 x 64 numbers" in capsys.readouterr().out


def test_the_script_probes_logs_and_says_when_it_is_done(tmp_path):
    flags = ["--source", "random", "--limit", 80, "--steps", 3, "--workers", 0, "--device", "cpu",
             "--labels-per-class", 4, "--out", tmp_path]
    said = stage("linprobe.py", *flags).stdout
    lines = log_lines(tmp_path / "linprobe_random.jsonl")
    summaries = [line for line in lines if "summary" in line]
    assert "args" in lines[0] and lines[-2:] == summaries
    assert [line["source"] for line in summaries] == ["random", "pixels"]
    keys = set("top1 top5 knn block readout norm rate paper_top1".split())
    few = {"top1_4", "paper_top1_4", "knn1_4", "top1_4_se", "paper_top1_4_se", "knn1_4_se"}
    assert all(keys | few <= line.keys() and line["draws"] == 20 for line in summaries)
    for words in ("random ", "pixels "):                     # a line of the table each
        assert re.search(rf"^{words}( +\d+\.\d\d){{4}}( +\d+\.\d \+- \d+\.\d){{3}} ", said, re.M)
    rows = [r for r in lines if "held_out" in r and r["source"] == "random" and "summary" not in r]
    assert len(rows) == 7 * 3 * 2                            # 6 blocks, norm; 3 read-outs; 2 norms
    of_paper = [(r["block"], r["readout"]) for r in rows if r["paper"]]
    assert of_paper == [("norm", "cls")] * 2
    assert "already done" in stage("linprobe.py", *flags).stdout
    assert len(log_lines(tmp_path / "linprobe_random.jsonl")) == len(lines)


STORE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import linprobe
from support import data, probe, process, transforms
flags = "--source random --workers 0 --micro-batch 8 --amp no --out".split()
args = linprobe.parse_args([*flags, sys.argv[2] + ".features"])
here = process.join_processes("cpu")
source = probe.load_source("random", args, here.device)
shapes = data.open_data("shapes", "train", transforms.EvalTransform(48), limit=29)
features, labels = probe.store_split(                                # shares of different sizes
    source, linprobe.encode, shapes, 0, args, here)
if here.is_main:
    torch.save((features[:], labels), sys.argv[2])
flags = "--source random --limit 40 --steps 2 --workers 0 --device cpu --out".split()
process.launch(lambda: linprobe.main([*flags, sys.argv[2] + ".run"]))
"""


@pytest.mark.slow
def test_two_processes_store_what_one_computes_in_the_same_order(tmp_path):
    script = tmp_path / "store.py"
    script.write_text(STORE)
    for n in (1, 2):
        stage(script, ROOT, tmp_path / f"{n}.pt", processes=n)
    (one, labels), (two, labels_two) = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    assert one.shape == (29, 7, 256) and torch.equal(labels, labels_two)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    a, b = (log_lines(tmp_path / f"{n}.pt.run" / "linprobe_random.jsonl") for n in (1, 2))
    assert len(a) == len(b) and a[-1].keys() == b[-1].keys()         # rank 0 alone trained


# --- arguments ------------------------------------------------------------------------------------
def test_a_dry_run_tells_the_size_of_the_probe_without_data_or_checkpoint(tmp_path, capsys):
    assert linprobe.main(["--model", "base", "--dry-run", "--out", str(tmp_path)]) is None
    said = capsys.readouterr().out
    assert "234 heads of 1000 classes" in said               # 13 layers x 3 x 2 x 3 rates
    assert "19968 features per image, for ImageNet 51 GB" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, words", [
    (["--source", "pretrain"], "python pretrain.py"),
    (["--source", "all"], "python pretrain.py"),
    (["--source", "tokenizer"], "python vqkd.py"),
    (["--source", "random", "--limit", "5"], "--limit"),
    (["--source", "random", "--rates", "-1"], "--rates"),
    (["--source", "random", "--model", "huge"], "huge"),
    (["--source", "random", "--data", "no/such/folder"], "no/such/folder"),
    (["--source", "random", "--compile"], "--compile"),      # no flag without effect
    (["--source", "random", "--log-every", "5"], "--log-every"),
    (["--source", "random", "--save-every", "5"], "--save-every"),
])
def test_mistakes_are_one_sentence_with_a_remedy(flags, words, tmp_path, monkeypatch, capsys):
    flags = [*flags, "--device", "cpu", "--workers", "0", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as error:
        launch(lambda: linprobe.main(flags))
    message = capsys.readouterr().err.strip()
    assert error.value.code == 2 and words in message and message.count("\n") == 0
    assert not list(tmp_path.glob("*.pt"))
