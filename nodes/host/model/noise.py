"""How far the denoising is, from the noise level that the host's sampler is at.

Shapes: sigma (B,), one per batch row.
"""

from ....spectral_core.adapter.noise_levels import Table, progress_of

__all__ = ["Table", "progress_of"]
