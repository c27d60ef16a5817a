"""Videos of rows: shards hold their frames as images, and what trains, counts and asks afterwards is that of these images."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lib.films import film, number
from lib.mechanisms import counted
from shards_util import CharTemplate, picture

from lit_eemllm.config.keys import VideoConfig
from lit_eemllm.data.packing import collate
from lit_eemllm.data.samples import SampleEncoder, read_row
from lit_eemllm.data.shards import make, read_shard
from lit_eemllm.data.sources import held_out
from lit_eemllm.errors import UserError
from lit_eemllm.evaluation import run
from lit_eemllm.evaluation.sets import QuestionSet, read_questions
from lit_eemllm.inputs.conversation import IMAGE

VIDEO = VideoConfig(3, None, "internvl")
ANSWER = {"from": "gpt", "value": "a"}


def row(text: str, **named: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": text}, ANSWER], **named}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = tmp_path / "files"
    files.mkdir()
    (files / "a.mp4").write_bytes(film())
    (files / "b.webm").write_bytes(film("webm", "libvpx-vp9", 2))
    (files / "cut.mp4").write_bytes(film()[:900])
    (files / "x.png").write_bytes(picture(7))
    (tmp_path / "secret.mp4").write_bytes(film())
    rows = [
        row("<video>\nb?", video="a.mp4"),
        row(f"{IMAGE}\n<video>", image="x.png", videos=["b.webm"]),
        row(f"{IMAGE}\nb?", video="a.mp4"),
        row("b?"),
        row("<video>", video="../secret.mp4"),
        row("<video>", video="none.mp4"),
        row("<video>", video="cut.mp4"),
        row("<video>", video="x.png"),
        row("<video><video>", video="a.mp4"),
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path


BAD = {"path_escape": 1, "missing_video": 1, "bad_video": 2, "placeholder_mismatch": 1}


def shards(folder: Path, out: str, **options: Any) -> list[tuple[str, dict[str, bytes]]]:
    report = make({"train": folder / "rows.json"}, folder / "files", folder / out, **options)
    assert report.good == {"train": 4} and report.bad == BAD and report.images == 9
    assert report.mended == {"image_for_video": 1}
    return list(read_shard(folder / out / "train-000000.tar"))


def test_shards_hold_frames_and_the_same_bytes_each_time(folder: Path) -> None:
    samples = shards(folder, "one", video=VIDEO)
    shards(folder, "two", video=VIDEO, workers=2, shard_size=100)
    assert (folder / "one/train-000000.tar").read_bytes() == (folder / "two/train-000000.tar").read_bytes()
    with tarfile.open(folder / "one/train-000000.tar") as tar:
        assert {name.rpartition(".")[2] for name in tar.getnames()} == {"json", "jpg", "png"}
    (key, first), (_, second), (_, third), _ = samples
    found, frames = read_row(key, first)
    assert found["conversations"][0]["value"] == f"Frame1: {IMAGE}\nFrame2: {IMAGE}\nFrame3: {IMAGE}\nb?"
    assert [number(image) for image in frames.values()] == [1, 5, 8]
    assert found["frames"] == [{"video": "a.mp4", "seconds": [0.2, 1.0, 1.6]}] and "video" not in found
    assert read_row(key, third)[0]["conversations"] == found["conversations"]
    shown = read_row(key, second)[1]
    assert list(shown) == ["0.png", "1.jpg", "2.jpg"] and [number(shown[name]) for name in ("1.jpg", "2.jpg")] == [0, 1]


def test_a_question_shows_what_a_shard_would(folder: Path) -> None:
    """Rows that are asked are decoded likewise; equal frames are kept once."""
    samples = shards(folder, "one", video=VIDEO)
    questions, report = read_questions(
        QuestionSet("q", folder / "rows.json", folder / "files", None, 8), None, 10_000, VIDEO
    )
    assert report.bad == BAD
    for question, (key, members) in zip(questions, samples, strict=True):
        found, images = read_row(key, members)
        assert question.images == list(images.values())
        assert question.prompt == found["conversations"][0]["value"]
    assert questions[0].pictures[0] is questions[2].pictures[0]


def test_training_on_a_video_is_training_on_its_frames(folder: Path) -> None:
    """The same ids and pixels, and with gradients the same FLOPs to the last one, as a row that names the frames as images."""
    samples = shards(folder, "one", video=VIDEO)
    names = [f"frame{i}.jpg" for i in range(3)]
    for name, data in zip(names, read_row(*samples[0])[1].values(), strict=True):
        (folder / "files" / name).write_bytes(data)
    text = "".join(f"Frame{i}: {IMAGE}\n" for i in (1, 2, 3))
    (folder / "by_hand.json").write_text(json.dumps([row(f"{text}b?", image=names)]))
    make({"train": folder / "by_hand.json"}, folder / "files", folder / "by_hand")
    by_hand = next(iter(read_shard(folder / "by_hand" / "train-000000.tar")))

    class Short(CharTemplate):
        """Ids of the small decoder."""

        def encode(self, conversation: Any) -> Any:
            encoded = super().encode(conversation)
            encoded.ids[:] = [i if i < 0 else i % tiny.VOCAB for i in encoded.ids]
            return encoded

    model = tiny.model(mechanism="llava")
    encoder = SampleEncoder(Short(), model.vision.transform, 500, "error", 10_000)  # type: ignore[arg-type]
    found = []
    for key, members in (samples[0], by_hand):
        batch = collate([encoder.load_pixels(encoder.tokenize(key, members))])
        model.zero_grad()
        loss, counter = counted(lambda batch=batch: model.packed_loss(batch).backward())
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((batch.input_ids, batch.pixel_values, torch.cat([g.flatten() for g in gradients])))
        found.append(counter.get_total_flops())
        assert loss is None and list(batch.layout.image_lengths) == [tiny.TOKENS] * 3
    assert found[1] == found[3] > 0
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-5)
    before = model.packed_loss(batch).item()
    optimiser.step()
    assert model.packed_loss(batch).item() < before


def test_generate_shows_videos(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(run, "load", lambda *_: (None, None, ""))
    monkeypatch.setattr(run, "autocast", lambda *_: torch.inference_mode())
    monkeypatch.setattr(run, "answer", lambda _, __, conversations, images, *___: asked.append((conversations[0], images[0])) or ["yes"])  # fmt: skip
    config = tiny.config(folder, folder, folder / "run", "eval.video.frames=2", "eval.video.markers=qwen3_vl")
    given = {"images": [folder / "files/x.png"], "videos": [folder / "files/a.mp4"]}
    run.generate(config, None, prompt="What?", max_new_tokens=3, temperature=0.0, **given)
    conversation, images = asked[0]
    assert conversation.turns[0].text == f"{IMAGE}\n<0.4 seconds>{IMAGE}\n<1.4 seconds>{IMAGE}\nWhat?"
    assert [image.size for image in images] == [(9, 7), (64, 48), (64, 48)] and capsys.readouterr().out == "yes\n"
    with pytest.raises(UserError, match="--video none: no such file"):
        run.generate(config, None, [], "What?", 3, 0.0, [Path("none")])


def test_only_videos_need_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"lit_eemllm\[video\]"):
        make({"train": folder / "rows.json"}, folder / "files", folder / "out")
    (folder / "rows.json").write_text(json.dumps([row(IMAGE, image="x.png")]))
    assert make({"train": folder / "rows.json"}, folder / "files", folder / "out").ok


def test_wrong_numbers_are_told_and_a_video_is_in_one_split(folder: Path) -> None:
    with pytest.raises(UserError, match=r"video.frames: found 0, expected 1 to 1000"):
        make({"train": folder / "rows.json"}, folder / "files", folder / "out", video=VideoConfig(0))
    with pytest.raises(UserError, match=r"video.markers: found 'internvn'.*did you mean internvl"):
        make({"train": folder / "rows.json"}, folder / "files", folder / "out", video=VideoConfig(1, None, "internvn"))
    same = [held_out({"id": i, "video": "a.mp4"}, 0.5) for i in range(20)]
    assert len(set(same)) == 1
