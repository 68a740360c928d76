"""Turn whatever a library raises over a model's files into one line.

transformers, peft, safetensors, tokenizers and json raise anything over a damaged file, from
`KeyError` to a Rust panic. The line names the file that cannot be parsed, if any, and is bounded in
length. An out-of-memory error of a GPU passes through.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb

from align.base.files import load_json, load_text
from align.types import AlignError

REASON_LENGTH = 240
"""Characters of a library's message that are quoted."""
LARGEST_JSON = 64 * 2**20
"""Largest JSON file, in bytes, that is parsed as a check; tokenizers have up to 20 MiB."""
OBJECTS = {
    "config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
    "generation_config.json", "model.safetensors.index.json",
}  # fmt: skip
"""Files of a model that must hold a JSON object."""


@contextmanager
def loading(model: str, *, folder: str | Path | None = None, file: str = "") -> Iterator[None]:
    """Turn every error inside into one line about ``model``.

    Args:
        model: As in the recipe.
        folder: Folder of its files, if ``model`` is not the folder.
        file: File being read, named if no file is found to be damaged.
    """
    try:
        yield
    except AlignError:
        raise
    except (Exception, BaseException) as error:
        kinds = {cls.__name__ for cls in type(error).__mro__}
        if not isinstance(error, Exception) and "PanicException" not in kinds:
            raise  # Ctrl-C and the like; a Rust panic of tokenizers is not an Exception either
        if "OutOfMemoryError" in kinds:
            raise
        _refuse_architecture(model, error)
        raise AlignError(_line(model, Path(folder or model), file, error)) from error


def reason_of(error: BaseException) -> str:
    """Quote an error's message as one printable line of bounded length."""
    said = " ".join(str(error).split())
    said = "".join(c if c.isprintable() else "?" for c in said)
    if not said or isinstance(error, KeyError):
        said = f"{type(error).__name__} {said}".strip()
    return said if len(said) <= REASON_LENGTH else f"{said[:REASON_LENGTH]}..."


def _refuse_architecture(model: str, error: BaseException) -> None:
    """Raise a clear error if transformers does not support the architecture.

    It looked up align's attention in a table of its own classes, has no such model, or would run
    code that comes with the model.
    """
    import transformers
    from transformers import PreTrainedModel

    from align.models.attention.packed import BACKENDS, not_on_the_interface

    said = str(error)
    if "does not recognize this architecture" in said:
        kind = said.split("`")[1] if said.count("`") > 1 else "named there"
        raise AlignError(
            f"model: {model}: cannot be loaded: its config.json: transformers "
            f"{transformers.__version__} does not know the model type `{kind[:60]}`; upgrade it "
            "(`pip install --upgrade transformers`), or take another model"
        ) from error
    if "contains custom code" in said:
        raise AlignError(
            f"model: {model}: cannot be loaded: it brings Python code of its own, which runs only "
            "with trust_remote_code=true; read that code first, or take another model"
        ) from error
    if str(error).startswith("Unrecognized configuration class"):
        scalar = "SequenceClassification" in str(error)
        kind = "one-label model (for a reward or a critic)" if scalar else "language model"
        made_by = str(error).split("'")[1].rpartition(".")[2]
        raise AlignError(
            f"model: {model}: transformers has no {kind} of this architecture ({made_by}); take "
            "another model"
        ) from error
    if str(error) != repr(BACKENDS["segments"]):
        return
    within = (frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__))
    kinds = [type(one).__name__ for one in within if isinstance(one, PreTrainedModel)]
    kind = kinds[0] if kinds else "its architecture"
    raise AlignError(f"model: {model}: {not_on_the_interface(kind)}") from error


def _line(model: str, folder: Path, file: str, error: BaseException) -> str:
    begin = f"model: {model}: cannot be loaded"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return (
            f"{begin}: it asks for more memory than there is ({reason_of(error)}); choose a "
            "smaller model, or correct the sizes in its config.json"
        )
    if "ignore_mismatched_sizes" in str(error):
        return f"{begin}: its weights have other sizes than its config.json says; correct that"
    damaged = damaged_file(folder) if folder.is_dir() else ""
    if damaged:
        return f"{begin}: {damaged}; fetch or save it again"
    remedy = "; give a folder that exists, or a hub id `org/name` that this machine can reach"
    where = f"{folder / file}: " if file and folder.is_dir() else ""
    return f"{begin}: {where}{reason_of(error)}{'' if folder.exists() else remedy}"


def damaged_file(folder: Path) -> str:
    """Name the first file of a model's folder that cannot be parsed, and why; "" if all can."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.json")):
        if path.stat().st_size > LARGEST_JSON:
            continue
        try:
            load_json(path) if path.name in OBJECTS else json.loads(load_text(path))
        except (OSError, ValueError, RecursionError) as error:
            return f"{path}: {reason_of(error)}"
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np"):
                pass
        except Exception as error:  # of safetensors, which raises several kinds
            return f"{path} is cut short or damaged: {reason_of(error)}"
    return ""
