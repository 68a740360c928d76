"""Does `align` train as well as another library? ``python -m benchmarks.quality``

TRL fine-tunes the tiny model on the tiny suite's own rows with the numbers of its recipe, and
`align eval` compares that checkpoint with ours on held-out books. Needs ``make sft rm``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.run import ROOT, peer_environment, run_logged

PEER = "trl-1.16.0"
MODEL, DATA = "models/tiny", "data/kjv_web/sft.jsonl"
OURS = "runs/tiny/sft/model"


def main() -> None:
    folder = Path("runs/benchmarks/quality")
    folder.mkdir(parents=True, exist_ok=True)
    python = peer_environment(Path("runs/benchmarks"), PEER)
    command = [python, "-m", "benchmarks.trl_checkpoint", MODEL, DATA, str(folder / "trl_sft")]
    run_logged(command, folder / "trl_sft.log")
    models = f"models={{sft: {OURS}, trl: {folder / 'trl_sft' / 'model'}}}"
    options = [models, f"output_dir={folder / 'eval'}", "overwrite=true", "best_of_n=null"]
    done = subprocess.run([sys.executable, "-m", "align", "eval", "tiny/eval", *options], cwd=ROOT)
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
