"""The commands of ``python -m spectral_core`` and ``spectral-adapters``; :func:`.main.main` runs them."""

__all__: list[str] = []  # a room of modules: :mod:`.main` is the way in
