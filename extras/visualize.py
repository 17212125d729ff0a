"""Pictures of what the tokens mean and of what the runs did, and a page that shows them all.

    vqkd.pt     --> codes, where, usage, tokens, pixels      what a code stands for, where it occurs, what it keeps
    pretrain.pt --> prediction, attention                    what the backbone makes of hidden patches, where it looks
    *.jsonl     --> curves

    python visualize.py                                      # runs/tiny -> runs/tiny/figures/index.html, a minute
    python visualize.py runs/NAME --images dog.jpg           # that run, shown on your own image or folder of images
    python visualize.py runs/NAME --only codes --codes 3 17  # single pictures
    python visualize.py runs/a/vqkd.jsonl runs/b/vqkd.jsonl --out curves.png     # several runs' curves in one picture

Read in this order: code_colours, patches_of_code, mean_patches, load_beit, PixelDecoder, then any draw_ function.
"""
# Shapes used in this file:  n images, N = gh x gw patches of p x p pixels per image, K codes, D code width, H heads
import argparse
import collections
import html
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from support import data, engine, transforms, weights
from support.images import open_images
from model import imagenet_normalize
from pretrain import BEiT, accuracy, sample_block_mask
from vqkd import codebook_usage, l2, load_tokenizer

PICTURES = {             # name: (what it needs, heading, what one sees and what to look for)
    "codes": ("tokenizer", "What a code stands for",
              "A row is one code: first the average of its patches, then patches that were given this code, each "
              "(outlined) in its own surroundings and each from another image, drawn by lot, not chosen. Look for what "
              "the patches of a row share: the better the tokenizer, the more it is content, and not colour or light."),
    "tokens": ("tokenizer", "Images as the tokenizer sees them",
               "Beside each image its token map: one code per patch. A colour belongs to a code, in every picture of "
               "this tokenizer, and similar colours are codes whose vectors are near to each other. Look for outlines "
               "that survive in the map, and for background that gets few codes."),
    "prediction": ("both", "What the backbone makes of hidden patches",
                   "Patches are hidden, and the backbone names their codes, which are drawn as the average patch of "
                   "the code: green frames are right, red ones wrong. Look at the wrong ones: are they near misses? "
                   "The [CLS] head sees nothing of the late layers but [CLS] and should do about as well."),
    "attention": ("backbone", "Where [CLS] looks",
                  "How much each head of one block draws from each patch when it makes its summary of the image. "
                  "Bright is much; every map has its own scale, and its title says how many times the "
                  "uniform share its brightest patch gets. Look for heads that pick out the object, and for heads that "
                  "only know places."),
    "where": ("tokenizer", "Where on the grid each code occurs",
              "One map per code, bright where it is frequent; the swatch is its colour in the token maps. A code of "
              "content turns up wherever the content does; codes that live at an edge or at one place have learned "
              "the position, which makes them easy to predict and of little worth."),
    "usage": ("tokenizer", "How the codebook is used",
              "A bar is the share of all patches that got the code. A healthy codebook lies near the dashed line; a "
              "collapsed one is a few tall bars and many dead codes, and its perplexity (how many codes it is worth) "
              "is far below K."),
    "pixels": ("tokenizer", "Pixels back from tokens, an aid for the eye",
               "Images that the decoder did not learn from, the average patch of each of their tokens, and what the "
               "decoder makes of the tokens. It was trained for this picture, afterwards and on frozen codes, and is "
               "no part of the method: VQ-KD never reconstructs pixels. Look for what comes back (outlines) and what "
               "the tokens let go."),
    "curves": ("logs", "How training went",
               "Thin lines are training, dots held-out images. Look for a loss well below the dotted line of a blind "
               "guess, for hidden patches named right more often than the trivial guessers (dashed) do, and for a "
               "perplexity that does not fall to a few codes."),
}
PANELS = {               # key of the log: (title, keys of its first or its held-out lines that a blind guesser gets)
    "cosine": ("cosine to the teacher", {}),
    "perplexity": ("perplexity of the codes (how many are in use)", {}),
    "loss_mim": ("loss at hidden patches, last layer, Eq. (3)", {"chance": "a blind guess, ln K"}),
    "loss_cls": ("loss at hidden patches, [CLS] head, Eq. (4)", {"chance": "a blind guess, ln K"}),
    "mask_acc": ("hidden patches named right, percent", {"guess_position": "commonest code of the place",
                                                         "guess_nearest": "code of the nearest visible patch"}),
    "top1": ("top-1, percent", {}),
}
BLIND = ("This tokenizer learned from HOG, for which light on dark and dark on light are the same. So patches are "
         "turned over (light for dark) until they agree before they are averaged, and turned to fit where shown.")
# What the tokenizer says of a set of images: images (n, 3, H, W) uint8, z (n, gh, gw) token ids.
Tokens = collections.namedtuple("Tokens", "images z")


# --- what a code looks like -------------------------------------------------------------------------------------------
def code_colours(codebook):
    """A colour per code, (K, D) -> (K, 3) in [0, 1]: a function of the codebook alone, whatever images are shown.

    The three directions in which the unit code vectors differ most become red, green and blue, so that near codes look
    alike. Ranks instead of values, so that the colours are spread evenly.
    """
    v = l2(codebook.detach().cpu().double())
    axes = torch.linalg.svd(v - v.mean(dim=0), full_matrices=False).Vh[:3]               # (3, D)
    strongest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    scores = (v - v.mean(dim=0)) @ (axes * strongest.sign()).T                           # an axis has no sign: fix it
    ranks = scores.argsort(dim=0, stable=True).argsort(dim=0).double() / max(1, len(v) - 1)
    return (0.08 + 0.87 * F.pad(ranks, (0, 3 - ranks.shape[1]), value=0.5)).numpy()


def patches_of_code(z, code, count, seed=0):
    """Up to `count` patches with this code, drawn by lot, each from another image.  z (n, gh, gw) -> [(image, y, x)]"""
    found = (z == code).nonzero()
    found = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))].tolist()
    return list({image: (image, y, x) for image, y, x in reversed(found)}.values())[::-1][:count]


def cut_patches(images, grid):
    """(n, 3, H, W) -> (n * N, 3, p, p), row by row as the tokens are."""
    n, c, height, width = images.shape
    gh, gw = grid
    x = images.view(n, c, gh, height // gh, gw, width // gw).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(n * gh * gw, c, height // gh, width // gw)


def mean_patches(tokens, codes, turn=0):
    """The average of all patches with a code, (K, 3, p, p) in [0, 1]; mid-grey where there are none.

    turn > 0: so many passes in which a patch that is nearer to the average's negative is turned over, light for dark,
    before it is averaged. HOG is blind to which is which, and a plain average of its codes' patches is plain grey.
    """
    p = tokens.images.shape[-1] // tokens.z.shape[-1]
    counts = torch.bincount(tokens.z.flatten(), minlength=codes).clamp(min=1).view(-1, 1, 1, 1)
    level, shape = torch.zeros(codes, 3, 1, 1), torch.zeros(codes, 3, p, p)
    for attempt in range(1 + turn):
        sums, levels = torch.zeros_like(shape), torch.zeros_like(level)
        for images, z in zip(tokens.images.split(64), tokens.z.split(64)):
            x, z = data.to_float(cut_patches(images, z.shape[1:]), "cpu"), z.flatten()
            mean = x.mean(dim=(2, 3), keepdim=True)
            x = x - mean
            if attempt:
                x = x * torch.where((x * shape[z]).sum(dim=(1, 2, 3), keepdim=True) < 0, -1, 1)
            sums.index_add_(0, z, x)
            levels.index_add_(0, z, mean)
        shape, level = sums / counts, levels / counts
    seen = torch.bincount(tokens.z.flatten(), minlength=codes).view(-1, 1, 1, 1) > 0
    return torch.where(seen, (level + shape).clamp(0, 1), 0.5)


def mosaic(image, z, patches, where=None, blind=False):
    """Put the codes' patches (K, 3, p, p) into an image (3, H, W) in [0, 1] at the cells `where` (gh, gw) bool.
    blind: a patch's light and dark are not part of its code, and are turned over where that is nearer to the image."""
    (gh, gw), x = z.shape, patches[z.flatten()]                                          # (N, 3, p, p)
    own = cut_patches(image[None], (gh, gw))
    if blind:
        negative = 2 * x.mean(dim=(2, 3), keepdim=True) - x
        nearer = (negative - own).square().sum(dim=(1, 2, 3)) < (x - own).square().sum(dim=(1, 2, 3))
        x = torch.where(nearer[:, None, None, None], negative, x)
    x = x if where is None else torch.where(where.flatten()[:, None, None, None], x, own)
    return x.view(gh, gw, *x.shape[1:]).permute(2, 0, 3, 1, 4).reshape(image.shape).clamp(0, 1)


# --- networks ---------------------------------------------------------------------------------------------------------
def saved_args(file):
    """The arguments a checkpoint of ours was made with; {} for others, whose `args` is a Namespace or absent."""
    return file["args"] if "kind" in file and isinstance(file.get("args"), dict) else {}


def load_beit(path, device="cpu"):
    """-> a frozen BEiT with both heads, and its file; sizes are read off the tensors, as released files need it."""
    file = engine.read_file(path, remedy="make it with python pretrain.py, or give --backbone FILE")
    state = weights.state_dict(file, str(path))
    arch = weights.read_architecture(state, file.get("arch"), str(path))
    if "lm_head.weight" not in state or "rel_pos_bias.relative_position_bias_table" not in state:
        raise engine.UserError(f"{path} has no head over the codes: give a file of python pretrain.py")
    early = saved_args(file).get("early_layer") or {24: 21}.get(arch["depth"], arch["depth"] * 3 // 4)   # 9 of 12
    model = BEiT(*(arch[k] for k in ("image_size", "patch_size", "width", "depth", "heads")),
                 codes=len(state["lm_head.weight"]), layer_scale=arch["layer_scale"], early_layer=early,
                 head_depth=len({k.split(".")[1] for k in state if k.startswith("cls_pt_layers.")}),
                 shared_head="cls_pt_lm_head.weight" not in state)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise engine.UserError(f"{path} does not fit BEiT: {' '.join(str(error).split())[:300]}") from error
    return model.to(device).eval().requires_grad_(False), file


class PixelDecoder(nn.Module):
    """Code vectors back to pixels, for the eye only: a few convolutions on the map of codes, then p x p pixels each."""

    def __init__(self, codebook, patch_size, width=128, depth=4):
        super().__init__()
        self.register_buffer("codebook", l2(codebook.detach().cpu().float()))
        self.enter = nn.Conv2d(codebook.shape[1], width, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.leave = nn.Conv2d(width, 3 * patch_size ** 2, 1)
        self.patch_size = patch_size

    def forward(self, z):
        """Token ids (B, gh, gw) -> images (B, 3, H, W), about in [0, 1]"""
        x = self.enter(self.codebook[z].permute(0, 3, 1, 2))                             # (B, width, gh, gw)
        for layer in self.layers:
            x = x + layer(F.gelu(x))
        return 0.5 + F.pixel_shuffle(self.leave(F.gelu(x)), self.patch_size)


def lighten_middle(images):
    """For blind codes: images (B, 3, H, W) with light and dark exchanged where the middle is darker than the whole. A
    rule, any rule, must say which of an image and its negative to decode, or the answer is the grey in between."""
    h, w = images.shape[-2] // 4, images.shape[-1] // 4
    mean = images.mean(dim=(2, 3), keepdim=True)
    darker = images[..., h:-h, w:-w].mean(dim=(1, 2, 3)) < images.mean(dim=(1, 2, 3))
    return torch.where(darker[:, None, None, None], 2 * mean - images, images), darker


def train_pixel_decoder(tokens, codebook, steps, blind=False, seed=0, device="cpu"):
    """A PixelDecoder after `steps` updates of 32 images. The tokens are given, the codes frozen."""
    engine.seed_all(seed)
    model = PixelDecoder(codebook, tokens.images.shape[-1] // tokens.z.shape[-1]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = engine.cosine_schedule(step, 2e-3, 0, steps, warmup=min(50, steps // 4))
        batch = torch.randint(len(tokens.z), (32,))
        images = data.to_float(tokens.images[batch], device)
        images = lighten_middle(images)[0] if blind else images
        F.l1_loss(model(tokens.z[batch].to(device)), images).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def read_tokens(tokenizer, dataset, device="cpu"):
    """One pass over a data set -> Tokens, on the CPU. The images stay bytes."""
    images, z = [], []
    for x, _ in data.make_loader(dataset, data.eval_batches(len(dataset), 64), 0, device):
        images.append(x.cpu())
        z.append(tokenizer.encode(data.to_float(x, device)).cpu())
    return Tokens(torch.cat(images), torch.cat(z).view(-1, *tokenizer.encoder.grid))


# --- the pictures -----------------------------------------------------------------------------------------------------
def panels(rows, columns, width, height, title, top=0.42, **spacing):
    """A figure of rows x columns empty panels, `width` x `height` inches each, below a title. -> figure, axes"""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    total = rows * height + top
    figure, axes = plt.subplots(rows, columns, figsize=(columns * width, total), squeeze=False,
                                gridspec_kw=dict(left=0.01, right=0.99, bottom=0.01, top=1 - top / total) | spacing)
    figure.suptitle(title, fontsize=11, y=1 - 0.08 / total, va="top")
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes


def save(figure, out):
    import matplotlib.pyplot as plt
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def show(axis, image):
    """(3, H, W) bytes or floats in [0, 1] as they are, every pixel a square."""
    axis.imshow(data.to_float(image, "cpu").permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")


def frame(axis, y, x, p, colour, inset=0.0, lw=1.5):
    """Outline the patch in row y, column x of the grid."""
    from matplotlib.patches import Rectangle
    axis.add_patch(Rectangle((x * p - 0.5 + inset, y * p - 0.5 + inset), p - 2 * inset, p - 2 * inset, fill=False,
                             ec=colour, lw=lw))


def share(counts, code):
    return f"{100 * counts[code] / max(1, counts.sum()):.2g} %"


def draw_codes(tokens, chosen, patches, colours, out, columns=8, seed=0):
    counts = torch.bincount(tokens.z.flatten(), minlength=len(colours))
    (gh, gw), p = tokens.z.shape[1:], tokens.images.shape[-1] // tokens.z.shape[-1]
    h, w = (min(g, 3 if g < 10 else 5) for g in (gh, gw))    # the surroundings shown, in patches
    figure, axes = panels(len(chosen), 2 + columns, 0.95, 0.95, f"{len(chosen)} of {len(colours)} codes: the average "
                          "patch of each, then patches (outlined) that were given it, in their surroundings",
                          wspace=0.06, hspace=0.06)
    for row, code in zip(axes, chosen):
        row[0].text(0.95, 0.5, f"code {code}\n{share(counts, code)}", fontsize=8, ha="right", va="center",
                    transform=row[0].transAxes)
        row[0].text(0.0, 0.47, "\u25a0", color=colours[code], fontsize=14, va="center", transform=row[0].transAxes)
        show(row[1], patches[code])
        for axis, (image, y, x) in zip(row[2:], patches_of_code(tokens.z, code, columns, seed)):
            top, left = min(max(y - h // 2, 0), gh - h), min(max(x - w // 2, 0), gw - w)
            picture = data.to_float(tokens.images[image], "cpu")
            faded = 0.45 + 0.55 * picture                    # the surroundings step back, the patch stays as it is
            faded[:, y * p:(y + 1) * p, x * p:(x + 1) * p] = picture[:, y * p:(y + 1) * p, x * p:(x + 1) * p]
            show(axis, faded[:, top * p:(top + h) * p, left * p:(left + w) * p])
            frame(axis, y - top, x - left, p, "#e6007e")
    save(figure, out)


def draw_tokens(examples, colours, out, per_row=4):
    gh, gw = examples.z.shape[1:]
    figure, axes = panels(-(-len(examples.z) // per_row), 2 * per_row, 1.45, 1.5,
                          "Images and their tokens: a colour is a code, similar colours are similar codes",
                          wspace=0.05, hspace=0.05)
    for pair, image, z in zip(axes.reshape(-1, 2), examples.images, examples.z):
        show(pair[0], image)
        pair[1].imshow(colours[z.numpy()], interpolation="nearest")
        for y, x in np.ndindex(gh, gw) if gh * gw <= 64 else ():
            colour = colours[z[y, x]]
            pair[1].text(x, y, str(z[y, x].item()), fontsize=6.5, ha="center", va="center",
                         color="white" if colour @ [0.3, 0.6, 0.1] < 0.5 else "black")
    save(figure, out)


@torch.no_grad()
def draw_prediction(model, examples, views, masks, patches, out, blind=False):
    """views (m, 3, H, W): the examples at the backbone's size; masks (m, gh, gw) bool."""
    device, grid = model.mask_token.device, masks.shape[1:]
    logits = model(imagenet_normalize(data.to_float(views, device)), masks.flatten(1).to(device))
    heads = {name: x.cpu() for name, x in zip(("last layer, Eq. (3)", "[CLS] head, Eq. (4)"), logits) if x is not None}
    true, p = examples.z[masks], examples.images.shape[-1] // grid[1]
    figure, axes = panels(len(views), 3 + len(heads), 1.9, 2.1, "Hidden patches, named by the backbone.  Of "
                          f"{len(true)} in these images right: " + ", ".join(
                              f"{name.split(',')[0]} {accuracy(x, true):.0f} %" for name, x in heads.items()),
                          top=0.65, wspace=0.05, hspace=0.12)
    for row, images, z, mask in zip(axes, examples.images, examples.z, masks):
        image = data.to_float(images, "cpu")
        hidden = mask.repeat_interleave(p, 0).repeat_interleave(p, 1)
        show(row[0], image)
        show(row[1], torch.where(hidden, 0.75, image))
        show(row[2], mosaic(image, z, patches, mask, blind))
    for axis, title in zip(axes[0], ["image", "what it sees", "the true codes", *heads]):
        axis.set_title(title, fontsize=9)
    for column, scores in enumerate(heads.values(), start=3):
        guess = torch.full(masks.shape, -1)
        guess[masks] = scores.argmax(dim=-1)
        for axis, images, z, g, mask in zip(axes[:, column], examples.images, examples.z, guess, masks):
            show(axis, mosaic(data.to_float(images, "cpu"), g.clamp(min=0), patches, mask, blind))
            for y, x in mask.nonzero().tolist():
                frame(axis, y, x, p, "#1a9850" if g[y, x] == z[y, x] else "#e31a1c", inset=p / 16)
            axis.text(0.5, -0.02, f"{(g == z)[mask].sum()} of {mask.sum()} right", fontsize=8, ha="center", va="top",
                      transform=axis.transAxes)
    save(figure, out)


@torch.no_grad()
def cls_attention(model, images, block=-1):
    """What [CLS] draws from each patch, per head: images (m, 3, H, W) bytes -> (m, H, gh, gw)"""
    x = imagenet_normalize(data.to_float(images, model.cls_token.device))
    return model.attention_weights(x, block)[:, :, 0, 1:].unflatten(-1, model.grid).cpu()


def draw_attention(model, images, out, block=-1):
    maps = cls_attention(model, images, block)
    heads, (gh, gw) = maps.shape[1], model.grid
    figure, axes = panels(len(images), 2 + heads, 1.35, 1.5, f"Attention of [CLS], block {block % model.depth + 1} of "
                          f"{model.depth}, {gh} x {gw} patches", top=0.55, wspace=0.05, hspace=0.14)
    for number, (row, image, per_head) in enumerate(zip(axes, images, maps)):
        show(row[0], image)
        titles = ["mean of heads"] + [f"head {h + 1}" for h in range(heads)]
        for axis, heat, title in zip(row[1:], [per_head.mean(dim=0), *per_head], titles):
            axis.imshow(heat.numpy(), cmap="magma", vmin=0, interpolation="nearest")
            axis.set_title((title + ", " if number == 0 else "") + f"{heat.max() * gh * gw:.2g} x", fontsize=8, pad=2)
    save(figure, out)


def draw_where(z, chosen, colours, out, per_row=8):
    counts = torch.bincount(z.flatten(), minlength=len(colours))
    figure, axes = panels(-(-len(chosen) // per_row), per_row, 1.3, 1.4, f"Where each of {len(chosen)} codes occurs "
                          "(most used first; bright: often, black: never)", top=0.62, wspace=0.1, hspace=0.25)
    for axis, code in zip(axes.flat, chosen):
        heat = (z == code).float().mean(dim=0).numpy()                                   # (gh, gw)
        axis.imshow(heat, cmap="magma", vmin=0, vmax=max(heat.max(), 1e-9), interpolation="nearest")
        axis.set_title(f"    {code}: {share(counts, code)}", fontsize=8, pad=3)
        axis.text(0.06, 1.05, "\u25a0", color=colours[code], fontsize=11, transform=axis.transAxes, va="bottom")
    save(figure, out)


def draw_usage(counts, colours, out):
    use = codebook_usage(counts)
    order = counts.argsort(descending=True, stable=True)
    shares, codes = 100 * counts[order].double() / counts.sum(), len(counts)
    figure, axes = panels(1, 1, 10, 3.6, f"{use['codes_used']} of {codes} codes used, {use['dead_codes']} dead; "
                          f"perplexity {use['perplexity']:.1f} ({counts.sum():,} patches)", bottom=0.14, left=0.07)
    axis = axes[0, 0]
    axis.axis("on")
    if codes <= 200:
        axis.bar(range(codes), shares.tolist(), width=0.86, color=colours[order])
    else:                                                    # bars narrower than a pixel would lose their height
        axis.fill_between(range(codes), shares.clamp(min=1e-9).tolist(), step="mid", color="#41668c")
    axis.axhline(100 / codes, color="black", ls="--", lw=1)
    axis.text(0.995, 100 / codes, "all codes alike", fontsize=9, ha="right", va="bottom",
              transform=axis.get_yaxis_transform())
    if shares[0] > 20 * 100 / codes:
        axis.set_yscale("log")
        axis.set_ylim(bottom=shares[shares > 0].min().item() / 2)
    if codes <= 100:
        axis.set_xticks(range(codes), order.tolist(), fontsize=6, rotation=90 if codes > 64 else 0)
    axis.set_xlim(-0.7, codes - 0.3)
    axis.set_xlabel("code, the most used first", fontsize=9)
    axis.set_ylabel("share of patches, percent", fontsize=9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    save(figure, out)


@torch.no_grad()
def draw_pixels(decoder, examples, patches, out, blind=False):
    device = decoder.codebook.device
    images, guess = data.to_float(examples.images, "cpu"), decoder(examples.z.to(device)).cpu()
    if blind:
        darker = lighten_middle(images)[1][:, None, None, None]
        guess = torch.where(darker, 2 * guess.mean(dim=(2, 3), keepdim=True) - guess, guess)
    error = (guess - images).abs().mean()
    figure, axes = panels(3, len(images), 1.2, 1.22, "Pixels from tokens, by a decoder trained afterwards, for the eye "
                          f"only (mean absolute error {error:.3f})", left=0.1, wspace=0.05, hspace=0.05)
    for row, name in zip(axes, ("image", "average patch\nof each token", "decoded from\nthe tokens")):
        row[0].text(-0.08, 0.5, name, fontsize=9, ha="right", va="center", transform=row[0].transAxes)
    for column, image, z, decoded in zip(axes.T, images, examples.z, guess):
        show(column[0], image)
        show(column[1], mosaic(image, z, patches, None, blind))
        show(column[2], decoded)
    save(figure, out)


def read_log(path):
    """-> (first line, training lines, evaluation lines) of a stage's JSON log."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
        steps = [x for x in lines if "step" in x and "summary" not in x]
        return lines[0], [x for x in steps if x.get("split") != "val"], [x for x in steps if x.get("split") == "val"]
    except (OSError, ValueError, IndexError, TypeError) as error:
        raise engine.UserError(f"{path} is not a JSON log ({error}): give a run's STAGE.jsonl") from error


def draw_curves(paths, out):
    """One panel per quantity that any of the logs holds: training as a thin line, held-out images as dots."""
    logs = {str(p): read_log(p) for p in paths}
    keys = [k for k in PANELS if any(k in x for _, train, val in logs.values() for x in train + val)]
    if not keys:
        raise engine.UserError(f"none of {', '.join(logs) or 'no logs'} holds a curve ({', '.join(PANELS)})")
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    figure, axes = panels(rows, columns, 4.6, 3.2, "", 0.35, left=0.14 / columns, right=0.985, bottom=0.15 / rows,
                          wspace=0.15, hspace=0.3)
    for axis, key in zip(axes.flat, keys):
        axis.axis("on")
        title, levels = PANELS[key]
        levels, colours = dict(levels), {name: f"C{i}" for i, name in enumerate(logs)}
        for name, (first, train, val) in logs.items():
            if not any(key in x for x in train + val):
                continue
            path, colour = Path(name), colours[name]
            axis.plot([x["step"] for x in train if key in x], [x[key] for x in train if key in x], color=colour, lw=0.8,
                      label=path.stem if path.parent.name in ("", "results") else f"{path.parent.name}/{path.stem}")
            axis.plot([x["step"] for x in val if key in x], [x[key] for x in val if key in x], "o", color=colour, ms=4)
            for x in train if key == "perplexity" else []:
                if "warning" in x:                           # the step at which the run was warned of a collapse
                    axis.axvline(x["step"], color=colour, ls="--", lw=1)
                    axis.annotate("warned", (x["step"], 0.5), xycoords=("data", "axes fraction"), fontsize=7,
                                  color=colour, xytext=(3, 0), textcoords="offset points")
            known = first | (val[-1] if val else {})
            for level in [k for k in levels if k in known]:  # once per panel, from the first run that has it
                axis.axhline(known[level], color="grey", ls=":" if level == "chance" else "--", lw=1)
                axis.text(0.98, known[level], levels.pop(level), fontsize=7, color="dimgrey", ha="right",
                          va="top" if level == "guess_nearest" else "bottom", transform=axis.get_yaxis_transform())
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.margins(y=0.08)
        axis.legend(fontsize=7, framealpha=0.7)
    save(figure, out)


# --- arguments, data, page --------------------------------------------------------------------------------------------
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("paths", nargs="*", type=Path, help="the run's folder, default runs/tiny; logs (STAGE.jsonl) join "
                                                       "its curves, and logs alone give curves alone")
    p.add_argument("--out", type=Path, help="where to write: a folder, default RUN/figures; logs alone: a PNG")
    p.add_argument("--only", nargs="+", choices=PICTURES, metavar="PICTURE",
                   help=f"no page, only some of {', '.join(PICTURES)}")
    p.add_argument("--tokenizer", type=Path, help="VQ-KD file, ours or released; default RUN/vqkd.pt")
    p.add_argument("--backbone", type=Path, help="pre-trained file, ours or released; default RUN/pretrain.pt")
    p.add_argument("--data", help="what codes are counted on: shapes, cifar10, cifar100 or a folder, of which the "
                                  "held-out part is taken; default: what the tokenizer was trained on")
    p.add_argument("--data-dir", default="datasets", help="where CIFAR lies")
    p.add_argument("--limit", type=int, default=2000, help="at most so many images of it; default 2000")
    p.add_argument("--images", type=Path, metavar="FILE_OR_FOLDER", help="show tokens, predictions, attention and "
                                                                         "pixels of these instead of images of --data")
    p.add_argument("--codes", type=int, nargs="+", help="those of codes.png and where.png; default: much used ones")
    p.add_argument("--block", type=int, help="attention of this block, counted from 1; default: the last")
    p.add_argument("--attention-size", type=int, help="image size for attention, tables resized; default: the run's")
    p.add_argument("--decoder-steps", type=int, default=500, help="updates of the decoder to pixels; 0: without it")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    engine.check_ranges(args, [("limit", 1, 10**9), ("block", 1, 10**3), ("attention_size", 1, 1024),
                               ("decoder_steps", 0, 10**9), ("codes", 0, 2**20), ("seed", 0, 2**32 - 1)])
    return args


def find_inputs(args):
    """-> what there is to draw from: (tokenizer path, backbone path, logs), the paths None where there is no file."""
    run = args.run
    for path in (args.tokenizer, args.backbone):
        if path is not None and not path.is_file():
            raise engine.UserError(f"there is no file {path}: give a checkpoint, ours or a released one")
    backbone = args.backbone or (run / "pretrain.pt" if (run / "pretrain.pt").is_file() else None)
    tokenizer = args.tokenizer or run / "vqkd.pt"
    if not tokenizer.is_file() and backbone:                 # large, for one, learns from the tokenizer of base
        tokenizer = Path(saved_args(engine.read_file(backbone)).get("tokenizer", tokenizer))
    logs = [run / f"{stage}.jsonl" for stage in ("vqkd", "pretrain", "finetune")]
    return tokenizer if tokenizer.is_file() else None, backbone, [x for x in logs if x.is_file()] + args.logs


def choose_pictures(args, tokenizer, backbone, logs):
    """-> names of the pictures that can be drawn, and {name: why not} of the others; UserError where one of those was
    asked for by name, or where there is none to draw."""
    have = dict(tokenizer=tokenizer, backbone=backbone, both=tokenizer and backbone, logs=logs)
    lack = dict(tokenizer=f"there is no tokenizer {args.run / 'vqkd.pt'}: python vqkd.py makes it",
                backbone=f"there is no backbone {args.run / 'pretrain.pt'}: python pretrain.py makes it",
                logs=f"there is no log in {args.run}")
    lack["both"] = lack["backbone" if tokenizer else "tokenizer"]
    needs = {name: PICTURES[name][0] for name in args.only or PICTURES}
    skipped = {name: lack[need] for name, need in needs.items() if not have[need]}
    if args.decoder_steps == 0 and "pixels" in needs:
        skipped["pixels"] = "--decoder-steps 0 was asked for"
    if skipped and (args.only or skipped.keys() == needs.keys()):
        raise engine.UserError("; ".join(dict.fromkeys(skipped.values())))
    return [name for name in needs if name not in skipped], skipped


def most_used(counts, most, among=1.0):
    """`most` codes, the most used first; among=0.5 spreads them over the more used half of the codes in use."""
    order = counts.argsort(descending=True, stable=True)[:max(1, int((counts > 0).sum()))].tolist()
    last = max(min(most, len(order)), round(among * len(order))) if among < 1 else min(most, len(order))
    return [order[i] for i in np.linspace(0, last - 1, min(most, last)).round().astype(int)]


def draw_all(args, folder):
    """Draw what can be drawn into `folder`. -> names drawn, why not the others, a further sentence for some, facts"""
    tokenizer_path, backbone_path, logs = find_inputs(args)
    wanted, skipped = choose_pictures(args, tokenizer_path, backbone_path, logs)
    drawn, notes, device = [], {}, engine.init_distributed(args.device).device
    file = engine.read_file(tokenizer_path or backbone_path) if tokenizer_path or backbone_path else {}
    ours = file if "kind" in file else {}
    args.data = args.data or ours.get("data", "shapes")
    facts = {"run": args.run, "tokenizer": tokenizer_path, "backbone": backbone_path, "logs": ", ".join(map(str, logs)),
             "trained by commit": ours.get("commit"), "run's seed": saved_args(file).get("seed"),
             "seed of the pictures": args.seed, "images": args.data, "examples": args.images}

    def images(split, size, limit):
        return data.open_data(args.data, split, transforms.EvalTransform(size), data_dir=args.data_dir, limit=limit,
                              seed=args.seed, labelled=False)

    def examples(size, most):
        if args.images is None:
            return images("val", size, most)
        if not args.images.exists():
            raise engine.UserError(f"--images {args.images}: there is no such file or folder")
        dataset = open_images(args.images, transforms.EvalTransform(size))
        dataset.paths = dataset.paths[:most]
        return dataset

    def views(size):                                         # the first four examples, (m, 3, size, size)
        dataset = examples(size, 4)
        return torch.stack([dataset[i][0] for i in range(len(dataset))])

    def picture(name, draw, *rest, **options):
        if name in wanted:
            draw(*rest, folder / f"{name}.png", **options)
            drawn.append(name)
            print(f"{folder / name}.png", flush=True)

    if tokenizer_path and {PICTURES[name][0] for name in wanted} & {"tokenizer", "both"}:
        tokenizer = load_tokenizer(tokenizer_path, device)
        codebook, size = tokenizer.quantize.embedding.weight, tokenizer.encoder.image_size[0]
        K, grid, blind = len(codebook), tokenizer.encoder.grid, saved_args(file).get("teacher") == "hog"
        if args.codes and not all(0 <= code < K for code in args.codes):
            raise engine.UserError(f"--codes must lie in [0, {K - 1}], the codes of {tokenizer_path}")
        tokens = read_tokens(tokenizer, images("val", size, args.limit), device)
        shown = read_tokens(tokenizer, examples(size, 12), device)
        counts, colours = torch.bincount(tokens.z.flatten(), minlength=K), code_colours(codebook)
        patches = mean_patches(tokens, K, turn=4 if blind else 0)
        facts["counted on"] = f"{len(tokens.z)} held-out images of {args.data}, {grid[0]} x {grid[1]} patches each"
        if blind:
            notes = dict.fromkeys(("codes", "prediction"), BLIND) | dict(
                pixels=f"{BLIND} The decoder learned all images with the middle as the lighter part.")
        chosen = args.codes or most_used(counts, 12, among=0.5)
        picture("codes", draw_codes, tokens, chosen, patches, colours, seed=args.seed)
        picture("tokens", draw_tokens, shown, colours)
        picture("where", draw_where, tokens.z, args.codes or most_used(counts, 64), colours)
        picture("usage", draw_usage, counts, colours)
        if "pixels" in wanted:
            learn = read_tokens(tokenizer, images("train", size, 2 * args.limit), device)
            decoder = train_pixel_decoder(learn, codebook, args.decoder_steps, blind, args.seed, device)
            picture("pixels", draw_pixels, decoder, Tokens(shown.images[:10], shown.z[:10]), patches, blind=blind)
        if "prediction" in wanted:
            model, saved = load_beit(backbone_path, device)
            if model.grid != grid or model.lm_head.out_features != K:
                skipped["prediction"] = (f"{backbone_path} names {model.lm_head.out_features} codes on {model.grid} "
                                         f"patches, the tokenizer {K} on {grid}: they do not belong together")
            else:
                N, stated = model.num_patches, saved_args(saved)
                four, masks = Tokens(shown.images[:4], shown.z[:4]), []
                for i in range(len(four.z)):                 # the mask that pretrain.py's evaluation draws, too
                    engine.seed_all(args.seed, 0, i)
                    masks.append(sample_block_mask(*grid, stated.get("mask_patches") or N * 75 // 196,
                                                   stated.get("mask_min_block") or max(1, N * 16 // 196)))
                picture("prediction", draw_prediction, model, four, views(model.image_size[0]), torch.stack(masks),
                        patches, blind=blind)
    if "attention" in wanted:
        model, _, _ = weights.load_backbone(backbone_path, pool=None, image_size=args.attention_size)
        if args.block and args.block > model.depth:
            raise engine.UserError(f"--block {args.block}: {backbone_path} has {model.depth} blocks, counted from 1")
        picture("attention", draw_attention, model.to(device).eval(), views(model.image_size[0]),
                block=(args.block or 0) - 1)
    picture("curves", draw_curves, logs)
    if args.only and skipped:
        raise engine.UserError("; ".join(skipped.values()))
    return [name for name in PICTURES if name in drawn], skipped, notes, facts


STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto;
       padding: 0 1rem; color: #222 }
img { max-width: 100%; border: 1px solid #ddd; display: block; background: white }
p, dl { max-width: 46rem } h2 { margin: 2.5rem 0 .5rem } nav a { margin-right: 1em }
dt { float: left; clear: left; width: 11rem; color: #666 } dd { margin-left: 11.5rem }"""


def page(drawn, skipped, notes, facts):
    """index.html as text: a section per picture with its words, what was skipped and why, what it was made from."""
    text = html.escape
    nav = "\n".join(f'<a href="#{name}">{name}</a>' for name in drawn)
    sections = "\n".join(
        f'<section id="{name}">\n<h2>{text(PICTURES[name][1])}</h2>\n<img src="{name}.png" '
        f'alt="{text(PICTURES[name][1] + ": " + PICTURES[name][2].split(". ")[0])}.">\n'
        f'<p>{text(PICTURES[name][2])} {text(notes.get(name, ""))}</p>\n</section>' for name in drawn)
    missing = "\n".join(f"<li>{name}: {text(str(why))}</li>" for name, why in skipped.items())
    table = "\n".join(f"<dt>{text(k)}</dt><dd>{text(str(v))}</dd>" for k, v in facts.items() if v not in (None, ""))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(str(facts["run"]))} in pictures</title>
<style>
{STYLE}
</style>
</head>
<body>
<h1>{text(str(facts["run"]))} in pictures</h1>
<nav>
{nav}
</nav>
{sections}
{"<h2>Not drawn</h2><ul>" + missing + "</ul>" if missing else ""}
<h2>What these pictures were made from</h2>
<dl>
{table}
</dl>
</body>
</html>
"""


def main(argv=None):
    args = parse_args(argv)
    args.logs = [path for path in args.paths if path.suffix == ".jsonl"]
    folders = [path for path in args.paths if path not in args.logs] or ([] if args.logs else [Path("runs/tiny")])
    if not folders:
        out = args.out or Path("curves.png")
        draw_curves(args.logs, out)
        print(f"{len(args.logs)} logs -> {out}")
        return
    if len(folders) > 1:
        raise engine.UserError(f"{' and '.join(map(str, folders))}: one run at a time; of others give the logs")
    args.run, folder = folders[0], args.out or folders[0] / "figures"
    if not args.run.is_dir() and not (args.tokenizer or args.backbone):
        raise engine.UserError(f"there is no run {args.run}: python vqkd.py makes runs/tiny, or name another folder")
    drawn, skipped, notes, facts = draw_all(args, folder)
    for name, why in skipped.items():
        print(f"no {name}.png: {why}")
    if not args.only:
        (folder / "index.html").write_text(page(drawn, skipped, notes, facts))
        print(f"{len(drawn)} pictures -> {folder / 'index.html'}")


if __name__ == "__main__":
    engine.run(main)
