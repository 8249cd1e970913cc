"""One boot of every webui that the environment names; see :mod:`tests.webui.booted`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.webui.booted import KINDS, Webui, boot


@pytest.fixture(scope="package", params=KINDS)
def webui(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webui]:
    yield from boot(request.param, tmp_path_factory.mktemp(request.param.lower()) / "data")
