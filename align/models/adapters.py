"""Find and check adapters as peft, TRL, LLaMA-Factory, Axolotl and Unsloth save them.

An adapter is a folder (or hub id) with ``adapter_config.json`` and ``adapter_model.safetensors``;
it names its base model, which may have moved. Refused: pickled weights, tuners that cannot be
merged, and tensors that fit nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.base.files import read_json
from align.models.guard import loading
from align.types import AlignError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
VALUE_HEADS = ("value_head.safetensors", "value_head.bin")
"""Files beside an adapter that hold the `v_head` of LLaMA-Factory's and TRL's scalar models."""
FETCHED = ("*.json", WEIGHTS, "*.jinja", "*.model", "*.txt")
"""Patterns of the files fetched for an adapter on the hub: no pickles."""
MERGEABLE = {
    "LORA", "LOHA", "LOKR", "ADALORA", "IA3", "OFT", "BOFT", "VERA", "FOURIERFT", "HRA",
    "LN_TUNING",
}  # fmt: skip
"""peft tuners whose update can be merged into the weights."""
CHANGES_BASE = ("pissa_niter", "loftq", "corda", "lora_ga")
"""Initialisations of LoRA that change the base's weights, at random or from data."""
QUANTISED = re.compile(r"-(unsloth-)?(bnb-)?[48]bit$|-(gptq|awq)(-.*)?$", re.IGNORECASE)
"""Name endings of a model's quantised copies."""


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, its settings, and the header of its weights.

    Attributes:
        name: As in the recipe.
        base: Argument for `locate`: a folder, a .gguf or a hub id.
        named: The base as the adapter's config names it.
        revision: Revision of a base on the hub.
        shapes: Shape of each tensor.
    """

    name: str
    folder: Path
    base: str
    named: str
    revision: str | None
    settings: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @property
    def labels(self) -> int | None:
        """Outputs of the head saved with the adapter; None without a head."""
        head = re.compile(r"\.(score|classifier)\.(modules_to_save\.)?(default\.)?weight$")
        return next((shape[0] for key, shape in self.shapes.items() if head.search(key)), None)

    @property
    def task(self) -> str:
        """Task type of peft, such as ``CAUSAL_LM`` and ``SEQ_CLS``."""
        task = self.settings.get("task_type")
        if task is None:
            return "CAUSAL_LM" if self.labels is None else "SEQ_CLS"
        return str(task)

    @property
    def has_value_head(self) -> bool:
        return any((self.folder / name).is_file() for name in VALUE_HEADS)


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter and no whole model.

    Raises:
        AlignError: It holds both, so which one is meant is unknown.
    """
    if not (folder / CONFIG).is_file():
        return False
    whole = [p.name for p in folder.glob("*.safetensors") if p.name.startswith("model")]
    if (folder / "config.json").is_file() and whole:
        raise AlignError(
            f"model: {folder}: holds a whole model ({sorted(whole)[0]}) and an adapter ({CONFIG}); "
            f"move one of them elsewhere, or remove {CONFIG} if it is merged already"
        )
    return True


def find_adapter(
    model: str, *, base_model: str | None = None, fetch: bool = False
) -> Adapter | None:
    """Read the adapter that ``model`` names; None if it names something else.

    Args:
        base_model: The recipe's key; it replaces the base that the adapter names.
        fetch: Ask the hub for an id that the cache does not hold.
    """
    folder = _folder(model, fetch=fetch)
    if folder is None:
        return None
    settings = read_json(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise AlignError(_no_weights(model, folder))
    shapes = _shapes(model, folder / WEIGHTS)
    _require_mergeable(model, settings)
    named, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if base_model is None and (not named or not isinstance(named, str)):
        raise AlignError(
            f"model: {model}: {folder / CONFIG} does not name its base model; name it with "
            "base_model=FOLDER (or a hub id)"
        )
    base = base_model or _resolve(str(named), folder)
    if base_model is not None or not isinstance(revision, str):
        revision = None
    found = Adapter(model, folder, base, str(named), revision, settings, shapes)
    _require_base(found)
    return found


def missing_base(adapter: Adapter, why: str) -> AlignError:
    """Name the missing base, the adapter that needs it, and the key that replaces it."""
    return AlignError(
        f"model: {adapter.name}: its base model {adapter.base} {why}; name the base with "
        f"base_model=FOLDER (or a hub id{_full_base(adapter)})"
    )


@contextmanager
def of_adapter(adapter: Adapter) -> Iterator[None]:
    """Add to an error about a base which adapter needs it, and the key that replaces it."""
    try:
        yield
    except AlignError as error:
        if "base_model=FOLDER" in str(error):
            raise
        raise AlignError(
            f"{error}; {adapter.base} is the base of the adapter {adapter.name}: base_model=FOLDER "
            f"(or a hub id{_full_base(adapter)}) names another"
        ) from error


def _full_base(adapter: Adapter) -> str:
    full = QUANTISED.sub("", adapter.base)
    return "" if full == adapter.base else f" such as {full}, of which this is a quantised copy"


def _folder(model: str, *, fetch: bool) -> Path | None:
    """Return the folder of an adapter: local, in the hub's cache, or fetched into it."""
    from align.base.hub import require_on_the_hub
    from align.models.locate import in_the_cache, looks_like_hub_id

    path = Path(model)
    if path.exists() or not looks_like_hub_id(model):
        return path if path.is_dir() and is_adapter(path) else None
    cached = in_the_cache(model, CONFIG)
    if not cached and (in_the_cache(model) or not fetch):
        return None
    from huggingface_hub import snapshot_download
    from transformers.utils import find_adapter_config_file

    if not cached:
        require_on_the_hub(model, "model", "config.json")
    with loading(model):
        found = find_adapter_config_file(model, local_files_only=not fetch)
        if found is None:
            return None
        folder = Path(found).parent
        if fetch and not (folder / WEIGHTS).is_file():
            folder = Path(snapshot_download(model, allow_patterns=list(FETCHED)))
    return folder if is_adapter(folder) else None


def _no_weights(model: str, folder: Path) -> str:
    pickled = sorted(
        p.name for s in ("bin", "pt", "pth") for p in folder.glob(f"adapter_model*.{s}")
    )
    if pickled:
        return (
            f"model: {model}: only pickled weights ({pickled[0]}), which are never loaded; save "
            f"the adapter again with a recent peft, as {WEIGHTS}"
        )
    return f"model: {model}: {folder} has {CONFIG}, but no {WEIGHTS}; save the adapter whole"


def _shapes(model: str, path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with loading(model, folder=path.parent, file=WEIGHTS), safe_open(path, framework="np") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def _require_mergeable(model: str, settings: dict[str, Any]) -> None:
    kind = str(settings.get("peft_type", "LORA"))
    if kind not in MERGEABLE:
        raise AlignError(
            f"model: {model}: a {kind[:40]} adapter, which cannot be merged into weights; train "
            f"LoRA, or another of {', '.join(sorted(MERGEABLE))}"
        )
    start = str(settings.get("init_lora_weights"))
    if start.startswith(CHANGES_BASE):
        raise AlignError(
            f"model: {model}: init_lora_weights={start[:40]} changed its base when it was made, "
            "which cannot be done again; save it as plain LoRA (peft's save_pretrained with "
            "path_initial_model_for_weight_conversion), or merged"
        )
    if settings.get("layer_replication"):
        raise AlignError(
            f"model: {model}: its layer_replication makes a model of more layers than its base; "
            "save it merged"
        )
    if settings.get("megatron_config"):
        raise AlignError(
            f"model: {model}: {CONFIG} asks for Megatron modules, which are not loaded"
        )


def _resolve(base: str, folder: Path) -> str:
    """Resolve a relative base from here, as peft does, else from the adapter's folder or above."""
    path = Path(base)
    if path.is_absolute() or path.exists():
        return base
    if "/" in base:  # a bare name is a hub id before it is a folder somewhere above
        for above in (folder.absolute(), *folder.absolute().parents):
            if (above / base / "config.json").is_file() or (above / base / CONFIG).is_file():
                return str(above / base)
    return base


def _require_base(adapter: Adapter) -> None:
    """Refuse a base that is neither here nor a hub id, and an adapter that is its own base."""
    from align.models.locate import looks_like_hub_id

    path, seen = Path(adapter.base), {adapter.folder.resolve()}
    while path.is_dir() and is_adapter(path):
        if path.resolve() in seen:
            raise missing_base(adapter, "is this adapter itself")
        seen.add(path.resolve())
        path = Path(_resolve(str(read_json(path / CONFIG).get("base_model_name_or_path")), path))
    if not Path(adapter.base).exists() and not looks_like_hub_id(adapter.base):
        raise missing_base(adapter, "is not on this machine")
