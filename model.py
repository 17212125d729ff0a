"""The Vision Transformer that every stage shares, written out by hand (BEiT v2, arXiv 2208.06366, Sections 2.1 to 2.3).

    image --patch_embed--> patches, [CLS] in front --block x depth--> tokens --norm--> read-out

One class serves as tokenizer encoder and decoder (absolute positions), as pre-training backbone (one relative-position
table shared by all blocks) and as classifier (one table per block). Parameters carry the names of the released
checkpoints, so that those load without translation. Read in this order: Attention, Block, ViT.
"""
# Shapes used in this file:  B images, gh x gw = N patches, T = 1 + N tokens with [CLS] first, D width, H heads

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

PRESETS = {              # base, large: REFERENCE.md section 3; tiny (for a CPU) and small are ours
    # tiny must learn in minutes. A std of 0.02 is made for width 768: width 128 needs 0.02 * sqrt(768 / 128) for the
    # same size of activations. And tables that start at zero make all hidden patches alike for hundreds of steps.
    "tiny": dict(image_size=48, patch_size=8, width=128, depth=6, heads=4, layer_scale=1.0, init_std=0.05,
                 position_std=2.0),
    "small": dict(image_size=224, patch_size=16, width=384, depth=12, heads=6, layer_scale=0.1),
    "base": dict(image_size=224, patch_size=16, width=768, depth=12, heads=12, layer_scale=0.1),
    "large": dict(image_size=224, patch_size=16, width=1024, depth=24, heads=16, layer_scale=1e-5),
}
LAYER_NORM_EPS = 1e-6    # Recipe, not in the paper; torch's default of 1e-5 shows in the fourth digit of every token


def imagenet_normalize(images):
    """The backbone's door: images (B, 3, H, W) in [0, 1] to zero mean and unit variance per ImageNet channel."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1)
    return (images - mean) / std


# ------------------------------------------------------------------------------------------------ relative positions
def relative_position_index(gh, gw):
    """Which row of the relative-position table each (query, key) pair of tokens reads.  -> (T, T) long, T = 1 + gh * gw

    Rows 0 .. (2gh-1)(2gw-1)-1 hold the bias of one patch offset (dy, dx) each; the last three rows are for [CLS].
    """
    y, x = torch.meshgrid(torch.arange(gh), torch.arange(gw), indexing="ij")
    y, x = y.flatten(), x.flatten()                          # (N,)
    dy = y[:, None] - y[None, :] + gh - 1                    # (N, N)   query minus key, shifted to start at 0
    dx = x[:, None] - x[None, :] + gw - 1
    rows = (2 * gh - 1) * (2 * gw - 1)
    index = torch.empty(1 + gh * gw, 1 + gh * gw, dtype=torch.long)
    index[1:, 1:] = dy * (2 * gw - 1) + dx
    index[0, :] = rows                                       # [CLS] asks any patch
    index[:, 0] = rows + 1                                   # any patch asks [CLS]
    index[0, 0] = rows + 2                                   # [CLS] asks itself
    return index


def position_bias(table, index):
    """Spread the table (rows, H) over all token pairs: (H, T, T), to be added to the attention logits."""
    if table.is_cuda:        # its fused attention wants rows of 8 k numbers and would copy the bias in every block
        index = F.pad(index, (0, -len(index) % 8))           # (T, T + padding): Attention leaves the padding out
    return F.embedding(index, table).permute(2, 0, 1).contiguous()


def select(x, tokens):
    """Of every image b the rows tokens[b].  x (B, T, ...), tokens (B, m) long -> (B, m, ...)"""
    rows = tokens + x.shape[1] * torch.arange(len(x), device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, tokens.shape)


def position_table(grid, heads):
    """One row per offset between two patches of the grid, and three for [CLS]; starts at zero, without preference."""
    return nn.Parameter(torch.zeros((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, heads))


class RelativePositionBias(nn.Module):
    """One table for all blocks, as in pre-training: the bias is then built once per step."""

    def __init__(self, grid, heads):
        super().__init__()
        self.relative_position_bias_table = position_table(grid, heads)

    def forward(self, index):
        return position_bias(self.relative_position_bias_table, index)


# ----------------------------------------------------------------------------------------------------------- a block
class Attention(nn.Module):
    """Multi-head self-attention with a position bias on its logits. q and v have a bias vector, k has none:
    the same number added to every key's logit would leave the soft-max unchanged."""

    def __init__(self, width, heads, grid=None):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        # A grid means a table of this block's own (fine-tuning); without one there is a shared table, or none.
        self.relative_position_bias_table = None if grid is None else position_table(grid, heads)

    def queries_keys_values(self, x):
        B, T, D = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)             # (B, T, 3D)
        return qkv.view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, H, T, D/H)

    def bias(self, index, shared):
        """The position bias (H, T, T) of this block: its own table, the table all blocks share, or None."""
        return shared if self.relative_position_bias_table is None else position_bias(
            self.relative_position_bias_table, index)

    def forward(self, x, index=None, shared=None, only=None):
        """Tokens (B, T, D), normalised -> (B, T, D). With only (B, m): those of (B, m) tokens, which look at all T."""
        q, k, v = self.queries_keys_values(x)
        bias = self.bias(index, shared)
        if only is not None:
            q = select(q.transpose(1, 2), only).transpose(1, 2)                              # (B, H, m, D/H)
            bias = None if bias is None else bias[:, only].transpose(0, 1)                   # (B, H, m, T)
        if q.device.type != "cpu" or (bias is None and q.dtype == torch.float32):
            # softmax(q k^T / sqrt(D/H) + bias) v in one fused kernel, which never stores the T x T weights
            bias = None if bias is None else bias.to(q.dtype)[..., :k.shape[2]].expand(len(q), -1, -1, -1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:                # a CPU is faster with the plain products: its fused kernel knows no bias with a gradient
            out = attention_weights(q, k, bias).to(v.dtype) @ v
        return self.proj(out.transpose(1, 2).flatten(2))     # (B, T, D)

    def weights(self, x, index=None, shared=None):
        """The soft-max output (B, H, T, T) itself: what attends to what. For pictures."""
        q, k, _ = self.queries_keys_values(x)
        return attention_weights(q, k, self.bias(index, shared))


def attention_weights(q, k, bias=None):
    """softmax(q k^T / sqrt(D/H) + bias): q is scaled first, the bias is not.  2 x (B, H, T, D/H) -> (B, H, T, T)"""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (logits if bias is None else logits + bias[..., :logits.shape[-1]]).softmax(dim=-1)


class Mlp(nn.Module):
    """Two linear layers with the exact GELU (the tanh approximation differs from the fourth digit on)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def drop_path(x, rate, training):
    """Stochastic depth: skip a whole residual branch for a random share `rate` of the samples, rescale the others."""
    if rate == 0 or not training:
        return x
    keep = 1 - rate
    return x * (torch.rand(x.shape[0], 1, 1, device=x.device) < keep).to(x.dtype) / keep


class Block(nn.Module):
    """x + droppath(gamma * f(norm x)), once with attention and once with the MLP."""

    def __init__(self, width, heads, mlp_ratio=4.0, layer_scale=0.1, drop_path=0.0, grid=None):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads, grid)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        # Layer scale: a learned gain per channel that starts small, so that a deep network starts near the identity.
        self.gamma_1 = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale > 0 else None
        self.gamma_2 = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale > 0 else None

    def forward(self, x, index=None, shared=None, only=None):
        """x (B, T, D) -> (B, T, D), or (B, m, D) where only (B, m) says which tokens are wanted of the last block."""
        attended = self.attn(self.norm1(x), index, shared, only)
        x = x if only is None else select(x, only)
        x = x + drop_path(attended if self.gamma_1 is None else self.gamma_1 * attended, self.drop_path, self.training)
        mixed = self.mlp(self.norm2(x))
        return x + drop_path(mixed if self.gamma_2 is None else self.gamma_2 * mixed, self.drop_path, self.training)


# --------------------------------------------------------------------------------------------------------- the model
class PatchEmbed(nn.Module):
    """Cut the image into p x p patches and map each linearly to D numbers: a convolution whose stride is its size."""

    def __init__(self, patch_size, in_channels, width):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)       # (B, C, H, W) -> (B, N, D), row by row


def keep_products():
    """What --checkpoint-activations keeps of a block besides its input: the outputs of its linear layers."""
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default, torch.ops.aten.addmm.default])


class ViT(nn.Module):
    """Vision Transformer with the read-outs that BEiT v2 needs.

    drop_path: stochastic-depth rate of the last block.
    positions: "absolute" (a learned vector per token), "shared" (one relative table for all blocks) or "per_block".
    pool: where the final LayerNorm sits. "mean": fc_norm AFTER the mean over patches ([CLS] left out), or on every
    token if there is no head; "cls" and None: norm on every token, the head then reads [CLS].
    """

    def __init__(self, image_size=224, patch_size=16, width=768, depth=12, heads=12, *, in_channels=3, mlp_ratio=4.0,
                 positions="per_block", layer_scale=0.1, drop_path=0.0, pool="mean", num_classes=0,
                 init_std=0.02, position_std=0.0):
        super().__init__()
        height, breadth = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % patch_size or breadth % patch_size:
            raise ValueError(f"image size {height}x{breadth} is not a multiple of the patch size {patch_size}")
        if positions not in ("absolute", "shared", "per_block"):
            raise ValueError(f"positions must be absolute, shared or per_block, not {positions!r}")
        self.image_size, self.patch_size = (height, breadth), patch_size
        self.width, self.depth, self.heads, self.mlp_ratio = width, depth, heads, mlp_ratio
        self.grid = (height // patch_size, breadth // patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        self.layer_scale, self.positions, self.pool, self.num_classes = layer_scale, positions, pool, num_classes
        self.checkpoint_activations = False                  # True: less memory, a little more work

        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, width)) if positions == "absolute" else None
        self.patch_embed = PatchEmbed(patch_size, in_channels, width)
        self.rel_pos_bias = RelativePositionBias(self.grid, heads) if positions == "shared" else None
        index = None if positions == "absolute" else relative_position_index(*self.grid)
        self.register_buffer("relative_position_index", index, persistent=False)         # derived, so never saved
        # Stochastic depth grows linearly with depth: early blocks are needed by everything above them.
        own_table = self.grid if positions == "per_block" else None
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, layer_scale, rate, own_table)
                                    for rate in torch.linspace(0, drop_path, depth, device="cpu").tolist())
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
                nn.init.normal_(table, std=position_std)     # ours, for tiny: each head with its own neighbours

    def arch(self):
        """The sizes that a file of weights states beside them."""
        height, breadth = self.image_size
        return dict(image_size=height if height == breadth else (height, breadth), patch_size=self.patch_size,
                    width=self.width, depth=self.depth, heads=self.heads, mlp_ratio=self.mlp_ratio,
                    positions=self.positions, layer_scale=self.layer_scale, pool=self.pool,
                    num_classes=self.num_classes)

    def embed(self, x, mask=None):
        """Image (B, C, H, W) to tokens (B, T, D). mask (B, N) bool: patches replaced by mask_token (pre-training)."""
        if tuple(x.shape[-2:]) != self.image_size:
            raise ValueError(f"the model was built for {self.image_size[0]}x{self.image_size[1]} images, "
                             f"these are {x.shape[-2]}x{x.shape[-1]}; build it with image_size and resize its tables")
        x = self.patch_embed(x)                              # (B, N, D)
        if mask is not None:
            # The embedding is replaced, not the pixels, and before [CLS] is put in front: [CLS] is never hidden.
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        return x if self.pos_embed is None else x + self.pos_embed

    def shared_bias(self):
        return None if self.rel_pos_bias is None else self.rel_pos_bias(self.relative_position_index)

    def run(self, block, x, shared, only=None):
        """One block. Checkpointed, it keeps its input and what its linear layers gave for the backward pass, and then
        computes the rest again: norms, attention, GELU."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(block, x, self.relative_position_index, shared, only, use_reentrant=False,
                              context_fn=keep_products)
        return block(x, self.relative_position_index, shared, only)

    def features(self, x, blocks=None, mask=None, shared=None, only=None):
        """Raw outputs (B, T, D), before any norm, of the 0-based `blocks` asked for (default: every one), in order.
        only (B, m): the uppermost of them gives (B, m, D), these tokens; the work for its others is saved."""
        wanted = range(self.depth) if blocks is None else [b % self.depth for b in blocks]
        shared = self.shared_bias() if shared is None else shared        # built once per step, not once per block
        x, outputs = self.embed(x, mask), {}
        for i in range(max(wanted) + 1):                     # blocks above the last one asked for need not run
            x = self.run(self.blocks[i], x, shared, only if i == max(wanted) else None)
            if i in wanted:
                outputs[i] = x
        return [outputs[i] for i in wanted]

    def pooled(self, x):
        """What the head reads of normalised images: one vector (B, D) each."""
        x, = self.features(x, blocks=[-1])
        if self.pool == "mean":
            return self.fc_norm(x[:, 1:].mean(dim=1))        # mean over patches first, LayerNorm after
        return self.norm(x)[:, 0]

    def forward(self, x):
        """Class logits (B, num_classes) where there is a head, else normalised tokens (B, T, D). x is normalised."""
        if self.num_classes > 0:
            return self.head(self.pooled(x))
        x, = self.features(x, blocks=[-1])
        return self.fc_norm(x) if self.pool == "mean" else self.norm(x)

    def attention_weights(self, x, block=-1):
        """Attention of one block (B, H, T, T), each row summing to 1; nothing is masked."""
        block, shared = block % self.depth, self.shared_bias()
        x = self.embed(x) if block == 0 else self.features(x, blocks=[block - 1])[0]
        layer = self.blocks[block]
        return layer.attn.weights(layer.norm1(x), self.relative_position_index, shared)


# ---------------------------------------------------------------------------------------------------- initialisation
def initialise(module, std=0.02, cut=100.0, convolutions=False):
    """Truncated normal weights and zero biases for every linear layer inside `module`, and for its token vectors.

    cut: values lie within `cut` standard deviations. Stage 1 and fine-tuning: 100 (values cut at +-2, that is, not at
    all) and the patch convolution stays at the framework's default. Stage 2: 1, patch convolution included; a normal
    cut at one standard deviation has only 0.54 of its spread, so the real std is 0.0108.  (Recipe, not in the paper.)
    """
    for m in module.modules():
        if isinstance(m, nn.Linear) or (convolutions and isinstance(m, nn.Conv2d)):
            nn.init.trunc_normal_(m.weight, std=std, a=-cut * std, b=cut * std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.LayerNorm):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
    for name in ("cls_token", "pos_embed", "mask_token"):
        if getattr(module, name, None) is not None:
            nn.init.trunc_normal_(getattr(module, name), std=std, a=-cut * std, b=cut * std)


@torch.no_grad()
def rescale_residual_branches(blocks, first_layer=1):
    """Divide what each block adds to the stream by sqrt(2 * layer), layer counted from 1 (recipe, not in the paper):
    two branches a block, so the stream's variance stays level with depth."""
    for layer, block in enumerate(blocks, start=first_layer):
        block.attn.proj.weight.div_(math.sqrt(2.0 * layer))
        block.mlp.fc2.weight.div_(math.sqrt(2.0 * layer))


def count_parameters(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
