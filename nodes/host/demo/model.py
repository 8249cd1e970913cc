"""The embedded demo model as MODEL, CLIP and VAE of the host, made of the host's own classes.

Everything computes in float32: the model is so small that half precision saves nothing, and pictures then do
not depend on the machine's preferred precision.
"""

from __future__ import annotations

import functools
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import folder_paths
import torch

from ....spectral_core.errors import SpectralAdapterError
from . import weights as demo


def load() -> tuple[Any, Any, Any]:
    """(MODEL, CLIP, VAE), new objects with weights of their own at every call."""
    return load_model(), load_clip(), load_vae()


def empty_latent() -> dict[str, torch.Tensor]:
    """One empty latent of the model's own size, (1, 4, H, W)."""
    config = demo.read_config("unet")
    shape = (1, config["in_channels"], config["sample_size"], config["sample_size"])
    return {"samples": torch.zeros(shape, device=comfy.model_management.intermediate_device())}


def load_model() -> Any:
    """A patcher around the host's BaseModel; v-prediction, the latents of Stable Diffusion 1."""
    config = demo.read_config("unet")
    settings = _ModelConfig(demo.unet_config(config))
    settings.sampling_settings = demo.sampling_settings()
    settings.set_inference_dtype(torch.float32, None)
    model = settings.get_model({}, device=torch.device("cpu"))
    weights = demo.native_unet(demo.read_weights("unet"), config)
    _check(model.diffusion_model.load_state_dict(weights, strict=False), "unet")
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


class _ModelConfig(comfy.supported_models_base.BASE):  # type: ignore[misc]
    """What the host otherwise reads off a checkpoint."""

    unet_extra_config: dict[str, Any] = {}
    latent_format = comfy.latent_formats.SD15
    memory_usage_factor = 1.0

    def model_type(self, state_dict: Any, prefix: str = "") -> Any:
        return comfy.model_base.ModelType.V_PREDICTION


def load_clip() -> Any:
    """The host's CLIP with a small CLIP-L and the demo model's own tokenizer."""
    target = comfy.supported_models_base.ClipTarget(_tokenizer, _text_model)
    options = {"dtype": torch.float32, "initial_device": torch.device("cpu")}
    clip = comfy.sd.CLIP(
        target, embedding_directory=folder_paths.get_folder_paths("embeddings"), model_options=options
    )
    weights = demo.native_text(demo.read_weights("text_encoder"))
    # SD 1.x has no projection, and the host's class has one whose memory nobody fills
    weights["text_projection.weight"] = torch.eye(demo.read_config("text_encoder")["hidden_size"])
    outcome = clip.load_sd(
        {f"clip_l.transformer.{key}": tensor for key, tensor in weights.items()}, full_model=True
    )
    _check(outcome, "text_encoder", not_in_files=("clip_l.logit_scale",))
    return clip


def _tokenizer(embedding_directory: Any = None, tokenizer_data: Any = None) -> Any:
    kind = functools.partial(
        comfy.sd1_clip.SDTokenizer,
        str(demo.FOLDER / "tokenizer"),
        embedding_size=demo.read_config("text_encoder")["hidden_size"],
    )
    return comfy.sd1_clip.SD1Tokenizer(
        embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {}, tokenizer=kind
    )


def _text_model(device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> Any:
    kind = functools.partial(
        comfy.sd1_clip.SDClipModel,
        textmodel_json_config=demo.text_config(demo.read_config("text_encoder")),
        special_tokens=demo.special_tokens(),
        return_projected_pooled=False,
    )
    return comfy.sd1_clip.SD1ClipModel(
        device=device, dtype=dtype, model_options=model_options or {}, clip_model=kind
    )


def load_vae() -> Any:
    """The host's VAE. Its sizes cannot be told from the weights, so they are given."""
    config = demo.read_config("vae")
    weights = demo.native_vae(demo.read_weights("vae"), config)
    vae = comfy.sd.VAE(sd=weights, config={"params": demo.vae_config(config)}, dtype=torch.float32)
    own = set(vae.first_stage_model.state_dict())
    _check((own - set(weights), set(weights) - own), "vae")
    return vae


def _check(outcome: Any, part: str, not_in_files: tuple[str, ...] = ()) -> None:
    """Every weight has found its place; the host itself would only log what has not."""
    lacking, unused = (sorted(keys) for keys in outcome)
    lacking = [key for key in lacking if key not in not_in_files]
    if lacking or unused:
        raise SpectralAdapterError(
            f"demo model, {part}: this ComfyUI names its weights differently; lacking {lacking[:4]}, "
            f"without use {unused[:4]}. Please report it with ComfyUI's version."
        )
