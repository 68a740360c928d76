"""Does `align` train as well as another library? ``python -m benchmarks.quality``

TRL fine-tunes the tiny model on the tiny suite's own rows with the numbers of its recipe, and
`align eval` compares that checkpoint with ours on held-out books. Needs ``make sft rm``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from align.config.keys import SFTRecipe
from align.config.load import load_recipe
from benchmarks.run import ROOT, peer_environment, run_logged

PEER = "trl-1.16.0"
RECIPE = "tiny/sft"


def main() -> None:
    folder = Path("runs/benchmarks/quality")
    folder.mkdir(parents=True, exist_ok=True)
    python = peer_environment(Path("runs/benchmarks"), PEER)
    recipe = load_recipe(SFTRecipe, RECIPE)
    given = [recipe.model, recipe.data.train[0].path, str(folder / "trl_sft")]
    settings = json.dumps(trl_settings(recipe))
    command = [python, "-m", "benchmarks.trl_checkpoint", *given, settings]
    run_logged(command, folder / "trl_sft.log")
    models = f"models={{sft: {recipe.output_dir}/model, trl: {folder / 'trl_sft' / 'model'}}}"
    options = [models, f"output_dir={folder / 'eval'}", "overwrite=true", "best_of_n=null"]
    done = subprocess.run([sys.executable, "-m", "align", "eval", "tiny/eval", *options], cwd=ROOT)
    raise SystemExit(done.returncode)


def trl_settings(recipe: SFTRecipe) -> dict[str, Any]:
    """The recipe's numbers under the names of TRL's ``SFTConfig``."""
    return {
        "num_train_epochs": recipe.train.epochs,
        "per_device_train_batch_size": recipe.train.minibatch,
        "learning_rate": recipe.optim.lr,
        "lr_scheduler_type": recipe.optim.schedule,
        "warmup_steps": recipe.optim.warmup_fraction,  # below 1 it is a share of all steps
        "weight_decay": recipe.optim.weight_decay,
        "max_grad_norm": recipe.optim.max_grad_norm,
        "seed": recipe.seed,
    }


if __name__ == "__main__":
    main()
