"""Names, files, the model that is left alone, and what the tab and the routes do; no host."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from spectral_core.adapter.adapter import Adapter, create
from spectral_core.adapter.schedule import Schedule
from spectral_core.errors import SpectralAdapterError
from spectral_core.files import adapter_file
from spectral_core.files.lora_import import read_lora
from spectral_core.methods import FouRAConfig, LoRAConfig
from spectral_core.names.unet_blocks import UNetLayout, unet_table
from spectral_webui import a1111, api, forge, infotext, page, places, tab, tools
from spectral_webui.active import Active
from spectral_webui.extension import Extension, host_of
from spectral_webui.library import Library

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "example_workflows" / "adapters" / "examples"
DEMO = UNetLayout.from_config(json.loads((ROOT / "demo_model/unet/config.json").read_text(encoding="utf-8")))
SD1 = UNetLayout.sd1()
CONV = "down_blocks.1.resnets.1.conv1"
TEXT = "text_encoder.text_model.encoder.layers.0.mlp.fc1"


def tree(paths: dict[str, nn.Module]) -> nn.Module:
    root = nn.Module()
    for path, module in paths.items():
        *folders, last = path.split(".")
        inner = root
        for step in folders:
            if not hasattr(inner, step):
                inner.add_module(step, nn.Module())
            inner = getattr(inner, step)
        inner.add_module(last, module)
    return root


def sd_model() -> Any:
    """A UNet's blocks with native names, one layer in use, and a text encoder's layer, as A1111 has them."""
    paths: dict[str, nn.Module] = {native: nn.Identity() for native in unet_table(SD1).values()}
    paths[unet_table(SD1)[CONV]] = nn.Linear(4, 3)
    text = tree({TEXT.removeprefix("text_encoder."): nn.Linear(2, 5)})
    stage = SimpleNamespace(wrapped=SimpleNamespace(transformer=text, model=None))
    return SimpleNamespace(
        model=SimpleNamespace(diffusion_model=tree(paths)), cond_stage_model=stage, text=text
    )


def adapter(config: Any = None, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    weights = {f"unet.{CONV}": torch.randn(3, 4, generator=generator), TEXT: torch.randn(5, 2)}
    made = create(weights, config or LoRAConfig(rank=2))

    def drawn(key: str, value: torch.Tensor) -> torch.Tensor:
        draw = torch.rand if key == "gate.mean_open" else torch.randn
        return draw(value.shape, generator=generator).to(value.dtype)

    return made.map_terms(
        lambda _, term: replace(term, params={k: drawn(k, v) for k, v in term.params.items()})
    )


class Words:
    """A1111's side with its words kept in a list, because the host's database is not here."""

    def __init__(self) -> None:
        self.known: list[str] = []

    known_names = staticmethod(a1111.known_names)
    unet = staticmethod(a1111.unet)
    text_encoders = staticmethod(a1111.text_encoders)
    progress = staticmethod(a1111.progress)

    def add_words(self, model: Any, words: Any) -> Any:
        self.known += words
        return lambda: [self.known.remove(word) for word in words]


def modules(model: Any) -> list[nn.Module]:
    return [*model.model.diffusion_model.modules(), *model.text.modules()]


@pytest.mark.parametrize("config", [LoRAConfig(rank=2), FouRAConfig(rank=2)])
def test_on_the_model_and_off_again_without_a_trace(config: Any) -> None:
    model, host, active = sd_model(), Words(), Active()
    layer = model.model.diffusion_model.get_submodule(unet_table(SD1)[CONV])
    text = model.text.get_submodule(TEXT.removeprefix("text_encoder."))
    x, y = torch.randn(6, 4), torch.randn(6, 2)
    before = layer(x), text(y), {k: v.clone() for k, v in layer.state_dict().items()}
    tokens = {"<w>": {"text_encoder": torch.ones(1, 2)}}
    given = replace(adapter(config), tokens=tokens).with_layer_strength("unet.down_blocks.*", 0.5)
    active.put("a", given, host, model)
    if isinstance(config, LoRAConfig):
        delta = given.layers[f"unet.{CONV}"].factors(0.5)
        expected = before[0] + x @ delta.down.T @ delta.scaled_up().T
        assert torch.allclose(layer(x), expected, atol=1e-5)
    assert not torch.equal(layer(x), before[0]) and not torch.equal(text(y), before[1])
    assert host.known == ["<w>"] and not active.notes
    active.clear()
    assert host.known == []
    assert torch.equal(layer(x), before[0]) and torch.equal(text(y), before[1])
    assert all(torch.equal(v, before[2][k]) for k, v in layer.state_dict().items())
    assert not any("forward" in vars(module) for module in modules(model))


def test_a_schedule_follows_the_steps_in_the_unet_alone() -> None:
    model, active = sd_model(), Active()
    layer = model.model.diffusion_model.get_submodule(unet_table(SD1)[CONV])
    text = model.text.get_submodule(TEXT.removeprefix("text_encoder."))
    x, y = torch.randn(6, 4), torch.randn(6, 2)
    base, text_base = layer(x), text(y)
    active.put("a", adapter().with_schedule(Schedule.window(0.0, 0.5)), Words(), model)
    on, text_on = layer(x), text(y)
    active.set_progress(0.9)
    assert torch.equal(layer(x), base) and not torch.equal(on, base)
    assert torch.equal(text(y), text_on) and not torch.equal(text_on, text_base)
    active.clear()


def test_a_failure_halfway_leaves_nothing() -> None:
    class Broken(Words):
        def add_words(self, model: Any, words: Any) -> Any:
            raise SpectralAdapterError("no such word")

    model, active = sd_model(), Active()
    tokens = {"<w>": {"text_encoder": torch.ones(1, 2)}}
    with pytest.raises(SpectralAdapterError, match="no such word"):
        active.put("a", replace(adapter(), tokens=tokens), Broken(), model)
    assert not any("forward" in vars(module) for module in modules(model)) and not active.is_on


def test_layers_without_a_place_are_told() -> None:
    model, active = sd_model(), Active()
    given = adapter()
    stray = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"
    active.put("a", replace(given, layers={**given.layers, stray: given.layers[TEXT]}), Words(), model)
    assert "1 layers have no place" in active.notes[0] and stray in active.notes[0]
    active.clear()
    with pytest.raises(SpectralAdapterError, match="none of its 1 layers"):
        active.put("a", Adapter({"unet.no.such": given.layers[TEXT]}), Words(), model)


def test_a_layer_of_strength_zero_is_off() -> None:
    found = places.sides(adapter().with_layer_strength("unet.*", 0.0), SD1, ("text_encoder",))
    assert list(found.adapters) == ["text_encoder"] and not found.lost


class Picture(SimpleNamespace):
    """What the host calls p."""

    def __init__(self, model: Any) -> None:
        super().__init__(
            sd_model=model, prompts=["a"], negative_prompts=[""], extra_generation_params={}, comments=[]
        )
        self.cached_c = ["key", "encoding"]

    def comment(self, text: str) -> None:
        self.comments.append(text)


def test_tags_go_on_and_mistakes_under_the_picture(tmp_path: Path) -> None:
    extension, model = Extension([tmp_path]), sd_model()
    adapter_file.save(adapter(), tmp_path / "one.safetensors")
    p = Picture(model)
    extension.activate(p, [["one", "0.5"], ["oen"], ["one", "start=x"]])
    assert [text.partition(":")[0] for text in p.comments] == ["Spectral Adapters"] * 2
    assert "did you mean one?" in p.comments[0] and "start is 'x'" in p.comments[1]
    assert p.extra_generation_params[infotext.PROBLEMS].count(";") >= 1
    assert list(infotext.read(p.extra_generation_params[infotext.KEY])) == ["one"]
    assert any("forward" in vars(module) for module in modules(model))
    extension.activate(Picture(model), [])
    assert not any("forward" in vars(module) for module in modules(model))


def test_an_earlier_picture_that_is_forgotten_late_takes_nothing_off(tmp_path: Path) -> None:
    extension, model = Extension([tmp_path]), sd_model()
    adapter_file.save(adapter(), tmp_path / "one.safetensors")
    first, second = Picture(model), Picture(model)
    extension.activate(first, [["one"]])
    extension.activate(second, [["one"]])
    del first
    assert any("forward" in vars(module) for module in modules(model))
    del second  # as after an exception in the sampler
    assert not any("forward" in vars(module) for module in modules(model))


def test_a_changed_file_forgets_the_hosts_encodings(tmp_path: Path) -> None:
    extension, model = Extension([tmp_path]), sd_model()
    path = adapter_file.save(adapter(), tmp_path / "one.safetensors")
    p = Picture(model)
    extension.activate(p, [["one"]])
    assert p.cached_c == ["key", "encoding"]
    path.unlink()
    adapter_file.save(adapter(seed=1).with_provenance(name="another"), path)
    extension.activate(p, [["one"]])
    assert p.cached_c == [None, None]
    extension.clear()


def test_the_host_is_told_by_its_model() -> None:
    assert host_of(SimpleNamespace(forge_objects=None)) is not host_of(SimpleNamespace())


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["clip_l"], ["text_encoder"]),
        (["clip_h"], ["text_encoder"]),
        (["clip_l", "clip_g"], ["text_encoder", "text_encoder_2"]),
        (["clip_l", "t5xxl"], ["text_encoder", "text_encoder_2"]),
        (["qwen"], []),
    ],
)
def test_forges_text_encoders(names: list[str], parts: list[str]) -> None:
    inner = {name: SimpleNamespace(transformer=nn.Linear(1, 1)) for name in names}
    clip = SimpleNamespace(cond_stage_model=SimpleNamespace(**inner))
    found = forge.text_encoders(SimpleNamespace(forge_objects=SimpleNamespace(clip=clip)))
    assert list(found) == parts


def test_forges_words_come_and_go_and_the_users_own_stay() -> None:
    class Database:
        expected_shape = 7  # SDXL's, of both encoders

        def __init__(self) -> None:
            self.word_embeddings: dict[str, Any] = {"<w>": "the user's"}

        def register_embedding_by_name(self, embedding: Any, name: str) -> None:
            self.word_embeddings.pop(name, None)
            if embedding is not None:
                self.word_embeddings[name] = embedding

    database = Database()
    embeddings = SimpleNamespace(token_embedding=nn.Embedding(4, 2))
    encoder = SimpleNamespace(transformer=SimpleNamespace(text_model=SimpleNamespace(embeddings=embeddings)))
    engine = SimpleNamespace(embeddings=database, embedding_key="clip_l", text_encoder=encoder)
    model = SimpleNamespace(text_processing_engine=engine)
    rows = {"text_encoder": torch.ones(3, 2)}
    undo = forge.add_words(model, {"<w>": rows, "<v>": rows})
    assert database.word_embeddings["<v>"].vectors == 3 and database.word_embeddings["<w>"] != "the user's"
    undo()
    assert database.word_embeddings == {"<w>": "the user's"}
    with pytest.raises(SpectralAdapterError, match="rows of 5 numbers, expected 2"):
        forge.add_words(model, {"<v>": rows, "<u>": {"text_encoder": torch.ones(1, 5)}})
    assert database.word_embeddings == {"<w>": "the user's"}


@pytest.fixture
def library(tmp_path: Path) -> Library:
    shutil.copytree(EXAMPLES, tmp_path / "adapters")
    (tmp_path / "loras").mkdir()
    return Library([tmp_path / "adapters"], [tmp_path / "loras"])


def test_files_are_found_by_name_base_name_and_hash(library: Library) -> None:
    names = [entry.name for entry in library.entries()]
    assert names == ["bot_foura", "bot_spectral", "fish_spectral", "house_spectral"]
    assert library.find("some/folder/bot_foura").name == library.find("BOT_foura.safetensors").name
    entry = library.find("bot_foura")
    assert library.by_hash(library.hash_of(entry)) == entry
    with pytest.raises(SpectralAdapterError, match="did you mean bot_foura"):
        library.find("bot_fuora")


def test_fuse_and_report(library: Library) -> None:
    asked = tools.FuseSettings(["bot_spectral", "fish_spectral"], [1, 0.5], name="both")
    name, text, picture = tools.fused(library, asked)
    assert name == "both" and "both" in text and picture.width > 100
    assert set(library.load(library.find("both")).tokens) == {"<bot>", "<fish>"}
    assert tools.fused(library, replace(asked, weights=()))[0] == "both_2"
    text, picture = tools.report(library, "bot_foura")
    assert "<bot>" in text and picture.width > 100
    for names, weights in ((["bot_foura"], []), (["bot_foura", "fish_spectral"], [1.0])):
        with pytest.raises(SpectralAdapterError, match="expected"):
            tools.fused(library, tools.FuseSettings(names, weights))


@pytest.mark.parametrize("name", ["../out", "/etc/x", "a:b", "", "."])
def test_new_files_stay_in_their_folder(library: Library, name: str) -> None:
    with pytest.raises(SpectralAdapterError, match="expected a file name"):
        tools.new_file(library.folders[0], name)


def test_export_uses_the_models_own_block_numbers_and_takes_the_words(library: Library) -> None:
    path, text = tools.exported(library, "bot_spectral", library.lora_folders[0], "fp32", layout=DEMO)
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
        row = file.get_tensor("bundle_emb.<bot>.string_to_param.*")
    layers = {key.split(".")[0] for key in keys} - {"bundle_emb"}
    flat = {"lora_unet_" + native.replace(".", "_") for native in unet_table(DEMO).values()}
    assert layers <= flat and all("_block" in layer for layer in layers)
    original = library.load(library.find("bot_spectral"))
    assert torch.equal(row, original.tokens["<bot>"]["text_encoder"].float())
    again = read_lora(path, DEMO)
    assert set(again.adapter.layers) == set(original.layers)
    assert "Automatic1111 reads them" in text
    with pytest.raises(SpectralAdapterError, match="no such block, so that"):
        tools.exported(
            library, "bot_spectral", library.lora_folders[0], layout=UNetLayout(((0,),), 0, ((0,),))
        )


def test_progress_of_both_kinds_of_samplers() -> None:
    sigma = torch.tensor([3.0, 3.0])
    by_step = SimpleNamespace(sigma=torch.tensor([999.0]), denoiser=SimpleNamespace(inner_model=object()))
    inner = SimpleNamespace(sigma_to_t=lambda s: torch.full_like(s, 333.0))
    by_sigma = SimpleNamespace(sigma=sigma, denoiser=SimpleNamespace(inner_model=inner))
    assert a1111.progress(None, by_step) == 0.0
    assert a1111.progress(None, by_sigma) == pytest.approx(1 - 333 / 999)


def test_progress_of_a_flow_is_that_of_its_levels() -> None:
    """Whatever the host says of percents, and also when it changes the shift of the same object."""

    class Predictor(torch.nn.Module):
        prediction_type = "const"

        def shift_by(self, shift: float) -> None:
            times = torch.arange(1, 10001) / 10000
            self.register_buffer("sigmas", shift * times / (1 + (shift - 1) * times))

        def percent_to_sigma(self, percent: float) -> float:
            return 1 - percent

    predictor = Predictor()
    unet = SimpleNamespace(model=SimpleNamespace(predictor=predictor))
    model = SimpleNamespace(forge_objects=SimpleNamespace(unet=unet))
    for shift in (1.0, 3.0):
        predictor.shift_by(shift)
        for progress in (0.0, 0.25, 0.5, 0.9):
            time = 1 - progress
            sigma = shift * time / (1 + (shift - 1) * time)
            found = forge.progress(model, SimpleNamespace(sigma=torch.tensor([sigma, sigma])))
            assert found == pytest.approx(progress, abs=2e-4), (shift, progress)


def test_small_inputs_of_tab_and_routes() -> None:
    assert tab.numbers("1, 0.5;2") == [1, 0.5, 2]
    with pytest.raises(SpectralAdapterError, match="'x' is no number"):
        tab.numbers("1, x")
    known = api.credentials("a:b, c:d:e")
    assert api.is_known(known, "a", "b") and api.is_known(known, "c", "d:e")
    assert not api.is_known(known, "a", "c") and not api.is_known(known, "z", "")


@pytest.mark.parametrize(
    ("family", "loaded", "shown"),
    [
        ("sd1", "sd1", True),
        ("sd1", "sdxl", False),
        ("", "sdxl", True),
        ("sd1", "", True),
        ("flux", "sd1", False),
    ],
)
def test_cards_are_those_for_the_loaded_model(family: str, loaded: str, shown: bool) -> None:
    assert page.fits(family, loaded) == shown


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (128, "mini"), (99, "")])
def test_the_loaded_models_family(width: int, family: str) -> None:
    model = sd_model().model.diffusion_model
    block = model.get_submodule("input_blocks.1.1.transformer_blocks.0.attn2")
    block._modules["to_k"] = nn.Linear(width, 4)
    assert places.family_of(model) == family
    assert places.family_of(nn.Linear(2, 2)) == ""


QKV = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
PROJ = "diffusion_model.double_blocks.0.img_attn.proj.weight"
FLUX = {
    "transformer.transformer_blocks.0.attn.to_k": (QKV, (0, 4, 4)),
    "transformer.transformer_blocks.0.attn.to_out.0": PROJ,
    "lora_unet_double_blocks_0_img_attn_proj": PROJ,
    "transformer.norm_out.linear": ("diffusion_model.final.weight", None, lambda weight: weight),
}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("transformer.transformer_blocks.0.attn.to_k", "unet.double_blocks.0.img_attn.qkv[4:8]"),
        ("transformer.transformer_blocks.0.attn.to_k[1:2]", "unet.double_blocks.0.img_attn.qkv[5:6]"),
        ("transformer.transformer_blocks.0.attn.to_out.0", "unet.double_blocks.0.img_attn.proj"),
        ("kohya.lora_unet_double_blocks_0_img_attn_proj", "unet.double_blocks.0.img_attn.proj"),
        ("diffusion_model.double_blocks.0.img_attn.qkv[0:4]", "unet.double_blocks.0.img_attn.qkv[0:4]"),
        ("transformer.norm_out.linear", None),
        ("transformer.no.such", "unet.no.such"),
    ],
)
def test_layers_of_other_models_by_the_hosts_map(name: str, place: str | None) -> None:
    layer = next(iter(adapter().layers.values()))
    found = places.sides(Adapter({name: layer}), None, ("text_encoder",), lambda: FLUX)
    if place is None:
        assert "only a merged LoRA" in found.lost[name]
    else:
        assert list(found.adapters["unet"].layers) == [place]


def test_another_model_in_the_middle_of_a_picture(tmp_path: Path) -> None:
    """A refiner, or a model that the host loads into the same object: the adapters go on the new one."""
    extension, first, second = Extension([tmp_path]), sd_model(), sd_model()
    adapter_file.save(adapter(), tmp_path / "one.safetensors")
    p = Picture(first)
    extension.activate(p, [["one"]])
    extension.on_model(second)
    assert not any("forward" in vars(module) for module in modules(first))
    on = [module for module in modules(second) if "forward" in vars(module)]
    assert len(on) == 2
    extension.on_model(second)
    extension.activate(SimpleNamespace(prompts=None), [])  # as the host tries what it has loaded
    assert [module for module in modules(second) if "forward" in vars(module)] == on
    assert not p.comments
    (tmp_path / "one.safetensors").unlink()
    extension.on_model(first)
    assert len(p.comments) == 1 and "after the change of models: " in p.comments[0]
    assert not any("forward" in vars(module) for module in modules(second))
    extension.clear()
    extension.on_model(first)  # between pictures
    assert not any("forward" in vars(module) for module in modules(first))


def test_a_hundred_programs_leave_the_model_as_it_was(tmp_path: Path) -> None:
    """Requests with faults in any order, batches, second passes, other models, forgotten pictures."""
    import random

    rng = random.Random(0)
    extension, models = Extension([tmp_path]), [sd_model(), sd_model()]
    for name, config in (("lora", LoRAConfig(rank=2)), ("foura", FouRAConfig(rank=2))):
        adapter_file.save(adapter(config), tmp_path / f"{name}.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no such file")
    tags = [["lora", "0.5"], ["foura"], ["lora", "1", "stop=0.5"], ["foura", "mode=frozen"]]
    tags += [["no_such"], ["lora", "strong"], ["broken"], ["foura", "1", "0"], ["lora", "0"]]
    before = [{k: v.clone() for k, v in m.model.diffusion_model.state_dict().items()} for m in models]
    keys = [[set(vars(module)) for module in modules(m)] for m in models]
    inner = SimpleNamespace(sigma_to_t=lambda s: s)
    for _ in range(100):
        model = rng.choice(models)
        p = Picture(model)
        for _ in range(rng.randint(1, 3)):
            extension.activate(p, [list(tag) for tag in rng.choices(tags, k=rng.randint(0, 4))])
            for _ in range(rng.randint(0, 2)):
                sigma = torch.tensor([rng.uniform(0, 999)])
                extension.on_step(SimpleNamespace(sigma=sigma, denoiser=SimpleNamespace(inner_model=inner)))
            if rng.random() < 0.2:
                extension.on_model(rng.choice(models))
        if rng.random() < 0.5:
            extension.clear()  # else the picture is forgotten, as after an exception
        del p
        for m, was, known in zip(models, before, keys, strict=True):
            now = m.model.diffusion_model.state_dict()
            assert all(torch.equal(now[key], value) for key, value in was.items())
            assert [set(vars(module)) for module in modules(m)] == known
