"""What the page asks of the host's server, below ``/spectral_adapters``; answers are JSON.

Everything here is also in a node's report or in the files: nothing needs the page. An error of ours is the
status 400 with ``error``, its message.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import server
from aiohttp import web

from ....spectral_core.errors import SpectralAdapterError
from . import cards, overlap, runs


def install() -> None:
    """Add the routes to the host's server; nothing where none runs."""
    instance = getattr(server.PromptServer, "instance", None)
    if instance is None:
        return
    add = instance.routes
    add.get("/spectral_adapters/runs")(_all_runs)
    add.get("/spectral_adapters/runs/{name}")(_run)
    add.post("/spectral_adapters/runs/{name}/keep")(_keep)
    add.get("/spectral_adapters/card")(_card)
    add.get("/spectral_adapters/preview")(_preview)
    add.get("/spectral_adapters/overlap")(_overlap)


async def _answer(work: Callable[..., Any], *given: Any) -> web.StreamResponse:
    """The work done beside the server's own; files may be slow."""
    try:
        return web.json_response(await asyncio.get_running_loop().run_in_executor(None, work, *given))
    except SpectralAdapterError as error:
        return web.json_response({"error": str(error)}, status=400)


async def _all_runs(request: web.Request) -> web.StreamResponse:
    return await _answer(runs.listing)


async def _run(request: web.Request) -> web.StreamResponse:
    return await _answer(runs.events_of, request.match_info["name"])


async def _keep(request: web.Request) -> web.StreamResponse:
    return await _answer(lambda name: {"file": runs.keep(name)}, request.match_info["name"])


async def _card(request: web.Request) -> web.StreamResponse:
    return await _answer(cards.card, request.query.get("name", ""), request.query.get("kind", "adapter"))


async def _preview(request: web.Request) -> web.StreamResponse:
    try:
        path = cards.preview(request.query.get("name", ""), request.query.get("kind", "adapter"))
    except SpectralAdapterError as error:
        return web.json_response({"error": str(error)}, status=404)
    return web.FileResponse(path)


async def _overlap(request: web.Request) -> web.StreamResponse:
    return await _answer(overlap.verdict, tuple(request.query.getall("name", [])))
