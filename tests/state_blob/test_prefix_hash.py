import random
import struct
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.state_blob.prefix_hash import BLOCK_TOKENS, PrefixNames, root

tokens_lists = st.lists(st.integers(0, 2**32 - 1), max_size=300)
LENGTHS = [0, 1, 63, 64, 65, 127, 128, 129, 130, 1000]


def name_of(tokens: list[int]) -> bytes:
    return PrefixNames(root("model"), tokens).at(len(tokens))


def block_name(parent: bytes, tokens: list[int]) -> bytes:
    """As FORMAT.md says."""
    content = parent + b"".join(struct.pack("<I", token) for token in tokens)
    return blake2b(content, digest_size=16, person=b"prfaas block").digest()


@given(tokens_lists, st.integers(0, 300))
def test_a_prefix_has_one_name_whatever_follows_it(tokens: list[int], length: int) -> None:
    length = min(length, len(tokens))
    assert PrefixNames(root("model"), tokens).at(length) == name_of(tokens[:length])


@pytest.mark.parametrize("length", LENGTHS)
def test_a_name_is_that_of_the_chain_of_blocks(length: int) -> None:
    tokens = [random.Random(length).randrange(2**32) for _ in range(length)]
    name = root("model")
    blocks = []
    for start in range(0, length, BLOCK_TOKENS):
        name = block_name(name, tokens[start : start + BLOCK_TOKENS])
        blocks.append(name)
    names = PrefixNames(root("model"), tokens)
    assert names.at(length) == name
    assert names.blocks == tuple(blocks[: length // BLOCK_TOKENS])


def test_the_empty_prefix_is_named_by_the_root() -> None:
    assert name_of([]) == root("model")
    assert PrefixNames(root("model"), []).blocks == ()


@given(tokens_lists, tokens_lists)
def test_other_tokens_have_another_name(first: list[int], second: list[int]) -> None:
    assert (name_of(first) == name_of(second)) == (first == second)


def test_each_token_of_a_prefix_matters() -> None:
    tokens = list(range(130))
    changed = [[*tokens[:i], token + 1000, *tokens[i + 1 :]] for i, token in enumerate(tokens)]
    shorter = [tokens[:i] for i in range(len(tokens))]
    names = {name_of(variant) for variant in [tokens, *changed, *shorter]}
    assert len(names) == 1 + len(changed) + len(shorter)


def test_models_and_salts_share_no_names() -> None:
    roots = {root("model"), root("model", b"tenant"), root("tenantmodel"), root("", b"model")}
    assert len(roots | {root("other"), root("model", b"tenan"), root("tmodel", b"tenan")}) == 7


def test_names_never_change_between_releases() -> None:
    assert root("model").hex() == "7b1afa8340102647f796dc54f1453dfd"
    assert root("model", b"tenant").hex() == "33dd50764b3a304708066681470377d5"
    assert name_of([0, 1, 2**32 - 1]).hex() == "d50c385648334330a1621f3780f0a50a"
    assert name_of(list(range(130))).hex() == "cadca9d70bc9413671601bd68b04561b"


@pytest.mark.parametrize("bad", [-1, 2**32])
def test_a_token_id_out_of_range_is_refused(bad: int) -> None:
    with pytest.raises(ValueError, match="token ids"):
        PrefixNames(root("model"), [*range(100), bad])


@pytest.mark.parametrize("length", [-1, 4])
def test_a_prefix_that_is_not_there_has_no_name(length: int) -> None:
    with pytest.raises(ValueError, match="no prefix of"):
        PrefixNames(root("model"), [1, 2, 3]).at(length)


def test_a_root_that_is_no_name_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        PrefixNames(b"", [])
