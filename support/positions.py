"""Positions for another image size: tables and embeddings, interpolated between grids of patches.

Another image size means another grid of patches. A relative-position table has a row per offset
between two patches, an absolute embedding has a vector per patch. Both are resized.
"""
# Shapes:  gh x gw = N patches, D width, H heads; a position table is ((2gh - 1)(2gw - 1) + 3, H)
import math

import numpy as np
import torch
import torch.nn.functional as F

from support.files import UserError

TABLE = "relative_position_bias_table"           # how the names of tables end


def sides(image_size):
    """(height, width) of an image size, which is one number for a square, else two."""
    return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)


def grid_of(image_size, patch_size):
    """Patches per column and per row.  image_size: int or (H, W), in pixels"""
    height, width = sides(image_size)
    if height % patch_size or width % patch_size:
        raise UserError(f"the image size {height}x{width} is not a multiple of the patch size "
                        f"{patch_size}: change one")
    return height // patch_size, width // patch_size


def geometric_offsets(source, target):
    """Where the offsets -(source-1) .. source-1 of the old grid lie on the axis of the new one.

    At 0, +-1, +-(1 + q), +-(1 + q + q^2), ...: near offsets matter most, so they stay where they
    are, and the steps grow by a ratio q such that 1 + q + ... + q^(source-2) = target - 1.
    Recipe, not in the paper: q by bisection in 1.01 .. 1.5, so the steps never shrink.
    """
    if source == target:
        return np.arange(1 - source, source, dtype=float)
    left = 1.01
    right = 1.5
    while right - left > 1e-6:
        q = (left + right) / 2
        if (1 - q ** (source - 1)) / (1 - q) > target - 1:
            right = q
        else:
            left = q
    positive = np.cumsum(q ** np.arange(source - 1))         # 1, 1 + q, 1 + q + q^2, ...
    return np.concatenate([-positive[::-1], [0.0], positive])


def resize_relative_table(table, source_grid, target_grid):
    """A relative-position table of another grid: a cubic spline per head.  (rows, H) -> (rows', H)

    The three rows of [CLS] are copied. This is what the released code does. timm (1.0.31) has the
    same geometric offsets but interpolates linearly: smooth tables from 14x14 to 24x24 differ by
    up to 2 %, the logits of a random base model at 384 by 0.3 %. To avoid that, resize with
    `python -m extras.convert --to timm --image-size` before timm has to.
    """
    if tuple(source_grid) == tuple(target_grid):
        return table
    sides = [2 * g - 1 for g in source_grid]
    if len(table) != 3 + math.prod(sides):
        raise UserError(f"a position table has {len(table)} rows, too many or too few for "
                        f"{source_grid[0]}x{source_grid[1]} patches: the file is damaged, or its "
                        f"`arch` is wrong")
    if min(source_grid) < 2:
        raise UserError(f"a grid of {source_grid[0]}x{source_grid[1]} patches has no offsets to "
                        f"interpolate between: keep the image size of these weights")
    from scipy.interpolate import RectBivariateSpline        # here, because it is slow to import
    y, x = [geometric_offsets(s, t) for s, t in zip(source_grid, target_grid, strict=True)]
    new_y, new_x = [np.arange(1 - t, t, dtype=float) for t in target_grid]
    degree = dict(kx=min(3, sides[0] - 1), ky=min(3, sides[1] - 1))
    heads = []
    for head in table[:-3].T.double().numpy():               # (rows - 3,)
        spline = RectBivariateSpline(y, x, head.reshape(sides), s=0, **degree)
        heads.append(torch.from_numpy(spline(new_y, new_x)).flatten())
    return torch.cat([torch.stack(heads, dim=1).to(table.dtype), table[-3:]])


def resize_pos_embed(pos_embed, source_grid, target_grid):
    """Absolute positions (1, 1 + N, D) of another grid: bicubic over the patches, [CLS] kept."""
    if tuple(source_grid) == tuple(target_grid):
        return pos_embed
    cls = pos_embed[:, :1]
    patches = pos_embed[:, 1:].unflatten(1, tuple(source_grid)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches.float(), size=tuple(target_grid), mode="bicubic",
                            align_corners=False)             # (1, D, gh, gw)
    return torch.cat([cls, patches.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)
