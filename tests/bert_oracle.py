"""BERT's published way from documents to instances, told anew with the plainest means.

Written from the description of the algorithm and on lists that shrink and grow, where the code
under test counts on spans; compared once, outside of this repository, with the original itself.
"""

import random
from dataclasses import dataclass

Sentence = list[int]


@dataclass(kw_only=True)
class Flags:
    """Flags and ids of a run of the original."""

    max_length: int
    max_predictions: int
    short_ratio: float
    mask_ratio: float
    whole_words: bool
    cls: int
    sep: int
    mask: int
    num_ids: int
    continuations: set[int]


@dataclass
class Example:
    """What the original writes for one instance."""

    ids: list[int]
    segments: list[int]
    positions: list[int]
    labels: list[int]
    is_random_next: bool


def examples(corpus: list[list[Sentence]], dice: random.Random, flags: Flags) -> list[Example]:
    """Return all examples of one pass, shuffled."""
    library = [[s for s in document if s] for document in corpus]
    library = [document for document in library if document]
    dice.shuffle(library)
    found: list[Example] = []
    for number in range(len(library)):
        found += of_document(library, number, dice, flags)
    dice.shuffle(found)
    return found


def of_document(
    library: list[list[Sentence]], number: int, dice: random.Random, flags: Flags
) -> list[Example]:
    most = flags.max_length - 3
    wanted = most
    if dice.random() < flags.short_ratio:
        wanted = dice.randint(2, most)
    unread = list(library[number])
    found = []
    while unread:
        chunk: list[Sentence] = []
        while unread:
            chunk.append(unread.pop(0))
            if sum(map(len, chunk)) >= wanted:
                break
        if len(chunk) == 1:
            num_first, random_next = 1, True
        else:
            num_first = dice.randint(1, len(chunk) - 1)
            random_next = dice.random() < 0.5
        first, rest = chunk[:num_first], chunk[num_first:]
        a = joined(first)
        if random_next:
            b = from_elsewhere(library, number, dice, wanted - len(a))
            unread = rest + unread
        else:
            b = joined(rest)
        shorten(a, b, most, dice)
        ids = [flags.cls, *a, flags.sep, *b, flags.sep]
        segments = [0] * (len(a) + 2) + [1] * (len(b) + 1)
        positions, labels = hide(ids, dice, flags)
        found.append(Example(ids, segments, positions, labels, random_next))
    return found


def joined(sentences: list[Sentence]) -> Sentence:
    return [token for sentence in sentences for token in sentence]


def from_elsewhere(
    library: list[list[Sentence]], number: int, dice: random.Random, wanted: int
) -> Sentence:
    draw = number
    tries = 0
    while draw == number and tries < 10:
        draw = dice.randint(0, len(library) - 1)
        tries += 1
    source = library[draw]
    b: Sentence = []
    for sentence in source[dice.randint(0, len(source) - 1) :]:
        b = b + sentence
        if len(b) >= wanted:
            break
    return b


def shorten(a: Sentence, b: Sentence, most: int, dice: random.Random) -> None:
    while len(a) + len(b) > most:
        longer = a if len(a) > len(b) else b
        longer.pop(0 if dice.random() < 0.5 else -1)


def hide(ids: list[int], dice: random.Random, flags: Flags) -> tuple[list[int], list[int]]:
    """Change ids in place; return positions and what stood there."""
    before = list(ids)
    groups: list[list[int]] = []
    for position, token in enumerate(before):
        if token in (flags.cls, flags.sep):
            continue
        if flags.whole_words and groups and token in flags.continuations:
            groups[-1].append(position)
        else:
            groups.append([position])
    dice.shuffle(groups)
    allowed = min(flags.max_predictions, max(1, round(len(ids) * flags.mask_ratio)))
    chosen: list[int] = []
    for group in groups:
        if len(chosen) == allowed:
            break
        if len(group) > allowed - len(chosen):
            continue
        for position in group:
            chosen.append(position)
            if dice.random() < 0.8:
                ids[position] = flags.mask
            elif dice.random() >= 0.5:
                ids[position] = dice.randint(0, flags.num_ids - 1)
    chosen.sort()
    return chosen, [before[position] for position in chosen]
