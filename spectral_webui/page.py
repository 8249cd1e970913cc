"""The cards: a page of the host's extra networks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from spectral_core.errors import SpectralAdapterError

from . import tools
from .extension import LOG, Extension
from .folders import family_of_loaded
from .library import Entry

SHOW_ALL = "spectral_show_all"


def fits(family: str, loaded: str) -> bool:
    """Whether a card is shown: its adapter is for the loaded model's family, or one of them is unknown."""
    return not family or not loaded or family in ("unknown", loaded)


def add_setting() -> None:
    """In the host's settings, beside those of its other extra networks."""
    from modules import shared

    text = "Spectral: show adapters of every base model, not only those for the one that is loaded"
    option = shared.OptionInfo(False, text, section=("extra_networks", "Extra Networks"))
    shared.opts.add_option(SHOW_ALL, option)


def register(extension: Extension) -> None:
    """Add the page; called while the host builds its pages."""
    from modules import shared, ui_extra_networks

    class Page(ui_extra_networks.ExtraNetworksPage):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__("Spectral")

        def refresh(self) -> None:
            pass  # files are listed anew each time

        def create_item(self, name: str, index: int | None = None, enable_filter: bool = True) -> Any:
            return self._item(extension.library.find(name), index)

        def list_items(self) -> Iterator[dict[str, Any]]:
            loaded = "" if getattr(shared.opts, SHOW_ALL, False) else family_of_loaded()
            for index, entry in enumerate(extension.library.entries()):
                try:
                    if fits(str(tools.card(extension.library, entry.name)["family"]), loaded):
                        yield self._item(entry, index)
                except SpectralAdapterError as error:  # one unreadable file must not empty the page
                    LOG.warning("Spectral Adapters: %s", error)

        def _item(self, entry: Entry, index: int | None) -> dict[str, Any]:
            said = tools.card(extension.library, entry.name)
            stem = str(entry.path.with_suffix(""))
            words = f" {' '.join(said['words'])}" if said["words"] else ""  # type: ignore[arg-type]
            search = [
                entry.name,
                str(said["description"]),
                str(said["family"]),
                self.search_terms_from_path(str(entry.path)),
            ]
            item = {
                "name": entry.name,
                "filename": str(entry.path),
                "shorthash": extension.library.hash_of(entry),
                "preview": self.find_preview(stem),
                "description": self.find_description(stem) or said["description"],
                "search_terms": search,
                "local_preview": f"{stem}.preview.{shared.opts.samples_format}",
                "metadata": said["metadata"],
                "sort_keys": {"default": index, **self.get_sort_keys(str(entry.path))},
            }
            description = item["description"]
            self.read_user_metadata(item)  # the host's own file beside it may say otherwise
            item["description"] = item.get("description") or description
            item["prompt"] = (
                ui_extra_networks.quote_js(f"<spectral:{entry.name}:")
                + " + opts.extra_networks_default_multiplier + "
                + ui_extra_networks.quote_js(f">{words}")
            )
            return item

        def allowed_directories_for_previews(self) -> list[str]:
            return [str(f) for f in (*extension.library.folders, *extension.library.lora_folders)]

    ui_extra_networks.register_page(Page())
