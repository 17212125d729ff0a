"""Block-wise masks (Section 2.3): which patches the model has to name."""
import functools
import random

import pytest
import torch

from pretrain import hidden_patches, masked_views, sample_block, sample_block_mask
from support import data


def component_sizes(mask):
    """How many patches each connected group of hidden patches has.  mask (gh, gw) -> list"""
    free = {tuple(cell) for cell in mask.nonzero().tolist()}
    sizes = []
    while free:
        stack = [free.pop()]
        size = 0
        while stack:
            y, x = stack.pop()
            size += 1
            for cell in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if cell in free:
                    free.remove(cell)
                    stack.append(cell)
        sizes.append(size)
    return sizes


def statistics(masks):
    """Connected components, the largest of them, neighbouring hidden pairs.

    masks (n, gh, gw) -> dict of (n,)
    """
    components, largest, pairs = [], [], []
    for mask in masks:
        sizes = component_sizes(mask)
        components.append(len(sizes))
        largest.append(max(sizes))
        above = mask[1:] & mask[:-1]
        beside = mask[:, 1:] & mask[:, :-1]
        pairs.append(int(above.sum() + beside.sum()))
    return dict(components=torch.tensor(components).double(),
                largest_component=torch.tensor(largest).double(),
                neighbour_pairs=torch.tensor(pairs).double())


@pytest.mark.parametrize("gh, gw, count, smallest", [
    (14, 14, 75, 16), (6, 6, 13, 2), (8, 5, 15, 3), (6, 6, 35, 2), (3, 3, 1, 1)])
def test_block_mask_hides_exactly_the_requested_patches(gh, gw, count, smallest):
    for seed in range(200):
        random.seed(seed)
        mask = sample_block_mask(gh, gw, count, smallest)
        assert mask.shape == (gh, gw)
        assert mask.dtype == torch.bool
        assert mask.sum() == count


def test_the_same_seed_draws_the_same_mask_and_another_seed_another():
    def draw(seed):
        random.seed(seed)
        return sample_block_mask(14, 14, 75)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_every_image_draws_its_own_mask_and_a_new_one_in_every_epoch():
    masked = functools.partial(masked_views, views=lambda image: image, grid=(6, 6), count=13,
                               min_block=2)
    dataset = data.open_data("shapes", "train", masked, limit=8)
    masks = {item: dataset[item][0][1] for item in [(0, 0), (0, 1), (0, 2), (1, 0)]}
    for item, mask in masks.items():
        assert mask.shape == (36,)
        assert mask.sum() == 13
        assert torch.equal(mask, dataset[item][0][1])        # the same image in the same epoch
    assert len({tuple(mask.tolist()) for mask in masks.values()}) == 4


def test_hidden_patches_lie_together_in_blocks():
    random.seed(0)
    blocks = statistics(torch.stack([sample_block_mask(14, 14, 75) for _ in range(200)]))
    scattered = torch.zeros(200, 196, dtype=torch.bool)
    for row in scattered:
        row[torch.randperm(196)[:75]] = True
    scattered = statistics(scattered.view(200, 14, 14))
    assert blocks["components"].mean() < 3 < scattered["components"].mean()
    assert blocks["neighbour_pairs"].mean() > 2 * scattered["neighbour_pairs"].mean()


def test_centre_patches_are_hidden_about_72_percent_of_the_time_and_corners_4_5_percent():
    random.seed(0)
    masks = torch.stack([sample_block_mask(14, 14, 75) for _ in range(2000)])
    frequency = masks.float().mean(0)
    assert abs(frequency[6:8, 6:8].mean() - 0.715) < 0.03
    assert abs(frequency[[0, 0, -1, -1], [0, -1, 0, -1]].mean() - 0.045) < 0.015


def test_the_first_block_is_at_least_the_smallest_size():
    for seed in range(100):
        random.seed(seed)
        mask = sample_block_mask(14, 14, 40, min_block=36)
        assert max(component_sizes(mask)) >= 25


def test_blocks_are_as_often_tall_as_flat():
    random.seed(0)
    masks = torch.stack([sample_block_mask(14, 14, 75) for _ in range(600)])
    above = masks[:, 1:] & masks[:, :-1]                     # hidden pairs of neighbours
    beside = masks[:, :, 1:] & masks[:, :, :-1]
    # A mask has about 63 of each. With a uniform aspect they would differ by 4.
    assert abs(above.sum() - beside.sum()) / 600 < 0.8


def test_a_block_has_on_average_the_area_that_was_drawn_and_any_place():
    random.seed(0)
    empty = [[False] * 14 for _ in range(14)]
    blocks = [sample_block(empty, 36, 36) for _ in range(400)]
    assert abs(sum(map(len, blocks)) / 400 - 36) < 2.5       # cut off, not rounded: 31
    for axis in (0, 1):
        places = [cell[axis] for block in blocks for cell in block]
        assert min(places) == 0 and max(places) == 13        # up to the last row and column


def test_the_area_of_a_block_lies_anywhere_between_the_smallest_and_what_remains():
    random.seed(0)
    empty = [[False] * 30 for _ in range(30)]
    areas = torch.tensor([float(len(sample_block(empty, 100, 20))) for _ in range(400)])
    assert abs(areas.mean() - 60) < 5
    assert areas.min() < 25 and areas.max() > 90


def test_a_block_that_does_not_fit_is_drawn_again_up_to_ten_times():
    half = [[x < 3 for x in range(6)] for _ in range(6)]
    random.seed(0)
    touching = 0
    for _ in range(200):                                     # 4 patches in a 2 x 2, 1 x 3 or 3 x 1
        block = set(sample_block(half, 4, 4))
        touching += all({(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & block or len(block) == 1
                        for y, x in block)
    assert touching > 190


def test_hidden_patches_are_the_places_of_a_mask_image_by_image_and_rising():
    mask = torch.zeros(3, 16, dtype=torch.bool)
    places = torch.tensor([[1, 5, 6], [0, 2, 15], [3, 4, 11]])
    mask.scatter_(1, places, True)
    hidden = hidden_patches(mask)
    assert hidden.shape == (3, 3)                            # a row per image
    assert torch.equal(hidden, places)                       # patches counted from 0, without [CLS]
    z = torch.randint(0, 99, (3, 16))
    assert torch.equal(z.gather(1, hidden).flatten(), z[mask])


def test_images_that_hide_different_numbers_of_patches_are_refused():
    for rows in ([[1, 1, 0, 0], [1, 0, 0, 0]], [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]]):
        with pytest.raises(ValueError):
            hidden_patches(torch.tensor(rows) > 0)
