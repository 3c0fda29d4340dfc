"""The engine's speed on this processor, and llama.cpp's on the same weights beside it.

    python -m benchmarks.engine --dtype float32 --dtype int8 --peer

What takes long to make stays in the work directory: a random checkpoint of 205 million parameters,
its conversions, and the build of llama.cpp.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from benchmarks.checkpoint import random_checkpoint
from benchmarks.kept_files import WORKDIR
from benchmarks.measurement import EngineRun, Speed, Workload
from benchmarks.peer import PEER_DTYPES, LlamaCpp, PeerDType
from benchmarks.processor import Processor
from benchmarks.programs import ProgramError, output
from benchmarks.report import Comparison, Report
from shared.kernels.dtypes import WeightDTypeChoice

MEASURED: Final = Workload(prefill=(512, 2048, 8192, 32768), decode=(1, 8, 32))
PROFILED: Final = Workload(prefill=(2048,), decode=(1, 32), steps=8)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What is measured, and how often.

    Attributes:
        model: a model directory.
        workload: the points.
        threads: of both engines.
        rounds: measurements of each point.
        workdir: keeps the weights that are converted for the peer.
        peer: None for ours alone.
    """

    model: Path
    workload: Workload
    threads: int
    rounds: int
    workdir: Path
    peer: LlamaCpp | None

    def report(self, dtypes: tuple[WeightDTypeChoice, ...]) -> Report:
        """Measure every dtype."""
        return Report(
            processor=Processor.of_this_machine(),
            model=self.model.name,
            threads=self.threads,
            rounds=self.rounds,
            workload=self.workload,
            comparisons=tuple(map(self._compare, dtypes)),
        )

    def profile(self, dtype: WeightDTypeChoice) -> str:
        """Tables of the operations that the time goes to.

        Raises:
            ProgramError: the engine failed.
        """
        return self._engine_process("profile", dtype)

    def _compare(self, dtype: WeightDTypeChoice) -> Comparison:
        """Both engines in turn, so that what disturbs the machine meets both."""
        runs: list[EngineRun] = []
        peer: list[Speed] = []
        failures: list[str] = []
        for number in range(1, self.rounds + 1):
            print(f"{dtype}: round {number} of {self.rounds}", file=sys.stderr)
            try:
                runs.append(EngineRun.model_validate_json(self._engine_process("measure", dtype)))
            except ProgramError as error:
                failures.append(f"prfaas {dtype}: {error}")
                break
            if self.peer is not None:
                speeds, failed = self._measure_peer(self.peer, PEER_DTYPES[runs[0].dtype])
                peer += speeds
                failures += failed
        return Comparison(
            dtype=runs[0].dtype if runs else dtype,
            peer_dtype=PEER_DTYPES[runs[0].dtype] if runs and self.peer else None,
            engine=tuple(speed for run in runs for speed in run.speeds),
            peer=tuple(peer),
            memory=runs[-1].memory if runs else (),
            failures=tuple(dict.fromkeys(failures)),
        )

    def _engine_process(self, task: Literal["measure", "profile"], dtype: WeightDTypeChoice) -> str:
        arguments = [task, self.model, dtype, str(self.threads), self.workload.model_dump_json()]
        return output([sys.executable, "-m", "benchmarks.engine_process", *arguments])

    def _measure_peer(self, peer: LlamaCpp, dtype: PeerDType) -> tuple[list[Speed], list[str]]:
        """Every point once; gives the speeds, and what failed."""
        speeds: list[Speed] = []
        failures: list[str] = []
        try:
            gguf = peer.convert(self.model, dtype, self.workdir)
        except ProgramError as error:
            return speeds, [f"llama.cpp {dtype}: {error}"]
        for point in self.workload.points:
            try:
                speeds.append(peer.measure(gguf, point, self.workload, self.threads))
            except ProgramError as error:
                failures.append(f"llama.cpp {dtype}, {point}: {error}")
        return speeds, failures


def main() -> int:
    """Measure and print; gives the exit status."""
    given = _parser().parse_args()
    try:
        _run(given)
    except ProgramError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _run(given: argparse.Namespace) -> None:
    default = PROFILED if given.profile else MEASURED
    benchmark = Benchmark(
        model=(given.model or random_checkpoint(given.workdir)).resolve(),
        workload=Workload(
            prefill=given.prefill or default.prefill,
            decode=given.decode or default.decode,
            steps=default.steps,
        ),
        threads=given.threads,
        rounds=given.rounds,
        workdir=given.workdir,
        peer=_peer(given),
    )
    dtypes = tuple(dict.fromkeys(given.dtype or ["auto"]))
    if given.profile:
        for dtype in dtypes:
            print(benchmark.profile(dtype))
        return
    report = benchmark.report(dtypes)
    print("\n".join(report.lines()))
    if given.json:
        given.json.write_text(report.model_dump_json(indent=2) + "\n")


def _peer(given: argparse.Namespace) -> LlamaCpp | None:
    if given.profile:
        return None
    if given.peer_build:
        return LlamaCpp.found(given.peer_build, given.workdir)
    return LlamaCpp.built(given.workdir, given.threads) if given.peer else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=get_args(WeightDTypeChoice),
        help="may be repeated (default: auto, what the engine takes for the fastest here)",
    )
    parser.add_argument("--threads", type=_positive, default=2, help="(default: %(default)s)")
    parser.add_argument(
        "--rounds",
        type=_positive,
        default=2,
        help="measurements of each figure (default: %(default)s)",
    )
    parser.add_argument(
        "--prefill",
        type=_positive,
        nargs="+",
        metavar="TOKENS",
        help=f"lengths of prompts (default: {_listed(MEASURED.prefill)}; "
        f"of a profile {_listed(PROFILED.prefill)})",
    )
    parser.add_argument(
        "--decode",
        type=_positive,
        nargs="+",
        metavar="REQUESTS",
        help=f"requests decoded together, each after {MEASURED.context} tokens of prompt "
        f"(default: {_listed(MEASURED.decode)}; of a profile {_listed(PROFILED.decode)})",
    )
    parser.add_argument("--peer", action="store_true", help="measure llama.cpp too")
    parser.add_argument(
        "--peer-build",
        type=Path,
        metavar="DIR",
        help="measure this build of llama.cpp, instead of one that is made in the work directory",
    )
    parser.add_argument("--profile", action="store_true", help="say where the engine's time goes")
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="measure this model, not a random one"
    )
    parser.add_argument("--workdir", type=Path, default=WORKDIR, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement to it")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"has to be at least 1, found {number}")
    return number


def _listed(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))


if __name__ == "__main__":
    sys.exit(main())
