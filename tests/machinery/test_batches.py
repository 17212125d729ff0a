"""Who gets which image when: each sample is a function of numbers, batches do not depend on the
number of processes, a resumed run continues the same stream."""
import numpy as np
import pytest
import torch

from support import data, transforms
from support.files import UserError


# --- samples --------------------------------------------------------------------------------------
def test_a_sample_depends_on_seed_epoch_and_index_and_on_nothing_before_it():
    def open_shapes(seed=0):
        return data.open_data("shapes", "train", transforms.MIMTransform(48), limit=20, seed=seed)

    def sample(key, seed=0):
        return open_shapes(seed)[key][0]

    dataset = open_shapes()
    want = dataset[(3, 7)][0]
    dataset[(0, 1)], torch.rand(5), np.random.rand()
    assert torch.equal(dataset[(3, 7)][0], want) and torch.equal(sample((3, 7)), want)
    assert not torch.equal(sample((4, 7)), want)
    assert not torch.equal(sample((3, 7), seed=1), want)
    assert torch.equal(sample(7), sample((0, 7)))            # an index alone is that of epoch 0


def test_the_seed_of_a_run_does_not_change_the_pictures():
    one, other = (data.open_data("shapes", "train", limit=20, seed=seed) for seed in (0, 1))
    assert torch.equal(one[7][0], other[7][0])


@pytest.mark.parametrize("make", [transforms.MIMTransform, transforms.FinetuneTransform])
def test_the_number_of_workers_changes_no_image(make):
    dataset = data.open_data("shapes", "train", make(48), limit=64)

    def stream(workers):
        batches = data.TrainBatches(64, 16, steps=6, seed=5)
        return list(data.make_loader(dataset, batches, workers, torch.device("cpu")))

    alone = stream(0)
    assert len(alone) == 6 and alone[0][0].shape == (16, 3, 48, 48)
    assert alone[0][1].dtype == torch.int64
    for workers in (1, 2):
        for (images, labels), (images_2, labels_2) in zip(alone, stream(workers), strict=True):
            assert torch.equal(images, images_2) and torch.equal(labels, labels_2)


def test_the_loader_leaves_the_training_loops_generator_alone():
    dataset = data.open_data("shapes", "val", limit=8)       # no transform: nothing to seed
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    list(data.make_loader(dataset, data.eval_batches(8, 4), 0, "cpu"))
    assert torch.equal(torch.rand(3), want)


# --- batches --------------------------------------------------------------------------------------
@pytest.mark.parametrize("world_size, accumulation",
                         [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 3)])
def test_gathering_all_ranks_restores_the_batches_of_one_process(world_size, accumulation):
    n, batch, steps = 100, 24, 11
    parts = dict(world_size=world_size, accumulation=accumulation)
    single = list(data.TrainBatches(n, batch, steps, seed=3))
    ranks = [list(data.TrainBatches(n, batch, steps, rank=rank, seed=3, **parts))
             for rank in range(world_size)]
    for step in range(steps):
        here = slice(step * accumulation, (step + 1) * accumulation)
        gathered = [key for rank in ranks for micro in rank[here] for key in micro]
        assert gathered == single[step]
    share = batch // world_size // accumulation
    assert all(len(micro) == share for rank in ranks for micro in rank)
    assert len(data.TrainBatches(n, batch, steps, rank=0, **parts)) == steps * accumulation


def test_an_epoch_shows_no_image_twice_and_drops_the_incomplete_batch():
    n, batch = 50, 8                         # 6 whole batches an epoch, 2 images left out
    batches = list(data.TrainBatches(n, batch, steps=18))
    orders = []
    for epoch in range(3):
        keys = [key for b in batches[epoch * 6:(epoch + 1) * 6] for key in b]
        assert {e for e, _ in keys} == {epoch}
        assert len({i for _, i in keys}) == 48
        orders.append([i for _, i in keys])
    assert orders[0] != orders[1]
    assert set(orders[0]) != set(orders[1])                  # others are left out next time
    assert list(data.TrainBatches(n, batch, steps=18, seed=1)) != batches


def test_resuming_continues_the_same_stream():
    options = dict(rank=1, world_size=2, accumulation=2, seed=4)
    whole = list(data.TrainBatches(50, 8, 20, **options))
    for start in (0, 5, 6, 19, 20):
        rest = data.TrainBatches(50, 8, 20, start_step=start, **options)
        assert list(rest) == whole[2 * start:]
        assert len(rest) == len(whole) - 2 * start


@pytest.mark.parametrize("n, world_size", [(100, 1), (101, 2), (103, 4), (3, 4), (0, 2)])
def test_evaluation_counts_every_image_exactly_once(n, world_size):
    shares = [data.eval_batches(n, 16, rank, world_size) for rank in range(world_size)]
    in_order = [i for share in shares for batch in share for i in batch]
    assert in_order == list(range(n))                        # shares are contiguous
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert all(0 < len(batch) <= 16 for share in shares for batch in share)


def test_batches_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="--batch-size"):
        data.TrainBatches(10, 16, 1)
    with pytest.raises(ValueError, match="not divisible"):
        data.TrainBatches(100, 16, 1, world_size=3)
