"""BatchNorm when no process sees the whole batch: several processes, or an accumulated batch.

On GPUs several processes share mean and variance (SyncBatchNorm). On CPUs torch has no such layer,
so each process normalises by its own images, and running means and variances differ.
"""
import torch
from torch import nn

from support import data
from support.files import UserError


def is_shared(process):
    """Whether the processes compute mean and variance together."""
    return process.world_size > 1 and process.device.type == "cuda"


def synchronise(model, process):
    """-> the model, its BatchNorm layers shared by all processes where torch can do that."""
    if is_shared(process):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def check_batch(args, process):
    """UserError if BatchNorm sees a single image at a time; a note if it sees a part of the batch.

    Differs from the recipe, where BatchNorm sees all images of an update.
    """
    seen, _ = data.split_batch(args.batch_size, args.micro_batch, process.world_size)
    if is_shared(process):
        seen *= process.world_size
    if seen < 2:
        raise UserError("BatchNorm needs two images at once in every process: "
                        "raise --micro-batch or --batch-size")
    if seen < args.batch_size:
        process.print(f"note: BatchNorm sees {seen} of the {args.batch_size} images of an update "
                      f"at once: raise --micro-batch if memory allows")


@torch.no_grad()
def average_statistics(model, process):
    """Give all processes the mean of their running means and variances, after every step.

    Then rank 0 saves what all of them have. The statistics move linearly, so how often this is done
    changes rounding alone. But a run that a signal stops saves once more, and its last bits would
    differ if the mean were taken when saving.
    """
    if process.world_size == 1:
        return
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):               # SyncBatchNorm is none: equal already
            for statistic in (module.running_mean, module.running_var):
                process.sum(statistic).div_(process.world_size)
