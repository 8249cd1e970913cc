"""Adapters on diffusers pipelines: open one, apply adapters, generate, train a concept.

The headless API in short::

    import spectral_core as sc

    pipe = sc.load_pipeline("path/to/model")
    with sc.apply(pipe, sc.load("dog.safetensors").scaled(0.8), sc.load("cat.safetensors")):
        pictures = sc.generate(pipe, ["a <dog> and a <cat>"], seeds=[1])
"""

from .applying import Applied, apply, generate
from .loading import family_of, load_pipeline, parts_of

__all__ = [
    "Applied",
    "apply",
    "family_of",
    "generate",
    "load_pipeline",
    "parts_of",
]
