"""Wikitext becomes prose."""

import pytest

from pipelines.data.wikitext import strip_wikitext


@pytest.mark.parametrize(
    ("wikitext", "prose"),
    [
        pytest.param(
            "{{Infobox|a={{small|b|{{c}}}}|text=Never shown at all in the prose.}}\n"
            "The god{{fn|see {{cite book|title=A. B.}}}} was worshipped in many a town of Greece.",
            "The god was worshipped in many a town of Greece.",
            id="nested templates",
        ),
        pytest.param(
            "It was built in 1901.<ref name=\"a\">Smith, ''A book. p. 3.</ref> It ''burned'' down"
            '<ref name="a" /> in 1950.<ref>{{cite web|url=http://a.b|title=T}}</ref>',
            "It was built in 1901. It burned down in 1950.",
            id="references, one with unclosed italics",
        ),
        pytest.param(
            "Before the table there is a sentence to keep.\n\n"
            '{| class="wikitable"\n|-\n! Head of a column.\n|-\n'
            "| A cell that is a sentence, too.\n|}\n\n"
            "After the table there is another one to keep.",
            "Before the table there is a sentence to keep.\n\n"
            "After the table there is another one to keep.",
            id="table",
        ),
        pytest.param(
            "A sentence that is kept stands before the table.\n\n"
            "{| class=wikitable\n| A cell of a table that nobody ever closed.",
            "A sentence that is kept stands before the table.",
            id="unclosed table",
        ),
        pytest.param(
            "The [[city|old town]] lies on a [[river]]s bank, see [[:Category:Town|towns]] and "
            "[http://a.b the map].",
            "The old town lies on a rivers bank, see towns and the map.",
            id="links",
        ),
        pytest.param(
            "[[File:A.jpg|thumb|left|A [[statue|marble statue]] of [[Apollo]] is shown in Rome.]]\n"
            "Apollo is one of the most important of the gods.\n"
            "[[Category:Greek gods]]\n[[de:Apollo]]",
            "Apollo is one of the most important of the gods.",
            id="file with links in its caption, category, other language",
        ),
        pytest.param(
            "It weighs 5&nbsp;kg &amp; costs &lt;10 &euro; in Johnson &#38; Johnson's shops.",
            "It weighs 5 kg & costs <10 \u20ac in Johnson & Johnson's shops.",
            id="entities",
        ),
        pytest.param(
            "'''''Hamlet''''' is '''the''' ''tragedy'', and ''Iliad'''s end is the poet's own.",
            "Hamlet is the tragedy, and Iliad's end is the poet's own.",
            id="bold, italics and apostrophes",
        ),
        pytest.param(
            "A first paragraph with a sentence to be kept.\n"
            "== Life ==\n=== Early life ===\nHe was born in a very small village in the hills.\n"
            "== Notes and references ==\nA note on the text that ought to be dropped.\n"
            "=== Books ===\n* Smith, A. (1990). A history of the village. London.\n"
            "== Legacy ==\nHe is remembered in the village to this day.",
            "A first paragraph with a sentence to be kept.\n\n"
            "He was born in a very small village in the hills.\n\n"
            "He is remembered in the village to this day.",
            id="headings, and a back section with its subsections",
        ),
        pytest.param(
            "'''Achilles''' ({{IPAc-en|a|b}}; {{lang-grc|\u1f08\u03c7}}, [[hero]] {{respell|A}}) "
            "and '''Ajax''' ({{IPAc-en|a}}; ) fought at Troy {{citation needed}}, and elsewhere .",
            "Achilles (\u1f08\u03c7, hero) and Ajax fought at Troy, and elsewhere.",
            id="holes that notes and pronunciations leave",
        ),
        pytest.param(
            "It is {{convert|1300|mi|km}} long, {{convert|3|to|5|sqmi|km2|0}} wide; {{as of|2014}} "
            "{{nowrap|H<sub>2</sub>O}} covers 10<sup>6</sup> m<sup>2</sup>{{mdash}}or more.",
            "It is 1300 mi long, 3 to 5 sq mi wide; as of 2014 H2O covers 10^6 m^2\u2014or more.",
            id="templates that carry words",
        ),
        pytest.param(
            "The area is known. It equals <math>\\pi r^2</math> for a circle. "
            "That is an old result.",
            "The area is known. That is an old result.",
            id="a sentence with a formula",
        ),
        pytest.param(
            "Every town of the valley has three markets.<!-- a comment. --> They are:\n"
            "* the fish market\n* The fruit market, which opens before the sun rises.\n"
            "They close at noon on every day of the week.",
            "Every town of the valley has three markets.\n\n"
            "The fruit market, which opens before the sun rises.\n\n"
            "They close at noon on every day of the week.",
            id="list",
        ),
        pytest.param(
            "Too short.\n\nA line of more than forty characters without its stop",
            "",
            id="short paragraph, no sentence",
        ),
        pytest.param(
            ":''See also: [[History of the town]] and its many old markets.''\n\n"
            "{{chem|a}} the rest of a sentence that lost its first half.\n\n"
            "Smith, A. A history of the village. London. ISBN 0-393-02895-X.",
            "",
            id="hatnote, fragment, book",
        ),
        pytest.param(
            "One sentence goes over\ntwo lines of the source.<br />Another one follows it.",
            "One sentence goes over two lines of the source. Another one follows it.",
            id="lines",
        ),
    ],
)
def test_wikitext_becomes_prose(wikitext: str, prose: str) -> None:
    assert strip_wikitext(wikitext) == prose
