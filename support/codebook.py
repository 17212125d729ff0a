"""Health of a codebook, which the paper does not treat: use, collapse, dead codes, another size."""
import math

import torch

from support.files import UserError


def codebook_usage(counts):
    """From how often each code was chosen (K,): a collapse shows as falling perplexity."""
    p = counts.cpu().double() / counts.sum().clamp(min=1).item()
    entropy = -(p * p.clamp(min=1e-30).log()).sum().item()   # in nats; ln K if all are used alike
    used = int((counts > 0).sum())
    top10 = p.sort(descending=True).values[:10].sum().item()
    return dict(codes_used=used, dead_codes=len(counts) - used, entropy=entropy,
                perplexity=math.exp(entropy), top10_share=100 * top10)


def collapsing(perplexity, best, codes, warned=False):
    """Whether the codebook is dying: perplexity under 20 % of its best or 15 % of the codes.

    Having `warned`, the answer stays yes until it is back over half of its best and over 25 %, so
    that one fall gives one warning. A collapse feeds itself: codes that nothing chooses do not
    move, while the encoder pulls everything to the few that are left. A healthy codebook dips for
    a step or two after its k-means start, but not below 28 % of its best (results/health.md).
    """
    share, floor = (0.5, 0.25) if warned else (0.2, 0.15)
    return perplexity < max(share * best, floor * codes)


class CodebookWatch:
    """Warns, once per fall, when the codebook collapses; --stop-on-collapse ends the run."""

    def __init__(self, codes, stop=False):
        self.codes = codes
        self.stop = stop
        self.best = 0.0
        self.warned = False

    def state_dict(self):
        return dict(best=self.best, warned=self.warned)

    def load_state_dict(self, state):
        self.best = state["best"]
        self.warned = state["warned"]

    def look(self, counts, run):
        if run.device.type != "cpu" and run.step % 10:
            return                           # reading a number waits for a GPU
        perplexity = codebook_usage(counts)["perplexity"]
        self.best = max(self.best, perplexity)
        most = min(self.codes, int(counts.sum()) / 4)        # what a small batch can show
        falling = collapsing(perplexity, self.best, most, self.warned)
        if falling and not self.warned:
            text = (f"the codebook is collapsing: perplexity {perplexity:.1f} of {self.codes} at step "
                    f"{run.step}, {self.best:.1f} at best. Lower --lr or lengthen --warmup-epochs; on small "
                    f"data start late (--continuous-steps), let the codes follow faster (--decay 0.97) or "
                    f"give dead ones a new place (--restart-dead-codes 20)")
            run.log_file(step=run.step, warning=text)
            if self.stop:
                raise UserError(text)
            run.warn(text)
        self.warned = falling


@torch.no_grad()
def restart_dead_codes(codebook, h, process, threshold=0.1):
    """Move each code that hardly anything chose of late to a random current vector.

    Rank 0 draws, all receive. Small codebooks on small data lose codes faster than the moving
    average brings them back.
    """
    weight = codebook.embedding.weight
    h = h.detach().flatten(0, 1)
    dead = (codebook.cluster_size < threshold).nonzero()[:, 0][:len(h)]
    if len(dead):
        drawn = torch.randperm(len(h), device="cpu")[:len(dead)]
        weight[dead] = h[drawn.to(h.device)]
        codebook.cluster_size[dead] = 1.0
    process.broadcast(weight)
    return len(dead)


def resize_codebook(codebook, cluster_size, codes):
    """Another number of codes for a trained codebook.  (K, D), (K,) -> (codes, D), (codes,)

    Shrunk, the most used codes stay. Grown, the most used ones are split in two that differ a
    little: they share the old one's vectors and drift apart, so new codes land where data is dense.
    """
    order = cluster_size.argsort(descending=True, stable=True)
    if codes <= len(codebook):
        keep = order[:codes].sort().values                   # the ids that stay keep their order
        return codebook[keep], cluster_size[keep]
    split = order.repeat(math.ceil(codes / len(order)) - 1)[:codes - len(order)]
    noise = torch.nn.functional.normalize(torch.randn_like(codebook[split]), dim=-1)
    new = torch.nn.functional.normalize(codebook[split] + 0.05 * noise, dim=-1)
    share = cluster_size / (1 + torch.bincount(split, minlength=len(order)))
    return torch.cat([codebook, new]), torch.cat([share, share[split]])
