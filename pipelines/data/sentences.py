"""Where a text may be cut: its sentences, which joined are the text again."""

from itertools import accumulate, pairwise

import sentencex

WIDE_BLANKS = [c for c in map(chr, range(0x80, 0x3001)) if c.isspace()]
"""White space of several bytes: sentencex 1.0.32 panics on one that a full stop follows."""


def split_sentences(language: str, text: str) -> list[str]:
    """Return the sentences of a text by the rules of a language (ISO 639-1).

    A text that the splitter breaks down on is one sentence: no document may end a run.
    """
    tame = text
    if not text.isascii():
        for blank in WIDE_BLANKS:
            if blank in text:  # a panic costs more than all this, and writes to stderr
                tame = tame.replace(blank + ".", " .")
    try:
        found: list[str] = sentencex.segment(language, tame)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # no Exception, and no name to import
            raise
        return [text]
    if tame == text:
        return found
    return [text[a:b] for a, b in pairwise(accumulate(map(len, found), initial=0))]
