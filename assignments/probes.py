"""What a function returns on inputs that tell mistakes apart.

Each probe yields calls. Two functions that give the same in every call count as the same: that is
how a student's function is recognised as a known mistake.
"""
import importlib
import random

import numpy as np
import torch
import torch.nn.functional as F


def l2(x):
    return F.normalize(x, dim=-1)


def gradients(f, *inputs):
    """What f returns, and the gradient of its weighted sum at every input that wants one."""
    inputs = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    out = f(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    weights = torch.arange(1.0, 1 + out.numel()).view(out.shape)
    (out * weights).sum().backward()
    return [out, *[x.grad for x in inputs if x.is_floating_point()]]


# --- A1 -------------------------------------------------------------------------------------------
def nearest_code(f):
    h = torch.randn(2, 40, 6) * (0.1 + 3 * torch.rand(2, 40, 1))
    v = torch.randn(25, 6) * (0.1 + 3 * torch.rand(25, 1))
    yield lambda: f(h, v)
    yield lambda: f(h[0], v)

    def worse_under_autocast():
        h, v = l2(torch.randn(3000, 32)), l2(torch.randn(512, 32))
        with torch.autocast("cpu", torch.bfloat16):
            z = f(h, v)
        cosine = h @ v.T
        lost = (cosine.amax(dim=1) - cosine.gather(1, z[:, None])[:, 0]).amax()
        return [lost > 1e-4, lost > 0.02]    # bfloat16 loses 0.003, another code far more
    yield worse_under_autocast


def straight_through(f):
    h, v = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    yield lambda: f(h, v)
    yield lambda: gradients(f, h, v)


# --- A2 -------------------------------------------------------------------------------------------
def vqkd_loss(f):
    o, t = torch.randn(2, 6, 7), torch.randn(2, 6, 7)
    h, v = l2(torch.randn(2, 6, 4)), l2(torch.randn(2, 6, 4))

    def trained(*more):
        inputs = [x.clone().requires_grad_() for x in (o, h, v)]
        loss, parts = f(inputs[0], t, inputs[1], inputs[2], *more)
        loss.backward()
        return [loss, *[x.grad for x in inputs], *[parts[k] for k in ("cosine", "commit")]]
    yield trained
    yield lambda: trained(3.0)
    yield lambda: trained(0.5, {"clip": 4, "dino": 3})
    yield lambda: f(o.bfloat16(), t.bfloat16(), h, v)[0]
    yield lambda: sorted(f(o, t, h, v, 1.0, {"clip": 4, "dino": 3})[1])

    def keeps_the_graph():
        _, parts = f(o.clone().requires_grad_(), t, h, v)
        return any(part.requires_grad for part in parts.values())
    yield keeps_the_graph


def code_sums(f):
    h, z = torch.randn(2, 30, 5), torch.randint(0, 6, (2, 30))
    yield lambda: f(h, z, 8)
    yield lambda: f(h[0], z[0], 8)
    yield lambda: f(h.bfloat16(), z, 8)
    yield lambda: f(h.clone().requires_grad_(), z, 8)[0].requires_grad


def ema_update(f):
    book, h = l2(torch.randn(6, 4)), l2(torch.randn(12, 4))
    z = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 4, 4])
    one_hot = F.one_hot(z, 6).float()
    sums, counts = one_hot.T @ h, one_hot.sum(0)
    counts[4] = 1.0                          # as if one vector alone had chosen it
    yield lambda: f(book.clone(), sums.clone(), counts.clone(), 0.9)
    yield lambda: f(book.clone(), sums.clone(), counts.clone(), 0.3)
    yield lambda: f(book.clone(), sums.clone(), counts.clone(), 0.0)

    def inputs_afterwards():
        inputs = book.clone(), sums.clone(), counts.clone()
        f(*inputs, 0.9)
        return inputs
    yield inputs_afterwards


# --- A3 -------------------------------------------------------------------------------------------
def kmeans(f):
    x, start = l2(torch.randn(120, 3)), l2(torch.randn(9, 3))
    few = l2(torch.randn(5, 3))
    yield lambda: f(x.clone(), start.clone())
    yield lambda: f(x.clone(), start.clone(), 3)
    yield lambda: f(few.clone(), start.clone())              # some centres stay empty

    def inputs_afterwards():
        inputs = x.clone(), start.clone()
        f(*inputs)
        return inputs
    yield inputs_afterwards


def codebook_usage(f):
    counts = torch.tensor([7.0, 0, 3, 1, 1, 9, 0, 4, 2, 2, 6, 8, 5, 0, 30])
    yield lambda: f(counts)
    yield lambda: f(torch.tensor([4.0, 4, 0, 0]))
    yield lambda: f(torch.zeros(5))


class Table:
    """What restart_dead_codes takes for a codebook."""

    def __init__(self):
        self.embedding = torch.nn.Embedding(7, 4)
        self.embedding.weight.requires_grad_(False).copy_(l2(torch.randn(7, 4)))
        self.cluster_size = torch.tensor([5.0, 0.0, 3.0, 0.04, 1.0, 0.2, 0.0])


class Listener:
    """A process that remembers what was sent to the others."""

    def __init__(self):
        self.sent = []

    def broadcast(self, x):
        self.sent.append(x)


def restart_dead_codes(f):
    """Which vectors are drawn is chance. So the answers are what holds for every draw."""
    def restarted(vectors, *more):
        book, process, h = Table(), Listener(), l2(torch.randn(2, vectors // 2, 4))
        before = book.embedding.weight.clone()
        number = f(book, h, process, *more)
        after = book.embedding.weight
        moved = (after != before).any(dim=1)
        of_h = torch.isclose(after[:, None], h.flatten(0, 1), atol=1e-6).all(-1).any(-1)
        of_codes = (after[:, None] == before).all(-1).any(-1)
        return [number, moved, (moved & of_h), (moved & of_codes), len(after[moved].unique(dim=0)),
                book.cluster_size, any(x is after for x in process.sent), after[moved].norm(dim=1)]
    yield lambda: restarted(40)
    yield lambda: restarted(4)               # four vectors, three dead codes: none may come twice
    yield lambda: restarted(2)               # fewer vectors than dead codes
    yield lambda: restarted(40, 2.0)


# --- A4 -------------------------------------------------------------------------------------------
def sample_block_mask(f):
    for gh, gw, count, smallest in ((14, 14, 75, 16), (6, 6, 13, 2), (8, 5, 15, 3), (9, 9, 30, 20)):
        yield lambda a=(gh, gw, count, smallest): [f(*a) for _ in range(4)]
    yield lambda: f(14, 14, 75)


def sample_block(f):
    def empty(gh, gw):
        return [[False] * gw for _ in range(gh)]

    def blocks(mask, remaining, smallest):
        return [sorted(f([row[:] for row in mask], remaining, smallest)) for _ in range(40)]
    half = [[x < 7 for x in range(14)] for _ in range(14)]
    yield lambda: blocks(empty(14, 14), 75, 16)
    yield lambda: blocks(empty(6, 8), 13, 2)
    yield lambda: blocks(half, 20, 4)
    yield lambda: blocks(half, 5, 16)


def hidden_patches(f):
    mask = torch.zeros(3, 16, dtype=torch.bool)
    for row, hidden in zip(mask, ([1, 5, 6], [0, 2, 15], [3, 4, 11]), strict=True):
        row[hidden] = True
    yield lambda: f(mask)
    yield lambda: f(torch.tensor([[True, True, False, False], [True, True, True, True],
                                  [True, True, False, True], [True, True, True, False]]))


def mim_loss(f):
    logits, logits_cls = 2 * torch.randn(6, 9), 2 * torch.randn(6, 9)
    z = torch.randint(0, 9, (6,))

    def trained(*inputs):
        inputs = [x.clone().requires_grad_() for x in inputs]
        loss, parts = f(*inputs, z)
        loss.backward()
        return [loss, *parts, *[x.grad for x in inputs]]
    yield lambda: trained(logits, logits_cls)
    yield lambda: f(logits, None, z)
    yield lambda: [part.requires_grad for part in f(
        logits.clone().requires_grad_(), logits_cls.clone().requires_grad_(), z)[1]]
    yield lambda: f(logits.bfloat16(), logits_cls.bfloat16(), z)


# --- A5 -------------------------------------------------------------------------------------------
def aggregate(f):
    last, early = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    yield lambda: f(last.clone(), early.clone())
    yield lambda: gradients(f, last, early)

    def inputs_afterwards():
        inputs = last.clone(), early.clone()
        f(*inputs)
        return inputs
    yield inputs_afterwards


def beit(**options):
    from pretrain import BEiT
    torch.manual_seed(1)
    model = BEiT(16, 4, 16, 4, 2, 11, early_layer=options.pop("early_layer", 2), init_std=0.3,
                 layer_scale=1.0, position_std=1.0, **options)
    for name, p in model.named_parameters():
        if name.endswith(("norm.weight", "norm.bias")):
            torch.nn.init.normal_(p)         # so that a norm shows
    return model


def batch():
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, [1, 5, 6]] = True
    mask[1, [0, 9, 15]] = True
    return torch.randn(2, 3, 16, 16), mask


def streams(f):
    x, mask = batch()
    queries = F.pad(1 + mask.nonzero()[:, 1].view(2, 3), (1, 0))
    yield lambda: f(beit(), x, mask)
    yield lambda: f(beit(), x, mask, queries)
    yield lambda: f(beit(early_layer=4), x, mask, queries)
    yield lambda: f(beit(head_depth=0), x, mask)
    yield lambda: f(beit(head_depth=1), x, mask)

    def trained():
        model = beit()
        f(model, x, mask)[1].sum().backward()
        return [p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters()]
    yield trained


def forward(f):
    x, mask = batch()
    hidden = mask.nonzero()[:, 1].view(2, 3)
    yield lambda: f(beit(), x, mask)
    yield lambda: f(beit(), x, mask, hidden)
    yield lambda: f(beit(shared_head=False), x, mask)
    yield lambda: f(beit(head_depth=0), x, mask)


# --- A6 -------------------------------------------------------------------------------------------
def readout(f):
    tokens = torch.randn(3, 5, 4)
    for kind in ("cls", "mean", "both"):
        yield lambda kind=kind: f(tokens, kind)


def accuracy(f):
    logits, labels = torch.randn(20, 6), torch.randint(0, 6, (20,))
    grid = torch.randn(20, 2, 3, 6)
    yield lambda: f(logits, labels)
    yield lambda: f(logits, labels, 3)
    yield lambda: f(logits, labels, 9)
    yield lambda: f(grid, labels)
    yield lambda: f(grid, labels, 2)


def knn(f):
    bank = torch.randn(30, 4) * (0.1 + 3 * torch.rand(30, 1))
    queries = torch.randn(7, 4) * (0.1 + torch.rand(7, 1))
    labels = torch.randint(0, 5, (30,))
    yield lambda: f(bank, labels, queries, 1, 5).argmax(1)
    yield lambda: F.normalize(f(bank, labels, queries, 6, 5), p=1, dim=1)
    yield lambda: f(bank, labels, queries, 6, 5, 0.5)
    yield lambda: f(bank, labels, queries, 50, 5, 1.0)
    yield lambda: f(bank, labels, queries, 6, 5, 0.5, True)


def layer_of(f):
    for name in ("cls_token", "pos_embed", "mask_token", "patch_embed.proj.weight",
                 "blocks.0.attn.q_bias", "blocks.0.attn.relative_position_bias_table",
                 "blocks.3.mlp.fc1.weight", "blocks.11.gamma_2", "fc_norm.weight", "norm.bias",
                 "head.weight", "rel_pos_bias.relative_position_bias_table"):
        yield lambda name=name: f(name, 12)
        yield lambda name=name: f(name, 24)


def smooth_targets(f):
    labels = torch.tensor([2, 0, 3])
    yield lambda: f(labels, 5, 0.1)
    yield lambda: f(labels, 4, 0.0)


def soft_cross_entropy(f):
    logits, targets = 2 * torch.randn(6, 5), torch.rand(6, 5).softmax(-1)
    yield lambda: f(logits, targets)
    for i in range(3):
        yield lambda i=i: f(logits[i:i + 1].bfloat16(), targets[i:i + 1])
    yield lambda: f(100 * logits, targets)


PROBES = {
    "vqkd.py::nearest_code": nearest_code,
    "vqkd.py::straight_through": straight_through,
    "vqkd.py::vqkd_loss": vqkd_loss,
    "vqkd.py::code_sums": code_sums,
    "vqkd.py::ema_update": ema_update,
    "vqkd.py::kmeans": kmeans,
    "support/codebook.py::codebook_usage": codebook_usage,
    "support/codebook.py::restart_dead_codes": restart_dead_codes,
    "pretrain.py::sample_block_mask": sample_block_mask,
    "pretrain.py::sample_block": sample_block,
    "pretrain.py::hidden_patches": hidden_patches,
    "pretrain.py::mim_loss": mim_loss,
    "pretrain.py::aggregate": aggregate,
    "pretrain.py::BEiT.streams": streams,
    "pretrain.py::BEiT.forward": forward,
    "linprobe.py::readout": readout,
    "linprobe.py::accuracy": accuracy,
    "linprobe.py::knn": knn,
    "finetune.py::layer_of": layer_of,
    "finetune.py::smooth_targets": smooth_targets,
    "finetune.py::soft_cross_entropy": soft_cross_entropy,
}


# --- answers --------------------------------------------------------------------------------------
def module_of(name):
    return importlib.import_module(name.partition(".py::")[0].replace("/", "."))


def function_of(name):
    """The function in the project."""
    found = module_of(name)
    for part in name.partition("::")[2].split("."):
        found = getattr(found, part)
    return found


def function_from(name, source):
    """The function that this source defines, among the other names of its module."""
    scope = dict(vars(module_of(name)))
    exec(compile(source, name, "exec"), scope)
    return scope[name.rpartition("::")[2].rpartition(".")[2]]


def answers(name, f):
    """-> for every call of the probe a list of tensors and words; "raises" after an exception."""
    seed()
    found = []
    for call in PROBES[name](f):
        seed()
        try:
            found.append(flat(call()))
        except (Exception, SystemExit):      # whatever a student's function raises
            found.append(["raises"])
    return found


def seed():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def flat(value):
    """Nested results as one list of tensors and words. float64 counts as float32."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.").replace("float64", "float32")
        return [dtype, value.detach().double()]
    if isinstance(value, dict):
        return [part for key in sorted(value) for part in [str(key), *flat(value[key])]]
    if isinstance(value, (tuple, list)):
        return [part for one in value for part in flat(one)]
    if isinstance(value, (bool, int, float)):
        return [torch.tensor(float(value)).double()]
    return [str(value)[:80]]


def same(a, b):
    """Whether two lists of answers are equal, but for rounding."""
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return (isinstance(b, torch.Tensor) and a.shape == b.shape
                and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True))
    return isinstance(b, str) and a == b
