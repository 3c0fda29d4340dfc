"""The tables show the best of what was measured, and what was not measured as such."""

from benchmarks.measurement import MemoryUse, Point, Speed, Workload
from benchmarks.processor import Processor
from benchmarks.report import Comparison, Report, best, memory_table, speed_table

PREFILL = Point(phase="prefill", size=512)
DECODE = Point(phase="decode", size=8)


def speed(point: Point, tokens_per_second: float) -> Speed:
    return Speed(point=point, tokens_per_second=tokens_per_second)


def comparison(
    *, engine: tuple[Speed, ...], peer: tuple[Speed, ...] = (), peer_dtype: str | None = "f32"
) -> Comparison:
    return Comparison(
        dtype="float32", peer_dtype=peer_dtype, engine=engine, peer=peer, memory=(), failures=()
    )


def cells(line: str) -> list[str]:
    return line.split()


def test_the_best_of_several_measurements_counts() -> None:
    speeds = (speed(PREFILL, 90.0), speed(DECODE, 7.0), speed(PREFILL, 110.0), speed(PREFILL, 80.0))
    assert best(speeds) == {PREFILL: 110.0, DECODE: 7.0}


class TestSpeeds:
    def test_the_ratio_is_ours_to_the_peers(self) -> None:
        table = speed_table(
            comparison(engine=(speed(PREFILL, 300.0),), peer=(speed(PREFILL, 200.0),)), [PREFILL]
        )
        header, row = table
        assert cells(header) == ["float32", "prfaas", "llama.cpp", "f32", "ratio"]
        assert cells(row) == ["prefill", "512", "300.0", "200.0", "1.50"]

    def test_what_one_side_did_not_measure_has_no_ratio(self) -> None:
        _, prefill, decode = speed_table(
            comparison(engine=(speed(PREFILL, 300.0),), peer=(speed(DECODE, 50.0),)),
            [PREFILL, DECODE],
        )
        assert cells(prefill) == ["prefill", "512", "300.0", "-", "-"]
        assert cells(decode) == ["decode", "8", "-", "50.0", "-"]

    def test_without_a_peer_there_are_no_columns_for_it(self) -> None:
        header, row = speed_table(
            comparison(engine=(speed(DECODE, 61.26),), peer_dtype=None), [DECODE]
        )
        assert cells(header) == ["float32", "prfaas"]
        assert cells(row) == ["decode", "8", "61.3"]


class TestMemory:
    def test_a_token_costs_the_growth_of_the_peak_by_the_growth_of_the_prompt(self) -> None:
        uses = [
            MemoryUse(prompt_tokens=0, peak_bytes=100 * 2**20, anonymous_bytes=50 * 2**20),
            MemoryUse(prompt_tokens=512, peak_bytes=200 * 2**20, anonymous_bytes=60 * 2**20),
            MemoryUse(prompt_tokens=1536, peak_bytes=203 * 2**20, anonymous_bytes=61 * 2**20),
        ]
        _, loaded, short, long = memory_table(uses)
        assert cells(loaded) == ["model", "loaded", "100", "MiB", "50", "MiB"]
        assert cells(short) == ["prefill", "512", "200", "MiB", "60", "MiB"]
        assert cells(long) == ["prefill", "1536", "203", "MiB", "61", "MiB", "3072", "B"]

    def test_a_system_that_does_not_tell_gets_no_table(self) -> None:
        assert list(memory_table(())) == []


def test_a_report_names_the_machine_and_every_failure_and_survives_as_json() -> None:
    failed = comparison(engine=()).model_copy(update={"failures": ("llama.cpp q8_0: SIGABRT",)})
    report = Report(
        processor=Processor(name="Some CPU", instruction_sets=("AVX2",)),
        model="medium-0",
        threads=2,
        rounds=3,
        workload=Workload(prefill=(512,), decode=(8,)),
        comparisons=(failed,),
    )
    text = "\n".join(report.lines())
    for told in ("Some CPU (AVX2)", "medium-0", "2 threads", "512 tokens", "SIGABRT"):
        assert told in text
    assert Report.model_validate_json(report.model_dump_json()) == report
