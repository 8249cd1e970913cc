"""The pack as an extension of Automatic1111, Forge and Forge Neo.

Imported by ``scripts/spectral_adapters.py`` while the extension's folder is on ``sys.path``; it takes the
core by its absolute name, and the host's modules only inside functions.
"""
