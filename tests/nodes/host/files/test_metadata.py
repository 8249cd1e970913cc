"""The adapters' hashes on their way into pictures, for every shape a prompt may have."""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from typing import Any

import pytest

from tests.nodes.conftest import Pack

LOADER = "SpectralAdapters_LoadFouRA"


@pytest.fixture
def metadata(ours: Pack, folders: Any) -> Any:
    (folders.models / "sub").mkdir()
    (folders.models / "sub" / "cat.safetensors").write_bytes(b"cat")
    (folders.loras / "style.safetensors").write_bytes(b"style")
    return ours.module("nodes.host.files.metadata")


def prompt(*names: Any) -> dict[str, Any]:
    nodes = {str(i): {"class_type": LOADER, "inputs": {"adapter_name": n}} for i, n in enumerate(names)}
    return nodes | {"9": {"class_type": "KSampler", "inputs": {"adapter_name": "other"}}}


def with_info(info: Any) -> dict[str, Any]:
    return {"extra_data": {"extra_pnginfo": info}}


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def queued(metadata: Any, folders: Any, request: Any) -> Any:
    """The request's extra_pnginfo once its files are hashed, as when their loaders have run."""
    request = metadata.on_prompt(request)
    for file in (folders.models / "sub" / "cat.safetensors", folders.loras / "style.safetensors"):
        metadata.file_opened(file)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.daemon:
            thread.join(10)
    return request["extra_data"]["extra_pnginfo"]


def test_a_prompt_that_arrives_reads_no_file(metadata: Any, ours: Pack, monkeypatch: Any) -> None:
    store = ours.module("nodes.host.files.parsed_cache")
    monkeypatch.setattr(store, "_sha256", lambda *_: pytest.fail("hashed on the event loop"))
    request = {"prompt": prompt("sub/cat.safetensors")}
    info = metadata.on_prompt(request)["extra_data"]["extra_pnginfo"]
    assert info == {"spectral_adapters": {"adapters": [], "hashes": {}}}
    metadata._learn({"workflow": {"extra": {"spectral_adapters": {"gone.safetensors": sha(b"cat")}}}})
    assert ours.module("nodes.host.files.adapters").problem_with("gone.safetensors") == ""


def test_names_and_hashes_are_written(metadata: Any, folders: Any) -> None:
    request = {
        "prompt": prompt("sub\\cat.safetensors"),
        "extra_data": {"extra_pnginfo": {"workflow": {"nodes": []}}},
    }
    request["prompt"]["5"] = {
        "class_type": "SpectralAdapters_LoadLoRAAsAdapter",
        "inputs": {"lora_name": "style.safetensors"},
    }
    before = copy.deepcopy(request)
    info = queued(metadata, folders, request)
    cat, style = info["spectral_adapters"]["adapters"]
    assert cat == {
        "name": "sub/cat.safetensors", "file": "cat.safetensors",
        "sha256": sha(b"cat"), "autov2": sha(b"cat")[:10],
    }  # fmt: skip
    assert style["sha256"] == sha(b"style")
    assert info["spectral_adapters"]["hashes"] == {
        "lora:cat": sha(b"cat")[:10],
        "lora:style": sha(b"style")[:10],
    }
    assert info["workflow"]["extra"]["spectral_adapters"]["sub/cat.safetensors"] == sha(b"cat")
    assert request["prompt"] == before["prompt"]
    json.dumps(info)


def test_the_page_is_told_the_hash_once_a_prompt_has_asked_for_it(
    metadata: Any, ours: Pack, folders: Any
) -> None:
    files, file = ours.module("nodes.host.files.adapters"), folders.models / "sub" / "cat.safetensors"
    assert files.identity("sub\\cat.safetensors", file) == ()
    queued(metadata, folders, {"prompt": prompt("sub/cat.safetensors")})
    told = files.identity("sub\\cat.safetensors", file)
    assert told == ({"name": "sub/cat.safetensors", "sha256": sha(b"cat")},)
    file.write_bytes(b"another")
    assert files.identity("sub/cat.safetensors", file) == ()


def test_api_prompts_get_the_entry_too(metadata: Any, folders: Any) -> None:
    info = queued(metadata, folders, {"prompt": prompt("sub/cat.safetensors")})
    assert info["spectral_adapters"]["adapters"][0]["sha256"] == sha(b"cat") and "workflow" not in info


def test_the_last_state_of_the_file_counts(metadata: Any, folders: Any) -> None:
    queued(metadata, folders, {"prompt": prompt("sub/cat.safetensors")})
    (folders.models / "sub" / "cat.safetensors").write_bytes(b"kitten")
    info = queued(metadata, folders, {"prompt": prompt("sub/cat.safetensors")})
    assert info["spectral_adapters"]["adapters"][0]["sha256"] == sha(b"kitten")


@pytest.mark.parametrize(
    "entry",
    [
        {"workflow": {"extra": {"spectral_adapters": {"old/gone.safetensors": sha(b"cat")}}}},
        {
            "spectral_adapters": {
                "adapters": [{"name": "old\\gone.safetensors", "sha256": sha(b"cat").upper()}]
            }
        },
    ],
)
def test_a_picture_finds_its_renamed_file(metadata: Any, ours: Pack, folders: Any, entry: Any) -> None:
    metadata.on_prompt({"prompt": {}, "extra_data": {"extra_pnginfo": entry}})
    found = ours.module("nodes.host.files.paths").resolve("old/gone.safetensors", may_hash=True)
    assert found.path == folders.models / "sub" / "cat.safetensors"


@pytest.mark.parametrize(
    "request_",
    [
        None, [], "x", {}, {"prompt": None}, {"prompt": []}, {"prompt": {"1": None, "2": [], "3": {}}},
        {"prompt": {"1": {"class_type": LOADER}}}, {"prompt": {"1": {"class_type": LOADER, "inputs": None}}},
        {"prompt": {"1": {"class_type": [1], "inputs": {}}}}, {"prompt": prompt(["4", 0])},
        {"prompt": prompt(None, 3, {"__value__": 1}, "missing.safetensors", "../up.safetensors", "a\0b")},
        {"prompt": prompt("sub/cat.safetensors"), "extra_data": 1},
        {"prompt": prompt("sub/cat.safetensors"), "extra_data": {"extra_pnginfo": "text"}},
        {"prompt": prompt("missing"), **with_info({"workflow": {"extra": {"spectral_adapters": 3}}})},
        {"prompt": {}, **with_info({"spectral_adapters": {"adapters": [1, {"name": 2}]}})},
    ],
)  # fmt: skip
def test_no_prompt_is_broken(metadata: Any, request_: Any) -> None:
    before = copy.deepcopy(request_)
    assert metadata.on_prompt(request_) == before


@pytest.mark.parametrize("extra", [{}, {"extra_pnginfo": None}, {"extra_pnginfo": {"workflow": None}}, None])
def test_odd_but_usable_requests(metadata: Any, folders: Any, extra: Any) -> None:
    request = {"prompt": prompt({"__value__": "sub/cat.safetensors"}), "extra_data": extra}
    info = queued(metadata, folders, request)
    assert info["spectral_adapters"]["adapters"][0]["file"] == "cat.safetensors"
