"""Inside a host: a small random model of every family that the host lists, of its own classes.

Sizes are small and weights random; classes, names, fused weights and sampling are the host's own. A family
that this host does not have is left out.
"""

import torch
from inside_family import CPU, WORDS, Family, made_of, patcher_of  # noqa: F401
from inside_unets import SD15, UNET

FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 48,
    "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
    "axes_dim": [8, 12, 12], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
    "txt_ids_dims": [],
}  # fmt: skip
FLUX2 = {
    "image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": 48,
    "hidden_size": 64, "mlp_ratio": 3.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
    "axes_dim": [8, 8, 8, 8], "theta": 2000, "patch_size": 1, "qkv_bias": False, "guidance_embed": True,
    "txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True, "ops_bias": False,
    "default_ref_method": "index", "ref_index_scale": 10.0,
}  # fmt: skip
CHROMA = {
    "image_model": "chroma", "in_channels": 64, "out_channels": 64, "context_in_dim": 48, "hidden_size": 64,
    "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [8, 12, 12],
    "theta": 10000, "patch_size": 2, "qkv_bias": True, "in_dim": 64, "out_dim": 64, "hidden_dim": 64,
    "n_layers": 2, "txt_ids_dims": [], "vec_in_dim": None,
}  # fmt: skip
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 64, "ffn_dim": 128, "num_heads": 2, "num_layers": 2,
    "text_dim": 48, "text_len": 16, "freq_dim": 32, "in_dim": 16, "out_dim": 16, "patch_size": (1, 2, 2),
    "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip
QWEN = {
    "image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "attention_head_dim": 32,
    "num_attention_heads": 2, "joint_attention_dim": 48, "axes_dims_rope": (8, 12, 12),
}  # fmt: skip
LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 96, "cap_feat_dim": 48,
    "n_layers": 2, "n_refiner_layers": 1, "qk_norm": True, "n_heads": 4, "n_kv_heads": 2,
    "axes_dims": [8, 8, 8], "axes_lens": [300, 64, 64], "multiple_of": 32, "ffn_dim_multiplier": 2.0,
}  # fmt: skip
Z_IMAGE = LUMINA | {
    "dim": 256, "n_heads": 8, "n_kv_heads": 8, "axes_dims": [8, 12, 12], "z_image_modulation": True,
    "time_scale": 1000.0, "pad_tokens_multiple": 32,
}  # fmt: skip
COSMOS2 = {
    "image_model": "cosmos_predict2", "max_img_h": 240, "max_img_w": 240, "max_frames": 128,
    "in_channels": 16, "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 64,
    "concat_padding_mask": True, "crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True, "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30,
    "use_adaln_lora": True, "adaln_lora_dim": 16, "num_blocks": 2, "num_heads": 2,
    "extra_per_block_abs_pos_emb": False, "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0, "rope_t_extrapolation_ratio": 1.0,
    "extra_h_extrapolation_ratio": 1.0, "extra_w_extrapolation_ratio": 1.0,
    "extra_t_extrapolation_ratio": 1.0, "rope_enable_fps_modulation": False,
}  # fmt: skip
HUNYUAN = {
    "image_model": "hunyuan_video", "in_channels": 64, "out_channels": 64, "patch_size": [1, 1],
    "vec_in_dim": None, "axes_dim": [16, 16], "meanflow": False, "context_in_dim": 48, "hidden_size": 64,
    "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "theta": 256, "qkv_bias": True,
    "byt5": False, "guidance_embed": False, "use_cond_type_embedding": False, "vision_in_dim": None,
    "meanflow_sum": False,
}  # fmt: skip
OMNIGEN2 = {
    "image_model": "omnigen2", "hidden_size": 96, "num_layers": 2, "num_refiner_layers": 1,
    "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 32, "axes_dim_rope": [8, 8, 8],
    "axes_lens": [300, 64, 64], "text_feat_dim": 48, "ffn_dim_multiplier": None, "norm_eps": 1e-5,
    "in_channels": 16, "patch_size": 2, "timestep_scale": 1000.0,
}  # fmt: skip
BOOGU = {
    "image_model": "boogu", "hidden_size": 96, "num_layers": 2, "num_double_stream_layers": 1,
    "num_refiner_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 32,
    "axes_dim_rope": (8, 8, 8), "axes_lens": (2048, 64, 64), "instruction_feat_dim": 48,
}  # fmt: skip
KREA2 = {
    "image_model": "krea2", "features": 256, "tdim": 32, "txtdim": 40, "heads": 2, "kvheads": 1,
    "multiplier": 2, "layers": 2, "patch": 2, "channels": 16, "txtlayers": 3, "txtheads": 2, "txtkvheads": 2,
}  # fmt: skip
AURAFLOW = {
    "in_channels": 4, "out_channels": 4, "patch_size": 2, "dim": 256, "n_layers": 2, "n_double_layers": 1,
    "n_heads": 1, "global_conddim": 256, "cond_seq_dim": 48, "max_seq": 256,
}  # fmt: skip
IDEOGRAM = {
    "image_model": "ideogram4", "in_channels": 128, "num_layers": 2, "num_attention_heads": 2,
    "attention_head_dim": 32, "intermediate_size": 64, "adaln_dim": 32, "llm_features_dim": 48,
    "mrope_section": (6, 5, 5),
}  # fmt: skip
ERNIE = {
    "image_model": "ernie", "hidden_size": 64, "num_attention_heads": 2, "num_layers": 2,
    "ffn_hidden_size": 64, "text_in_dim": 48, "rope_axes_dim": (8, 12, 12),
}  # fmt: skip
MAGE = QWEN | {"image_model": "mage_flow", "in_channels": 128}
LTXV = {
    "image_model": "ltxv", "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
    "cross_attention_dim": 64, "caption_channels": 48, "in_channels": 128,
}  # fmt: skip
JOY = {
    "image_model": "joyimage", "in_channels": 16, "hidden_size": 256, "patch_size": [1, 2, 2],
    "num_layers": 2, "num_attention_heads": 2, "text_dim": 48,
}  # fmt: skip
SMALL = {
    "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1],
    "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1], "num_head_channels": 16,
    "model_channels": 32, "use_linear_in_transformer": True,
}  # fmt: skip
SDXL = {
    "model_channels": 32, "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [0, 2],
    "transformer_depth_middle": 2, "transformer_depth_output": [0, 0, 2, 2], "num_head_channels": 16,
    "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 2816,
}  # fmt: skip

FAMILIES = {
    "sd1": Family("SD15", SD15 | {"model_channels": 32}, (1, 4, 8, 8), 64),
    "sd2": Family("SD20", UNET | SMALL | {"model_channels": 64}, (1, 4, 8, 8), 64),
    "sdxl": Family("SDXL", UNET | SDXL, (1, 4, 8, 8), 64, pooled=1280),
    "flux": Family("Flux", FLUX, (1, 16, 8, 8), 48, pooled=32),
    "flux-schnell": Family("FluxSchnell", FLUX | {"guidance_embed": False}, (1, 16, 8, 8), 48, pooled=32),
    "flux2": Family("Flux2", FLUX2, (1, 128, 4, 4), 48),
    "longcat": Family(
        "LongCatImage",
        FLUX | {"vec_in_dim": None, "context_in_dim": 3584, "guidance_embed": False, "txt_ids_dims": [1, 2]},
        (1, 16, 8, 8), 3584,
    ),
    "chroma": Family("Chroma", CHROMA, (1, 16, 8, 8), 48, pooled=32),
    "wan2.1": Family("WAN21_T2V", WAN, (1, 16, 2, 8, 8), 48),
    "wan2.2": Family("WAN22_T2V", WAN | {"in_dim": 48, "out_dim": 48}, (1, 48, 2, 8, 8), 48),
    "qwen-image": Family("QwenImage", QWEN, (1, 16, 1, 8, 8), 48),
    "qwen-image-edit": Family(
        "QwenImage", QWEN | {"default_ref_method": "index_timestep_zero"}, (1, 16, 1, 8, 8), 48,
        extra={"reference_latents": [torch.zeros(1, 16, 1, 8, 8)]},
    ),
    "lumina2": Family("Lumina2", LUMINA, (1, 16, 8, 8), 48, masked=True),
    "z-image": Family("ZImage", Z_IMAGE, (1, 16, 8, 8), 48, masked=True),
    "cosmos-predict2": Family("CosmosT2IPredict2", COSMOS2, (1, 16, 1, 8, 8), 1024),
    "anima": Family("Anima", COSMOS2 | {"image_model": "anima"}, (1, 16, 1, 8, 8), 1024),
    "hunyuan-image-2.1": Family("HunyuanImage21", HUNYUAN, (1, 64, 8, 8), 48),
    "hunyuan-video": Family(
        "HunyuanVideo",
        HUNYUAN | {"in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "vec_in_dim": 32,
                   "axes_dim": [8, 12, 12], "guidance_embed": True},
        (1, 16, 1, 8, 8), 48, pooled=32,
    ),
    "hunyuan-video-1.5": Family(
        "HunyuanVideo15",
        HUNYUAN | {"in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "axes_dim": [8, 12, 12],
                   "depth_single_blocks": 0, "use_cond_type_embedding": True, "vision_in_dim": 48,
                   "meanflow_sum": True},
        (1, 32, 1, 8, 8), 48, pooled=32,
    ),
    "mage-flow": Family("MageFlow", MAGE, (1, 128, 4, 4), 48),
    "krea2": Family("Krea2", KREA2, (1, 16, 1, 8, 8), 120),
    "ideogram4": Family("Ideogram4", IDEOGRAM, (1, 128, 4, 4), 48),
    "ernie-image": Family("ErnieImage", ERNIE, (1, 128, 4, 4), 48),
    "boogu": Family("Boogu", BOOGU, (1, 16, 8, 8), 48, masked=True),
    "omnigen2": Family("Omnigen2", OMNIGEN2, (1, 16, 8, 8), 48, masked=True),
    "ltxv": Family("LTXV", LTXV, (1, 128, 2, 4, 4), 48, masked=True),
    "auraflow": Family("AuraFlow", AURAFLOW, (1, 4, 8, 8), 48),
    "joyimage": Family("JoyImage", JOY, (1, 16, 1, 8, 8), 48),
}  # fmt: skip
