"""PEFT's public comparison of image generation (FLUX.2-klein), run for FouRA, Spectral A and R.

    git clone https://github.com/huggingface/peft
    python -m benchmarks.claims.peft_comparison --model FLUX.2-klein-base-4B --dino dinov2-base \\
        --pictures CATS --protocol peft/method_comparison/image-gen/default_training_params.json

Model, DINOv2 and pictures are folders (nothing is downloaded; the pictures are those of the data set that
the protocol names, in its order, sorted by name). Prompts and numbers are read from the protocol's own file:
512², 750 steps of 2 pictures, AdamW with decay 1e-4, bf16, gradients clipped at 1, level rate. Two pictures
choose the rate (each method's own sweep, as PEFT's experiments have rates of their own), four are the test.

``similarity``: cosine of DINOv2's embeddings of what is drawn under a test picture's prompt and of that
picture, mean of three repeats. ``drift``: (1 − cosine) / 2 of what is drawn with and without the adapter
under unrelated prompts, same seeds. ``mib``: of the saved file. LoRA of rank 32 is run as well: published
0.697 and 0.262 (peft, August 2026), so it says how far this run is comparable. What differs from PEFT's
script: noise levels are drawn from a continuous uniform distribution, and random numbers are this trainer's.

Shapes: latents (B, 4·C, H/2, W/2), patches of 2 × 2; embeddings (N, D) of length one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from benchmarks.claims.lab import Busy, Lab, Setting, Shown
from spectral_core.adapter.adapter import Adapter, Provenance, create
from spectral_core.attach.attaching import attach
from spectral_core.attach.targets import find_targets
from spectral_core.errors import SpectralAdapterError
from spectral_core.files import adapter_file
from spectral_core.maths.svd_cache import SVDCache
from spectral_core.methods import FouRAConfig, LoRAConfig, MethodConfig, SpectralAConfig, SpectralRConfig
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.data.order import Order
from spectral_core.training.engine.columns import basis_source
from spectral_core.training.engine.loop import Setup, train
from spectral_core.training.objectives.diffusion import FlowMatching

PART = "transformer"
TARGETS = (
    "*.to_q, *.to_k, *.to_v, *.to_out.0, *.add_q_proj, *.add_k_proj, *.add_v_proj, *.to_add_out, "
    "*.to_qkv_mlp_proj, *.linear_in, *.linear_out"
)
REPEATS = 3
TEST_SEED, DRIFT_SEED = 100_000, 100_000_000  # added to the protocol's seed, as there
SETTING = Setting("peft_comparison", seeds=(0,))


@dataclass(frozen=True)
class Entry:
    """A method of the comparison with the rates of its sweep."""

    config: MethodConfig
    rates: tuple[float, ...]


def entries(rank: int) -> dict[str, Entry]:
    """At PEFT's default rank; Spectral R has twice the columns, for files of some hundred kilobytes."""
    columns = tuple(range(rank))
    return {
        "lora": Entry(LoRAConfig(rank), (1e-4,)),
        "foura": Entry(FouRAConfig(rank, transform="dct", gate="adaptive"), (1e-4, 3e-4, 1e-3)),
        "foura_no_gate": Entry(FouRAConfig(rank, transform="dct", gate="none"), (1e-4, 3e-4, 1e-3)),
        "spectral_a": Entry(SpectralAConfig(columns), (3e-4, 1e-3, 3e-3)),
        "spectral_r": Entry(SpectralRConfig(tuple(range(2 * rank)), train_scale=True), (3e-3, 1e-2, 3e-2)),
    }


METHODS = tuple(entries(1))


@dataclass(frozen=True)
class Protocol:
    """What the comparison's own file says."""

    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Protocol:
        """Raises SpectralAdapterError for a file that says less."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SpectralAdapterError(
                f"{path}: {error}; expected default_training_params.json of PEFT's image-gen comparison"
            ) from error
        missing = [key for key in NEEDED if key not in values]
        if missing:
            raise SpectralAdapterError(f"{path}: no {', '.join(missing)}; the protocol has changed")
        return cls(values)

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def split(self) -> tuple[list[int], list[int], list[int]]:
        """Pictures to train on, to choose the rate with, and of the test: PEFT's own shuffle."""
        order = np.arange(len(self["instance_prompts"]))
        np.random.RandomState(0).shuffle(order)
        found = order.tolist()
        first = len(found) - self["valid_size"] - self["test_size"]
        return found[:first], found[first : first + self["valid_size"]], found[first + self["valid_size"] :]


NEEDED = (
    "resolution", "batch_size", "max_steps", "seed", "grad_norm_clip", "optimizer_kwargs", "use_gc",
    "valid_size", "test_size", "num_inference_steps", "guidance_scale", "max_sequence_length",
    "text_encoder_out_layers", "instance_prompts", "drift_image_prompts",
)  # fmt: skip


@dataclass(frozen=True)
class Eye:
    """DINOv2 with its processor."""

    model: Any
    processor: Any

    @torch.no_grad()
    def embeddings(self, pictures: Sequence[Image.Image]) -> Tensor:
        inputs = self.processor(images=list(pictures), return_tensors="pt").to(self.model.device)
        return F.normalize(self.model(**inputs).last_hidden_state[:, 0].float(), dim=-1)


class Comparison:
    """One model, the pictures of one concept in the protocol's order, and how they are judged."""

    def __init__(
        self,
        pipe: Any,
        eye: Eye,
        protocol: Protocol,
        pictures: Sequence[Image.Image],
        lab: Lab,
        rank: int = 32,
        precision: str = "bf16",
    ) -> None:
        wanted = len(protocol["instance_prompts"])
        if len(pictures) != wanted:
            raise SpectralAdapterError(f"{len(pictures)} pictures: the protocol has prompts for {wanted}")
        self.pipe, self.eye, self.protocol, self.pictures = pipe, eye, protocol, pictures
        self.lab, self.entries, self.precision = lab, entries(rank), precision
        self.device = pipe.transformer.device

    @cached_property
    def prompts(self) -> dict[str, Tensor]:
        """Every prompt's embeddings, once; the text encoder is let go then."""
        said = {"", *self.protocol["instance_prompts"], *self.protocol["drift_image_prompts"]}
        with torch.no_grad():
            found = {text: self._embedded(text) for text in sorted(said)}
        self.pipe.text_encoder = None
        return found

    def _embedded(self, text: str) -> Tensor:
        embeddings, _ = self.pipe.encode_prompt(
            text,
            device=self.device,
            max_sequence_length=self.protocol["max_sequence_length"],
            text_encoder_out_layers=tuple(self.protocol["text_encoder_out_layers"]),
        )
        found: Tensor = embeddings
        return found

    @cached_property
    def latents(self) -> Tensor:
        """Of the pictures to train on."""
        side = self.protocol["resolution"]
        vae = self.pipe.vae.to(self.device)
        parts = []
        for i in self.protocol.split()[0]:
            small = self.pictures[i].resize((side, side), Image.Resampling.BILINEAR)
            pixels = torch.from_numpy(np.asarray(small, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
            with torch.no_grad():
                parts.append(self.pipe._encode_vae_image(pixels[None].to(vae.device, vae.dtype), None))
        return torch.cat(parts)

    # --- one run --------------------------------------------------------------------------------------

    def fresh(self, config: MethodConfig) -> Adapter:
        weights, _ = find_targets(self.pipe.transformer, PART, TARGETS)
        basis = basis_source(config, SVDCache(self.lab.folder / "svd"))
        generator = torch.Generator().manual_seed(self.protocol["seed"])
        layers = create(weights, config, basis, generator).layers
        return Adapter(layers, Provenance(name="sks cat", family="flux2-klein"))

    def trained(self, name: str, rate: float) -> tuple[Adapter, dict[str, Any]]:
        """An adapter of the method at this rate, and what it cost."""
        protocol, transformer = self.protocol, self.pipe.transformer
        shown = protocol.split()[0]
        texts = [self.prompts[protocol["instance_prompts"][i]] for i in shown]
        ids = self.pipe._prepare_latent_ids(self.latents[:1]).to(self.device)
        dtype = transformer.dtype

        def denoise(noisy: Tensor, timesteps: Tensor, indices: Sequence[int | None]) -> Tensor:
            said = torch.cat([self.prompts[""] if i is None else texts[i] for i in indices]).to(dtype)
            places = ids.expand(len(noisy), -1, -1)
            guidance = None
            if transformer.config.guidance_embeds:
                guidance = torch.full((len(noisy),), float(protocol["guidance_scale"]), device=self.device)
            found = transformer(
                hidden_states=self.pipe._pack_latents(noisy).to(dtype),
                timestep=timesteps.to(self.device, dtype) / 1000,
                guidance=guidance,
                encoder_hidden_states=said,
                txt_ids=self.pipe._prepare_text_ids(said).to(self.device),
                img_ids=places,
                return_dict=False,
            )[0]
            patches: Tensor = self.pipe._unpack_latents_with_ids(found[:, : places.shape[1]], places)
            return patches

        adapter = self.fresh(self.entries[name].config)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        with attach(transformer, adapter, part=PART, trainable=True) as attachment:
            order = Order([Shown()] * len(shown), protocol["batch_size"], protocol["seed"])
            setup = Setup(denoise, self.latents, order, FlowMatching(), [attachment], roots=[transformer])
            config = TrainConfig(
                steps=protocol["max_steps"],
                batch_size=protocol["batch_size"],
                learning_rate=rate,
                weight_decay=protocol["optimizer_kwargs"].get("weight_decay", 0.0),
                gradient_clip=protocol["grad_norm_clip"],
                precision=self.precision,
                checkpointing="full" if protocol["use_gc"] else "none",
                seed=protocol["seed"],
            )
            parameters = sum(p.numel() for p in attachment.parameters())
            result = train(setup, config, adapter.methods[0])
            adapter = attachment.to_adapter()
        found: dict[str, Any] = {"rate": rate, "parameters": parameters}
        found["seconds"] = time.perf_counter() - started
        if result.gates is not None:
            found["open"] = result.gates.share
        if self.device.type == "cuda":
            found["memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
        path = self.lab.folder / f"{name}_{rate:g}.safetensors"
        adapter_file.save(adapter, path, overwrite=True, compact=name == "spectral_r")
        return adapter, found | {"mib": path.stat().st_size / 2**20}

    # --- judging --------------------------------------------------------------------------------------

    def drawn(self, prompts: Sequence[str], seed: int, adapter: Adapter | None) -> list[Image.Image]:
        """One picture a prompt, all of one stream of random numbers."""
        generator = torch.Generator(self.device).manual_seed(self.protocol["seed"] + seed)
        on = (
            contextlib.nullcontext() if adapter is None else attach(self.pipe.transformer, adapter, part=PART)
        )
        self.pipe.vae.to(self.device)
        with on, torch.no_grad():
            return [
                self.pipe(
                    prompt_embeds=self.prompts[prompt],
                    negative_prompt_embeds=self.prompts[""],
                    num_inference_steps=self.protocol["num_inference_steps"],
                    guidance_scale=self.protocol["guidance_scale"],
                    height=self.protocol["resolution"],
                    width=self.protocol["resolution"],
                    generator=generator,
                ).images[0]
                for prompt in prompts
            ]

    def similarity(self, adapter: Adapter | None, places: Sequence[int], repeats: int = 1) -> float:
        prompts = [self.protocol["instance_prompts"][i] for i in places]
        own = self.eye.embeddings([self.pictures[i] for i in places]).repeat(repeats, 1)
        drawn = self.eye.embeddings(self.drawn(prompts * repeats, TEST_SEED, adapter))
        return float((own * drawn).sum(1).mean())

    @cached_property
    def _unadapted(self) -> Tensor:
        return self.eye.embeddings(self.drawn(self.protocol["drift_image_prompts"], DRIFT_SEED, None))

    def drift(self, adapter: Adapter) -> float:
        drawn = self.eye.embeddings(self.drawn(self.protocol["drift_image_prompts"], DRIFT_SEED, adapter))
        return float((1 - (self._unadapted * drawn).sum(1).mean()) / 2)

    def row(self, name: str) -> dict[str, Any]:
        """The method at its best rate; the sweep's runs are kept."""
        _, valid, test = self.protocol.split()

        def swept(rate: float) -> dict[str, Any]:
            adapter, found = self.trained(name, rate)
            return found | {"valid": self.similarity(adapter, valid)}

        runs = {
            rate: self.lab.cell(f"{name}_{rate:g}", lambda r=rate: swept(r))
            for rate in self.entries[name].rates
        }
        best = max(runs, key=lambda rate: runs[rate]["valid"])

        def tested() -> dict[str, Any]:
            adapter = adapter_file.load(
                self.lab.folder / f"{name}_{best:g}.safetensors",
                find_targets(self.pipe.transformer, PART, TARGETS)[0],
            )
            found = {"similarity": self.similarity(adapter, test, REPEATS), "drift": self.drift(adapter)}
            return {"method": name, **runs[best], **found}

        return self.lab.cell(f"{name}_test", tested)


def pictures_of(folder: Path) -> list[Image.Image]:
    """All pictures of a folder by name, upright."""
    kinds = {".png", ".jpg", ".jpeg", ".webp"}
    found = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in kinds]
    pictures = []
    for path in found:
        with Image.open(path) as picture:
            pictures.append(ImageOps.exif_transpose(picture).convert("RGB"))
    return pictures


def load(options: argparse.Namespace) -> Comparison:
    """What the command names."""
    from diffusers import Flux2KleinPipeline
    from transformers import AutoImageProcessor, AutoModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = Flux2KleinPipeline.from_pretrained(
        options.model, torch_dtype=torch.bfloat16, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    for module in (pipe.transformer, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False)
    eye = AutoModel.from_pretrained(options.dino, local_files_only=True).eval().to(device)
    processor = AutoImageProcessor.from_pretrained(options.dino, local_files_only=True)
    lab = Lab(options.folder, SETTING)
    protocol = Protocol.read(options.protocol)
    return Comparison(pipe, Eye(eye, processor), protocol, pictures_of(options.pictures), lab)


def main(arguments: list[str] | None = None) -> int:
    from benchmarks.claims.__main__ import FOLDER
    from benchmarks.common import finish

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name in ("model", "dino", "pictures", "protocol"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the kept runs")
    options = parser.parse_args(arguments)
    comparison = load(options)
    rows = []
    for name in options.methods:
        with contextlib.suppress(Busy):
            rows.append(comparison.row(name))
    return finish("peft_comparison", rows, [], {"methods": options.methods})


if __name__ == "__main__":
    sys.exit(main())
