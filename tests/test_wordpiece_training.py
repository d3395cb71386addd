"""Pieces are those that `tokenizers` learns, and a function of the counts alone."""

import random
from collections import Counter
from collections.abc import Mapping

import pyarrow as pa
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.trainers import WordPieceTrainer

from pipelines.data.wordpiece_training import learn_pieces


def learn(
    words: Mapping[str, int], size: int = 300, alphabet: int = 100, min_frequency: int = 1
) -> list[str]:
    table = pa.table({"word": [*words], "count": [*words.values()]})
    return learn_pieces(table, size=size, alphabet=alphabet, min_frequency=min_frequency)


def oracle(words: Mapping[str, int], size: int, alphabet: int, min_frequency: int) -> list[str]:
    """Return what `tokenizers` learns; the letters are given, because it orders them at random."""
    seen: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            seen[letter] += count
    letters = sorted(sorted(seen, key=lambda c: (-seen[c], c))[: min(alphabet, size // 2)])
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    trainer = WordPieceTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        special_tokens=["##" + letter for letter in letters],
        show_progress=False,
    )
    texts = (word for word, count in words.items() for _ in range(count))
    tokenizer.train_from_iterator(texts, trainer)
    ids = tokenizer.get_vocab()
    return sorted(ids, key=lambda piece: ids[piece])


@pytest.mark.parametrize("seed", range(60))
def test_pieces_are_those_of_tokenizers_ties_and_all(seed: int) -> None:
    dice = random.Random(seed)
    letters = "abcdefghi"[: dice.choice([1, 2, 3, 5, 9])]
    longest = dice.choice([3, 6, 14])
    words = {
        "".join(dice.choices(letters, k=dice.randint(1, longest))): dice.randint(1, 6)
        for _ in range(dice.choice([3, 30, 200]))
    }
    size, alphabet = dice.choice([20, 60, 200, 500]), dice.choice([2, 4, 100])
    min_frequency = dice.choice([1, 2, 5])
    found = learn(words, size, alphabet, min_frequency)
    assert found == oracle(words, size, alphabet, min_frequency)


def test_the_most_frequent_pair_is_merged_first() -> None:
    found = learn({"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5})
    letters = ["##b", "##g", "##h", "##n", "##p", "##s", "##u", *"bghnpsu"]
    assert found[: len(letters)] == letters
    assert found[len(letters) :] == ["##ug", "##un", "hug", "pun", "pug", "hugs", "bun"]


def test_a_run_of_one_letter_is_merged_from_the_left() -> None:
    assert learn({"aaaaa": 3}, min_frequency=4) == ["##a", "a", "##aa"]
    assert learn({"aaaaa": 3}) == ["##a", "a", "##aa", "aaa", "aaaaa"]


def test_the_order_of_the_words_is_of_no_effect() -> None:
    dice = random.Random(0)
    words = {"".join(dice.choices("abcde", k=dice.randint(1, 8))): 1 + i % 7 for i in range(400)}
    shuffled = dict(sorted(words.items(), key=lambda item: item[0][::-1]))
    assert [*shuffled] != [*words]
    assert learn(shuffled) == learn(words)


def test_counts_may_be_greater_than_32_bits_hold() -> None:
    assert learn({"ab": 5 << 40, "cd": 3 << 40}, min_frequency=4 << 40)[-1] == "ab"


def test_letters_beyond_the_alphabet_are_left_out_of_words() -> None:
    assert learn({"axb": 9, "ab": 9, "x": 1}, alphabet=2) == ["##a", "##b", "a", "b", "ab"]


def test_ideographs_get_no_form_that_continues_a_word() -> None:
    assert learn({"\u4e2d": 9, ",": 3, "ab": 3}) == ["##a", "##b", ",", "a", "b", "\u4e2d", "ab"]


def test_no_words_give_no_pieces() -> None:
    assert learn({}) == []
    assert learn({"a": 1}) == ["##a", "a"]
