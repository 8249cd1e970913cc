"""What there is to say about one adapter or several, as numbers and as pictures."""

from .interference import Crosstalk, LayerOverlap, Retention
from .interference_report import Interference, measure
from .spectra import LayerSpectrum, layer_spectra, summary

__all__ = [
    "Crosstalk",
    "Interference",
    "LayerOverlap",
    "LayerSpectrum",
    "Retention",
    "layer_spectra",
    "measure",
    "summary",
]
