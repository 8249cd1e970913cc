"""Inside a host: a small random model of a family, of the host's own classes, and how it is called."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import comfy.model_patcher
import comfy.sample
import comfy.supported_models as models
import torch

CPU = torch.device("cpu")
WORDS = 7


@dataclass(frozen=True)
class Family:
    """kind: the host's class. latent: shape of one example's latents. width: of the words' states. extra:
    more of a conditioning's options. state: what the host takes out of the file beside the weights. beside:
    shapes of what is sampled together with the latents (sound, a camera). pictures: shape of what the VAE
    gives, where the model takes it in another. rate: of learning."""

    kind: str
    config: dict
    latent: tuple
    width: int
    pooled: int = 0
    masked: bool = False
    extra: dict = field(default_factory=dict)
    state: dict = field(default_factory=dict)
    beside: tuple = ()
    pictures: tuple = ()
    rate: float = 0.01

    def exists(self):
        return hasattr(models, self.kind)

    def patcher(self):
        return patcher_of(getattr(models, self.kind), self.config, state=self.state)

    def named(self, device=CPU, dtype=torch.float32):
        """The model alone, as the host makes it; on the device ``meta`` without numbers."""
        return made_of(getattr(models, self.kind), self.config, dtype, self.state, device)

    def words(self, seed):
        generator = torch.Generator().manual_seed(seed)
        states = torch.randn(1, WORDS, self.width, generator=generator)
        options = dict(self.extra)
        if self.pooled:
            options["pooled_output"] = torch.randn(1, self.pooled, generator=generator)
        if self.masked:
            options["attention_mask"] = torch.ones(1, WORDS, dtype=torch.long)
        return [[states, options]]

    def noise(self, rows=1, seed=4):
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn((rows, *s[1:]), generator=generator) for s in (self.latent, *self.beside)]
        return drawn[0] if len(drawn) == 1 else nested(drawn)

    def encoded(self, rows=1, seed=4):
        """Latents as the VAE gives them."""
        if not self.pictures:
            return self.noise(rows, seed)
        return torch.randn((rows, *self.pictures[1:]), generator=torch.Generator().manual_seed(seed))

    def sampled(self, patcher, steps=2):
        """Latents after some steps with guidance."""
        noise = self.noise()
        torch.manual_seed(7)  # 0.3.64's ACE-Step never leaves its training mode: it drops out while it draws
        found = comfy.sample.sample(
            patcher, noise, steps, 3.0, "euler", "simple", self.words(5), self.words(6),
            noise * 0.0, disable_pbar=True, seed=1,
        )  # fmt: skip
        return torch.cat([t.flatten().float() for t in found.unbind()]) if self.beside else found.float()


def nested(tensors):
    """Several latents as one, as the newest hosts have them."""
    from comfy.nested_tensor import NestedTensor

    return NestedTensor(tensors)


def patcher_of(kind, config, dtype=torch.float32, state=None):
    """A MODEL on the CPU, its weights random and of a size that keeps activations near 1."""
    model = made_of(kind, config, dtype, state)
    generator = torch.Generator().manual_seed(2)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.numel() and value.is_floating_point() and name.startswith("diffusion_model"):
            size = value[0].numel() ** -0.5 if value.dim() > 1 else 0.1
            value.data = (torch.randn(value.shape, generator=generator) * size).to(value.dtype)
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def made_of(kind, config, dtype, state=None, device=CPU):
    """The host's model; options that an older host does not know yet are left out."""
    settings = kind({**config, "dtype": dtype})
    settings.unet_config |= config  # some classes put their full sizes over those of a file
    settings.set_inference_dtype(dtype, None)
    try:
        return settings.get_model({**(state or {})}, device=device)
    except TypeError as error:
        unknown = str(error).partition("unexpected keyword argument '")[2].rstrip("'")
        if unknown not in config:
            raise
        return made_of(kind, {k: v for k, v in config.items() if k != unknown}, dtype, state, device)


def drawn(*shape, seed=11):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seen():
    """What the host's vision encoder says about a picture."""
    return SimpleNamespace(penultimate_hidden_states=drawn(1, 5, 1280))


def seconds(features="learned"):
    """The weights with which Stable Audio tells lengths."""
    last = 0 if features == "expo" else 1
    table = {f"embedding.{last + (features == 'expo')}.weight": drawn(768, 257 - (features == "expo"))}
    table |= {f"embedding.{last + (features == 'expo')}.bias": drawn(768)}
    if features != "expo":
        table["embedding.0.weights"] = drawn(128)
    names = ("start", "total")
    return {f"conditioner.conditioners.seconds_{n}.embedder.{k}": v for n in names for k, v in table.items()}
