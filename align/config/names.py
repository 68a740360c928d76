"""Other names of recipe keys: of other tools, and of earlier versions of this one."""

from __future__ import annotations

# other tools' name -> key here
ALIASES: dict[str, str] = {
    "learning_rate": "optim.lr",
    "batch_size": "train.minibatch",
    "per_device_train_batch_size": "train.minibatch",
    "num_train_epochs": "train.epochs",
    "max_length": "data.max_tokens",
    "max_seq_length": "data.max_tokens",
    "warmup_ratio": "optim.warmup_fraction",
    "warmup_steps": "optim.warmup_fraction",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "kl_coef": "kl.coef",
    "dataset": "data",
    "model_name_or_path": "model",
    "router_aux_loss_coef": "train.router_aux_coef",
}

# recipe -> key of version 0.1 -> key here
RENAMED: dict[str, dict[str, str]] = {
    "PPORecipe": {
        name: f"train.{name}"
        for name in (
            "tokens_per_microbatch", "eval_every", "save_every", "keep_checkpoints", "keep_best",
            "on_nonfinite",
        )
    },
}  # fmt: skip
