"""What llama.cpp's programs print becomes a speed, or is refused."""

import pytest

from benchmarks.measurement import Point
from benchmarks.peer_output import decode_speed, prefill_speed
from benchmarks.programs import ProgramError

LLAMA_BENCH = (
    '{"build_commit": "unknown", "build_number": 0, "cpu_info": "AMD EPYC", "gpu_info": "", '
    '"backends": "CPU", "model_type": "kimi-linear ?B all F32", "n_batch": 2048, "n_ubatch": 512, '
    '"n_threads": 2, "type_k": "f16", "n_prompt": 512, "n_gen": 0, "n_depth": 0, '
    '"test_time": "2026-11-24T09:32:38Z", "avg_ns": 1170000000, "stddev_ns": 0, '
    '"avg_ts": 437.606838, "stddev_ts": 0.000000, "samples_ns": [ 1170000000 ],'
    '"samples_ts": [ 437.607 ]}\n'
)
BATCHED_BENCH = (
    '\n{"n_kv_max": 4352, "n_batch": 2048, "n_ubatch": 512, "flash_attn": -1, "is_pp_shared": 0, '
    '"n_gpu_layers": -1, "n_threads": 2, "n_threads_batch": 2, "pp": 512, "tg": 32, "pl": 8, '
    '"n_kv": 4352, "t_pp": 10.5, "speed_pp": 390.095238, "t_tg": 1.25, "speed_tg": 204.8, '
    '"t": 11.75, "speed": 370.382979}\n\n'
)


def test_a_prefill_is_its_prompt_by_its_mean_speed() -> None:
    speed = prefill_speed(LLAMA_BENCH)
    assert speed.point == Point(phase="prefill", size=512)
    assert speed.tokens_per_second == 437.606838


def test_a_decode_is_what_was_generated_for_all_requests_without_their_prompts() -> None:
    speed = decode_speed(BATCHED_BENCH)
    assert speed.point == Point(phase="decode", size=8)
    assert speed.tokens_per_second == 204.8


def test_a_run_that_generated_tokens_is_no_prefill() -> None:
    with pytest.raises(ProgramError, match="n_gen"):
        prefill_speed(LLAMA_BENCH.replace('"n_gen": 0', '"n_gen": 128'))


@pytest.mark.parametrize("output", ["", "load_backend: loaded CPU\n", LLAMA_BENCH * 2])
def test_anything_but_one_result_is_refused(output: str) -> None:
    with pytest.raises(ProgramError, match="expected one"):
        prefill_speed(output)


@pytest.mark.parametrize(
    ("printed", "instead", "named"),
    [
        ('"speed_tg": 204.8', '"speed_tg": 0.0', "speed_tg"),
        ('"speed_tg": 204.8', '"speed_tg": null', "speed_tg"),
        ('"pl": 8, ', "", "pl"),
        ('"t": 11.75', '"t": nan', "JSON"),
    ],
)
def test_a_result_that_is_none_is_refused_by_name(printed: str, instead: str, named: str) -> None:
    with pytest.raises(ProgramError, match=named):
        decode_speed(BATCHED_BENCH.replace(printed, instead))
