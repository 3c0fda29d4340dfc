"""A step that is run again and again on the same memory, without Python between its kernels.

While a kernel reads weights, these push the interpreter and torch out of the processor's caches:
measured, what Python does between two kernels takes 50 us then, and 10 us otherwise. Of a decode
step at batch 1 that was a third. GPUs have graphs for the same reason.
"""

from torch import Tensor

from shared.kernels.cpu.compiled import run
from shared.kernels.cpu.native_calls import CallSequence
from shared.kernels.cpu.recording import recorded
from shared.kernels.interface import Step


class CapturedStep:
    """Records the kernels that a step calls when it is first run, and from then on calls just them.

    So everything that the step computes from what changes has to be computed by kernels; and its
    result, which is always the same tensor, is overwritten by the next run.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._captured: tuple[CallSequence, Tensor] | None = None

    def __call__(self) -> Tensor:
        """Run the step."""
        if self._captured is None:
            with recorded() as recording:
                result = self._step()
            self._captured = CallSequence(recording.calls), result
        else:
            calls, result = self._captured
            run(calls)
        return result
