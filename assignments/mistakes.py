"""Natural mistakes in the assigned functions, and what a student who made one is told.

RIGHT holds each function as a student may write it: differently from the project, and right. A
mistake is one place of that text, the text with the mistake in it, and the sentence.
"""
import functools
import threading

from assignments import mistakes_backbone, mistakes_tokenizer, probes

RIGHT = mistakes_tokenizer.RIGHT | mistakes_backbone.RIGHT
MISTAKES = mistakes_tokenizer.MISTAKES | mistakes_backbone.MISTAKES
ALONE = threading.Lock()                     # of marking threads, as probes seed what all share


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
    """The sentence of the mistake that gives these answers. None: right, or not known.

    Or that of a mistake all of whose signs are there, beside others: a sign is a call in which the
    mistake gives something else than the project's function. The most signs win.
    """
    with ALONE:
        correct, mistakes = known_answers(name)
    if probes.same(found, correct):
        return None
    best, ties, sentence = 0, 0, None
    for answers, told in mistakes:
        if probes.same(found, answers) and any(call != ["raises"] for call in found):
            return told
        signs = [i for i, call in enumerate(answers) if not probes.same(call, correct[i])]
        shown = all(i < len(found) and probes.same(found[i], answers[i]) for i in signs)
        if not shown or all(answers[i] == ["raises"] for i in signs) or len(signs) < best:
            continue
        ties = ties + 1 if len(signs) == best else 0
        best, sentence = len(signs), told
    return None if ties else sentence
