"""Documents of public packages as jsonl shards.

'''Apollo''' was a [[god]].   ->  {"id": "594", "title": "Apollo", "text": ...}
document i                   ->  line i // 8 of wikipedia-0{i % 8}.jsonl
"""

import bz2
import html
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

from pipelines.data.wikitext import strip_wikitext

NUM_SHARDS = 8
MIN_DOCUMENT_CHARS = 1_000


@dataclass(frozen=True, kw_only=True)
class Document:
    """One line of a shard; paragraphs are separated by an empty line."""

    id: str
    title: str
    text: str


def write_documents(
    parse: Callable[[list[bytes]], Iterator[Document]],
    name: str,
    members: Mapping[str, bytes],
    folder: Path,
) -> tuple[int, int]:
    """Write the documents of a package as jsonl shards, in the package's order.

    Returns:
        How many were written, and how many were left out: those with less than
        `MIN_DOCUMENT_CHARS` of prose.
    """
    found = list(parse(list(members.values())))
    kept = [document for document in found if len(document.text) >= MIN_DOCUMENT_CHARS]
    for first in range(NUM_SHARDS):
        shard = folder / f"{name}-{first:02}.jsonl"
        with shard.open("w", encoding="utf-8", newline="\n") as file:
            for document in kept[first::NUM_SHARDS]:
                file.write(json.dumps(asdict(document), ensure_ascii=False) + "\n")
    return len(kept), len(found) - len(kept)


def parse_addresses(members: list[bytes]) -> Iterator[Document]:
    """Yield one document per address; the package holds each as one paragraph."""
    for index, member in enumerate(members):
        address = json.loads(member)
        title = f"{address['name']}, {address['year']}"
        text = " ".join(html.unescape(address["text"]).split())
        yield Document(id=str(index), title=title, text=text)


_DISAMBIGUATION = re.compile(r"\{\{\s*(?:disambig|hndis|geodis|surname)", re.IGNORECASE)


def parse_articles(members: list[bytes]) -> Iterator[Document]:
    """Yield the prose of each article of one bz2-compressed MediaWiki dump.

    Redirects, disambiguation pages and pages outside the article namespace are skipped.
    """
    (dump,) = members
    for _, element in ElementTree.iterparse(io.BytesIO(bz2.decompress(dump))):
        if not element.tag.endswith("}page"):
            continue
        wikitext = element.findtext("{*}revision/{*}text") or ""
        is_article = element.findtext("{*}ns") == "0" and element.find("{*}redirect") is None
        if is_article and not _DISAMBIGUATION.search(wikitext):
            yield Document(
                id=element.findtext("{*}id") or "",
                title=element.findtext("{*}title") or "",
                text=strip_wikitext(wikitext),
            )
        element.clear()
