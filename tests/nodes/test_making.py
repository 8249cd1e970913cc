"""Strength, fusion, saving, export and report: what comes out, what is written, what is said."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.nodes.conftest import LAYERS, Pack

TEXT = next(name for name in LAYERS if name.startswith("text_encoder"))
DOWN, CROSS, MID, UP = list(LAYERS)[:4]


def scale(ours: Pack, *args: Any, **options: Any) -> Any:
    return ours.node("AdapterStrength").scale(*args, **options)["result"]


def test_strengths_of_model_and_clip(ours: Pack) -> None:
    adapter = ours.adapter()
    scaled, chain, report = scale(ours, adapter, 0.5, 0.25)
    assert scaled.strength_of(DOWN) == 0.5 and scaled.strength_of(TEXT) == 0.25
    assert adapter.strength_of(DOWN) == 1 and chain == (scaled,) and scaled.schedule is None
    assert "model: strength 0.5 in 4 layers" in report and "text encoder: strength 0.25 in 1" in report
    twice, chain, _ = scale(ours, scaled, 2.0, 2.0, adapters=chain)
    assert twice.strength_of(DOWN) == 1.0 and twice.strength_of(TEXT) == 0.5 and chain == (scaled, twice)


def test_strength_zero_is_exactly_off(ours: Pack) -> None:
    scaled, _, report = scale(ours, ours.adapter(), 0.0, 1.0)
    update = scaled.layers[DOWN].factors(scaled.strength_of(DOWN))
    assert not (update.scaled_up() @ update.down).any() and scaled.strength_of(TEXT) == 1
    assert "exactly off" in report


def test_schedule_and_blocks(ours: Pack) -> None:
    scaled, _, report = scale(
        ours, ours.adapter(), 1.0, 1.0, 0.25, 0.75, "linear in", "", "IN: 0.5\nattn2: 0\nTE: 2"
    )
    at = [scaled.schedule.at(p) for p in (0.0, 0.2, 0.25, 0.5, 0.7499, 0.75, 1.0)]
    assert at == pytest.approx([0, 0, 0, 0.5, 0.9998, 0, 0], abs=1e-6)
    strengths = [scaled.strength_of(name) for name in (DOWN, CROSS, MID, UP, TEXT)]
    assert strengths == [0.5, 0.0, 1.0, 1.0, 2.0]
    for part in ("IN × 0.5 (2 layers)", "attn2 × 0 (1 layers)", "0.5 at 0.5"):
        assert part in report
    again, _, _ = scale(ours, scaled, 1.0, 1.0, curve="custom", custom_curve="0:1, 1:0")
    assert again.schedule.at(0.5) == pytest.approx(0.25)
    with pytest.raises(ours.error, match=r"'down_blocks\.7' fits no layer.*unet\.down_blocks\.1"):
        scale(ours, ours.adapter(), 1.0, 1.0, block_weights="down_blocks.7: 1")
    with pytest.raises(ours.error, match="start below the end"):
        scale(ours, ours.adapter(), 1.0, 1.0, 0.5, 0.5)
    with pytest.raises(ours.error, match="expected an ADAPTER"):
        scale(ours, None, 1.0, 1.0)


def test_fuse_takes_the_list_with_its_strengths(ours: Pack) -> None:
    first, second, third = (ours.adapter(seed=i).with_provenance(name=f"c{i}") for i in range(3))
    _, chain, _ = scale(ours, third, 0.5, 0.25)
    out = ours.node("FuseAdapters").fuse(first, second, "sum", 1.0, 0.5, adapters=chain)
    fused, report, picture = out["result"]
    for name, clip in ((DOWN, 0.5), (TEXT, 0.25)):
        expected = sum(
            weight * (f.scaled_up() @ f.down)
            for weight, a in ((1.0, first), (0.5, second), (clip, third))
            for f in [a.layers[name].factors()]
        )
        update = fused.layers[name].factors()
        assert torch.allclose(update.scaled_up() @ update.down, expected, atol=1e-4)
    assert "c0" in report and "c2" in report
    assert picture.dtype == torch.float32 and picture.shape[0] == 1 and picture.shape[3] == 3
    assert picture.min() >= 0 and picture.max() <= 1
    (table,) = out["ui"]["spectral_bleed"]
    assert table["concepts"] == ["c0", "c1", "c2"] and table["kept"] == [None] * 3
    assert [row[i] for i, row in enumerate(table["bleed"])] == [1.0] * 3
    small = ours.node("FuseAdapters").fuse(first, second, target_rank=1)["result"][0]
    assert all(layer.factors().rank == 1 for layer in small.layers.values())


def test_methods_offered(ours: Pack) -> None:
    offered = ours.node("FuseAdapters").INPUT_TYPES()["required"]["method"][0]
    assert offered[:3] == ["sum", "average", "spectral"]
    fusions = ours.module("spectral_core.fusion").FUSIONS
    assert set(offered) == set(fusions)
    for method in offered:
        if not fusions[method].needs_statistics:
            ours.node("FuseAdapters").fuse(ours.adapter(), ours.adapter(seed=1), method)
            continue
        for connected, missing in (({}, "MODEL to 'model' and the CLIP"), ({"model": 1}, "connect the CLIP")):
            with pytest.raises(ours.error, match=f"method {method} .*{missing}"):
                ours.node("FuseAdapters").fuse(ours.adapter(), ours.adapter(seed=1), method, **connected)


def test_fuse_hands_on_what_is_asked_and_keeps_files_only_when_told(
    ours: Pack, folders: Any, monkeypatch: Any
) -> None:
    """With a stand-in for the host, which has seen the same noise under each concept."""
    asked: list[Any] = []
    moments = ours.module("spectral_core.statistics.moments")

    def collected(adapters: Any, request: Any, under: Any) -> Any:
        asked.append((request, under))
        generator = torch.Generator().manual_seed(3)
        seen = [
            {n: moments.Statistics.of(torch.randn(40, 6, generator=generator)) for n in (DOWN, CROSS, MID)}
            if sign
            else {}
            for sign in request.signs
        ]
        return SimpleNamespace(statistics=tuple(seen), lines=("statistics: drawn",))

    host = SimpleNamespace(
        collected=collected,
        conditionings=lambda value, _: list(value or []),
        Request=namedtuple(
            "Request", "model clip prompts conditioning signs latent steps cfg seed space rounds"
        ),
    )
    monkeypatch.setattr(ours.module("nodes.host.fusing"), "statistics", host, raising=False)
    one, two = ours.adapter(), ours.adapter(seed=1).with_provenance(name="dog", trigger_words=("dog",))
    fuse = ours.node("FuseAdapters").fuse
    more = {"model": "M", "clip": "C", "sample_steps": 3, "sample_cfg": 2.0, "sample_seed": 9}
    fused, report, _ = fuse(one, two, "closed-form", 1.0, -0.5, prompts="a tabby", **more)["result"]
    (request, alone), (_, under) = asked  # the second time under what was fused first
    assert alone is None and under.layers.keys() == fused.layers.keys() and request.rounds == 2
    assert request.prompts[0] == ("a tabby",) and request.prompts[1][0] == "a dog"
    assert (request.signs, request.steps, request.cfg, request.seed) == ([1, -1], 3, 2.0, 9)
    assert request.space == "auto"
    assert "retention on its own inputs: cat" in report and "statistics: drawn" in report
    assert "averaged instead: no statistics" in report, "the layers that were not seen"
    assert fused.layers[DOWN].factors().rank == 4
    assert not (folders.output / "spectral_statistics").exists()
    fuse(one, two, "closed-form-rank", save_statistics="mine", **more)
    assert asked[2][0].space == "rank"
    assert len(list((folders.output / "spectral_statistics").glob("mine_*.safetensors"))) == 2
    nameless = ours.adapter(seed=2).with_provenance(name="x", trigger_words=())
    with pytest.raises(ours.error, match=r"x names no trigger word.*line 2 of prompts"):
        fuse(one, nameless, "closed-form", **more)
    fuse(one, nameless, "closed-form", 1.0, 0.0, **more)
    assert asked[-1][0].signs == [1, 0]


def test_saved_files_are_numbered_and_load_again(ours: Pack, folders: Any) -> None:
    adapter, node = ours.adapter(), ours.node("SaveAdapter")
    out, file, report = node.save(adapter, "sub/cat", trigger_words=" tabby , cat ")["result"]
    assert file == "spectral_adapters/sub/cat_00001_.safetensors" and file in report
    assert out.provenance.trigger_words == ("tabby", "cat")
    again = node.save(adapter, "sub\\cat", "fp16")["result"][1]
    assert again == "spectral_adapters/sub/cat_00002_.safetensors"
    loaded = ours.node("LoadFouRA").load("sub/cat_00001_.safetensors", 1.0, 1.0)["result"][2]
    assert loaded.content_hash == adapter.content_hash and loaded.provenance.trigger_words == ("tabby", "cat")
    sizes = [(folders.output / name).stat().st_size for name in (file, again)]
    assert sizes[1] < sizes[0]
    assert sorted(p.name for p in folders.saved.rglob("*") if p.is_file()) == [
        "cat_00001_.safetensors", "cat_00002_.safetensors",
    ]  # fmt: skip


def test_saving_never_overwrites(ours: Pack, folders: Any, monkeypatch: Any) -> None:
    (folders.saved / "cat_00001_.safetensors").write_text("mine")
    monkeypatch.setattr(  # a host whose counter does not see the file
        folders.host, "get_save_image_path", lambda prefix, root, *_: (str(folders.saved), "cat", 1, "", "")
    )
    file = ours.node("SaveAdapter").save(ours.adapter(), "cat")["result"][1]
    assert file.endswith("cat_00002_.safetensors")
    assert (folders.saved / "cat_00001_.safetensors").read_text() == "mine"


@pytest.mark.parametrize("prefix", ["../x", "/x", "a/../../x", "C:/x", "", "..\\x"])
@pytest.mark.parametrize("name", ["SaveAdapter", "ExportAdapterAsLoRA"])
def test_saving_stays_in_its_folder(ours: Pack, folders: Any, name: str, prefix: str) -> None:
    node = ours.node(name)
    with pytest.raises(ours.error, match="file name"):
        getattr(node, node.FUNCTION)(ours.adapter(), prefix)
    assert not list(Path(folders.output).rglob("*.safetensors"))


def test_export_is_a_lora_in_the_hosts_folder(ours: Pack, folders: Any) -> None:
    adapter, node = ours.adapter(), ours.node("ExportAdapterAsLoRA")
    file, report = node.export(adapter)["result"]
    assert file == "loras/adapter_00001_.safetensors" and "5 layers in kohya names" in report
    read = ours.node("LoadLoRAAsAdapter").load("adapter_00001_.safetensors")["result"][0]
    assert set(read.layers) == set(LAYERS)
    scheduled, _, _ = scale(ours, adapter, 1.0, 1.0, 0.5, 1.0)
    with pytest.raises(ours.error, match="scheduled"):
        node.export(scheduled)
    assert "schedule was dropped" in node.export(scheduled, drop_schedule=True)["result"][1]


def test_files_for_load_lora_only_where_that_is_set(ours: Pack, folders: Any, monkeypatch: Any) -> None:
    fileformat = ours.module("spectral_core.files.adapter_file")
    for value, expected in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv(ours.module("nodes.host.startup").IN_LOAD_LORA, value)
        file = ours.node("SaveAdapter").save(ours.adapter(), f"for_{value or 'nothing'}")["result"][1]
        names = ours.module("spectral_core.files.container").open_safely(folders.output / file).entries
        assert (fileformat.CONFIG_KEY in names) == expected


def test_report_tells_and_shows(ours: Pack, folders: Any) -> None:
    samples, images = object(), object()
    out = ours.node("AdapterReport").report(ours.adapter(), samples=samples, images=images)
    report, picture, passed, shown = out["result"]
    assert passed is samples and shown is images
    for part in ("cat: 5 layers", "trigger words: cat, kitten", "effective rank", "no fingerprint"):
        assert part in report
    assert picture.shape[0] == 1 and picture.shape[3] == 3 and picture.shape[1] > 300
    (entry,) = out["ui"]["images"]
    assert entry["type"] == "temp" and (folders.temp / entry["filename"]).is_file()


def test_report_of_gates_without_and_with_a_run(ours: Pack, monkeypatch: Any) -> None:
    methods, module = ours.module("spectral_core.methods"), ours.module("spectral_core.adapter.adapter")
    adapter = module.create({name: torch.randn(8, 6) for name in list(LAYERS)[:4]}, methods.FouRAConfig(3))
    assert "none recorded yet" in ours.node("AdapterReport").report(adapter)["result"][0]
    recorder = ours.module("spectral_core.gates.record").GateRecorder()
    for name in adapter.layers:
        recorder.record(name, torch.tensor([[True, False, False]]), 0.05)
        recorder.record(name, torch.tensor([[True, True, False]]), 0.95)
    monkeypatch.setattr(ours.module("nodes.inspect"), "_record", lambda _: recorder.summary())
    report = ours.node("AdapterReport").report(adapter)["result"][0]
    assert "last run: 50%; noisiest to cleanest: 33%, –" in report and "67%" in report
    assert "may be of an earlier run" in report
    routed = ours.node("AdapterReport").report(adapter, samples=object())["result"][0]
    assert "last run: 50%" in routed and "earlier run" not in routed


def test_the_pack_registers_nothing_without_a_host(ours: Pack) -> None:
    ours.module("nodes.host.startup").start()
