"""Learning rates and parameter groups: the same in every stage."""
import math

import torch


def cosine_schedule(step, base, final, total, warmup=0, start=0.0):
    """Linear warm-up from `start`, then a half cosine from `base` towards `final`.

    Recipe, not in the paper: step 0 has rate `start` exactly, the peak comes twice (steps
    warmup - 1 and warmup), and `final` is approached only.
    """
    if step < warmup:
        if warmup == 1:
            return start
        return start + (base - start) * step / (warmup - 1)
    progress = (step - warmup) / (total - warmup)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def param_groups(named, weight_decay, skip=("cls_token", "pos_embed"), layer_id=None, layer_decay=1.0, depth=0):
    """AdamW groups: no weight decay for 1-D parameters, biases and the names in `skip`.

    mask_token and relative-position tables ARE decayed. With layer_decay < 1 layer i learns at
    lr_scale = layer_decay ** (depth + 1 - i); layer_id(name) gives i (0: embeddings, depth + 1: head).
    """
    groups = {}
    for name, p in named:
        if not p.requires_grad:
            continue
        last_part = name.rsplit(".", 1)[-1]
        no_decay = p.ndim == 1 or name.endswith(".bias") or name in skip or last_part in skip
        layer = depth + 1 if layer_id is None else layer_id(name)
        group = groups.setdefault((layer, no_decay), dict(
            params=[], names=[], weight_decay=0.0 if no_decay else weight_decay,
            lr_scale=layer_decay ** (depth + 1 - layer)))
        group["params"].append(p)
        group["names"].append(name)
    return list(groups.values())


def adamw(groups, betas, device):
    # Recipe, not in the paper: eps 1e-8. Fused: one kernel for all parameters.
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=device.type in ("cpu", "cuda"))


def set_lr(optimizer, lr):
    """The rate of the schedule times each group's lr_scale (layer decay scales the minimum, too)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
