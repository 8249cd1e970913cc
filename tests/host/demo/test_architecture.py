"""The demo model runs in ComfyUI's own classes: outputs as in diffusers and transformers, every tensor used.

Parts that are not in ``demo_model`` yet are taken with random weights of the configuration they are trained
with. Their native form is made by ``nodes/host/demo/weights.py``, from which Load Demo Model builds.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.host.booted import ROOT
from tests.host.inside import checkouts, run_inside

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.host

MODEL = ROOT / "demo_model"
TOLERANCE = 1e-4
PROMPTS = (
    "",
    "a large red striped star on a blue background, on the left",
    "Small YELLOW heart;  it's   dotted!",
    "a zyxqv-bot 42 in a naïve café",  # words that no caption had
    " ".join(["green ring"] * 30),  # fills most of the 77 positions
)


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Give norms and biases values of their own; a fresh norm would hide a wrong name."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        if tensor.ndim == 1:
            centre = 1.0 if name.endswith("weight") else 0.0
            tensor.data = centre + 0.2 * torch.randn(tensor.shape, generator=generator)
    return model


def shipped_or(kind: Any, folder: str, fresh: Callable[[], nn.Module]) -> Any:
    """The part as shipped in fp32; random weights while there are none."""
    torch.manual_seed(7)
    if (MODEL / folder / "config.json").is_file():
        return kind.from_pretrained(MODEL / folder, torch_dtype=torch.float32).eval()
    return randomise(fresh(), 7).eval()


@dataclass(frozen=True)
class Demo:
    unet: Any
    vae: Any
    text: Any
    tokenizer: Any


@pytest.fixture(scope="module")
def demo() -> Demo:
    from tools.demo_training import autoencoder, unet
    from tools.demo_training.text import text_model

    tokenizer = transformers.CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    return Demo(
        shipped_or(
            diffusers.UNet2DConditionModel, "unet", lambda: diffusers.UNet2DConditionModel(**unet.CONFIG)
        ),
        shipped_or(diffusers.AutoencoderKL, "vae", lambda: diffusers.AutoencoderKL(**autoencoder.CONFIG)),
        shipped_or(transformers.CLIPTextModel, "text_encoder", lambda: text_model(tokenizer)),
        tokenizer,
    )


@pytest.fixture(scope="module")
def product(pack: ModuleType) -> ModuleType:
    """nodes/host/demo/weights.py, as the host imports it."""
    return importlib.import_module(f"{pack.__name__}.nodes.host.demo.weights")


def host_text_config(product: ModuleType, demo: Demo) -> dict[str, Any]:
    tokenizer = demo.tokenizer
    return {
        "config": product.text_config(demo.text.config.to_dict()),
        "special": {
            "start": tokenizer.bos_token_id,
            "end": tokenizer.eos_token_id,
            "pad": tokenizer.pad_token_id,
        },
        "prompts": PROMPTS,
        "tokenizer_folder": str(MODEL / "tokenizer"),
    }


# Both sides.


def make_inputs() -> dict[str, Tensor]:
    """Not square, so that rows and columns cannot be exchanged; timesteps at both ends; a smooth picture, as
    the encoder is made for (noise gives latents in the hundreds).
    """
    generator = torch.Generator().manual_seed(3)
    blots = torch.rand(2, 3, 5, 3, generator=generator)
    return {
        "latents": torch.randn(2, 4, 16, 24, generator=generator),
        "timesteps": torch.tensor([999.0, 1.0]),
        "context": torch.randn(2, 77, 128, generator=generator),
        "picture": nn.functional.interpolate(blots, (64, 32), mode="bilinear", align_corners=True),
        "encoded": torch.randn(2, 4, 16, 8, generator=generator),
    }


@dataclass(frozen=True)
class Answer:
    """What the host reports and computes."""

    report: dict[str, Any]
    outputs: dict[str, Tensor]
    weights: dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module", params=checkouts())
def answer(
    request: pytest.FixtureRequest, demo: Demo, product: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Answer:
    """One process per host version."""
    folder: Path = tmp_path_factory.mktemp("architecture")
    unet, vae = dict(demo.unet.config), dict(demo.vae.config)
    weights = {
        "unet": product.native_unet(demo.unet.state_dict(), unet),
        "vae": product.native_vae(demo.vae.state_dict(), vae),
        "text": product.native_text(demo.text.state_dict()),
    }
    for name, tensors in {**weights, "inputs": make_inputs()}.items():
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{name}.safetensors")
    config = {"unet": product.unet_config(unet), "vae": product.vae_config(vae)}
    config["text"] = host_text_config(product, demo)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    run_inside(request.param, "inside_architecture.py", folder)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return Answer(report, load_file(folder / "outputs.safetensors"), weights)


def assert_same(name: str, host: Tensor, ours: Tensor) -> None:
    assert host.shape == ours.shape
    assert ours.std() > 0.01, f"{name}: an output of zeros would agree with anything"
    difference = (host - ours).abs().max().item()
    print(f"{name}: largest difference {difference:.2e}")
    assert difference <= TOLERANCE, name


@pytest.mark.parametrize(
    ("part", "lacking"), [("unet", []), ("vae", []), ("text", ["text_projection.weight"])]
)
def test_every_tensor_is_used_on_both_sides(
    answer: Answer, demo: Demo, part: str, lacking: list[str]
) -> None:
    """The host's text encoder has a projection that CLIPTextModel has not; SD 1.x never uses it."""
    assert answer.report[part]["unused"] == []
    assert answer.report[part]["lacking"] == lacking
    assert len(answer.weights[part]) == len(getattr(demo, part).state_dict())


def test_host_reads_the_same_unet_structure_off_the_weights(
    answer: Answer, demo: Demo, product: ModuleType
) -> None:
    ours, detected = product.unet_config(dict(demo.unet.config)), answer.report["unet"]["detected"]
    assert len(detected) >= 9
    # image_size is a constant of the host's, which its UNet never reads
    assert {k: (v, ours[k]) for k, v in detected.items() if v != ours[k] and k != "image_size"} == {}


def test_unet(answer: Answer, demo: Demo) -> None:
    given = make_inputs()
    with torch.inference_mode():
        ours = demo.unet(given["latents"], given["timesteps"], given["context"]).sample
    assert_same("unet", answer.outputs["unet"], ours)


def test_autoencoder(answer: Answer, demo: Demo) -> None:
    given = make_inputs()
    with torch.inference_mode():
        encoded = demo.vae.encode(given["picture"] * 2 - 1).latent_dist.mode()
        decoded = demo.vae.decode(given["encoded"]).sample
    scale = demo.vae.config.scaling_factor  # as the denoiser sees them
    assert_same("encoder", answer.outputs["encoded"] * scale, encoded * scale)
    assert_same("decoder", answer.outputs["decoded"], ((decoded + 1) / 2).clamp(0, 1))


def test_tokens(answer: Answer, demo: Demo) -> None:
    ours = demo.tokenizer(list(PROMPTS), padding="max_length", max_length=77).input_ids
    assert answer.report["tokens"] == [[ids] for ids in ours]
    assert len({tuple(ids) for ids in ours}) == len(PROMPTS)


def test_text_encoder(answer: Answer, demo: Demo) -> None:
    ids = demo.tokenizer(list(PROMPTS), padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.inference_mode():
        ours = demo.text(ids)
    for i in range(len(PROMPTS)):
        assert_same(f"states of prompt {i}", answer.outputs[f"states_{i}"], ours.last_hidden_state[i : i + 1])
        assert_same(f"pooled of prompt {i}", answer.outputs[f"pooled_{i}"], ours.pooler_output[i : i + 1])
