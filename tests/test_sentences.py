"""Sentences lose nothing of their text, and no text breaks them."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.data.sentences import split_sentences

SIGNS = (*" .?!,\"'()[]\n\t\x0c\x00", "\u2028", "\u3000", "\u2003", "\u0085", "\u201c", "\ufeff")
parts = st.one_of(
    st.sampled_from(["A", "b", "Mr.", "1", "a.b@c.de", "https://a.b/c", "\u4e2d", "e\u0301"]),
    st.sampled_from(SIGNS),
    st.characters(exclude_categories=["Cs"]),
)


@pytest.mark.parametrize("language", ["en", "de", "ja", "xx"])
@given(text=st.lists(parts, max_size=20).map("".join))
@example(text="Vitamin B\u3000. And more.")
@example(text="A\u2003.")
@settings(max_examples=100, deadline=None)
def test_t10_sentences_joined_are_the_text(language: str, text: str) -> None:
    assert "".join(split_sentences(language, text)) == text


def test_sentences_end_where_they_do_in_english() -> None:
    text = "Mr. Smith sails at 3.5 knots. Does he? Yes!\n\nThe U.S. Navy waits."
    found = [sentence.strip() for sentence in split_sentences("en", text)]
    assert [sentence for sentence in found if sentence] == [
        "Mr. Smith sails at 3.5 knots.",
        "Does he?",
        "Yes!",
        "The U.S. Navy waits.",
    ]


@pytest.mark.parametrize("blank", ["\u00a0", "\u2003", "\u3000", "\u0085"])
def test_a_wide_blank_before_a_full_stop_costs_no_boundary(
    blank: str, capfd: pytest.CaptureFixture[str]
) -> None:
    text = f"He ships vitamin B{blank}. It sails. We wait{blank}here{blank}."
    assert split_sentences("en", text) == [
        f"He ships vitamin B{blank}. ",
        "It sails. ",
        f"We wait{blank}here{blank}.",
    ]
    assert capfd.readouterr().err == ""
