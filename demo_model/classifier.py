"""A small reader of the demo model's pictures: names their attributes and gives a feature vector.

Shapes: images are float (N, 3, H, W) in [0, 1], resized to the model's own size inside; features (N, 128), of
length 1.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from .draw import PIXELS

WIDTHS = (24, 48, 48, 64, 64)
STRIDES = (2, 2, 2, 2, 1)  # 8 x 8 in the end
FEATURES = 128


class Classifier(nn.Module):
    """Five convolutions, one hidden layer, one linear head per attribute.

    ``labels`` maps an attribute to its possible values, in the order of the head's outputs. The shape
    ``"none"`` stands for a picture without a known shape; the object's other attributes mean nothing then.
    """

    image_size = PIXELS  # of a side

    def __init__(self, labels: dict[str, list[str]]) -> None:
        super().__init__()
        self.centre: Tensor
        self.labels = {name: list(values) for name, values in labels.items()}
        layers: list[nn.Module] = []
        channels = 3
        for width, stride in zip(WIDTHS, STRIDES, strict=True):
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers += [nn.Conv2d(channels, 24, 1), nn.ReLU(), nn.Flatten()]
        self.body = nn.Sequential(*layers)
        self.hidden = nn.Linear(24 * 8 * 8, FEATURES)
        self.register_buffer("centre", torch.zeros(FEATURES))
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, len(v)) for name, v in self.labels.items()})

    def _hidden(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images of shape {tuple(images.shape)}, expected (N, 3, H, W) in [0, 1]")
        x = images.to(self.hidden.weight)
        size = (self.image_size, self.image_size)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)
        return F.relu(self.hidden(self.body(x * 2 - 1)))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits, (N, number of values) for each attribute."""
        x = self._hidden(images)
        return {name: head(x) for name, head in self.heads.items()}

    @torch.no_grad()
    def attributes(self, images: Tensor) -> dict[str, list[str]]:
        """The most likely value of each attribute, one per picture."""
        found = {name: logits.argmax(1).tolist() for name, logits in self(images).items()}
        return {name: [self.labels[name][i] for i in indices] for name, indices in found.items()}

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, 128), each of length one, relative to the average drawing: dot products are similarities."""
        return F.normalize(self._hidden(images) - self.centre, dim=1)


def load_classifier(path: str | Path) -> Classifier:
    """The frozen classifier of a folder (``config.json``, ``model.safetensors``), in fp32 on the CPU."""
    folder = Path(path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = Classifier(config["labels"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.float().eval().requires_grad_(False)
