"""Open one .safetensors checkpoint of SD 1.x, SD 2.x or SDXL as a diffusers pipeline, without a network.

The family is read from the file's header (names and shapes); the configurations that diffusers would download
are in ``configs/``, the tokenizer in ``clip_bpe/``. Then diffusers' own ``from_single_file`` does the rest.

Shapes: the families differ in the width of the text that the UNet attends to: 768, 1024 and 2048.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..errors import SpectralAdapterError
from ..files.container import open_safely
from .clip_bpe import clip_tokenizer

CONFIGS = Path(__file__).with_name("configs")
UNET = "model.diffusion_model."
SUPPORTED = "supported is one complete SD 1.x, SD 2.x or SDXL text-to-image checkpoint"
PREDICTION_TYPES = {"epsilon": "epsilon", "v_prediction": "v_prediction", "v": "v_prediction"}


@dataclass(frozen=True)
class Family:
    """What tells a family. ``parts``: the other parts, each with its names' prefix and its size."""

    title: str
    text_width: int
    unet_parameters: int
    parts: Mapping[str, tuple[str, int]]


VAE = ("first_stage_model.", 83_653_863)
CLIP_L, OPEN_CLIP_H, OPEN_CLIP_G = 123_060_480, 340_387_840, 694_659_840
FAMILIES: Mapping[str, Family] = {
    "sd1": Family(
        "SD 1.x", 768, 859_520_964,
        {"VAE": VAE, "text encoder": ("cond_stage_model.transformer.text_model.", CLIP_L)},
    ),
    "sd2": Family(
        "SD 2.x", 1024, 865_910_724,
        {"VAE": VAE, "text encoder": ("cond_stage_model.model.", OPEN_CLIP_H)},
    ),
    "sdxl": Family(
        "SDXL", 2048, 2_567_463_684,
        {
            "VAE": VAE,
            "first text encoder": ("conditioner.embedders.0.transformer.text_model.", CLIP_L),
            "second text encoder": ("conditioner.embedders.1.model.", OPEN_CLIP_G),
        },
    ),
}  # fmt: skip

OTHER_FILES: tuple[tuple[str, str], ...] = (
    (r"lora_(up|down|A|B)\b|\.lora\.|\.(hada_w1|lokr_w1|oft_blocks|dora_scale)", "a LoRA or similar adapter"),
    (r"^control_model\.|^controlnet_|\.?input_hint_block\.", "a ControlNet"),
    (r"^(model\.diffusion_model\.)?double_blocks\.\d+\.img_attn\.", "a Flux or similar transformer"),
    (r"^(model\.diffusion_model\.)?joint_blocks\.", "an SD 3 transformer"),
    (r"\.(time_stack|time_mixer)\.", "a video model (Stable Video Diffusion)"),
    (r"^edm_(mean|std)$|^edm_vpred\.", "an EDM model (Playground v2.5, CosXL) with another noise schedule"),
    (r"^conditioner\.embedders\.0\.model\.", "an SDXL refiner"),
    (r"^(string_to_param\b|emb_params$|clip_[lg]$)", "a textual-inversion embedding"),
    (r"^(down_blocks|up_blocks|text_model|transformer_blocks)\.", "one component of a diffusers folder; "
     "give the folder that holds its model_index.json"),
    (r"^(input_blocks|diffusion_model\.input_blocks)\.", "a UNet alone"),
    (r"^(encoder|decoder)\.", "an autoencoder (VAE) alone"),
)  # fmt: skip
"""Patterns over tensor names, and what a file with such a name is; the first that fits counts."""

OTHER_INPUTS = {
    9: "an inpainting model (9 input channels)",
    8: "an image-editing model (8 input channels)",
    7: "an upscaler (7 input channels)",
    5: "a depth model (5 input channels)",
}


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint's header says. ``zero_snr``: the noise schedule ends in pure noise."""

    family: str
    prediction_type: str
    zero_snr: bool


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Tensor name -> shape, and the metadata, of a .safetensors file. No tensor is read."""
    if path.suffix != ".safetensors":  # to the letter: diffusers unpickles a file with any other ending
        raise SpectralAdapterError(
            f"model {path}: found a name ending in {path.suffix!r}; only .safetensors is read: pickles "
            "(.ckpt, .pt, .bin) can run code. Get the .safetensors version of the model"
        )
    file = open_safely(path)
    return {name: entry.shape for name, entry in file.entries.items()}, dict(file.metadata)


def find_family(shapes: Mapping[str, tuple[int, ...]], source: str) -> str:
    """``sd1``, ``sd2`` or ``sdxl`` from the names and shapes of a checkpoint's tensors.

    Raises SpectralAdapterError, with ``source`` in its message, for every other kind of file, and for a file
    of these families in which a part is missing or the UNet has been cut down.
    """

    def refuse(found: str) -> SpectralAdapterError:
        return SpectralAdapterError(f"model {source}: found {found}; {SUPPORTED}")

    names = "\n".join(shapes)
    for pattern, what in OTHER_FILES:
        if re.search(pattern, names, re.MULTILINE):
            raise refuse(what)
    first = shapes.get(f"{UNET}input_blocks.0.0.weight", ())
    if len(first) != 4:
        raise refuse(f"{len(shapes)} tensors (such as {next(iter(shapes), 'none')!r}) without such a UNet")
    if first[1] != 4:
        raise refuse(OTHER_INPUTS.get(first[1], f"a UNet with {first[1]} input channels"))
    attended = (
        s[-1]
        for n, s in shapes.items()
        if len(s) > 1 and n.startswith(UNET) and n.endswith(".attn2.to_k.weight")
    )
    widths = sorted(set(attended))
    family = next((name for name, f in FAMILIES.items() if widths == [f.text_width]), None)
    if family is None:
        raise refuse(f"a UNet that attends to text of width {widths}, expected 768, 1024 or 2048")
    known = FAMILIES[family]
    size = _parameters(shapes, UNET)
    if size != known.unet_parameters:
        raise refuse(
            f"a UNet like that of {known.title}, but with {size:,} parameters instead of "
            f"{known.unet_parameters:,} (a distilled or extended variant)"
        )
    for part, (prefix, least) in known.parts.items():
        size = _parameters(shapes, prefix)
        if size < least:  # files may hold more than diffusers uses, such as OpenCLIP's last layer
            held = f"only {size:,} of the {least:,} parameters" if size else "nothing"
            raise refuse(f"an {known.title} checkpoint with {held} of its {part} ({prefix}*)")
    return family


def _parameters(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    return sum(prod(shape) for name, shape in shapes.items() if name.startswith(prefix))


def find_prediction_type(
    path: Path, family: str, metadata: Mapping[str, str], names: Mapping[str, tuple[int, ...]]
) -> str:
    """What the UNet predicts, ``epsilon`` or ``v_prediction``; the first rule that says something counts.

    1. A tensor named ``v_pred`` (how SDXL v-prediction checkpoints mark themselves): ``v_prediction``.
    2. The metadata ``modelspec.prediction_type``, or ``modelspec.architecture`` ending in ``-v``.
    3. SD 2.x: ComfyUI's rule, so that a file means the same here and there. In the v-prediction models (for
       768 pixels) the biases of the last attention block's first norm have a standard deviation above 0.09.
    4. ``epsilon``.
    """
    if "v_pred" in names:
        return "v_prediction"
    stated = PREDICTION_TYPES.get(metadata.get("modelspec.prediction_type", "").lower())
    if stated is not None:
        return stated
    if metadata.get("modelspec.architecture", "").endswith("-v"):
        return "v_prediction"
    telling = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if family == "sd2" and telling in names:
        spread = open_safely(path).read([telling])[telling].float().std(correction=0)
        return "v_prediction" if spread > 0.09 else "epsilon"
    return "epsilon"


def inspect_checkpoint(path: str | Path, prediction_type: str | None = None) -> Checkpoint:
    """Family and prediction type of a checkpoint file; ``prediction_type`` overrides what the file says."""
    path = Path(path)
    shapes, metadata = read_header(path)
    family = find_family(shapes, str(path))
    if prediction_type is None:
        prediction_type = find_prediction_type(path, family, metadata, shapes)
    if prediction_type not in ("epsilon", "v_prediction"):
        raise SpectralAdapterError(
            f"prediction type: found {prediction_type!r}, expected 'epsilon' or 'v_prediction'"
        )
    return Checkpoint(family, prediction_type, zero_snr="ztsnr" in shapes)


def load_single_file(
    path: str | Path, dtype: torch.dtype = torch.float32, prediction_type: str | None = None
) -> Any:
    """The diffusers pipeline in a .safetensors checkpoint of SD 1.x, SD 2.x or SDXL.

    No network is used and no safety checker is loaded. ``prediction_type``: ``epsilon`` or ``v_prediction``;
    None follows the file (:func:`find_prediction_type`).
    Raises SpectralAdapterError for any other file, naming what was found.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    path = Path(path)
    found = inspect_checkpoint(path, prediction_type)
    configs = CONFIGS / found.family
    components: dict[str, Any] = {
        file.parent.name: clip_tokenizer(file) for file in sorted(configs.glob("*/tokenizer_config.json"))
    }
    components["scheduler"] = _scheduler(diffusers, configs, found)
    if found.family == "sdxl":
        kind = diffusers.StableDiffusionXLPipeline
    else:
        kind, components["safety_checker"] = diffusers.StableDiffusionPipeline, None
    logs = diffusers.utils.logging
    verbosity = logs.get_verbosity()
    try:
        logs.set_verbosity_error()  # diffusers warns of a cast that it makes itself
        pipe = kind.from_single_file(
            str(path), config=str(configs), local_files_only=True, torch_dtype=dtype, **components
        )
    except NotImplementedError as error:  # torch's word on moving a weight that was never filled
        raise SpectralAdapterError(
            f"model {path}: found a checkpoint that lacks weights; {SUPPORTED}"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SingleFileComponentError) as error:
        raise SpectralAdapterError(f"model {path}: diffusers cannot convert it: {error}") from error
    finally:
        logs.set_verbosity(verbosity)
    if found.family == "sd2" and found.prediction_type == "v_prediction":
        pipe.unet.register_to_config(sample_size=96)  # those of SD 2.x are for 768 pixels
    return pipe


def _scheduler(diffusers: Any, configs: Path, found: Checkpoint) -> Any:
    kind = diffusers.EulerDiscreteScheduler if found.family == "sdxl" else diffusers.DDIMScheduler
    extras: dict[str, Any] = {"prediction_type": found.prediction_type}
    if found.zero_snr:  # such a model must be sampled from the very last step
        extras.update(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return kind.from_pretrained(configs / "scheduler", local_files_only=True, **extras)
