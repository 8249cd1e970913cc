"""Inside a host: a family's whole row of the conformance table, check by check, as JSON.

Arguments: a folder, then names of families (none: every one that this host has). A check is ``passed``,
``refused`` (our own sentence, before anything is changed), ``failed``, or ``not run`` where what it builds on
was not there. One line of JSON a family is printed when it is done; ``conformance.json`` holds all.

Checks, in this order: what the presets take is what is pinned (``targets.json``); merged = live; an adaptive
gate acts; adapters chained act together, in either order; two fused are the two chained; training lowers the
loss; the file acts as the adapter; a stopped run that goes on ends in the same bits; the base is the same to
the bit after all that; the exported LoRA in the host's own loader is our adapter; gradients in every
checkpointing mode are right.
"""

import contextlib
import json
import logging
import re
import shutil
import sys
import time
import traceback
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfyui_version import __version__
from inside_apply_lib import FOLDER, leftovers, pack
from inside_apply_models import ADAPTIVE, LORA, new
from inside_catalogue import CATALOGUE, WITHOUT, kind_of, listed, unknown
from inside_gradients import check as check_gradients
from inside_train_lib import RUNS, SAVED, at_step, train

adapter_file, applying = pack("spectral_core.files.adapter_file"), pack("nodes.host.apply.adapters")
events, fitting = pack("spectral_core.training.runs.events"), pack("nodes.host.files.fitting")
export, fusion = pack("spectral_core.files.lora_export"), pack("spectral_core.fusion")
layers, roles = pack("nodes.host.training.layers"), pack("spectral_core.attach.roles")
targets = pack("spectral_core.attach.targets")
Refused = pack("spectral_core.errors").SpectralAdapterError
PINNED = json.loads(Path(__file__).with_name("targets.json").read_text(encoding="utf-8"))
CLOSE = 2e-4  # of the largest value, after two steps in float32
ACTS = 1e-3
STEPS, STOP = 4, 3


def far(one, two):
    return float((one - two).abs().max() / two.abs().max())


def pattern(path):
    return re.sub(r"\.\d+(?=[.\[]|$)", ".N", path)


def taken(patcher):
    """What each preset takes: how many of the linear layers, and the layers by what they are for."""
    _, share = layers.chosen(patcher, "all-linear")
    of, count = {}, {"linear": int(share.split()[4])}
    for part, tree in zip(("unet", "diffusion_model"), layers._unet_and_rest(patcher), strict=True):
        if not tree._modules:
            continue
        sizes = {}
        for path, module in targets.modules_by_path(tree).items():
            shape = targets.layer_shape(module)
            if shape is not None and not shape.kernel:
                sizes[path] = shape.weight_shape
        found = roles.roles(sizes, targets.modules_by_path(tree))
        of |= {f"{part}.{path}": found.get(path, "neither") for path in sizes}
    for preset in ("attention", "attention+mlp", "all-linear"):
        chosen = layers.chosen(patcher, preset)[0]
        wanted = targets.PRESETS[preset]
        assert set(chosen) == {n for n, role in of.items() if wanted is None or role in wanted}, preset
        count[preset] = len(chosen)
    by_role = {}
    for name, role in of.items():
        by_role.setdefault(role, {}).setdefault(pattern(name), 0)
    return count | {"layers": {role: sorted(names) for role, names in sorted(by_role.items())}}


class Row:
    def __init__(self, name):
        self.name, self.family = name, CATALOGUE[name]
        self.cells = {}

    def cell(self, what, check, *needs):
        """One check; what it says becomes the cell."""
        missing = [n for n in needs if self.cells[n]["state"] != "passed"]
        if missing:
            first = self.cells[missing[0]]
            if first["state"] == "refused":
                self.cells[what] = {"state": "refused", "said": first["said"]}
            else:
                self.cells[what] = {"state": "not run", "said": f"{missing[0]} did not pass"}
            return
        try:
            with torch.inference_mode():
                said = check()
            self.cells[what] = {"state": "passed", **({"said": said} if said else {})}
        except Refused as refused:
            self.cells[what] = {"state": "refused", "said": str(refused).replace(str(FOLDER), "")}
        except BaseException as error:
            if "-v" in sys.argv:
                traceback.print_exc()
            text = str(error).replace(str(FOLDER), "").split("\n")[0][:300]
            self.cells[what] = {"state": "failed", "said": f"{type(error).__name__}: {text}"}

    def sampled(self, patcher):
        return self.family.sampled(patcher)

    def acting(self, adapter, mode="auto", strength=1.0, on=None):
        return applying.apply(adapter, on or self.patcher, None, strength, 1.0, mode).model

    def untouched(self):
        """The base draws what a model draws that no adapter was ever on."""
        fresh = self.sampled(self.family.patcher())
        assert torch.equal(fresh, self.base), "an adapter that was on first is left in the base's picture"

    def same(self):
        assert torch.equal(self.sampled(self.patcher), self.base), "the base draws another picture"
        state = self.patcher.model.state_dict()
        changed = [key for key, value in self.weights.items() if not torch.equal(state[key], value)]
        assert not changed, f"{len(changed)} weights changed, such as {changed[0]}"
        assert leftovers(self.patcher.model) == [], "replaced forwards are left"

    def run(self):
        with torch.inference_mode():
            self.patcher = self.family.patcher()
            shapes = layers.chosen(self.patcher, "attention+mlp")[0]
            self.chosen = dict(layers.BaseWeights(self.patcher, shapes))
            for mode in ("live", "merged"):  # before the base has drawn: what a model keeps is of its own
                with contextlib.suppress(Refused):
                    self.sampled(self.acting(new(self.chosen, LORA, size=0.2), mode))
            self.base = self.sampled(self.patcher)
            assert torch.isfinite(self.base).all() and self.base.std() > 0
            self.weights = {k: v.clone() for k, v in self.patcher.model.state_dict().items()}
            self.untouched()
        self.cell("targets", self.targets)
        self.cell("merged = live", self.merged)
        self.cell("adaptive", self.adaptive)
        self.cell("chained", self.chained)
        self.cell("fused", self.fused)
        self.cell("trained", self.trained)
        self.cell("reloaded", self.reloaded, "trained")
        self.cell("resumed", self.resumed, "trained")
        self.cell("exported", self.exported)
        self.cell("gradients", self.gradients, *(["trained"] if self.is_refused("trained") else []))
        self.cell("base identical", self.same)
        return self.cells

    def is_refused(self, what):
        return self.cells[what]["state"] == "refused"

    def targets(self):
        now = taken(self.patcher)
        pinned = PINNED.get(self.name)
        self.taken = now
        assert now == pinned, f"found {now}, pinned {pinned}" if pinned else "not pinned"
        return f"{now['attention']}, {now['attention+mlp']}, {now['all-linear']} of {now['linear']}"

    def merged(self):
        ours = new(self.chosen, LORA, size=0.2)
        one, two = (self.sampled(self.acting(ours, mode, 0.7)) for mode in ("merged", "live"))
        assert far(one, two) < CLOSE, f"{far(one, two):.1e} apart"
        assert far(two, self.base) > ACTS, f"acts by {far(two, self.base):.1e} only"
        return f"{far(one, two):.0e}"

    def adaptive(self):
        ours = applying.apply(new(self.chosen, ADAPTIVE, size=0.2), self.patcher, None, 1.0, 1.0)
        assert ours.mode == "live" and far(self.sampled(ours.model), self.base) > ACTS

    def chained(self):
        one, two = new(self.chosen, ADAPTIVE, size=0.2), new(self.chosen, LORA, seed=3, size=0.2)
        both = self.sampled(self.acting(two, "live", on=self.acting(one)))
        turned = self.sampled(self.acting(one, on=self.acting(two, "live")))
        alone = self.sampled(self.acting(one))
        assert far(both, turned) < CLOSE, f"another order: {far(both, turned):.1e}"
        assert far(both, alone) > ACTS and far(both, self.base) > ACTS

    def fused(self):
        one, two = (new(self.chosen, LORA, seed=s, size=0.2) for s in (1, 2))
        fused = self.sampled(self.acting(fusion.fuse([one, two], "sum", [1.0, 1.0]).adapter))
        chained = self.sampled(self.acting(two, on=self.acting(one)))
        assert far(fused, chained) < 1e-3, f"{far(fused, chained):.1e} apart"
        return f"{far(fused, chained):.0e}"

    @property
    def given(self):
        words = [[self.family.words(7)[0]], [self.family.words(8)[0]]]
        latents = {"samples": self.family.encoded(2, 5)}
        given = {"latents": latents, "conditioning": words, "targets": "attention", "steps": STEPS}
        given |= {"method": "foura", "batch_size": 1, "checkpoint_every": 2, "target_open": 0.0}
        return given | {"learning_rate": self.family.rate}

    def trained(self):
        for folder in (SAVED, RUNS):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            self.adapter = train(self.patcher, run_name=self.run_of("L"), **self.given)[0]
        except AssertionError as error:  # refused before anything: the model is loaded as it was
            raise error.__context__ if isinstance(error.__context__, Refused) else error  # noqa: B904
        learned, still = self.lowered("L", "N", self.given)
        if learned >= still:  # a few steps may not show it: each has noise of its own
            more = {**self.given, "steps": 4 * STEPS}
            train(self.patcher, run_name=self.run_of("L longer"), **more)
            learned, still = self.lowered("L longer", "N longer", more)
        assert learned < (1 - 1e-6) * still, f"loss {still:.8g} to {learned:.8g}"
        assert far(self.sampled(self.acting(self.adapter)), self.base) > 1e-5
        return f"{100 * (learned / still - 1):+.2g} %"

    def lowered(self, run, beside, given):
        """The loss at the end of a run, and of the same one that hardly learns."""
        train(self.patcher, run_name=self.run_of(beside), **{**given, "learning_rate": 1e-9})
        return [sum(losses(self.run_of(r))[-given["steps"] // 2 :]) for r in (run, beside)]

    def run_of(self, word):
        return f"{self.name} {word}"

    def reloaded(self):
        back = adapter_file.load(SAVED / f"{self.run_of('L')}.safetensors")
        one, two = (self.sampled(self.acting(adapter)) for adapter in (back, self.adapter))
        assert torch.equal(one, two), f"the file acts otherwise by {far(one, two):.1e}"

    def resumed(self):
        undo = at_step(STOP + 1, comfy.model_management.interrupt_current_processing)
        try:
            train(self.patcher, run_name=self.run_of("R"), **self.given)
        except BaseException as stop:
            if "Interrupt" not in type(stop).__name__:
                raise
        else:
            raise AssertionError("it was not stopped")
        finally:
            undo()
            comfy.model_management.interrupt_current_processing(False)
        again = train(self.patcher, run_name=self.run_of("R"), **self.given)[0]
        for name, layer in self.adapter.layers.items():
            for key, value in layer.terms[0].params.items():
                assert torch.equal(value, again.layers[name].terms[0].params[key]), f"{name} {key} differs"

    def exported(self):
        ours = new(self.chosen, ADAPTIVE, size=0.2)
        file = FOLDER / "exported.safetensors"
        names = fitting.file_names(ours, self.patcher)
        export.export_lora(ours, file, "kohya", torch.float32, overwrite=True, names=names)
        tensors = comfy.utils.load_torch_file(str(file), safe_load=True)
        with Unheard() as unheard:
            theirs = comfy.sd.load_lora_for_models(self.patcher, None, tensors, 1.0, 0.0)[0]
        assert not unheard.said, unheard.said[0]
        frozen = self.acting(fusion.freeze(ours), "merged")
        one, two = self.sampled(theirs), self.sampled(frozen)
        assert far(one, two) < CLOSE, f"{far(one, two):.1e} apart"
        assert far(one, self.base) > ACTS
        return f"{far(one, two):.0e}"

    def gradients(self):
        return f"{check_gradients(self.name, self.patcher):.0e}"


class Unheard(logging.Handler):
    """What the host's loader complains about: keys that it does not know."""

    def __enter__(self):
        self.said = []
        logging.getLogger().addHandler(self)
        return self

    def emit(self, record):
        if record.levelno >= logging.WARNING:
            self.said.append(record.getMessage())

    def __exit__(self, *_):
        logging.getLogger().removeHandler(self)


def losses(run):
    found = events.read_events(RUNS / run / "events.jsonl")
    return [event["loss"] for event in found if event["event"] == "step"]


def main():
    names = [word for word in sys.argv[3:] if not word.startswith("-")] or list(CATALOGUE)
    whole = {"host": __version__, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    whole |= {"families": {}, "without": {n: why for n, why in WITHOUT.items() if n in listed()}}
    whole |= {"unknown": unknown(), "catalogue": [n for n, f in CATALOGUE.items() if f.exists()]}
    pins = {}
    (FOLDER / "conformance.json").write_text(json.dumps(whole), encoding="utf-8")
    for name in names:
        if not CATALOGUE[name].exists():
            continue
        started, row = time.perf_counter(), Row(name)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                cells = row.run()
        except Exception as error:
            traceback.print_exc()
            cells = {"sampled": {"state": "failed", "said": f"{type(error).__name__}: {str(error)[:300]}"}}
        pins[name] = getattr(row, "taken", None)
        whole["families"][name] = {"class": CATALOGUE[name].kind, "kind": kind_of(name), "checks": cells}
        states = [cell["state"] for cell in cells.values()]
        odd = {w: c["said"] for w, c in cells.items() if c["state"] != "passed"}
        passed, seconds = states.count("passed"), round(time.perf_counter() - started, 1)
        print(json.dumps({"family": name, "seconds": seconds, "passed": passed, **odd}), flush=True)
        comfy.model_management.unload_all_models()
        (FOLDER / "conformance.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
        (FOLDER / "taken.json").write_text(json.dumps(pins), encoding="utf-8")


if __name__ == "__main__":
    main()
