"""Benchmark training steps of a whole model with random weights: peak memory and speed, EE-MLLM beside self-attention.

    python tools/bench_training.py                                 # 7B shapes on the GPU if there is one, else tiny ones
    python tools/bench_training.py --cases lora qlora --mechanisms ee_mllm llava

Cases: `projector` (stage 1: decoder frozen), `lora` (rank 128, all linear layers), `qlora` (the same on 4-bit layers),
`full` (all of the decoder; fits no single GPU at 7B, and says so). Each with and without activation checkpointing.
Running out of memory is a result. Writes result.json and report.md, by default into benchmarks/DATE-training-DEVICE.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import shlex
import sys
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from lit_eemllm.config import load_config
from lit_eemllm.console import console, progress, write_atomically
from lit_eemllm.cost import weightless
from lit_eemllm.doctor import provenance
from lit_eemllm.inputs.images import ImageTransform
from lit_eemllm.layout import PackedBatch, Run, SequenceLayout
from lit_eemllm.mechanisms import build_mechanism
from lit_eemllm.model import EEMLLM, EEMLLMConfig
from lit_eemllm.model.vision import TransformersVision
from lit_eemllm.training.tuning import apply_tuning, parameter_groups

SHAPES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "7b": (weightless.SHAPES["vicuna-7b"], weightless.CLIP_L),
    "tiny": (
        dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=320),
        dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14),
    ),
}  # fmt: skip
CASES = {
    "projector": [],
    "lora": ["optim.tuning.llm=lora"],
    "qlora": ["optim.tuning.llm=lora", "model.quantization=nf4"],
    "full": ["optim.tuning.llm=full"],
}
STEPS, WARM_UP = 10, 3


def build(shape: str, mechanism: str, config: Any, device: torch.device) -> EEMLLM:
    """A model with random weights on the device, tuned as the configuration says."""
    decoder, tower = SHAPES[shape]
    torch.manual_seed(0)
    text = LlamaConfig(**decoder, max_position_embeddings=8192, attn_implementation="sdpa")
    transform = ImageTransform(tower["image_size"], tower["image_size"], tower["patch_size"], (0.5,) * 3, (0.5,) * 3)
    frozen = getattr(torch, config.model.dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(frozen)  # made in its type and place: float32 first would not fit
    try:
        with torch.device(device):
            vision = TransformersVision(CLIPVisionModel(CLIPVisionConfig(**tower)), transform, select_layer=-2)
            settings = EEMLLMConfig(
                text_config=text,
                vision={"encoder": "transformers", "config": vision.to_config()},
                mechanism=build_mechanism(mechanism, text.num_hidden_layers).to_dict(),
                image_token_id=decoder["vocab_size"],
            )
            model = EEMLLM(settings, vision=vision)
    finally:
        torch.set_default_dtype(before)
    if config.model.quantization:
        quantize(model)
    apply_tuning(model, config.optim, config.model.dtype)
    model.activation_checkpointing = config.optim.activation_checkpointing
    return model.train()


def quantize(model: EEMLLM) -> None:
    """The decoder's linear layers in 4 bits, as loading with model.quantization=nf4 makes them."""
    import bitsandbytes as bnb

    for layer in model.language_model.model.layers:
        for module in (layer.self_attn, layer.mlp):
            for name, linear in list(module.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    options = {"compute_dtype": linear.weight.dtype, "compress_statistics": True, "quant_type": "nf4"}
                    small = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, **options)
                    small.weight = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                    setattr(module, name, small.to(linear.weight.device))


def pack(model: EEMLLM, text: int, documents: int, device: torch.device) -> PackedBatch:
    """Documents of 35 text tokens, an image, and the rest of the text, half of it supervised."""
    transform, before = model.vision.transform, min(35, text // 2)
    tokens = transform.num_tokens(transform.width, transform.height)
    layout = SequenceLayout.of([[Run(False, before), Run(True, tokens), Run(False, text - before)]] * documents)
    rows = torch.cat([torch.arange(d * text + (before + text) // 2, (d + 1) * text - 1) for d in range(documents)])
    ids = torch.randint(0, model.config.text_config.vocab_size, (layout.num_tokens,))
    targets = torch.randint(0, model.config.text_config.vocab_size, (len(rows),))
    pixels = torch.randn(documents, 3, transform.height, transform.width)
    return PackedBatch(ids, rows, targets, pixels, layout, [str(d) for d in range(documents)]).to(device)


def measure(args: argparse.Namespace, case: str, mechanism: str, again: bool, device: torch.device) -> dict[str, Any]:
    """Median step time, tokens a second and peak memory; or why there is none."""
    row: dict[str, Any] = {"case": case, "mechanism": mechanism, "activation_checkpointing": again}
    options = [
        "model.decoder=random",
        "model.vision.path=random",
        "data.train=none",
        "optim.lr=1e-4",
        "optim.max_steps=1",
    ]
    options += [f"model.dtype={'bfloat16' if device.type == 'cuda' else 'float32'}", *CASES[case]]
    config = load_config([], [*options, f"optim.activation_checkpointing={str(again).lower()}"])
    try:
        model = build(args.shape, mechanism, config, device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        row["attention"] = model.set_attention(args.attention, dtype).backend.name
        batch = pack(model, args.text, args.documents, device)
        optimizer = torch.optim.AdamW(parameter_groups(model, config.optim))
        row["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        seconds = []
        for step in range(WARM_UP + STEPS):
            if step == WARM_UP and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            with torch.autocast(device.type, dtype, enabled=device.type == "cuda"):
                loss = model.packed_loss(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        row |= {"step_seconds": median(seconds[WARM_UP:]), "tokens": batch.layout.num_tokens, "loss": loss.item()}
        row["tokens_per_second"] = row["tokens"] / row["step_seconds"]
        if device.type == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    except torch.cuda.OutOfMemoryError:
        row["failed"] = "out of memory"
    except ImportError as error:
        row["failed"] = str(error)
    model = optimizer = batch = loss = None  # the next case needs the room
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def report(result: dict[str, Any]) -> str:
    """Markdown; ratios are to self-attention (llava) of the same case in this run."""
    lines = [
        f"# Training steps, {result['shape']} shapes, random weights",
        "",
        f"A pack: {result['documents']} documents of {result['text']} text tokens and an image. {STEPS} steps, median; peak",
        "memory of the allocator; AdamW. Speed-up is against `llava` of the same case in this run.",
        "",
        "| case | mechanism | checkpointing | attention | step (s) | tokens/s | speed-up | peak (GiB) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    key = ("case", "activation_checkpointing")
    base = {tuple(r[k] for k in key): r.get("step_seconds") for r in result["rows"] if r["mechanism"] == "llava"}
    for row in result["rows"]:
        cells = [
            row["case"],
            row["mechanism"],
            "yes" if row["activation_checkpointing"] else "no",
            row.get("attention", ""),
        ]
        if "failed" in row:
            cells += [row["failed"], "", "", ""]
        else:
            dense = base.get(tuple(row[k] for k in key))
            ratio = f"{dense / row['step_seconds']:.2f}" if dense else ""
            peak = f"{row['peak_gib']:.1f}" if "peak_gib" in row else ""
            cells += [f"{row['step_seconds']:.3f}", f"{row['tokens_per_second']:,.0f}", ratio, peak]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"- {result['provenance']}", ""])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="7b" if device.type == "cuda" else "tiny")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["projector", "lora", "qlora"])
    parser.add_argument("--mechanisms", nargs="+", default=["llava", "ee_mllm", "vica"])
    parser.add_argument("--attention", default="auto", help="backend, default auto")
    parser.add_argument("--text", type=int, default=256, help="text tokens of a document")
    parser.add_argument("--documents", type=int, default=4, help="documents in a pack")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    out = (
        args.out
        or Path("benchmarks") / f"{date.today()}-training-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}"
    )
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"shape": args.shape, "text": args.text, "documents": args.documents, "rows": []}
    result["provenance"] = provenance(shlex.join(["python", "tools/bench_training.py", *argv]))
    cases = [(c, m, a) for c in args.cases for a in (False, True) for m in args.mechanisms]
    with progress("cases", len(cases)) as advance:
        for case, mechanism, again in cases:
            result["rows"].append(measure(args, case, mechanism, again, device))
            write_atomically(out / "result.json", json.dumps(result, indent=2))
            advance(1)
    write_atomically(out / "report.md", report(result))
    console.print(report(result))
    console.print(f"written: {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
