"""What holds for every size: properties over random grids, counts, batches and processes."""
import argparse
import math
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import assume, configuration, given, settings
from hypothesis import strategies as st

from extras.robustness import restrict
from finetune import hits, mix, smooth_targets, soft_cross_entropy
from linprobe import accuracy, hold_out
from model import position_table, relative_position_index
from pretrain import sample_block_mask
from segment import confusion, poly_schedule, scores, slide, window_starts
from support import data
from support.codebook import codebook_usage, resize_codebook
from support.labels import choose_labels
from support.optim import cosine_schedule
from support.guessers import nearest_visible_code
from support.positions import resize_pos_embed, resize_relative_table
from support.process import seed_all
from support.scenes import IGNORE, fit_size
from vqkd import code_sums, ema_update, kmeans, l2, nearest_code

# Not a folder of its own beside the project.
configuration.set_hypothesis_home_dir(ROOT / ".pytest_cache" / "hypothesis")
SEED = st.integers(0, 2**31)
SIDE = st.integers(1, 12)
GRID = st.tuples(st.integers(2, 8), st.integers(2, 8))


def for_all(examples=40, **values):
    """Run a test for `examples` draws of its arguments, the same ones every time.

    A failure is shown at its smallest.
    """
    quiet = settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    return lambda test: quiet(given(**values)(test))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# --- masks ----------------------------------------------------------------------------------------
@for_all(gh=SIDE, gw=SIDE, share=st.floats(0, 1), smallest=st.integers(1, 40), seed=SEED)
def test_a_mask_hides_exactly_the_count_on_any_grid_and_follows_from_the_seed(
        gh, gw, share, smallest, seed):
    count = round(share * gh * gw)
    masks = []
    for _ in range(2):
        random.seed(seed)
        masks.append(sample_block_mask(gh, gw, count, smallest))
    assert masks[0].shape == (gh, gw) and masks[0].dtype == torch.bool
    assert masks[0].sum() == count
    assert torch.equal(*masks)


@for_all(gh=SIDE, gw=SIDE, seed=SEED)
def test_a_hidden_patch_borrows_from_a_visible_one_that_none_is_nearer_than(gh, gw, seed):
    mask = torch.rand(1, gh * gw, generator=seeded(seed)) < 0.6
    assume(not mask.all())
    places = torch.arange(gh * gw)[None]                     # stand for the codes
    lender = nearest_visible_code(places, mask, (gh, gw))[0].tolist()
    visible = [i for i in range(gh * gw) if not mask[0, i]]

    def distance(i, j):
        return math.dist(divmod(i, gw), divmod(j, gw))

    for i, j in enumerate(lender):
        assert j in visible
        assert distance(i, j) == min(distance(i, k) for k in visible)


# --- positions ------------------------------------------------------------------------------------
@for_all(gh=SIDE, gw=SIDE)
def test_a_row_of_the_table_stands_for_one_offset_and_the_way_back_for_its_mirror_image(gh, gw):
    index = relative_position_index(gh, gw)
    rows = (2 * gh - 1) * (2 * gw - 1)
    assert index.shape == (1 + gh * gw,) * 2
    assert index.unique().tolist() == list(range(rows + 3))
    assert position_table((gh, gw), 2).shape == (rows + 3, 2)
    patches = index[1:, 1:]
    assert torch.equal(patches + patches.T, torch.full_like(patches, rows - 1))
    y, x = torch.arange(gh * gw) // gw, torch.arange(gh * gw) % gw
    offsets = torch.stack([y[:, None] - y, x[:, None] - x], dim=-1).flatten(0, 1)
    pairs = torch.cat([offsets, patches.flatten()[:, None]], dim=1).unique(dim=0)
    assert len(pairs) == rows                                # one row, one offset


@for_all(source=GRID, target=GRID, height=st.floats(-3, 3), seed=SEED)
def test_resizing_a_table_keeps_constants_symmetry_and_the_rows_of_cls(
        source, target, height, seed):
    old, new = [2 * g - 1 for g in source], [2 * g - 1 for g in target]
    table = torch.randn(math.prod(old) + 3, 2, generator=seeded(seed))
    table[:, 1] = height                                     # the second head's table is flat
    resized = resize_relative_table(table, source, target)
    assert resized.shape == (math.prod(new) + 3, 2)
    assert torch.equal(resized[-3:], table[-3:])
    flat = torch.full_like(resized[:, 1], height)
    torch.testing.assert_close(resized[:, 1], flat, atol=1e-5, rtol=1e-5)
    assert torch.equal(resize_relative_table(table, source, source), table)

    def changed(table, sides, change):                       # the same table seen in another way
        return torch.cat([change(table[:-3].unflatten(0, sides)).flatten(0, 1), table[-3:]])

    def there_and_back_swapped(t):
        return t.flip(0, 1)

    def image_turned_over(t):
        return t.transpose(0, 1)

    for change, a, b in ((there_and_back_swapped, source, target),
                         (image_turned_over, source[::-1], target[::-1])):
        torch.testing.assert_close(resize_relative_table(changed(table, old, change), a, b),
                                   changed(resized, new, change), atol=1e-4, rtol=1e-4)


@for_all(source=GRID, target=GRID, height=st.floats(-3, 3), seed=SEED)
def test_resizing_absolute_positions_keeps_cls_and_constants(source, target, height, seed):
    positions = torch.randn(1, 1 + math.prod(source), 3, generator=seeded(seed))
    positions[:, 1:, 2] = height
    resized = resize_pos_embed(positions, source, target)
    assert resized.shape == (1, 1 + math.prod(target), 3)
    assert torch.equal(resized[:, 0], positions[:, 0])
    flat = torch.full((1, math.prod(target)), height)
    torch.testing.assert_close(resized[:, 1:, 2], flat, atol=1e-5, rtol=1e-5)
    assert torch.equal(resize_pos_embed(positions, source, source), positions)


# --- quantizer ------------------------------------------------------------------------------------
@for_all(n=st.integers(1, 40), codes=st.integers(1, 30), dim=st.integers(1, 16), seed=SEED)
def test_no_code_is_nearer_than_the_nearest_whatever_the_lengths(n, codes, dim, seed):
    g = seeded(seed)
    h = torch.randn(n, dim, generator=g)
    v = torch.randn(codes, dim, generator=g)
    h, v = h + 0.1 * h.sign(), v + 0.1 * v.sign()            # not too short to have a direction
    distance = (l2(h.double())[:, None] - l2(v.double())).norm(dim=-1)   # (n, K), as in Eq. (1)
    stretch = 0.01 + 100 * torch.rand(n + codes, 1, generator=g)
    for z in (nearest_code(h, v), nearest_code(h * stretch[:n], v * stretch[n:])):
        assert z.shape == (n,) and z.min() >= 0
        chosen = distance.gather(1, z[:, None])[:, 0]
        torch.testing.assert_close(chosen, distance.amin(dim=1), atol=1e-5, rtol=0)


@for_all(n=st.integers(1, 60), codes=st.integers(1, 20), dim=st.integers(2, 16),
         decay=st.floats(0, 1), cut=st.integers(0, 60), seed=SEED)
def test_codes_stay_on_the_sphere_and_sums_do_not_care_who_adds_them_up(
        n, codes, dim, decay, cut, seed):
    g = seeded(seed)
    h = l2(torch.randn(n, dim, generator=g))
    book = l2(torch.randn(codes, dim, generator=g))
    z = nearest_code(h, book)
    sums, counts = code_sums(h, z, codes)
    one_hot = F.one_hot(z, codes).float()
    torch.testing.assert_close(sums, one_hot.T @ h, atol=1e-5, rtol=1e-5)
    assert torch.equal(counts, one_hot.sum(0))
    first, _ = code_sums(h[:cut], z[:cut], codes)            # two processes, say
    second, _ = code_sums(h[cut:], z[cut:], codes)
    torch.testing.assert_close(first + second, sums, atol=1e-5, rtol=1e-5)
    moved = ema_update(book, sums, counts, decay)
    torch.testing.assert_close(moved.norm(dim=-1), torch.ones(codes))
    assert torch.equal(moved[counts == 0], book[counts == 0])
    before, after = (book * l2(sums)).sum(-1), (moved * l2(sums)).sum(-1)
    assert (after >= before - 1e-5).all()                    # nearer, never farther


@for_all(n=st.integers(1, 60), codes=st.integers(1, 12), dim=st.integers(2, 8), seed=SEED)
def test_more_rounds_of_kmeans_never_fit_worse(n, codes, dim, seed):
    g = seeded(seed)
    x = l2(torch.randn(n, dim, generator=g))
    start = l2(torch.randn(codes, dim, generator=g))
    fit = []
    for rounds in (1, 2, 5, 10):
        centres, _ = kmeans(x, start, rounds)
        fit.append((x @ centres.T).amax(dim=1).sum().item())
    assert all(later >= earlier - 1e-4 for earlier, later in pairwise(fit))
    centres, counts = kmeans(x, start)
    torch.testing.assert_close(centres.norm(dim=-1), torch.ones(codes))
    assert counts.sum() == n


@for_all(counts=st.lists(st.integers(0, 1000), min_size=1, max_size=40), seed=SEED)
def test_perplexity_lies_between_one_and_the_codes_in_use(counts, seed):
    assume(sum(counts))
    usage = codebook_usage(torch.tensor(counts))
    used = sum(n > 0 for n in counts)
    assert usage["codes_used"] == used and usage["dead_codes"] == len(counts) - used
    assert 1 - 1e-5 <= usage["perplexity"] <= used + 1e-3                # float32 is enough
    assert 0 < usage["top10_share"] <= 100 + 1e-3
    shuffled = torch.tensor(counts)[torch.randperm(len(counts), generator=seeded(seed))]
    again = codebook_usage(3 * shuffled)                     # only shares count
    assert again == pytest.approx(usage, rel=1e-4, abs=1e-4)


@for_all(use=st.lists(st.integers(0, 50), min_size=2, max_size=12), codes=st.integers(2, 40))
def test_a_codebook_of_another_size_keeps_unit_vectors_and_its_most_used_codes(use, codes):
    book = l2(torch.randn(len(use), 8))
    use = torch.tensor(use).float()
    table, size = resize_codebook(book, use, codes)
    assert table.shape == (codes, 8) and size.shape == (codes,)
    torch.testing.assert_close(table.norm(dim=-1), torch.ones(codes))
    if codes >= len(use):
        assert torch.equal(table[:len(use)], book)
        torch.testing.assert_close(size.sum(), use.sum())
    else:
        assert sorted(size.tolist()) == sorted(use.tolist())[-codes:]


# --- rates and batches ----------------------------------------------------------------------------
@for_all(total=st.integers(2, 60), share=st.floats(0, 0.99), base=st.floats(1e-6, 1),
         low=st.floats(0, 1))
def test_every_schedule_rises_to_its_peak_and_falls_from_there(total, share, base, low):
    warmup = int(share * total)
    final = low * base
    rates = [cosine_schedule(step, base, final, total, warmup) for step in range(total)]
    assert all(0 <= rate <= base * (1 + 1e-9) for rate in rates)
    assert rates[warmup] == pytest.approx(base) and rates[-1] >= final - 1e-12
    assert rates[:warmup] == sorted(rates[:warmup])
    assert all(b <= a + 1e-12 for a, b in pairwise(rates[warmup:]))
    line = [poly_schedule(step, base, total, warmup) for step in range(total + 1)]
    assert all(0 <= rate <= base for rate in line) and line[-1] == 0
    assert all(b < a for a, b in pairwise(line[warmup:]))


@for_all(images=st.integers(1, 500), batch=st.integers(1, 64), epochs=st.integers(1, 9),
         warm=st.integers(0, 9), steps=st.none() | st.integers(1, 200))
def test_warm_up_always_ends_before_the_last_step(images, batch, epochs, warm, steps):
    assume(images >= batch)
    args = argparse.Namespace(batch_size=batch, steps=steps, epochs=epochs, warmup_epochs=warm)
    total, warmup, per_epoch = data.resolve_steps(args, images)
    assert per_epoch == images // batch and total == (steps or epochs * per_epoch)
    assert 0 <= warmup < total


@for_all(per_rank=st.integers(1, 100), ranks=st.integers(1, 8),
         most=st.none() | st.integers(1, 120))
def test_the_parts_of_a_batch_are_equal_no_larger_than_asked_for_and_make_it_up(
        per_rank, ranks, most):
    micro, accumulation = data.split_batch(per_rank * ranks, most, ranks)
    assert micro * accumulation * ranks == per_rank * ranks
    assert micro <= min(most or per_rank, per_rank)
    if accumulation > 1:                                     # and no smaller than need be
        for parts in range(1, accumulation):
            assert per_rank % parts or per_rank // parts > most


@for_all(micro=st.integers(1, 5), ranks=st.integers(1, 4), accumulation=st.integers(1, 4),
         spare=st.integers(0, 30), steps=st.integers(1, 8), start=st.integers(0, 8),
         seed=st.integers(0, 99))
def test_ranks_and_micro_batches_together_are_the_batches_of_one_process(
        micro, ranks, accumulation, spare, steps, start, seed):
    batch = micro * ranks * accumulation
    n = batch + spare
    whole = list(data.TrainBatches(n, batch, steps, seed=seed))
    parts = [list(data.TrainBatches(n, batch, steps, start, rank, ranks, accumulation, seed))
             for rank in range(ranks)]
    for step in range(start, steps):
        here = slice((step - start) * accumulation, (step - start + 1) * accumulation)
        gathered = [key for part in parts for micro_batch in part[here] for key in micro_batch]
        assert gathered == whole[step]
    keys = [key for keys_of_step in whole for key in keys_of_step]
    assert len(set(keys)) == len(keys) == steps * batch      # no image twice in an epoch
    for step, keys_of_step in enumerate(whole):
        assert all(epoch == step // (n // batch) and 0 <= i < n for epoch, i in keys_of_step)


@for_all(n=st.integers(0, 200), size=st.integers(1, 40), ranks=st.integers(1, 9))
def test_an_evaluation_meets_every_image_once_in_shares_of_equal_size(n, size, ranks):
    batches = [data.eval_batches(n, size, rank, ranks) for rank in range(ranks)]
    shares = [[i for batch in share for i in batch] for share in batches]
    assert [i for share in shares for i in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(0 < len(batch) <= size for share in batches for batch in share)


@for_all(n=st.integers(2, 300), classes=st.integers(1, 8), seed=st.integers(0, 99))
def test_held_out_images_and_few_labels_are_drawn_without_repetition(n, classes, seed):
    fit, held = hold_out(n, seed)
    assert sorted(torch.cat([fit, held]).tolist()) == list(range(n))
    assert len(held) == max(1, n // 10)
    if n < classes:
        return
    labels = torch.arange(n) % classes
    per_class = max(1, n // classes // 2)
    chosen = choose_labels(labels, per_class, seed)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert labels[chosen].bincount().tolist() == [per_class] * classes


# --- targets and hits -----------------------------------------------------------------------------
@for_all(half=st.integers(1, 4), classes=st.integers(2, 12), smoothing=st.floats(0, 0.9),
         mixup=st.sampled_from([0, 0.8]), cutmix=st.sampled_from([0, 1.0]), seed=SEED)
def test_targets_are_distributions_mixed_or_not(half, classes, smoothing, mixup, cutmix, seed):
    seed_all(seed)
    labels = torch.randint(classes, (2 * half,))
    images = torch.rand(2 * half, 3, 8, 8)
    images, targets = mix(images, labels, classes, mixup, cutmix, smoothing)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(2 * half))
    assert targets.min() >= smoothing / classes - 1e-6
    assert images.min() >= 0 and images.max() <= 1 + 1e-6
    own = smooth_targets(labels, classes, smoothing)
    partner = smooth_targets(labels.flip(0), classes, smoothing)
    assert (targets <= torch.maximum(own, partner) + 1e-6).all()
    assert (targets >= torch.minimum(own, partner) - 1e-6).all()
    # No logits cost less than those of the targets themselves: cross-entropy is at least the
    # entropy (Gibbs).
    logits = torch.randn(2 * half, classes)
    entropy = soft_cross_entropy((targets + 1e-12).log(), targets)
    assert soft_cross_entropy(logits, targets) >= entropy - 1e-5


@for_all(n=st.integers(1, 30), classes=st.integers(1, 15), few=st.integers(1, 15), seed=SEED)
def test_more_guesses_and_fewer_rivals_never_hurt(n, classes, few, seed):
    g = seeded(seed)
    logits = torch.randn(n, classes, generator=g)
    columns = torch.randperm(classes, generator=g)[:few]
    labels = columns[torch.randint(len(columns), (n,), generator=g)]
    right = [accuracy(logits, labels, k).item() for k in range(1, classes + 1)]
    assert right == sorted(right) and right[-1] == 100
    first, fifth = hits(logits, labels)
    assert 100 * first / n == pytest.approx(right[0])
    assert 100 * fifth / n == pytest.approx(right[min(5, classes) - 1])
    inside = hits(restrict(logits, columns), labels)
    assert inside[0] >= first and inside[1] >= fifth


# --- segmentation ---------------------------------------------------------------------------------
@for_all(side=st.integers(1, 400), window=st.integers(1, 100), share=st.floats(0.1, 1))
def test_windows_cover_every_pixel_stay_inside_and_are_no_more_than_needed(side, window, share):
    stride = max(1, round(share * window))
    starts = window_starts(side, window, stride)
    assert starts[0] == 0 and starts == sorted(set(starts))
    assert all(b - a <= stride for a, b in pairwise(starts))
    assert max(starts) == max(0, side - window)              # the last one ends with the image
    assert len(starts) == 1 + math.ceil(max(0, side - window) / stride)


@for_all(20, size=st.tuples(*[st.integers(4, 20)] * 2), window=st.tuples(*[st.integers(1, 4)] * 2),
         seed=SEED)
def test_windows_that_say_the_same_of_a_pixel_are_averaged_to_just_that(size, window, seed):
    images = torch.randn(2, 3, *size, generator=seeded(seed))
    stride = [max(1, w - 1) for w in window]
    calls = []

    def double(x):
        calls.append(x)
        return 2 * x

    torch.testing.assert_close(slide(double, images, window, stride), 2 * images)
    rows, columns = (len(window_starts(size[i], window[i], stride[i])) for i in (0, 1))
    assert len(calls) == rows * columns


@for_all(classes=st.integers(2, 6), height=st.integers(1, 8), width=st.integers(1, 8),
         ignored=st.floats(0, 0.6), seed=SEED)
def test_iou_is_the_intersection_of_two_sets_of_pixels_by_their_union(
        classes, height, width, ignored, seed):
    g = seeded(seed)
    predicted = torch.randint(classes, (2, height, width), generator=g)
    labels = torch.randint(classes, (2, height, width), generator=g)
    labels[torch.rand(labels.shape, generator=g) < ignored] = IGNORE
    places = [place for place, label in np.ndenumerate(labels.numpy()) if label != IGNORE]
    assume(places)
    figures, iou, _ = scores(confusion(predicted, labels, classes))
    for c in range(classes):
        truth = {place for place in places if labels[place] == c}
        called = {place for place in places if predicted[place] == c}
        if truth | called:
            expected = 100 * len(truth & called) / len(truth | called)
            assert iou[c].item() == pytest.approx(expected)
        else:
            assert math.isnan(iou[c])
    assert figures["miou"] <= figures["m_acc"] + 1e-9        # the union holds the class itself
    known = torch.where(labels == IGNORE, 0, labels)
    assert scores(confusion(known, labels, classes))[0]["miou"] == pytest.approx(100)


@for_all(height=st.integers(1, 3000), width=st.integers(1, 3000), long=st.integers(8, 3000),
         short=st.integers(8, 600))
def test_a_fitted_size_touches_a_bound_and_keeps_the_aspect(height, width, long, short):
    assume(long >= short)
    h, w = fit_size(height, width, long, short)
    assert 1 <= max(h, w) <= long and 1 <= min(h, w) <= short
    assert max(h, w) == long or min(h, w) == short
    scale = min(long / max(height, width), short / min(height, width))
    assert abs(h - height * scale) <= 0.5 + 1e-6 or h == 1
    assert abs(w - width * scale) <= 0.5 + 1e-6 or w == 1
