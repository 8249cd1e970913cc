"""Inside a host: training on small random models of SD 1's and SDXL's kind, of the host's own classes."""

import comfy.model_patcher
import comfy.model_sampling
import comfy.sample
import comfy.supported_models
import torch
from inside_apply_lib import pack
from inside_train_lib import RUNS, train
from inside_unets import SD15, UNET

applying = pack("nodes.host.apply.adapters")
slider_node = pack("nodes.slider").ConceptSlider
events = pack("spectral_core.training.runs.events")

SD1 = SD15 | {"model_channels": 32}
SDXL = UNET | {
    "model_channels": 32, "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [0, 2],
    "transformer_depth_middle": 2, "transformer_depth_output": [0, 0, 2, 2], "num_head_channels": 16,
    "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 2816,
}  # fmt: skip


def made(kind, config):
    settings = kind({**config, "dtype": torch.float32})
    settings.set_inference_dtype(torch.float32, None)
    model = settings.get_model({}, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    for value in model.diffusion_model.parameters():
        size = value[0].numel() ** -0.5 if value.dim() > 1 else 0.1
        value.data = torch.randn(value.shape, generator=generator) * size
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def words():
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(1, 7, 64, generator=generator)
    return [[states, {"pooled_output": torch.randn(1, 1280, generator=generator)}]]


def sampled(patcher):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    return comfy.sample.sample(
        patcher, noise, 3, 3.0, "euler", "simple", words(), words(), torch.zeros(1, 4, 8, 8),
        disable_pbar=True, seed=1,
    )  # fmt: skip


def losses(name):
    found = events.read_events(RUNS / name / "events.jsonl")
    return [event["loss"] for event in found if event["event"] == "step"]


def check(name, model):
    """With the same noise, a run that learns has a lower loss than one that hardly does; its adapter acts at
    once; the base is what it was to the bit."""
    base = sampled(model)
    weights = {k: v.clone() for k, v in model.model.state_dict().items()}
    latents = {"samples": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))}
    given = {"latents": latents, "conditioning": [words()], "targets": "attention"}
    given |= {"steps": 16, "method": "foura", "target_open": 0.0}  # closing gates takes longer than this
    adapter = train(model, run_name=f"{name} learns", **given)[0]
    train(model, run_name=f"{name} does not", **{**given, "learning_rate": 1e-9})
    learned, still = (sum(losses(f"{name} {what}")[-8:]) for what in ("learns", "does not"))
    print(f"  {name}: {still:.3f} to {learned:.3f}")
    assert learned < 0.999 * still
    assert all(layer.startswith("unet.") for layer in adapter.layers), list(adapter.layers)[:3]
    assert not torch.equal(sampled(applying.apply(adapter, model, None, 1.0, 1.0).model), base)
    assert torch.equal(sampled(model), base)
    after = model.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in weights.items())


def a_model_of_the_kind_of_sd1():
    check("sd1", made(comfy.supported_models.SD15, SD1))


def a_model_of_the_kind_of_sdxl():
    check("sdxl", made(comfy.supported_models.SDXL, SDXL))


class Words:
    """A CLIP that gives every text its own states."""

    def __init__(self, model):
        self.patcher = model  # only told apart by its numbers

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        generator = torch.Generator().manual_seed(1 + len(text))
        states = torch.randn(1, 7, 64, generator=generator)
        return [[states, {"pooled_output": torch.randn(1, 1280, generator=generator)}]]


def check_slider(name, model):
    """A slider that learns has a lower loss than one that hardly does; 1 and -1 move opposite ways."""
    base, latent = sampled(model), {"samples": torch.zeros(1, 4, 8, 8)}
    given = {
        "positive": "a long {}",
        "negative": "a {}",
        "neutral": "the {}",
        "preserve": "x",
        "method": "lora",
    }
    given |= {"rank": 4, "start": 0.0, "samples": 2, "sample_steps": 2, "latent": latent, "guidance": 1.0}

    def trained(what, rate):
        options, run = {"learning_rate": rate, "warmup": 0}, f"{name} {what}"
        return slider_node().train(model, Words(model), steps=20, run_name=run, options=options, **given)

    adapter = trained("learns", 0.01)["result"][0]
    trained("does not", 1e-9)
    learned, still = (sum(losses(f"{name} {what}")[-8:]) for what in ("learns", "does not"))
    print(f"  {name}: {still:.3f} to {learned:.3f}")
    assert learned < 0.999 * still
    assert adapter.provenance.training["slider"]["positive"] == "a long {}"
    moved = [sampled(applying.apply(adapter, model, None, s, 1.0).model) - base for s in (1.0, -1.0)]
    assert torch.nn.functional.cosine_similarity(*(m.flatten() for m in moved), dim=0) < 0
    assert torch.equal(sampled(model), base)


def a_slider_on_a_model_of_the_kind_of_sd1():
    check_slider("slider sd1", made(comfy.supported_models.SD15, SD1))


def a_slider_on_a_flow_model():
    model = made(comfy.supported_models.SD15, SD1)
    sampling = type("Flow", (comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST), {})
    model.add_object_patch("model_sampling", sampling(model.model.model_config))
    check_slider("slider flow", model)


FAMILY_CHECKS = [
    a_model_of_the_kind_of_sd1,
    a_model_of_the_kind_of_sdxl,
    a_slider_on_a_model_of_the_kind_of_sd1,
    a_slider_on_a_flow_model,
]
