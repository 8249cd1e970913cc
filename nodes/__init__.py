"""The node list: id -> class and id -> display name, written out; nothing registers itself.

A node id is `SpectralAdapters_<Name>` and never changes once released.
"""

from __future__ import annotations

from .apply import ApplyAdapter
from .compare import CompareAdapters
from .demo import LoadDemoModel
from .distil import DistilAdapters
from .export import ExportAdapterAsLoRA, SaveAdapter
from .fuse import FuseAdapters
from .host.startup import start
from .inspect import AdapterReport
from .load import LoadFouRA, LoadLoRAAsAdapter, LoadSpectralAdapter
from .resize import ResizeAdapter
from .slider import ConceptSlider
from .stack import AdapterStack
from .strength import AdapterStrength
from .train import TrainAdapter
from .train_options import (
    TrainGate,
    TrainLayers,
    TrainMemory,
    TrainNoiseAndLoss,
    TrainOptimiser,
    TrainRegularisation,
    TrainTextEncoder,
    TrainValidation,
)

NODE_CLASS_MAPPINGS: dict[str, type] = {
    "SpectralAdapters_LoadFouRA": LoadFouRA,
    "SpectralAdapters_LoadSpectralAdapter": LoadSpectralAdapter,
    "SpectralAdapters_LoadLoRAAsAdapter": LoadLoRAAsAdapter,
    "SpectralAdapters_AdapterStrength": AdapterStrength,
    "SpectralAdapters_FuseAdapters": FuseAdapters,
    "SpectralAdapters_ApplyAdapter": ApplyAdapter,
    "SpectralAdapters_SaveAdapter": SaveAdapter,
    "SpectralAdapters_ExportAdapterAsLoRA": ExportAdapterAsLoRA,
    "SpectralAdapters_ResizeAdapter": ResizeAdapter,
    "SpectralAdapters_AdapterReport": AdapterReport,
    "SpectralAdapters_LoadDemoModel": LoadDemoModel,
    "SpectralAdapters_TrainAdapter": TrainAdapter,
    "SpectralAdapters_TrainLayers": TrainLayers,
    "SpectralAdapters_TrainOptimiser": TrainOptimiser,
    "SpectralAdapters_TrainNoiseAndLoss": TrainNoiseAndLoss,
    "SpectralAdapters_TrainGate": TrainGate,
    "SpectralAdapters_TrainTextEncoder": TrainTextEncoder,
    "SpectralAdapters_TrainMemory": TrainMemory,
    "SpectralAdapters_TrainRegularisation": TrainRegularisation,
    "SpectralAdapters_TrainValidation": TrainValidation,
    "SpectralAdapters_DistilAdapters": DistilAdapters,
    "SpectralAdapters_AdapterStack": AdapterStack,
    "SpectralAdapters_ConceptSlider": ConceptSlider,
    "SpectralAdapters_CompareAdapters": CompareAdapters,
}

NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "SpectralAdapters_LoadFouRA": "Load FouRA",
    "SpectralAdapters_LoadSpectralAdapter": "Load Spectral Adapter",
    "SpectralAdapters_LoadLoRAAsAdapter": "Load LoRA as Adapter",
    "SpectralAdapters_AdapterStrength": "Adapter Strength",
    "SpectralAdapters_FuseAdapters": "Fuse Adapters",
    "SpectralAdapters_ApplyAdapter": "Apply Adapter",
    "SpectralAdapters_SaveAdapter": "Save Adapter",
    "SpectralAdapters_ExportAdapterAsLoRA": "Export Adapter as LoRA",
    "SpectralAdapters_ResizeAdapter": "Resize Adapter",
    "SpectralAdapters_AdapterReport": "Adapter Report",
    "SpectralAdapters_LoadDemoModel": "Load Demo Model",
    "SpectralAdapters_TrainAdapter": "Train Adapter",
    "SpectralAdapters_TrainLayers": "Training: Layers",
    "SpectralAdapters_TrainOptimiser": "Training: Optimiser",
    "SpectralAdapters_TrainNoiseAndLoss": "Training: Noise and Loss",
    "SpectralAdapters_TrainGate": "Training: Gate",
    "SpectralAdapters_TrainTextEncoder": "Training: Text Encoder",
    "SpectralAdapters_TrainMemory": "Training: Memory",
    "SpectralAdapters_TrainRegularisation": "Training: Regularisation",
    "SpectralAdapters_TrainValidation": "Training: Validation",
    "SpectralAdapters_DistilAdapters": "Distil Adapters",
    "SpectralAdapters_AdapterStack": "Adapter Stack",
    "SpectralAdapters_ConceptSlider": "Concept Slider",
    "SpectralAdapters_CompareAdapters": "Compare Adapters",
}

start()
