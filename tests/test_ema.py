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


def test_sums_and_counts_are_float32_and_keep_no_graph():
    h, z = torch.randn(4, 50, 8), torch.randint(0, 3, (4, 50))
    for vectors in (h.clone().requires_grad_(), h.bfloat16()):
        sums, counts = code_sums(vectors, z, 10)
        assert sums.dtype == counts.dtype == torch.float32
        assert not sums.requires_grad
        exact = F.one_hot(z.flatten(), 10).double().T @ vectors.detach().double().flatten(0, 1)
        torch.testing.assert_close(sums.double(), exact, atol=1e-4, rtol=1e-4)
        assert len(counts) == 10                             # codes that nobody chose have a 0


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


def test_the_average_is_of_two_directions_and_not_vqvaes_mean_weighted_by_counts():
    book = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    h = torch.tensor([[0.6, 0.8], [0.6, -0.8], [0.0, 1.0]])  # two that disagree: a short mean
    moved = ema_update(book.flip(0), *code_sums(h, torch.tensor([0, 0, 0]), 2), decay=0.5)
    # The mean of these three is (0.4, 1/3), and its direction (0.768, 0.640).
    direction = torch.tensor([1.2, 1.0]) / math.hypot(1.2, 1.0)
    halfway = (book[1] + direction) / (book[1] + direction).norm()
    torch.testing.assert_close(moved[0], halfway)
    assert torch.equal(moved[1], book[0])


def test_unused_codes_do_not_vanish_when_decay_is_0():
    book = l2(torch.randn(5, 8))
    sums, counts = code_sums(l2(torch.randn(3, 8)), torch.tensor([1, 1, 4]), 5)
    moved = ema_update(book, sums, counts, decay=0.0)
    assert torch.equal(moved[[0, 2, 3]], book[[0, 2, 3]])


def test_the_codebook_that_is_handed_in_is_left_alone():
    book = l2(torch.randn(5, 8))
    before = book.clone()
    ema_update(book, *code_sums(l2(torch.randn(30, 8)), torch.randint(0, 5, (30,)), 5), 0.5)
    assert torch.equal(book, before)


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


def test_kmeans_makes_as_many_rounds_as_it_is_asked_for():
    x, centres = l2(torch.randn(300, 3)), l2(torch.randn(8, 3))
    assert not torch.equal(kmeans(x, centres, 1)[0], kmeans(x, centres, 2)[0])
    one_by_one = centres
    for rounds in (1, 2, 3, 4):
        one_by_one, counts = kmeans(x, one_by_one, 1)
        found, counts_of_last = kmeans(x, centres, rounds)
        torch.testing.assert_close(found, one_by_one)
        assert torch.equal(counts_of_last, counts)


def test_the_counts_of_kmeans_are_those_of_its_last_look_up():
    points, start = l2(torch.randn(300, 3)), l2(torch.randn(8, 3))
    z = nearest_code(points, start)
    assert torch.equal(kmeans(points, start, 1)[1], torch.bincount(z, minlength=8).float())


def test_a_centre_that_one_vector_chose_goes_to_that_vector():
    x = torch.eye(3)[:2]
    centres = l2(x + torch.tensor([0.0, 0.0, 0.3]))
    torch.testing.assert_close(kmeans(x, centres)[0], x)


def test_kmeans_leaves_vectors_and_start_alone():
    x, centres = l2(torch.randn(60, 3)), l2(torch.randn(8, 3))
    before = x.clone(), centres.clone()
    kmeans(x, centres)
    assert torch.equal(x, before[0]) and torch.equal(centres, before[1])


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


def test_usage_without_any_vector_divides_nothing_by_zero():
    usage = codebook_usage(torch.zeros(4))
    assert usage["codes_used"] == 0 and usage["dead_codes"] == 4
    assert usage["entropy"] == 0 and usage["top10_share"] == 0


def test_entropy_is_in_nats_and_unused_codes_add_nothing_to_it():
    usage = codebook_usage(torch.tensor([3.0, 1.0, 0.0]))
    assert usage["entropy"] == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    assert usage["perplexity"] == pytest.approx(4 / 3 ** 0.75)


def test_a_code_that_one_vector_chose_is_a_used_code():
    usage = codebook_usage(torch.tensor([3.0, 1.0, 0.0]))
    assert (usage["codes_used"], usage["dead_codes"]) == (2, 1)


def test_the_commonest_ten_are_found_wherever_they_stand():
    rare, common = torch.full((10,), 1.0), torch.full((10,), 9.0)
    assert codebook_usage(torch.cat([rare, common]))["top10_share"] == pytest.approx(90)


def test_the_codebook_is_no_parameter_of_the_optimiser():
    assert [p for p in Codebook(10, 4).parameters() if p.requires_grad] == []


def test_the_count_of_use_is_a_moving_average_of_the_counts():
    book, h = Codebook(3, 4), l2(torch.randn(6, 4))
    book.cluster_size.fill_(1.0)
    book.update(*code_sums(h, torch.tensor([0, 0, 0, 0, 2, 2]), 3), decay=0.9)
    torch.testing.assert_close(book.cluster_size, torch.tensor([0.9 + 0.4, 0.9, 0.9 + 0.2]))
