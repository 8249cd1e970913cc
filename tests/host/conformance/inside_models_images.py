"""Inside a host: small models of the other families for pictures, and variants for inpainting and editing."""

import torch
from inside_family import Family, drawn
from inside_models import CHROMA, FLUX, HUNYUAN, Z_IMAGE

SD3 = {
    "in_channels": 16, "input_size": None, "patch_size": 2, "depth": 2, "num_patches": 1024,
    "pos_embed_scaling_factor": None, "pos_embed_max_size": 32, "adm_in_channels": 32,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 48,
    "out_features": 128}}, "qk_norm": "rms", "context_size": 48,
}  # fmt: skip
PIXART = {
    "image_model": "pixart_sigma", "hidden_size": 96, "depth": 2, "num_heads": 2, "caption_channels": 48,
    "model_max_length": 16, "input_size": 64, "pe_interpolation": 1.0,
}  # fmt: skip
HUNYUAN_DIT = {
    "image_model": "hydit", "hidden_size": 64, "depth": 4, "num_heads": 2, "text_states_dim": 48,
    "text_states_dim_t5": 40, "text_len": 7, "text_len_t5": 9, "size_cond": False, "use_style_cond": False,
    "mlp_ratio": 4.0,
}  # fmt: skip
MT5 = {"conditioning_mt5xl": drawn(1, 9, 40), "attention_mask_mt5xl": torch.ones(1, 9)}
PIXELDIT = {
    "image_model": "pixeldit_t2i", "num_groups": 2, "hidden_size": 64, "pixel_hidden_size": 16,
    "pixel_attn_hidden_size": 32, "pixel_num_groups": 2, "patch_depth": 2, "pixel_depth": 2,
    "patch_size": 8, "txt_embed_dim": 48, "txt_max_length": 16,
}  # fmt: skip
KANDINSKY = {
    "image_model": "kandinsky5", "model_dim": 64, "ff_dim": 128, "time_dim": 32, "in_text_dim": 48,
    "in_text_dim2": 32, "visual_embed_dim": 132, "axes_dims": (8, 12, 12), "num_text_blocks": 1,
    "num_visual_blocks": 2,
}  # fmt: skip

IMAGES = {
    "sd3": Family("SD3", SD3, (1, 16, 8, 8), 48, pooled=32),
    "sd3.5-medium": Family("SD3", SD3 | {"x_block_self_attn_layers": [0]}, (1, 16, 8, 8), 48, pooled=32),
    "pixart-alpha": Family(
        "PixArtAlpha", PIXART | {"image_model": "pixart_alpha"}, (1, 4, 48, 48), 48, extra={"width": 64,
        "height": 64},
    ),
    "pixart-sigma": Family("PixArtSigma", PIXART | {"micro_condition": False}, (1, 4, 48, 48), 48),
    "hunyuan-dit": Family("HunyuanDiT", HUNYUAN_DIT, (1, 4, 8, 8), 48, masked=True, extra=MT5),
    "hunyuan-dit-1": Family(
        "HunyuanDiT1", HUNYUAN_DIT | {"image_model": "hydit1", "size_cond": True, "use_style_cond": True},
        (1, 4, 8, 8), 48, masked=True, extra=MT5,
    ),
    "flux-inpaint": Family(
        "FluxInpaint", FLUX | {"in_channels": 96, "out_channels": 16}, (1, 16, 8, 8), 48, pooled=32,
    ),
    "flux-kontext": Family(
        "Flux", FLUX, (1, 16, 8, 8), 48, pooled=32, extra={"reference_latents": [drawn(1, 16, 8, 8)]},
    ),
    "lens": Family(
        "Lens", {"image_model": "lens", "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
        "enc_hidden_dim": 12, "axes_dims_rope": (8, 12, 12), "in_channels": 128, "out_channels": 32}, (1,
        128, 4, 4), 48, masked=True,
    ),
    "hunyuan-image-2.1-refiner": Family(
        "HunyuanImage21Refiner", HUNYUAN | {"in_channels": 128, "out_channels": 64, "patch_size": [1, 1, 1],
        "axes_dim": [8, 12, 12]}, (1, 64, 1, 8, 8), 48, pictures=(1, 32, 1, 8, 8),
    ),
    "z-image-pixel": Family(
        "ZImagePixelSpace", Z_IMAGE | {"image_model": "zimage_pixel", "in_channels": 3, "patch_size": 8,
        "decoder_hidden_size": 32, "decoder_num_res_blocks": 2, "decoder_max_freqs": 8, "use_x0": False},
        (1, 3, 16, 16), 48, masked=True, rate=0.001,
    ),
    "pixeldit": Family("PixelDiTT2I", PIXELDIT, (1, 3, 16, 16), 48),
    "pid": Family(
        "PiD", PIXELDIT | {"image_model": "pid", "patch_size": 16, "lq_latent_channels": 16,
        "lq_hidden_dim": 32, "lq_num_res_blocks": 1}, (1, 3, 32, 32), 48, extra={"lq_latent": drawn(1, 16,
        4, 4), "degrade_sigma": torch.zeros(1)},
    ),
    "hidream": Family(
        "HiDream", {"image_model": "hidream", "patch_size": 2, "in_channels": 16, "out_channels": 16,
        "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
        "caption_channels": [48, 40], "text_emb_dim": 32, "num_routed_experts": 2,
        "num_activated_experts": 1, "axes_dims_rope": (16, 8, 8), "max_resolution": (16, 16),
        "llama_layers": [0, 1, 1, 1]}, (1, 16, 8, 8), 48, pooled=32, extra={"conditioning_llama3": drawn(1,
        2, 5, 40)},
    ),
    "hidream-o1": Family(
        "HiDreamO1", {"image_model": "hidream_o1", "text_config_overrides": {"hidden_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
        "intermediate_size": 64}, "vision_config_overrides": {"hidden_size": 32, "intermediate_size": 64,
        "depth": 2, "num_heads": 2, "deepstack_visual_indexes": [0]}}, (1, 3, 64, 64), 48,
        extra={"text_input_ids": torch.arange(100, 112)[None]},
    ),
    "chroma-radiance": Family(
        "ChromaRadiance", CHROMA | {"image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3,
        "patch_size": 16, "nerf_hidden_size": 16, "nerf_mlp_ratio": 2, "nerf_depth": 2, "nerf_max_freqs": 8,
        "nerf_tile_size": 32, "nerf_final_head_type": "conv", "nerf_embedder_dtype": torch.float32,
        "use_x0": False, "use_sequential_txt_ids": False}, (1, 3, 32, 32), 48, pooled=32,
    ),
    "kandinsky5-image": Family(
        "Kandinsky5Image", KANDINSKY | {"visual_embed_dim": 64, "rope_scale_factor": (1.0, 1.0, 1.0)}, (1,
        16, 1, 8, 8), 48, pooled=32,
    ),
}  # fmt: skip
