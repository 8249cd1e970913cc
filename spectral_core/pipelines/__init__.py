"""Adapters on diffusers pipelines: open one, apply adapters, generate, train a concept.

The headless API in short::

    from spectral_core.pipelines import apply, generate, load_pipeline
    from spectral_core.fileformat import load

    pipe = load_pipeline("path/to/model")
    with apply(pipe, load("dog.safetensors").scaled(0.8), load("cat.safetensors")):
        pictures = generate(pipe, ["a <dog> and a <cat>"], seeds=[1])
"""

from .applying import Applied, apply, generate
from .concept import ConceptConfig, TrainedConcept, train_concept
from .loading import family_of, load_pipeline, parts_of

__all__ = [
    "Applied",
    "ConceptConfig",
    "TrainedConcept",
    "apply",
    "family_of",
    "generate",
    "load_pipeline",
    "parts_of",
    "train_concept",
]
