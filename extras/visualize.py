"""Pictures of what the tokens mean and of what the runs did, and a page that shows them all.

    vqkd.pt     --> codes, where, usage, tokens, pixels      what a code stands for and keeps
    pretrain.pt --> prediction, attention                    what it guesses, where it looks
    *.jsonl     --> curves

    python -m extras.visualize                  # runs/tiny -> runs/tiny/figures/index.html
    python -m extras.visualize runs/NAME --images dog.jpg    # that run, shown on your own images
    python -m extras.visualize runs/NAME --only codes --codes 3 17       # single pictures
    python -m extras.visualize runs/a/vqkd.jsonl runs/b/vqkd.jsonl --out curves.png

The last command puts the curves of several runs into one picture. This file chooses what to draw
and writes the page. extras/codes.py computes, extras/panels.py and extras/curves.py draw.
"""
import html
from pathlib import Path

import torch

from extras import panels
from extras.codes import (
    Tokens, code_colours, mean_patches, most_used, read_tokens, train_pixel_decoder)
from extras.curves import draw_curves
from pretrain import BEiT, sample_block_mask
from support import data, transforms, weights
from support.args import Parser, whole
from support.files import UserError, read_file, refuse_unwritable
from support.images import open_images
from support.process import join_processes, launch, seed_all
from vqkd import load_tokenizer

PICTURES = {  # name: (what it needs, heading, what one sees and what to look for)
    "codes": (
        "tokenizer", "What a code stands for",
        "A row is one code: first the average of its patches, then patches that were given this "
        "code. Each is outlined, in its own surroundings, and from another image; they are drawn "
        "at random, not chosen. Look for what the patches of a row share. The better the "
        "tokenizer, the more it is content, and not colour or light."),
    "tokens": (
        "tokenizer", "Images as the tokenizer sees them",
        "Beside each image its token map: one code per patch. A colour belongs to a code, in every "
        "picture of this tokenizer, and similar colours are codes with similar vectors. Look for "
        "outlines that survive in the map, and for background that gets few codes."),
    "prediction": (
        "both", "What the backbone makes of hidden patches",
        "Patches are hidden, and the backbone names their codes. Each code is drawn as its average "
        "patch: green frames are right, red ones wrong. Look at the wrong ones: are they near "
        "misses? The [CLS] head gets nothing of the late layers but [CLS] and should do about as "
        "well."),
    "attention": (
        "backbone", "Where [CLS] looks",
        "How much each head of one block draws from each patch when it makes its summary of the "
        "image. Bright is much. Every map has its own scale; its title says how many times the "
        "uniform share its brightest patch gets. Look for heads that pick out the object, and for "
        "heads that only know places."),
    "where": (
        "tokenizer", "Where on the grid each code occurs",
        "One map per code, bright where it is frequent; the small square is its colour in the "
        "token maps. A code of content occurs wherever the content does. A code that occurs only "
        "at an edge or at one place has learned the position: it is easy to predict and of little "
        "use."),
    "usage": (
        "tokenizer", "How the codebook is used",
        "A bar is the share of all patches that got the code. In a healthy codebook the bars lie "
        "near the dashed line. A collapsed one has a few tall bars and many dead codes, and its "
        "perplexity (the number of equally used codes it is worth) is far below K."),
    "pixels": (
        "tokenizer", "Pixels back from tokens, an aid for the eye",
        "Images that the decoder did not learn from, the average patch of each of their tokens, "
        "and what the decoder makes of the tokens. It was trained for this picture, afterwards and "
        "on frozen codes. It is no part of the method: VQ-KD never reconstructs pixels. Look for "
        "what comes back (outlines) and what the tokens lose."),
    "curves": (
        "logs", "How training went",
        "Thin lines are training, dots held-out images. Look for a loss well below the dotted line "
        "of a blind guess, for hidden patches named right more often than the trivial guessers "
        "(dashed) do, and for a perplexity that does not fall to a few codes."),
}
HOG_NOTE = (
    "This tokenizer learned from HOG, which does not tell light on dark from dark on light. So "
    "patches are inverted (light for dark) where that makes them agree before they are averaged, "
    "and inverted to fit where they are shown.")


# --- networks -------------------------------------------------------------------------------------
def saved_args(file):
    """The arguments a checkpoint of ours was made with; {} for others."""
    if "kind" in file and isinstance(file.get("args"), dict):
        return file["args"]
    return {}


def load_beit(path, device="cpu"):
    """-> (a frozen BEiT with both heads, contents of its file), ours or released."""
    checkpoint = weights.read(path, "make it with python pretrain.py, or give --backbone FILE")
    if checkpoint.kind != "pretrain":
        raise UserError(f"{path} has no head over the codes: give a file of python pretrain.py")
    model = weights.build(BEiT, checkpoint)
    return model.to(device).eval().requires_grad_(False), checkpoint.file


# --- what there is to draw from -------------------------------------------------------------------
def find_inputs(args):
    """-> tokenizer path, backbone path (None where there is no file), logs."""
    for path in (args.tokenizer, args.backbone):
        if path is not None and not path.is_file():
            raise UserError(f"there is no file {path}: give a checkpoint, ours or a released one")
    backbone = args.backbone or args.run / "pretrain.pt"
    if not backbone.is_file():
        backbone = None
    tokenizer = args.tokenizer or args.run / "vqkd.pt"
    if not tokenizer.is_file() and backbone:
        # The backbone's file names its tokenizer: large learns from the one of base.
        tokenizer = Path(saved_args(read_file(backbone)).get("tokenizer", tokenizer))
    if not tokenizer.is_file():
        tokenizer = None
    logs = [args.run / f"{stage}.jsonl" for stage in ("vqkd", "pretrain", "finetune")]
    return tokenizer, backbone, [log for log in logs if log.is_file()] + args.logs


def choose_pictures(args, tokenizer, backbone, logs):
    """-> names of the pictures that can be drawn, {name: why not} of the others.

    UserError if a picture that was asked for by name cannot be drawn, or if none can.
    """
    have = dict(tokenizer=tokenizer, backbone=backbone, both=tokenizer and backbone, logs=logs)
    made_by = "there is no {} {}: python {} makes it"
    lack = dict(
        tokenizer=made_by.format("tokenizer", args.run / "vqkd.pt", "vqkd.py"),
        backbone=made_by.format("backbone", args.run / "pretrain.pt", "pretrain.py"),
        logs=f"there is no log in {args.run}")
    lack["both"] = lack["backbone" if tokenizer else "tokenizer"]
    needs = {name: PICTURES[name][0] for name in args.only or PICTURES}
    skipped = {name: lack[need] for name, need in needs.items() if not have[need]}
    if args.decoder_steps == 0 and "pixels" in needs:
        skipped["pixels"] = "--decoder-steps 0 was asked for"
    if skipped and (args.only or skipped.keys() == needs.keys()):
        raise UserError("; ".join(dict.fromkeys(skipped.values())))
    return [name for name in needs if name not in skipped], skipped


def open_set(args, split, size, limit):
    """Images of --data at this size, without labels."""
    return data.open_data(args.data, split, transforms.EvalTransform(size),
                          data_dir=args.data_dir, limit=limit, seed=args.seed, labelled=False)


def open_examples(args, size, most):
    """The images to show: those of --images, or held-out images of --data."""
    if args.images is None:
        return open_set(args, "val", size, most)
    if not args.images.exists():
        raise UserError(f"--images {args.images}: there is no such file or folder")
    dataset = open_images(args.images, transforms.EvalTransform(size))
    dataset.paths = dataset.paths[:most]
    return dataset


def first_examples(args, size, most=4):
    """-> (m, 3, size, size) uint8"""
    dataset = open_examples(args, size, most)
    return torch.stack([dataset[i][0] for i in range(len(dataset))])


# --- drawing --------------------------------------------------------------------------------------
class Album:
    """The pictures of one call: wanted, drawn, skipped and why, and what the page says of them."""

    def __init__(self, folder, wanted, skipped):
        self.folder, self.wanted, self.skipped = folder, wanted, skipped
        self.drawn = []
        self.notes = {}                      # a further sentence for some pictures
        self.facts = {}                      # what the pictures were made from

    def add(self, name, draw, *what, **how):
        """Draw this picture if it is wanted."""
        if name in self.wanted:
            path = self.folder / f"{name}.png"
            draw(*what, path, **how)
            self.drawn.append(name)
            print(path, flush=True)


def draw_all(args, folder):
    """Draw what can be drawn into `folder`. -> Album"""
    tokenizer_path, backbone_path, logs = find_inputs(args)
    album = Album(folder, *choose_pictures(args, tokenizer_path, backbone_path, logs))
    device = join_processes(args.device).device
    file = {}
    if tokenizer_path or backbone_path:
        file = read_file(tokenizer_path or backbone_path)
    ours = file if "kind" in file else {}
    args.data = args.data or ours.get("data", "shapes")
    album.facts = {
        "run": args.run, "tokenizer": tokenizer_path, "backbone": backbone_path,
        "logs": ", ".join(map(str, logs)), "trained by commit": ours.get("commit"),
        "run's seed": saved_args(file).get("seed"), "seed of the pictures": args.seed,
        "images": args.data, "examples": args.images}

    needs = {PICTURES[name][0] for name in album.wanted}
    if needs & {"tokenizer", "both"}:
        hog = saved_args(file).get("teacher") == "hog"
        draw_tokenizer(args, album, tokenizer_path, backbone_path, hog, device)
    if "attention" in album.wanted:
        draw_backbone(args, album, backbone_path, device)
    album.add("curves", draw_curves, logs)
    if args.only and album.skipped:
        raise UserError("; ".join(album.skipped.values()))
    return album


def draw_tokenizer(args, album, path, backbone_path, hog, device):
    """The pictures that need a tokenizer.  hog: it was distilled from HOG, see HOG_NOTE"""
    tokenizer = load_tokenizer(path, device)
    codebook = tokenizer.quantize.embedding.weight           # (K, D)
    codes = len(codebook)
    size = tokenizer.arch()["image_size"]
    gh, gw = tokenizer.encoder.grid
    if args.codes and max(args.codes) >= codes:
        raise UserError(f"--codes must lie in [0, {codes - 1}], the codes of {path}")
    tokens = read_tokens(tokenizer, open_set(args, "val", size, args.limit), device)
    shown = read_tokens(tokenizer, open_examples(args, size, 12), device)
    counts = torch.bincount(tokens.z.flatten(), minlength=codes)
    colours = code_colours(codebook)
    patches = mean_patches(tokens, codes, turn=4 if hog else 0)
    album.facts["counted on"] = (
        f"{len(tokens.z)} held-out images of {args.data}, {gh} x {gw} patches each")
    if hog:
        album.notes = dict(codes=HOG_NOTE, prediction=HOG_NOTE, pixels=(
            f"{HOG_NOTE} The decoder learned all images with the middle as the lighter part."))

    rows = args.codes or most_used(counts, 12, among=0.5)
    album.add("codes", panels.draw_codes, tokens, rows, patches, colours, seed=args.seed)
    album.add("tokens", panels.draw_tokens, shown, colours)
    maps = args.codes or most_used(counts, 64)
    album.add("where", panels.draw_where, tokens.z, maps, colours)
    album.add("usage", panels.draw_usage, counts, colours)
    if "pixels" in album.wanted:
        train_set = open_set(args, "train", size, 2 * args.limit)
        learn = read_tokens(tokenizer, train_set, device)
        decoder = train_pixel_decoder(learn, codebook, args.decoder_steps, hog, args.seed, device)
        ten = Tokens(shown.images[:10], shown.z[:10])
        album.add("pixels", panels.draw_pixels, decoder, ten, patches, invert=hog)
    if "prediction" in album.wanted:
        draw_prediction(args, album, backbone_path, shown, patches, hog, device)


def draw_prediction(args, album, path, shown, patches, hog, device):
    """Four images with hidden patches. Skipped if backbone and tokenizer do not fit together."""
    model, file = load_beit(path, device)
    codes = len(patches)
    grid = tuple(shown.z.shape[1:])
    if model.grid != grid or model.lm_head.out_features != codes:
        album.skipped["prediction"] = (
            f"{path} names {model.lm_head.out_features} codes on {model.grid} patches, the "
            f"tokenizer {codes} on {grid}: they do not belong together")
        return
    stated = saved_args(file)
    count = stated.get("mask_patches") or model.num_patches * 75 // 196
    min_block = stated.get("mask_min_block") or max(1, model.num_patches * 16 // 196)
    four = Tokens(shown.images[:4], shown.z[:4])
    masks = []
    for i in range(len(four.z)):             # the masks that pretrain.py draws when it evaluates
        seed_all(args.seed, 0, i)
        masks.append(sample_block_mask(*grid, count, min_block))
    views = first_examples(args, model.arch()["image_size"])
    album.add("prediction", panels.draw_prediction, model, four, views, torch.stack(masks),
              patches, invert=hog)


def draw_backbone(args, album, path, device):
    """Where [CLS] looks."""
    model, _, _ = weights.load_backbone(path, pool=None, image_size=args.attention_size)
    block = args.block or model.depth        # counted from 1
    if block > model.depth:
        raise UserError(f"--block {block}: {path} has {model.depth} blocks, counted from 1")
    views = first_examples(args, model.arch()["image_size"])
    album.add("attention", panels.draw_attention, model.to(device).eval(), views, block=block - 1)


# --- the page -------------------------------------------------------------------------------------
STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto;
       padding: 0 1rem; color: #222 }
img { max-width: 100%; border: 1px solid #ddd; display: block; background: white }
p, dl { max-width: 46rem } h2 { margin: 2.5rem 0 .5rem } nav a { margin-right: 1em }
dt { float: left; clear: left; width: 11rem; color: #666 } dd { margin-left: 11.5rem }"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<h1>{title}</h1>
<nav>
{nav}
</nav>
{sections}
{missing}
<h2>What these pictures were made from</h2>
<dl>
{facts}
</dl>
</body>
</html>
"""

SECTION = """<section id="{name}">
<h2>{heading}</h2>
<img src="{name}.png" alt="{heading}: {first_sentence}.">
<p>{words} {note}</p>
</section>"""


def page(album):
    """index.html as text: a section per picture, what was skipped and why, the facts."""
    text = html.escape
    sections = []
    names = [name for name in PICTURES if name in album.drawn]
    for name in names:
        _, heading, words = PICTURES[name]
        sections.append(SECTION.format(
            name=name, heading=text(heading), first_sentence=text(words.split(". ")[0]),
            words=text(words), note=text(album.notes.get(name, ""))))
    missing = ""
    if album.skipped:
        lines = [f"<li>{name}: {text(str(why))}</li>" for name, why in album.skipped.items()]
        missing = "<h2>Not drawn</h2><ul>" + "\n".join(lines) + "</ul>"
    facts = [f"<dt>{text(name)}</dt><dd>{text(str(value))}</dd>"
             for name, value in album.facts.items() if value not in (None, "")]
    return PAGE.format(
        title=text(f"{album.facts['run']} in pictures"), style=STYLE,
        nav="\n".join(f'<a href="#{name}">{name}</a>' for name in names),
        sections="\n".join(sections), missing=missing, facts="\n".join(facts))


# --- arguments ------------------------------------------------------------------------------------
def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("paths", nargs="*", type=Path, help="the run's folder, default runs/tiny; logs "
        "(STAGE.jsonl) join its curves, and logs alone give curves alone")
    add("--out", type=Path, help="where to write: a folder, default RUN/figures; logs alone: a PNG")
    add("--only", nargs="+", choices=PICTURES, metavar="PICTURE",
        help=f"no page, only some of {', '.join(PICTURES)}")
    add("--tokenizer", type=Path, help="VQ-KD file, ours or released; default RUN/vqkd.pt")
    add("--backbone", type=Path, help="pre-trained file, ours or released; default RUN/pretrain.pt")
    add("--data", help="codes are counted on the held-out part of shapes, cifar10, cifar100 or a "
        "folder; default: what the tokenizer was trained on")
    add("--data-dir", default="datasets", help="where CIFAR lies")
    add("--limit", type=whole(1), default=2000, help="at most so many images of it; default 2000")
    add("--images", type=Path, metavar="FILE_OR_FOLDER", help="show tokens, predictions, attention "
        "and pixels of these instead of images of --data")
    add("--codes", type=whole(0, 2**20), nargs="+", help="those of codes.png and where.png; "
        "default: much used ones")
    add("--block", type=whole(1, 1000), help="attention of this block, counted from 1; default: "
        "the last")
    add("--attention-size", type=whole(1, 1024), help="image size for attention, tables resized; "
        "default: the run's")
    add("--decoder-steps", type=whole(0), default=500, help="updates of the decoder to pixels; "
        "0: without it")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--seed", type=whole(0, 2**32 - 1), default=0)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    args.logs = [path for path in args.paths if path.suffix == ".jsonl"]
    folders = [path for path in args.paths if path.suffix != ".jsonl"]
    if args.logs and not folders:
        out = args.out or Path("curves.png")
        refuse_unwritable(out.parent)
        draw_curves(args.logs, out)
        print(f"{len(args.logs)} logs -> {out}")
        return
    if len(folders) > 1:
        raise UserError(f"{' and '.join(map(str, folders))}: one run at a time; of others give "
                        f"the logs")
    args.run = folders[0] if folders else Path("runs/tiny")
    if not args.run.is_dir() and not (args.tokenizer or args.backbone):
        raise UserError(f"there is no run {args.run}: python vqkd.py makes runs/tiny, or name "
                        f"another folder")
    folder = args.out or args.run / "figures"
    refuse_unwritable(folder)
    album = draw_all(args, folder)
    for name, why in album.skipped.items():
        print(f"no {name}.png: {why}")
    if not args.only:
        (folder / "index.html").write_text(page(album), "utf-8", "surrogateescape")
        print(f"{len(album.drawn)} pictures -> {folder / 'index.html'}")


if __name__ == "__main__":
    launch(main)
