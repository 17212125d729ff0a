"""Learning rates and parameter groups: the same in every stage."""
import math

import torch


def cosine_schedule(step, base, final, total, warmup=0):
    """The learning rate of a step: linear warm-up from 0, then half a cosine from base to final.

    Recipe, not in the paper: step 0 has rate 0 exactly. The peak occurs twice, at the steps
    warmup - 1 and warmup. `final` is approached, never reached.
    """
    if step < warmup:
        return base * step / max(1, warmup - 1)
    progress = (step - warmup) / (total - warmup)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def param_groups(named, weight_decay, skip=("cls_token", "pos_embed"), layer_id=None,
                 layer_decay=1.0, depth=0):
    """AdamW groups.  named: (name, parameter) pairs -> list of dicts with params and lr_scale

    Recipe, not in the paper: 1-D parameters, biases and the names in `skip` have no weight decay.
    mask_token and the relative-position tables ARE decayed.
    Layer decay: a parameter of layer i learns at  lr * layer_decay^(depth + 1 - i).  layer_id(name)
    gives i: 0 for the embeddings, depth + 1 for the head. Without it all learn at one rate.
    """
    groups = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        last_part = name.rsplit(".", 1)[-1]
        no_decay = parameter.ndim == 1 or last_part == "bias" or last_part in skip
        layer = depth + 1 if layer_id is None else layer_id(name)
        if (layer, no_decay) not in groups:
            groups[layer, no_decay] = dict(
                params=[], names=[], weight_decay=0.0 if no_decay else weight_decay,
                lr_scale=layer_decay ** (depth + 1 - layer))
        groups[layer, no_decay]["params"].append(parameter)
        groups[layer, no_decay]["names"].append(name)
    return list(groups.values())


def adamw(groups, betas, device):
    """AdamW whose rate is set at every step by set_lr."""
    # Recipe, not in the paper: eps 1e-8. Differs from the recipe in rounding: fused, one kernel
    # updates all parameters, which is faster.
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=fused)


def set_lr(optimizer, lr):
    """Give each group the rate of the schedule times its lr_scale.

    Layer decay therefore scales the smallest rate of the schedule, too.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
