"""Natural mistakes in the functions of A1 to A3, the tokenizer: see mistakes.py."""

RIGHT = {
    "vqkd.py::nearest_code": """
@torch.no_grad()
def nearest_code(h, codebook):
    with torch.autocast(h.device.type, enabled=False):
        a = l2(h.float())
        b = l2(codebook.float())
        distance = 2 - 2 * a @ b.T
        return distance.argmin(dim=-1)
""",
    "vqkd.py::straight_through": """
def straight_through(h, v):
    step = v - h
    return h + step.detach()
""",
    "vqkd.py::vqkd_loss": """
def vqkd_loss(o, t, h, v, beta=1.0, widths=None):
    o = o.float()
    t = t.float()
    cosines = teachers.each_cosine(o, t, widths)
    if cosines:
        cosine = torch.stack(list(cosines.values())).mean()
    else:
        cosine = F.cosine_similarity(o, t, dim=-1).mean()
    commit = ((h - v.detach()) ** 2).mean()
    codebook = ((v - h.detach()) ** 2).mean()
    loss = 1 - cosine + beta * commit
    parts = {"cosine": cosine, "commit": commit, "codebook": codebook, **cosines}
    return loss, {name: part.detach() for name, part in parts.items()}
""",
    "vqkd.py::code_sums": """
def code_sums(h, z, codes):
    h = h.detach().float().reshape(-1, h.shape[-1])
    one_hot = F.one_hot(z.reshape(-1), codes).float()
    sums = one_hot.T @ h
    counts = one_hot.sum(dim=0)
    return sums, counts
""",
    "vqkd.py::ema_update": """
def ema_update(codebook, sums, counts, decay):
    mean = l2(sums)
    moved = l2(decay * codebook + (1 - decay) * mean)
    used = counts > 0
    new = codebook.clone()
    new[used] = moved[used]
    return new
""",
    "vqkd.py::kmeans": """
def kmeans(x, centres, iterations=10):
    centres = centres.clone()
    for _ in range(iterations):
        z = nearest_code(x, centres)
        sums, counts = code_sums(x, z, len(centres))
        used = counts > 0
        centres[used] = l2(sums[used])
    return centres, counts
""",
    "support/codebook.py::codebook_usage": """
def codebook_usage(counts):
    counts = counts.cpu().double()
    p = counts / max(1.0, counts.sum().item())
    some = p[p > 0]
    entropy = -(some * some.log()).sum().item()
    used = int((counts > 0).sum())
    top10 = 100 * p.sort(descending=True).values[:10].sum().item()
    return dict(codes_used=used, dead_codes=len(counts) - used, entropy=entropy,
                perplexity=math.exp(entropy), top10_share=top10)
""",
    "support/codebook.py::restart_dead_codes": """
@torch.no_grad()
def restart_dead_codes(codebook, h, process, threshold=0.1):
    h = h.detach().reshape(-1, h.shape[-1])
    table = codebook.embedding.weight
    dead = [k for k, use in enumerate(codebook.cluster_size.tolist()) if use < threshold]
    dead = dead[:len(h)]
    order = torch.randperm(len(h), device="cpu").tolist()
    for k, i in zip(dead, order):
        table[k] = h[i]
        codebook.cluster_size[k] = 1.0
    process.broadcast(table)
    return len(dead)
""",
}

MISTAKES = {
    "vqkd.py::nearest_code": [
        ("l2(codebook.float())", "codebook.float()",
         "The lengths of the codes play a part: l2(.) is missing on the codes of Eq. (1)."),
        ("2 - 2 * a @ b.T", "torch.cdist(h.float(), codebook.float())",
         "This is the distance of the vectors as they come: Eq. (1) takes it after l2(.)."),
        ("argmin", "argmax",
         "The code farthest away is taken: argmin of the distance is argmax of the cosine."),
        ("l2(codebook.float())", "F.normalize(codebook.float(), dim=0)",
         "l2(.) runs over the codes: every code has to be divided by its own length (dim=-1)."),
        ("l2(h.float())", "F.normalize(h.float(), dim=-2)",
         "l2(.) runs over the patches: every vector has to be divided by its own length (dim=-1)."),
        ("argmin(dim=-1)", "argmin(dim=-2)",
         "For each code you take the nearest vector. Eq. (1) takes the nearest code of each "
         "vector: the minimum runs over j."),
        ("return distance.argmin(dim=-1)", "return b[distance.argmin(dim=-1)]",
         "The vectors of the codes are returned: Eq. (1) asks for their numbers z_i."),
        ("return distance.argmin(dim=-1)", "return distance.amin(dim=-1)",
         "The smallest distance is returned: Eq. (1) asks for the number of the code that has it."),
        ("argmin(dim=-1)", "argmin(dim=-1).flatten()",
         "z has lost its shape: h (B, N, D) gives z (B, N), one number per vector."),
        ("argmin(dim=-1)", "argmin()",
         "Without dim, all vectors together get one number: the minimum runs over the codes alone "
         "(dim=-1)."),
        ("enabled=False", "torch.bfloat16",
         "Under autocast the products are bfloat16, and about three codes in 100 change: compute "
         "the look-up in float32, with autocast off."),
        ("2 - 2 * a @ b.T", "-(a @ b.T).abs()",
         "Codes opposite to the vector count as near: the cosine's sign is lost."),
        ("l2(codebook.float())", "F.normalize(codebook.float(), p=1, dim=-1)",
         "l2(.) divides by the Euclidean length: this divides by the sum of absolute values."),
    ],
    "vqkd.py::straight_through": [
        ("h + step.detach()", "v",
         "The decoder's gradient ends at the code: nothing teaches the encoder."),
        ("h + step.detach()", "h",
         "The decoder sees h: the quantizer has no effect. Forward it has to see the code v."),
        ("step.detach()", "step",
         "Without stop-gradient h cancels out: the gradient goes to v and none reaches h."),
        ("h + step.detach()", "v - step.detach()",
         "It is the wrong way round: forward h and gradient to v, instead of v and gradient to h."),
        ("h + step.detach()", "v.detach()",
         "The result has no gradient at all: only the step from h to v must be constant."),
        ("h + step.detach()", "h.detach() + step",
         "The stop-gradient is on the wrong term: h gets the gradient with its sign turned."),
        ("h + step.detach()", "h - h.detach() + v",
         "v gets a gradient, too: the codes move by moving average, so v has to be constant."),
        ("v - h", "h - v",
         "The step goes from v to h: forward gives 2 h - v, not the code."),
    ],
    "vqkd.py::vqkd_loss": [
        ("1 - cosine", "1 + cosine",
         "The cosine has the wrong sign: Eq. (2) maximises it, so the loss has 1 - cosine."),
        ("1 - cosine", "-cosine",
         "The constant is missing: the loss is 1 - cosine, so that a perfect decoder costs 0."),
        ("h - v.detach()", "v - h.detach()",
         "The stop-gradient is on the wrong side: the commitment pulls h to its code, so v is "
         "constant in it. Nothing keeps your encoder near its codes."),
        ("h - v.detach()", "h - v",
         "sg[.] is missing on the code in the commitment: it must move h and not v."),
        ("beta * commit", "beta * commit + codebook",
         "The codebook term is only logged: the codes move by moving average, not by gradient."),
        ("1 - cosine + beta * commit", "beta * (1 - cosine) + commit",
         "beta weighs the cosine. It belongs to the commitment."),
        ("beta * commit", "commit",
         "beta has no effect: it weighs the commitment."),
        ("(h - v.detach()) ** 2).mean()", "(h - v.detach()) ** 2).sum(dim=-1).mean()",
         "Your commitment sums over D as Eq. (2) does. The released code, and this one, take the "
         "mean over D, so theirs is D times smaller."),
        ("(h - v.detach()) ** 2).mean()", "(h - v.detach()) ** 2).sum()",
         "Your commitment is a sum over all patches: it grows with the batch. Take the mean."),
        ("((h - v.detach()) ** 2).mean()", "(h - v.detach()).abs().mean()",
         "The commitment is a squared distance, not an absolute one."),
        ("((h - v.detach()) ** 2).mean()", "(h - v.detach()).norm(dim=-1).mean()",
         "The commitment is the square of the distance: the root is too much."),
        ("F.cosine_similarity(o, t, dim=-1)", "F.cosine_similarity(o, t, dim=1)",
         "The cosine runs along the patches: it compares the features of one patch (dim=-1)."),
        ("F.cosine_similarity(o, t, dim=-1)", "F.cosine_similarity(o.flatten(1), t.flatten(1))",
         "You take one cosine of the whole image: Eq. (2) takes one of every patch."),
        ("F.cosine_similarity(o, t, dim=-1)", "(o * t).sum(dim=-1)",
         "The product is not divided by the lengths of o and t, so it is no cosine."),
        ("1 - cosine", "F.mse_loss(o, t)",
         "This is the squared distance to the teacher: Eq. (2) has the cosine, blind to lengths."),
        ("F.cosine_similarity(o, t, dim=-1).mean()", "F.cosine_similarity(o, t, dim=-1).sum()",
         "The cosines are summed: take their mean over the patches of the batch."),
        ("o = o.float()", "o = o.float().detach()",
         "o is cut from the graph: the decoder learns nothing."),
        ("{name: part.detach() for name, part in parts.items()}", "parts",
         "The parts keep the graph of the whole step in memory: detach what is only logged."),
        (", **cosines}", "}",
         "With several teachers the parts lack the cosine of each: add what each_cosine gave."),
        ("torch.stack(list(cosines.values())).mean()", "sum(cosines.values())",
         "The cosines of several teachers are added up: take their mean."),
        ("    o = o.float()\n    t = t.float()\n", "",
         "The loss is computed in bfloat16, with three digits: turn o and t into float32 first."),
    ],
    "vqkd.py::code_sums": [
        ("sums = one_hot.T @ h", "sums = torch.zeros(codes, h.shape[1])\n"
         "    sums[z.reshape(-1)] += h",
         "sums[z] += h adds only one of the vectors that share a code. index_add_ adds them all."),
        ("counts = one_hot.sum(dim=0)", "counts = torch.zeros(codes)\n"
         "    counts[z.reshape(-1)] += 1",
         "counts[z] += 1 counts every code at most once. index_add_ or bincount count them all."),
        ("    sums = one_hot.T @ h\n    counts = one_hot.sum(dim=0)\n",
         "    sums, counts = torch.zeros(codes, h.shape[1]), torch.zeros(codes)\n"
         "    sums[z.reshape(-1)] += h\n    counts[z.reshape(-1)] += 1\n",
         "x[z] += y adds once to each code, however many vectors chose it. index_add_ adds all of "
         "them, in sums and in counts."),
        ("one_hot.T @ h", "one_hot.T @ h / one_hot.sum(dim=0).clamp(min=1)[:, None]",
         "These are means: means of micro-batches and processes cannot be added up, sums can."),
        ("h.detach().float()", "h.float()",
         "The sums keep the graph: the codes take no gradient, so detach h."),
        ("one_hot.sum(dim=0)", "torch.bincount(z.reshape(-1))",
         "The counts end with the largest id in the batch: every one of K codes needs an entry."),
        ("one_hot.sum(dim=0)", "one_hot.sum(dim=0).long()",
         "The counts are integers: the moving average adds them to float32, so give float32."),
        ("one_hot.sum(dim=0)", "one_hot.mean(dim=0)",
         "These are shares: shares of micro-batches cannot be added up, counts can."),
        ("one_hot.T @ h", "l2(one_hot.T @ h)",
         "l2 comes later, in ema_update: normalised sums of two micro-batches do not add up."),
        ("h.detach().float().reshape", "h.detach().reshape",
         "The sums are bfloat16 if h is: sum in float32."),
    ],
    "vqkd.py::ema_update": [
        ("decay * codebook + (1 - decay) * mean", "(1 - decay) * codebook + decay * mean",
         "decay and 1 - decay are swapped: the code nearly jumps to the mean at every step."),
        ("mean = l2(sums)", "mean = sums",
         "The sum is not normalised: codes that many vectors chose move faster. Take the "
         "direction l2(sum) alone."),
        ("mean = l2(sums)", "mean = sums / counts.clamp(min=1)[:, None]",
         "This is the plain mean, which is shorter where vectors disagree: the average moves "
         "towards its direction, l2(mean)."),
        ("l2(decay * codebook + (1 - decay) * mean)",
         "(decay * codebook + (1 - decay) * sums) / (decay + (1 - decay) * counts)[:, None]",
         "This is VQ-VAE's mean, weighted by the counts. Here the average is taken of two "
         "directions, and normalised."),
        ("l2(decay * codebook + (1 - decay) * mean)", "decay * codebook + (1 - decay) * mean",
         "The new code is no unit vector: l2 is missing around the average."),
        ("used = counts > 0", "used = counts >= 0",
         "Codes without vectors are updated, too: with decay 0 they become 0. They stay."),
        ("    return new", "    mean = l2(sums / counts[:, None])\n"
         "    return l2(decay * codebook + (1 - decay) * mean)",
         "Codes without vectors become NaN (0 / 0): they stay where they are."),
        ("new = codebook.clone()", "new = torch.zeros_like(codebook)",
         "Codes without vectors become 0: they stay where they are."),
        ("used = counts > 0", "used = counts > 1",
         "Codes that one vector chose do not move: every used code does."),
        ("new = codebook.clone()", "new = codebook",
         "The codebook that was handed in is changed in place: return a new one."),
        ("l2(decay * codebook + (1 - decay) * mean)", "mean",
         "decay has no effect: the code jumps to the mean of one batch."),
        ("+ (1 - decay) * mean", "- (1 - decay) * mean",
         "The code moves away from its vectors: the sign is wrong."),
        ("decay * codebook +", "codebook +",
         "The code keeps its full weight: an average has decay on the old and 1 - decay on the "
         "new."),
        ("l2(decay * codebook + (1 - decay) * mean)", "decay * codebook + (1 - decay) * l2(mean - "
         "codebook)",
         "The step goes along the direction from code to mean with a fixed length: average the "
         "two unit vectors instead."),
    ],
    "vqkd.py::kmeans": [
        ("range(iterations)", "range(1, iterations)",
         "One round is missing: range(1, 10) has 9 rounds, and the recipe ten."),
        ("range(iterations)", "range(iterations + 1)",
         "There is one round too many."),
        ("range(iterations)", "range(1)",
         "The vectors are assigned once: every round has to look up the nearest centre anew."),
        ("range(iterations)", "range(10)",
         "`iterations` has no effect: ten is only its default."),
        ("l2(sums[used])", "sums[used] / counts[used][:, None]",
         "The centres leave the sphere: take l2 of the mean."),
        ("centres[used] = l2(sums[used])", "centres = l2(sums)",
         "Empty centres become 0: they stay where they are."),
        ("centres[used] = l2(sums[used])", "centres = l2(sums / counts[:, None])",
         "Empty centres become NaN (0 / 0): they stay where they are."),
        ("l2(sums[used])", "ema_update(centres, sums, counts, 0.9)[used]",
         "k-means goes to the mean at once: a moving average does not arrive in ten rounds."),
        ("    centres = centres.clone()\n", "",
         "The centres that were handed in are changed in place: work on a copy."),
        ("return centres, counts", "return centres, z",
         "The second result is the number of vectors of each centre (K,), not their codes (n,)."),
        ("return centres, counts",
         "return centres, code_sums(x, nearest_code(x, centres), len(centres))[1]",
         "The counts are of one look-up too many: those of the last round are asked for."),
        ("return centres, counts", "return counts, centres",
         "The two results are swapped: centres first, then counts."),
        ("centres = centres.clone()", "centres = x[:len(centres)].clone()",
         "The start that was handed in is ignored: k-means goes on from these centres."),
    ],
    "support/codebook.py::codebook_usage": [
        ("some.log()", "some.log2()",
         "The entropy is in bits: with exp, perplexity needs nats (log, not log2)."),
        ("some = p[p > 0]", "some = p",
         "An unused code makes the entropy NaN: 0 log 0 counts as 0."),
        ("math.exp(entropy)", "math.exp(-entropy)",
         "Perplexity is exp(entropy): of equally used codes it is their number."),
        ("math.exp(entropy)", "float(used)",
         "Perplexity is not the number of used codes: rarely used ones count for less."),
        ("-(some", "(some",
         "The entropy has the wrong sign: it is never negative."),
        ("100 * p.sort", "p.sort",
         "top10_share is in percent."),
        ("p.sort(descending=True).values[:10]", "p[:10]",
         "These are the first ten codes, not the ten commonest."),
        ("p.sort(descending=True).values[:10]", "p.topk(10).values",
         "topk(10) fails on a codebook of fewer than ten codes: take as many as there are."),
        ("descending=True", "descending=False",
         "These are the ten rarest codes, not the ten commonest."),
        ("counts > 0", "counts > 1",
         "A code that one vector chose is in use, too."),
        ("counts / max(1.0, counts.sum().item())", "counts / len(counts)",
         "The shares do not sum to 1: divide by the number of vectors, not of codes."),
        ("counts / max(1.0, counts.sum().item())", "counts.softmax(dim=0)",
         "Shares are counts divided by their sum: a soft-max makes others of them."),
        ("(some * some.log()).sum()", "(some * some.log()).mean()",
         "The entropy is a sum over the codes, not a mean."),
        ("max(1.0, counts.sum().item())", "counts.sum()",
         "Without any vector, 0 is divided by 0: the shares are then 0."),
        ("math.exp(entropy)", "math.exp(entropy) / len(counts)",
         "Perplexity is a number of codes: do not divide it by K."),
        ("dead_codes=len(counts) - used", "dead_codes=used",
         "dead_codes counts the codes that no vector chose."),
    ],
    "support/codebook.py::restart_dead_codes": [
        ("use < threshold", "use > threshold",
         "You restart the codes that live and keep the dead: use below the threshold is dead."),
        ("        codebook.cluster_size[k] = 1.0\n", "",
         "A restarted code still counts as dead, and moves again at the next look: set its use "
         "to 1."),
        ("table[k] = h[i]", "table[k] = h[order[0]]",
         "All dead codes go to one and the same vector: then only one of them will be chosen."),
        ("table[k] = h[i]", "table[k] = F.normalize(torch.randn_like(h[i]), dim=-1)",
         "Dead codes go to random places, where no vectors are: take vectors of the batch."),
        ("torch.randperm(len(h), device=\"cpu\").tolist()",
         "[int(torch.randint(max(1, len(h) // 2), ())) for _ in dead]",
         "The vectors are drawn with repetition: two codes may start at the same place."),
        ("    process.broadcast(table)\n", "",
         "The processes now have different codebooks: rank 0's has to be broadcast."),
        ("table[k] = h[i]", "table[k] = h.mean(dim=0)",
         "Dead codes go to the mean of all vectors, where few vectors are: take single vectors."),
        ("use < threshold", "use == 0",
         "The use is a moving average and hardly ever exactly 0: compare with the threshold."),
        ("codebook.cluster_size[k] = 1.0", "codebook.cluster_size.fill_(1.0)",
         "The use of all codes is reset: only the restarted ones begin at 1."),
        ("table[k] = h[i]", "table[k] = table[codebook.cluster_size.argmax()]",
         "Dead codes become copies of the commonest code: of equal codes only one is chosen."),
        ("return len(dead)", "return dead",
         "The number of restarted codes is returned, not the codes."),
        ("    dead = dead[:len(h)]\n", "",
         "With fewer vectors than dead codes, the number returned is too large."),
        ("    dead = dead[:len(h)]\n", "    assert len(dead) <= len(h)\n",
         "With fewer vectors than dead codes it fails: then as many codes move as there are "
         "vectors."),
    ],
}
