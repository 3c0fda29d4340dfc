import pytest

from shared.errors import SegmentVersionError
from shared.state_blob.codecs import (
    CODECS,
    DEFAULT_CODEC,
    codec_named,
    codec_with_wire_id,
    codecs_for,
)


def test_codecs_are_found_by_name_and_by_wire_id() -> None:
    for codec in CODECS:
        assert codec_named(codec.name) is codec
        assert codec_with_wire_id(codec.wire_id) is codec
    with pytest.raises(ValueError, match="known: raw, zstd, bf16-state, int8-latent"):
        codec_named("lz4")
    with pytest.raises(SegmentVersionError):
        codec_with_wire_id(255)


def test_wire_ids_never_change() -> None:
    assert [(codec.name, codec.wire_id) for codec in CODECS] == [
        ("raw", 0),
        ("zstd", 1),
        ("bf16-state", 2),
        ("int8-latent", 3),
    ]


def test_each_kind_has_its_codecs() -> None:
    assert [codec.name for codec in codecs_for("mla")] == ["raw", "zstd", "int8-latent"]
    assert [codec.name for codec in codecs_for("kda")] == ["raw", "zstd", "bf16-state"]


def test_nothing_is_lost_that_was_not_asked_for() -> None:
    assert DEFAULT_CODEC.lossless
    assert [codec.name for codec in CODECS if codec.lossless] == ["raw", "zstd"]
