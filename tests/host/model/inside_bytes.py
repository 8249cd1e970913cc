"""Inside a host: the bytes of a training on quantised weights: of the base, of the adapter with its gradients
and AdamW's two moments, and of what is kept between the forward and the backward pass.

A Flux of 1/4 of Flux.1's width, two blocks of each kind, at 512x512 pixels; LoRA of rank 16 on its
attentions and feed-forwards, in float32. Prints and writes one line of JSON a format.
"""

import gc
import json
from contextlib import ExitStack
from dataclasses import replace

import torch
from inside_apply_lib import FOLDER, pack
from inside_models import FAMILIES, FLUX
from inside_quantised import QUANT_ALGOS, quantised

adapters, attaching = pack("spectral_core.adapter.adapter"), pack("spectral_core.attach.attaching")
checkpointing = pack("spectral_core.training.engine.checkpointing")
layers, model = pack("nodes.host.training.layers"), pack("nodes.host.training.model")
lora = pack("spectral_core.methods").LoRAConfig

WIDE = {"hidden_size": 768, "num_heads": 6, "axes_dim": [16, 56, 56], "depth": 2, "depth_single_blocks": 2}
FAMILY = replace(FAMILIES["flux"], config=FLUX | WIDE, latent=(1, 16, 64, 64))
FORMS = (None, "float8_e4m3fn", "int8_tensorwise")
MODES = ("none", "selective", "full")
RANK = 16


def storages(tensors):
    """Address -> bytes of the memory of these tensors; of quantised ones that of their parts."""
    found = {}
    for tensor in tensors:
        parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) and parts:
            found |= storages(getattr(tensor, part) for part in parts)
        elif tensor.layout == torch.strided and tensor.device.type == "cpu":
            try:
                storage = tensor.untyped_storage()
            except (NotImplementedError, RuntimeError):  # a wrapper without memory of its own
                continue
            found[storage.data_ptr()] = storage.nbytes()
    return found


def base_of(root):
    """Address -> bytes of the weights as they lie there."""
    tensors = [*root.parameters(), *root.buffers()]
    whole = [t for t in tensors if not hasattr(t, "_qdata")]
    packed = [t for t in tensors if hasattr(t, "_qdata")]
    inside = [p for t in packed for p in (t._qdata, *vars(t._params).values()) if isinstance(p, torch.Tensor)]
    return storages([*whole, *inside])


def alive():
    gc.collect()
    return storages(t for t in gc.get_objects() if isinstance(t, torch.Tensor))


def kept(forward):
    """Bytes that are there after a forward pass and were not before it."""
    held, before = [], alive()

    def keep(tensor):
        held.append(getattr(tensor, "_qdata", tensor))  # autograd's own references are not Python's
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    now = alive() | storages(held)
    found = sum(n for at, n in now.items() if at not in before)
    loss.backward()
    return found


def measured(form):
    patcher = quantised(FAMILY, form)
    chosen = layers.chosen(patcher, "attention+mlp")[0]
    weights = {name: torch.zeros(shape.weight_shape) for name, shape in chosen.items()}
    adapter = adapters.create(weights, lora(RANK), None, torch.Generator().manual_seed(0))
    row = {"form": form or "bf16"}
    with model.ready(patcher, "bf16", FAMILY.noise().shape) as ready, ExitStack() as undo:
        rows = model.Conditions(ready.patcher, {0: FAMILY.words(7)[0]}, [FAMILY.noise()[0]])
        denoiser, levels = model.Denoiser(ready, rows), torch.tensor([len(ready.noise.sigmas) // 2])
        trees = layers.trees(ready.patcher)
        parts = [undo.enter_context(attaching.attach(trees[p], adapter, p, True)) for p in adapter.parts]
        trained = [p for part in parts for p in part.parameters()]
        row |= {"base": sum(base_of(ready.root).values()), "adapter": 4 * sum(p.nbytes for p in trained)}

        def forward():
            return denoiser(FAMILY.noise(), levels, [0]).square().mean()

        for mode in MODES:
            with checkpointing.checkpointed([ready.root], mode, recast=ready.streams.again):
                kept(forward)  # what writes in place is known after the first
                for p in trained:
                    p.grad.zero_()
                row[mode] = kept(forward)
        assert sum(base_of(ready.root).values()) == row["base"], "the base has grown"
    return row


if __name__ == "__main__":
    found = []
    for form in FORMS:
        if form is None or form in QUANT_ALGOS:
            with torch.inference_mode():
                found.append(measured(form))
            print(json.dumps(found[-1]), flush=True)
    (FOLDER / "bytes.json").write_text(json.dumps(found), encoding="utf-8")
