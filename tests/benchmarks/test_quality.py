"""What the other library trains with is read from the recipe, and from nowhere else."""

from __future__ import annotations

from align.config.keys import SFTRecipe
from align.config.load import load_recipe
from benchmarks.quality import RECIPE, trl_settings


def test_an_override_of_the_recipe_reaches_the_other_library() -> None:
    shipped = trl_settings(load_recipe(SFTRecipe, RECIPE))
    changed = trl_settings(
        load_recipe(
            SFTRecipe,
            RECIPE,
            ["train.epochs=3", "train.minibatch=8", "optim.lr=0.5", "optim.schedule=linear",
             "optim.warmup_fraction=0.25", "optim.weight_decay=0.125", "optim.max_grad_norm=7",
             "seed=9"],
        )
    )  # fmt: skip
    assert changed == {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.25,
        "weight_decay": 0.125,
        "max_grad_norm": 7,
        "seed": 9,
    }
    assert shipped.keys() == changed.keys()
    assert [key for key in shipped if shipped[key] == changed[key]] == []
