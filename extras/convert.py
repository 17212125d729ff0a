"""Checkpoints of one layout into another's: ours, the released code's, timm's.

    python -m extras.convert --check FILE            # what it is, its sizes, which commands take it
    python -m extras.convert IN OUT --to ours        # or released, timm (OUT: .safetensors, too)
    python -m extras.convert IN OUT --to timm --image-size 384      # positions resized as released

Names are the same in every layout, by design. What differs: where a file keeps its tensors, index
buffers, dead entries, arguments, and which parts have a place at all.

Read in this order: examine, to_ours, to_released, to_timm.
"""
import argparse
import collections
import os
import re
from pathlib import Path

import torch

from model import PRESETS, ViT, relative_position_index
from pretrain import BEiT
from segment import upernet
from support import weights
from support.args import Size
from support.files import UserError, write_file
from support.positions import TABLE, grid_of, resize_pos_embed, resize_relative_table, sides
from support.process import launch
from support.weights import DEAD, INDEX, TEACHER, WRAPPERS, listed
from vqkd import VQKD

# A file, examined. layout: ours, released or timm. weights: the tensors by name. aside: those that
# only the released code has. rest: the other entries. dropped: names of what nobody needs.
Contents = collections.namedtuple("Contents", "layout kind arch weights aside rest dropped")

SECOND_TEACHER = r"more_decode_task_layers\..*"          # the released code has no place for it
PRETRAINING = r"mask_token|(lm_head|cls_pt_\w+)\..*"     # timm has no place for it
RUN_STATE = "optimizer", "scaler", "lr_scheduler", "model_ema", "amp", "health"

ABOUT = {                # kind: what it is, and the commands that take it
    "vqkd": ("VQ-KD tokenizer", "pretrain.py --tokenizer", "-m extras.features"),
    "pretrain": ("pre-trained backbone with its heads", "finetune.py --checkpoint",
                 "linprobe.py --checkpoint", "segment.py --checkpoint"),
    "finetune": ("classifier", "finetune.py --eval --checkpoint",
                 "finetune.py --init 21k --checkpoint", "segment.py --init 21k --checkpoint"),
    "segment": ("UPerNet for segmentation", "segment.py --eval --checkpoint"),
    "backbone": ("backbone without heads", "finetune.py --checkpoint", "linprobe.py --checkpoint"),
}
SIZES = {                # what the length of a tensor says
    "quantize.embedding.weight": "codes",
    "decode_task_layer.2.bias": "numbers to rebuild (CLIP 512, DINO 768)",
    "lm_head.bias": "codes to guess",
    "head.bias": "classes",
    "decode_head.conv_seg.bias": "classes per pixel",
}


def backbone(**sizes):
    """A ViT without heads. Some files end with the last block and have no norm."""
    vit = ViT(**sizes)
    if sizes["pool"] is None:
        vit.norm = None
    return vit


NETWORKS = {"vqkd": VQKD, "pretrain": BEiT, "finetune": ViT, "segment": upernet, "backbone": ViT}


# --- reading --------------------------------------------------------------------------------------
def examine(path):
    """Take a file apart and check every name and shape.  -> Contents; UserError for any misfit."""
    checkpoint = weights.read(path)
    file = checkpoint.file
    raw = weights.unwrap(file)
    make = NETWORKS[checkpoint.kind]
    if checkpoint.kind == "backbone" and "norm.weight" not in checkpoint.weights:
        make = backbone
    weights.build(make, checkpoint)
    check_index(raw, checkpoint)

    facts = checkpoint.facts
    stated = file["arch"] if isinstance(file.get("arch"), dict) else {}
    arch = stated | checkpoint.backbone      # tensors know better than words
    arch |= {k: facts[k] for k in ("num_classes", "early_layer") if k in facts}
    if arch["layer_scale"]:                  # no tensor tells the value that it started from
        arch["layer_scale"] = stated.get("layer_scale", arch["layer_scale"])
    aside = {k: v for k, v in raw.items() if re.fullmatch(DEAD, k)}
    rest = {}
    if raw is not file:
        aside |= file.get("released_only", {})
        other = *RUN_STATE, *WRAPPERS, "kind", "arch", "released_only"
        rest = {k: v for k, v in file.items() if k not in other}
    if str(file.get("kind")).startswith(f"{checkpoint.kind}_"):      # finetune_21k: no name tells
        rest["our_kind"] = file["kind"]
    rest["args"] = weights.arguments(file)
    layout = "timm" if raw is file else "released"
    if "kind" in file:
        layout = "ours"
    dropped = [k for k in raw if re.fullmatch(TEACHER, k)] + [k for k in RUN_STATE if k in file]
    return Contents(layout, checkpoint.kind, arch, checkpoint.weights, aside, rest, dropped)


def check_index(raw, checkpoint):
    """UserError where an index buffer of the file is not ours: its tables mean something else."""
    sizes = checkpoint.backbone
    index = relative_position_index(*grid_of(sizes["image_size"], sizes["patch_size"]))
    odd = []
    for name, given in raw.items():
        if name.endswith(INDEX) and not (torch.is_tensor(given) and torch.equal(given, index)):
            odd.append(name)
    if odd:
        raise UserError(f"{checkpoint.name} orders its offsets in another way in {listed(odd)}: "
                        f"the file is damaged or not of this model")


# --- converting -----------------------------------------------------------------------------------
def resize(c, image_size):
    """The same contents for images of another size: tables and embeddings are interpolated."""
    patch_size = c.arch["patch_size"]
    least = min(sides(image_size))
    if least < 2 * patch_size:
        raise UserError(f"--image-size {least}: a patch has {patch_size} pixels, take two at least")
    grids = [grid_of(size, patch_size) for size in (c.arch["image_size"], image_size)]
    resized = dict(c.weights)
    for name, tensor in c.weights.items():
        if name.endswith(TABLE):
            resized[name] = resize_relative_table(tensor, *grids)
        elif name.endswith("pos_embed"):
            resized[name] = resize_pos_embed(tensor, *grids)
    arch = c.arch | dict(image_size=image_size)
    rest = c.rest | {k: image_size for k in c.rest if k == "image_size"}
    return c._replace(weights=resized, arch=arch, rest=rest)


def convert(c, to):
    """-> what goes into a file of layout `to`, and the names that have no place there."""
    left = {"ours": TEACHER, "released": SECOND_TEACHER, "timm": PRETRAINING}[to]
    kept = {k: v for k, v in c.weights.items() if not re.fullmatch(left, k)}
    dropped = [k for k in c.weights if k not in kept]
    write_as = {"ours": to_ours, "released": to_released, "timm": to_timm}[to]
    return write_as(c, kept), dropped


def to_ours(c, kept):
    aside = dict(released_only=c.aside) if c.aside else {}
    # Without source_hash: a stage takes a file that has one for the end of its own run.
    rest = {k: v for k, v in c.rest.items() if k not in ("source_hash", "our_kind")}
    return rest | aside | dict(kind=c.rest.get("our_kind", c.kind), arch=c.arch, model=kept)


def to_timm(c, kept):
    if c.kind in weights.PREFIX:
        raise UserError(f"timm has no place for a {ABOUT[c.kind][0]}: use --to ours or --to "
                        f"released")
    kept = weights.table_per_block(kept, c.arch["depth"])
    return {k: v.clone(memory_format=torch.contiguous_format) for k, v in kept.items()}


def to_released(c, kept):
    index = relative_position_index(*grid_of(c.arch["image_size"], c.arch["patch_size"]))
    full = {}
    for name, tensor in kept.items():
        full[name] = tensor
        if name.endswith(TABLE):
            full[name.removesuffix(TABLE) + INDEX] = index
    if c.kind == "vqkd":                     # loaded strictly, so with the dead entries
        name = "quantize.embedding"
        codes = kept[f"{name}.weight"]
        full |= {f"{name}.cluster_size": torch.zeros(len(codes)),
                 f"{name}.embed_avg": codes.clone(),
                 f"{name}.initted": torch.ones(1)}       # 1: no k-means on top of these codes
        full |= c.aside
    wrapped = dict(model=full)
    if c.kind == "segment":                  # mmseg reads the names of the classes from meta
        classes = c.rest.get("classes")
        names = dict(CLASSES=tuple(classes)) if classes else {}
        wrapped = dict(meta=names | (c.rest.get("meta") or {}), state_dict=full)
    # arch is ours: it tells what shapes cannot. The released code ignores it.
    return c.rest | dict(arch=c.arch, args=argparse.Namespace(**c.rest["args"])) | wrapped


def timm_arguments(arch):
    """For timm.create_model("beitv2_base_patch16_224", ...), which loads --to timm strictly."""
    pool = "avg" if arch["pool"] == "mean" else "token"
    options = dict(
        img_size=arch["image_size"], patch_size=arch["patch_size"], embed_dim=arch["width"],
        depth=arch["depth"], num_heads=arch["heads"], num_classes=arch.get("num_classes", 0),
        global_pool=pool)
    if arch["positions"] == "absolute":
        options |= dict(use_abs_pos_emb=True, use_rel_pos_bias=False)
    if not arch["layer_scale"]:
        options["init_values"] = 0           # None is left out by create_model
    if arch["mlp_ratio"] != 4:
        options["mlp_ratio"] = arch["mlp_ratio"]
    if arch["in_channels"] != 3:
        options["in_chans"] = arch["in_channels"]
    return options


# --- the command ----------------------------------------------------------------------------------
def describe(c, path):
    """What a file is, its sizes, and the commands that take it: lines for a reader."""
    a = c.arch
    w = c.weights
    what, *uses = ABOUT[c.kind]
    not_trained = r"quantize\.|.*\.(running_|num_batches)"
    parameters = sum(v.numel() for k, v in w.items() if not re.match(not_trained, k))
    heads = [f"{len(w[k])} {name}" for k, name in SIZES.items() if k in w]
    for name in ("decoder.blocks", "cls_pt_layers"):
        if blocks := weights.count(w, name):
            heads.append(f"{blocks} in {name}")
    gh, gw = grid_of(a["image_size"], a["patch_size"])
    presets = {preset["width"]: name for name, preset in PRESETS.items()}
    model = presets.get(a["width"], "NONE_OF_THIS_WIDTH")
    scale = "layer scale" if a["layer_scale"] else "no layer scale"
    left_behind = sorted({k.split(".")[0] for k in c.dropped})
    lines = [
        ("kind", f"{what} ({c.kind}), layout: {c.layout}"),
        ("images", f"{gh * a['patch_size']}x{gw * a['patch_size']}, patch {a['patch_size']}"),
        ("backbone", f"width {a['width']}, {a['depth']} blocks, {a['heads']} heads, MLP ratio "
                     f"{a['mlp_ratio']:g}, positions {a['positions']}, {scale}, pool {a['pool']}"),
        ("heads", ", ".join(heads) or "none"),
        ("parameters", f"{parameters:,} in {len(w)} tensors"),
        ("left behind", ", ".join(left_behind) or "nothing")]
    lines += [("good for", f"python {use} {path} --model {model}") for use in uses]
    return "\n".join([str(path)] + [f"  {label:12} {text}" for label, text in lines])


def write(path, contents):
    """As write_file, or a .safetensors file: under a temporary name, then renamed."""
    if path.suffix != ".safetensors":
        return write_file(path, contents)
    from safetensors.torch import save
    temporary = Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(save(contents, metadata=dict(format="pt")))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"could not write {path} ({error.strerror}): free some space or choose "
                        f"another OUT") from error


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="*", type=Path, metavar="IN OUT",
                   help="a checkpoint of any kind, and one to write")
    p.add_argument("--to", choices=["ours", "released", "timm"], help="whose layout OUT gets")
    p.add_argument("--image-size", type=int, nargs="+", action=Size, metavar="PIXELS",
                   help="resize positions to images of this size, or height and width")
    p.add_argument("--check", type=Path, metavar="FILE",
                   help="check every name of FILE, say what it is and good for")
    args = p.parse_args(argv)
    if args.check:
        return args
    if len(args.files) != 2 or args.to is None:
        raise UserError("give IN OUT --to ours|released|timm, or --check FILE")
    source, target = args.files
    if target.exists():
        same = source.exists() and target.samefile(source)
        raise UserError(f"{target} {'is IN itself' if same else 'exists'}: nothing is "
                        f"overwritten, choose another OUT")
    if target.suffix == ".safetensors" and args.to != "timm":
        raise UserError(f"{target}: a .safetensors file holds tensors alone, which only --to timm "
                        f"makes; name it .pt")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.check:
        print(describe(examine(args.check), args.check))
        return
    source, target = args.files
    c = examine(source)
    if args.image_size is not None:
        c = resize(c, args.image_size)
    contents, dropped = convert(c, args.to)
    write(target, contents)
    parts = collections.Counter(k.split(".")[0] for k in c.dropped + dropped)
    left_behind = [f"{name} ({n})" if n > 1 else name for name, n in parts.items()]
    print(f"{source} ({c.kind}, {c.layout}) -> {target} ({args.to}): "
          f"{len(weights.unwrap(contents))} names")
    print(f"left behind: {', '.join(left_behind) or 'nothing'}")
    if args.to == "timm":
        options = ", ".join(f"{k}={v!r}" for k, v in timm_arguments(c.arch).items())
        print(f'load it strictly into timm.create_model("beitv2_base_patch16_224", {options})')


if __name__ == "__main__":
    launch(main)
