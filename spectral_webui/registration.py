"""How the extension hangs itself into the host: its callbacks, its network, its axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spectral_core.errors import SpectralAdapterError

from . import api, infotext, page, request, tab
from .extension import LOG, Extension
from .folders import lora_folder, spectral_folder

_AXES = (
    ("[Spectral] Strength", "strength", float),
    ("[Spectral] Model strength", "unet", float),
    ("[Spectral] Text encoder strength", "te", float),
    ("[Spectral] Curve", "curve", str),
    ("[Spectral] Adapter", "name", str),
)


def start() -> Extension:
    """Make the extension and register everything; called once, while the host loads scripts."""
    from modules import script_callbacks

    extension = Extension([spectral_folder()], [lora_folder()])

    def before_ui() -> None:
        _register_network(extension)
        page.register(extension)
        _add_axes(extension)

    script_callbacks.on_before_ui(before_ui)
    script_callbacks.on_ui_settings(page.add_setting)
    script_callbacks.on_cfg_denoiser(extension.on_step)
    script_callbacks.on_model_loaded(extension.on_model)
    script_callbacks.on_script_unloaded(extension.clear)
    script_callbacks.on_infotext_pasted(
        lambda _, parameters: infotext.pasted(parameters, extension.name_of_hash)
    )
    script_callbacks.on_ui_tabs(lambda: tab.build(extension))
    script_callbacks.on_app_started(lambda _, app: api.register(extension, app))
    return extension


def _register_network(extension: Extension) -> None:
    from modules import extra_networks

    class Network(extra_networks.ExtraNetwork):  # type: ignore[misc]
        def activate(self, p: Any, params_list: list[Any]) -> None:
            extension.activate(p, [params.items for params in params_list])

        def deactivate(self, p: Any) -> None:
            extension.clear()

    extra_networks.register_extra_network(Network(request.NETWORK))


def _add_axes(extension: Extension) -> None:
    """More axes for the host's own grid script; none where it is not there."""
    from modules import scripts

    grid = next(
        (
            data.script_class
            for data in scripts.scripts_data
            if data.script_class.__module__ in ("xyz_grid.py", "scripts.xyz_grid")
        ),
        None,
    )
    module = next((d.module for d in scripts.scripts_data if d.script_class is grid), None) if grid else None
    if module is None or not hasattr(module, "axis_options"):
        LOG.info("Spectral Adapters: no X/Y/Z plot here, so it has no axes")
        return
    if any(option.label.startswith("[Spectral]") for option in module.axis_options):
        return  # the host builds its page anew without loading that script anew

    def names() -> list[str]:
        return [entry.name for entry in extension.library.entries()]

    for label, key, kind in _AXES:
        choices: Callable[[], list[str]] | None = None
        if key == "name":
            choices = names
        elif key == "curve":
            choices = _curves
        module.axis_options.append(module.AxisOption(label, kind, _axis(label, key), choices=choices))


def _curves() -> list[str]:
    from spectral_core.adapter.schedule_words import CURVES

    return list(CURVES)


def _axis(label: str, key: str) -> Callable[[Any, Any, Any], None]:
    def apply(p: Any, value: Any, values: Any) -> None:
        if not request.TAG.search(p.prompt):
            raise SpectralAdapterError(f"{label}: the prompt has no tag such as <spectral:name:1>")
        p.prompt = request.with_setting(p.prompt, key, value)

    return apply
