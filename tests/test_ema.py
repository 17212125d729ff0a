"""How the codes move: k-means start, moving average, use."""
import math

import pytest
import torch
import torch.nn.functional as F

import vqkd
from support import data, transforms
from support.codebook import codebook_usage
from support.process import Process
from vqkd import Codebook, code_sums, ema_update, kmeans, l2, nearest_code


def test_code_sums_equal_the_one_hot_product():
    h, z = torch.randn(3, 7, 8), torch.randint(0, 10, (3, 7))
    sums, counts = code_sums(h, z, 10)
    one_hot = F.one_hot(z.flatten(), 10).float()
    torch.testing.assert_close(sums, one_hot.T @ h.flatten(0, 1))
    assert torch.equal(counts, one_hot.sum(0))


def test_unused_codes_stay_and_all_codes_stay_unit_vectors():
    book = l2(torch.randn(10, 8))
    z = torch.tensor([0, 0, 3])
    moved = ema_update(book, *code_sums(l2(torch.randn(3, 8)), z, 10), decay=0.9)
    unused = [i for i in range(10) if i not in (0, 3)]
    assert torch.equal(moved[unused], book[unused]) and not torch.equal(moved[0], book[0])
    torch.testing.assert_close(moved.norm(dim=-1), torch.ones(10))


def test_how_often_a_code_was_chosen_plays_no_part():
    book, h = l2(torch.randn(4, 8)), l2(torch.randn(1, 8))
    once = ema_update(book, *code_sums(h, torch.tensor([2]), 4), 0.99)
    often = ema_update(book, *code_sums(h.expand(50, 8), torch.full((50,), 2), 4), 0.99)
    torch.testing.assert_close(once, often)


def test_decay_0_jumps_to_the_mean_direction_and_decay_1_stands_still():
    book, h = l2(torch.randn(4, 8)), l2(torch.randn(6, 8))
    sums, counts = code_sums(h, torch.ones(6, dtype=torch.long), 4)
    torch.testing.assert_close(ema_update(book, sums, counts, 0.0)[1], l2(h.mean(0)))
    torch.testing.assert_close(ema_update(book, sums, counts, 1.0), book)


def test_ema_points_where_the_codebook_term_points():
    # The term of Eq. (2) that is not trained: || sg[l2(h)] - l2(v) ||^2.
    book = l2(torch.randn(6, 8)).requires_grad_()
    h = l2(torch.randn(200, 8))
    z = nearest_code(h, book.detach())
    F.mse_loss(l2(book)[z], h).backward()
    moved = ema_update(book.detach(), *code_sums(h, z, 6), decay=0.999) - book.detach()
    used = torch.bincount(z, minlength=6) > 0
    assert (F.cosine_similarity(moved, -book.grad, dim=-1)[used] > 0.999).all()


def test_the_moving_average_is_applied_to_sums_over_all_micro_batches():
    book, h = l2(torch.randn(10, 8)), l2(torch.randn(40, 8))
    z = nearest_code(h, book)
    whole = code_sums(h, z, 10)
    parts = [code_sums(a, b, 10) for a, b in zip(h.split(13), z.split(13), strict=True)]
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
    assert torch.equal(sum(p[1] for p in parts), whole[1])


def test_kmeans_finds_well_separated_clusters():
    centres = torch.eye(5)
    x = l2(centres.repeat_interleave(30, 0) + 0.05 * torch.randn(150, 5))
    found, counts = kmeans(x, l2(centres + 0.3 * torch.randn(5, 5)))
    assert (found @ centres.T).diagonal().min() > 0.99 and (counts == 30).all()


def test_an_empty_kmeans_cluster_keeps_its_centre():
    start = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    means, counts = kmeans(l2(torch.tensor([[1.0, 0.1], [1.0, -0.1]])), start)
    assert torch.equal(means[1], start[1]) and counts.tolist() == [2, 0]


def test_kmeans_is_ten_rounds_of_the_nearest_centre_and_the_normalised_mean():
    # These vectors form no clusters, so every round moves the centres.
    x, centres = l2(torch.randn(300, 3)), l2(torch.randn(8, 3))
    by_hand = centres.clone()
    for _ in range(10):
        z = torch.tensor([max(range(8), key=lambda k: float(v @ by_hand[k])) for v in x])
        for k in range(8):
            if (z == k).any():
                mean = x[z == k].mean(0)
                by_hand[k] = mean / mean.norm()
    found, counts = kmeans(x, centres)
    torch.testing.assert_close(found, by_hand)
    assert counts.sum() == 300


def test_the_first_codes_are_drawn_once_each_from_unit_vectors_of_different_images(monkeypatch):
    args, seen = vqkd.parse_args(["--codes", "100", "--encoder-depth", "1", "--amp", "no"]), []

    def watched(x, start):
        seen.append((x, start))
        return kmeans(x, start)

    monkeypatch.setattr(vqkd, "kmeans", watched)
    model = vqkd.build(args, (144,))
    images = data.open_data("shapes", "train", transforms.EvalTransform(48), limit=5)
    vqkd.kmeans_start(model, images, args, Process())
    (x, start), = seen
    assert x.shape == (5 * 36, 16) and len(x.unique(dim=0)) == 180       # every image, none twice
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(180))
    assert len(start.unique(dim=0)) == 100 and (start[:, None] == x).all(-1).any(1).all()
    assert torch.equal(model.quantize.embedding.weight, kmeans(x, start)[0])
    assert torch.equal(model.quantize.cluster_size, torch.ones(100))     # none is dead at first


def test_more_codes_than_vectors_start_as_random_unit_vectors_with_a_warning(capsys):
    args = vqkd.parse_args(["--codes", "100", "--encoder-depth", "1", "--amp", "no"])
    model = vqkd.build(args, (144,))
    images = data.open_data("shapes", "train", transforms.EvalTransform(48), limit=1)
    vqkd.kmeans_start(model, images, args, Process())
    codes = model.quantize.embedding.weight
    assert "only 36 vectors for 100 codes" in capsys.readouterr().err
    assert len(codes.unique(dim=0)) == 100
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(100))


@pytest.mark.parametrize("counts, used, perplexity", [
    ([5, 5, 5, 5], 4, 4.0), ([9, 0, 0, 0], 1, 1.0), ([3, 3, 0, 0], 2, 2.0)])
def test_perplexity_is_the_number_of_equally_used_codes(counts, used, perplexity):
    usage = codebook_usage(torch.tensor(counts))
    assert usage["codes_used"] == used and usage["dead_codes"] == 4 - used
    assert usage["perplexity"] == pytest.approx(perplexity)
    assert usage["entropy"] == pytest.approx(math.log(perplexity))


def test_the_codebook_is_no_parameter_of_the_optimiser():
    assert [p for p in Codebook(10, 4).parameters() if p.requires_grad] == []


def test_the_count_of_use_is_a_moving_average_of_the_counts():
    book, h = Codebook(3, 4), l2(torch.randn(6, 4))
    book.cluster_size.fill_(1.0)
    book.update(*code_sums(h, torch.tensor([0, 0, 0, 0, 2, 2]), 3), decay=0.9)
    torch.testing.assert_close(book.cluster_size, torch.tensor([0.9 + 0.4, 0.9, 0.9 + 0.2]))
