"""Checkpoints of one layout into another's: ours, the released code's, timm's; and what a file is and is good for.

    python -m extras.convert --check FILE                       # what it is, how large, which commands take it
    python -m extras.convert IN OUT --to ours                   # or released, timm (OUT may end in .safetensors)
    python -m extras.convert IN OUT --to timm --image-size 384  # position tables resized as the released code does it

Read in this order: examine, convert.
"""
import argparse
import collections
import os
import re
from pathlib import Path

import torch

from model import PRESETS, ViT, relative_position_index
from support.files import UserError, write_file
from support.process import launch
from support.weights import (
    INDEX, PREFIX, TABLE, WRAPPERS, arguments, grid_of, kind_of, listed, read, read_architecture, resize_pos_embed,
    resize_relative_table, state_dict, strip_prefix, table_per_block, unwrap)


# A file, taken apart: whose layout it has (ours, released, timm), kind, arch, its tensors by name, those that only the
# released code has (aside), the other entries (rest), and the names of what nobody needs (dropped).
Contents = collections.namedtuple("Contents", "layout kind arch weights aside rest dropped")

# Names are the same in every layout, by design. This is what has no place in one of them:
TEACHER = r"(teacher_model|scaling_layer)\..*"                   # ours: a copy of CLIP or DINO in a released tokenizer
DEAD = r"quantize\.embedding\.(cluster_size|embed_avg|initted)"  # ours, but kept aside: the released code asks for them
SECOND_TEACHER = r"more_decode_task_layers\..*"                  # released
PRETRAINING = r"mask_token|(lm_head|cls_pt_\w+)\..*"             # timm
STATE = ("optimizer", "scaler", "lr_scheduler", "model_ema", "amp", "health")     # of a run, not of a model

ABOUT = {                # kind: what it is, and the commands that take it
    "vqkd": ("VQ-KD tokenizer", "pretrain.py --tokenizer", "vqkd.py --encode IMAGES --init"),
    "pretrain": ("pre-trained backbone with its heads", "finetune.py --checkpoint", "linprobe.py --checkpoint",
                 "segment.py --checkpoint"),
    "finetune": ("classifier", "finetune.py --eval --checkpoint", "finetune.py --init 21k --checkpoint",
                 "segment.py --init 21k --checkpoint"),
    "segment": ("UPerNet for segmentation", "segment.py --eval --checkpoint"),
    "backbone": ("backbone without heads", "finetune.py --checkpoint", "linprobe.py --checkpoint"),
}
SIZES = {"quantize.embedding.weight": "codes", "decode_task_layer.2.bias": "numbers to rebuild (CLIP 512, DINO 768)",
         "lm_head.bias": "codes to guess", "head.bias": "classes", "decode_head.conv_seg.bias": "classes per pixel"}


def affine(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def conv_norm(conv, norm, *shape):
    """A convolution without bias (none at all where conv is None) and its BatchNorm."""
    return ({f"{conv}.weight": shape} if conv else {}) | affine(norm, *shape[:1]) | {
        f"{norm}.running_mean": shape[:1], f"{norm}.running_var": shape[:1], f"{norm}.num_batches_tracked": ()}


def shapes_of(kind, weights, arch):
    """Every name that a complete file of this kind holds, with its shape. What only heads know (the number of codes, of
    classes, of blocks in a head, a teacher's width) is read off their own tensors."""
    D, prefix = arch["width"], PREFIX.get(kind, "")

    def size(name, axis=0):
        return weights[name].shape[axis] if name in weights and weights[name].ndim > axis else 0

    def count(name):                                         # of layers in a list, by their numbers
        return max((1 + int(m[1]) for m in (re.match(rf"{name}\.(\d+)\.", k) for k in weights) if m), default=0)

    def vit(prefix, depth, **changes):                       # one block is built and stands for all
        sizes = {k: arch[k] for k in ("image_size patch_size width heads in_channels mlp_ratio positions layer_scale "
                                      "pool").split()}
        one = ViT(depth=1, **(sizes | changes)).state_dict()
        return {prefix + k.replace("blocks.0.", f"blocks.{i}."): tuple(v.shape) for k, v in one.items()
                for i in range(depth if k.startswith("blocks.0.") else 1)}

    shapes = vit(prefix, arch["depth"])
    if kind == "segment" or (kind == "backbone" and not any("norm" in k.split(".")[0] for k in weights)):
        shapes = {k: v for k, v in shapes.items() if not k.startswith(f"{prefix}norm.")}
    if kind == "vqkd":
        dim, grid = size("quantize.embedding.weight", 1), grid_of(arch["image_size"], arch["patch_size"])
        shapes |= vit("decoder.", count(r"decoder\.blocks"), image_size=grid, patch_size=1, in_channels=dim)
        shapes |= {f"quantize.{k}": (size("quantize.embedding.weight"), dim)[:n] for k, n in (
            ("embedding.weight", 2), ("cluster_size", 1))}
        more = [f"more_decode_task_layers.{i}" for i in range(count("more_decode_task_layers"))]
        shapes |= affine("encode_task_layer.0", D, D) | affine("encode_task_layer.2", dim, D)
        for name in ("decode_task_layer", *more):
            shapes |= affine(f"{name}.0", D, D) | affine(f"{name}.2", size(f"{name}.2.bias"), D)
    elif kind == "pretrain":
        shapes |= {"mask_token": (1, 1, D)} | affine("lm_head", size("lm_head.bias"), D)
        for i in range(count("cls_pt_layers")):              # like any block, but without a table of its own
            shapes |= {k.replace("blocks.0.", f"cls_pt_layers.{i}."): v for k, v in shapes.items()
                       if k.startswith("blocks.0.") and not k.endswith(TABLE)}
        if any(k.startswith(("cls_pt_norm.", "cls_pt_lm_head.")) for k in weights):
            shapes |= affine("cls_pt_norm", D) | affine("cls_pt_lm_head", size("lm_head.bias"), D)
    elif kind == "finetune":
        shapes |= affine("head", size("head.bias"), D)
    elif kind == "segment":
        classes, C = size("decode_head.conv_seg.bias"), size("decode_head.conv_seg.weight", 1)
        aux = size("auxiliary_head.conv_seg.weight", 1)
        for name in ("fpn1.0", "fpn1.3", "fpn2.0"):          # transposed convolutions
            shapes |= affine(f"backbone.{name}", D, D, 2, 2)
        shapes |= conv_norm(None, "backbone.fpn1.1", D)
        for name, *shape in [(f"psp_modules.{i}.1", C, D, 1, 1) for i in range(4)] + [             # pools 1, 2, 3, 6
                *((f"lateral_convs.{i}", C, D, 1, 1) for i in range(3)), ("bottleneck", C, D + 4 * C, 3, 3),
                *((f"fpn_convs.{i}", C, C, 3, 3) for i in range(3)), ("fpn_bottleneck", C, 4 * C, 3, 3)]:
            shapes |= conv_norm(f"decode_head.{name}.conv", f"decode_head.{name}.bn", *shape)
        shapes |= conv_norm("auxiliary_head.convs.0.conv", "auxiliary_head.convs.0.bn", aux, D, 3, 3)
        shapes |= affine("decode_head.conv_seg", classes, C, 1, 1)
        shapes |= affine("auxiliary_head.conv_seg", classes, aux, 1, 1)
    return shapes


def examine(path):
    """Take a file apart and check it name by name, shape by shape. -> Contents; UserError for what does not belong."""
    file = read(path)
    raw, weights = unwrap(file), state_dict(file, str(path))
    kind, rest = kind_of(weights, path), {}
    stated = file["arch"] if isinstance(file.get("arch"), dict) else {}
    arch = read_architecture(weights, stated, path)
    aside = {k: v for k, v in weights.items() if re.fullmatch(DEAD, k)}
    teacher = [k for k in weights if re.fullmatch(TEACHER, k)]
    weights = {k: v for k, v in weights.items() if k not in aside and k not in teacher}
    bare = strip_prefix(weights)
    if f"rel_pos_bias.{TABLE}" in bare:
        arch["positions"] = "shared"
    arch["pool"] = "mean" if any(k.startswith("fc_norm.") for k in bare) else "cls" if kind == "finetune" else None
    if kind == "finetune" and "head.bias" in weights:
        arch["num_classes"] = len(weights["head.bias"])

    wanted = shapes_of(kind, weights, arch)
    index = relative_position_index(*grid_of(arch["image_size"], arch["patch_size"]))
    problems = [("lacks", [k for k in wanted if k not in weights]),
                ("has the unknown", [k for k in weights if k not in wanted]),
                ("has in a wrong shape", [f"{k} {tuple(weights[k].shape)} instead of {shape}" for k, shape in
                                          wanted.items() if k in weights and weights[k].shape != shape]),
                ("has numbers that are not finite in", [k for k, v in weights.items() if not torch.isfinite(v).all()]),
                ("orders its offsets in another way in", [k for k, v in raw.items() if str(k).endswith(INDEX) and (
                    not torch.is_tensor(v) or v.shape != index.shape or (v != index).any())])]
    if found := " and ".join(f"{what} {listed(names)}" for what, names in problems if names):
        raise UserError(f"{path} ({kind}) {found}: the file is incomplete, damaged or not of this model")
    if raw is not file:
        aside |= file.get("released_only", {})
        rest = {k: v for k, v in file.items() if k not in (*STATE, *WRAPPERS, "kind", "arch", "released_only")}
    if str(file.get("kind")).startswith(f"{kind}_"):         # finetune_21k: what no name tells
        rest["our_kind"] = file["kind"]
    rest["args"] = arguments(rest)
    layout = "ours" if "kind" in file else "timm" if raw is file else "released"
    return Contents(layout, kind, arch | stated, weights, aside, rest, teacher + [k for k in STATE if k in file])


def resize(c, image_size):
    """The same contents for images of another size: every table and position embedding is interpolated."""
    if image_size < 2 * c.arch["patch_size"]:
        raise UserError(f"--image-size {image_size}: a patch has {c.arch['patch_size']} pixels, take two at least")
    grids = [grid_of(size, c.arch["patch_size"]) for size in (c.arch["image_size"], image_size)]
    weights = {k: resize_relative_table(v, *grids) if k.endswith(TABLE) else
               resize_pos_embed(v, *grids) if k.endswith("pos_embed") else v for k, v in c.weights.items()}
    return c._replace(weights=weights, arch=c.arch | dict(image_size=image_size),
                      rest=c.rest | {k: image_size for k in c.rest if k == "image_size"})


def convert(c, to):
    """-> what goes into a file of layout `to`, and the names that have no place there."""
    left = {"ours": TEACHER, "released": SECOND_TEACHER, "timm": PRETRAINING}[to]
    weights = {k: v for k, v in c.weights.items() if not re.fullmatch(left, k)}
    dropped = [k for k in c.weights if k not in weights]
    if to == "ours":
        aside = dict(released_only=c.aside) if c.aside else {}
        # Without source_hash: a stage takes a file that has one for the end of its own run.
        rest = {k: v for k, v in c.rest.items() if k not in ("source_hash", "our_kind")}
        return rest | aside | dict(kind=c.rest.get("our_kind", c.kind), arch=c.arch, model=weights), dropped
    if to == "timm":
        if c.kind in PREFIX:
            raise UserError(f"timm has no place for a {ABOUT[c.kind][0]}: use --to ours or --to released")
        weights = table_per_block(weights, c.arch["depth"])
        return {k: v.clone(memory_format=torch.contiguous_format) for k, v in weights.items()}, dropped
    index, full = relative_position_index(*grid_of(c.arch["image_size"], c.arch["patch_size"])), {}
    for k, v in weights.items():
        full |= {k: v} | ({k.removesuffix(TABLE) + INDEX: index} if k.endswith(TABLE) else {})
    if c.kind == "vqkd":                                     # loaded strictly, so with the dead entries
        name, codes = "quantize.embedding", weights["quantize.embedding.weight"]
        full |= {f"{name}.cluster_size": torch.zeros(len(codes)), f"{name}.embed_avg": codes.clone(),
                 f"{name}.initted": torch.ones(1)} | c.aside             # 1: no k-means start on top of these codes
    wrapped = dict(model=full)
    if c.kind == "segment":              # mmseg reads the names of the classes from meta
        names = dict(CLASSES=tuple(c.rest["classes"])) if c.rest.get("classes") else {}
        wrapped = dict(meta=names | (c.rest.get("meta") or {}), state_dict=full)
    # arch is ours: it tells what shapes cannot (heads without a table, unequal sides); the released code ignores it.
    return c.rest | dict(arch=c.arch, args=argparse.Namespace(**c.rest["args"])) | wrapped, dropped


def timm_arguments(arch):
    """For timm.create_model("beitv2_base_patch16_224", ...): the model which the file of --to timm loads strictly."""
    more = dict(use_abs_pos_emb=True, use_rel_pos_bias=False) if arch["positions"] == "absolute" else {}
    more |= {} if arch["layer_scale"] else dict(init_values=0)           # None is left out by create_model
    more |= {} if arch["mlp_ratio"] == 4 else dict(mlp_ratio=arch["mlp_ratio"])
    more |= {} if arch["in_channels"] == 3 else dict(in_chans=arch["in_channels"])
    return dict(img_size=arch["image_size"], patch_size=arch["patch_size"], embed_dim=arch["width"],
                depth=arch["depth"], num_heads=arch["heads"], num_classes=arch.get("num_classes", 0),
                global_pool="avg" if arch["pool"] == "mean" else "token", **more)


def describe(c, path):
    """What a file is, its sizes, and the commands that take it: lines for a reader."""
    a, (what, *uses), w = c.arch, ABOUT[c.kind], c.weights
    count = sum(v.numel() for k, v in w.items() if not re.match(r"quantize\.|.*\.(running_|num_batches)", k))
    lists = {m[1]: m[2] for m in (re.match(r"(decoder\.blocks|cls_pt_layers)\.(\d+)", k) for k in w) if m}
    sizes = [f"{len(w[k])} {name}" for k, name in SIZES.items() if k in w]
    sizes += [f"{int(last) + 1} in {name}" for name, last in lists.items()]
    height, breadth = (a["image_size"],) * 2 if isinstance(a["image_size"], int) else a["image_size"]
    model = {preset["width"]: name for name, preset in PRESETS.items()}.get(a["width"], "NONE_OF_THIS_WIDTH")
    lines = [("kind", f"{what} ({c.kind}), layout: {c.layout}"),
             ("images", f"{height}x{breadth}, patch {a['patch_size']}"),
             ("backbone", f"width {a['width']}, {a['depth']} blocks, {a['heads']} heads, positions {a['positions']}, "
                          f"{'layer scale' if a['layer_scale'] else 'no layer scale'}, pool {a['pool']}"),
             ("heads", ", ".join(sizes) or "none"), ("parameters", f"{count:,} in {len(w)} tensors"),
             ("checksum", "agrees with the tensors" if "checksum" in c.rest else "none in this file"),
             ("left behind", ", ".join(sorted({k.split('.')[0] for k in c.dropped})) or "nothing"),
             *(("good for", f"python {use} {path} --model {model}") for use in uses)]
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
        raise UserError(f"could not write {path} ({error.strerror}): free some space or choose another OUT") from error


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="*", type=Path, metavar="IN OUT", help="a checkpoint of any kind, and one to write")
    p.add_argument("--to", choices=["ours", "released", "timm"], help="whose layout OUT gets")
    p.add_argument("--image-size", type=int, help="resize positions to images of so many pixels")
    p.add_argument("--check", type=Path, metavar="FILE", help="check every name of FILE, say what it is and good for")
    args = p.parse_args(argv)
    if args.check:
        print(describe(examine(args.check), args.check))
        return
    if len(args.files) != 2 or args.to is None:
        raise UserError("give IN OUT --to ours|released|timm, or --check FILE")
    source, target = args.files
    if target.exists():
        same = source.exists() and target.samefile(source)
        raise UserError(f"{target} {'is IN itself' if same else 'exists'}: nothing is overwritten, choose another OUT")
    if target.suffix == ".safetensors" and args.to != "timm":
        raise UserError(f"{target}: a .safetensors file holds tensors alone, which only --to timm makes; name it .pt")
    c = examine(source)
    if args.image_size is not None:
        c = resize(c, args.image_size)
    contents, dropped = convert(c, args.to)
    write(target, contents)
    dropped = collections.Counter(k.split(".")[0] for k in c.dropped + dropped)
    print(f"{source} ({c.kind}, {c.layout}) -> {target} ({args.to}): {len(unwrap(contents))} names\nleft behind: "
          + (", ".join(f"{name} ({n})" if n > 1 else name for name, n in dropped.items()) or "nothing"))
    if args.to == "timm":
        options = ", ".join(f"{k}={v!r}" for k, v in timm_arguments(c.arch).items())
        print(f'load it strictly into timm.create_model("beitv2_base_patch16_224", {options})')


if __name__ == "__main__":
    launch(main)
