"""Graphs on the demo model through the started server: pictures, examples, cache, wrong input, interrupts.

One host per version serves all tests of a session. Every run goes the way a user's does: ``POST /prompt``,
the websocket, ``/history``, ``/view``.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from demo_model.draw import PIXELS, draw_concept
from demo_model.pictures import WIDE
from spectral_core.adapter.adapter import Adapter, create
from spectral_core.files import adapter_file as fileformat
from spectral_core.methods.lora import LoRAConfig
from spectral_core.pipelines import apply
from tests.host.booted import ROOT, Host
from tests.host.graphs import EXAMPLES, Graph, as_prompt, demo_graph, node, pictures_of, read_workflow
from tests.host.watching import Run, Socket, fail, history, is_end, submit, succeed

WORKFLOWS = sorted(EXAMPLES.glob("*.json"))
SPECTRAL = "SpectralAdapters_LoadSpectralAdapter"
FOURA = "SpectralAdapters_LoadFouRA"
ON_BOTH = {"model": ["demo", 0], "clip": ["demo", 1], "strength_model": 1.0, "strength_clip": 1.0}
PROMPT = "a <bot> on a blue background"
STEPS = 6
BOT = "examples/bot_foura.safetensors"
FISH = "examples/fish_spectral.safetensors"


@pytest.fixture(scope="module")
def offered(host: Host) -> dict[str, Any]:
    return dict(host.get("/object_info"))


@pytest.fixture
def folder(host: Host) -> Iterator[Path]:
    """models/spectral_adapters of this host, emptied afterwards."""
    path = host.folder / "models" / "spectral_adapters"
    path.mkdir(parents=True, exist_ok=True)
    yield path
    for file in path.iterdir():
        file.unlink()


def array(run: Run, host: Host, save: str = "save") -> np.ndarray:
    return np.asarray(pictures_of(host, run.entry, save)[0])


def sampled(graph: Graph, again: int = 0, **changes: Any) -> Graph:
    """The graph with few steps. ``again`` makes the host sample once more instead of answering from its
    cache: a denoise of 0.99995 counts as 1 and gives the same numbers.
    """
    graph["sampler"]["inputs"] |= {"steps": STEPS, "denoise": 1.0 - 1e-5 * again, **changes}
    return graph


def adapted(name: str = BOT, kind: str = FOURA, prompt: str = PROMPT, **changes: Any) -> Graph:
    inputs = {"adapter_name": name, **ON_BOTH, **({"base_mismatch": "delta"} if kind == SPECTRAL else {})}
    graph = sampled(demo_graph(prompt, load=node(kind, **{**inputs, **changes})))
    graph["sampler"]["inputs"]["model"] = ["load", 0]
    graph["positive"]["inputs"]["clip"] = graph["negative"]["inputs"]["clip"] = ["load", 1]
    return graph


# The demo model.


@pytest.fixture(scope="module")
def pipe() -> Any:
    """The demo model in diffusers. Its last step goes to sigma 0, as ComfyUI's does: the shipped scheduler
    stops at the noise of the first training step (``set_alpha_to_one`` false).
    """
    diffusers = pytest.importorskip("diffusers")
    made = diffusers.StableDiffusionPipeline.from_pretrained(
        ROOT / "demo_model", torch_dtype=torch.float32, safety_checker=None
    )
    made.set_progress_bar_config(disable=True)
    made.scheduler = diffusers.DDIMScheduler.from_config(made.scheduler.config, set_alpha_to_one=True)
    return made


def diffusers_latents(pipe: Any, graph: Graph, *adapters: Adapter) -> torch.Tensor:
    """The latents (scaled) for the graph's prompt, seed and steps."""
    asked = graph["sampler"]["inputs"]
    noise = torch.randn(
        1, 4, PIXELS // 8, PIXELS // 8, generator=torch.Generator().manual_seed(asked["seed"])
    )
    prompt = graph["positive"]["inputs"]["text"]
    with torch.inference_mode(), apply(pipe, *adapters):
        latents: torch.Tensor = pipe(
            prompt, latents=noise, num_inference_steps=asked["steps"], guidance_scale=asked["cfg"],
            height=PIXELS, width=PIXELS, output_type="latent",
        ).images  # fmt: skip
    return latents


def host_latents(host: Host, done: Run) -> torch.Tensor:
    """What the graph's node ``keep`` (SaveLatent) wrote, in the host's unscaled form."""
    (file,) = done.entry["outputs"]["keep"]["latents"]
    return load_file(host.folder / "output" / file["subfolder"] / file["filename"])["latent_tensor"]


KEEP = node("SaveLatent", samples=["sampler", 0], filename_prefix="latents")


def test_demo_model_draws_what_diffusers_draws(host: Host, pipe: Any) -> None:
    """The same noise, prompt, sampler (ddim, 20 steps, guidance 4): latents to 1e-4, pixels to one level."""
    graph = demo_graph(keep=KEEP)
    done = succeed(host, graph)
    scale, ours = pipe.vae.config.scaling_factor, diffusers_latents(pipe, graph)
    assert ours.std() > 0.3
    assert (host_latents(host, done) * scale - ours).abs().max() < 1e-4
    with torch.inference_mode():
        pixels = (pipe.vae.decode(ours / scale).sample / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0) * 255
    picture = array(done, host)
    assert picture.shape == (PIXELS, PIXELS, 3)
    assert np.abs(picture - pixels.numpy()).max() <= 1.0
    told = done.progress("sampler")  # the host leaves some steps out when they follow too quickly
    assert len(told) > 3 and told == sorted(set(told)) and told[-1] == 20


@pytest.mark.parametrize("name", [BOT, FISH])
def test_adapter_draws_what_it_draws_in_diffusers(host: Host, pipe: Any, name: str) -> None:
    """The trained word, the adaptive gates on each guided row, merged columns: latents to 1e-3."""
    concept = name.partition("/")[2].partition("_")[0]
    graph = {**adapted(name, prompt=f"a <{concept}> on a green background"), "keep": KEEP}
    graph["sampler"]["inputs"]["steps"] = 10  # a divisor of 1000: both schedules round alike
    done = succeed(host, graph)
    ours = diffusers_latents(pipe, graph, fileformat.load(EXAMPLES / "adapters" / name))
    without = diffusers_latents(pipe, graph)
    host_side = host_latents(host, done) * pipe.vae.config.scaling_factor
    assert (host_side - without).abs().max() > 0.1
    assert (host_side - ours).abs().max() < 1e-3


def test_vae_encodes_eight_pixels_to_a_cell(host: Host) -> None:
    """The ratio of 8: an image to latent and back keeps its size and looks the same."""
    drawn = draw_concept("house", 0)[0]
    (host.folder / "input").mkdir(exist_ok=True)
    drawn.save(host.folder / "input" / "drawn.png")
    graph = {
        "demo": node("SpectralAdapters_LoadDemoModel"),
        "image": node("LoadImage", image="drawn.png"),
        "encode": node("VAEEncode", pixels=["image", 0], vae=["demo", 2]),
        "decode": node("VAEDecode", samples=["encode", 0], vae=["demo", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="round"),
    }
    picture = array(succeed(host, graph), host)
    assert picture.shape == (PIXELS, PIXELS, 3)
    assert np.abs(picture - np.asarray(drawn, dtype=float)).mean() < 12


# Examples.


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
def test_example_workflow_runs(host: Host, offered: dict[str, Any], path: Path) -> None:
    page = read_workflow(path)
    assert path.with_suffix(".jpg").is_file(), "the page shows a picture of each example"
    graph = as_prompt(page, offered)
    for found in graph.values():
        if found["class_type"] == "KSampler":
            found["inputs"]["steps"] = STEPS
        if found["class_type"] == "SpectralAdapters_FuseAdapters":
            found["inputs"]["sample_steps"] = 1
        if found["class_type"] == "SpectralAdapters_DistilAdapters":  # a minute otherwise
            few = {"steps": STEPS, "samples": 2, "sample_steps": 2}
            found["inputs"] |= {**few, "prompts": "a <bot>\na <fish>\na <house>"}
    done = succeed(host, graph, page)
    saves = [key for key, found in graph.items() if found["class_type"] == "SaveImage"]
    is_grid = any(found["class_type"] == "SpectralAdapters_CompareAdapters" for found in graph.values())
    assert saves
    for key in saves:
        (picture,) = pictures_of(host, done.entry, key)
        assert is_grid or picture.size in ((PIXELS, PIXELS), WIDE)
        assert np.asarray(picture).std() > 5, "a picture of one colour"
    assert len({array(done, host, key).tobytes() for key in saves}) == len(saves), "rows differ"


def test_examples_need_no_other_file(offered: dict[str, Any]) -> None:
    """Every file that an example names is offered in an empty installation."""
    for path in WORKFLOWS:
        for found in as_prompt(read_workflow(path), offered).values():
            for name in ("adapter_name", "lora_name"):
                if name in found["inputs"]:
                    choices = offered[found["class_type"]]["input"]["required"][name][0]
                    assert found["inputs"][name] in choices


# The base model, the cache, strengths.


def test_base_is_bit_identical_and_strengths_come_from_the_cache(host: Host) -> None:
    base = array(succeed(host, sampled(demo_graph(PROMPT))), host)
    full = succeed(host, adapted())
    assert not np.array_equal(array(full, host), base)
    half = succeed(host, adapted(strength_model=0.5))
    assert "demo" in half.cached and "sampler" not in half.cached
    assert not np.array_equal(array(half, host), array(full, host))
    off = succeed(host, adapted(strength_model=0.0, strength_clip=0.0))
    assert np.array_equal(array(off, host), base)
    other = succeed(host, adapted(FISH, SPECTRAL, "a <fish> on a blue background"))
    assert not np.array_equal(array(other, host), base)
    again = succeed(host, sampled(demo_graph(PROMPT), again=1))
    assert "demo" in again.cached and "sampler" not in again.cached
    assert np.array_equal(array(again, host), base)


def test_a_word_means_something_only_with_its_adapter(host: Host) -> None:
    """strength_clip 0 leaves the trained word out, and with it most of the concept."""
    full = array(succeed(host, adapted()), host)
    wordless = array(succeed(host, adapted(strength_clip=0.0)), host)
    assert not np.array_equal(full, wordless)


@pytest.mark.parametrize("again", [2])
def test_interrupt_at_a_random_step_leaves_the_base_as_it_was(host: Host, again: int) -> None:
    base = array(succeed(host, sampled(demo_graph(PROMPT))), host)
    stop_at = random.Random(host.started_at).randint(1, 30)
    long = adapted()
    long["sampler"]["inputs"]["steps"] = 400
    with Socket(host) as listener:
        prompt_id = submit(host, long, listener.client_id)
        asked = False
        for message in listener.messages():
            data = message["data"]
            if message["type"] == "progress" and data["value"] >= stop_at and not asked:
                host.post("/interrupt", {})
                asked = True
            if is_end(message, prompt_id):
                break
    done = Run(history(host, prompt_id))
    assert done.event("execution_interrupted"), (stop_at, done.entry["status"])
    after = succeed(host, sampled(demo_graph(PROMPT), again))
    assert "sampler" not in after.cached
    assert np.array_equal(array(after, host), base), f"interrupted at step {stop_at}"


# Files.


def small_adapter(seed: int = 0, prefix: str = "", width: int = 0) -> Adapter:
    """A LoRA on one attention layer of the demo model, off zero; ``prefix`` and ``width`` spoil it."""
    weights = {
        f"unet.{prefix}down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": torch.zeros(
            64 + width, 64 + width
        )
    }
    generator = torch.Generator().manual_seed(seed)
    made = create(weights, LoRAConfig(rank=2), generator=generator)
    ((name, layer),) = made.layers.items()
    (term,) = layer.terms
    params = {k: torch.randn(v.shape, generator=generator) for k, v in term.params.items()}
    return replace(made, layers={name: replace(layer, terms=(replace(term, params=params),))})


def test_a_file_that_changed_on_disk_is_read_again(host: Host, folder: Path) -> None:
    fileformat.save(small_adapter(1), folder / "mine.safetensors")
    first = array(succeed(host, adapted("mine.safetensors")), host)
    fileformat.save(small_adapter(2), folder / "mine.safetensors", overwrite=True)
    second = succeed(host, adapted("mine.safetensors"))
    assert "load" not in second.cached
    assert not np.array_equal(array(second, host), first)
    (folder / "mine.safetensors").write_bytes(b"not an adapter any more")
    assert "mine.safetensors" in fail(host, adapted("mine.safetensors"))


def test_wrong_files_are_named_in_the_node(host: Host, folder: Path) -> None:
    fileformat.save(small_adapter(prefix="other."), folder / "family.safetensors")
    fileformat.save(small_adapter(width=64), folder / "shape.safetensors")
    fileformat.save(small_adapter(), folder / "cut.safetensors")
    whole = (folder / "cut.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    expected = {"family": ("load", "layer"), "shape": ("load", "to_q"), "cut": ("load", "cut.safetensors")}
    for name, words in expected.items():
        text = fail(host, adapted(f"{name}.safetensors"))
        assert all(word in text for word in words), text
        print(f"{name}: {text.strip()}")


@pytest.mark.parametrize("name", ["../secret.safetensors", "no such file.safetensors"])
def test_names_that_stand_for_no_file(host: Host, name: str) -> None:
    text = fail(host, adapted(name))
    assert "load" in text and name in text.replace("\\\\", "\\")


def test_a_failed_run_leaves_the_base_as_it_was(host: Host, folder: Path) -> None:
    base = array(succeed(host, sampled(demo_graph(PROMPT))), host)
    fileformat.save(small_adapter(width=64), folder / "shape.safetensors")
    fail(host, adapted("shape.safetensors"))
    after = succeed(host, sampled(demo_graph(PROMPT), again=3))
    assert np.array_equal(array(after, host), base)


def test_hashes_of_the_files_are_in_the_saved_picture(host: Host) -> None:
    done = succeed(host, adapted(), workflow={"nodes": [], "links": [], "extra": {}})
    (picture,) = pictures_of(host, done.entry)
    file = EXAMPLES / "adapters" / BOT
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    entry = json.loads(picture.info["spectral_adapters"])
    assert [found["sha256"] for found in entry["adapters"]] == [sha256]
    assert json.loads(picture.info["prompt"])["load"]["inputs"]["adapter_name"] == BOT
