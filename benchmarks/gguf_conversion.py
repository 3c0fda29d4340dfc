"""Runs llama.cpp's converter without the vocabulary: random tokens need no text.

A script for a process whose import path has llama.cpp's source; takes the converter's arguments.
"""

import convert_hf_to_gguf
from conversion.kimi_linear import KimiLinearModel


def _write_no_vocabulary(model: KimiLinearModel) -> None:
    model.gguf_writer.add_tokenizer_model("none")


if __name__ == "__main__":
    KimiLinearModel.set_vocab = _write_no_vocabulary
    convert_hf_to_gguf.main()
