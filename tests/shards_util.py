"""Tiny shards, a template of one character per token, and a run that is cut: helpers of the data tests.

Run as a script it trains or restores in a process of its own, so that nothing but files is shared with the test.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lib.processes import Started
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from lit_eemllm.config.keys import DataConfig
from lit_eemllm.data.module import ShardDataModule
from lit_eemllm.data.samples import SampleEncoder
from lit_eemllm.data.shards import make
from lit_eemllm.inputs.conversation import IMAGE, Conversation
from lit_eemllm.inputs.images import ImageTransform
from lit_eemllm.inputs.spans import IMAGE_SLOT, EncodedText
from lit_eemllm.layout import PackedBatch

BEGIN, END = 1, 2
TRANSFORM = ImageTransform(height=8, width=8, patch=4, mean=(0.5,) * 3, std=(0.5,) * 3)
IMAGE_TOKENS = 4


class CharTemplate:
    """BEGIN, then characters by their code. What gpt says and an END after it are supervised; a human turn ends in a newline."""

    name = "characters"

    def __init__(self) -> None:
        self.tokenizer = self

    def fingerprint(self) -> str:
        return self.name

    def decode(self, ids: Iterable[int]) -> str:
        return "".join({BEGIN: "<s>", END: "</s>"}.get(i, chr(i)) for i in ids)

    def encode(self, conversation: Conversation) -> EncodedText:
        ids, supervised = [BEGIN], [False]
        for turn in conversation.turns:
            answer = turn.role == "gpt"
            for number, text in enumerate(turn.text.split(IMAGE)):
                new = [IMAGE_SLOT] * (number > 0) + [ord(character) for character in text]
                ids += new
                supervised += [answer] * len(new)
            ids.append(END if answer else ord("\n"))
            supervised.append(answer)
        return EncodedText(ids, supervised)

    def text_ids(self, text: str) -> list[int]:
        return [ord(character) for character in text]


def picture(number: int, form: str = "PNG", size: tuple[int, int] = (9, 7)) -> bytes:
    """An image file whose colours tell its number."""
    file = io.BytesIO()
    image = Image.new("RGB", size, (number * 7 % 256, number * 31 % 256, number % 256))
    image.putpixel((0, 0), (255, 255, 255))
    image.save(file, form)
    return file.getvalue()


def row(number: int, images: int = 1, answer: str | None = None) -> dict[str, Any]:
    """A LLaVA row with the given number of images (listed as <number>_<i>.png), text before, between and after them."""
    question = "".join(f"see {i}{IMAGE}" for i in range(images)) + f"what is {number}?"
    answer = f"it is {number * number}" if answer is None else answer
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    listed = [f"{number}_{i}.png" for i in range(images)]
    return {"id": f"row/{number}", "conversations": turns} | ({"image": listed} if images else {})


def write_shards(folder: Path, splits: Mapping[str, list[dict[str, Any]]], shard_size: int = 8) -> Path:
    """Shards by the project's own `make` from rows whose images are drawn here."""
    images = folder.parent / f"{folder.name}.images"
    images.mkdir(parents=True)
    files = {}
    for split, rows in splits.items():
        for item in rows:
            for name in item.get("image", []):
                (images / name).write_bytes(picture(int(name.split("_")[0]) + int(name[-5])))
        files[split] = folder.parent / f"{folder.name}.{split}.json"
        files[split].write_text(json.dumps(rows))
    make(files, images, folder, shard_size=shard_size)
    return folder


def write_tar(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> None:
    """A shard by hand, with whatever members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for name, data in members.items():
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def sample(number: int, images: int = 1) -> dict[str, bytes]:
    """Members of a good sample."""
    drawn = {f"{i}.png": picture(number + i) for i in range(images)}
    return {"json": json.dumps(row(number, images)).encode(), **drawn}


def encoder(max_length: int = 200, truncation: str = "drop", max_image_pixels: int = 10_000) -> SampleEncoder:
    return SampleEncoder(CharTemplate(), TRANSFORM, max_length, truncation, max_image_pixels)  # type: ignore[arg-type]


def module(train: Path, val: Path | None = None, *, seed: int = 0, **config: Any) -> ShardDataModule:
    defaults = dict(pack_tokens=200, max_length=200, workers=0, shuffle_buffer=10, packing_buffer=12)
    made = DataConfig(train=str(train), val=str(val) if val else None, **{**defaults, **config})
    data = ShardDataModule(made, seed)
    data.connect(CharTemplate(), TRANSFORM)  # type: ignore[arg-type]
    return data


def fingerprint(batch: PackedBatch) -> str:
    """Keys, every tensor and the layout of a batch."""
    digest = hashlib.sha256(repr((batch.keys, batch.layout.documents)).encode())
    for tensor in (batch.input_ids, batch.target_rows, batch.targets, batch.pixel_values):
        digest.update(b"-" if tensor is None else repr(tensor.shape).encode() + tensor.numpy().tobytes())
    return f"{','.join(batch.keys)} {digest.hexdigest()}"


def blend(folder: Path, weights: Mapping[str, float], key: str = "weight") -> Path:
    """A recipe beside the shard folders, for train; val is the first folder."""
    name = {"weight": "blend", "repetitions": "blend_epochized"}[key]
    entries = [{"path": path, key: weight} for path, weight in weights.items()]
    recipe = {"splits": {"train": {name: entries}, "val": {"path": next(iter(weights))}}}
    (folder / "blend.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return folder / "blend.yaml"


class Recorder(LightningModule):
    """A model of one weight that remembers the batches it was trained on. Optionally dies without a word."""

    def __init__(self, kill_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.kill_at = kill_at
        self.seen: list[str] = []

    def training_step(self, batch: PackedBatch, batch_idx: int) -> torch.Tensor:
        if len(self.seen) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen.append(fingerprint(batch))
        return self.weight * batch.num_targets

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(model: Recorder, data: ShardDataModule, out: Path, *, steps: int, save_every: int, ckpt: Path | None = None,
        callbacks: Iterable[Callback] = (), **trainer: Any) -> None:  # fmt: skip
    """A real `Trainer.fit` that writes a checkpoint every so many steps, read back with weights_only=True."""
    checkpoint = ModelCheckpoint(out, filename="{step}", every_n_train_steps=save_every, save_top_k=-1)
    options = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    made = Trainer(max_steps=steps, callbacks=[checkpoint, *callbacks], **{**options, **trainer})
    made.fit(model, datamodule=data, ckpt_path=ckpt, weights_only=True)


def script(*arguments: object) -> subprocess.Popen[str]:
    """This file in a process of its own."""
    root = Path(__file__).resolve().parents[1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests"), *sys.path]),
    }
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def forked(*arguments: object) -> Started:
    """Likewise, with the imports made."""
    return Started(main, *map(str, arguments))


def take(data: ShardDataModule, number: int) -> Iterator[str]:
    return (fingerprint(batch) for batch in islice(data.train_dataloader(), number))


def main(verb: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # see tests/conftest.py
    if verb == "kill":  # train until killed in the middle of a step
        recipe, out, workers, accumulate, kill_at = arguments
        data = module(Path(recipe), workers=int(workers))
        fit(Recorder(int(kill_at)), data, Path(out), steps=100, save_every=2, accumulate_grad_batches=int(accumulate))
    elif verb == "restore":  # each saved state in turn: the batches that follow it
        recipe, *states = arguments
        result = []
        for path in states:
            saved = torch.load(path, weights_only=True)
            data = module(Path(recipe), workers=saved["shape"]["data.workers"])
            data.load_state_dict(saved)
            result.append(list(take(data, 6)))
        print(json.dumps(result))
    elif verb == "one":  # take one batch, and end with the loader in a cycle that the collector has not seen yet
        gc.set_threshold(0)
        held = [module(Path(arguments[0]), workers=int(arguments[1]))]
        held += [iter(held[0].train_dataloader()), held]
        next(held[1])
    elif verb == "orphans":  # killed while its loader processes start
        from lit_eemllm.data import workers

        start, parent = workers._start_worker, os.getpid()

        def late(*options: Any) -> None:
            os.write(1, f"{os.getpid()}\n".encode())  # whole: the lines of both come at once
            while os.getppid() == parent:
                time.sleep(0.01)
            start(*options)

        workers._start_worker = late
        threading.Timer(2, os.kill, (parent, signal.SIGKILL)).start()
        next(iter(module(Path(arguments[0]), workers=2).train_dataloader()))
    elif verb == "rank":  # one of two ranks: what it reads, and what both do after resuming
        import torch.distributed as dist

        rank, recipe, folder = int(arguments[0]), Path(arguments[1]), Path(arguments[2])
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        data = module(recipe, recipe.parent / "a", shuffle_buffer=0, packing_buffer=4, pack_samples=1)
        batches = map(fingerprint, data.train_dataloader())
        first = list(islice(batches, 5))
        state = data.state_dict()
        after = list(islice(batches, 5))
        again = module(recipe, shuffle_buffer=0, packing_buffer=4, pack_samples=1)
        again.load_state_dict(state)
        val = [key for batch in data.val_dataloader() for key in batch.keys]
        print(json.dumps({"first": first, "after": after, "resumed": list(take(again, 5)), "state": state, "val": val}))
        dist.destroy_process_group()
    else:
        raise ValueError(verb)


if __name__ == "__main__":
    main(*sys.argv[1:])


def write_quiz(folder: Path) -> None:
    """A release as docs/my_source.py wants it: two good questions about a picture, two rows that cannot be used, and one for val."""
    (folder / "pictures").mkdir(parents=True)
    for number in range(2):
        (folder / "pictures" / f"{number}.png").write_bytes(picture(number, "PNG"))
    lines = [
        "picture,question,answer",
        "0.png,What is it?,a cat",
        "0.png,And where?,at home",
        "1.png,Who?,",
        "2.png,Who?,you",
    ]
    (folder / "train.csv").write_text("\n".join(lines))
    (folder / "val.csv").write_text("\n".join([*lines[:1], '1.png,"Red, or blue?",red']))
