"""The plain versions of what the stages compute in a faster way, to compare time and memory with.

Here every matrix of the equations is written out in memory. The results are the same.
"""
import contextlib
import math

import torch
import torch.nn.functional as F

import model
import vqkd
from support.process import keep_freed_memory


def attention(q, k, v, bias=None):
    """softmax(q k^T / sqrt(D/H) + bias) v, with the T x T weights of every head stored."""
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if bias is not None:
        logits = logits + bias[..., :logits.shape[-1]]
    return logits.softmax(dim=-1).to(v.dtype) @ v


def run(self, block, x, shared, queries=None):
    """ViT.run: a block computes all of its tokens. Those that nobody reads are dropped after."""
    x = block(x, self.relative_position_index, shared)
    if queries is None:
        return x
    return x.take_along_dim(queries[..., None], dim=1)


def nearest_code(h, codebook):
    """argmin of || h - v ||^2 = h^2 + v^2 - 2 h v, over the matrix of all distances (n, K)."""
    with torch.autocast(h.device.type, enabled=False):
        x = vqkd.l2(h.float()).flatten(0, -2)
        v = vqkd.l2(codebook.float())
        distance = x.pow(2).sum(dim=1, keepdim=True) + v.pow(2).sum(dim=1) - 2 * x @ v.T
        return distance.argmin(dim=1).view(h.shape[:-1])


def code_sums(h, z, codes):
    """Sums and numbers per code through a one-hot matrix (n, K), as in the released code."""
    one_hot = F.one_hot(z.flatten(), codes).float()
    return one_hot.T @ h.detach().float().flatten(0, -2), one_hot.sum(dim=0)


SWAPS = [(model, "attention", attention), (model.ViT, "run", run),
         (vqkd, "nearest_code", nearest_code), (vqkd, "code_sums", code_sums)]


@contextlib.contextmanager
def plain(on=True):
    """Inside, the plain versions stand in for ours. on=False: nothing changes."""
    with contextlib.ExitStack() as stack:
        if on:
            for owner, name, function in SWAPS:
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, function)
            stack.callback(keep_freed_memory)
            keep_freed_memory(False)
        yield
