"""Folders, hub ids and GGUF files -> tokenizers and transformers models, float32, ready to pack.

Weights come from safetensors (or GGUF, which is converted): a checkpoint that holds only pickles is
refused. Remote code runs only where the recipe says so.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from align.models.attention import BACKENDS, not_on_the_interface
from align.models.dropout import switch_off_dropout
from align.models.locate import adapter_base, require_found
from align.types import AlignError


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, with a pad token that is not an end token.

    Padding hardly occurs here, but ``pad_token_id`` is written into the saved config, and plain
    transformers reads a classifier's score at the last token that is *not* padding: with pad = EOS
    that would be the token before EOS.
    """
    base = adapter_base(model)
    if base is not None and not (Path(model) / "tokenizer_config.json").is_file():
        return load_tokenizer(base, trust_remote_code=trust_remote_code)
    where, options = require_found(model)
    tokenizer = _guarded(
        model, AutoTokenizer.from_pretrained, where, trust_remote_code=trust_remote_code, **options
    )
    if tokenizer.eos_token_id is None:
        raise AlignError(f"{model}: the tokenizer has no EOS token; set eos_token in its config")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        # assigning `pad_token` would add no token to the vocabulary, and leave its id None
        tokenizer.add_special_tokens({"pad_token": _spare_token(tokenizer)})
    return tokenizer


def _spare_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A special token that exists and is not an end token; a new ``<|pad|>`` if there is none."""
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
) -> PreTrainedModel:
    """A decoder with its LM head; a LoRA adapter's folder is its base merged with it."""
    base = adapter_base(model)
    if base is not None:
        from peft import PeftModel

        whole = load_causal_lm(base, tokenizer, dtype=dtype, trust_remote_code=trust_remote_code)
        # float32, as `merged` says
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's, about transformers 6
            adapted = _guarded(model, PeftModel.from_pretrained, whole.float(), model)
        return adapted.merge_and_unload().to(dtype)
    where, options = require_found(model)
    if from_scratch:
        config = _guarded(
            model, AutoConfig.from_pretrained, where, trust_remote_code=trust_remote_code, **options
        )
        loaded = _guarded(
            model,
            AutoModelForCausalLM.from_config,
            config,
            attn_implementation=BACKENDS["segments"],
            dtype=torch.float32,
        )
    else:
        loaded, info = _guarded(
            model,
            AutoModelForCausalLM.from_pretrained,
            where,
            attn_implementation=BACKENDS["segments"],
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
        refuse_other_kind("model", model, loaded.config, head=False)
        _complete(model, info)
    return _settle(loaded, tokenizer)


def load_classifier(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, bool]:
    """A decoder with a one-label head, and whether that head is new (not in the checkpoint)."""
    where, options = require_found(model)
    loaded, info = _guarded(
        model,
        AutoModelForSequenceClassification.from_pretrained,
        where,
        num_labels=1,
        attn_implementation=BACKENDS["segments"],
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        **options,
    )
    if not hasattr(loaded, "score"):
        raise AlignError(f"{model}: {type(loaded).__name__} has no `score` head; use a decoder")
    fresh = any(key.startswith("score") for key in info["missing_keys"])
    _complete(model, info, but="score")
    if fresh:
        _draw_head(loaded.score)
    loaded.score.float()  # scores are float32, whatever the trunk is held in
    return _settle(loaded, tokenizer), fresh


def classifier_on(model: PreTrainedModel) -> PreTrainedModel | None:
    """A one-label model whose trunk is that of a loaded ``model``, its head new.

    None where transformers has no one-label model with this trunk and a ``score`` head.
    """
    config = model.config
    config.num_labels = 1
    trunk = getattr(model, model.base_model_prefix)
    with torch.device("meta"):
        try:
            made = AutoModelForSequenceClassification.from_config(config)
        except ValueError:
            return None
    if not hasattr(made, "score") or type(getattr(made, made.base_model_prefix)) is not type(trunk):
        return None
    setattr(made, made.base_model_prefix, trunk)
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
    """sha256 over names, shapes and bytes of all weights: what a cache of outputs is keyed by.

    Adapters are left out unless asked for: the hash is that of the model under them.
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
    """``weights_hash`` and the configuration: the same weights under another rope or window are
    another model."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    text = weights_hash(model) + json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _settle(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Dropout off, no quantisation record, one pad token, room for every token."""
    switch_off_dropout(model)
    text = model.config.get_text_config()
    text.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    # a GGUF's quantisation is gone once its weights are float32
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
        model.hf_quantizer = None  # else save_pretrained refuses
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        _grow(model, len(tokenizer))
    return model


def _grow(model: PreTrainedModel, num_tokens: int) -> None:
    """Give tokens that the checkpoint lacks the mean of its embeddings.

    Random rows would differ between policy and reference, and take nearly all probability from a
    model whose logits all lie far below 0, as GPT-2's do (Hewitt 2021).
    """
    old = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            for rows in layer.parameters() if layer is not None else ():
                rows[old:] = rows[:old].mean(0)


def refuse_other_kind(key: str, model: str, config: Any, *, head: bool) -> None:
    """A reward model is no language model and a language model no reward model: their heads differ.

    Args:
        head: Whether a score head is wanted.
    """
    made = (getattr(config, "architectures", None) or [""])[0]
    if head and made.endswith(("ForCausalLM", "LMHeadModel")):
        raise AlignError(
            f"{key}: {model} is a language model ({made}) without a trained score head; name a "
            "reward model, such as `align rm` makes"
        )
    if not head and made.endswith("ForSequenceClassification"):
        raise AlignError(
            f"{key}: {model} is a reward model ({made}), which has no language-model head; name "
            "the model that it was trained from"
        )


def _complete(model: str, info: dict[str, Any], *, but: str = "") -> None:
    """Refuse weights of which a part is missing: transformers would draw it at random."""
    missing = sorted(k for k in info["missing_keys"] if not (but and k.startswith(but)))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise AlignError(
            f"model: {model}: its files lack {missing[0]}{more}, which would be random; "
            "fetch or save the model whole"
        )


def _guarded(model: str, load: Any, *args: Any, **options: Any) -> Any:
    """Whatever goes wrong inside ``from_pretrained`` becomes one line about this model."""
    if load.__self__ is AutoTokenizer or load.__self__ is AutoConfig:
        options.pop("use_safetensors", None)
    try:
        return load(*args, **options)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        if str(error) == repr(BACKENDS["segments"]):  # a table of attention classes without it
            raise AlignError(f"model: {model}: {not_on_the_interface(_kind(error))}") from error
        if str(error).startswith("Unrecognized configuration class"):
            scalar = load.__self__ is AutoModelForSequenceClassification
            kind = "one-label model (for a reward or a critic)" if scalar else "language model"
            made_by = str(error).split("'")[1].rpartition(".")[2]
            raise AlignError(
                f"model: {model}: transformers has no {kind} of this architecture ({made_by}); "
                "take another model"
            ) from error
        reason = str(error).strip().split("\n")[0]
        raise AlignError(
            f"model: {model}: cannot be loaded: {reason} "
            "(give a folder that exists, or a hub id `org/name` that this machine can reach)"
        ) from error
    except Exception as error:
        if type(error).__name__ in ("SafetensorError", "HFValidationError", "GatedRepoError"):
            raise AlignError(f"model: {model}: cannot be loaded: {error}".split("\n")[0]) from error
        raise


def _kind(error: BaseException) -> str:
    """Class of the model that was being made when an error was raised."""
    kinds = [
        type(frame.f_locals["self"])
        for frame, _ in walk_tb(error.__traceback__)
        if isinstance(frame.f_locals.get("self"), PreTrainedModel)
    ]
    return kinds[0].__name__ if kinds else "its architecture"
