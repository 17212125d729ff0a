"""Natural mistakes in the functions of A4 to A6, the backbone and the probe: see mistakes.py."""

RIGHT = {
    "pretrain.py::sample_block_mask": """
def sample_block_mask(gh, gw, count, min_block=16):
    mask = [[False for _ in range(gw)] for _ in range(gh)]
    hidden = 0
    while hidden < count:
        block = sample_block(mask, count - hidden, min_block)
        for y, x in block:
            mask[y][x] = True
        hidden += len(block)
    return torch.tensor(mask)
""",
    "pretrain.py::sample_block": """
def sample_block(mask, remaining, min_block):
    gh, gw = len(mask), len(mask[0])
    for _ in range(10):
        area = random.uniform(min_block, remaining)
        aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
        h = round(math.sqrt(area * aspect))
        w = round(math.sqrt(area / aspect))
        if 0 < h < gh and 0 < w < gw:
            top = random.randint(0, gh - h)
            left = random.randint(0, gw - w)
            new = []
            for y in range(top, top + h):
                for x in range(left, left + w):
                    if not mask[y][x]:
                        new.append((y, x))
            if new and len(new) <= remaining:
                return new
    visible = [(y, x) for y in range(gh) for x in range(gw) if not mask[y][x]]
    return random.sample(visible, remaining)
""",
    "pretrain.py::hidden_patches": """
def hidden_patches(mask):
    rows = [row.nonzero()[:, 0] for row in mask]
    if len({len(row) for row in rows}) > 1:
        raise ValueError("every image must hide equally many patches")
    return torch.stack(rows)
""",
    "pretrain.py::mim_loss": """
def mim_loss(logits, logits_cls, z):
    log_p = logits.float().log_softmax(dim=-1)
    loss_mim = -log_p.gather(1, z[:, None]).mean()
    if logits_cls is None:
        return loss_mim, (loss_mim.detach(), torch.zeros_like(loss_mim))
    log_p_cls = logits_cls.float().log_softmax(dim=-1)
    loss_cls = -log_p_cls.gather(1, z[:, None]).mean()
    return loss_mim + loss_cls, (loss_mim.detach(), loss_cls.detach())
""",
    "pretrain.py::aggregate": """
def aggregate(last, early):
    cls = last[:, 0]
    patches = early[:, 1:]
    return torch.cat([cls[:, None], patches], dim=1)
""",
    "pretrain.py::BEiT.streams": """
def streams(self, x, mask, queries=None):
    bias = self.shared_bias()
    tokens = self.features(x, [self.early_layer - 1, self.depth - 1], mask, bias)
    early, last = tokens
    side = None
    if len(self.cls_pt_layers) > 0:
        side = aggregate(last, early)
        for block in self.cls_pt_layers:
            side = self.run(block, side, bias)
    if queries is not None:
        last = last.take_along_dim(queries[:, :, None], dim=1)
        side = None if side is None else side.take_along_dim(queries[:, :, None], dim=1)
    return last, side
""",
    "pretrain.py::BEiT.forward": """
def forward(self, x, mask, hidden=None):
    if hidden is None:
        hidden = hidden_patches(mask)
    cls = torch.zeros_like(hidden[:, :1])
    queries = torch.cat([cls, hidden + 1], dim=1)
    last, side = self.streams(x, mask, queries)
    last = self.norm(last[:, 1:]).flatten(0, 1)
    logits = self.lm_head(last)
    if side is None:
        return logits, None
    norm, head = self.norm, self.lm_head
    if not self.shared_head:
        norm, head = self.cls_pt_norm, self.cls_pt_lm_head
    side = norm(side[:, 1:]).flatten(0, 1)
    return logits, head(side)
""",
    "linprobe.py::readout": """
def readout(tokens, kind):
    cls = tokens[:, 0]
    mean = tokens[:, 1:].mean(dim=1)
    if kind == "cls":
        return cls
    if kind == "mean":
        return mean
    return torch.cat([cls, mean], dim=1)
""",
    "linprobe.py::accuracy": """
def accuracy(logits, labels, k=1):
    k = min(k, logits.shape[-1])
    best = logits.topk(k, dim=-1).indices
    while labels.ndim < best.ndim:
        labels = labels.unsqueeze(-1)
    hit = (best == labels).sum(dim=-1)
    return 100 * hit.double().mean(dim=0)
""",
    "linprobe.py::knn": """
def knn(bank, bank_labels, queries, k, classes, temperature=0.07, sign_blind=False, chunk=256):
    a = F.normalize(queries.float(), dim=-1)
    b = F.normalize(bank.float(), dim=-1)
    cosine = a @ b.T
    if sign_blind:
        cosine = cosine.abs()
    best, nearest = cosine.topk(min(k, len(bank)), dim=-1)
    vote = torch.exp(best / temperature)
    one_hot = F.one_hot(bank_labels[nearest], classes).float()
    return (vote[..., None] * one_hot).sum(dim=1)
""",
    "finetune.py::layer_of": """
def layer_of(name, depth):
    part = name.split(".")
    first = part[0]
    if first in ("cls_token", "mask_token", "pos_embed", "patch_embed"):
        return 0
    if first == "blocks":
        return int(part[1]) + 1
    return depth + 1
""",
    "finetune.py::smooth_targets": """
def smooth_targets(labels, classes, smoothing):
    targets = torch.full((len(labels), classes), smoothing / classes)
    targets = targets.to(labels.device)
    rows = torch.arange(len(labels))
    targets[rows, labels] += 1 - smoothing
    return targets
""",
    "finetune.py::soft_cross_entropy": """
def soft_cross_entropy(logits, targets):
    logits = logits.float()
    log_p = logits - logits.logsumexp(dim=-1, keepdim=True)
    return -(targets * log_p).sum(dim=-1).mean()
""",
}

MISTAKES = {
    "pretrain.py::sample_block_mask": [
        ("[[False for _ in range(gw)] for _ in range(gh)]", "[[False] * gw] * gh",
         "All rows are one and the same list: [[False] * gw] * gh repeats a reference."),
        ("while hidden < count:", "if hidden < count:",
         "One block alone hides too few patches: go on until `count` are hidden."),
        ("count - hidden, min_block", "count, min_block",
         "The last block may hide more than remains: hand on how many are still to be hidden."),
        ("for _ in range(gw)] for _ in range(gh)]", "for _ in range(gh)] for _ in range(gw)]",
         "Rows and columns are swapped: the mask is (gh, gw)."),
        ("torch.tensor(mask)", "~torch.tensor(mask)",
         "The mask is inverted: True stands for hidden."),
        ("torch.tensor(mask)", "torch.tensor(mask).float()",
         "The mask has to be bool: with it one picks tokens and codes."),
        ("torch.tensor(mask)", "torch.tensor(mask).flatten()",
         "The mask is flat: its shape is (gh, gw)."),
        ("count - hidden, min_block)", "count - hidden, 16)",
         "min_block has no effect: hand it on."),
        ("sample_block(mask, count - hidden, min_block)",
         "random.sample([(y, x) for y in range(gh) for x in range(gw)], count)",
         "Single patches are hidden, which their neighbours give away: hide blocks."),
        ("    hidden = 0\n", "    hidden = 0\n    random.seed(0)\n",
         "Every image gets the same mask: do not seed in here, the data set does it per image."),
        ("hidden += len(block)", "hidden += max(len(block), min_block)",
         "Each block counts for its smallest size at least: count what it really hides."),
    ],
    "pretrain.py::sample_block": [
        ("math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))",
         "random.uniform(0.3, 1 / 0.3)",
         "The aspect is uniform: tall blocks are then commoner than flat ones. Its logarithm is "
         "uniform."),
        ("math.log(1 / 0.3)", "0",
         "No block is tall: the aspect goes from 0.3 to 1 / 0.3."),
        ("random.uniform(min_block, remaining)", "random.uniform(1, remaining)",
         "min_block has no effect: an area is at least min_block patches."),
        ("                    if not mask[y][x]:\n                        new.append((y, x))",
         "                    new.append((y, x))",
         "Patches that are hidden already count again: the mask ends with too few."),
        ("if new and len(new) <= remaining:", "if new:",
         "The block may hide more than remains: the total must not be exceeded."),
        ("left = random.randint(0, gw - w)", "left = min(top, gw - w)",
         "The blocks lie on the diagonal: draw top and left each."),
        ("top = random.randint(0, gh - h)", "top = random.randint(0, gh - h - 1)",
         "No block reaches the last row: randint includes its upper end."),
        ("round(math.sqrt(area * aspect))", "round(area * aspect)",
         "The root is missing: h = sqrt(area * aspect), so that h times w is the area."),
        ("range(10)", "range(1)",
         "One try is too few: after a block that does not fit, single patches fill the rest."),
        ("random.uniform(min_block, remaining)", "remaining",
         "The area is not drawn: it is uniform between min_block and what remains."),
        ("round(math.sqrt(area * aspect))", "int(math.sqrt(area * aspect))",
         "int() cuts off: blocks come out smaller than their area. Round."),
        ("round(math.sqrt(area * aspect))\n        w = round(",
         "int(math.sqrt(area * aspect))\n        w = int(",
         "int() cuts off both sides: blocks come out smaller than their area. Round."),
        ("round(math.sqrt(area / aspect))", "round(math.sqrt(area * aspect))",
         "Every block is a square of the wrong size: w = sqrt(area / aspect)."),
        ("random.uniform(min_block, remaining)",
         "float(torch.empty(()).uniform_(1, 2)) * min_block",
         "The area comes from torch: draw from Python's `random`, which is seeded per image."),
    ],
    "pretrain.py::hidden_patches": [
        ("row.nonzero()", "(~row).nonzero()",
         "These are the visible patches: True in the mask means hidden."),
        ("    if len({len(row) for row in rows}) > 1:\n"
         "        raise ValueError(\"every image must hide equally many patches\")\n"
         "    return torch.stack(rows)", "    return torch.cat(rows)[:len(rows) * len(rows[0])]"
         ".view(len(rows), -1)",
         "Images that hide different numbers of patches are mixed up silently: raise ValueError."),
        ("torch.stack(rows)", "torch.stack(rows) + 1",
         "Patches are numbered from 0 here: BEiT.forward makes room for [CLS]."),
        ("torch.stack(rows)", "torch.cat(rows)",
         "The images are lost: the result is (B, m), a row per image."),
        ("torch.stack(rows)", "torch.stack(rows).flip(1)",
         "The patches are in another order than those that a mask picks: rising."),
        ("torch.stack(rows)",
         "torch.stack([i * mask.shape[1] + row for i, row in enumerate(rows)])",
         "The numbers run on over the batch: each image begins at 0."),
        ("torch.stack(rows)", "mask.nonzero()[:, 0].view(len(mask), -1)",
         "These are the images' numbers: nonzero gives (image, patch), and the patch is wanted."),
        ("torch.stack(rows)", "mask.long()",
         "This is the mask as numbers: the places of its ones are wanted."),
    ],
    "pretrain.py::mim_loss": [
        ("log_p = logits.float().log_softmax(dim=-1)",
         "log_p = logits.float().softmax(dim=-1).log_softmax(dim=-1)",
         "The soft-max is taken twice in the first loss: cross-entropy takes it of raw logits."),
        ("log_p_cls = logits_cls.float().log_softmax(dim=-1)",
         "log_p_cls = logits_cls.float().softmax(dim=-1).log_softmax(dim=-1)",
         "The soft-max is taken twice in the second loss: cross-entropy takes it of raw logits."),
        ("-log_p.gather(1, z[:, None]).mean()", "F.cross_entropy(logits.float(), z, "
         "label_smoothing=0.1)",
         "The labels are smoothed: Eq. (3) has no smoothing; it belongs to fine-tuning."),
        ("-log_p.gather(1, z[:, None]).mean()", "-log_p.gather(1, z[:, None]).sum()",
         "The first loss is a sum over the patches: it grows with the batch. Take the mean."),
        ("return loss_mim + loss_cls, (", "return loss_mim, (",
         "The second loss is not trained: the sum of both is minimised."),
        ("return loss_mim + loss_cls, (", "return (loss_mim + loss_cls) / 2, (",
         "The losses are averaged: they are added, each with weight 1."),
        ("    if logits_cls is None:\n        return loss_mim, (loss_mim.detach(), "
         "torch.zeros_like(loss_mim))\n", "",
         "Without the shallow head logits_cls is None: the second loss is then 0."),
        ("logits_cls.float().log_softmax", "logits.float().log_softmax",
         "Both losses come from the same logits: the second has those of the shallow head."),
        ("log_p = logits.float().log_softmax(dim=-1)", "log_p = logits.float().log_softmax(dim=0)",
         "The soft-max runs over the patches: it runs over the codes (dim=-1)."),
        ("log_p = logits.float().log_softmax(dim=-1)", "log_p = logits.float().softmax(dim=-1)",
         "The logarithm is missing: Eq. (3) adds log p."),
        ("-log_p.gather(1, z[:, None]).mean()", "log_p.gather(1, z[:, None]).mean()",
         "The sign is wrong: Eq. (3) maximises log p, so the loss is its negative."),
        ("(loss_mim.detach(), loss_cls.detach())", "(loss_mim, loss_cls)",
         "The parts keep the graph of the whole step in memory: detach what is only logged."),
        ("loss_mim + loss_cls, (", "loss_mim + loss_cls.detach(), (",
         "The second loss is detached: it trains nothing."),
        ("logits.float().log_softmax", "logits.log_softmax",
         "The loss is computed in bfloat16, with three digits: turn the logits into float32 "
         "first."),
        ("-log_p.gather(1, z[:, None]).mean()", "F.mse_loss(log_p.exp(), F.one_hot(z, "
         "log_p.shape[1]).float())",
         "This is the squared distance to the one-hot target: Eq. (3) is a cross-entropy."),
    ],
    "pretrain.py::aggregate": [
        ("cls = last[:, 0]\n    patches = early[:, 1:]",
         "cls = early[:, 0]\n    patches = last[:, 1:]",
         "It is swapped: [CLS] comes from the last layer, the patches from layer l."),
        ("early[:, 1:]", "early[:, 1:].detach()",
         "The patches are detached: the second loss has to train the layers up to l, too."),
        ("last[:, 0]", "last[:, 0].detach()",
         "[CLS] is detached: the second loss is there to train it."),
        ("last[:, 0]", "early[:, 0]",
         "[CLS] is that of layer l: nothing of the last layer reaches the head."),
        ("early[:, 1:]", "last[:, 1:]",
         "The patches are those of the last layer, which know the image already: [CLS] then has "
         "nothing to tell."),
        ("torch.cat([cls[:, None], patches], dim=1)", "torch.cat([cls[:, None], early], dim=1)",
         "There are two [CLS] tokens: that of layer l has to go."),
        ("early[:, 1:]", "early[:, :-1]",
         "The first token of layer l is its [CLS]: the patches are early[:, 1:]."),
        ("[cls[:, None], patches]", "[patches, cls[:, None]]",
         "[CLS] is the first token, as everywhere."),
        ("last[:, 0]", "last[:, 0] + early[:, 0]",
         "[CLS] of both layers are added: take that of the last layer alone."),
        ("last[:, 0]", "last.mean(dim=1)",
         "The mean of the last layer stands in for [CLS]: its patches must not reach the head."),
        ("    return torch.cat([cls[:, None], patches], dim=1)",
         "    early[:, 0] = cls\n    return early",
         "The tokens of layer l are changed in place: make a new tensor."),
    ],
    "pretrain.py::BEiT.streams": [
        ("self.early_layer - 1,", "self.early_layer % self.depth,",
         "l is counted from 1 in the paper, blocks from 0 here: layer l is block l - 1."),
        ("mask, bias)\n    early", "None, bias)\n    early",
         "The mask is not handed on: the network sees the patches that it has to name."),
        ("self.run(block, side, bias)", "self.run(block, side, None)",
         "The shallow head has no positions: it gets the bias that all blocks share."),
        ("for block in self.cls_pt_layers:", "for block in self.cls_pt_layers[:1]:",
         "Only the first block of the shallow head runs: it has head_depth of them."),
        ("aggregate(last, early)", "last",
         "The shallow head reads the last layer: it gets the aggregate."),
        ("aggregate(last, early)", "aggregate(early, last)",
         "The arguments of aggregate are swapped: last first, then early."),
        ("self.run(block, side, bias)", "self.run(block, aggregate(last, early), bias)",
         "Each block starts from the aggregate again: it continues from the block before."),
        ("return last, side", "return self.norm(last), side",
         "The norm is taken here and once more in forward: return the tokens before it."),
        ("if len(self.cls_pt_layers) > 0:", "if True:",
         "With head_depth 0 there is no shallow head: side is then None."),
        ("aggregate(last, early)", "aggregate(last, early).detach()",
         "The aggregate is detached: the second loss trains the shallow head alone."),
        ("self.cls_pt_layers:\n", "self.blocks[-len(self.cls_pt_layers):]:\n",
         "The last blocks of the backbone run again: the shallow head has blocks of its own."),
        ("return last, side", "return side, last",
         "The two results are swapped: last layer first, then the shallow head."),
        ("if queries is not None:", "if False:",
         "`queries` has no effect: where they are given, both results hold these tokens only."),
        ("side = None if side is None else side.take_along_dim(queries[:, :, None], dim=1)", "",
         "The shallow stream still has all tokens: `queries` are picked from both results."),
    ],
    "pretrain.py::BEiT.forward": [
        ("    queries = torch.cat([cls, hidden + 1], dim=1)\n"
         "    last, side = self.streams(x, mask, queries)\n",
         "    last, side = self.streams(x, mask, hidden + 1)\n"
         "    last = torch.cat([last[:, :1], last], dim=1)\n"
         "    side = None if side is None else torch.cat([side[:, :1], side], dim=1)\n",
         "The queries lack [CLS], which the shallow head reads: streams takes (B, 1 + m), token 0 "
         "first."),
        ("norm, head = self.cls_pt_norm, self.cls_pt_lm_head", "head = self.cls_pt_lm_head",
         "With --separate-head the norm is another, too: self.cls_pt_norm."),
        ("self.norm(last[:, 1:])", "(last[:, 1:])",
         "The final norm is missing before the code head."),
        ("norm(side[:, 1:])", "(side[:, 1:])",
         "The final norm is missing before the code head of the shallow stream."),
        ("hidden + 1", "hidden",
         "Token 0 is [CLS]: patch i is token i + 1, so the patch before the hidden one is named."),
        ("    if not self.shared_head:\n        norm, head = self.cls_pt_norm, "
         "self.cls_pt_lm_head\n", "",
         "With --separate-head the shallow stream has a norm and a head of its own."),
        ("hidden_patches(mask)", "hidden_patches(~mask)",
         "The visible patches are named: the mask says which are hidden."),
        ("self.norm(last[:, 1:])", "self.norm(last)",
         "[CLS] is named, too: only the hidden patches have a code."),
        ("    if side is None:\n        return logits, None\n", "",
         "Without the shallow head, side is None: logits_cls is then None."),
        ("return logits, head(side)", "return head(side), logits",
         "The two results are swapped: last layer first, then the shallow head."),
        ("self.streams(x, mask, queries)", "self.streams(x, torch.zeros_like(mask), queries)",
         "Nothing is hidden: the network sees the patches that it has to name."),
    ],
    "linprobe.py::readout": [
        ("tokens[:, 1:].mean(dim=1)", "tokens.mean(dim=1)",
         "The mean contains [CLS]: it is over the patches, tokens 1 to N."),
        ("tokens[:, 0]", "tokens[:, -1]",
         "[CLS] is the first token, not the last."),
        ("tokens[:, 1:].mean(dim=1)", "tokens[:, 1:].mean(dim=2)",
         "The mean runs over the channels: it runs over the patches (dim=1)."),
        ("torch.cat([cls, mean]", "torch.cat([mean, cls]",
         "The halves of \"both\" are swapped: [CLS] first."),
        ("torch.cat([cls, mean], dim=1)", "cls + mean",
         "\"both\" lays [CLS] and mean side by side: 2 D numbers, not their sum."),
        ("tokens[:, 1:].mean(dim=1)", "tokens[:, 1:].amax(dim=1)",
         "This is the largest value of the patches, not their mean."),
        ("torch.cat([cls, mean], dim=1)", "mean",
         "\"both\" gives the mean alone: [CLS] belongs to it."),
    ],
    "linprobe.py::accuracy": [
        ("100 * hit", "hit",
         "Accuracy is in percent."),
        ("logits.topk(k, dim=-1)", "logits.topk(1, dim=-1)",
         "k has no effect: the class may be among the k largest logits."),
        ("topk(k, dim=-1)", "topk(k, dim=-1, largest=False)",
         "The smallest logits are taken for the best guesses."),
        ("    k = min(k, logits.shape[-1])\n", "",
         "With fewer classes than k, topk fails: k is at most the number of classes."),
        (".mean(dim=0)", ".mean()",
         "All heads are averaged into one number: (B, ..., C) gives (...), the mean is over B."),
        (".mean(dim=0)", ".sum(dim=0)",
         "This counts hits: divide by the number of images."),
        ("hit.double().mean(dim=0)", "hit.double().mean(dim=0) / k",
         "A hit counts in full, at whichever of the k places: do not divide by k."),
        ("best == labels)", "best[..., -1:] == labels)",
         "Only the k-th guess counts: a class among the first k is a hit."),
    ],
    "linprobe.py::knn": [
        ("F.normalize(bank.float(), dim=-1)", "bank.float()",
         "The bank's vectors are not normalised: long ones seem nearer than they are."),
        ("F.normalize(queries.float(), dim=-1)", "queries.float()",
         "The queries are not normalised: their length changes the weights of the votes."),
        ("torch.exp(best / temperature)", "torch.ones_like(best)",
         "All neighbours vote alike: each votes with exp(cosine / temperature)."),
        ("torch.exp(best / temperature)", "best",
         "Neighbours vote with their cosine: it is exp(cosine / temperature)."),
        ("best / temperature", "best",
         "The temperature is missing: at 0.07 near neighbours count far more."),
        ("best / temperature", "best * temperature",
         "The temperature divides the cosine: it must not multiply it."),
        ("min(k, len(bank)), dim=-1", "min(k, len(bank)), dim=-1, largest=False",
         "These are the farthest images: the nearest have the largest cosine."),
        ("min(k, len(bank))", "k",
         "With fewer images than k, topk fails: k is at most the size of the bank."),
        ("best / temperature", "best / 0.07",
         "`temperature` has no effect: 0.07 is only its default."),
        ("(vote[..., None] * one_hot).sum(dim=1)", "(vote[..., None] * one_hot).amax(dim=1)",
         "Only the best vote of a class counts: the votes of its images add up."),
        ("(vote[..., None] * one_hot).sum(dim=1)",
         "(vote[..., None] * one_hot).sum(dim=1).argmax(dim=1)",
         "The class is returned: the scores of all classes (n, C) are wanted."),
        ("a @ b.T", "-torch.cdist(queries.float(), bank.float())",
         "This is the Euclidean distance of the raw vectors: k-NN here goes by the angle."),
        ("    if sign_blind:\n        cosine = cosine.abs()\n", "",
         "`sign_blind` has no effect: with it the nearest images are those of largest |cosine|."),
    ],
    "finetune.py::layer_of": [
        ("int(part[1]) + 1", "int(part[1])",
         "Block 0 shares the rate of the embeddings: block i is layer i + 1."),
        ("return depth + 1", "return depth",
         "The head learns at the rate of the last block: it is layer depth + 1."),
        ("\"mask_token\", ", "",
         "mask_token is an embedding: layer 0."),
        ("\"pos_embed\", ", "",
         "pos_embed is an embedding: layer 0."),
        (", \"patch_embed\")", ")",
         "patch_embed is an embedding: layer 0."),
        ("(\"cls_token\", ", "(",
         "cls_token is an embedding: layer 0."),
        ("int(part[1])", "int(name[7])",
         "Only one digit of the block is read: block 11 becomes block 1."),
        ("int(part[1]) + 1", "depth - int(part[1])",
         "The order is turned round: early blocks have the small numbers."),
        ("        return 0", "        return 1",
         "Layers count from the embeddings, which are 0."),
        ("first == \"blocks\":", "first == \"blocks\" and \"relative\" not in name:",
         "A block's own table of relative positions belongs to that block."),
        ("return depth + 1", "return 0 if \"relative\" in name else depth + 1",
         "A table that all blocks share counts with the head, layer depth + 1, as in the recipe."),
        ("return depth + 1", "return depth if \"norm\" in first else depth + 1",
         "The final norm counts with the head, layer depth + 1."),
    ],
    "finetune.py::smooth_targets": [
        ("smoothing / classes", "smoothing / (classes - 1)",
         "The smoothing is spread over the other classes only: all C classes get s / C."),
        ("+= 1 - smoothing", "= 1 - smoothing",
         "The class itself gets 1 - s: with its share of the smoothing it is 1 - s + s / C."),
        ("smoothing / classes", "smoothing",
         "Every class gets s: the smoothing is shared among C classes."),
        ("+= 1 - smoothing", "+= 1",
         "The targets sum to more than 1: the class keeps 1 - s of its own."),
        ("+= 1 - smoothing", "+= smoothing",
         "The class gets s and not 1 - s."),
        ("smoothing / classes", "0.0",
         "The other classes get nothing: each has s / C."),
    ],
    "finetune.py::soft_cross_entropy": [
        ("log_p = logits - logits.logsumexp(dim=-1, keepdim=True)",
         "log_p = logits.softmax(dim=-1)",
         "The logarithm is missing: t_c is multiplied by log p_c."),
        ("log_p = logits - logits.logsumexp(dim=-1, keepdim=True)", "log_p = logits",
         "The soft-max is missing: p_c comes from the logits by a soft-max."),
        ("-(targets", "(targets",
         "The sign is wrong: cross-entropy is never negative."),
        (".sum(dim=-1).mean()", ".mean()",
         "The mean is taken over the classes, too: it is a sum over c, then a mean over B."),
        (".sum(dim=-1).mean()", ".sum()",
         "The sum over the batch grows with it: take the mean over B."),
        ("logits.logsumexp(dim=-1, keepdim=True)", "logits.logsumexp(dim=0, keepdim=True)",
         "The soft-max runs over the images: it runs over the classes."),
        ("    logits = logits.float()\n", "",
         "The loss is computed in bfloat16, with three digits: turn the logits into float32 "
         "first."),
        ("-(targets * log_p)", "-(targets.softmax(dim=-1) * log_p)",
         "The targets are distributions already: a soft-max makes others of them."),
        ("-(targets * log_p)", "(targets * (targets.clamp(min=1e-12).log() - log_p))",
         "This is the Kullback-Leibler divergence: cross-entropy does not subtract the entropy of "
         "the targets."),
        ("-(targets * log_p).sum", "-(F.one_hot(targets.argmax(-1), targets.shape[1]) * log_p).sum",
         "Only the largest target counts: mixed and smoothed targets have several."),
        ("logits - logits.logsumexp(dim=-1, keepdim=True)", "(logits.softmax(dim=-1)).log()",
         "log of soft-max overflows: far-off classes get p = 0 and log p = -inf. log_softmax does "
         "not."),
    ],
}
