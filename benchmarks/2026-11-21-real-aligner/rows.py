"""Rows of this benchmark: each photo of the grocery set with the kind of food it shows, its second question alone.

python rows.py GROCERY OUT; lit-eemllm shards make --rows train=OUT/train.json --rows val=OUT/val.json --images GROCERY/images --out DATA
"""

import json
import sys
from pathlib import Path

source, out = map(Path, sys.argv[1:])
out.mkdir(parents=True, exist_ok=True)
for split in ("train", "val"):
    rows = json.loads((source / f"{split}.json").read_text())
    for row in rows:
        question, answer = row["conversations"][2:]
        row["conversations"] = [{"from": "human", "value": f"<image>\n{question['value']}"}, answer]
    (out / f"{split}.json").write_text(json.dumps(rows))
