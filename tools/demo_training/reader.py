"""Train the attribute classifier on drawings, as they are and as the autoencoder gives them back.

No sample of the denoiser is among them: it would teach the reader the mistakes. But the autoencoder
draws dots and edges in its own way, and a reader that has never seen that misreads one shape in fifteen.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from demo_model import draw
from demo_model.classifier import FEATURES, Classifier
from demo_model.pictures import OBJECTS, PIXELS, PLACES, POSITIONS, Picture, draw_beside
from spectral_core.demo.scores import sides
from spectral_core.whole_file import whole_file

from .autoencoder import SCALING, encode
from .common import CACHE, DRAWN, MODEL, SEED, Budget, batches, known, note, pictures, to_tensor
from .quick import quicken
from .unet import ENCODED, load_vae

LABELS: dict[str, list[str]] = {
    "shape": [*OBJECTS, draw.NONE],
    "colour": list(draw.COLOURS),
    "size": list(draw.SIZES),
    "position": list(POSITIONS),
    "texture": list(draw.TEXTURES),
    "background": list(PLACES),
    "shading": list(draw.SHADINGS),
    "second": [*OBJECTS, draw.NONE],
    "second_colour": list(draw.COLOURS),
    "second_texture": list(draw.TEXTURES),
    "character": [draw.NONE, *draw.CONCEPTS],
}
OF_THE_OBJECT = ("colour", "size", "position", "texture")
OF_THE_SECOND = ("second_colour", "second_texture")
IGNORED = -100
CHARACTERS, FIRST_SEED = 1500, 1_000_000  # drawings of the demo's characters; seeds far from its pictures'
DECODED = CACHE / "decoded.npy"
STEPS, LEARNING_RATE = 4000, 2e-3
DRAWN_ONES, DECODED_ONES, DOODLES, OWN = 16, 22, 2, 10  # of a batch


def applies(name: str, picture: Picture) -> bool:
    """Whether the picture has such a thing at all."""
    if name in OF_THE_OBJECT:
        return picture.shape != draw.NONE and not (name == "size" and picture.pair)
    if name == "character":  # pictures of the training show none
        return False
    return picture.pair if name in OF_THE_SECOND else True


def targets(shown: list[Picture]) -> dict[str, Tensor]:
    """Class indices per attribute; ignored where a picture has no such thing. None shows a character."""
    found = {
        name: torch.tensor([values.index(getattr(p, name)) if applies(name, p) else IGNORED for p in shown])
        for name, values in LABELS.items()
        if name != "character"
    }
    return found | {"character": torch.zeros(len(shown), dtype=torch.long)}


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, device: str) -> np.ndarray:
    """Unscaled latents (N, 4, 16, 16) -> what they stand for, (N, 128, 128, 3) uint8."""
    with torch.autocast(device, torch.bfloat16):
        images = vae.decode(latents.float().to(device)).sample
    return to_bytes(images.float() / 2 + 0.5)


def to_bytes(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in about [0, 1] -> (N, H, W, 3) uint8."""
    found: np.ndarray = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return found


def decoded(device: str, part: int = 100) -> np.ndarray:
    """The denoiser's other pictures as the autoencoder gives them back; drawn once, into the cache."""
    if not DECODED.exists():
        vae = quicken(load_vae(device))
        latents = torch.load(CACHE / "latents.pt", weights_only=True, mmap=True)[DRAWN:ENCODED]
        with whole_file(DECODED) as stream:
            np.save(
                stream,
                np.concatenate([decode(vae, x.float() / SCALING, device) for x in latents.split(part)]),
            )
    found: np.ndarray = np.load(DECODED, mmap_mode="r")
    return found


def characters(device: str, count: int = CHARACTERS, part: int = 100) -> tuple[np.ndarray, Tensor]:
    """Drawings of the demo's characters, each a second time as the autoencoder gives it back, and the halves
    of such pictures of one beside a shape; and which character each is: its place in the labels."""
    names, vae = list(draw.CONCEPTS), quicken(load_vae(device))

    def give_back(images: np.ndarray) -> np.ndarray:
        parts = [images[i : i + part] for i in range(0, len(images), part)]
        return np.concatenate([decode(vae, encode(vae, p, device).to(device), device) for p in parts])

    def of(number: int) -> tuple[str, int]:
        return names[number % len(names)], FIRST_SEED + number

    alone = draw.draw_many(lambda i: draw.draw_concept(*of(i), pixels=PIXELS)[0], count)
    which = torch.arange(count) % len(names) + 1
    pairs = [draw_beside(*of(i)) for i in range(count // 2)]
    halves, owners = [], []
    for i, drawn in enumerate(give_back(np.stack([np.asarray(picture) for picture, _ in pairs]))):
        name = names[i % len(names)]
        left = pairs[i][1].startswith(draw._article(name))
        for half, own in zip(sides(Image.fromarray(drawn)), (left, not left), strict=True):
            halves.append(np.asarray(half.resize((PIXELS, PIXELS), Image.Resampling.BILINEAR)))
            owners.append(int(which[i]) if own else 0)
    images = np.concatenate([alone, give_back(alone), np.stack(halves)])
    return images, torch.cat([which, which, torch.tensor(owners)])


def roughen(images: Tensor) -> Tensor:
    """What autoencoder and sampler do to a drawing: coarser pixels, blur, tint and noise, each on some."""
    n, device = len(images), images.device
    coarse = F.interpolate(F.avg_pool2d(images, 4), scale_factor=4, mode="bilinear", align_corners=False)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.lerp(images, soft, torch.rand(n, 1, 1, 1, device=device).pow(2))
    images = torch.lerp(images, coarse, 0.7 * torch.rand(n, 1, 1, 1, device=device).pow(3))
    gain = 1 + 0.1 * (torch.rand(n, 3, 1, 1, device=device) - 0.5)
    noise = 0.1 * torch.rand(n, 1, 1, 1, device=device).pow(2)
    return (images * gain + noise * torch.randn_like(images)).clamp(0, 1)


def train(device: str, steps: int = STEPS) -> None:
    """Train and write the model's ``classifier``: fp16 weights, labels in ``config.json``."""
    torch.manual_seed(SEED + 5)
    drawn, again, doodles = pictures(), decoded(device), pictures("doodles")[::3]  # the polygons among them
    own, which = characters(device)
    shown = known(DRAWN + len(again))
    truth, truth_again = targets(shown[: len(drawn)]), targets(shown[DRAWN:])
    model = Classifier(LABELS).to(device, memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    budget = Budget(steps)
    counts = ((drawn, DRAWN_ONES), (again, DECODED_ONES), (doodles, DOODLES), (own, OWN))
    streams = [batches(len(images), size, SEED + 6 + i) for i, (images, size) in enumerate(counts)]
    none, ignored = (torch.full((DOODLES,), i) for i in (LABELS["shape"].index(draw.NONE), IGNORED))
    nobody = torch.full((OWN,), IGNORED)
    for step in range(steps):
        index = [next(stream) for stream in streams]
        images = np.concatenate([images[i] for (images, _), i in zip(counts, index, strict=True)])
        with torch.autocast(device, torch.bfloat16):
            logits = {
                name: value.float() for name, value in model(roughen(to_tensor(images).to(device))).items()
            }
        loss = torch.zeros((), device=device)
        for name, value in logits.items():
            nothing = none if name in ("shape", "second") else ignored
            person = which[index[3]] if name == "character" else nobody
            wanted = torch.cat([truth[name][index[0]], truth_again[name][index[1]], nothing, person])
            loss = loss + F.cross_entropy(value, wanted.to(device), label_smoothing=0.02)
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * budget.factor(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if step % 50 == 0:
            print(f"classifier {step} loss {loss:.4f} {budget.seconds():.0f}s", flush=True)
    centre(model.eval(), to_tensor(drawn[:2000]).to(device))
    save(model)
    note("classifier", steps, budget.seconds())


@torch.no_grad()
def centre(model: Classifier, images: Tensor) -> None:
    """Remember the average hidden state, which ``features`` subtracts."""
    model.centre.copy_(torch.cat([model._hidden(part) for part in images.split(200)]).mean(0))


def save(model: Classifier) -> None:
    folder = MODEL / "classifier"
    folder.mkdir(exist_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.cpu().state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    config = {"labels": LABELS, "features": FEATURES}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
