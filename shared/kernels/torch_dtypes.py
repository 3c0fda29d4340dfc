"""torch's names of the dtypes that states have."""

from typing import Final

import torch

from shared.kernels.dtypes import StateDType

TORCH_DTYPES: Final[dict[StateDType, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}
