"""The training text: three works that Debian packages ship, fetched, checked and cut to documents.

    python -m training.corpus DIRECTORY

needs `apt-get` and `dpkg-deb`, and writes `train.jsonl` and `held_out.jsonl`: a document a line.
"""

import argparse
import gzip
import hashlib
import json
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Final

PACKAGES: Final = ("bible-kjv", "bible-kjv-text", "wordnet-base", "dict-jargon")
"""The first has the program that reads the second."""
CHECKSUMS: Final[Mapping[str, str]] = {
    "usr/lib/bible.data": "6c746c2acc8a34bfded980883ff1701a5d68934a1c853ebf88a07b978fe0ae0e",
    "usr/share/wordnet/data.noun": (
        "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2"
    ),
    "usr/share/wordnet/data.verb": (
        "adcf43e35b581e8036d8b5a52d63d9cd3d3b4870b2720d3c03c799df44777bc2"
    ),
    "usr/share/wordnet/data.adj": (
        "c89120dfc1f046ddff4a631bf9b7e9fa1a36b5e86565a23bf82dbe14f30b88a7"
    ),
    "usr/share/wordnet/data.adv": (
        "444a63bf3955080ab7524f5079cfc07ff9bc682cb98bdb1db73b0fb9829f1139"
    ),
    "usr/share/dictd/jargon.dict.dz": (
        "856ced964d3a3cfd79a3dc251df04365eefd848966e3ae94e58f2671d6e79ca5"
    ),
}
"""SHA-256 of the files that the text is made of, as Debian 12 has them."""
TRAIN_FILE: Final = "train.jsonl"
HELD_OUT_FILE: Final = "held_out.jsonl"

HELD_OUT_EVERY: Final = 50
"""One document in so many of each work is kept from training."""
LATIN_FIELDS: Final = ("05", "20")
"""WordNet's animals and plants (`lexnames`), which are left out: mostly names in Latin."""
GLOSSES_TOGETHER: Final = 24
"""Neighbouring entries of WordNet, which are about kindred things, that make a document."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text that stands by itself."""

    source: str
    text: str


def fetch(directory: Path) -> Path:
    """Download and unpack the packages; gives the root of their files.

    Raises:
        ValueError: a file is not the one that the published model was trained on.
    """
    root = directory / "packages"
    root.mkdir(parents=True, exist_ok=True)
    if not all((root / name).exists() for name in CHECKSUMS):
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=directory, check=True)
        for archive in sorted(directory.glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(archive), str(root)], check=True)
    for name, expected in CHECKSUMS.items():
        found = hashlib.sha256((root / name).read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(f"{name}: SHA-256 is {found}, expected {expected}")
    return root


def documents(root: Path) -> Iterator[Document]:
    """All documents of the unpacked packages, in their works' own order."""
    yield from (Document("bible", text) for text in bible_chapters(_print_bible(root)))
    wordnet = root / "usr/share/wordnet"
    for part in ("noun", "verb", "adj", "adv"):
        lines = (wordnet / f"data.{part}").read_text(encoding="utf-8").splitlines()
        yield from (Document("wordnet", text) for text in glosses(lines))
    jargon = gzip.decompress((root / "usr/share/dictd/jargon.dict.dz").read_bytes()).decode()
    yield from (Document("jargon", text) for text in jargon_entries(jargon))


def split(every: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """Divide documents into those to train on and those held out."""
    train: list[Document] = []
    held_out: list[Document] = []
    for _, group in groupby(every, key=lambda document: document.source):
        for n, document in enumerate(group):
            is_held_out = n % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
            (held_out if is_held_out else train).append(document)
    return train, held_out


def read_documents(path: Path) -> list[Document]:
    """Read what `write_documents` wrote."""
    with path.open(encoding="utf-8") as file:
        return [Document(**json.loads(line)) for line in file]


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """Write a document a line."""
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(asdict(document), ensure_ascii=False) + "\n")


# --- the works -------------------------------------------------------------------------------


def _print_bible(root: Path) -> str:
    """The King James Version, a verse a line, as the package's own program decompresses it."""
    program, texts = root.resolve() / "usr/bin/bible", root / "usr/lib"
    command = [str(program), "-f", "-p", ".", "Gen1:1-Rev22:21"]
    return subprocess.run(
        command, cwd=texts, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
    ).stdout


def bible_chapters(printed: str) -> Iterator[str]:
    """Chapters of lines as `Ge1:1 In the beginning ...`, a verse a line, without the numbers."""
    verses = [line.partition(" ") for line in printed.splitlines() if line.strip()]
    for _, chapter in groupby(verses, key=lambda verse: verse[0].partition(":")[0]):
        yield "\n".join(text.strip() for _, _, text in chapter)


def glosses(lines: Sequence[str]) -> Iterator[str]:
    """Entries of a WordNet data file as `word, other word: gloss`, some together."""
    data = (line for line in lines if not line.startswith("  "))
    entries = [_gloss(line) for line in data if line.split(maxsplit=2)[1] not in LATIN_FIELDS]
    for start in range(0, len(entries), GLOSSES_TOGETHER):
        yield "\n".join(entries[start : start + GLOSSES_TOGETHER])


def _gloss(line: str) -> str:
    fields, _, gloss = line.partition(" | ")
    _, _, _, count, *rest = fields.split()
    words = rest[: 2 * int(count, 16) : 2]
    named = ", ".join(re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words)
    return f"{named}: {gloss.strip()}"


def jargon_entries(text: str) -> Iterator[str]:
    """Entries of the Jargon File: the headword, then its paragraphs, a line each."""
    body = text[text.index("\n(TM)\n") :]
    for entry in re.split(r"\n(?=\S)", body):
        paragraphs = re.split(r"\n\s*\n", entry.strip())
        lines = [" ".join(paragraph.split()) for paragraph in paragraphs]
        if len(lines) > 1:
            yield "\n".join(lines)


def main() -> None:
    """Fetch the packages and write the documents."""
    parser = argparse.ArgumentParser(prog="python -m training.corpus", description=__doc__)
    parser.add_argument("directory", type=Path, help="outside the repository")
    directory: Path = parser.parse_args().directory
    train, held_out = split(documents(fetch(directory)))
    write_documents(directory / TRAIN_FILE, train)
    write_documents(directory / HELD_OUT_FILE, held_out)


if __name__ == "__main__":
    main()
