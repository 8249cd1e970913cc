"""Shared by the ``inside_train*`` scripts: folders, the node with its defaults, a model before and after."""

from pathlib import Path

import comfy.model_management as management
import folder_paths
import torch
from inside_apply_lib import FOLDER, condition, leftovers, pack, sample

folder_paths.set_output_directory(str(FOLDER / "output"))
folder_paths.set_input_directory(str(FOLDER / "input"))
SAVED = Path(folder_paths.get_output_directory(), "spectral_adapters")
RUNS = SAVED.with_name("spectral_adapters_runs")
errors = pack("spectral_core.errors")
train_node = pack("nodes.train").TrainAdapter
DEMO = {"resolution": 128, "warmup": 0, "batch_size": 2, "rank": 4, "steps": 10, "learning_rate": 0.01}
DEMO |= {"preserve_every": 0}  # a call of the model is a step: :func:`at_step` counts them


def train(model, **given):
    """:func:`call`; afterwards the model is unloaded and has its own forwards."""
    try:
        return call(model, **given)
    finally:
        loaded = [found.model for found in management.current_loaded_models]
        assert not any(found is not None and found.is_clone(model) for found in loaded)
        assert not leftovers(model.model)


def call(model, **given):
    """(adapter, curve, report) of the node, its inputs wrapped in lists as the executor does."""
    node = train_node()
    types = node.INPUT_TYPES()
    inputs = {**types["required"], **types["optional"]}
    values = {name: options["default"] for name, (_, options) in inputs.items() if "default" in options}
    given = {"images": "none", "model": model, "targets": "*mid_block*attn*", **DEMO, **given}
    values |= {name: value for name, value in given.items() if name in inputs}
    values["options"] = {name: value for name, value in given.items() if name not in inputs}
    lists = ("latents", "conditioning")
    wrapped = {k: v if k in lists and isinstance(v, list) else [v] for k, v in values.items()}
    return node.train(**wrapped)["result"]


def numbers(model):
    """Copies of every weight of a MODEL."""
    return {k: v.detach().clone() for k, v in model.model.state_dict().items()}


class Untouched:
    """A model before, to be compared with itself after."""

    def __init__(self, model, channels=4, width=128):
        self.model, self.width = model, width
        self.weights = numbers(model)
        self.flags = [p.requires_grad for p in model.model.parameters()]
        self.picture = self.sample()

    def sample(self):
        return sample(self.model, condition(width=self.width), steps=2)

    def check(self, flags=True):
        """flags: also of gradients, which the host's own patches take off the weights that they put back."""
        assert torch.equal(self.sample(), self.picture)
        after = numbers(self.model)  # with the model itself loaded, no clone of it
        assert after.keys() == self.weights.keys()
        assert all(torch.equal(after[k], v) for k, v in self.weights.items())
        assert not flags or [p.requires_grad for p in self.model.model.parameters()] == self.flags
        assert not leftovers(self.model.model)
        assert not getattr(management, "in_training", False)
        assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()


def refused(*parts, **given):
    """The node stops with our error, which names these parts, before anything is trained."""
    try:
        call(**given)
    except errors.SpectralAdapterError as error:
        print("  refused:", error)
        assert all(part in str(error) for part in parts), str(error)
        return
    raise AssertionError(f"not refused: {given}")


def at_step(step, do, and_later=False):
    """Have ``do`` called when the trainer asks for the denoiser in this call of it (``and_later``: and in
    every later one); the undo."""
    module = pack("nodes.host.training.model")
    own, calls = module.Denoiser.__call__, []

    def call(self, *args):
        calls.append(1)
        if len(calls) == step or (and_later and len(calls) > step):
            do()
        return own(self, *args)

    module.Denoiser.__call__ = call
    return lambda: setattr(module.Denoiser, "__call__", own)
