"""The demo model's pictures and captions, and the tool that trains it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from demo_model import draw, figures, pictures
from demo_model.classifier import Classifier
from demo_model.grounds import GROUNDS

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tools.demo_training import autoencoder, common, reader, redraw, text_warmup, unet  # noqa: E402
from tools.demo_training.quick import QuickGroupNorm  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]


def shown(count: int, **options: bool) -> list[pictures.Picture]:
    return [pictures.random_picture(np.random.default_rng(seed), **options) for seed in range(count)]


@pytest.mark.parametrize("pixels", [64, 128])
def test_the_same_seed_is_the_same_picture_at_any_size(pixels: int) -> None:
    """A scene, a pair, a ground and a creature; half the size is the average of four pixels."""
    for seed, picture in enumerate(shown(12)):
        big, small = (
            np.asarray(pictures.draw_picture(picture, np.random.default_rng(seed), size), dtype=float)
            for size in (2 * pixels, pixels)
        )
        averaged = big.reshape(pixels, 2, pixels, 2, 3).mean(axis=(1, 3))
        assert small.shape == (pixels, pixels, 3)
        assert np.abs(averaged - small).mean() < 2.0, picture


def test_held_out_combinations_are_kept_out_of_pictures_too() -> None:
    def combinations(picture: pictures.Picture) -> list[bool]:
        objects = [(picture.shape, picture.colour), (picture.second, picture.second_colour)]
        return [draw.held_out(s, c, picture.background) for s, c in objects if s != draw.NONE]

    assert not any(any(combinations(p)) for p in shown(600))
    assert all(all(combinations(p)) for p in shown(100, evaluation=True))
    assert all(p.pair for p in shown(50, pair=True)) and not any(p.pair for p in shown(50, pair=False))


def test_a_wide_picture_shows_two_large_objects() -> None:
    """As large as one alone, each in its half; both said to be large, or neither."""
    for seed in range(20):
        picture = pictures.random_wide_picture(np.random.default_rng(seed), evaluation=True)
        assert picture.pair and picture.position == "beside"
        assert pictures.full_caption(picture).count("large") == 2
        assert pictures.caption(picture, np.random.default_rng(seed)).count("large") in (0, 2)
        wide = pictures.draw_wide(picture, np.random.default_rng(seed))
        again = pictures.draw_wide(picture, np.random.default_rng(seed))
        assert wide.size == pictures.WIDE == (192, 128) and wide.tobytes() == again.tobytes()
    dot = replace(
        picture, shape="square", colour="red", second="square", second_colour="blue", background="white"
    )
    dot = replace(dot, texture="plain", second_texture="plain", shading="plain")
    seen = np.asarray(pictures.draw_wide(dot, np.random.default_rng(1)), dtype=int)
    red, blue = seen[..., 0] - seen[..., 2] > 60, seen[..., 2] - seen[..., 0] > 60
    alone = pictures.draw_picture(replace(dot, second=draw.NONE, position="center"), np.random.default_rng(1))
    one = np.asarray(alone, dtype=int)
    size = (one[..., 0] - one[..., 2] > 60).sum()
    assert not red[:, 96:].any() and not blue[:, :96].any()
    assert all(0.7 < half.sum() / size < 1.4 for half in (red, blue))


@pytest.mark.parametrize("box", [(0, 0, 128, 128), (32, 0, 160, 128), (64, 32, 192, 96), (0, 0, 64, 64)])
def test_a_cell_of_the_latents_is_its_own_pixels_at_any_size(box: tuple[int, int, int, int]) -> None:
    """A part of a picture has the latents that the whole has there."""
    vae = unet.load_vae("cpu")
    wide = np.asarray(unet.wide_picture(3)[1])[None]
    left, top, right, bottom = box
    whole = autoencoder.encode(vae, wide, "cpu")[..., top // 8 : bottom // 8, left // 8 : right // 8]
    part = autoencoder.encode(vae, np.ascontiguousarray(wide[:, top:bottom, left:right]), "cpu")
    assert (whole - part).abs().max() < 0.5, "of a spread of 5"
    assert (whole - part).abs().mean() < 0.05


def test_every_creature_is_another() -> None:
    made = [figures.creature("red", np.random.default_rng(seed)) for seed in range(30)]
    assert len({str(parts) for parts in made}) == 30
    assert all(parts not in draw.CONCEPTS.values() for parts in made)


def test_captions_say_what_the_picture_shows() -> None:
    """The lesson's reader finds every attribute in a full caption, and nothing wrong in a partial one."""
    for seed, picture in enumerate(shown(400)):
        full = text_warmup.said(pictures.full_caption(picture))
        partial = text_warmup.said(pictures.caption(picture, np.random.default_rng(seed)))
        for name, values in text_warmup.VALUES.items():
            value = getattr(picture, name)
            silent = len(values)
            known = value in values and reader.applies(name, picture) and value != "plain"
            wanted = values.index(value) if known else silent
            if picture.shape == draw.NONE and name not in ("background", "shading"):
                wanted = silent
            assert full[name] == wanted, (name, pictures.full_caption(picture))
            plain = values.index("plain") if "plain" in values else silent
            assert partial[name] in (wanted, silent, plain)


@pytest.mark.parametrize("shape", [(3, 96, 8, 8), (2, 64, 50)])
@pytest.mark.parametrize("last", [False, True])
def test_the_quick_norm_is_the_norm(shape: tuple[int, ...], last: bool) -> None:
    torch.manual_seed(1)
    norm, quick = nn.GroupNorm(32, shape[1]), QuickGroupNorm(32, shape[1])
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    quick.load_state_dict(norm.state_dict())
    x, weight = torch.randn(shape) * 2 + 1, torch.randn(shape)
    if last and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    results = []
    for each in (norm, quick):
        given = x.clone().requires_grad_()
        output = each(given)
        (output * weight).sum().backward()
        results.append([output, given.grad, each.weight.grad, each.bias.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_quick_norm_in_bfloat16() -> None:
    torch.manual_seed(1)
    norm, quick = nn.GroupNorm(32, 64), QuickGroupNorm(32, 64)
    x = (torch.randn(2, 64, 32, 32) + 3).contiguous(memory_format=torch.channels_last)
    exact, rough = norm(x), quick(x.bfloat16())
    assert rough.dtype == torch.bfloat16 and (exact - rough.float()).abs().max() < 0.06


def test_what_a_picture_lacks_is_not_asked_of_the_classifier() -> None:
    pair, single = shown(1, pair=True)[0], shown(1, pair=False)[0]
    empty = replace(single, shape=draw.NONE)
    assert not reader.applies("size", pair) and reader.applies("second_colour", pair)
    assert reader.applies("size", single) and not reader.applies("second_colour", single)
    assert not reader.applies("colour", empty) and reader.applies("background", empty)
    truth = reader.targets([pair, single, empty])
    assert truth["size"][0] == -100 and truth["size"][1] >= 0 and truth["second_texture"][1] == -100
    logits = Classifier(reader.LABELS)(torch.rand(2, 3, 128, 128))
    assert {n: v.shape[1] for n, v in logits.items()} == {n: len(v) for n, v in reader.LABELS.items()}


@pytest.mark.parametrize("ground", list(GROUNDS))
def test_grounds_differ_from_each_other_and_from_seed_to_seed(ground: str) -> None:
    one, other = (GROUNDS[ground](np.random.default_rng(seed), 64) for seed in (1, 2))
    assert one.shape == (64, 64, 3) and not np.array_equal(one, other)
    for name, make in GROUNDS.items():
        if name != ground:
            assert np.abs(make(np.random.default_rng(1), 64) - one).mean() > 15


def test_a_bare_machine_goes_on_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a checkpoint the averaged weights and their step are the start; with one it is."""
    monkeypatch.setattr(unet, "MODEL", tmp_path)
    monkeypatch.setattr(common, "MODEL", tmp_path)
    monkeypatch.setattr(unet, "CHECKPOINT", tmp_path / "unet.pt")
    monkeypatch.setattr(unet, "load_tokenizer", lambda: None)
    monkeypatch.setattr(unet, "load_text", nn.Identity)
    shutil.copytree(ROOT / "demo_model" / "unet", tmp_path / "unet")
    fresh = unet.Trainer("cpu", 1e-3)
    fresh.resume()
    assert fresh.step == 0, "nobody has noted how far these weights are"
    with torch.no_grad():
        fresh.average.conv_out.bias.fill_(0.25)
    fresh.average.save_pretrained(tmp_path / "unet")
    common.note("text", 3, 2.0)
    common.note("unet", 700, 9.2)
    assert common.progress()["text"] == {"steps": 3, "seconds": 2}
    on = unet.Trainer("cpu", 1e-3)
    on.resume()
    assert (on.step, on.spent) == (700, 9)
    assert (on.unet.conv_out.bias == 0.25).all() and (on.average.conv_out.bias == 0.25).all()
    on.step = 800
    on.save(20.0)
    again = unet.Trainer("cpu", 1e-3)
    again.resume()
    assert (again.step, again.spent) == (800, 20.0)


def test_the_autoencoder_goes_on_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights and their step; the encoder stays as it is."""
    monkeypatch.setattr(autoencoder, "MODEL", tmp_path)
    monkeypatch.setattr(common, "MODEL", tmp_path)
    monkeypatch.setattr(autoencoder, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(autoencoder, "examples", dict)
    shutil.copytree(ROOT / "demo_model" / "vae", tmp_path / "vae")
    fresh = autoencoder.Trainer("cpu", "autoencoder")
    assert fresh.step == 0
    with torch.no_grad():
        fresh.average.decoder.conv_out.bias.fill_(0.25)
    fresh.step = 300
    autoencoder.export(fresh, 12.0)
    for part, step in (("autoencoder", 300), ("decoder", 0)):
        on = autoencoder.Trainer("cpu", part)
        on.resume()
        assert on.step == step and (on.model.decoder.conv_out.bias == 0.25).all()
        assert not on.model.encoder.conv_in.weight.requires_grad, "the denoiser has learned its latents"


def test_what_is_redrawn_stays_the_picture() -> None:
    """After any number of last steps, with a denoiser that is never wrong: to the noise of the very last."""
    redrawing = redraw.Redrawing("cpu")
    latents = torch.randn(2, 4, 16, 16)

    class Knowing(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, _: torch.Tensor) -> Any:
            alpha = redrawing.sampler.alphas_cumprod[int(t)]
            a, s, wanted = alpha.sqrt(), (1 - alpha).sqrt(), latents.repeat(2, 1, 1, 1)
            return SimpleNamespace(sample=a * (x - a * wanted) / s - s * wanted)

    redrawing.unet = Knowing()
    for steps in (1, redraw.LATEST):
        again = redrawing(latents, ["a red star", ""], steps)
        assert 0 < (again - latents).abs().max() < 0.2


def test_the_decoder_learns_from_redrawn_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the batch: from latents of nothing the same pictures cannot come back; the encoder stays."""
    monkeypatch.setattr(autoencoder, "CACHE", tmp_path)
    monkeypatch.setattr(autoencoder, "examples", dict)
    target = torch.stack([torch.full((3, 128, 128), value) for value in (-0.8, -0.3, 0.3, 0.8)])
    losses = []
    for redrawn in (None, torch.zeros(4, 4, 16, 16)):
        trainer = autoencoder.Trainer("cpu", "decoder")
        before = trainer.model.encoder.conv_in.weight.clone()
        torch.manual_seed(0)
        losses.append(trainer.update(target, 1.0, 1, redrawn))
        assert torch.equal(trainer.model.encoder.conv_in.weight, before)
    assert losses[1] > 2 * losses[0]


def test_pictures_that_are_drawn_otherwise_by_now_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "CACHE", tmp_path)
    drawn = np.stack([np.asarray(common.picture(number)[1]) for number in range(8)])
    np.save(tmp_path / "pictures.npy", drawn)
    assert common.pictures().shape == (8, 128, 128, 3)
    monkeypatch.setattr(common, "CREATURES", 0.18)
    with pytest.raises(SystemExit, match="holds other pictures"):
        common.pictures()


def test_a_character_stands_on_the_side_that_its_caption_says() -> None:
    sides = set()
    for seed in range(12):
        picture, caption = pictures.draw_beside("bot", seed, token="<TOK>")
        assert np.array_equal(picture, pictures.draw_beside("bot", seed)[0])
        first, second = caption.split(" on ")[0].split(" and ")
        colour = next(name for name in draw.COLOURS if name in (first + second).split())
        near = np.abs(np.asarray(picture, dtype=float) - draw.COLOURS[colour]).max(axis=2) < 40
        left, right = near[:, :64].sum(), near[:, 64:].sum()
        assert (left < right) == ("<TOK>" in first), (caption, left, right)
        sides.add("<TOK>" in first)
    assert sides == {True, False}


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_character_stands_where_it_is_told_as_large_as_alone(side: str) -> None:
    """Fish: its orange is in no other thing of these pictures."""
    drawn = [pictures.draw_beside("fish", seed, "<TOK>", 128, side) for seed in range(12)]
    seen = [
        (np.asarray(p, dtype=int), said) for p, said in drawn if "orange" not in said and "red" not in said
    ]
    alone = np.asarray(draw.draw_concept("fish", 2)[0], dtype=int)
    assert len(seen) > 4
    for image, said in seen:
        assert image.shape == (128, 128, 3) and said.count("large") == 2
        assert said.startswith("a large <TOK> and") == (side == "left")
        orange = (np.abs(image - (250, 112, 62)).max(axis=2) < 40).nonzero()
        face = (np.abs(image - (252, 240, 206)).max(axis=2) < 20).nonzero()
        assert (face[1].mean() < 60) == (side == "left"), said
        assert 300 < len(orange[0]) < 4 * (np.abs(alone - (250, 112, 62)).max(axis=2) < 40).sum()
