"""Submissions that were written after tests and probes, to see whether marks and hints hold.

A case: kind, function, source, and the first words of the sentence that its author should read.
otherwise: a known mistake in other words. stranger: a mistake that the list does not have.
"""

CASES = [
    # --- A1 ---
    ("otherwise", "vqkd.py::nearest_code", """
def nearest_code(h, codebook):
    h = h.float() / h.float().norm(dim=-1, keepdim=True)
    cosine = torch.einsum("...d,kd->...k", h, codebook.float())
    return cosine.max(dim=-1).indices
""", "The lengths of the codes"),
    ("otherwise", "vqkd.py::nearest_code", """
def nearest_code(h, codebook):
    with torch.autocast(h.device.type, enabled=False):
        return (l2(h.float()) @ l2(codebook.float()).T).argmin(-1)
""", "The code farthest away"),
    ("otherwise", "vqkd.py::nearest_code", """
def nearest_code(h, codebook):
    with torch.autocast(h.device.type, enabled=False):
        flat = l2(h.float()).reshape(-1, h.shape[-1])
        return torch.stack([(l2(codebook.float()) @ x).argmax() for x in flat])
""", "z has lost its shape"),
    ("otherwise", "vqkd.py::nearest_code", """
def nearest_code(h, codebook):
    return (l2(h) @ l2(codebook).T).argmax(-1)
""", "Under autocast"),
    ("stranger", "vqkd.py::nearest_code", """
def nearest_code(h, codebook):
    with torch.autocast(h.device.type, enabled=False):
        h = l2(h.float() - h.float().mean(dim=-1, keepdim=True))
        return (h @ l2(codebook.float()).T).argmax(dim=-1)
""", None),
    ("stranger", "vqkd.py::nearest_code", """
def nearest_code(h, codebook):
    with torch.autocast(h.device.type, enabled=False):
        return (l2(h.float()) @ l2(codebook.float()).T).topk(2, dim=-1).indices[..., 1]
""", None),
    ("otherwise", "vqkd.py::straight_through", """
def straight_through(h, v):
    return h + (v - h.detach())
""", "v gets a gradient, too"),
    ("otherwise", "vqkd.py::straight_through", """
def straight_through(h, v):
    out = h.clone()
    out.data.copy_(2 * h.data - v.data)
    return out
""", "The step goes from v to h"),
    ("otherwise", "vqkd.py::straight_through", """
@torch.no_grad()
def straight_through(h, v):
    return h + (v - h)
""", "The result has no gradient"),
    ("stranger", "vqkd.py::straight_through", """
def straight_through(h, v):
    return 0.5 * h + (v - 0.5 * h).detach()
""", None),
    ("stranger", "vqkd.py::straight_through", """
def straight_through(h, v):
    return (h + v) / 2
""", None),
    # --- A2 ---
    ("otherwise", "vqkd.py::vqkd_loss", """
def vqkd_loss(o, t, h, v, beta=1.0, widths=None):
    cosines = teachers.each_cosine(o.float(), t.float(), widths)
    cosine = F.cosine_similarity(o.float(), t.float(), dim=-1).mean()
    if cosines:
        cosine = sum(cosines.values()) / len(cosines)
    commit = F.mse_loss(h.detach(), v)
    codebook = F.mse_loss(h, v.detach())
    parts = dict(cosine=cosine, commit=commit, codebook=codebook) | cosines
    return 1 - cosine + beta * commit, {k: x.detach() for k, x in parts.items()}
""", "The stop-gradient is on the wrong side"),
    ("otherwise", "vqkd.py::vqkd_loss", """
def vqkd_loss(o, t, h, v, beta=1.0, widths=None):
    cosines = teachers.each_cosine(o.float(), t.float(), widths)
    cosine = F.cosine_similarity(o.float(), t.float(), dim=-1).mean()
    if cosines:
        cosine = sum(cosines.values()) / len(cosines)
    commit = F.mse_loss(h, v.detach())
    codebook = F.mse_loss(h.detach(), v)
    parts = dict(cosine=cosine, commit=commit, codebook=codebook) | cosines
    return codebook + beta * commit - cosine + 1, {k: x.detach() for k, x in parts.items()}
""", "The codebook term is only logged"),
    ("otherwise", "vqkd.py::vqkd_loss", """
def vqkd_loss(o, t, h, v, beta=1.0, widths=None):
    cosines = teachers.each_cosine(o.float(), t.float(), widths)
    cosine = F.cosine_similarity(o.float(), t.float(), dim=-1).mean()
    if cosines:
        cosine = sum(cosines.values()) / len(cosines)
    commit = (h - v.detach()).pow(2).sum(-1).mean()
    parts = dict(cosine=cosine, commit=commit, codebook=F.mse_loss(h.detach(), v)) | cosines
    return 1 - cosine + beta * commit, {k: x.detach() for k, x in parts.items()}
""", "Your commitment sums over D"),
    ("stranger", "vqkd.py::vqkd_loss", """
def vqkd_loss(o, t, h, v, beta=1.0, widths=None):
    cosines = teachers.each_cosine(o.float(), t.float(), widths)
    cosine = F.cosine_similarity(o.float(), t.float(), dim=-1).mean()
    commit = F.mse_loss(h, v.detach())
    parts = dict(cosine=cosine, commit=commit, codebook=F.mse_loss(h.detach(), v)) | cosines
    return 1 - cosine + beta * commit, {k: x.detach() for k, x in parts.items()}
""", None),
    ("stranger", "vqkd.py::vqkd_loss", """
def vqkd_loss(o, t, h, v, beta=1.0, widths=None):
    cosine = F.cosine_similarity(o.float(), t.float(), dim=-1).mean()
    commit = F.mse_loss(h, v.detach())
    parts = dict(cosine=cosine.detach(), commit=commit.detach(), codebook=commit.detach())
    parts |= teachers.each_cosine(o.detach().float(), t.float(), widths)
    return (1 - cosine) ** 2 + beta * commit, parts
""", None),
    ("otherwise", "vqkd.py::code_sums", """
def code_sums(h, z, codes):
    h = h.detach().float().flatten(0, -2)
    sums, counts = torch.zeros(codes, h.shape[1]), torch.zeros(codes)
    for k in range(codes):
        chosen = h[z.flatten() == k]
        counts[k] = len(chosen)
        if len(chosen):
            sums[k] = chosen.mean(0)
    return sums, counts
""", "These are means"),
    ("stranger", "vqkd.py::code_sums", """
def code_sums(h, z, codes):
    h = h.detach().float().flatten(0, -2)
    one_hot = F.one_hot(z.flatten(), codes).float()
    return one_hot.T @ h.abs(), one_hot.sum(0)
""", None),
    ("otherwise", "vqkd.py::ema_update", """
def ema_update(codebook, sums, counts, decay):
    new = F.normalize(codebook * decay + sums * (1 - decay), dim=1)
    return torch.where(counts.unsqueeze(1) > 0, new, codebook)
""", "The sum is not normalised"),
    ("otherwise", "vqkd.py::ema_update", """
def ema_update(codebook, sums, counts, decay):
    moved = torch.lerp(l2(sums), codebook, 1 - decay)
    return torch.where(counts[:, None] > 0, l2(moved), codebook)
""", "decay and 1 - decay are swapped"),
    ("otherwise", "vqkd.py::ema_update", """
def ema_update(codebook, sums, counts, decay):
    rows = []
    for v, s, n in zip(codebook, sums, counts):
        rows.append(decay * v + (1 - decay) * l2(s) if n > 0 else v)
    return torch.stack(rows)
""", "The new code is no unit vector"),
    ("stranger", "vqkd.py::ema_update", """
def ema_update(codebook, sums, counts, decay):
    decay = decay ** counts[:, None]
    return torch.where(counts[:, None] > 0, l2(decay * codebook + (1 - decay) * l2(sums)), codebook)
""", None),
    # --- A3 ---
    ("otherwise", "vqkd.py::kmeans", """
def kmeans(x, centres, iterations=10):
    z = nearest_code(x, centres)
    for _ in range(iterations):
        sums, counts = code_sums(x, z, len(centres))
        centres = torch.where((counts > 0)[:, None], l2(sums), centres)
    return centres, counts
""", "The vectors are assigned once"),
    ("otherwise", "vqkd.py::kmeans", """
def kmeans(x, centres, iterations=10):
    step = 1
    while step < iterations:
        sums, counts = code_sums(x, nearest_code(x, centres), len(centres))
        centres = torch.where((counts > 0)[:, None], l2(sums), centres)
        step += 1
    return centres, counts
""", "One round is missing"),
    ("stranger", "vqkd.py::kmeans", """
def kmeans(x, centres, iterations=10):
    for _ in range(iterations):
        z = nearest_code(x, centres)
        sums, counts = code_sums(x, z, len(centres))
        centres = torch.where((counts > 1)[:, None], l2(sums), centres)
    return centres, counts
""", None),
    ("otherwise", "support/codebook.py::codebook_usage", """
def codebook_usage(counts):
    p = counts.double() / counts.sum().clamp(min=1)
    entropy = float(-torch.special.xlogy(p, p).sum() / math.log(2))
    return dict(codes_used=int((p > 0).sum()), dead_codes=int((p == 0).sum()), entropy=entropy,
                perplexity=math.exp(entropy),
                top10_share=100 * float(p.topk(min(10, len(p)))[0].sum()))
""", "The entropy is in bits"),
    ("stranger", "support/codebook.py::codebook_usage", """
def codebook_usage(counts):
    p = counts.double() / counts.sum().clamp(min=1)
    entropy = float(-torch.special.xlogy(p, p).sum())
    return dict(codes_used=int((p > 0).sum()), dead_codes=int((p == 0).sum()), entropy=entropy,
                perplexity=2 ** entropy, top10_share=100 * float(p.topk(min(10, len(p)))[0].sum()))
""", None),
    ("otherwise", "support/codebook.py::restart_dead_codes", """
@torch.no_grad()
def restart_dead_codes(codebook, h, process, threshold=0.1):
    flat = h.flatten(0, 1)
    dead = torch.where(codebook.cluster_size < threshold)[0][:len(flat)]
    codebook.embedding.weight[dead] = flat[torch.randperm(len(flat))[:len(dead)]]
    process.broadcast(codebook.embedding.weight)
    return dead.numel()
""", "A restarted code still counts as dead"),
    ("stranger", "support/codebook.py::restart_dead_codes", """
@torch.no_grad()
def restart_dead_codes(codebook, h, process, threshold=0.1):
    flat = h.flatten(0, 1)
    dead = torch.where(codebook.cluster_size < threshold)[0][:len(flat)]
    codebook.embedding.weight[dead] = 2 * flat[torch.randperm(len(flat))[:len(dead)]]
    codebook.cluster_size[dead] = 1.0
    process.broadcast(codebook.embedding.weight)
    return len(dead)
""", None),
    # --- A4 ---
    ("otherwise", "pretrain.py::sample_block_mask", """
def sample_block_mask(gh, gw, count, min_block=16):
    mask = torch.zeros(gh, gw, dtype=torch.bool)
    while int(mask.sum()) < count:
        for y, x in sample_block(mask.tolist(), count - int(mask.sum()), min_block):
            mask[y, x] = True
    return mask.logical_not()
""", "The mask is inverted"),
    ("stranger", "pretrain.py::sample_block_mask", """
def sample_block_mask(gh, gw, count, min_block=16):
    mask = torch.zeros(gh, gw, dtype=torch.bool)
    mask.view(-1)[random.randrange(gh * gw - count + 1):][:count] = True
    return mask
""", None),
    ("otherwise", "pretrain.py::hidden_patches", """
def hidden_patches(mask):
    counts = mask.sum(1)
    if counts.min() != counts.max():
        raise ValueError("not the same number everywhere")
    return torch.where(mask.flatten())[0].view(len(mask), -1)
""", "The numbers run on over the batch"),
    ("stranger", "pretrain.py::hidden_patches", """
def hidden_patches(mask):
    counts = mask.sum(1)
    if counts.min() != counts.max():
        raise ValueError("not the same number everywhere")
    order = mask.float().argsort(dim=1, descending=True, stable=True)
    return order[:, :int(counts[0]) - 1]
""", None),
    ("otherwise", "pretrain.py::mim_loss", """
def mim_loss(logits, logits_cls, z):
    loss_mim = F.cross_entropy(torch.softmax(logits.float(), dim=1), z)
    loss_cls = torch.zeros(())
    if logits_cls is not None:
        loss_cls = F.cross_entropy(logits_cls.float(), z)
    return loss_mim + loss_cls, (loss_mim.detach(), loss_cls.detach())
""", "The soft-max is taken twice in the first"),
    ("otherwise", "pretrain.py::mim_loss", """
def mim_loss(logits, logits_cls, z):
    loss_mim = F.cross_entropy(logits.float(), z)
    loss_cls = torch.zeros(())
    if logits_cls is not None:
        loss_cls = F.cross_entropy(logits_cls.float(), z)
    return 0.5 * loss_mim + 0.5 * loss_cls, (loss_mim.detach(), loss_cls.detach())
""", "The losses are averaged"),
    ("stranger", "pretrain.py::mim_loss", """
def mim_loss(logits, logits_cls, z):
    loss_mim = F.cross_entropy(logits.float(), z)
    loss_cls = torch.zeros(())
    if logits_cls is not None:
        loss_cls = F.cross_entropy(logits_cls.float(), z)
    return loss_mim + 0.1 * loss_cls, (loss_mim.detach(), loss_cls.detach())
""", None),
    ("stranger", "pretrain.py::mim_loss", """
def mim_loss(logits, logits_cls, z):
    loss_mim = F.cross_entropy(logits.float() / 2, z)
    loss_cls = torch.zeros(())
    if logits_cls is not None:
        loss_cls = F.cross_entropy(logits_cls.float() / 2, z)
    return loss_mim + loss_cls, (loss_mim.detach(), loss_cls.detach())
""", None),
    ("otherwise", "pretrain.py::sample_block", """
def sample_block(mask, remaining, min_block):
    gh, gw = len(mask), len(mask[0])
    for _ in range(10):
        area = random.uniform(min_block, remaining)
        aspect = math.exp(random.uniform(math.log(0.3), -math.log(0.3)))
        h, w = int((area * aspect) ** 0.5), int((area / aspect) ** 0.5)
        if not (1 <= h < gh and 1 <= w < gw):
            continue
        top, left = random.randint(0, gh - h), random.randint(0, gw - w)
        new = [(y, x) for y in range(top, top + h) for x in range(left, left + w)
               if not mask[y][x]]
        if 0 < len(new) <= remaining:
            return new
    return random.sample([(y, x) for y in range(gh) for x in range(gw) if not mask[y][x]],
                         remaining)
""", "int() cuts off both sides"),
    # --- A5 ---
    ("otherwise", "pretrain.py::aggregate", """
def aggregate(last, early):
    out = last.clone()
    out[:, 0] = early[:, 0]
    return out
""", "It is swapped"),
    ("otherwise", "pretrain.py::aggregate", """
def aggregate(last, early):
    out = early.detach().clone()
    out[:, 0] = last[:, 0]
    return out
""", "The patches are detached"),
    ("stranger", "pretrain.py::aggregate", """
def aggregate(last, early):
    return torch.cat([last[:, :1], (early[:, 1:] + last[:, 1:]) / 2], dim=1)
""", None),
    ("stranger", "pretrain.py::BEiT.streams", """
def streams(self, x, mask, queries=None):
    bias = self.shared_bias()
    early, last = self.features(x, [self.early_layer - 1, self.depth - 1], mask, bias)
    side = None
    if len(self.cls_pt_layers):
        side = aggregate(last, early)
        for block in reversed(self.cls_pt_layers):
            side = self.run(block, side, bias)
    if queries is not None:
        last = last.take_along_dim(queries[..., None], dim=1)
        side = side if side is None else side.take_along_dim(queries[..., None], dim=1)
    return last, side
""", None),
    ("otherwise", "pretrain.py::BEiT.forward", """
def forward(self, x, mask, hidden=None):
    last, side = self.streams(x, mask)
    logits = self.lm_head(self.norm(last[:, :-1][mask]))
    if side is None:
        return logits, None
    norm = self.cls_pt_norm or self.norm
    head = self.cls_pt_lm_head or self.lm_head
    return logits, head(norm(side[:, :-1][mask]))
""", "Token 0 is [CLS]"),
    ("otherwise", "pretrain.py::BEiT.forward", """
def forward(self, x, mask, hidden=None):
    last, side = self.streams(x, mask)
    logits = self.lm_head(self.norm(last)[:, 1:][mask])
    if side is None:
        return logits, None
    head = self.cls_pt_lm_head or self.lm_head
    return logits, head(self.norm(side)[:, 1:][mask])
""", "With --separate-head the norm is another"),
    ("otherwise", "pretrain.py::BEiT.forward", """
def forward(self, x, mask, hidden=None):
    hidden = hidden_patches(mask) if hidden is None else hidden
    last, side = self.streams(x, mask, hidden + 1)
    logits = self.lm_head(self.norm(last)).flatten(0, 1)
    if side is None:
        return logits, None
    norm = self.cls_pt_norm or self.norm
    head = self.cls_pt_lm_head or self.lm_head
    return logits, head(norm(side)).flatten(0, 1)
""", "The queries lack [CLS]"),
    ("stranger", "pretrain.py::BEiT.forward", """
def forward(self, x, mask, hidden=None):
    last, side = self.streams(x, mask)
    norm = self.cls_pt_norm or self.norm
    head = self.cls_pt_lm_head or self.lm_head
    logits = self.lm_head(norm(last)[:, 1:][mask])
    return logits, None if side is None else head(norm(side)[:, 1:][mask])
""", None),
    # --- A6 ---
    ("otherwise", "linprobe.py::readout", """
def readout(tokens, kind):
    pooled = {"cls": tokens[:, 0], "mean": tokens.sum(1) / tokens.shape[1]}
    return pooled.get(kind, torch.cat([pooled["cls"], pooled["mean"]], -1))
""", "The mean contains [CLS]"),
    ("otherwise", "linprobe.py::accuracy", """
def accuracy(logits, labels, k=1):
    best = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
    labels = labels.view(-1, *[1] * (logits.ndim - 1))
    return (best == labels).any(dim=-1).float().mean(dim=0)
""", "Accuracy is in percent"),
    ("stranger", "linprobe.py::accuracy", """
def accuracy(logits, labels, k=1):
    best = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
    hit = (best == labels.view(-1, *[1] * (logits.ndim - 1))).any(dim=-1)
    return (100 * hit.double().mean(dim=0)).round()
""", None),
    ("otherwise", "linprobe.py::knn", """
def knn(bank, bank_labels, queries, k, classes, temperature=0.07, sign_blind=False, chunk=256):
    cosine = F.cosine_similarity(queries[:, None].float(), bank[None].float(), dim=-1)
    cosine = cosine.abs() if sign_blind else cosine
    best, nearest = cosine.topk(min(k, len(bank)), dim=1)
    votes = torch.zeros(len(queries), classes)
    return votes.scatter_add_(1, bank_labels[nearest], best)
""", "Neighbours vote with their cosine"),
    ("stranger", "linprobe.py::knn", """
def knn(bank, bank_labels, queries, k, classes, temperature=0.07, sign_blind=False, chunk=256):
    cosine = F.cosine_similarity(queries[:, None].float(), bank[None].float(), dim=-1)
    cosine = cosine.abs() if sign_blind else cosine
    best, nearest = cosine.topk(min(k, len(bank)), dim=1)
    votes = torch.zeros(len(queries), classes)
    return votes.scatter_(1, bank_labels[nearest], (best / temperature).exp())
""", None),
    ("otherwise", "finetune.py::layer_of", """
def layer_of(name, depth):
    if name.startswith("blocks."):
        return 1 + int(name[len("blocks."):].split(".")[0])
    if name.startswith(("cls_token", "pos_embed", "patch_embed")):
        return 0
    return depth + 1
""", "mask_token is an embedding"),
    ("otherwise", "finetune.py::layer_of", """
def layer_of(name, depth):
    if name.startswith("blocks."):
        return 1 + int(name.split(".")[1])
    if "embed" in name or "token" in name:
        return 0
    return depth + 1 if name.startswith("head") else depth
""", "The final norm counts"),
    ("stranger", "finetune.py::layer_of", """
def layer_of(name, depth):
    if name.startswith("blocks."):
        return (1 + int(name.split(".")[1])) // 2
    if "embed" in name or "token" in name:
        return 0
    return depth + 1
""", None),
    ("stranger", "finetune.py::smooth_targets", """
def smooth_targets(labels, classes, smoothing):
    hard = F.one_hot(labels, classes).float()
    return hard * (1 - smoothing) + (1 - hard) * smoothing / (classes - 1)
""", None),
    ("stranger", "finetune.py::smooth_targets", """
def smooth_targets(labels, classes, smoothing):
    hard = F.one_hot(labels, classes).float()
    return (hard + smoothing) / (1 + smoothing * classes)
""", None),
    ("otherwise", "finetune.py::soft_cross_entropy", """
def soft_cross_entropy(logits, targets):
    p = F.softmax(logits.float(), dim=1)
    return -torch.sum(targets * torch.log(p), dim=1).mean()
""", "log of soft-max"),
    ("stranger", "finetune.py::soft_cross_entropy", """
def soft_cross_entropy(logits, targets):
    return F.binary_cross_entropy_with_logits(logits.float(), targets)
""", None),
]
