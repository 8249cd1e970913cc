"""Inside a host: pins what the presets take of every family, for a person to look at before it is committed.

Writes ``targets.json`` into the folder; beside this script lies what was looked at.
"""

import json

import comfy.model_patcher
import torch
from inside_apply_lib import FOLDER
from inside_catalogue import CATALOGUE
from inside_conformance import taken
from inside_family import CPU


def empty(family):
    """The family's model without numbers, where the host can make it so."""
    try:
        model = family.named(torch.device("meta"))
    except RuntimeError:  # it computes something while it is made
        return family.patcher()
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


if __name__ == "__main__":
    with torch.inference_mode():
        pins = {n: taken(empty(family)) for n, family in CATALOGUE.items() if family.exists()}
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(pin)}" for name, pin in pins.items())
    (FOLDER / "targets.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
