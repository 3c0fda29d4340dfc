"""How wide weights and states are held; settings name it too, so nothing here needs torch."""

from typing import Literal

WeightDType = Literal["float32", "bfloat16", "int8"]
StateDType = Literal["float32", "bfloat16"]
WeightDTypeChoice = Literal["auto", WeightDType]
