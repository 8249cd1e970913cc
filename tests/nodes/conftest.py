"""The pack without a host: its modules by name, a small adapter, and folders as the host would offer them."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import PACK


class Pack:
    """Modules of the pack as the host imports it, ``module("nodes.load")``, and its nodes by class name."""

    def __init__(self, root: ModuleType) -> None:
        self.root = root

    def module(self, name: str) -> Any:
        return importlib.import_module(f"{PACK}.{name}")

    def node(self, name: str) -> Any:
        return self.root.NODE_CLASS_MAPPINGS[f"SpectralAdapters_{name}"]()

    @property
    def error(self) -> type[Exception]:
        return self.module("spectral_core.errors").SpectralAdapterError

    def adapter(self, layers: dict[str, tuple[int, int]] | None = None, rank: int = 2, seed: int = 0) -> Any:
        """A LoRA adapter with random updates; layers: name -> (out, in)."""
        methods = self.module("spectral_core.methods")
        module = self.module("spectral_core.adapter.adapter")
        generator = torch.Generator().manual_seed(seed)
        weights = {
            name: torch.randn(shape, generator=generator) for name, shape in (layers or LAYERS).items()
        }
        made = module.create(weights, methods.LoRAConfig(rank), generator=generator)

        def moved(name: str, term: Any) -> Any:
            params = {k: torch.randn(v.shape, generator=generator) for k, v in term.params.items()}
            return module.Term(term.config, params)

        return made.map_terms(moved).with_provenance(name="cat", trigger_words=("cat", "kitten"))


BLOCK = "attentions.0.transformer_blocks.0"
LAYERS = {
    f"unet.down_blocks.1.{BLOCK}.attn1.to_q": (8, 6),
    f"unet.down_blocks.1.{BLOCK}.attn2.to_q": (8, 6),
    f"unet.mid_block.{BLOCK}.attn1.to_q": (8, 6),
    f"unet.up_blocks.2.{BLOCK}.attn1.to_out.0": (6, 8),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (5, 5),
}


@pytest.fixture
def ours(pack: ModuleType) -> Pack:
    return Pack(pack)


@pytest.fixture
def folders(ours: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for the host's folder_paths over a temporary folder, with our folders registered."""
    host = HostFolders(tmp_path)
    monkeypatch.setitem(sys.modules, "folder_paths", host)
    # Without the pack's own example files.
    monkeypatch.setattr(ours.module("nodes.host.files.examples"), "FOLDERS", {})
    ours.module("nodes.host.files.paths").register()
    for name in ("models/spectral_adapters", "models/loras", "output/spectral_adapters", "temp"):
        (tmp_path / name).mkdir(parents=True)
    return SimpleNamespace(
        host=host,
        models=tmp_path / "models/spectral_adapters",
        loras=tmp_path / "models/loras",
        saved=tmp_path / "output/spectral_adapters",
        output=tmp_path / "output",
        temp=tmp_path / "temp",
    )


class HostFolders(ModuleType):
    """What of the host's folder_paths our code calls, with the host's own behaviour."""

    def __init__(self, base: Path) -> None:
        super().__init__("folder_paths")
        self.models_dir = str(base / "models")
        self._base = base
        loras = [str(base / "models/loras"), str(base / "output/loras")]
        self.folder_names_and_paths = {"loras": (loras, {".safetensors", ".pt"})}

    def get_output_directory(self) -> str:
        return str(self._base / "output")

    def get_temp_directory(self) -> str:
        return str(self._base / "temp")

    def get_folder_paths(self, key: str) -> list[str]:
        return self.folder_names_and_paths[key][0][:]

    def get_filename_list_(self, key: str) -> tuple[list[str], dict[str, float], float]:
        found = set()
        folders, extensions = self.folder_names_and_paths[key]
        for folder in folders:
            for place, _, names in os.walk(folder, followlinks=True):
                found |= {os.path.relpath(os.path.join(place, name), folder) for name in names}
        return sorted(n for n in found if os.path.splitext(n)[1] in extensions), {}, 0.0

    def get_filename_list(self, key: str) -> list[str]:
        return self.get_filename_list_(key)[0]

    def get_save_image_path(self, prefix: str, root: str, *_: int) -> tuple[str, str, int, str, str]:
        folder = os.path.join(root, os.path.dirname(os.path.normpath(prefix)))
        stem = os.path.basename(os.path.normpath(prefix))
        assert os.path.commonpath((root, os.path.abspath(folder))) == root
        os.makedirs(folder, exist_ok=True)
        counts = [n[len(stem) + 1 :].split("_")[0] for n in os.listdir(folder) if n.startswith(f"{stem}_")]
        counter = max((int(count) for count in counts if count.isdigit()), default=0) + 1
        return folder, stem, counter, os.path.dirname(prefix), prefix


@pytest.fixture
def save(ours: Pack) -> Any:
    """``save(adapter, path)``: write a file of ours, with its folders."""

    def write(adapter: Any, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        return ours.module("spectral_core.files.adapter_file").save(adapter, path, overwrite=True)

    return write


@pytest.fixture
def applied(ours: Pack, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls of the host layer's ``apply``, which a stand-in takes: MODEL and CLIP come back marked."""
    calls: list[tuple[Any, ...]] = []

    def apply(
        adapter: Any,
        model: Any,
        clip: Any,
        strength_model: float,
        strength_clip: float,
        mode: str = "auto",
        base_mismatch: str = "delta",
    ) -> Any:
        calls.append((adapter, model, clip, strength_model, strength_clip, mode, base_mismatch))
        changed = [None if owner is None else f"{owner}+{adapter.provenance.name}" for owner in (model, clip)]
        return SimpleNamespace(model=changed[0], clip=changed[1], report=f"applied {mode}", mode=mode)

    host = ours.module("nodes.host.apply")
    monkeypatch.setattr(host, "adapters", SimpleNamespace(apply=apply), raising=False)
    return calls
