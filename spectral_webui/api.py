"""REST routes ``/spectral/v1/…``: only where the host offers its own API, and behind the same passwords.

What takes long is a job: the route begins it, ``GET job`` says how far it is, ``POST stop`` stops it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from secrets import compare_digest
from typing import Any

from PIL import Image

from spectral_core.errors import SpectralAdapterError
from spectral_core.training.config import reading

from . import tools, training, work
from .extension import Extension
from .folders import layout_of_loaded, lora_folder


def register(extension: Extension, app: Any) -> None:
    """Add the routes to the host's application."""
    from fastapi import Body, Depends, HTTPException
    from fastapi.security import HTTPBasic, HTTPBasicCredentials
    from modules import shared

    if not getattr(shared.cmd_opts, "api", False) and not getattr(shared.cmd_opts, "nowebui", False):
        return
    passwords = credentials(getattr(shared.cmd_opts, "api_auth", None))
    basic = HTTPBasic()

    def allowed(given: HTTPBasicCredentials = Depends(basic)) -> None:
        if not is_known(passwords, given.username, given.password):
            raise HTTPException(401, "Incorrect username or password", {"WWW-Authenticate": "Basic"})

    allowed.__annotations__ = {"given": HTTPBasicCredentials}  # as a type, see _resolved
    guards = [Depends(allowed)] if passwords else []

    def checked(done: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return done()
        except SpectralAdapterError as error:
            raise HTTPException(422, str(error)) from None

    def adapters() -> list[dict[str, Any]]:
        return [listed(extension, entry.name) for entry in extension.library.entries()]

    def report(name: str = Body(..., embed=True)) -> dict[str, Any]:
        def done() -> dict[str, Any]:
            text, picture = tools.report(extension.library, name)
            return {"report": text, "picture": as_base64(picture)}

        return checked(done)

    def fuse(
        names: list[str] = Body(...),
        weights: list[float] = Body(default=[]),
        method: str = Body(default="sum"),
        rank: int = Body(default=0),
        freeze_gates: bool = Body(default=False),
        prompts: str = Body(default=""),
        name: str = Body(default=""),
        size: str = Body(default=""),
    ) -> dict[str, Any]:
        def done() -> dict[str, Any]:
            drawn = reading.size(size) if size else None
            asked = tools.FuseSettings(names, weights, method, rank, freeze_gates, prompts, name, drawn)
            if method in training.METHODS:
                return work.fuse(extension, asked).values()
            saved, text, picture = tools.fused(extension.library, asked)
            return {"name": saved, "report": text, "picture": as_base64(picture)}

        return checked(done)

    def export(
        name: str = Body(...),
        precision: str = Body(default="fp16"),
        drop_schedule: bool = Body(default=False),
    ) -> dict[str, Any]:
        def done() -> dict[str, Any]:
            path, text = tools.exported(
                extension.library, name, lora_folder(), precision, drop_schedule, layout_of_loaded()
            )
            return {"file": path.name, "report": text}

        return checked(done)

    def train(
        images: str = Body(...),
        token: str = Body(...),
        name: str = Body(default=""),
        settings: dict[str, Any] = Body(default={}),
    ) -> dict[str, Any]:
        def done() -> dict[str, Any]:
            given = training.read(settings, training.train_settings())
            return work.train(extension, images, token, name, given).values()

        return checked(done)

    def distil(
        names: list[str] = Body(...),
        weights: list[float] = Body(default=[]),
        rank: int = Body(default=0),
        prompts: str = Body(default=""),
        name: str = Body(default=""),
        settings: dict[str, Any] = Body(default={}),
    ) -> dict[str, Any]:
        def done() -> dict[str, Any]:
            given = training.read(settings, training.distil_settings())
            asked = tools.FuseSettings(names, weights, rank=rank, prompts=prompts, name=name)
            return work.distil(extension, asked, given).values()

        return checked(done)

    def job() -> dict[str, Any]:
        return dict(extension.jobs.values())

    def stop() -> dict[str, Any]:
        return {"text": extension.jobs.stop()}

    for path, function, verb in (
        ("adapters", adapters, "GET"),
        ("report", report, "POST"),
        ("fuse", fuse, "POST"),
        ("export", export, "POST"),
        ("train", train, "POST"),
        ("distil", distil, "POST"),
        ("job", job, "GET"),
        ("stop", stop, "POST"),
    ):
        function.__annotations__ = {k: v for k, v in _resolved(function).items() if k != "return"}
        app.add_api_route(f"/spectral/v1/{path}", function, methods=[verb], dependencies=guards)


def _resolved(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations as types: they are strings in this file, which FastAPI would look up in vain."""
    from typing import get_type_hints

    return get_type_hints(function)


def credentials(option: str | None) -> dict[str, str]:
    """``user:password,user:password`` as the host's option has it."""
    pairs = (pair.strip().partition(":") for pair in (option or "").split(",") if pair.strip())
    return {user: password for user, _, password in pairs}


def is_known(passwords: dict[str, str], user: str, password: str) -> bool:
    known = passwords.get(user)
    return known is not None and compare_digest(password.encode(), known.encode())


def listed(extension: Extension, name: str) -> dict[str, Any]:
    """One adapter for programs; the reason where its file cannot be read."""
    try:
        entry = extension.library.find(name)
        said = tools.card(extension.library, name)
        return {"name": name, "hash": extension.library.hash_of(entry), **said}
    except SpectralAdapterError as error:
        return {"name": name, "error": str(error)}


def as_base64(picture: Image.Image) -> str:
    """A PNG."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()
