"""Block-wise masks (Section 2.3): which patches the model has to name."""
import random

import pytest
import torch

from pretrain import sample_block_mask


def statistics(masks):
    """Shape statistics of masks (n, H, W): connected components, largest one, neighbouring hidden pairs. -> (n,) each"""
    components, largest, pairs = [], [], []
    for mask in masks:
        free = {tuple(c) for c in mask.nonzero().tolist()}
        sizes = []
        while free:
            stack, size = [free.pop()], 0
            while stack:
                y, x = stack.pop()
                size += 1
                for cell in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                    if cell in free:
                        free.remove(cell)
                        stack.append(cell)
            sizes.append(size)
        components.append(len(sizes))
        largest.append(max(sizes))
        pairs.append(int((mask[1:] & mask[:-1]).sum() + (mask[:, 1:] & mask[:, :-1]).sum()))
    return dict(components=torch.tensor(components).double(), largest_component=torch.tensor(largest).double(),
                neighbour_pairs=torch.tensor(pairs).double())


@pytest.mark.parametrize("gh, gw, count, smallest", [(14, 14, 75, 16), (6, 6, 13, 2), (8, 5, 15, 3), (6, 6, 35, 2), (3, 3, 1, 1)])
def test_block_mask_hides_exactly_the_requested_patches(gh, gw, count, smallest):
    for seed in range(200):
        random.seed(seed)
        mask = sample_block_mask(gh, gw, count, smallest)
        assert mask.shape == (gh, gw) and mask.dtype == torch.bool and mask.sum() == count


def test_the_same_seed_draws_the_same_mask_and_another_seed_another():
    def draw(seed):
        random.seed(seed)
        return sample_block_mask(14, 14, 75)
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


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
    frequency = torch.stack([sample_block_mask(14, 14, 75) for _ in range(2000)]).float().mean(0)
    assert abs(frequency[6:8, 6:8].mean() - 0.715) < 0.03
    assert abs(frequency[[0, 0, -1, -1], [0, -1, 0, -1]].mean() - 0.045) < 0.015


def test_the_first_block_is_at_least_the_smallest_size():
    for seed in range(100):
        random.seed(seed)
        assert statistics(sample_block_mask(14, 14, 40, min_block=36)[None])["largest_component"] >= 25


def test_blocks_are_as_often_tall_as_flat():
    random.seed(0)
    masks = torch.stack([sample_block_mask(14, 14, 75) for _ in range(600)])
    above, beside = masks[:, 1:] & masks[:, :-1], masks[:, :, 1:] & masks[:, :, :-1]     # hidden pairs of neighbours
    assert abs(above.sum() - beside.sum()) / 600 < 0.8       # 63 a mask; with a uniform aspect they differ by 4
