"""Small checkpoints for tests: names, wrappers and by-catch are those of the real ones."""

import argparse

import torch
from torch import nn

import vqkd
from model import ViT, relative_position_index
from pretrain import BEiT
from support import weights

SIZES = dict(image_size=32, patch_size=8, width=24, depth=2, heads=3)


def randomise(state, seed=0):
    """The same names with random numbers, biases and norms too, so that a forgotten one shows."""
    g = torch.Generator().manual_seed(seed)
    return {k: 0.3 * torch.randn(v.shape, generator=g) for k, v in state.items()}


def pretrained(released_index=False, **changes):
    """The names of pre-training: code head, mask token, shallow head, one shared table."""
    vit = ViT(**(SIZES | changes), positions="shared", pool=None)
    state = dict(vit.state_dict())
    state |= {f"cls_pt_layers.0.{k}": v for k, v in vit.blocks[0].state_dict().items()}
    state |= {"mask_token": torch.zeros(1, 1, 24)}
    state |= {"lm_head.weight": torch.zeros(20, 24), "lm_head.bias": torch.zeros(20)}
    state = randomise(state)
    if released_index:
        state["rel_pos_bias.relative_position_index"] = vit.relative_position_index
    return state


def finetuned(classes=5, pool="mean"):
    return randomise(ViT(**SIZES, pool=pool, num_classes=classes).state_dict(), seed=1)


def tokenizer():
    vit = ViT(**SIZES, positions="absolute", layer_scale=0.0)
    state = {f"encoder.{k}": v for k, v in vit.state_dict().items()}
    state |= {f"decoder.{k}": v for k, v in vit.state_dict().items()}
    state |= {
        "quantize.embedding.weight": torch.zeros(16, 8),
        "encode_task_layer.0.weight": torch.zeros(24, 24),
        "decode_task_layer.0.weight": torch.zeros(24, 24),
    }
    return randomise(state, seed=2)


def images(height=32, width=32):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(3))


# --- files with the names of the released ones ----------------------------------------------------
def with_index(state):
    """As released: the index buffer beside every position table."""
    full = {}
    for k, v in state.items():
        full[k] = v
        if k.endswith("relative_position_bias_table"):
            full[k.replace("bias_table", "index")] = relative_position_index(4, 4)
    return full


def released_tokenizer(decoder_depth, teacher_dim):
    """With a copy of the teacher, its scaling layer and dead entries, as published."""
    model = vqkd.VQKD(
        32, 8, 64, 2, 1, decoder_depth, codes=16, code_dim=8, teacher_dims=(teacher_dim,)
    )
    state = randomise(model.state_dict(), seed=4)
    return dict(
        model=state
        | {
            "quantize.embedding.cluster_size": torch.zeros(16),
            "quantize.embedding.embed_avg": torch.rand(16, 8),
            "quantize.embedding.initted": torch.ones(1),
            "teacher_model.visual.conv1.weight": torch.rand(8, 3, 4, 4),
            "scaling_layer.shift": torch.rand(1, 3, 1, 1),
        }
    )


def released_pretrain(**changes):
    model = BEiT(32, 8, 24, 2, 3, codes=20, early_layer=1, **changes)
    return dict(model=with_index(randomise(model.state_dict(), seed=5)))


class ConvModule(nn.Sequential):
    def __init__(self, inputs, outputs, kernel):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(inputs, outputs, kernel, bias=False), nn.BatchNorm2d(outputs)


def upernet(width=24, channels=12, classes=7):
    """A segmentation network as mmseg names it."""
    vit = ViT(**SIZES, pool=None)
    del vit.norm
    up = [nn.ConvTranspose2d(width, width, 2, 2) for _ in range(3)]
    vit.fpn1, vit.fpn2 = (
        nn.Sequential(up[0], nn.BatchNorm2d(width), nn.GELU(), up[1]),
        nn.Sequential(up[2]),
    )
    head, auxiliary = nn.Module(), nn.Module()
    head.psp_modules = nn.ModuleList(
        nn.Sequential(nn.AdaptiveAvgPool2d(n), ConvModule(width, channels, 1)) for n in (1, 2, 3, 6)
    )
    head.bottleneck = ConvModule(width + 4 * channels, channels, 3)
    head.lateral_convs = nn.ModuleList(ConvModule(width, channels, 1) for _ in range(3))
    head.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in range(3))
    head.fpn_bottleneck, head.conv_seg = (
        ConvModule(4 * channels, channels, 3),
        nn.Conv2d(channels, classes, 1),
    )
    auxiliary.convs = nn.ModuleList([ConvModule(width, 5, 3)])
    auxiliary.conv_seg = nn.Conv2d(5, classes, 1)
    whole = nn.ModuleDict(dict(backbone=vit, decode_head=head, auxiliary_head=auxiliary))
    state = {
        k: v if v.dtype == torch.long else 0.3 * torch.randn(v.shape)
        for k, v in whole.state_dict().items()
    }
    return dict(state_dict=with_index(state), meta=dict(CLASSES=("wall", "sky"), time="now"))


RELEASED = {  # what the release holds: (kind, the file without its by-catch)
    "tokenizer, 1 layer, CLIP": ("vqkd", lambda: released_tokenizer(1, 512)),
    "tokenizer, 3 layers, CLIP": ("vqkd", lambda: released_tokenizer(3, 512)),
    "tokenizer, 1 layer, DINO": ("vqkd", lambda: released_tokenizer(1, 768)),
    "pt1k": ("pretrain", released_pretrain),
    "pt1k, separate head": ("pretrain", lambda: released_pretrain(shared_head=False)),
    "pt1k, no aggregation": ("pretrain", lambda: released_pretrain(head_depth=0)),
    "ft21k": ("finetune", lambda: dict(model=with_index(finetuned(classes=218)))),
    "ft1k": ("finetune", lambda: dict(module=with_index(finetuned(classes=10)))),
    "ft1k, [CLS]": ("finetune", lambda: dict(model=with_index(finetuned(classes=10, pool="cls")))),
    "UPerNet": ("segment", upernet),
}
ARGS = dict(
    lr=1.5e-3,
    epochs=1600,
    opt_betas=[0.9, 0.999],
    data_path="/imagenet",
    distributed=True,
    clip_grad=None,
)


def released_file(name, path):
    """Write it as published: with a Namespace, optimiser state, counters.  -> path, tensors"""
    contents = RELEASED[name][1]() | dict(
        args=argparse.Namespace(**ARGS),
        epoch=7,
        scaler=dict(scale=1.0),
        optimizer=dict(
            state={0: dict(step=3, exp_avg=torch.rand(2))}, param_groups=[dict(lr=0.1, params=[0])]
        ),
    )
    torch.save(contents, path)
    return path, weights.unwrap(contents)


def same_tensors(a, b):
    """Equal names, numbers and precision."""
    if a.keys() != b.keys():
        return False
    return all(torch.equal(v, b[k]) and v.dtype == b[k].dtype for k, v in a.items())
