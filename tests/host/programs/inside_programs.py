"""Inside a host: does what ``test_programs.py`` says, a line of JSON each, and answers with a line.

One command does what one node does. Numbers choose among what is there, so that every command can be tried at
any time. An answer is ``{"said": …}``: empty, the project's own refusal, or ``fault`` with a traceback. The
command ``end`` ends a program: everything is dropped, and what must be as it was before is compared.
"""

import gc
import json
import sys
import traceback

import comfy.model_management as management
import comfy.sample
import comfy.sd
import comfy.utils
import folder_paths
import torch
from inside_apply_lib import FOLDER, condition, leftovers, pack

PROTOCOL, sys.stdout = sys.stdout, sys.stderr  # the host prints
KINDS = ("demo", "sd1")
STEPS = 2
GROWTH = 4 << 20  # bytes of tensors that may be left: the records of gates are few, and kept

folder_paths.set_output_directory(str(FOLDER / "output"))
folder_paths.add_model_folder_path("loras", str(FOLDER / "output" / "loras"))
nodes = pack("nodes").NODE_CLASS_MAPPINGS
error = pack("spectral_core.errors").SpectralAdapterError
create = pack("spectral_core.adapter.adapter").create
module = pack("spectral_core.adapter.adapter")
methods = pack("spectral_core.methods")
adapter_file = pack("spectral_core.files.adapter_file")
paths = pack("nodes.host.files.paths")


def node(name):
    return nodes[f"SpectralAdapters_{name}"]()


# --- what there is before any program --------------------------------------------------------------------


def base_models():
    """MODEL and CLIP of the demo; MODEL of the tiny SD 1, whose text encoder would only take time."""
    demo = pack("nodes.host.demo.model")
    found = {"demo": (demo.load_model(), demo.load_clip())}
    model = comfy.sd.load_checkpoint_guess_config(
        str(FOLDER / "sd1.ckpt"), output_vae=False, output_clip=False
    )[0]
    found["sd1"] = (model, None)
    return found


PLACES = {  # a block with attention: diffusers' name and the host's
    "demo": ("unet.down_blocks.1.attentions.0.transformer_blocks.0", "input_blocks.3.1.transformer_blocks.0"),
    "sd1": ("unet.down_blocks.0.attentions.0.transformer_blocks.0", "input_blocks.1.1.transformer_blocks.0"),
}


def trained(weights, config, seed):
    """A new adapter with every number moved off its start."""
    generator = torch.Generator().manual_seed(seed)
    made = create(weights, config, generator=generator)

    def moved(name, term):
        keys = methods.METHODS[config.method].trainable(config)
        params = {
            k: v + 0.1 * torch.randn(v.shape, generator=generator) if k in keys else v
            for k, v in term.params.items()
        }
        return module.Term(term.config, params, term.weight)

    return made.map_terms(moved).with_provenance(name=f"{config.method}{seed}", trigger_words=("cat",))


def write_files():
    """Adapters of every method for the demo and for SD 1, where Load FouRA finds them."""
    folder = FOLDER / "output" / "spectral_adapters"
    folder.mkdir(parents=True, exist_ok=True)
    (FOLDER / "output" / "loras").mkdir(exist_ok=True)
    for kind, (ours, theirs) in PLACES.items():
        state = MODELS[kind][0].model.diffusion_model.state_dict()
        weights = {
            f"{ours}.{each}": state[f"{theirs}.{each}.weight"].float().clone()
            for each in ("attn1.to_q", "attn2.to_k", "attn2.to_v")
        }
        for seed, config in enumerate(CONFIGS):
            adapter_file.save(trained(weights, config, seed), folder / f"{kind}-{seed}.safetensors")


CONFIGS = (
    methods.LoRAConfig(2),
    methods.FouRAConfig(2, gate="none"),
    methods.FouRAConfig(2, gate="adaptive"),
    methods.SpectralAConfig((0, 1)),
    methods.SpectralRConfig((2, 3)),
)


# --- a program -------------------------------------------------------------------------------------------


class Program:
    """What the commands of a program have made so far."""

    def __init__(self):
        self.adapters, self.chain = [], ()
        self.models = [(kind, *MODELS[kind]) for kind in KINDS]  # kind, MODEL, CLIP

    def adapter(self, number):
        if not self.adapters:
            self.load(number, 0, None)
        return self.adapters[number % len(self.adapters)]

    def model(self, number):
        return self.models[number % len(self.models)]

    def keep(self, kind, model, clip):
        if model is not None and hasattr(model, "clone"):
            self.models.append((kind, model, clip if hasattr(clip, "clone") else None))

    def load(self, file, strength, on):
        """Load FouRA, alone or onto a model."""
        names = [n for n in paths.list_adapters() if not n.startswith("(")]
        name = names[file % len(names)]
        if on is None:
            done = node("LoadFouRA").load(name, 1.0, 1.0)["result"]
        else:
            kind, model, clip = self.model(on)
            done = node("LoadFouRA").load(name, strength, strength, model, clip)["result"]
            self.keep(kind, done[0], done[1])
        self.adapters.append(done[2])

    def load_lora(self, file, on, strength):
        """The host's own Load LoRA with an exported file, or Load LoRA as Adapter."""
        names = paths.listing(paths.LORAS)
        if not names:
            return
        name = names[file % len(names)]
        if on is None:
            self.adapters.append(node("LoadLoRAAsAdapter").load(name)["result"][0])
            return
        kind, model, clip = self.model(on)
        tensors = comfy.utils.load_torch_file(str(paths.resolve(name, paths.LORAS).path), safe_load=True)
        self.keep(kind, *comfy.sd.load_lora_for_models(model, clip, tensors, strength, strength))

    def strength(self, adapter, model, clip, start, end, curve, points, blocks):
        done = node("AdapterStrength").scale(
            self.adapter(adapter), model, clip, start, end, curve, points, blocks, self.chain
        )["result"]
        self.adapters.append(done[0])
        self.chain = done[1][-4:]

    def stack(self, rows):
        names = [n for n in paths.list_adapters() if not n.startswith("(")]
        lines = [f"{names[file % len(names)]} | {strength} | 1 | {curve}" for file, strength, curve in rows]
        text = "\n".join(lines)
        self.chain = node("AdapterStack").collect(text)["result"][0][-4:]

    def fuse(self, first, second, method, weights, rank, freeze):
        done = node("FuseAdapters").fuse(
            self.adapter(first), self.adapter(second), method, *weights, rank, freeze
        )
        self.adapters.append(done["result"][0])

    def resize(self, adapter, rank):
        self.adapters.append(node("ResizeAdapter").resize(self.adapter(adapter), rank)["result"][0])

    def apply(self, adapter, on, mode, strength, chained):
        kind, model, clip = self.model(on)
        adapters = self.chain if chained and self.chain else None
        done = node("ApplyAdapter").apply(
            self.adapter(adapter), strength, strength, mode, "delta", model, clip, adapters
        )["result"]
        self.keep(kind, done[0], done[1])

    def save(self, adapter, precision):
        if len(paths.listing()) < 30:
            node("SaveAdapter").save(self.adapter(adapter), "made/a", precision)

    def export(self, adapter, naming, drop):
        if len(paths.listing(paths.LORAS)) < 30:
            node("ExportAdapterAsLoRA").export(self.adapter(adapter), "loras/a", naming, "fp16", drop)

    def report(self, adapter):
        node("AdapterReport").report(self.adapter(adapter))

    def sample(self, on, cancel):
        """Two steps; the same again gives the same. cancel: stopped before the step of this number."""
        kind, model, clip = self.model(on)
        first = sampled(kind, model, clip, cancel)
        if cancel is None:
            again = sampled(kind, model, clip)
            assert torch.equal(torch.isnan(first), torch.isnan(again)), "twice is not the same"
            assert torch.equal(first.nan_to_num(), again.nan_to_num()), "twice is not the same"


def sampled(kind, model, clip, cancel=None):
    words = PLAIN[kind]
    if clip is not None:
        words = [[*clip.encode_from_tokens(clip.tokenize("a red star"), return_pooled=True)]]
        words = [[words[0][0], {"pooled_output": words[0][1]}]]
    latent = torch.zeros(1, 4, 8, 8)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))

    def stop(step, *_):
        if step == cancel:
            raise management.InterruptProcessingException

    try:
        return comfy.sample.sample(
            model, noise, STEPS, 1.0, "euler", "simple", words, words, latent,
            callback=None if cancel is None else stop, disable_pbar=True, seed=1,
        )  # fmt: skip
    except management.InterruptProcessingException:
        return latent


def end():
    """Everything is dropped; "" or what is not as it was."""
    management.cleanup_models()
    problems = []
    for kind in KINDS:
        model, clip = MODELS[kind]
        if not torch.equal(sampled(kind, model, clip), BASE[kind]):
            problems.append(f"{kind}: samples differently")
        if any(not torch.equal(v, WEIGHTS[kind][k]) for k, v in model.model.state_dict().items()):
            problems.append(f"{kind}: other weights")
        left = leftovers(model.model)
        left += [n for n, m in model.model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
        if left:
            problems.append(f"{kind}: changed modules {left[:3]}")
    gc.collect()
    if (grown := tensor_bytes() - BYTES) > GROWTH:
        problems.append(f"{grown} bytes of tensors are left")
    return "; ".join(problems)


def tensor_bytes():
    """Of every tensor that is alive, shared memory counted once."""
    found = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and not each.is_meta:
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def answer(line):
    global PROGRAM
    given = json.loads(line)
    command = given.pop("do")
    try:
        with torch.inference_mode():
            if command == "begin":
                PROGRAM = Program()
                return {}
            if command == "end":
                PROGRAM = None
                return {"said": end(), "bytes": tensor_bytes() - BYTES}
            getattr(PROGRAM, command)(**given)
        return {}
    except error as refused:
        return {"refused": str(refused)}
    except Exception:
        return {"said": traceback.format_exc()[-3000:]}
    finally:
        management.interrupt_current_processing(False)


with torch.inference_mode():
    MODELS = base_models()
    write_files()
    PLAIN = {"demo": condition(1, 128), "sd1": condition(1, 768)}
    WEIGHTS = {k: {n: v.clone() for n, v in m.model.state_dict().items()} for k, (m, _) in MODELS.items()}
    BASE = {kind: sampled(kind, *MODELS[kind]) for kind in KINDS}
    assert all(bool(torch.isfinite(found).all()) for found in BASE.values())
    gc.collect()
    gc.freeze()  # what is there now is looked at no more: quicker, and all tensors that are found are new
    BYTES = tensor_bytes()
PROGRAM = None
print(json.dumps({"ready": True}), file=PROTOCOL, flush=True)
for line in sys.stdin:
    print(json.dumps(answer(line)), file=PROTOCOL, flush=True)
