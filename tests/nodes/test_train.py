"""Train Adapter without a host: what its widgets mean, which folders it offers, what it reports."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.nodes.conftest import Pack

OPTION_NODES = ("Layers", "Optimiser", "NoiseAndLoss", "Gate", "TextEncoder", "Memory", "Regularisation")
OPTION_NODES += ("Validation",)


def defaults(ours: Pack, kind: str) -> dict[str, Any]:
    """A node's widgets with their defaults."""
    types = ours.node(kind).INPUT_TYPES()
    inputs = {**types["required"], **types["optional"]}
    return {name: o["default"] for name, (_, o) in inputs.items() if "default" in o}


def told(ours: Pack, adapter: Any = None, **changes: Any) -> tuple[Any, list[str]]:
    """The job and the notes of the node with its defaults, changed; what is not on it is an option."""
    widgets = defaults(ours, "TrainAdapter")
    options = {name: value for name, value in changes.items() if name not in widgets}
    widgets |= {name: value for name, value in changes.items() if name in widgets}
    preset = widgets.pop("preset")
    made: tuple[Any, list[str]] = ours.module("nodes.train").job_of(widgets, preset, options, adapter)
    return made


def job(ours: Pack, adapter: Any = None, **changes: Any) -> Any:
    return told(ours, adapter, **changes)[0]


@pytest.fixture
def pictures(folders: Any, tmp_path: Path) -> Path:
    """The host's input folder with a folder of two pictures, one with a caption."""
    root = tmp_path / "input"
    (root / "cats/10_mine").mkdir(parents=True)
    (root / ".hidden").mkdir()
    folders.host.get_input_directory = lambda: str(root)
    Image.new("RGB", (40, 20), "red").save(root / "cats/10_mine/a.png")
    Image.new("RGB", (20, 40), "blue").save(root / "cats/10_mine/b.png")
    (root / "cats/10_mine/a.txt").write_text("a cat")
    return root


def test_defaults_are_those_of_the_trainer(ours: Pack) -> None:
    config = ours.module("spectral_core.training.config.config").TrainConfig
    assert job(ours).config == config()
    assert job(ours).images == "" and job(ours).columns == ()


def test_option_nodes_offer_every_setting_once_and_change_nothing_by_themselves(ours: Pack) -> None:
    offered: list[str] = []
    chained = None
    for kind in OPTION_NODES:
        widgets = defaults(ours, f"Train{kind}")
        offered += widgets
        (chained,) = ours.node(f"Train{kind}").collect(chained, **widgets)
    table = ours.module("nodes.train_inputs").rows()
    on_the_node = set(defaults(ours, "TrainAdapter"))
    wanted = {name for name, row in table.items() if not row.words.command_only} - on_the_node
    assert sorted(offered) == sorted(wanted) and len(defaults(ours, "TrainAdapter")) <= 9
    plain, _ = told(ours)
    with_all, notes = told(ours, **chained)
    assert with_all == plain and not [note for note in notes if "not read" in note]


def test_options_are_chained_and_the_last_one_counts(ours: Pack) -> None:
    (first,) = ours.node("TrainMemory").collect(batch_size=2, accumulation=3)
    (both,) = ours.node("TrainMemory").collect(first, batch_size=4)
    assert both == {"batch_size": 4, "accumulation": 3} and first["batch_size"] == 2
    need = ours.module("nodes.train_options").need_options
    assert need(None) == {} and need(both) is both
    with pytest.raises(ours.error, match="expected the output of a Training node"):
        need(3)
    with pytest.raises(ours.error, match="did you mean 'batch_size'"):
        job(ours, batch_sizes=3)


def test_presets_stand_behind_options_and_the_widgets(ours: Pack) -> None:
    style, notes = told(ours, preset="a style")
    assert (style.rank, style.config.steps, style.targets) == (16, 1000, "attention+mlp")
    assert style.config.schedule == "cosine" and "steps 1000" in notes[0]
    mine, notes = told(ours, preset="a style", rank=3, steps=7, targets="all", schedule="linear")
    assert (mine.rank, mine.config.steps, mine.targets, mine.config.schedule) == (3, 7, "all", "linear")
    assert notes == []
    with pytest.raises(ours.error, match="did you mean 'a person'"):
        job(ours, preset="a persn")


def test_options_that_the_method_does_not_read_are_said(ours: Pack) -> None:
    assert any("target_open: not read by lora" in n for n in told(ours, method="lora", target_open=0.3)[1])
    assert not any("not read" in n for n in told(ours, method="foura", target_open=0.3)[1])


def test_the_seed_does_not_change_by_itself(ours: Pack) -> None:
    _, options = ours.node("TrainOptimiser").INPUT_TYPES()["optional"]["seed"]
    assert options["control_after_generate"] is False and options["max"] == 0xFFFFFFFF


@pytest.mark.parametrize("preset", ["an object", "a person", "a style", "quick look"])
def test_every_preset_is_a_job(ours: Pack, preset: str) -> None:
    assert job(ours, preset=preset).config.steps > 0


@pytest.mark.parametrize(
    ("text", "columns"), [("", ()), ("0-3", (0, 1, 2, 3)), (" 2 , 4 - 5,", (2, 4, 5)), ("7", (7,))]
)
def test_columns(ours: Pack, text: str, columns: tuple[int, ...]) -> None:
    assert job(ours, method="spectral_a", columns=text).columns == columns


@pytest.mark.parametrize(
    "wrong",
    [
        {"columns": "3-1"}, {"columns": "a"}, {"columns": "0-99999999"}, {"steps": -1}, {"run_name": "a/b"},
        {"run_name": ".x"}, {"run_name": ""}, {"rank": -1}, {"optimiser": "sgd"},
        {"optimiser": "schedulefree", "schedule": "cosine"}, {"method": "spectral_a", "columns": "1,1"},
        {"text_targets": "attention"}, {"init_words": "dog", "trigger_word": "<x>"},
        {"images": "cats", "init_words": "dog", "trigger_word": "two words"},
        {"images": "cats", "init_words": "dog"}, {"sample_every": -1},
        {"validation_share": 0.5, "validation_images": "cats"}, {"validation_share": 1.0},
        {"patience": 2, "freeze_gates": True}, {"validation_every": 0},
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(ours: Pack, wrong: dict[str, Any]) -> None:
    with pytest.raises(ours.error):
        job(ours, **wrong)


def test_settings_tell_runs_apart(ours: Pack) -> None:
    plain = job(ours).settings()
    for same in ({"run_name": "other"}, {"checkpoint_every": 7}, {"trigger_word": "without images"}):
        assert job(ours, **same).settings() == plain
    for same in ({"sample_every": 5}, {"sample_prompt": "a cat"}, {"text_targets": " "}, {"resolution": 64}):
        assert job(ours, **same).settings() == plain
    assert not {"init_words", "text_targets"} & set(plain), "runs of earlier versions are found again"
    folder = {"images": "cats", "trigger_word": "<x>"}
    for other in ({"text_targets": "attention"}, {"init_words": "dog"}):
        assert job(ours, **folder, **other).settings() != job(ours, **folder).settings()
        assert job(ours, **folder, **other).trains_text and not job(ours, **folder).trains_text
    assert job(ours, prior_images="cats", resolution=64).settings()["resolution"] == 64
    assert job(ours, prior_weight=0.5).config.prior_weight == 0.5
    for other in ({"rank": 3}, {"method": "lora"}, {"targets": "all"}, {"precision": "bf16"}):
        assert job(ours, **other).settings() != plain
    with pytest.raises(ours.error, match="a connected adapter"):
        job(ours, ours.adapter(seed=1), **folder, text_targets="attention")
    first, second = ours.adapter(seed=1), ours.adapter(seed=2)
    assert job(ours, first).settings() == job(ours, first, rank=99).settings()
    assert job(ours, first).settings() != job(ours, second).settings()
    assert job(ours, first).method == "lora"


def test_folders_below_the_input_folder(ours: Pack, pictures: Path) -> None:
    data, node = ours.module("nodes.host.training.data"), ours.node("TrainAdapter")
    assert data.folders() == ["none", "cats", "cats/10_mine"]
    assert node.VALIDATE_INPUTS(["cats"]) is True and node.VALIDATE_INPUTS("none") is True
    for wrong in ("dogs", "../input/cats", "/etc"):
        assert isinstance(node.VALIDATE_INPUTS([wrong]), str)
    prior = ours.node("TrainRegularisation")
    assert isinstance(prior.VALIDATE_INPUTS("dogs"), str) and prior.VALIDATE_INPUTS("cats/10_mine") is True
    before = node.IS_CHANGED(["cats"], steps=[1])
    assert before == node.IS_CHANGED("cats") == prior.IS_CHANGED("cats", prior_weight=1.0)
    assert prior.IS_CHANGED("none") == "" != before != node.IS_CHANGED("cats/10_mine")
    os.utime(pictures / "cats/10_mine/a.txt", (1, 1))
    assert node.IS_CHANGED(["cats"]) != before


def test_pictures_are_looked_at_before_anything_is_loaded(ours: Pack, pictures: Path) -> None:
    data = ours.module("nodes.host.training.data")
    square = data.Framing(64, False, 8)
    seen = data.look_at("cats", "", data.Framing(64, True, 8))
    assert [e.repeats for e in seen.examples] == [10, 10] and len(seen.notes) == 1
    assert seen.sizes[0][0] > seen.sizes[0][1] and seen.sizes[1][0] < seen.sizes[1][1]
    assert data.look_at("cats", "<it>", data.Framing(64, True, 8)).digest != seen.digest
    prior = data.look_at_prior("cats", " dog ", square)
    assert [e.caption for e in prior.examples] == ["a cat", "a picture of dog"]
    assert [e.caption for e in data.look_at_prior("cats", "", square).examples] == ["a cat", ""]
    assert prior.sizes == ((64, 64), (64, 64)) and prior.notes == ()
    (pictures / "cats/10_mine/a.txt").unlink()
    with pytest.raises(ours.error, match="none of its 2 pictures has a caption"):
        data.look_at("cats", "", square)
    with pytest.raises(ours.error, match="multiple of 8"):
        data.Framing(60, False, 8)
    (pictures / "cats/10_mine/b.png").write_bytes(b"no picture")
    for look in (data.look_at, data.look_at_prior):
        with pytest.raises(ours.error, match=r"b\.png"):
            look("cats", "x", square)


def test_prior_pictures_stand_behind_the_concepts(ours: Pack) -> None:
    data = ours.module("nodes.host.training.data")

    def made(count: int, entries: dict[Any, Any], masks: Any = None, **more: Any) -> Any:
        latents = [torch.full((1,), float(i)) for i in range(count)]
        return data.Data(latents, entries, "x", masks, [data.Repeats(3)] * count, **more)

    own = made(2, {None: "empty", 0: "a", 1: "b"}, notes=["odd"])
    prior = made(1, {None: "other", 0: "c"}, [torch.ones(1)])
    both = own.with_prior(prior)
    assert both.entries == {None: "empty", 0: "a", 1: "b", 2: "c"} and both.notes == ["odd"]
    assert both.masks[:2] == [None, None] and torch.equal(both.masks[2], torch.ones(1))
    assert [r.repeats for r in both.shown(prior=False)] == [3, 3, 0]
    assert [r.repeats for r in both.shown(prior=True)] == [0, 0, 3]
    assert (both.concept_count, own.concept_count) == (2, 2)
    assert [r.repeats for r in own.shown(prior=False)] == [3, 3] and len(own.latents) == 2
    words = made(1, {}, captions={None: "", 0: "a"}).with_prior(made(1, {}, captions={None: "", 0: "c"}))
    assert words.captions == {None: "", 0: "a", 1: "c"} and words.masks is None


class Model:
    """What of a MODEL the data is asked of: its latent format."""

    def get_model_object(self, name: str) -> Any:
        assert name == "latent_format"
        return SimpleNamespace(latent_channels=4, process_in=lambda latent: 2 * latent)


def conditioning(rows: int = 1) -> list[Any]:
    return [[torch.randn(rows, 3, 5), {"pooled_output": torch.randn(rows, 5)}]]


def test_lists_and_batches_of_latents(ours: Pack) -> None:
    data = ours.module("nodes.host.training.data")
    latents = [{"samples": torch.randn(2, 4, 8, 8)}, {"samples": torch.randn(1, 4, 8, 16)}]
    with torch.inference_mode():
        one = data.from_nodes(Model(), latents, [conditioning()], None)
        assert len(one.latents) == 3 and not one.latents[0].is_inference() and not one.can_drop
        assert torch.equal(one.latents[2], 2 * latents[1]["samples"][0])
        assert one.groups == [(4, 8, 8), (4, 8, 8), (4, 8, 16)]
        each = data.from_nodes(Model(), latents, [conditioning(2), conditioning()], None)
        assert each.entries[0][0].shape == (1, 3, 5) and each.entries[1][1]["pooled_output"].shape == (1, 5)
        assert each.digest != one.digest
        for wrong, match in (
            ([conditioning(2)], "3 latents and 2 conditionings"),
            ([], "3 latents and 0"),
            (["text"], "expected a CONDITIONING"),
        ):
            with pytest.raises(ours.error, match=match):
                data.from_nodes(Model(), latents, wrong, None)
        for samples, match in (
            (torch.randn(1, 16, 8, 8), "16 channels"),
            (torch.full((1, 4, 8, 8), torch.nan), "not finite"),
        ):
            with pytest.raises(ours.error, match=match):
                data.from_nodes(Model(), [{"samples": samples}], [conditioning()], None)
        with pytest.raises(ours.error, match="expected a LATENT"):
            data.from_nodes(Model(), [torch.zeros(1)], [conditioning()], None)


def test_report(ours: Pack) -> None:
    report = ours.module("nodes.train").report_of
    losses = (4.0, *[1.0] * 18, 0.5)
    result = SimpleNamespace(losses=losses, seconds=12.4, resumed_at=5, held_out={10: 0.9, 20: 1.1})
    place = SimpleNamespace(name="cat-2")
    done = SimpleNamespace(result=result, place=place, notes=("odd",), reused=False)
    text = report(done, 20, "spectral_adapters/cat-2.safetensors", "summary")
    for part in (
        "run cat-2: 20 steps in 12 s, resumed at step 5",
        "loss 2.5000 at first, 0.7500",
        "note: odd",
        "held-out loss 1.1000 at step 20, lowest 0.9000 at step 10",
    ):
        assert part in text
    again = report(SimpleNamespace(**{**vars(done), "reused": True}), 20, "f", "summary")
    assert "nothing was trained" in again
