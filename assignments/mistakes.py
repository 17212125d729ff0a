"""Natural mistakes in the assigned functions, and what a student who made one is told.

RIGHT holds each function as a student may write it: differently from the project, and right. A
mistake is one place of that text, the text with the mistake in it, and the sentence.
"""
import functools

from assignments import mistakes_backbone, mistakes_tokenizer, probes

RIGHT = mistakes_tokenizer.RIGHT | mistakes_backbone.RIGHT
MISTAKES = mistakes_tokenizer.MISTAKES | mistakes_backbone.MISTAKES



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
