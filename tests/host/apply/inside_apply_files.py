"""Inside a host: adapters from files; the host's own Load LoRA on files of ours, compact files, memory.

``inside_apply_checks.py`` runs the checks.
"""

import gc
import logging
import weakref
from dataclasses import replace

import comfy.model_management as management
import comfy.sd
import comfy.utils
import comfy.weight_adapter
import folder_paths
import torch
from inside_apply_lib import FOLDER, adapter, pack, predict
from inside_apply_models import close, demo, inputs, new

applying = pack("nodes.host.apply.adapters")
base_weights = pack("nodes.host.model.base_weights")
errors = pack("spectral_core.errors")
factors = pack("nodes.host.apply.folded_cache")
fileformat = pack("spectral_core.files.adapter_file")
fusion = pack("spectral_core.fusion")
methods = pack("spectral_core.methods")


class Log(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def the_hosts_load_lora_takes_our_files():
    """Only once it is registered: as weight patches, an adaptive gate frozen, with one line in the log."""
    in_load_lora = pack("nodes.host.apply.in_load_lora")
    model, clip = demo.load_model(), demo.load_clip()
    base = predict(model, *inputs())[2]
    tokens = clip.tokenize("a large red star")
    log, known = Log(), list(comfy.weight_adapter.adapters)
    logging.getLogger().addHandler(log)
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.INFO)
    loaders = [getattr(comfy.sd, n, None) for n in ("load_lora_for_models", "load_bypass_lora_for_models")]
    try:
        for name in ("spectral-a", "foura-adaptive", "foura-frozen", "lora", "text-adaptive"):
            ours = replace(adapter(name), strength=0.8)
            path = fileformat.save(
                ours, FOLDER / f"with config {name}.safetensors", config_tensor=True, overwrite=True
            )
            assert fileformat.load(path).content_hash == ours.content_hash
            tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
            frozen = applying.apply(fusion.freeze(ours), model, clip, 0.7, 0.7, "merged")
            expected = predict(frozen.model, *inputs())[2]
            words = frozen.clip.encode_from_tokens(tokens)
            assert not (torch.equal(expected, base) and torch.equal(words, clip.encode_from_tokens(tokens)))
            plain = loaders[0](model, clip, tensors, 0.7, 0.7)
            assert torch.equal(predict(plain[0], *inputs())[2], base), "taken without being asked"
            in_load_lora.install()
            in_load_lora.install()
            log.lines.clear()
            for load in filter(None, loaders):
                patched = load(model, clip, tensors, 0.7, 0.7)
                found = predict(patched[0], *inputs())[2]
                assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), (name, load.__name__)
                if load is loaders[0]:
                    close(patched[1].encode_from_tokens(tokens), words, name, 1e-4)
            said = [line for line in log.lines if line.startswith("spectral adapters: Load LoRA")]
            assert len(said) == 1 and ("frozen" in said[0]) == ("adaptive" in name), said
            assert not any("not loaded" in line for line in log.lines), log.lines[:3]
            comfy.weight_adapter.adapters[:] = known
            management.unload_all_models()
            assert torch.equal(predict(model, *inputs())[2], base)
        in_load_lora.install()
        name, layer = next(iter(adapter("lora").layers.items()))
        path = fileformat.save(
            replace(adapter("lora"), layers={f"{name}[0:{layer.shape.out_features}]": layer}),
            FOLDER / "rows.safetensors", config_tensor=True, overwrite=True,
        )  # fmt: skip
        try:
            loaders[0](model, None, comfy.utils.load_torch_file(str(path), safe_load=True), 1.0, 0.0)
        except errors.SpectralAdapterError as error:
            assert name in str(error) and "rows" in str(error), str(error)
        else:
            raise AssertionError("rows of a fused weight were taken for the whole")
    finally:
        comfy.weight_adapter.adapters[:] = known
        logging.getLogger().removeHandler(log)
        logging.getLogger().setLevel(level)


def _in_folder(name):
    """A file of this test's folder as the loaders find it."""
    folder_paths.folder_names_and_paths["spectral_adapters"] = ([str(FOLDER)], {".safetensors"})
    return f"{name}.safetensors"


def compact_files():
    """A compact Spectral R is completed with the connected model's own weights, also while it is patched."""
    model = demo.load_model()
    names = [n for n in adapter("spectral-a").layers if ".attn1." in n][:4]
    weight = base_weights.source({n: adapter("spectral-a").layers[n].shape for n in names}, model, None)
    ours = new({n: weight(n) for n in names}, methods.SpectralRConfig((0, 1, 2, 3)), size=0.3)
    whole = fileformat.save(ours, FOLDER / "whole.safetensors", overwrite=True)
    small = fileformat.save(ours, FOLDER / "compact.safetensors", compact=True, overwrite=True)
    assert small.stat().st_size < whole.stat().st_size
    predict(applying.apply(adapter("spectral-a"), model, None, 3.0, 1.0, "merged").model, *inputs())
    node = pack("nodes.load").LoadSpectralAdapter()
    patched = node.load(_in_folder("compact"), 1.0, 1.0, model=model)["result"][0]
    expected = predict(applying.apply(ours, model, None, 1.0, 1.0).model, *inputs())[2]
    found = predict(patched, *inputs())[2]
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max(), (found - expected).abs().max()
    base = predict(model, *inputs())[2]
    assert (expected - base).abs().max() > 1e-2 * base.abs().max()
    try:
        node.load(_in_folder("compact"), 1.0, 1.0)
    except errors.SpectralAdapterError as error:
        assert "compact" in str(error) and "connect the model" in str(error), str(error)
    else:
        raise AssertionError("a compact file without its model")


def memory_of_adapters_from_files():
    """Held once while it acts, gone with its node and outputs; the file's own tensors only if asked for."""
    model = demo.load_model()
    for name in ("spectral-a", "foura-adaptive"):
        node = pack("nodes.load").LoadFouRA()
        result = node.load(_in_folder(name), 1.0, 1.0, model=model)["result"]
        predict(result[0], *inputs())
        layers = [weakref.ref(layer) for layer in result[2].layers.values()]
        kept, folded = 0, 0
        for layer in result[2].layers.values():
            pair = factors.folded("a", layer, (0,))
            folded += sum(4 * factor.numel() for factor in pair)
            kept += sum(value.nbytes for value in layer.terms[0].params._held.values())
        assert kept <= 0.3 * folded, (name, kept, folded)
        first = result[2].layers[next(iter(result[2].layers))]
        assert torch.equal(*(a.terms[0].params["a_u" if name == "spectral-a" else "a"] for a in (
            first, adapter(name).layers[next(iter(result[2].layers))])))  # fmt: skip
        del result, first, layer, pair
        gc.collect()
        assert all(ref() is not None for ref in layers), "the node keeps it for the next strength"
        del node
        predict(model, *inputs())
        gc.collect()
        assert all(ref() is None for ref in layers), (name, sum(ref() is not None for ref in layers))


def rotation_follows_its_strength():
    """A rotation is folded for its strength: merged is live at each, and half is not half of it."""
    model = demo.load_model()
    names = [n for n in adapter("spectral-a").layers if ".attn1." in n][:4]
    weight = base_weights.source({n: adapter("spectral-a").layers[n].shape for n in names}, model, None)
    config = methods.SpectralRConfig((0, 1, 2, 3), strength_law="rotation")
    ours = new({n: weight(n) for n in names}, config, size=0.5)
    base = predict(model, *inputs())[2]
    found = {}
    for strength in (1.0, 0.5, 1.0):
        merged, live = (
            predict(applying.apply(ours, model, None, strength, 1.0, mode).model, *inputs())[2]
            for mode in ("merged", "live")
        )
        assert (merged - live).abs().max() <= 1e-4 * live.abs().max(), strength
        assert torch.equal(found.setdefault(strength, live), live), strength
    whole, half = found[1.0] - base, found[0.5] - base
    assert (half - 0.5 * whole).abs().max() > 1e-2 * whole.abs().max()
    assert (half - whole).abs().max() > 0.1 * whole.abs().max()


CHECKS = [
    rotation_follows_its_strength,
    the_hosts_load_lora_takes_our_files,
    compact_files,
    memory_of_adapters_from_files,
]
