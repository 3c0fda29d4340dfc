import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.state_blob.prefix_hash import BLOCK_TOKENS, PrefixHasher, extend, root

tokens_lists = st.lists(st.integers(0, 2**32 - 1), max_size=300)
SPLIT_LENGTHS = [0, 1, 63, 64, 65, 127, 128, 129, 130, 1000]


def name_of(tokens: list[int], start: bytes | None = None) -> bytes:
    hasher = PrefixHasher(root("model") if start is None else start)
    hasher.update(tokens)
    return hasher.digest()


@given(tokens_lists, st.lists(st.integers(0, 300)))
def test_a_name_does_not_depend_on_how_the_tokens_were_split(
    tokens: list[int], cuts: list[int]
) -> None:
    hasher = PrefixHasher(root("model"))
    edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    for start, stop in pairwise(edges):
        hasher.update(tokens[start:stop])
        assert hasher.digest() == name_of(tokens[:stop])
    assert hasher.digest() == name_of(tokens)


@pytest.mark.parametrize("length", SPLIT_LENGTHS)
@pytest.mark.parametrize("split", SPLIT_LENGTHS)
def test_a_name_is_the_same_at_every_split_around_a_block(length: int, split: int) -> None:
    tokens = list(range(length))
    hasher = PrefixHasher(root("model"))
    hasher.update(tokens[:split])
    hasher.digest()
    hasher.update(tokens[split:])
    assert hasher.digest() == name_of(tokens)


def test_whole_blocks_are_named_by_the_chain() -> None:
    tokens = [random.Random(1).randrange(2**32) for _ in range(3 * BLOCK_TOKENS)]
    first = extend(root("model"), tokens[:64])
    second = extend(first, tokens[64:128])
    assert name_of(tokens[:64]) == first
    assert name_of(tokens[:128]) == second
    assert name_of(tokens[64:130], start=first) == name_of(tokens[:130])


def test_the_empty_prefix_is_named_by_the_root() -> None:
    assert name_of([]) == root("model")


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
def test_a_token_id_out_of_range_is_refused_and_leaves_the_prefix_as_it_was(bad: int) -> None:
    hasher = PrefixHasher(root("model"))
    hasher.update([1, 2, 3])
    with pytest.raises(ValueError, match="token ids"):
        hasher.update([*range(100), bad])
    assert hasher.digest() == name_of([1, 2, 3])


@pytest.mark.parametrize("count", [0, 65])
def test_a_block_of_any_other_size_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="1 to 64 tokens"):
        extend(root("model"), [0] * count)


def test_a_parent_that_is_no_name_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        extend(b"short", [1])
    with pytest.raises(ValueError, match="16 bytes"):
        PrefixHasher(b"")
