"""Two guessers that have learned nothing of images, to compare a backbone's masked accuracy with.

    by position    the code that is commonest in the patch's place, over many images
    by nearness    the code of the nearest patch that is not hidden
"""
# Shapes:  B images, N = gh x gw patches, K codes, M hidden patches of a batch
import torch

from support import data


@torch.no_grad()
def commonest_codes(tokenizer, dataset, run):
    """The commonest code of each place, from at most 1024 images spread over the set.  -> (N,)"""
    codes = len(tokenizer.quantize.cluster_size)
    counts = torch.zeros(tokenizer.encoder.num_patches, codes, device=run.device)        # (N, K)
    n = len(dataset)
    most = min(1024, n)
    spread = torch.utils.data.Subset(dataset, [i * n // most for i in range(most)])
    for (views, _), _ in run.eval_batches(spread, batch_size=256):
        _, images = data.two_views(views, run.device)
        with run.autocast():
            z = tokenizer.encode(images)
        counts.scatter_add_(1, z.T, torch.ones_like(z.T, dtype=counts.dtype))
    counts = run.sum(counts)
    if counts.sum(dim=0).count_nonzero() == 1:
        run.warn(f"the tokenizer gives the same code to every patch of {most} images: there is "
                 f"nothing to find out about hidden patches; train another with python vqkd.py")
    return counts.argmax(dim=1)


def nearest_visible_code(z, mask, grid):
    """The code of the nearest patch that is not hidden, for every patch.  z, mask -> (B, N)"""
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], dim=1).float().to(z.device)
    distance = torch.cdist(places, places) + mask[:, None, :] * 1e6      # hidden ones are far away
    return z.gather(1, distance.argmin(dim=-1))


def guess_hidden(z, mask, commonest, grid):
    """What both say of the hidden patches.  z, mask (B, N), commonest (N,) -> two of (M,)"""
    by_position = commonest.expand_as(z)
    by_nearness = nearest_visible_code(z, mask, grid)
    return by_position[mask], by_nearness[mask]
