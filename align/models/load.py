"""Load tokenizers and float32 transformers models from folders, hub ids and GGUF files.

Weights come from safetensors, or from GGUF, which is dequantised; a checkpoint of pickles is
refused. Remote code runs only if the recipe allows it.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from align.models.adapters import Adapter, find_adapter, of_adapter
from align.models.attention.packed import BACKENDS
from align.models.complete import require_complete
from align.models.configs import load_config, read_config, settle_generation
from align.models.dropout import switch_off_dropout
from align.models.guard import loading
from align.models.kinds import Use, require_kind
from align.models.locate import require_found, require_safe_on_hub
from align.models.merging import merge
from align.models.vocabulary import resize
from align.types import AlignError


def load_tokenizer(
    model: str, *, trust_remote_code: bool = False, base_model: str | None = None
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, with a pad token that is not an end token.

    An adapter without tokenizer files uses its base's. Rows are hardly ever padded here, but
    ``pad_token_id`` is written into the saved config, and plain transformers reads a classifier's
    score at the last token that is *not* padding: with pad = EOS, at the token before EOS.
    """
    adapter = find_adapter(model, base_model=base_model, fetch=True)
    if adapter is None:
        where, options = require_found(model)
    elif (adapter.folder / "tokenizer_config.json").is_file():
        where, options = str(adapter.folder), {}
    else:
        with of_adapter(adapter):
            where, options = _base_of(adapter)
            if find_adapter(where) is not None:
                return load_tokenizer(where, trust_remote_code=trust_remote_code)
    options = {k: v for k, v in options.items() if k != "use_safetensors"}
    if adapter is None and Path(where).is_dir():  # a config error should not blame the tokenizer
        load_config(where, options, trust_remote_code=trust_remote_code)
    within = nullcontext() if adapter is None else of_adapter(adapter)
    with within, loading(where, file="tokenizer.json"):
        tokenizer = AutoTokenizer.from_pretrained(
            where, trust_remote_code=trust_remote_code, **options
        )
    files = [*getattr(tokenizer, "vocab_files_names", {}).values(), "tokenizer.json"]
    there = "gguf_file" in options or any((Path(where) / str(f)).is_file() for f in files)
    if Path(where).is_dir() and not there:  # transformers would invent a nearly empty one
        raise AlignError(f"model: {model}: {where} holds no tokenizer, such as tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise AlignError(f"{model}: the tokenizer has no EOS token; set eos_token in its config")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        # assigning `pad_token` would not extend the vocabulary, and its id would stay None
        tokenizer.add_special_tokens({"pad_token": _spare_token(tokenizer)})
    return tokenizer


def _spare_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Choose an existing special token that is not an end token, else a new ``<|pad|>``."""
    template = tokenizer.chat_template or ""
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    vocabulary = tokenizer.get_vocab()
    specials = [t for t in tokenizer.all_special_tokens if t not in taken and t not in template]
    for name in ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", *specials):
        if name in vocabulary:
            return name
    return "<|pad|>"


def load_causal_lm(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    from_scratch: bool = False,
    base_model: str | None = None,
) -> PreTrainedModel:
    """Load a decoder with its LM head; an adapter is merged into its base."""
    adapter = find_adapter(model, base_model=base_model, fetch=True)
    if adapter is not None:
        if from_scratch:
            raise AlignError(f"from_scratch: {model} is an adapter; name its base model")
        require_kind("model", model, None, "policy", adapter=adapter)
        with of_adapter(adapter):
            where, options = _base_of(adapter)
            if find_adapter(where) is not None:
                whole = load_causal_lm(where, tokenizer, trust_remote_code=trust_remote_code)
            else:
                config = read_config(where, options, trust_remote_code=trust_remote_code)
                require_kind("model", model, config, "policy", adapter=adapter)
                whole = _causal_lm(where, options, config, torch.float32, trust_remote_code)
        merged = merge(whole.float(), adapter)  # float32, as `lora.merged` says
        return _settle(merged, tokenizer).to(dtype)
    where, options = require_found(model)
    config = read_config(where, options, trust_remote_code=trust_remote_code)
    if from_scratch:
        with loading(model, folder=where, file="config.json"):
            loaded = AutoModelForCausalLM.from_config(
                config,
                attn_implementation=BACKENDS["segments"],
                dtype=torch.float32,
                trust_remote_code=trust_remote_code,
            )
    else:
        require_kind("model", model, config, "policy")
        loaded = _causal_lm(where, options, config, dtype, trust_remote_code)
    return _settle(loaded, tokenizer)


def load_classifier(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    base_model: str | None = None,
) -> tuple[PreTrainedModel, bool]:
    """Load a decoder with a one-label head; return it and whether the head is new.

    The adapter of a one-label model brings its head. The adapter of a language model is merged, and
    the result gets a new head.
    """
    adapter = find_adapter(model, base_model=base_model, fetch=True)
    options: dict[str, Any]
    if adapter is None:
        where, options = require_found(model)
        config = read_config(where, options, trust_remote_code=trust_remote_code)
        require_kind("model", model, config, "start")
        loaded, fresh = _classifier(where, options, config, dtype, trust_remote_code)
    elif adapter.task != "SEQ_CLS":
        require_kind("model", model, None, "start", adapter=adapter)
        causal = load_causal_lm(
            model,
            tokenizer,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            base_model=base_model,
        )
        found = classifier_on(causal)
        if found is None:
            raise AlignError(
                f"model: {model}: transformers has no one-label model of {type(causal).__name__}"
            )
        return found, True
    else:
        require_kind("model", model, None, "start", adapter=adapter)
        with of_adapter(adapter):
            where, options = _base_of(adapter)
            if find_adapter(where) is not None:
                whole, _ = load_classifier(where, tokenizer, trust_remote_code=trust_remote_code)
            else:
                config = read_config(where, options, trust_remote_code=trust_remote_code)
                whole, _ = _classifier(where, options, config, torch.float32, trust_remote_code)
        loaded, fresh = merge(whole.float(), adapter).to(dtype), False
    loaded.score.float()  # scores are float32 in any precision of the backbone
    return _settle(loaded, tokenizer), fresh


def require_whole(
    model: str, use: Use, *, trust_remote_code: bool = False, base_model: str | None = None
) -> None:
    """Refuse a local model whose weights a run would refuse: too few, or more than its config has.

    No weight is read: transformers loads the model on torch's meta device, and its report on the
    files' names is the one that a run gets.
    """
    adapter = find_adapter(model, base_model=base_model)
    where = model if adapter is None else adapter.base
    if not Path(where).is_dir():
        return
    if adapter is not None and find_adapter(where) is not None:
        require_whole(where, use, trust_remote_code=trust_remote_code)
        return
    one_label = use != "policy" if adapter is None else adapter.task == "SEQ_CLS"
    within = nullcontext() if adapter is None else of_adapter(adapter)
    with within:
        where, options = require_found(where)
        config = read_config(where, options, trust_remote_code=trust_remote_code)
        load = _classifier if one_label else _causal_lm
        load(where, options | {"device_map": "meta"}, config, torch.float32, trust_remote_code)


def _base_of(adapter: Adapter) -> tuple[str, dict[str, Any]]:
    """Return ``from_pretrained``'s arguments for an adapter's base, which may be an adapter too."""
    if find_adapter(adapter.base, fetch=True) is not None:
        return adapter.base, {}
    where, options = require_found(adapter.base)
    if adapter.revision is not None and not Path(where).exists():
        options = options | {"revision": adapter.revision}
    return where, options


def _loaded(
    auto: Any,
    where: str,
    options: dict[str, Any],
    config: Any,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load weights after the safety checks; return them with transformers' loading report."""
    require_safe_on_hub(where, options)
    with loading(where, file="config.json"):
        loaded, info = auto.from_pretrained(
            where,
            config=config,
            attn_implementation=BACKENDS["segments"],
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    return loaded, info


def _causal_lm(
    where: str,
    options: dict[str, Any],
    config: Any,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """Load all of a language model's weights; refuse an incomplete checkpoint."""
    auto = AutoModelForCausalLM
    loaded, info = _loaded(auto, where, options, config, dtype, trust_remote_code)
    require_complete(where, info, options)
    return loaded


def _classifier(
    where: str,
    options: dict[str, Any],
    config: Any,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, bool]:
    """Load a whole model's weights as a one-label model, and whether its head is new."""
    config.num_labels = 1
    auto = AutoModelForSequenceClassification
    loaded, info = _loaded(auto, where, options, config, dtype, trust_remote_code)
    if not hasattr(loaded, "score"):
        raise AlignError(f"{where}: {type(loaded).__name__} has no `score` head; use a decoder")
    fresh = any(key.startswith("score") for key in info["missing_keys"])
    require_complete(where, info, options, but="score")
    if fresh:
        _draw_head(loaded.score)
    return loaded, fresh


def classifier_on(model: PreTrainedModel) -> PreTrainedModel | None:
    """Build a one-label model that shares the backbone of a loaded ``model``; its head is new.

    Returns:
        None if transformers has no one-label model with this backbone and a ``score`` head.
    """
    config = model.config
    config.num_labels = 1
    backbone = getattr(model, model.base_model_prefix)
    with torch.device("meta"):
        try:
            made = AutoModelForSequenceClassification.from_config(config)
        except ValueError:
            return None
    same = type(getattr(made, made.base_model_prefix)) is type(backbone)
    if not hasattr(made, "score") or not same:
        return None
    setattr(made, made.base_model_prefix, backbone)
    made.config = config
    made.score.to_empty(device=model.device).float()
    _draw_head(made.score)
    return made


def _draw_head(score: torch.nn.Linear) -> None:
    """Stiennon et al. 2020; "N+ details" (arXiv:2403.17031), section 4.1."""
    torch.nn.init.normal_(score.weight, std=(score.in_features + 1) ** -0.5)
    if score.bias is not None:
        torch.nn.init.zeros_(score.bias)


def weights_hash(model: torch.nn.Module, *, adapters: bool = False) -> str:
    """Hash names, shapes and bytes of all weights (sha256); caches of outputs are keyed by it.

    ``adapters=False`` skips adapters: the hash is that of the base model.
    """
    digest = hashlib.sha256()
    weights = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    for name, parameter in sorted(weights.items()):
        if "lora_" in name and not adapters:
            continue
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(model: PreTrainedModel) -> str:
    """Hash weights and configuration: another rope or window makes another model of them."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    text = weights_hash(model) + json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _settle(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Prepare a loaded model: no dropout, no quantisation record, a pad token, every token
    embedded.
    """
    switch_off_dropout(model)
    text = model.config.get_text_config()
    text.pad_token_id = tokenizer.pad_token_id
    settle_generation(model, model.name_or_path)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    # a GGUF's quantisation is gone once its weights are float32
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
        model.hf_quantizer = None  # else save_pretrained refuses
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        resize(model, len(tokenizer))
    return model
