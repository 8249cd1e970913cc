"""Spectral adapters: FouRA and Spectral Adapter for diffusion models, in plain PyTorch."""

__version__ = "0.1.0"
