"""Where a text may be cut: its sentences, which joined are the text again."""

import sentencex


def split_sentences(language: str, text: str) -> list[str]:
    """Return the sentences of a text by the rules of a language (ISO 639-1).

    A text that the splitter breaks down on is one sentence: no document may end a run.
    """
    try:
        return list(sentencex.segment(language, text))
    except BaseException as error:
        # sentencex 1.0.32 panics on "B\u3000." and its like, and a panic is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        return [text]
