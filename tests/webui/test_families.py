"""Other families than SD 1.x in real webuis: an adapter is its exported LoRA, and the model stays."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.webui.booted import Webui
from tests.webui.test_hosts import pictures

PROMPT = "a photo of a <shape>"
FLOW = {"scheduler": "Simple", "cfg_scale": 1}  # others give Forge's Flux noise levels of 9999
OWN = {"flux": FLOW, "z_image": FLOW}


@pytest.fixture(params=["sd2", "sdxl", "flux", "z_image"])
def family(webui: Webui, request: pytest.FixtureRequest) -> Iterator[str]:
    """The webui with a model of the family loaded; with its own again afterwards."""
    name = request.param
    if name not in webui.families:
        pytest.skip(f"no checkpoint of {name} for {webui.kind}")
    own = webui.call("/sdapi/v1/options")["sd_model_checkpoint"]
    webui.call("/sdapi/v1/options", {"sd_model_checkpoint": f"{name}.safetensors"})
    yield name
    webui.call("/sdapi/v1/options", {"sd_model_checkpoint": own})


def test_a_family(webui: Webui, family: str) -> None:
    own = OWN.get(family, {})
    base = webui.picture(PROMPT, **own)
    tag = f"{PROMPT} <spectral:{family}_lora:{{}}>"
    drawn, info = webui.draw(tag.format(1), **own)
    live = drawn[-1]
    assert "problems" not in info["infotexts"][0], info["infotexts"][0]
    assert np.abs(live - base).max() > 20
    sides = () if family == "z_image" else ("1:0", "0:1")  # of which adapters leave the text encoder alone
    for part in (*sides, "1:stop=0.5"):
        some = webui.picture(tag.format(part), **own)
        assert not np.array_equal(some, base) and not np.array_equal(some, live), part
    done = webui.call("/spectral/v1/export", {"name": f"{family}_lora", "precision": "fp32"})
    webui.call("/sdapi/v1/refresh-loras", {})
    merged = webui.picture(f"{PROMPT} <lora:{done['file'].removesuffix('.safetensors')}:1>", **own)
    print(f"{webui.kind}, {family}: live and merged differ by {np.abs(merged - live).max()} of 255")
    assert np.abs(merged - live).max() <= 2
    gated, info = webui.draw(f"{PROMPT} <spectral:{family}_foura:1>", **own)
    assert "problems" not in info["infotexts"][0], info["infotexts"][0]
    other = webui.picture(f"a photo of a box <spectral:{family}_foura:1>", **own)
    assert not np.array_equal(gated[-1], base) and not np.array_equal(gated[-1], other)
    assert np.array_equal(webui.picture(PROMPT, **own), base)


def test_training_with_a_family(webui: Webui, family: str) -> None:
    own = OWN.get(family, {})
    base = webui.picture(PROMPT, **own)
    settings = {"method": "lora", "rank": 2, "size": "64", "steps": 2, "targets": "*attn2.to_v"}
    body = {
        "images": str(pictures(webui.data / "pictures")),
        "token": f"<own_{family}>",
        "name": f"own_{family}",
    }
    done = webui.job("train", body | {"settings": settings})
    if family in OWN:
        assert done["state"] == "failed" and "Stable Diffusion" in done["text"], done
    else:
        assert done["state"] == "finished" and f"saved as own_{family}" in done["text"], done
        _, info = webui.draw(f"a photo of <own_{family}> <spectral:own_{family}:1>", **own)
        assert "problems" not in info["infotexts"][0], info["infotexts"][0]
    assert np.array_equal(webui.picture(PROMPT, **own), base)


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_a_refiner_that_adapters_do_not_fit_is_said(webui: Webui, family: str) -> None:
    """Its half of the steps is drawn without them."""
    if webui.kind == "NEO":
        pytest.skip("Neo itself fails where a refiner is of another family")
    base = webui.picture(PROMPT)
    other = "demo.safetensors" if webui.kind == "A1111" else "narrow.safetensors"
    switched = {"refiner_checkpoint": other, "refiner_switch_at": 0.5}
    drawn, info = webui.draw(f"{PROMPT} <spectral:sdxl_lora:1>", **switched)
    assert "after the change of models: sdxl_lora" in info["infotexts"][0], info["infotexts"][0]
    assert not np.array_equal(drawn[-1], webui.picture(PROMPT, **switched))
    assert np.array_equal(webui.picture(PROMPT), base)
