"""A sweep without an account: TPE proposes options, the median rule stops trials. Any number of these may run at once.

python configs/sweep_optuna.py STUDY --trials 20                    # again: continues the study of this name
python configs/sweep_optuna.py STUDY --trials 20 --config configs/x.yaml --launcher "torchrun --nproc_per_node 2"

Needs `pip install optuna`. Writes STUDY.db (SQLite) and the runs STUDY/trial-N. Prints the best trial.
"""

import argparse
import fcntl
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

try:
    import optuna
except ModuleNotFoundError:
    sys.exit("error: this sweep needs `pip install optuna`")

METRIC = "eval/accuracy"


def options_of(trial: optuna.Trial) -> dict:
    """The search space: edit it. It suits the toy data; a pretrained model needs about a hundredth of these rates."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", 3e-4, 1e-2, log=True),
        "train_batch_size": trial.suggest_categorical("train_batch_size", [32, 64, 128]),
        "center_rewards_coefficient": trial.suggest_categorical("center_rewards_coefficient", ["none", 0.001, 0.01]),
    }


def evaluations(path: Path) -> list[dict]:
    """The whole lines of metrics.jsonl that have the metric."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in map(json.loads, (line for line in lines if line.endswith("\n"))) if METRIC in line]


def run(trial: optuna.Trial, args: argparse.Namespace) -> float:
    """One trial. Its evaluations are read from metrics.jsonl while it runs; the result from the last line on stdout."""
    folder, seen = Path(args.study, f"trial-{trial.number}"), 0
    folder.mkdir(parents=True)
    options = options_of(trial) | {"config": args.config, "output_dir": folder, "eval_steps": args.eval_steps}
    command = [*shlex.split(args.launcher), "train_rm.py", *(f"--{key}={value}" for key, value in options.items())]
    with open(folder / "stdout", "w+") as stdout, open(folder / "stderr", "w") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr)
        try:
            while process.poll() is None:
                time.sleep(0.5)
                found = evaluations(folder / "metrics.jsonl")
                for line in found[seen:]:
                    trial.report(float(line[METRIC]), line["step"])
                seen = len(found)
                if trial.should_prune():
                    raise optuna.TrialPruned
        finally:  # a trial that is pruned or interrupted writes a checkpoint and exits
            process.terminate()
            process.wait()
        stdout.seek(0)
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode}; see {folder}/stderr")
        return json.loads(stdout.read().splitlines()[-1])[METRIC]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("--trials", type=int, default=20, help="of this process")
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--launcher", default=sys.executable)
    parser.add_argument("--eval_steps", type=int, default=50)
    args = parser.parse_args()
    given = {"study_name": args.study, "storage": f"sqlite:///{args.study}.db", "direction": "maximize"}
    with open(f"{args.study}.lock", "w") as lock:  # of several processes, one creates the tables
        fcntl.flock(lock, fcntl.LOCK_EX)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=4)
        study = optuna.create_study(**given, pruner=pruner, load_if_exists=True)
    study.optimize(lambda trial: run(trial, args), n_trials=args.trials, catch=RuntimeError)
    print(f"{len(study.trials)} trials; the best: trial-{study.best_trial.number}, {study.best_value:.4f}")
    print(json.dumps(study.best_params))


if __name__ == "__main__":
    main()
