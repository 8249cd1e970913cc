"""The one exception type for everything a user can cause.

Its message says what was found, what was expected and what to do, and names the file and the layer where
there is one. ``assert`` is for states that no input can bring about.
"""


class SpectralAdapterError(Exception):
    """Bad input: a file, a layer, a setting or a picture that cannot be used as it is.

    ComfyUI shows ``<module>.<name>`` before the message, and the module of a pack is a path of the machine.
    """

    __module__ = "spectral_adapters"

    def __init_subclass__(cls) -> None:
        cls.__module__ = SpectralAdapterError.__module__
