"""The one exception type for everything a user can cause.

Its message says what was found, what was expected and what to do, and names the file and the layer where
there is one. ``assert`` is for states that no input can bring about.
"""


class SpectralAdapterError(Exception):
    """Bad input: a file, a layer, a setting or a picture that cannot be used as it is."""
