"""Make this folder's run again, by the code of 0.1.0: python tests/golden/run-0.1.0/make.py

That is commit 0279c7d, with the versions of constraints.txt. From config.yaml and text/ come

    run/            12 steps, stopped by a signal in the 8th: checkpoints of the steps 4 and 8, evaluated and sampled
                    after step 4, watched in step 8
    finished.jsonl  what its metrics.jsonl gets when it goes on to the end
    answers.json    what the other commands said of run/

Paths are relative to this folder, and the host's name is "host". Made again, it differs in times, and on another
processor or with other versions by rounding.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
REVISION = "0279c7d"
MADE = ("run", "finished.jsonl", "answers.json")
QUESTIONS = {
    "evaluate": ["evaluate", "--model", "run", "--config", "config.yaml"],
    "evaluate step 4": ["evaluate", "--model", "run/checkpoints/step-00000004", "--config", "config.yaml"],
    "sample": [
        "sample",
        "--model",
        "run",
        "--prompt",
        "The ",
        "--max_new_tokens",
        "12",
        "--json",
        "--log_probabilities",
    ],
    "inspect": ["inspect", "--run", "run", "--step", "6", "--json"],
}


def main() -> None:
    """Make it in a temporary folder, and put it here."""
    with tempfile.TemporaryDirectory() as scratch:
        code, folder = Path(scratch) / "code", Path(scratch) / "run-0.1.0"
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", code, REVISION], cwd=HERE, check=True)
        try:
            shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns(*MADE))
            make(code, folder)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", code], cwd=HERE, check=True)
        for name in MADE:
            old, new = HERE / name, folder / name
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            shutil.move(new, old)


def make(code: Path, folder: Path) -> None:
    """The run, what it would have become, and what is said of it."""
    # The tests of 0.1.0 stop a run with a signal in a step of one's choice.
    todo, done = folder / "todo.json", folder / "done.json"
    train = ["train", "--config", "config.yaml"]
    todo.write_text(json.dumps([[*train, {"fault": "step", "process": 0, "at": 8}]]), encoding="utf-8")
    call(code, folder, "tests.distributed.several", str(todo), str(done))
    shutil.copytree(folder / "run", folder / "stopped")
    answers = {name: json.loads(call(code, folder, "train_loop", *asked)) for name, asked in QUESTIONS.items()}
    del answers["inspect"]["statistics"], answers["inspect"]["surprising"]  # long
    (folder / "answers.json").write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")
    call(code, folder, "train_loop", *train)
    stopped, whole = ((folder / name / "metrics.jsonl").read_text(encoding="utf-8") for name in ("stopped", "run"))
    assert whole.startswith(stopped)
    (folder / "finished.jsonl").write_text(whole.removeprefix(stopped), encoding="utf-8")
    shutil.rmtree(folder / "run")
    shutil.move(folder / "stopped", folder / "run")
    truth = folder / "run" / "truth.json"
    told = truth.read_text(encoding="utf-8")
    truth.write_text(told.replace(json.dumps(socket.gethostname()), '"host"'), encoding="utf-8")


def call(code: Path, folder: Path, module: str, *arguments: str) -> str:
    """What a module of that code prints on stdout, started in the folder."""
    variables = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(code)}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | variables, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


if __name__ == "__main__":
    main()
