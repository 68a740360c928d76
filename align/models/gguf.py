"""Convert GGUF to a folder of safetensors and tokenizer: ``python -m align.models.gguf``.

Every recipe takes a GGUF file directly, but dequantising takes seconds each time, and other tools
read a folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers.utils import logging

from align.base.console import complain
from align.base.folders import require_no_folder, whole_folder
from align.models.load import load_causal_lm, load_tokenizer
from align.types import AlignError


def convert(gguf_file: str, folder: str) -> None:
    """Dequantise to float32 and save into a new folder."""
    require_no_folder(Path(folder))
    tokenizer = load_tokenizer(gguf_file)
    model = load_causal_lm(gguf_file, tokenizer)
    with whole_folder(Path(folder)) as partial:
        model.save_pretrained(str(partial))
        tokenizer.save_pretrained(str(partial))


def main() -> int:
    parser = argparse.ArgumentParser(description=convert.__doc__)
    parser.add_argument("gguf_file")
    parser.add_argument("folder")
    args = parser.parse_args()
    logging.disable_progress_bar()  # it takes seconds; the Makefile silences tqdm's own
    try:
        convert(args.gguf_file, args.folder)
    except AlignError as error:
        complain(str(error))
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
