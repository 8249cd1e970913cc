"""Settings that go together, to begin with: what a user wants to train, in a word.

They are starting points for models of Stable Diffusion's size, as the field uses them; nothing here is tuned
on a model. A setting that is given goes before the preset's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

Preset = Literal["an object", "a person", "a style", "quick look"]
NAMES = get_args(Preset)
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "an object": {"rank": 8, "steps": 500},
    "a person": {"rank": 16, "steps": 1200, "schedule": "cosine"},
    "a style": {"rank": 16, "steps": 1000, "schedule": "cosine", "targets": "attention+mlp"},
    "quick look": {"rank": 4, "steps": 100, "warmup": 5},
}
