"""What the paper does not say of a codebook: use, collapse, dead codes, another size.

A collapse feeds itself. Codes that no vector chooses do not move, while the encoder pulls all
vectors to the few codes that are left. vqkd.py calls CodebookHealth once per step.
"""
# Shapes:  B images, N patches per image, K codes, D code width
import math

import torch
import torch.nn.functional as F

from support import data, weights
from support.files import UserError
from support.positions import grid_of, sides
from support.process import seed_all


def codebook_usage(counts):
    """How many codes are in use, and how evenly, from the number of vectors of each code (K,).

    entropy in nats, at most ln K. perplexity = exp(entropy): the number of codes that, used
    equally, would have this entropy. top10_share: vectors of the ten commonest codes, in percent.
    """
    p = counts.cpu().double() / counts.sum().clamp(min=1).item()
    entropy = -(p * p.clamp(min=1e-30).log()).sum().item()
    used = int((counts > 0).sum())
    top10 = p.sort(descending=True).values[:10].sum().item()
    return dict(codes_used=used, dead_codes=len(counts) - used, entropy=entropy,
                perplexity=math.exp(entropy), top10_share=100 * top10)


def collapsing(perplexity, best, codes, warned=False):
    """Whether the codebook is dying: perplexity under 20 % of its best or 15 % of the codes.

    Once `warned`, the answer stays True until perplexity is over 50 % of its best and 25 % of the
    codes. So one fall gives one warning. A healthy codebook dips for a step or two after its
    k-means start (results/health.md says how far).
    """
    share, floor = (0.5, 0.25) if warned else (0.2, 0.15)
    return perplexity < max(share * best, floor * codes)


class CodebookHealth:
    """Looks after the codes of one run. Its state lies in the resume file."""

    def __init__(self, args):
        self.args = args
        self.best = 0.0                      # perplexity
        self.warned = False
        self.before = None                   # the evaluation of a tokenizer from --init

    def state_dict(self):
        return dict(best=self.best, warned=self.warned, before=self.before)

    def load_state_dict(self, state):
        self.best = state["best"]
        self.warned = state["warned"]
        self.before = state.get("before")

    def look_after(self, codebook, h, counts, run):
        """Once per step, after the codes have moved.  h (B, N, D), counts (K,) over all processes

        Raises UserError after a collapse with --stop-on-collapse.
        """
        every = data.shortened(self.args, "restart_dead_codes", run.total_steps)
        if every and run.step % every == 0 and run.step < 0.8 * run.total_steps:
            seed_all(self.args.seed, run.step)
            restart_dead_codes(codebook, h, run)
        # Reading a number waits for a GPU: there every tenth step.
        if run.device.type == "cpu" or run.step % 10 == 0:
            self.notice_collapse(counts, run)

    def notice_collapse(self, counts, run):
        """Warn once per fall of the perplexity, or end the run."""
        perplexity = codebook_usage(counts)["perplexity"]
        self.best = max(self.best, perplexity)
        most = min(len(counts), int(counts.sum()) / 4)       # a small batch cannot show more
        falling = collapsing(perplexity, self.best, most, self.warned)
        if falling and not self.warned:
            text = (f"the codebook is collapsing: perplexity {perplexity:.1f} of {len(counts)} at "
                    f"step {run.step}, {self.best:.1f} at best. Lower --lr or lengthen "
                    f"--warmup-epochs; on small data start late (--continuous-steps), let the "
                    f"codes follow faster (--decay 0.97) or give dead ones a new place "
                    f"(--restart-dead-codes 20)")
            run.log_file(step=run.step, warning=text)
            if self.args.stop_on_collapse:
                raise UserError(text)
            run.warn(text)
        self.warned = falling

    def begin(self, result, run):
        """Keep and log how the tokenizer of --init does before it is trained further."""
        self.before = result
        run.log_file(step=0, split="val", note="before", **result)

    def compare(self, result, run):
        """Print the use of codes before and after, if the run went on from --init."""
        if self.before:
            run.print(f"codes used on {self.args.data}: {self.before['codes_used']} before, "
                      f"{result['codes_used']} after; perplexity {self.before['perplexity']:.1f} "
                      f"before, {result['perplexity']:.1f} after")


@torch.no_grad()
def restart_dead_codes(codebook, h, process, threshold=0.1):
    """Move each code that hardly any vector chose lately to a random vector of h (B, N, D).

    -> their number. Rank 0 draws, all processes receive. On small data a small codebook loses
    codes faster than the moving average brings them back.
    """
    weight = codebook.embedding.weight
    h = h.detach().flatten(0, 1)                             # (B N, D)
    dead = (codebook.cluster_size < threshold).nonzero()[:, 0][:len(h)]
    if len(dead):
        drawn = torch.randperm(len(h), device="cpu")[:len(dead)]
        weight[dead] = h[drawn.to(h.device)]
        codebook.cluster_size[dead] = 1.0
    process.broadcast(weight)
    return len(dead)


# --- a codebook from a file -----------------------------------------------------------------------
def read_tokenizer(path):
    """-> the Checkpoint of a tokenizer, ours or released: its weights, and all its sizes."""
    checkpoint = weights.read(path, "make it with python vqkd.py, or give --tokenizer FILE")
    if checkpoint.kind != "vqkd":
        raise UserError(f"{path} is no VQ-KD tokenizer: make one with python vqkd.py")
    return checkpoint


def require_tokenizer(args):
    """UserError if there is no file --tokenizer, with the command that makes it."""
    if not args.tokenizer.is_file():
        size = "base" if args.model == "large" else args.model       # the paper has one for both
        raise UserError(f"there is no tokenizer {args.tokenizer}: make it with python vqkd.py "
                        f"--model {size}, or give --tokenizer FILE, ours or a released one")


def require_grid(grid, args):
    """UserError if the tokenizer's patches are not those of the backbone, for which they name z."""
    wanted = grid_of(args.image_size, args.patch_size)
    if grid != wanted:
        size = " ".join(str(side) for side in dict.fromkeys(sides(args.image_size)))
        raise UserError(
            f"the tokenizer {args.tokenizer} has {grid} patches, the backbone {wanted}: "
            f"train one with python vqkd.py --image-size {size} --patch-size {args.patch_size}")


def continue_from(model, path):
    """Fill a VQKD with the weights of a tokenizer. Another number of codes is resized.

    Raises UserError if the tokenizer differs in anything else.
    """
    checkpoint = read_tokenizer(path)
    heads = checkpoint.facts["heads"]        # other heads would fit, and mean something else
    if heads != model.encoder.heads:
        raise UserError(f"{path} has {heads} attention heads, the model of --model "
                        f"{model.encoder.heads}: give the --model it was made with")
    codes = len(model.quantize.cluster_size)
    table = checkpoint.weights["quantize.embedding.weight"]
    if len(table) != codes:
        used = checkpoint.weights.get("quantize.cluster_size", torch.ones(len(table)))
        table, used = resize_codebook(table, used, codes)
        resized = {"quantize.embedding.weight": table, "quantize.cluster_size": used}
        checkpoint = checkpoint._replace(weights=checkpoint.weights | resized)
    weights.check(model.state_dict(), checkpoint)
    model.load_state_dict(checkpoint.weights)


def resize_codebook(codebook, cluster_size, codes):
    """Another number of codes for a trained codebook.  (K, D), (K,) -> (codes, D), (codes,)

    A smaller codebook keeps the codes used most. A larger one splits them in two that differ a
    little. Both share the vectors of the old code and drift apart, so that new codes come where
    vectors are many.
    """
    order = cluster_size.argsort(descending=True, stable=True)
    if codes <= len(codebook):
        keep = order[:codes].sort().values                   # the codes keep their order
        return codebook[keep], cluster_size[keep]
    split = order.repeat(math.ceil(codes / len(order)) - 1)[:codes - len(order)]
    noise = F.normalize(torch.randn_like(codebook[split]), dim=-1)
    new = F.normalize(codebook[split] + 0.05 * noise, dim=-1)
    share = cluster_size / (1 + torch.bincount(split, minlength=len(order)))
    return torch.cat([codebook, new]), torch.cat([share, share[split]])
