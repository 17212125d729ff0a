"""The Vision Transformer that every stage uses, written out by hand (BEiT v2, Section 2.1).

    image --patch_embed--> patches, [CLS] in front --block x depth--> tokens --norm--> read-out

One class serves as the tokenizer's encoder and decoder (absolute positions), as the backbone of
pre-training (one relative-position table that all blocks share) and as a classifier (one table
per block). Parameters have the names of the released checkpoints, so those load directly.

Read in this order: relative_position_index, Attention, Block, ViT, initialise. All stages import
from this file; it is no command itself.
"""
# Shapes:  B images, N = gh x gw patches, T = 1 + N tokens ([CLS] is the first), D width, H heads,
#          m tokens of each image that a block computes, if not all (queries)
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

IMAGENET_MEAN = 0.485, 0.456, 0.406
IMAGENET_STD = 0.229, 0.224, 0.225

PRESETS = {  # base and large: the appendix's tables of hyper-parameters; tiny and small: ours
    # tiny has to learn in minutes on a CPU, so it starts with larger weights. An init_std of 0.02
    # suits width 768. Width 128 needs 0.02 * sqrt(768 / 128) for activations of the same size.
    # With position tables of zeros all hidden patches look alike for hundreds of steps.
    "tiny": dict(image_size=48, patch_size=8, width=128, depth=6, heads=4, layer_scale=1.0,
                 init_std=0.05, position_std=2.0),
    "small": dict(image_size=224, patch_size=16, width=384, depth=12, heads=6, layer_scale=0.1),
    "base": dict(image_size=224, patch_size=16, width=768, depth=12, heads=12, layer_scale=0.1),
    "large": dict(image_size=224, patch_size=16, width=1024, depth=24, heads=16, layer_scale=1e-5),
}
# What --checkpoint-activations keeps of a block besides its input: the outputs of linear layers.
KEPT = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
# Recipe, not in the paper. torch's default, 1e-5, would change every token in the fourth digit.
LAYER_NORM_EPS = 1e-6


@functools.cache                             # one copy per device: each copy makes a GPU wait
def per_channel(values, device):
    return torch.tensor(values, device=device).view(3, 1, 1)                 # for (B, 3, H, W)


def imagenet_normalize(images):
    """Images (B, 3, H, W) in [0, 1] -> input of the backbone, by ImageNet's mean and std."""
    mean = per_channel(IMAGENET_MEAN, images.device)
    std = per_channel(IMAGENET_STD, images.device)
    return (images - mean) / std


# --- relative positions ---------------------------------------------------------------------------
def relative_position_index(gh, gw):
    """The row of the position table that each pair (query, key) of tokens reads.  -> (T, T) long

    The first (2gh-1)(2gw-1) rows belong to the offsets (dy, dx) between two patches. The last
    three rows belong to the pairs with [CLS].
    """
    y, x = torch.meshgrid(torch.arange(gh), torch.arange(gw), indexing="ij")
    y, x = y.flatten(), x.flatten()                          # (N,)
    dy = y[:, None] - y[None, :] + gh - 1                    # (N, N)  query - key, from 0 on
    dx = x[:, None] - x[None, :] + gw - 1
    rows = (2 * gh - 1) * (2 * gw - 1)
    index = torch.empty(1 + gh * gw, 1 + gh * gw, dtype=torch.long)
    index[1:, 1:] = dy * (2 * gw - 1) + dx
    index[0, :] = rows                                       # query [CLS], key any patch
    index[:, 0] = rows + 1                                   # query any patch, key [CLS]
    index[0, 0] = rows + 2                                   # [CLS] and itself
    return index


def position_table(grid, heads):
    """(2gh-1)(2gw-1) + 3 rows of H numbers, zero at the start: no position is preferred."""
    return nn.Parameter(torch.zeros((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, heads))


def position_bias(table, index):
    """What is added to the attention logits: table (rows, H), index (T, T) -> (H, T, T)

    On CUDA each query gets up to 7 padding keys, whose -inf keeps them out of the soft-max. The
    fused attention needs rows of a multiple of 8 numbers, or else copies the bias in every block.
    """
    bias = F.embedding(index, table).permute(2, 0, 1)
    if table.is_cuda:
        bias = F.pad(bias, (0, -len(index) % 8), value=-math.inf)            # (H, T, T + padding)
    return bias.contiguous()


# --- one block ------------------------------------------------------------------------------------
def attention_weights(q, k, bias=None):
    """softmax(q k^T / sqrt(D/H) + bias).  q, k (B, H, T, D/H), bias (H, T, T) -> (B, H, T, T)"""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:                                     # it is not scaled
        logits = logits + bias[..., :k.shape[2]]             # without the padding keys
    return logits.softmax(dim=-1)


def attention(q, k, v, bias=None):
    """softmax(q k^T / sqrt(D/H) + bias) v.  q, k, v (B, H, T, D/H) -> (B, H, T, D/H)"""
    # On a CPU, with a bias or with bfloat16, two plain products are faster than the fused kernel.
    if q.device.type == "cpu" and (bias is not None or q.dtype != torch.float32):
        return attention_weights(q, k, bias).to(v.dtype) @ v
    # Elsewhere one fused kernel computes the same and never stores the T x T weights.
    if bias is not None:
        padding = bias.shape[-1] - k.shape[2]                # the keys whose bias is -inf
        k = F.pad(k, (0, 0, 0, padding))
        v = F.pad(v, (0, 0, 0, padding))
        bias = bias.to(q.dtype).expand(len(q), -1, -1, -1)   # (B, H, T, T + padding)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class Attention(nn.Module):
    """Multi-head self-attention with a position bias on its logits.

    q and v have a bias vector. One for k would add the same number to all logits of a query,
    which does not change their soft-max.
    """

    def __init__(self, width, heads, grid=None):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        # With a grid the block has a table of its own (fine-tuning). Without, it has none.
        self.relative_position_bias_table = None if grid is None else position_table(grid, heads)

    def queries_keys_values(self, x):
        """(B, T, D) -> q, k, v, each (B, H, T, D/H)"""
        B, T, D = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)             # (B, T, 3D)
        return qkv.view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)

    def bias(self, index, shared):
        """The position bias (H, T, T): from the block's own table, else the one that is shared."""
        if self.relative_position_bias_table is None:
            return shared                                    # None with absolute positions
        return position_bias(self.relative_position_bias_table, index)

    def forward(self, x, index=None, shared=None, queries=None):
        """x (B, T, D), after LayerNorm -> (B, T, D), or (B, m, D) of the token numbers in queries.

        index (T, T): relative_position_index. shared (H, T, T): position_bias of the shared table.
        """
        q, k, v = self.queries_keys_values(x)
        bias = self.bias(index, shared)
        if queries is not None:              # (B, m): fewer queries, but each sees all T keys
            q = q.take_along_dim(queries[:, None, :, None], dim=2)           # (B, H, m, D/H)
            bias = None if bias is None else bias[:, queries].transpose(0, 1)    # (B, H, m, T)
        out = attention(q, k, v, bias)
        return self.proj(out.transpose(1, 2).flatten(2))     # (B, T, D), the heads side by side


class Mlp(nn.Module):
    """Two linear layers and the exact GELU (by tanh, the fourth digit would be another)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def drop_path(x, rate, training):
    """Stochastic depth: x (B, T, D) becomes 0 for a share `rate` of the images, by chance."""
    if rate == 0 or not training:
        return x
    keep = 1 - rate                          # x / keep: the mean over the draws stays x
    return x * (torch.rand(x.shape[0], 1, 1, device=x.device) < keep).to(x.dtype) / keep


class Block(nn.Module):
    """x + drop_path(gamma * f(norm(x))), first with f = attention, then with f = MLP."""

    def __init__(self, width, heads, mlp_ratio=4.0, layer_scale=0.1, drop_path=0.0, grid=None):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads, grid)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        # Layer scale: a learned factor per channel. If it is small, a block starts as identity.
        self.gamma_1 = self.gamma_2 = None
        if layer_scale > 0:
            self.gamma_1 = nn.Parameter(torch.full((width,), layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, x, index=None, shared=None, queries=None):
        """x (B, T, D) -> (B, T, D), or (B, m, D) of the token numbers in queries (B, m)."""
        attended = self.attn(self.norm1(x), index, shared, queries)
        if queries is not None:
            x = x.take_along_dim(queries[..., None], dim=1)  # (B, m, D)
        x = x + self.branch(attended, self.gamma_1)
        return x + self.branch(self.mlp(self.norm2(x)), self.gamma_2)

    def branch(self, y, gamma):
        """What is added to x: gamma * y, or 0 for the images that drop_path draws."""
        if gamma is not None:
            y = gamma * y
        return drop_path(y, self.drop_path, self.training)


# --- the model ------------------------------------------------------------------------------------
class PatchEmbed(nn.Module):
    """Cut the image into p x p patches and map each to D numbers: a convolution of stride p."""

    def __init__(self, patch_size, in_channels, width):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)       # (B, C, H, W) -> (B, N, D), by rows


class ViT(nn.Module):
    """Vision Transformer with the read-outs that BEiT v2 needs.

    image_size: in pixels, one number or (height, width). layer_scale: gamma at the start, 0: none.
    positions: "absolute" (a learned vector per token), "shared" (one relative table for all
        blocks) or "per_block" (a relative table in each).
    drop_path: rate of stochastic depth in the last block. num_classes: 0 for no head.
    pool: where the last LayerNorm sits. "mean": after the mean over the patches, without [CLS]
        (fc_norm). "cls" and None: on every token (norm); a classifier then reads [CLS].
    ValueError if the sides are not multiples of the patch size.
    """

    def __init__(self, image_size=224, patch_size=16, width=768, depth=12, heads=12, *,
                 in_channels=3, mlp_ratio=4.0, positions="per_block", layer_scale=0.1,
                 drop_path=0.0, pool="mean", num_classes=0, init_std=0.02, position_std=0.0):
        super().__init__()
        if isinstance(image_size, int):
            image_size = image_size, image_size
        height, breadth = image_size         # breadth: `width` is D
        if height % patch_size or breadth % patch_size:
            raise ValueError(f"image size {height}x{breadth} is not a multiple of the patch size "
                             f"{patch_size}")
        self.image_size = height, breadth
        self.patch_size = patch_size
        self.grid = height // patch_size, breadth // patch_size
        self.num_patches = self.grid[0] * self.grid[1]
        self.width = width
        self.depth = depth
        self.heads = heads
        self.in_channels = in_channels
        self.mlp_ratio = mlp_ratio
        self.positions = positions
        self.layer_scale = layer_scale
        self.pool = pool
        self.num_classes = num_classes
        self.checkpoint_activations = False                  # True: less memory, more work

        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = PatchEmbed(patch_size, in_channels, width)
        self.pos_embed = self.rel_pos_bias = index = None
        if positions == "absolute":
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, width))
        else:
            index = relative_position_index(*self.grid)
        if positions == "shared":
            table = position_table(self.grid, heads)
            self.rel_pos_bias = nn.ParameterDict({"relative_position_bias_table": table})
        self.register_buffer("relative_position_index", index, persistent=False)   # never saved
        # Rates of stochastic depth grow linearly from 0: all later blocks need the early ones.
        # "cpu": they are numbers even if the parameters are on "meta", which holds shapes only.
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        own_table = self.grid if positions == "per_block" else None
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, layer_scale, rate, own_table) for rate in rates)
        if pool == "mean":
            self.fc_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        else:
            self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        if num_classes > 0:
            self.head = nn.Linear(width, num_classes)
        initialise(self, init_std)
        rescale_residual_branches(self.blocks)
        for name, table in self.named_parameters():
            if position_std and name.endswith("relative_position_bias_table"):
                nn.init.normal_(table, std=position_std)     # ours, for tiny: see PRESETS

    def arch(self):
        """The sizes that a file states beside the weights: ViT(**model.arch()) has its shapes."""
        height, breadth = self.image_size
        image_size = height if height == breadth else (height, breadth)
        names = ("patch_size", "width", "depth", "heads", "in_channels", "mlp_ratio", "positions",
                 "layer_scale", "pool", "num_classes")
        return dict(image_size=image_size) | {name: getattr(self, name) for name in names}

    def embed(self, x, mask=None):
        """Images (B, C, H, W) -> tokens (B, T, D).  mask (B, N) bool: patches to hide.

        Only stage 2 hides patches, and only its BEiT (pretrain.py) has a mask_token.
        ValueError for images of another size than the model was built for.
        """
        if tuple(x.shape[-2:]) != self.image_size:
            raise ValueError(
                f"the model was built for {self.image_size[0]}x{self.image_size[1]} images, these "
                f"are {x.shape[-2]}x{x.shape[-1]}; build it with image_size and resize its tables")
        x = self.patch_embed(x)                              # (B, N, D)
        if mask is not None:
            # The mask token replaces the whole embedding, so nothing of the pixels is left.
            # [CLS] is put in front afterwards: it is never hidden.
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        cls = self.cls_token.expand(x.shape[0], -1, -1)
        x = torch.cat([cls.to(x.dtype), x], dim=1)           # (B, T, D)
        return x if self.pos_embed is None else x + self.pos_embed

    def shared_bias(self):
        """The position bias (H, T, T) of positions="shared", for all blocks; otherwise None."""
        if self.rel_pos_bias is None:
            return None
        table = self.rel_pos_bias.relative_position_bias_table
        return position_bias(table, self.relative_position_index)

    def run(self, block, x, shared, queries=None):
        """One block. With checkpoint_activations, backward computes all but KEPT once more."""
        inputs = x, self.relative_position_index, shared, queries
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return block(*inputs)
        keep = functools.partial(create_selective_checkpoint_contexts, KEPT)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=keep)

    def features(self, x, blocks=None, mask=None, shared=None, queries=None):
        """Outputs of the 0-based `blocks` (default: all), before any norm.  -> list of (B, T, D)

        shared: shared_bias(), if the caller has it already.
        queries (B, m): the last of these blocks computes only these tokens, (B, m, D).
        """
        if blocks is None:
            blocks = range(self.depth)
        wanted = [b % self.depth for b in blocks]            # -1 is the last block
        if shared is None:
            shared = self.shared_bias()
        x = self.embed(x, mask)
        last = max(wanted)                                   # later blocks need not run
        outputs = {}
        for i in range(last + 1):
            x = self.run(self.blocks[i], x, shared, queries if i == last else None)
            if i in wanted:
                outputs[i] = x
        return [outputs[i] for i in wanted]

    def pooled(self, x):
        """Normalised images -> the vector (B, D) that a classifier reads."""
        x, = self.features(x, blocks=[-1])
        if self.pool == "mean":
            return self.fc_norm(x[:, 1:].mean(dim=1))        # the mean first, then LayerNorm
        return self.norm(x)[:, 0]

    def forward(self, x):
        """Normalised images -> class logits (B, num_classes); without a head, tokens (B, T, D)."""
        if self.num_classes > 0:
            return self.head(self.pooled(x))
        x, = self.features(x, blocks=[-1])
        return self.fc_norm(x) if self.pool == "mean" else self.norm(x)


# --- initialisation -------------------------------------------------------------------------------
def initialise(module, std=0.02, cut=100.0, convolutions=False):
    """Truncated normal weights, zero biases: linear layers, [CLS], mask token, absolute positions.

    cut: values lie within `cut` standard deviations. Recipe, not in the paper: tokenizer and
    fine-tuning have 100, which cuts nothing, and leave the patch convolution as torch makes it.
    Pre-training has 1 and convolutions=True. A normal that is cut at one standard deviation has
    0.54 of its std: the weights of base have 0.0108, not 0.02.
    """
    for m in module.modules():
        if isinstance(m, nn.Linear) or (convolutions and isinstance(m, nn.Conv2d)):
            nn.init.trunc_normal_(m.weight, std=std, a=-cut * std, b=cut * std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    for name in ("cls_token", "pos_embed", "mask_token"):
        vector = getattr(module, name, None)
        if vector is not None:
            nn.init.trunc_normal_(vector, std=std, a=-cut * std, b=cut * std)


@torch.no_grad()
def rescale_residual_branches(blocks, first_layer=1):
    """Divide the last weights of both branches of a block by sqrt(2 * layer), layers from 1 on.

    Recipe, not in the paper. Each layer adds two branches to x. The variance of x then grows like
    the logarithm of the depth. Without the division it would grow like the depth.
    """
    for layer, block in enumerate(blocks, start=first_layer):
        block.attn.proj.weight.div_(math.sqrt(2.0 * layer))
        block.mlp.fc2.weight.div_(math.sqrt(2.0 * layer))
