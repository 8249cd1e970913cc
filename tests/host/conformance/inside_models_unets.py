"""Inside a host: small models of the other UNets: for inpainting, editing, refining, video."""

from inside_family import Family, drawn
from inside_models import SDXL, SMALL
from inside_unets import SD15, UNET

WIDE = UNET | SMALL | {"model_channels": 64}
VIDEO = WIDE | {
    "in_channels": 8, "use_temporal_attention": True, "use_temporal_resblock": True,
    "extra_ff_mix_layer": True, "use_spatial_context": True, "merge_strategy": "learned_with_images",
    "merge_factor": 0.0, "video_kernel_size": [3, 1, 1], "num_classes": "sequential",
}  # fmt: skip

UNETS = {
    "lotus-d": Family(
        "LotusD", WIDE | {"adm_in_channels": 4, "num_classes": "sequential"}, (1, 4, 8, 8), 64,
    ),
    "zero123": Family(
        "Stable_Zero123", SD15 | {"model_channels": 32, "in_channels": 8, "context_dim": 768}, (1, 4, 8, 8),
        768, state={"cc_projection.weight": drawn(768, 772), "cc_projection.bias": drawn(768)},
    ),
    "sd1-inpaint": Family("SD15", SD15 | {"model_channels": 32, "in_channels": 9}, (1, 4, 8, 8), 64),
    "sd1-instruct-pix2pix": Family(
        "SD15_instructpix2pix", SD15 | {"model_channels": 32, "in_channels": 8}, (1, 4, 8, 8), 64,
    ),
    "sd2-inpaint": Family("SD20", WIDE | {"in_channels": 9}, (1, 4, 8, 8), 64),
    "sd2-unclip-l": Family(
        "SD21UnclipL", WIDE | {"adm_in_channels": 1536, "num_classes": "sequential"}, (1, 4, 8, 8), 64,
    ),
    "sd2-unclip-h": Family(
        "SD21UnclipH", WIDE | {"adm_in_channels": 2048, "num_classes": "sequential"}, (1, 4, 8, 8), 64,
    ),
    "sd-x4-upscaler": Family(
        "SD_X4Upscaler", WIDE | {"in_channels": 7, "num_classes": 1000, "num_res_blocks": [1, 1, 1, 1],
        "channel_mult": [1, 1, 1, 1], "transformer_depth": [0, 0, 1, 1], "transformer_depth_output": [0, 0,
        0, 0, 1, 1, 1, 1]}, (1, 4, 8, 8), 64,
    ),
    "sdxl-inpaint": Family("SDXL", UNET | SDXL | {"in_channels": 9}, (1, 4, 8, 8), 64, pooled=1280),
    "sdxl-instruct-pix2pix": Family(
        "SDXL_instructpix2pix", UNET | SDXL | {"in_channels": 8}, (1, 4, 8, 8), 64, pooled=1280,
    ),
    "sdxl-refiner": Family(
        "SDXLRefiner", UNET | SDXL | {"adm_in_channels": 2560}, (1, 4, 8, 8), 64, pooled=1280,
    ),
    "ssd-1b": Family(
        "SSD1B", UNET | SDXL | {"transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1],
        "transformer_depth_middle": 1}, (1, 4, 8, 8), 64, pooled=1280,
    ),
    "segmind-vega": Family(
        "Segmind_Vega", UNET | SDXL | {"transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1,
        1], "transformer_depth_middle": -1}, (1, 4, 8, 8), 64, pooled=1280,
    ),
    "koala-700m": Family(
        "KOALA_700M", UNET | SDXL | {"transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1],
        "transformer_depth_middle": -2}, (1, 4, 8, 8), 64, pooled=1280,
    ),
    "koala-1b": Family(
        "KOALA_1B", UNET | SDXL | {"transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1],
        "transformer_depth_middle": 1}, (1, 4, 8, 8), 64, pooled=1280,
    ),
    "svd": Family("SVD_img2vid", VIDEO | {"adm_in_channels": 768}, (1, 4, 8, 8), 64),
    "sv3d-u": Family("SV3D_u", VIDEO | {"adm_in_channels": 256}, (1, 4, 8, 8), 64),
    "sv3d-p": Family("SV3D_p", VIDEO | {"adm_in_channels": 1280}, (1, 4, 8, 8), 64),
    "stable-cascade-c": Family(
        "Stable_Cascade_C", {"stable_cascade_stage": "c", "c_cond": 64, "c_hidden": [64, 64], "nhead": [2,
        2], "blocks": [[1, 2], [2, 1]], "c_clip_text": 48, "c_clip_text_pooled": 32}, (1, 16, 4, 4), 48,
        pooled=32,
    ),
    "stable-cascade-b": Family(
        "Stable_Cascade_B", {"stable_cascade_stage": "b", "c_cond": 64, "c_hidden": [32, 32, 64, 64],
        "nhead": [-1, -1, 2, 2], "blocks": [[1, 1, 2, 1], [1, 2, 1, 1]], "block_repeat": [[1, 1, 1, 1], [1,
        1, 1, 1]], "c_clip": 32}, (1, 4, 32, 32), 48, pooled=32,
    ),
}  # fmt: skip
