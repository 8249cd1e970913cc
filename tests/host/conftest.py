"""The fixture ``host``: every test that asks for it runs once on each ComfyUI version found here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.host.booted import NO_HOST, Checkout, Host, HostUnusable, find_checkouts


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "host" not in metafunc.fixturenames:
        return
    checkouts: list[Checkout | None] = [*find_checkouts()] or [None]
    ids = [checkout.version if checkout else "no host" for checkout in checkouts]
    metafunc.parametrize("host", checkouts, indirect=True, scope="session", ids=ids)


@pytest.fixture(scope="session")
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A running host with the pack in its custom nodes; one process per version and session."""
    if request.param is None:
        pytest.skip(NO_HOST)
    booted = Host(request.param, tmp_path_factory.mktemp("comfyui"))
    try:
        booted.start()
        yield booted
    except HostUnusable as unusable:
        pytest.skip(str(unusable))
    finally:
        booted.stop()
