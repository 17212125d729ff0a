"""Natural mistakes in the assigned functions, and what a student who made one is told.

RIGHT holds each function as a student may write it: differently from the project, and right. A
mistake is one place of that text, the text with the mistake in it, and the sentence.
"""
import functools

from assignments import probes

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
        ("enabled=False", "torch.bfloat16",
         "Under autocast the products are bfloat16, and about one code in 300 changes: compute "
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
}


def versions(name):
    """-> [(source, sentence)] of the known mistakes in a function."""
    right = RIGHT[name].lstrip("\n")
    found = []
    for old, new, sentence in MISTAKES[name]:
        if right.count(old) != 1:
            raise ValueError(f"{name}: {old!r} stands there {right.count(old)} times, not once")
        found.append((right.replace(old, new), sentence))
    return found


@functools.cache
def known_answers(name):
    """-> what the project's function gives on the probes, [(answers of a mistake, sentence)]"""
    correct = probes.answers(name, probes.function_of(name))
    return correct, [(probes.answers(name, probes.function_from(name, source)), sentence)
                     for source, sentence in versions(name)]


def diagnose(name, found):
    """The sentence of the mistake that gives these answers. None: right, or not known."""
    correct, mistakes = known_answers(name)
    if probes.same(found, correct) or all(call == ["raises"] for call in found):
        return None
    for answers, sentence in mistakes:
        if probes.same(found, answers):
            return sentence
    return None
