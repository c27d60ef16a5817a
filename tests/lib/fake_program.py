"""Stands in for `python -m lit_eemllm` in tests of sweeps: `fit DIR` and `validate DIR` leave what the real ones leave.

What goes wrong is said by a file `wishes.json` in the current directory: {"fail": [...], "diverge": [...], "slow": [...], "seconds": ...},
names of runs. Every call is noted in `calls.jsonl`.
"""

import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

verb, folder, *rest = sys.argv[1:]
run = Path(folder)
wishes = json.loads(Path("wishes.json").read_text()) if Path("wishes.json").is_file() else {}
name = str(run).split("out/", 1)[1]
text = (run / "config.yaml").read_text()
steps, lr, seed = (re.search(rf"^ *{key}: (.*)", text, re.MULTILINE)[1] for key in ("max_steps", "lr", "seed"))
seen = {key: os.environ.get(key) for key in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "SLURM_JOB_NAME")}
call = {
    "verb": verb,
    "name": name,
    "rest": rest,
    "start": time.time(),
    "pid": os.getpid(),
    "parent": os.getppid(),
    **seen,
}


def note(end):
    with Path("calls.jsonl").open("a") as file:
        file.write(json.dumps({**call, "end": end}) + "\n")


def asked(number, frame):
    (run / "saved").write_text("as asked")
    note("stopped")
    print("stopped by SIGTERM")
    sys.exit(128 + number)


signal.signal(signal.SIGTERM, asked)
if verb == "fit":
    (run / "started").write_text(str(os.getpid()))
    (run / "logs" / "version_0").mkdir(parents=True, exist_ok=True)
    (run / "logs" / "version_0" / "metrics.csv").write_text("step,loss,step_seconds\n3,1.5,0.25\n")
    time.sleep(30 if name in wishes.get("slow", []) else wishes.get("seconds", 0))
    if name in wishes.get("diverge", []):
        (run / "nan").mkdir()
        (run / "nan" / "step-2.json").write_text("{}")
        sys.exit("error: step 2: the loss is nan")
    if name in wishes.get("fail", []):
        note("failed")
        print("first line", *(f"line {i}" for i in range(40)), "error: the disk is full", sep="\n")
        sys.exit(2)
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints" / f"step-{steps}.ckpt").write_text("weights")
else:
    loss = abs(math.log10(float(lr) / 1e-3)) + 0.1  # best at 1e-3
    (run / "eval").mkdir(exist_ok=True)
    results = {"loss": loss, "average": 1 - loss / 10, "seed": int(seed)}
    (run / "eval" / "results.json").write_text(json.dumps(results))
note("done")
