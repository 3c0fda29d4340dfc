"""The processor is named with what decides the speed of its products."""

from benchmarks.processor import Processor, parse_cpu_info

X86 = """processor\t: 0
model name\t: Intel(R) Xeon(R) Processor
flags\t\t: fpu sse2 avx avx2 avx512f avx512_vnni amx_bf16 avx512_bf16 amx_tile amx_int8

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd sve i8mm bf16\n"


def test_the_first_x86_processor_is_read_with_its_flags() -> None:
    processor = parse_cpu_info(X86)
    assert processor.name == "Intel(R) Xeon(R) Processor"
    assert processor.instruction_sets == (
        "AVX2",
        "AVX-512",
        "AVX-512 VNNI",
        "AVX-512 BF16",
        "AMX BF16",
        "AMX INT8",
    )


def test_an_arm_processor_without_a_name_keeps_its_features() -> None:
    assert parse_cpu_info(ARM).instruction_sets == ("NEON", "SVE", "BF16", "I8MM")


def test_a_machine_that_tells_nothing_still_has_a_name() -> None:
    assert parse_cpu_info("").name
    assert "no instruction sets known" in str(Processor(name="x", instruction_sets=()))
