"""The cards: a page of the host's extra networks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from spectral_core.errors import SpectralAdapterError

from . import tools
from .extension import LOG, Extension
from .library import Entry


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
            for index, entry in enumerate(extension.library.entries()):
                try:
                    yield self._item(entry, index)
                except SpectralAdapterError as error:  # one unreadable file must not empty the page
                    LOG.warning("Spectral Adapters: %s", error)

        def _item(self, entry: Entry, index: int | None) -> dict[str, Any]:
            said = tools.card(extension.library, entry.name)
            stem = str(entry.path.with_suffix(""))
            words = f" {' '.join(said['words'])}" if said["words"] else ""  # type: ignore[arg-type]
            search = [entry.name, str(said["description"]), self.search_terms_from_path(str(entry.path))]
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
