"""`demo-web` and `serve`: a run's model in the browser, and behind OpenAI's interface."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from importlib.util import find_spec
from typing import Any

from lit_eemllm.cli.common import config_of, takes_config, verb
from lit_eemllm.errors import UserError


def add(verbs: Any) -> None:
    examples = (
        "lit-eemllm demo-web runs/demo/llava-0",
        "lit-eemllm demo-web configs/demo/ee_mllm_f.yaml --checkpoint runs/demo/llava-0/checkpoints/step-1500.ckpt --port 0",
    )
    text = "Ask a model about pictures in the browser: two mechanisms side by side on the same weights, with what each costs."
    _takes_address(verb(verbs, "demo-web", _serve, text, *examples), 7860)
    examples = ("lit-eemllm serve runs/demo/ee_mllm-0", "lit-eemllm serve runs/demo/ee_mllm-0 --port 8001 --batch 16")
    text = "Answer OpenAI's clients: chat completions with pictures in the requests."
    made = verb(verbs, "serve", _serve, text, *examples)
    _takes_address(made, 8000)
    made.add_argument("--batch", type=int, default=8, metavar="N", help="answers made together (default: %(default)s)")


def _takes_address(made: ArgumentParser, port: int) -> None:
    takes_config(made, checkpoint=True)
    made.add_argument("--host", default="127.0.0.1", help="to be bound to (default: %(default)s, this machine alone)")
    made.add_argument("--port", type=int, default=port, help="0 = any that is free (default: %(default)s)")
    made.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="most of an answer (default: %(default)s)"
    )


def _serve(args: Namespace) -> None:
    config = config_of(args)
    if missing := [name for name in ("starlette", "uvicorn", "pydantic") if find_spec(name) is None]:
        raise UserError(f"{', '.join(missing)}: not installed; pip install 'lit_eemllm[serve]'")
    from lit_eemllm.serving.run import serve

    page = not hasattr(args, "batch")  # whose costs are of one answer
    batch = 1 if page else args.batch
    serve(config, args.checkpoint, args.host, args.port, args.max_new_tokens, batch, page)
