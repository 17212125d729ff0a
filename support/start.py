"""The file that a stage starts from: which one, is it fit, what was used of it.

    start_file       fine-tuning, segmentation: its name, as --init, --eval and --checkpoint say
    read_start       its contents, compared with the flags
    start_backbone   the network
    describe_start   one sentence for the screen
    go_on_from       pre-training: --init fills the network with the weights of a file
"""
import re
from pathlib import Path

from model import PRESETS, ViT
from support import weights
from support.files import UserError
from support.positions import TABLE, grid_of, resize_relative_table

SHARED_TABLE = f"rel_pos_bias.{TABLE}"
HEADS = r"(lm_head|cls_pt_\w+)\..*"      # of pre-training: over the codes, and the shallow head


def start_file(args, stage):
    """The file to start from, or with --eval to measure; None for random weights.

    stage: how this stage calls its own file.
    """
    if args.init == "scratch" and not args.eval:
        if args.checkpoint:
            raise UserError(f"--init scratch starts from random weights: "
                            f"leave out --checkpoint {args.checkpoint}")
        return None
    name = "finetune_21k" if args.init == "21k" else "pretrain"
    if args.eval:
        name = stage
    folder = args.out or Path("runs") / args.model
    return args.checkpoint or folder / f"{name}.pt"


def read_start(args):
    """The file --checkpoint.  -> Checkpoint; None for random weights, or a dry run without the file

    UserError if the file is missing, of another kind, or of other sizes than the flags say.
    """
    path = args.checkpoint
    if path is None or (args.dry_run and not path.is_file()):
        return None
    classifier = args.eval or args.init == "21k"
    script = "finetune.py" if classifier else "pretrain.py"
    if path.stem == "finetune_21k":
        script += " --intermediate"
    command = f"python {script} --model {args.model} --out {path.parent}"
    checkpoint = weights.read(path, f"make it with {command}, or give --checkpoint FILE, ours or "
                                    f"released")
    refuse_other_sizes(args, checkpoint)
    if checkpoint.kind == "finetune" and not classifier:
        raise UserError(f"{path} is a classifier already: use --init 21k to go on from it")
    if checkpoint.kind != "finetune" and classifier:
        raise UserError(f"{path} is no classifier: use --init pretrain, or make one with "
                        f"python finetune.py")
    return checkpoint


def refuse_other_sizes(args, checkpoint):
    """UserError if --model or --patch-size differ from the file."""
    path = checkpoint.name
    sizes = checkpoint.backbone
    width = PRESETS[args.model]["width"]
    if sizes["width"] != width:
        raise UserError(f"{path} has width {sizes['width']}, --model {args.model} has {width}: "
                        f"give the --model it was made with")
    if args.patch_size not in (None, sizes["patch_size"]):
        raise UserError(f"--patch-size {args.patch_size}: the weights in {path} have "
                        f"{sizes['patch_size']}; leave the flag out")


def start_backbone(args, checkpoint, **options):
    """-> ViT, Report of the names loaded.  checkpoint: from read_start

    None: random weights, and then the report is None, too. options: of ViT (pool, drop_path, ...).
    """
    if checkpoint is None:
        patch_size = args.patch_size or PRESETS[args.model]["patch_size"]
        sizes = PRESETS[args.model] | dict(image_size=args.image_size, patch_size=patch_size)
        return ViT(**sizes, **options), None
    model, _, report = weights.load_backbone(checkpoint, image_size=args.image_size, **options)
    return model, report


def describe_start(args, report):
    """Where the weights come from, and which parts start afresh or are not used."""
    if report is None:
        return "random weights"
    return describe(args.checkpoint, report)


def describe(path, report):
    fresh = sorted({name.split(".")[0] for name in report.missing})
    unused = sorted({name.split(".")[0] for name in report.unexpected})
    return (f"weights from {path} ({len(report.loaded)} tensors; "
            f"fresh: {', '.join(fresh) or 'none'}; unused: {', '.join(unused) or 'none'})")


# --- pre-training goes on -------------------------------------------------------------------------
def go_on_from(path, model):
    """Fill a network of stage 2 with the weights of a file, ours or released.  -> one sentence

    The position table is resized to the model's grid. The head over the codes is kept if the file
    has as many codes, the shallow head if it has the same blocks; otherwise they start afresh.
    Raises UserError if the file is of no pre-training, or of another size.
    """
    checkpoint = weights.read(path, "give --init a file of pretrain.py, or a released one")
    given = dict(checkpoint.weights)
    if checkpoint.kind not in ("pretrain", "backbone") or SHARED_TABLE not in given:
        raise UserError(f"--init {path} is of another stage ({checkpoint.kind}) or has other "
                        f"positions: pre-training goes on from pre-trained weights")
    heads = checkpoint.backbone["heads"]
    if heads != model.heads:
        raise UserError(f"--init {path} has {heads} attention heads, --model has {model.heads}: "
                        f"give the --model it was made with")
    grid = grid_of(checkpoint.backbone["image_size"], checkpoint.backbone["patch_size"])
    given[SHARED_TABLE] = resize_relative_table(given[SHARED_TABLE], grid, model.grid)
    own = model.state_dict()
    for part in ("lm_head", "cls_pt_layers", "cls_pt_norm", "cls_pt_lm_head"):
        shapes = [{name: tensor.shape for name, tensor in state.items()
                   if name.startswith(f"{part}.")} for state in (own, given)]
        if shapes[0] != shapes[1]:           # afresh
            given = {name: v for name, v in given.items() if name not in shapes[0]}
    may_miss = HEADS if checkpoint.kind == "pretrain" else rf"{HEADS}|mask_token|norm\..*"
    needed = {name: v for name, v in own.items()
              if name in given or not re.fullmatch(may_miss, name)}
    used = {name: v for name, v in given.items() if name in own or not re.fullmatch(HEADS, name)}
    weights.check(needed, checkpoint._replace(weights=used),
                  "give the --model and --patch-size it was made with")
    used = {name: v.float() for name, v in used.items()}
    model.load_state_dict(used, strict=False)
    report = weights.Report(list(used), own.keys() - used.keys(),
                            checkpoint.weights.keys() - used.keys())
    resized = ""
    if grid != model.grid:
        resized = f"; positions resized from {grid[0]}x{grid[1]} patches"
    return describe(path, report) + resized
