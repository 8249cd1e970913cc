"""The host's model in the shape of a pipeline: it trains what diffusers' own pipeline trains."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectral_core as sc
from spectral_core.errors import SpectralAdapterError
from spectral_core.names.unet_blocks import UNetLayout, unet_table
from spectral_webui import training
from spectral_webui.jobs import Job, Jobs
from spectral_webui.library import Library
from spectral_webui.open_clip import OpenCLIPTree
from spectral_webui.pipeline import HostPipeline, OpenTokens, Parts, TextPart
from spectral_webui.tools import FuseSettings

pytest.importorskip("diffusers")
ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "example_workflows" / "adapters" / "examples"
QUICK = {"steps": 3, "rank": 2, "warmup": 0}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return sc.load_pipeline()


class Native(nn.Module):
    """diffusers' UNet with a host's names and call."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        for path, native in unet_table(UNetLayout.from_config(unet.config)).items():
            try:
                module = unet.get_submodule(path)
            except AttributeError:
                continue
            *folders, last = native.split(".")
            inner: nn.Module = self
            for step in folders:
                if step not in inner._modules:
                    inner.add_module(step, nn.Module())
                inner = inner._modules[step]  # type: ignore[assignment]
            inner.add_module(last, module)
        object.__setattr__(self, "_whole", unet)

    def forward(self, x: Tensor, steps: Tensor, context: Tensor) -> Tensor:
        return self._whole(x, steps, encoder_hidden_states=context).sample  # type: ignore[no-any-return]


def as_host(pipe: Any) -> HostPipeline:
    native, vae, text = Native(pipe.unet), pipe.vae, pipe.text_encoder
    scale = vae.config.scaling_factor

    def predict(noisy: Tensor, steps: Tensor, states: Tensor, vector: Tensor | None) -> Tensor:
        return native(noisy, steps, states)  # type: ignore[no-any-return]

    part = TextPart(
        pipe.tokenizer,
        lambda ids: (text(ids)[0], None),
        text.get_input_embeddings(),
        text,
    )
    return HostPipeline(
        Parts(
            native,
            predict,
            pipe.scheduler.alphas_cumprod,
            pipe.scheduler.config.prediction_type,
            [part],
            lambda pictures: vae.encode(pictures).latent_dist.mode() * scale,
            lambda latents: vae.decode(latents / scale).sample.clamp(-1, 1),
            len(vae.config.block_out_channels),
        )
    )


@pytest.fixture
def library(tmp_path: Path) -> Library:
    shutil.copytree(EXAMPLES, tmp_path / "adapters")
    return Library([tmp_path / "adapters"])


def pictures(folder: Path) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    from PIL import Image

    for number in range(2):
        values = (torch.rand(64, 64, 3, generator=generator) * 255).to(torch.uint8).numpy()
        Image.fromarray(values).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a picture of a <TOK>")
    return folder


def test_its_layers_are_those_of_diffusers(pipe: Any) -> None:
    host = as_host(pipe)
    for targets in ("attention", "attention+mlp", "all"):
        ours, theirs = (sc.find_targets(p.unet, "unet", targets)[0] for p in (host, pipe))
        assert ours.keys() == theirs.keys()
        assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in theirs)


def test_it_trains_what_diffusers_trains(pipe: Any, tmp_path: Path) -> None:
    from spectral_core.pipelines.job import Job as Concept
    from spectral_core.pipelines.train import train_adapter
    from spectral_core.training.engine.named_run import Output

    folder = pictures(tmp_path / "pictures")
    layers = {"method": "spectral_a", "rank": 2, "targets": "*attn2*", "text_targets": "*q_proj"}
    concept = Concept(str(folder), "<star>", size=(128, 128), cache=False, **layers)
    config = sc.TrainConfig(steps=3, warmup=0, batch_size=2)
    losses = []
    for name, model in (("host", as_host(pipe)), ("diffusers", pipe)):
        output = Output(tmp_path / name, "star", cache_folder=tmp_path / "cache")
        losses.append(train_adapter(model, concept, config, output).result.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert "forward" not in vars(pipe.text_encoder.get_input_embeddings())


def test_its_sampler_draws_the_concept(pipe: Any, library: Library) -> None:
    host = as_host(pipe)
    adapter = library.load(library.find("bot_spectral"))
    seen = []
    for model in (host, pipe):
        with sc.apply(model, adapter):
            seen += sc.generate(model, ["a photo of <bot>"], [3], steps=20, guidance=4.0, size=(128, 128))
    ours, theirs = (torch.tensor(list(p.convert("L").tobytes())).float() for p in seen)
    alike = torch.corrcoef(torch.stack([ours, theirs]))[0, 1]
    assert float(alike) > 0.8, f"{float(alike):.2f}"


@contextmanager
def opened(pipe: Any) -> Iterator[HostPipeline]:
    yield as_host(pipe)


def test_train_is_resumed_and_then_known(pipe: Any, library: Library, tmp_path: Path) -> None:
    folder = str(pictures(tmp_path / "pictures"))
    rows = training.train_settings()

    def run(steps: int, stop_at: int | None = None) -> str:
        job = Job("train", "star")
        if stop_at is not None:
            listen = job.__call__

            class Stopping(Job):
                def __call__(self, event: Any) -> None:
                    listen(event)
                    self.asked_to_stop |= event["event"] == "step" and event["step"] >= stop_at

            job = Stopping("train", "star")
        values = training.read({**QUICK, "steps": steps, "method": "lora"}, rows)
        return training.train(library, lambda: opened(pipe), folder, "<star>", "star", values, job)[0]

    assert "stopped at step 1 of 4" in run(4, stop_at=1)
    assert "saved as star" in run(4)
    assert "finished already" in run(4)
    assert "star" in [entry.name for entry in library.entries()]
    below = [path.name for path in library.folders[0].iterdir() if path.is_dir()]
    assert not below or below == [".locks"], "the cards would list a run's folders"
    assert library.load(library.find("star")).tokens.keys() == {"<star>"}


def test_closed_form_and_distil(pipe: Any, library: Library) -> None:
    names, weights = ["bot_spectral", "fish_spectral"], [1.0, 0.8]
    asked = FuseSettings(names, weights, "closed-form", name="seen")
    text, picture = training.fuse_seen(library, lambda: opened(pipe), asked, Job("fuse", ""))
    assert "saved as seen" in text and picture.width > 100
    values = training.read({"steps": 2, "samples": 1, "sample_steps": 2}, training.distil_settings())
    job = Job("distil", "both")
    asked = FuseSettings(names, weights, name="both")
    text, _ = training.distilled(library, lambda: opened(pipe), asked, values, job)
    assert "saved as both" in text and job.step == 2
    assert set(library.load(library.find("both")).tokens) == {"<bot>", "<fish>"}


def test_what_is_looked_at_has_the_size_that_was_asked_for(
    pipe: Any, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the model's own, 128: that takes minutes with a large model on a processor."""
    seen, real = [], training.concept_statistics

    def look(pipe: Any, adapters: Any, prompts: Any, looking: Any, *more: Any) -> Any:
        seen.append(looking.size)
        return real(pipe, adapters, prompts, looking, *more)

    monkeypatch.setattr(training, "concept_statistics", look)
    names = ["bot_spectral", "fish_spectral"]
    asked = FuseSettings(names, method="closed-form", name="seen", size=(64, 72))
    training.fuse_seen(library, lambda: opened(pipe), asked, Job("fuse", ""))
    values = {"steps": 1, "samples": 1, "sample_steps": 1, "size": "72x64"}
    settings = training.read(values, training.distil_settings())
    asked = FuseSettings(names, name="both")
    training.distilled(library, lambda: opened(pipe), asked, settings, Job("distil", "both"))
    assert list(dict.fromkeys(seen)) == [(64, 72), (72, 64)]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"stepz": 3}, "did you mean steps|expected"),
        ({"steps": 0}, "steps 0"),
        ({"columns": "a"}, "columns 'a'"),
        ({"steps": 2.5}, "steps 2.5"),
    ],
)
def test_settings_of_programs_are_checked(values: dict[str, Any], says: str) -> None:
    with pytest.raises(SpectralAdapterError, match=says):
        training.read(values, training.train_settings())


def test_settings_as_a_page_has_them_are_the_defaults() -> None:
    for rows in (training.train_settings(), training.distil_settings()):
        fields = {name: training.shown(row) for name, row in rows.items()}
        as_numbers = {n: float(v) if type(v) is int else v for n, v in fields.items()}
        assert training.read(as_numbers, rows) == {}
    read = training.read({"betas": "0.8,0.9", "size": "64", "columns": "0-2"}, training.train_settings())
    assert read == {"betas": (0.8, 0.9), "size": (64, 64), "columns": (0, 1, 2)}


def test_one_job_at_a_time_and_what_becomes_of_it() -> None:
    import threading

    jobs, go = Jobs(lambda job, function: function()), threading.Event()

    def work(job: Job) -> tuple[str, Any]:
        go.wait(5)
        job.check()
        return "done", None

    first = jobs.start("train", "a", work)
    with pytest.raises(SpectralAdapterError, match="train a is still"):
        jobs.start("fuse", "b", work)
    assert "keeps" not in jobs.stop()
    go.set()
    over(first)
    assert first.state == "stopped" and "train a: stopped" in jobs.shown()

    def broken(job: Job) -> tuple[str, Any]:
        raise SpectralAdapterError("no such folder")

    second = jobs.start("train", "b", broken)
    over(second)
    assert second.state == "failed" and jobs.values()["text"] == "no such folder"


def over(job: Job) -> None:
    import time

    until = time.monotonic() + 5
    while not job.is_over and time.monotonic() < until:
        time.sleep(0.01)


def test_an_inpainting_model_is_refused(pipe: Any) -> None:
    native = Native(pipe.unet)
    native.get_submodule("input_blocks.0")._modules["0"] = nn.Conv2d(9, 64, 3)
    with pytest.raises(SpectralAdapterError, match="9 input channels"):
        HostPipeline(Parts(native, None, torch.ones(10), "epsilon", [], None, None))  # type: ignore[arg-type]


def open_clip(width: int = 8, heads: int = 2) -> Any:
    """As OpenCLIP has it, of two blocks."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attn = nn.MultiheadAttention(width, heads)
            self.mlp = nn.Sequential()
            self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, 16), nn.Linear(16, width)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            h = self.ln_1(x)
            x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
            return x + self.mlp.c_proj(torch.relu(self.mlp.c_fc(self.ln_2(x))))  # type: ignore[no-any-return]

    return SimpleNamespace(transformer=SimpleNamespace(resblocks=nn.ModuleList([Block(), Block()])))


def test_open_clip_computes_the_same_by_layers_that_adapters_fit() -> None:
    model = open_clip()
    blocks, x = model.transformer.resblocks, torch.randn(5, 3, 8)
    mask = torch.full((5, 5), float("-inf")).triu(1)

    def run() -> Tensor:
        found = x
        for block in blocks:
            found = block(found, mask)
        return found

    before, tree = run(), OpenCLIPTree(model)
    name = "text_encoder_2.text_model.encoder.layers.1.self_attn.v_proj"
    weights, _ = sc.find_targets(tree, "text_encoder_2", [name.partition(".")[2]])
    adapter = sc.create(weights, sc.LoRAConfig(rank=1))
    params = {"down": torch.randn(1, 8), "up": torch.randn(8, 1)}
    adapter = adapter.map_terms(lambda _, term: type(term)(term.config, params))
    with tree.rerouted():
        assert torch.allclose(run(), before, atol=1e-5)
        with torch.no_grad():  # as a LoRA of the webui is written
            blocks[1].attn.in_proj_weight[16:] += params["up"] @ params["down"]
        merged = run()
        with torch.no_grad():
            blocks[1].attn.in_proj_weight[16:] -= params["up"] @ params["down"]
        with sc.attach(tree, adapter, part="text_encoder_2"):
            assert torch.allclose(run(), merged, atol=1e-4) and not torch.allclose(merged, before)
    assert not any("forward" in vars(m) for m in blocks.modules())


def test_tokens_of_open_clip_with_new_words() -> None:
    vocabulary = {"a": 0, "b": 1, "<start_of_text>": 2, "<end_of_text>": 3}
    tokens = OpenTokens(lambda text: [vocabulary[c] for c in text if c in "ab"], vocabulary, 0)
    tokens.add_tokens(["<w>", "<w>_1"])
    (row,) = tokens(["a <w> <w>_1 b"], max_length=8).input_ids.tolist()
    assert row == [2, 0, 4, 5, 1, 3, 0, 0]
    assert tokens("ab", add_special_tokens=False).input_ids == [0, 1]
