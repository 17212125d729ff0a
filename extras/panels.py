"""The pictures: each is a function that draws panels and saves a PNG (curves: extras/curves.py).

Read in this order: panels, show, frame, then any draw_ function.
"""
# Shapes:  m images shown, N = gh x gw patches of p x p pixels, K codes, H heads
from pathlib import Path

import numpy as np
import torch

from extras.codes import lighten_middle, mosaic, patches_of_code
from model import attention_weights, imagenet_normalize
from pretrain import accuracy
from support import data
from support.codebook import codebook_usage

SQUARE = "\u25a0"


# --- what all pictures need -----------------------------------------------------------------------
def panels(rows, columns, width, height, title, top=0.42, **spacing):
    """Empty panels, `width` x `height` inches each, below a title. -> figure, axes"""
    import matplotlib                        # here, because it is slow to import
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    total = rows * height + top
    edges = dict(left=0.01, right=0.99, bottom=0.01, top=1 - top / total)
    figure, axes = plt.subplots(rows, columns, figsize=(columns * width, total), squeeze=False,
                                gridspec_kw=edges | spacing)
    figure.suptitle(printable(title), fontsize=11, y=1 - 0.08 / total, va="top")
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes


def printable(text):
    """A text with names of files, whose bytes may be no text in this locale, as UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def save(figure, out):
    import matplotlib.pyplot as plt
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def show(axis, image):
    """(3, H, W), bytes or floats in [0, 1]. Every pixel becomes a square."""
    pixels = data.to_float(image, "cpu").permute(1, 2, 0).clamp(0, 1)
    axis.imshow(pixels.numpy(), interpolation="nearest")


def frame(axis, y, x, p, colour, inset=0.0):
    """Outline the patch in row y, column x of the grid."""
    from matplotlib.patches import Rectangle
    corner = (x * p - 0.5 + inset, y * p - 0.5 + inset)
    side = p - 2 * inset
    axis.add_patch(Rectangle(corner, side, side, fill=False, ec=colour, lw=1.5))


def share(counts, code):
    return f"{100 * counts[code] / max(1, counts.sum()):.2g} %"


# --- codes ----------------------------------------------------------------------------------------
def draw_codes(tokens, chosen, patches, colours, out, columns=8, seed=0):
    """A row per chosen code: name, average patch (K, 3, p, p), patches in their surroundings."""
    counts = torch.bincount(tokens.z.flatten(), minlength=len(colours))
    title = (f"{len(chosen)} of {len(colours)} codes: the average patch of each, then patches "
             f"(outlined) that were given it, in their surroundings")
    figure, axes = panels(len(chosen), 2 + columns, 0.95, 0.95, title, wspace=0.06, hspace=0.06)
    for row, code in zip(axes, chosen, strict=True):
        row[0].text(0.95, 0.5, f"code {code}\n{share(counts, code)}", fontsize=8, ha="right",
                    va="center", transform=row[0].transAxes)
        row[0].text(0.0, 0.47, SQUARE, color=colours[code], fontsize=14, va="center",
                    transform=row[0].transAxes)
        show(row[1], patches[code])
        places = patches_of_code(tokens.z, code, columns, seed)
        for axis, (image, y, x) in zip(row[2:], places, strict=False):
            show_surroundings(axis, tokens.images[image], y, x, tokens.z.shape[1:])
    save(figure, out)


def show_surroundings(axis, image, y, x, grid):
    """The patch in row y, column x of an image (3, H, W), outlined, with the patches around it."""
    gh, gw = grid
    p = image.shape[-1] // gw
    h = min(gh, 3 if gh < 10 else 5)         # height and width of what is shown, in patches
    w = min(gw, 3 if gw < 10 else 5)
    top = min(max(y - h // 2, 0), gh - h)
    left = min(max(x - w // 2, 0), gw - w)
    picture = data.to_float(image, "cpu")
    faded = 0.45 + 0.55 * picture            # the surroundings are paler than the patch
    rows = slice(y * p, (y + 1) * p)
    columns = slice(x * p, (x + 1) * p)
    faded[:, rows, columns] = picture[:, rows, columns]
    show(axis, faded[:, top * p:(top + h) * p, left * p:(left + w) * p])
    frame(axis, y - top, x - left, p, "#e6007e")


def draw_tokens(examples, colours, out, per_row=4):
    """Beside each image its token map, a colour per code."""
    gh, gw = examples.z.shape[1:]
    rows = -(-len(examples.z) // per_row)
    title = "Images and their tokens: a colour is a code, similar colours are similar codes"
    figure, axes = panels(rows, 2 * per_row, 1.45, 1.5, title, wspace=0.05, hspace=0.05)
    pairs = axes.reshape(-1, 2)              # the last pairs may stay empty
    for (left, right), image, z in zip(pairs, examples.images, examples.z, strict=False):
        show(left, image)
        right.imshow(colours[z.numpy()], interpolation="nearest")
        if gh * gw > 64:
            continue                         # numbers would be too small to read
        for y, x in np.ndindex(gh, gw):
            brightness = colours[z[y, x]] @ [0.3, 0.6, 0.1]
            colour = "white" if brightness < 0.5 else "black"
            right.text(x, y, str(z[y, x].item()), fontsize=6.5, ha="center", va="center",
                       color=colour)
    save(figure, out)


def draw_where(z, chosen, colours, out, per_row=8):
    """A map of the grid for each chosen code: how often it occurs at each place.  z (n, gh, gw)"""
    counts = torch.bincount(z.flatten(), minlength=len(colours))
    title = (f"Where each of {len(chosen)} codes occurs "
             "(most used first; bright: often, black: never)")
    rows = -(-len(chosen) // per_row)
    figure, axes = panels(rows, per_row, 1.3, 1.4, title, top=0.62, wspace=0.1, hspace=0.25)
    for axis, code in zip(axes.flat, chosen, strict=False):
        heat = (z == code).float().mean(dim=0).numpy()       # (gh, gw)
        axis.imshow(heat, cmap="magma", vmin=0, vmax=max(heat.max(), 1e-9),
                    interpolation="nearest")
        axis.set_title(f"    {code}: {share(counts, code)}", fontsize=8, pad=3)
        axis.text(0.06, 1.05, SQUARE, color=colours[code], fontsize=11, va="bottom",
                  transform=axis.transAxes)
    save(figure, out)


def draw_usage(counts, colours, out):
    """A bar per code: its share of all patches, counts (K,), the most used first."""
    use = codebook_usage(counts)
    order = counts.argsort(descending=True, stable=True)
    shares = 100 * counts[order].double() / counts.sum()
    codes = len(counts)
    title = (f"{use['codes_used']} of {codes} codes used, {use['dead_codes']} dead; perplexity "
             f"{use['perplexity']:.1f} ({counts.sum():,} patches)")
    figure, axes = panels(1, 1, 10, 3.6, title, bottom=0.14, left=0.07)
    axis = axes[0, 0]
    axis.axis("on")
    if codes <= 200:
        axis.bar(range(codes), shares.tolist(), width=0.86, color=colours[order])
    else:                                    # a bar narrower than a pixel would be drawn too low
        heights = shares.clamp(min=1e-9).tolist()
        axis.fill_between(range(codes), heights, step="mid", color="#41668c")
    axis.axhline(100 / codes, color="black", ls="--", lw=1)
    axis.text(0.995, 100 / codes, "all codes alike", fontsize=9, ha="right", va="bottom",
              transform=axis.get_yaxis_transform())
    if shares[0] > 20 * 100 / codes:
        axis.set_yscale("log")
        axis.set_ylim(bottom=shares[shares > 0].min().item() / 2)
    if codes <= 100:
        rotation = 90 if codes > 64 else 0
        axis.set_xticks(range(codes), order.tolist(), fontsize=6, rotation=rotation)
    axis.set_xlim(-0.7, codes - 0.3)
    axis.set_xlabel("code, the most used first", fontsize=9)
    axis.set_ylabel("share of patches, percent", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, out)


@torch.no_grad()
def draw_pixels(decoder, examples, patches, out, invert=False):
    """Images, the average patch of each token, and what a PixelDecoder makes of the tokens."""
    images = data.to_float(examples.images, "cpu")
    decoded = decoder(examples.z.to(decoder.codebook.device)).cpu()
    if invert:
        _, inverted = lighten_middle(images)
        negative = 2 * decoded.mean(dim=(2, 3), keepdim=True) - decoded
        decoded = torch.where(inverted[:, None, None, None], negative, decoded)
    error = (decoded - images).abs().mean()
    title = (f"Pixels from tokens, by a decoder trained afterwards, for the eye only "
             f"(mean absolute error {error:.3f})")
    figure, axes = panels(3, len(images), 1.2, 1.22, title, left=0.1, wspace=0.05, hspace=0.05)
    names = "image", "average patch\nof each token", "decoded from\nthe tokens"
    for row, name in zip(axes, names, strict=True):
        row[0].text(-0.08, 0.5, name, fontsize=9, ha="right", va="center",
                    transform=row[0].transAxes)
    for column, image, z, pixels in zip(axes.T, images, examples.z, decoded, strict=True):
        show(column[0], image)
        show(column[1], mosaic(image, z, patches, invert=invert))
        show(column[2], pixels)
    save(figure, out)


# --- the backbone ---------------------------------------------------------------------------------
@torch.no_grad()
def draw_prediction(model, examples, views, masks, patches, out, invert=False):
    """What both heads name the hidden patches, drawn as average patches.

    examples: images and true codes; views (m, 3, H, W): the same images at the backbone's size;
    masks (m, gh, gw) bool; patches (K, 3, p, p).
    """
    device = model.mask_token.device
    pixels = imagenet_normalize(data.to_float(views, device))
    logits, logits_cls = model(pixels, masks.flatten(1).to(device))
    heads = {"last layer": logits.cpu()}
    if logits_cls is not None:
        heads["[CLS] head"] = logits_cls.cpu()
    true = examples.z[masks]                                 # (M,)
    right = ", ".join(f"{name} {accuracy(x, true):.0f} %" for name, x in heads.items())
    title = (f"Hidden patches, named by the backbone.  Of {len(true)} in these images right: "
             f"{right}")
    figure, axes = panels(len(views), 3 + len(heads), 1.9, 2.1, title, top=0.65, wspace=0.05,
                          hspace=0.12)
    names = ["image", "what it sees", "the true codes", *[f"{name}, Eq. (3)" for name in heads]]
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=9)

    p = examples.images.shape[-1] // masks.shape[-1]
    images = data.to_float(examples.images, "cpu")
    for row, image, z, mask in zip(axes, images, examples.z, masks, strict=True):
        hidden = mask.repeat_interleave(p, 0).repeat_interleave(p, 1)
        show(row[0], image)
        show(row[1], torch.where(hidden, 0.75, image))
        show(row[2], mosaic(image, z, patches, mask, invert))
    for column, scores in enumerate(heads.values(), start=3):
        guess = torch.zeros(masks.shape, dtype=torch.long)
        guess[masks] = scores.argmax(dim=-1)
        rows = zip(axes[:, column], images, examples.z, guess, masks, strict=True)
        for axis, image, z, g, mask in rows:
            show(axis, mosaic(image, g, patches, mask, invert))
            mark_guesses(axis, g == z, mask, p)
    save(figure, out)


def mark_guesses(axis, right, mask, p):
    """A green frame around each hidden patch that was named right, a red one around the others."""
    for y, x in mask.nonzero().tolist():
        frame(axis, y, x, p, "#1a9850" if right[y, x] else "#e31a1c", inset=p / 16)
    axis.text(0.5, -0.02, f"{right[mask].sum()} of {mask.sum()} right", fontsize=8, ha="center",
              va="top", transform=axis.transAxes)


def attention_maps(model, x, block=-1):
    """What attends to what in one block of a ViT.  x (B, 3, H, W), normalised -> (B, H, T, T)

    Each row sums to 1.
    """
    block = block % model.depth
    shared = model.shared_bias()
    x = model.embed(x) if block == 0 else model.features(x, blocks=[block - 1])[0]
    layer = model.blocks[block]
    q, k, _ = layer.attn.queries_keys_values(layer.norm1(x))
    return attention_weights(q, k, layer.attn.bias(model.relative_position_index, shared))


@torch.no_grad()
def cls_attention(model, images, block=-1):
    """What [CLS] draws from each patch, per head: images (m, 3, H, W) bytes -> (m, H, gh, gw)"""
    x = imagenet_normalize(data.to_float(images, model.cls_token.device))
    return attention_maps(model, x, block)[:, :, 0, 1:].unflatten(-1, model.grid).cpu()


def draw_attention(model, images, out, block=-1):
    """Beside each image the attention of [CLS]: the mean of the heads, then each head."""
    maps = cls_attention(model, images, block)               # (m, H, gh, gw)
    heads = maps.shape[1]
    gh, gw = model.grid
    title = (f"Attention of [CLS], block {block % model.depth + 1} of {model.depth}, "
             f"{gh} x {gw} patches")
    names = ["mean of heads"] + [f"head {h + 1}" for h in range(heads)]
    figure, axes = panels(len(images), 2 + heads, 1.35, 1.5, title, top=0.55, wspace=0.05,
                          hspace=0.14)
    for number, (row, image, per_head) in enumerate(zip(axes, images, maps, strict=True)):
        show(row[0], image)
        heats = [per_head.mean(dim=0), *per_head]
        for axis, heat, name in zip(row[1:], heats, names, strict=True):
            axis.imshow(heat.numpy(), cmap="magma", vmin=0, interpolation="nearest")
            times = f"{heat.max() * gh * gw:.2g} x"          # the brightest patch: times the mean
            if number == 0:
                times = f"{name}, {times}"
            axis.set_title(times, fontsize=8, pad=2)
    save(figure, out)
