"""On a real ComfyUI: seconds per step, time from an adapter's file to its first step, memory held.

    python -m benchmarks.speed.host [--rounds 8] [--threads 2] [--hosts 0.28.0] [--parts live] [--raw FILE]

The host's own model of Stable Diffusion 1.5 with random float32 weights, on the CPU, batch 1, no guidance,
128×128 and 256×256 pixels; adapters on its 128 attention layers, rank 8. A step is one call of the host's
``apply_model`` on a patcher that was prepared as the host's sampler does it; all candidates take turns in one
process (``benchmarks/speed/inside/host.py``, run in the host's Python), in an order drawn anew for every
round. ``--raw``: a file to which measurements are added; the table is of all that it has, so that a long one
can be taken in several short ones on a machine that is not always free. Peers: the host's Load LoRA and,
where it has one, its bypass LoRA, with the same adapters exported in float32. ``held`` counts every tensor
that a loader leaves behind, the parsed file included, once for each piece of memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Target, Times, finish
from spectral_core.adapter.adapter import Adapter, AdapterLayer, create
from spectral_core.attach.targets import find_targets
from spectral_core.files import adapter_file as fileformat
from spectral_core.files.lora_export import export_lora
from spectral_core.methods import FouRAConfig, MethodConfig, SpectralAConfig, method_of
from tests.host.booted import NO_HOST, Checkout, find_checkouts
from tests.host.inside import run_script

SCRIPT = Path(__file__).resolve().parent / "inside" / "host.py"
SECONDS = 900
PARTS = ("live", "merged", "loading")
LIMITS = {  # (candidate, pixels): times base
    ("merged", 128): 1.02,
    ("merged", 256): 1.02,
    ("live foura adaptive", 128): 1.10,
    ("live foura adaptive", 256): 1.04,
}

# --- the adapters -----------------------------------------------------------------------------------


def trained(adapter: Adapter) -> Adapter:
    """Random numbers in place of what training changes; about half of the gates' rows are open."""
    draw = torch.Generator().manual_seed(3)

    def changed(layer: AdapterLayer) -> AdapterLayer:
        (term,) = layer.terms
        params = dict(term.params)
        for name in method_of(term.config).trainable(term.config):
            noise = torch.randn(params[name].shape, generator=draw)
            params[name] = noise if name == "gate.bias" else params[name] + 0.01 * noise
        return AdapterLayer(layer.shape, (replace(term, params=params),))

    return replace(adapter, layers={name: changed(layer) for name, layer in adapter.layers.items()})


def write_adapters(folder: Path, rank: int) -> None:
    """``foura`` and ``spectral_a`` in this pack's format, and the same exported as LoRA, ``…_lora``."""
    from benchmarks.speed.unet import sd15_unet

    with torch.device("meta"):
        shapes = {name: w.shape for name, w in find_targets(sd15_unet(), "unet", "attention")[0].items()}
    assert len(shapes) == 128, f"{len(shapes)} attention layers"
    draw = torch.Generator().manual_seed(2)

    def basis(name: str, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, v = (torch.linalg.qr(torch.randn(n, rank, generator=draw))[0] for n in weight.shape)
        return u, torch.linspace(2, 1, rank), v

    configs: dict[str, MethodConfig] = {
        "foura": FouRAConfig(rank),
        "spectral_a": SpectralAConfig(tuple(range(rank))),
    }
    for part in ("spectral_adapters", "loras"):
        (folder / part).mkdir()
    for name, config in configs.items():
        blank = {layer: torch.zeros(shape) for layer, shape in shapes.items()}
        adapter = trained(create(blank, config, basis, draw))
        fileformat.save(adapter, folder / "spectral_adapters" / f"{name}.safetensors")
        export_lora(adapter, folder / "loras" / f"{name}_lora.safetensors", dtype=torch.float32)


# --- the host ---------------------------------------------------------------------------------------


def run_in(
    checkout: Checkout,
    settings: dict[str, Any],
    script: Path = SCRIPT,
    seconds: float = SECONDS,
    more: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What a script measured inside a host. RuntimeError with the end of what it printed when it fails.

    more: of the environment.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if script == SCRIPT:
            write_adapters(folder, settings["rank"])
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        variables = {
            "OMP_NUM_THREADS": str(settings["threads"]),
            "SPECTRAL_ADAPTERS_CACHE": f"{folder}/cache",
            **(more or {}),
        }
        done = run_script(checkout, script, folder, seconds=seconds, **variables)
        if done.returncode != 0:
            raise RuntimeError(f"ComfyUI {checkout.version}: {(done.stdout + done.stderr)[-3000:]}")
        return dict(json.loads((folder / "measured.json").read_text(encoding="utf-8")))


def added(before: Any, now: Any) -> Any:
    """Both measurements: lists one behind the other, single figures the new ones."""
    if isinstance(before, dict) and isinstance(now, dict):
        both = {key: added(before[key], now[key]) for key in before.keys() & now.keys()}
        return before | now | both
    return before + now if isinstance(before, list) else now


# --- the report -------------------------------------------------------------------------------------


def _row(label: str, times: Times, name: str, to: str) -> dict[str, Any]:
    return times.row(name, to) | {"name": f"{label}: {name}", "to": to}


def step_rows(version: str, measured: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Target]]:
    rows, targets = [], []
    for pixels in (128, 256):
        for group in ("live", "merged"):
            if group not in measured:
                continue
            seconds = {name: tuple(by_size[str(pixels)]) for name, by_size in measured[group].items()}
            times = Times(seconds)
            for name in seconds:
                if group == "merged" and name == "base":
                    continue  # its own base is in the ratio
                row = _row(f"{version} step {pixels}", times, name, "base")
                rows.append(row)
                if (name, pixels) in LIMITS:
                    what = f"{version} step {pixels}: {name} / base"
                    spread = (row["ratio_low"], row["ratio_high"])
                    targets.append(Target(what, row["ratio"], LIMITS[name, pixels], spread=spread))
    return rows, targets


def loading_rows(version: str, measured: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Target]]:
    rows, targets = [], []
    if "first" not in measured:
        return rows, targets
    times = Times({name: tuple(values) for name, values in measured["first"].items()})
    for name in ("spectral a", "foura adaptive"):
        peer = f"{name}, Load LoRA"
        rows += [_row(f"{version} file to step", times, which, peer) for which in (peer, name)]
        targets.append(Target.of(f"{version} file to step: {name} / Load LoRA", times.ratio(name, peer), 1.1))
    for name in ("spectral a", "foura adaptive"):
        found, peer_held = measured["held"][name], measured["held"][f"{name}, Load LoRA"]["held"]
        rows.append(
            {"name": f"{version} memory: {name}", "ratio": found["held"] / found["folded"], "to": "folded"}
            | found
            | {"Load LoRA held": peer_held}
        )
        targets.append(
            Target(f"{version} memory: {name} held / folded", found["held"] / found["folded"], 1.2)
        )
    return rows, targets


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=8, help="at 256×256; three times as many at 128×128")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these")
    parser.add_argument("--raw", type=Path, help="add the measurements to this file, and report all of it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hosts", nargs="+", metavar="VERSION", help="only these (default: all found)")
    options = parser.parse_args(arguments)
    hosts = [h for h in find_checkouts() if not options.hosts or h.version in options.hosts]
    if not hosts or options.rounds < 2:
        print(NO_HOST if not hosts else "--rounds must be at least 2")
        return 2
    torch.set_num_threads(options.threads)
    settings: dict[str, Any] = {"rank": 8, "rounds": options.rounds, "threads": options.threads}
    asked = settings | {"parts": options.parts}
    raw = json.loads(options.raw.read_text()) if options.raw and options.raw.exists() else {}
    for checkout in hosts:
        raw[checkout.version] = added(raw.get(checkout.version), run_in(checkout, asked))
        if options.raw:
            options.raw.write_text(json.dumps(raw))
    rows: list[dict[str, Any]] = []
    targets: list[Target] = []
    torches = {}
    for version, measured in sorted(raw.items(), reverse=True):
        torches[version] = measured["torch"]
        for part in (step_rows, loading_rows):
            found = part(version, measured)
            rows, targets = rows + found[0], targets + found[1]
    return finish("host", rows, targets, settings | {"hosts, torch": torches})


if __name__ == "__main__":
    sys.exit(main())
