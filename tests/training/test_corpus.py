"""The works are cut to documents as they should be."""

from pathlib import Path

from shared.kimi_linear.chat_template import ChatTemplate
from shared.kimi_linear.tokenizer.loading import load_tokenizer
from training.corpus import (
    GLOSSES_TOGETHER,
    HELD_OUT_EVERY,
    Document,
    bible_chapters,
    glosses,
    jargon_entries,
    read_documents,
    split,
    write_documents,
)
from training.tokenizer import SPECIAL_TOKENS, train_ranks, write_tokenizer

NOUN = '00002684 03 n 02 object 0 physical_object 0 001 @ 00001930 n 0000 | a thing; "a ball"  '
ADJECTIVE = "00003939 00 a 01 galore(ip) 0 000 | in great numbers  "
ANIMAL = "00015388 05 n 01 animal 0 000 | a living organism  "


def test_a_chapter_has_its_verses_without_their_numbers() -> None:
    printed = "Ge1:1 In the beginning.\nGe1:2 And the earth.\n\nGe2:1 Thus the heavens.\n"
    assert list(bible_chapters(printed)) == [
        "In the beginning.\nAnd the earth.",
        "Thus the heavens.",
    ]


def test_a_gloss_follows_the_words_it_explains() -> None:
    licence = "  1 This software and database is being provided"
    (document,) = glosses([licence, NOUN, ANIMAL, ADJECTIVE])
    assert document == 'object, physical object: a thing; "a ball"\ngalore: in great numbers'


def test_neighbouring_glosses_make_a_document() -> None:
    assert len(list(glosses([NOUN] * (GLOSSES_TOGETHER + 1)))) == 2


def test_an_entry_of_the_jargon_file_has_a_line_for_each_paragraph() -> None:
    first = "(TM)\n //\n\n    [Usenet] ASCII\n    rendition.\n\n"
    text = f"\nnotice\n\n{first}empty\n\nEMP\n /E/\n\n    See {{spam}}.\n"
    assert list(jargon_entries(text)) == [
        "(TM) //\n[Usenet] ASCII rendition.",
        "EMP /E/\nSee {spam}.",
    ]


def test_one_document_in_fifty_of_each_work_is_held_out(tmp_path: Path) -> None:
    every = [
        Document(source, f"{source} {n}") for source in ("bible", "jargon") for n in range(120)
    ]
    train, held_out = split(every)
    assert len(held_out) == 2 * (120 // HELD_OUT_EVERY + 1) - 2
    assert {d.source for d in held_out} == {"bible", "jargon"}
    assert sorted([*train, *held_out], key=every.index) == every
    write_documents(tmp_path / "file", held_out)
    assert read_documents(tmp_path / "file") == held_out


def test_the_tokenizer_that_is_made_reads_back_and_has_the_chat_template(tmp_path: Path) -> None:
    texts = ["In the beginning God created the heaven and the earth. " * 20, "héaven 😀"]
    ranks = train_ranks(texts, 300)
    assert len(ranks) == 300 - len(SPECIAL_TOKENS)
    write_tokenizer(tmp_path, ranks)
    tokenizer = load_tokenizer(tmp_path, 300)
    assert tokenizer is not None
    for text in (*texts, "\x00 \n\n anything"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(texts[0])) < len(texts[0]) / 2
    assert ChatTemplate.of(tokenizer).end_id >= len(ranks)
