"""The extension in real webuis: pictures, exports, jobs, and that the base model stays what it was."""

from __future__ import annotations

import random
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.webui.booted import Webui

HIRES = {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.6}
HIRES |= {"hr_additional_modules": ["Use same choices"]}  # Forge's API fails without
UPSCALER = {"A1111": "Latent", "FORGE": "Latent", "NEO": "None"}  # Neo has no others without files


def test_everything_is_served(webui: Webui) -> None:
    """Routes, tab, page of cards and field are there, and nothing of ours was complained about."""
    assert tuple(a["name"] for a in webui.call("/spectral/v1/adapters")) == webui.names
    with urllib.request.urlopen(webui.address + "/", timeout=60) as answer:
        page = answer.read().decode()
    for part in ("spectral_fuse_run", "txt2img_spectral_cards", "spectral_adapters_txt2img"):
        assert part in page
    assert "Error loading script" not in webui.log
    assert "Spectral Adapters cannot run" not in webui.log


def test_routes_want_the_hosts_password(webui: Webui) -> None:
    for user in ("", "someone:wrong"):
        for path, body in (
            ("adapters", None),
            ("job", None),
            ("stop", {}),
            ("report", {"name": webui.plain}),
        ):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                webui.call(f"/spectral/v1/{path}", body, user)


def test_pictures(webui: Webui) -> None:
    prompt, live, plain = webui.concept, webui.live, webui.plain
    base = webui.picture(prompt)
    with_live = webui.picture(f"{prompt} <spectral:{live}:1>")
    assert np.abs(with_live - base).max() > 20
    field = {"spectral adapters": {"args": [f"{live}:1"]}}
    assert np.array_equal(with_live, webui.picture(prompt, alwayson_scripts=field))
    early = webui.picture(f"{prompt} <spectral:{live}:1:stop=0.5>")
    late = webui.picture(f"{prompt} <spectral:{live}:1:start=0.5>")
    assert not np.array_equal(early, with_live) and not np.array_equal(late, with_live)
    assert not np.array_equal(early, late)
    whole = webui.picture(f"{prompt} <spectral:{plain}:1>")
    halves = webui.picture(f"{prompt} <spectral:{plain}:0.5> <spectral:{plain}:0.5>")
    assert np.abs(whole - halves).max() <= 1
    text_only = webui.picture(f"{prompt} <spectral:{live}:1:0>")
    assert not np.array_equal(text_only, base) and not np.array_equal(text_only, with_live)
    pictures, _ = webui.draw(f"{prompt} <spectral:{live}:1>", n_iter=2)
    assert np.array_equal(pictures[-2], with_live)
    second_pass = HIRES | {"hr_upscaler": UPSCALER[webui.kind]}
    larger = webui.picture(f"{prompt} <spectral:{live}:1>", **second_pass)
    assert not np.array_equal(larger, webui.picture(prompt, **second_pass))
    assert np.array_equal(webui.picture(prompt), base)


@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ 2M", "UniPC", "Heun", "DDIM"])
def test_samplers_of_both_kinds(webui: Webui, sampler: str) -> None:
    """Those that give σ and those that give the timestep itself."""
    prompt = "a photo of a boat"
    base = webui.picture(prompt, sampler_name=sampler)
    off = webui.picture(f"{prompt} <spectral:{webui.live}:1:0>".replace(":1:0", ":0"), sampler_name=sampler)
    on = webui.picture(f"{prompt} <spectral:{webui.live}:1:stop=0.6>", sampler_name=sampler)
    assert np.array_equal(off, base) and not np.array_equal(on, base)


def test_mistakes_are_in_the_answer(webui: Webui) -> None:
    wrong = webui.live[:-1]
    pictures, info = webui.draw(f"{webui.concept} <spectral:{wrong}:1>")
    assert f"did you mean {webui.live}" in info["infotexts"][0]
    assert str(webui.data) not in info["infotexts"][0]
    assert np.array_equal(pictures[-1], webui.picture(webui.concept))


def test_hashes_are_in_the_parameters(webui: Webui) -> None:
    _, info = webui.draw(f"{webui.concept} <spectral:{webui.live}:1>")
    known = {a["name"]: a["hash"] for a in webui.call("/spectral/v1/adapters")}
    assert f"{webui.live}: {known[webui.live]}" in info["infotexts"][0]


def test_the_grids_axes_set_strengths(webui: Webui) -> None:
    """X/Y/Z plot: each picture is that of its tag."""
    plot = next(
        script
        for script in webui.call("/sdapi/v1/script-info")
        if script["name"] == "x/y/z plot" and not script["is_img2img"]
    )
    labels = [argument["label"] for argument in plot["args"]]
    values = [argument["value"] for argument in plot["args"]]
    axes = plot["args"][labels.index("X type")]["choices"]
    changes = {"X type": axes.index("[Spectral] Strength"), "X values": "0.5,1", "Include Sub Images": True}
    for label, value in {**changes, "Y type": 0, "Z type": 0}.items():
        values[labels.index(label)] = value
    prompt = f"{webui.concept} <spectral:{webui.live}:{{}}>"
    asked = {"script_name": "x/y/z plot", "script_args": values}
    pictures, _ = webui.draw(prompt.format(0.2), **asked)
    for picture, strength in zip(pictures[-2:], ("0.5", "1"), strict=True):
        assert np.array_equal(picture, webui.picture(prompt.format(strength)))


@pytest.mark.parametrize("which", ["plain", "rotated"])
def test_an_exported_lora_draws_the_same(webui: Webui, which: str) -> None:
    prompt, plain = webui.concept, getattr(webui, which)
    file = webui.call("/spectral/v1/export", {"name": plain, "precision": "fp32"})["file"]
    webui.call("/sdapi/v1/refresh-loras", {})
    name = file.removesuffix(".safetensors")
    live = webui.picture(f"{prompt} <spectral:{plain}:1>")
    merged = webui.picture(f"{prompt} <lora:{name}:1>")
    both = webui.picture(f"{prompt} <lora:{name}:0.5> <spectral:{plain}:0.5>")
    base = webui.picture(prompt)
    print(f"{webui.kind}: live and merged differ by {np.abs(merged - live).max()} of 255")
    assert np.abs(live - base).max() > 20
    assert np.abs(merged - live).max() <= 2 and np.abs(both - live).max() <= 2


def test_words_are_gone_afterwards(webui: Webui) -> None:
    """A prompt with the word draws the same before and after a picture in which it was known."""
    before = webui.picture(webui.concept)
    with_word = webui.picture(f"{webui.concept} <spectral:{webui.live}:1:1>")
    other = webui.picture(f"a photo of a box <spectral:{webui.live}:1:1>")
    assert not np.array_equal(with_word, other)
    assert np.array_equal(webui.picture(webui.concept), before)


def test_an_interrupt_leaves_the_model(webui: Webui) -> None:
    base = webui.picture(webui.concept)
    stopped = threading.Thread(
        target=webui.picture, args=(f"{webui.concept} <spectral:{webui.live}:1>",), kwargs={"steps": 60}
    )
    stopped.start()
    time.sleep(1.5)
    webui.call("/sdapi/v1/interrupt", {})
    stopped.join()
    assert np.array_equal(webui.picture(webui.concept), base)


def test_a_failed_picture_leaves_the_model(webui: Webui) -> None:
    """The host does not say that a picture is over when it ends in an exception."""
    base = webui.picture(webui.concept)
    with webui.failing(), pytest.raises(urllib.error.HTTPError, match="500"):
        webui.picture(f"{webui.concept} <spectral:{webui.live}:1>")
    assert np.array_equal(webui.picture(webui.concept), base)


def test_a_hundred_requests_leave_the_model(webui: Webui) -> None:
    """Adapters in any order, mistakes, second passes, batches, other samplers, LoRAs beside them."""
    rng = random.Random(0)
    short = {"steps": 1}
    base = webui.picture(webui.concept)
    tags = [f"<spectral:{name}:{{:.1f}}>" for name in webui.names]
    tags += [f"<spectral:{webui.live}:{{:.1f}}:stop=0.5>", f"<spectral:{webui.live}:{{:.1f}}:mode=frozen>"]
    tags += ["<spectral:no_such:{:.1f}>", "<spectral:{}:strong>", "<spectral:>", "<lora:no_such:{:.1f}>"]
    samplers = ["Euler", "Euler a", "DPM++ 2M", "DDIM"]
    for number in range(100):
        chosen = [tag.format(rng.uniform(-1, 2)) for tag in rng.choices(tags, k=rng.randint(0, 4))]
        changes = {**short, "sampler_name": rng.choice(samplers), "seed": number}
        if number % 10 == 0:
            changes |= HIRES | {"hr_upscaler": UPSCALER[webui.kind]}
        if number % 7 == 0:
            changes |= {"batch_size": 2}
        webui.draw(f"{webui.concept} {' '.join(chosen)}", **changes)
    assert np.array_equal(webui.picture(webui.concept), base)


def test_another_model_and_back(webui: Webui) -> None:
    """Between pictures, and in the middle of one (a refiner)."""
    prompt = f"{webui.concept} <spectral:{webui.live}:1>"
    base, live = webui.picture(webui.concept), webui.picture(prompt)
    other = {"override_settings": {"sd_model_checkpoint": "second.safetensors"}}
    assert np.array_equal(webui.picture(prompt, **other), live)
    refined = webui.picture(prompt, refiner_checkpoint="second.safetensors", refiner_switch_at=0.5)
    assert np.abs(refined - live).max() <= 1, "the same weights in another file: the adapter moved with them"
    assert np.array_equal(webui.picture(webui.concept), base)


def pictures(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(2):
        values = np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a picture of a <TOK>")
    return folder


def test_training_is_stopped_and_goes_on(webui: Webui) -> None:
    base = webui.picture(webui.concept)
    steps = 60 if webui.kind == "A1111" else 8  # the narrow model's take seconds
    settings = {"method": "lora", "rank": 2, "size": "128", "steps": steps, "targets": "*attn2.to_v"}
    body = {
        "images": str(pictures(webui.data / "pictures")),
        "token": "<new>",
        "name": "new",
        "settings": settings,
    }
    webui.call("/spectral/v1/train", body)
    until = time.monotonic() + 200
    while (found := webui.call("/spectral/v1/job"))["step"] < 2 and time.monotonic() < until:
        assert found["state"] in ("waiting", "running"), found
        time.sleep(0.2)
    webui.call("/spectral/v1/stop", {})
    while (found := webui.call("/spectral/v1/job"))["state"] == "running":
        time.sleep(0.2)
    assert found["state"] == "stopped" and "go on from there" in found["text"], found
    done = webui.job("train", body)
    assert done["state"] == "finished" and "saved as new" in done["text"], done
    assert any("goes on from step" in line for line in done["lines"]), done
    assert "finished already" in webui.job("train", body)["text"]
    drawn = webui.picture("a photo of <new> <spectral:new:1>")
    assert not np.array_equal(drawn, webui.picture("a photo of <new>"))
    assert np.array_equal(webui.picture(webui.concept), base)


def test_fused_by_what_layers_see(webui: Webui) -> None:
    names = [webui.names[0], webui.names[-1]]
    prompts = f"a photo of {webui.word}\na photo of {webui.word}" if webui.kind != "A1111" else ""
    body = {"names": names, "method": "closed-form", "name": "seen", "prompts": prompts, "size": "128"}
    done = webui.job("fuse", body)
    assert done["state"] == "finished" and "saved as seen" in done["text"], done
    assert not np.array_equal(
        webui.picture(f"{webui.concept} <spectral:seen:1>"), webui.picture(webui.concept)
    )


def test_distilled(webui: Webui) -> None:
    base = webui.picture(webui.concept)
    names = [webui.names[0], webui.names[-1]]
    prompts = f"a photo of {webui.word}\na photo of {webui.word}" if webui.kind != "A1111" else ""
    settings = {"steps": 2, "samples": 1, "sample_steps": 2, "size": "128"}
    body = {"names": names, "name": "taught", "prompts": prompts, "settings": settings}
    done = webui.job("distil", body)
    assert done["state"] == "finished" and "saved as taught" in done["text"], done
    assert np.array_equal(webui.picture(webui.concept), base)


def test_a_mistake_in_a_job_is_said(webui: Webui) -> None:
    done = webui.job("train", {"images": "/no/such/folder", "token": "<x>"})
    assert done["state"] == "failed" and "/no/such/folder" in done["text"]
    with pytest.raises(urllib.error.HTTPError, match="422"):
        webui.call("/spectral/v1/train", {"images": "x", "token": "<x>", "settings": {"stepz": 3}})
