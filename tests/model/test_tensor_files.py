"""Weight files are read without a second copy; what is wrong with one is refused by name."""

import json
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from shared.errors import CheckpointError
from shared.kernels.dispatch import kernels_for
from shared.kimi_linear.checkpoint import load_weights
from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.presets import write_random_checkpoint
from shared.kimi_linear.tensor_files import TensorFiles

TENSORS = {
    "embedding": torch.arange(30, dtype=torch.float32).view(5, 6),
    "projection": torch.linspace(-1, 1, 24).half().view(4, 6),
    "bias.of.the.gate": torch.linspace(3, 4, 7).bfloat16(),
}
"""Of different sizes, and with names that are not made of each other's letters."""

CONTENT = save(TENSORS, metadata={"format": "pt"})
HEADER_END = 8 + int.from_bytes(CONTENT[:8], "little")

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def nothing(name: str) -> bool:
    return False


def read_all(directory: Path) -> dict[str, Tensor]:
    found = {name: torch.empty_like(tensor) for name, tensor in TENSORS.items()}
    with TensorFiles(directory, is_ignored=nothing) as files:
        for name, target in found.items():
            files.read_into(target, name)
        files.refuse_unread()
    return found


def assert_as_written(found: dict[str, Tensor]) -> None:
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def write_index(directory: Path, weight_map: object) -> None:
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        read_all(directory)
    return str(refused.value)


# --- shards ------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """`embedding` in one file, the others in another."""
    first, *others = TENSORS
    save_file({first: TENSORS[first]}, tmp_path / "first.safetensors")
    save_file({name: TENSORS[name] for name in others}, tmp_path / "second.safetensors")
    write_index(
        tmp_path, {first: "first.safetensors", **dict.fromkeys(others, "second.safetensors")}
    )
    return tmp_path


def test_tensors_are_found_in_whatever_file_they_are(sharded: Path) -> None:
    assert_as_written(read_all(sharded))


def test_files_that_the_index_does_not_name_are_not_read(sharded: Path) -> None:
    (sharded / "third.safetensors").write_bytes(b"something else")
    assert_as_written(read_all(sharded))


def test_a_missing_shard_is_named_with_a_tensor_that_should_be_in_it(sharded: Path) -> None:
    (sharded / "second.safetensors").unlink()
    assert "second.safetensors is missing or cannot be read, expected tensor projection" in refusal(
        sharded
    )


def test_a_tensor_that_is_not_where_the_index_says_is_named(sharded: Path) -> None:
    save_file({"other": torch.zeros(2)}, sharded / "first.safetensors")
    assert "first.safetensors: tensor embedding is missing, expected by the index" in refusal(
        sharded
    )


def test_a_tensor_that_is_in_two_files_is_named_with_both(sharded: Path) -> None:
    save_file(TENSORS, sharded / "second.safetensors")
    assert (
        "second.safetensors: tensor embedding is found again, expected only in first.safetensors"
        in refusal(sharded)
    )


@pytest.mark.parametrize("weight_map", [{}, [], None])
def test_an_index_that_names_no_tensor_is_refused(sharded: Path, weight_map: object) -> None:
    write_index(sharded, weight_map)
    assert "weight_map is missing, or names no tensor" in refusal(sharded)


@pytest.mark.parametrize("file_name", ["../elsewhere.safetensors", "/etc/passwd", ".", 7, None])
def test_an_index_that_leads_out_of_the_directory_is_refused(
    sharded: Path, file_name: object
) -> None:
    write_index(sharded, {"embedding": file_name})
    message = refusal(sharded)
    assert f"tensor embedding is in {file_name!r}, expected the name of a file" in message


@pytest.mark.parametrize("file_name", ["", "..", "a\0b", "\udc80", "x" * 1000])
def test_an_index_that_names_no_possible_file_is_refused(sharded: Path, file_name: str) -> None:
    write_index(sharded, {"embedding": file_name})
    assert "is missing or cannot be read, expected tensor embedding" in refusal(sharded)


# --- damage ------------------------------------------------------------------------------------


def with_header(header: dict[str, Any], data: bytes) -> bytes:
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def entry(start: int, stop: int, shape: tuple[int, ...] = (5, 6)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": (start, stop)}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "it is empty"),
        (b"\0" * 4, "it has 4 bytes, expected at least 8"),
        (b"\xff" * 100, f"its header has {2**64 - 1} bytes, expected at most 100000000"),
        (CONTENT[:50], f"its header is cut off, expected {HEADER_END - 8} bytes, found 42"),
        (with_header({}, b"")[:8] + b"[]", "its header is not a JSON object"),
        (with_header({}, b"")[:8] + b"{]", "its header is not a JSON object"),
        ((9000).to_bytes(8, "little") + b"[" * 9000, "its header is not a JSON object"),
    ],
)
def test_a_file_that_is_not_safetensors_is_refused(
    tmp_path: Path, content: bytes, complaint: str
) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert f"model.safetensors is damaged: {complaint}" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (
            {"embedding": entry(0, 240)},
            r"embedding of shape \(5, 6\) is cut off, expected 240 bytes, found 120",
        ),
        ({"embedding": entry(8, 120)}, "embedding begins at byte 8, expected 0"),
        ({"a": entry(0, 80), "b": entry(40, 120)}, "b begins at byte 40, expected 80"),
        ({"a": entry(0, 40), "b": entry(80, 120)}, "b begins at byte 80, expected 40"),
        ({"embedding": entry(0, 2**70)}, f"embedding of .* expected {2**70} bytes, found 120"),
        ({"a": entry(0, 40), "b": entry(40, 20)}, "b ends at byte 20, expected 40"),
        ({"embedding": entry(0, 80)}, "its tensors have 80 bytes, expected 120"),
        ({"embedding": entry(0, 120, (5, -6))}, "embedding: shape.1: Input should be greater"),
        ({"embedding": {"dtype": "F32"}}, "embedding: shape: Field required"),
        ({"embedding": 7}, "embedding: its entry: Input should be"),
        ({"embedding": entry(0, 120, (6, 5))}, r"embedding has shape \(6, 5\), expected \(5, 6\)"),
        (
            {"embedding": entry(0, 120) | {"dtype": "F16"}},
            "embedding of shape .* and dtype F16 has 120 bytes, expected 60",
        ),
        (
            {"embedding": entry(0, 120) | {"dtype": "F8"}},
            "embedding has dtype F8, expected one of F32, BF16, F16",
        ),
    ],
)
def test_a_header_that_lies_is_refused_with_the_tensor_it_lies_about(
    tmp_path: Path, header: dict[str, Any], complaint: str
) -> None:
    (tmp_path / "model.safetensors").write_bytes(with_header(header, bytes(120)))
    with pytest.raises(CheckpointError, match=complaint):
        read_all(tmp_path)


def test_a_name_that_occurs_twice_in_a_header_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"embedding": entry(0, 120), "em": entry(120, 240)}).encode()
    twice = header.replace(b'"em"', b'"embedding"')
    (tmp_path / "model.safetensors").write_bytes(
        len(twice).to_bytes(8, "little") + twice + bytes(240)
    )
    assert "tensor embedding begins at byte 120, expected 0" in refusal(tmp_path)


@pytest.mark.parametrize("padding", range(8))
def test_tensors_need_not_be_aligned(tmp_path: Path, padding: int) -> None:
    header = CONTENT[8:HEADER_END] + b" " * padding
    content = len(header).to_bytes(8, "little") + header + CONTENT[HEADER_END:]
    (tmp_path / "model.safetensors").write_bytes(content)
    assert_as_written(read_all(tmp_path))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    flips=st.lists(st.tuples(st.integers(0, HEADER_END - 1), st.integers(1, 255)), max_size=3),
    length=st.just(len(CONTENT)) | st.integers(0, len(CONTENT)),
)
def test_a_damaged_file_gives_the_tensors_as_written_or_is_refused(
    scratch: Path, flips: list[tuple[int, int]], length: int
) -> None:
    content = bytearray(CONTENT)
    for position, difference in flips:
        content[position] ^= difference
    (scratch / "model.safetensors").write_bytes(content[:length])
    try:
        found = read_all(scratch)
    except CheckpointError:
        return
    assert_as_written(found)


# --- memory ------------------------------------------------------------------------------------


def mapped_files(directory: Path) -> int:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split(maxsplit=5)[5] for line in maps if str(directory) in line})


@on_linux
def test_a_file_is_mapped_until_the_last_of_its_tensors_is_read(sharded: Path) -> None:
    with TensorFiles(sharded, is_ignored=nothing) as files:
        mapped = [mapped_files(sharded)]
        for name, tensor in TENSORS.items():
            files.read_into(torch.empty_like(tensor), name)
            mapped.append(mapped_files(sharded))
    assert mapped == [2, 1, 1, 0]


@on_linux
def test_no_file_is_mapped_after_the_block(sharded: Path) -> None:
    with TensorFiles(sharded, is_ignored=nothing):
        assert mapped_files(sharded) == 2
    assert mapped_files(sharded) == 0


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    kibibytes = status.partition("RssAnon:")[2].split(maxsplit=1)[0]
    return int(kibibytes) * 1024


def memory_of_loading(warm_up: Path, directory: Path) -> tuple[int, int]:
    """Bytes of the weights in fp32, and by how many the anonymous memory grew to load them."""
    kernels = kernels_for("cpu", "float32")
    held = load_weights(warm_up, KimiLinearConfig.from_directory(warm_up), kernels)
    config = KimiLinearConfig.from_directory(directory)
    before = anonymous_bytes()
    grown: list[int] = []
    weights = load_weights(
        directory, config, kernels, lambda *_: grown.append(anonymous_bytes() - before)
    )
    grown.append(anonymous_bytes() - before)
    del held, weights  # Not earlier: what the first left free would serve the second.
    values = sum(t.numel() for t in load_file(directory / "model.safetensors").values())
    return 4 * values, max(grown)


@on_linux
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_loading_takes_the_memory_of_the_weights_and_no_second_copy(
    tmp_path: Path, reference_directory: Path, stored: torch.dtype
) -> None:
    small, model = tmp_path / "small", tmp_path / "model"
    write_random_checkpoint(small, "small")
    model.mkdir()
    tensors = load_file(small / "model.safetensors")
    save_file(
        {name: tensor.to(stored) for name, tensor in tensors.items()}, model / "model.safetensors"
    )
    (model / "config.json").write_bytes((small / "config.json").read_bytes())
    # In a process of its own: this one has free memory that would be used first.
    with get_context("spawn").Pool(1) as process:
        weights, grown = process.apply(memory_of_loading, (reference_directory, model))
    assert 0.95 * weights < grown < 1.15 * weights
