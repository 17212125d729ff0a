"""BatchNorm where no process sees the whole batch."""
import argparse

import pytest
import torch
from torch import nn

from support.batchnorm import average_statistics, check_batch
from support.files import UserError
from support.process import Process


class OneOfTwo(Process):
    """The first of two processes on CPUs. The statistics of the second one are all 5."""

    def sum(self, tensor):
        return tensor.add_(5)


def sizes(batch_size, micro_batch):
    return argparse.Namespace(batch_size=batch_size, micro_batch=micro_batch)


def test_running_statistics_become_the_mean_over_the_processes():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    weight = model[1].weight.clone()
    model[1].running_mean.copy_(torch.tensor([1.0, 3.0]))
    model[1].running_var.copy_(torch.tensor([2.0, 4.0]))
    average_statistics(model, OneOfTwo(world_size=2))
    assert model[1].running_mean.tolist() == [3.0, 4.0]
    assert model[1].running_var.tolist() == [3.5, 4.5]
    assert torch.equal(model[1].weight, weight)


def test_one_process_keeps_its_statistics():
    model = nn.BatchNorm2d(2)
    model.running_mean.copy_(torch.tensor([1.0, 3.0]))
    average_statistics(model, Process())
    assert model.running_mean.tolist() == [1.0, 3.0]


@pytest.mark.parametrize("batch_size, micro_batch, processes, seen", [
    (16, 16, 1, 16), (16, 8, 1, 8), (16, 16, 2, 8), (16, 2, 2, 2)])
def test_a_note_says_how_many_images_are_seen_at_once(
        batch_size, micro_batch, processes, seen, capsys):
    check_batch(sizes(batch_size, micro_batch), Process(world_size=processes))
    said = capsys.readouterr().out
    assert (f"sees {seen} of the {batch_size} images" in said) == (seen < batch_size)


@pytest.mark.parametrize("batch_size, micro_batch, processes", [(1, 1, 1), (16, 1, 1), (2, 2, 2)])
def test_a_single_image_is_refused(batch_size, micro_batch, processes):
    with pytest.raises(UserError, match="needs two images at once"):
        check_batch(sizes(batch_size, micro_batch), Process(world_size=processes))


def test_several_gpus_see_their_images_together():
    gpus = Process(world_size=2, device=torch.device("cuda"))
    check_batch(sizes(2, 2), gpus)           # one image each: two for the shared statistics
