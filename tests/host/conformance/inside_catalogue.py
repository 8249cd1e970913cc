"""Inside a host: every family that it lists, by its small model; and those that have none, with why."""

import comfy.supported_models as models
from inside_models import FAMILIES
from inside_models_images import IMAGES
from inside_models_others import OTHERS
from inside_models_unets import UNETS
from inside_models_videos import VIDEOS

CATALOGUE = FAMILIES | UNETS | IMAGES | VIDEOS | OTHERS
FIRST_UNETS = ("sd1", "sd2", "sdxl")
FIRST_VIDEOS = ("wan2.1", "wan2.2", "hunyuan-video", "hunyuan-video-1.5", "ltxv")


def kind_of(name):
    """Under which heading a family stands."""
    if name in UNETS or name in FIRST_UNETS:
        return "UNets"
    if name in VIDEOS or name in FIRST_VIDEOS:
        return "video"
    return "sound and shapes" if name in OTHERS else "pictures"


NO_DENOISER = "it is no denoiser: nothing is sampled with it, and there is nothing to train"
WITHOUT = {
    "RT_DETR_v4": NO_DENOISER,
    "SAM3": NO_DENOISER,
    "SAM31": NO_DENOISER,
    "DepthAnything3": NO_DENOISER,
    "MiniMaxMusic3": "its sizes are fixed in the host's code, 2.4 billion weights: there is no small model",
}


def listed():
    """The classes that this host's loader tries, in its order."""
    return [kind.__name__ for kind in models.models]


def unknown():
    """Classes that the host lists and nobody here has thought of."""
    known = {family.kind for family in CATALOGUE.values()} | set(WITHOUT)
    return [name for name in listed() if name not in known]
