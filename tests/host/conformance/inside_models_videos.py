"""Inside a host: small models of the families for video."""

from inside_family import Family, drawn, seen
from inside_models import COSMOS2, HUNYUAN, LTXV, WAN
from inside_models_images import KANDINSKY

HUNYUAN_VIDEO = HUNYUAN | {
    "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "vec_in_dim": 32, "axes_dim": [8, 12,
    12], "guidance_embed": True,
}  # fmt: skip
COSMOS = {
    "image_model": "cosmos", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16,
    "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 64,
    "block_config": "FA-CA-MLP", "num_blocks": 2, "num_heads": 2, "concat_padding_mask": True,
    "pos_emb_cls": "rope3d", "pos_emb_learnable": False, "pos_emb_interpolation": "crop",
    "block_x_format": "THWBD", "affline_emb_norm": True, "use_adaln_lora": True, "adaln_lora_dim": 16,
    "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable",
    "crossattn_emb_channels": 48, "rope_h_extrapolation_ratio": 1.0, "rope_w_extrapolation_ratio": 1.0,
    "rope_t_extrapolation_ratio": 2.0, "extra_h_extrapolation_ratio": 1.0,
    "extra_w_extrapolation_ratio": 1.0, "extra_t_extrapolation_ratio": 2.0,
}  # fmt: skip
COGVIDEO = {
    "image_model": "cogvideox", "num_attention_heads": 2, "attention_head_dim": 48, "num_layers": 2,
    "time_embed_dim": 32, "text_embed_dim": 48, "max_text_seq_length": 7, "sample_width": 8,
    "sample_height": 8, "sample_frames": 5,
}  # fmt: skip
SCAIL = {"reference_latents": [drawn(1, 16, 1, 8, 8)], "pose_video_latent": drawn(1, 16, 2, 4, 4)}

VIDEOS = {
    "mochi": Family(
        "GenmoMochi", {"image_model": "mochi_preview", "depth": 2, "patch_size": 2, "num_heads": 2,
        "hidden_size_x": 64, "hidden_size_y": 48, "mlp_ratio_x": 192.0, "mlp_ratio_y": 4.0,
        "learn_sigma": False, "in_channels": 12, "qk_norm": True, "qkv_bias": False, "out_bias": True,
        "attn_drop": 0.0, "patch_embed_bias": True, "posenc_preserve_area": True, "timestep_mlp_bias": True,
        "attend_to_padding": False, "timestep_scale": 1000.0, "use_t5": True, "t5_feat_dim": 48,
        "t5_token_length": 7, "rope_theta": 10000.0}, (1, 12, 2, 8, 8), 48, masked=True,
    ),
    "ltxav": Family(
        "LTXAV", LTXV | {"image_model": "ltxav", "audio_cross_attention_dim": 64,
        "audio_attention_head_dim": 16, "audio_num_attention_heads": 4, "connector_attention_head_dim": 24,
        "connector_num_attention_heads": 2}, (1, 128, 2, 4, 4), 96, masked=True,
    ),
    "minimax-h3": Family(
        "MiniMaxH3", {"image_model": "minimax_h3", "num_layers": 2, "token_refiner_num_layers": 1,
        "hidden_size": 64, "latents_dim": 24, "audio_latents_dim": 32, "attention_head_dim": 32,
        "num_attention_heads": 2, "ffn_hidden_size": 64, "text_dim": 48, "timestep_input_dim": 32,
        "time_embed_hidden_size": 64, "time_embed_dim": 32, "rope_inv_freq_len": 4}, (1, 24, 2, 8, 8), 48,
        beside=((1, 32, 2, 4),),
    ),
    "hunyuan-video-i2v": Family(
        "HunyuanVideoI2V", HUNYUAN_VIDEO | {"in_channels": 33}, (1, 16, 1, 8, 8), 48, pooled=32,
    ),
    "hunyuan-video-skyreels-i2v": Family(
        "HunyuanVideoSkyreelsI2V", HUNYUAN_VIDEO | {"in_channels": 32}, (1, 16, 1, 8, 8), 48, pooled=32,
    ),
    "hunyuan-video-1.5-sr": Family(
        "HunyuanVideo15_SR_Distilled", HUNYUAN | {"in_channels": 98, "out_channels": 32, "patch_size": [1,
        1, 1], "axes_dim": [8, 12, 12], "depth_single_blocks": 0, "use_cond_type_embedding": True,
        "vision_in_dim": 48, "meanflow_sum": True, "meanflow": True}, (1, 32, 1, 8, 8), 48, pooled=32,
    ),
    "cosmos-t2v": Family("CosmosT2V", COSMOS, (1, 16, 2, 8, 8), 48),
    "cosmos-i2v": Family("CosmosI2V", COSMOS | {"in_channels": 17}, (1, 16, 2, 8, 8), 48),
    "cosmos-predict2-i2v": Family(
        "CosmosI2VPredict2", COSMOS2 | {"in_channels": 17}, (1, 16, 1, 8, 8), 1024,
    ),
    "wan2.1-causal": Family("WAN21_CausalAR_T2V", WAN | {"causal_ar": True}, (1, 16, 2, 8, 8), 48),
    "wan2.1-i2v": Family(
        "WAN21_I2V", WAN | {"model_type": "i2v", "in_dim": 36}, (1, 16, 2, 8, 8), 48,
        extra={"clip_vision_output": seen()},
    ),
    "wan2.1-fun-control": Family("WAN21_FunControl2V", WAN | {"in_dim": 48}, (1, 16, 2, 8, 8), 48),
    "wan2.1-camera": Family(
        "WAN21_Camera", WAN | {"model_type": "camera", "in_dim": 32}, (1, 16, 2, 8, 8), 48,
        extra={"camera_conditions": drawn(1, 24, 2, 64, 64)},
    ),
    "wan2.2-camera": Family(
        "WAN22_Camera", WAN | {"model_type": "camera_2.2", "in_dim": 36}, (1, 16, 2, 8, 8), 48,
        extra={"camera_conditions": drawn(1, 24, 2, 64, 64)},
    ),
    "wan2.1-vace": Family(
        "WAN21_Vace", WAN | {"model_type": "vace", "vace_layers": 2, "vace_in_dim": 96}, (1, 16, 2, 8, 8),
        48,
    ),
    "wan2.1-humo": Family(
        "WAN21_HuMo", WAN | {"model_type": "humo", "in_dim": 36}, (1, 16, 2, 8, 8), 48,
        extra={"audio_embed": drawn(1, 2, 8, 5, 1280)},
    ),
    "wan2.2-s2v": Family(
        "WAN22_S2V", WAN | {"model_type": "s2v", "audio_inject_layers": [0, 1]}, (1, 16, 2, 8, 8), 48,
        extra={"audio_embed": drawn(1, 25, 1024, 8)},
    ),
    "wan2.2-animate": Family(
        "WAN22_Animate", WAN | {"model_type": "animate", "in_dim": 36, "motion_encoder_dim": 512}, (1, 16,
        3, 8, 8), 48, extra={"clip_vision_output": seen(), "pose_video_latent": drawn(1, 16, 2, 8, 8)},
    ),
    "wan-animate-2": Family(
        "WAN_Animate2", WAN | {"model_type": "animate2", "in_dim": 36}, (1, 16, 3, 8, 8), 48,
        extra={"clip_vision_output": seen(), "pose_video_latent": drawn(1, 16, 2, 8, 8)},
    ),
    "wan2.1-flow-rvs": Family("WAN21_FlowRVS", WAN | {"model_type": "flow_rvs"}, (1, 16, 2, 8, 8), 48),
    "wan2.1-scail": Family(
        "WAN21_SCAIL", WAN | {"model_type": "scail", "in_dim": 20}, (1, 16, 2, 8, 8), 48, extra=SCAIL,
    ),
    "wan2.1-scail-2": Family(
        "WAN21_SCAIL2", WAN | {"model_type": "scail2", "in_dim": 20}, (1, 16, 2, 8, 8), 48, extra=SCAIL,
    ),
    "wan2.2-dancer": Family(
        "WAN22_WanDancer", WAN | {"model_type": "wandancer", "in_dim": 36, "audio_inject_layers": [0, 1]},
        (1, 16, 2, 8, 8), 48, extra={"audio_embed": drawn(1, 8, 35), "clip_vision_output": seen()},
    ),
    "kandinsky5": Family("Kandinsky5", KANDINSKY, (1, 16, 1, 8, 8), 48, pooled=32),
    "cogvideox": Family("CogVideoX_T2V", COGVIDEO, (1, 16, 2, 8, 8), 48),
    "cogvideox-i2v": Family(
        "CogVideoX_I2V", COGVIDEO | {"in_channels": 32, "use_rotary_positional_embeddings": True}, (1, 16,
        2, 8, 8), 48,
    ),
    "cogvideox-inpaint": Family(
        "CogVideoX_Inpaint", COGVIDEO | {"in_channels": 48, "use_rotary_positional_embeddings": True}, (1,
        16, 2, 8, 8), 48,
    ),
    "seedvr2": Family(
        "SeedVR2", {"image_model": "seedvr2", "vid_dim": 64, "heads": 2, "head_dim": 32, "num_layers": 2,
        "norm_eps": 1e-5, "qk_bias": False, "mlp_type": "swiglu", "mm_layers": 1, "txt_in_dim": 48,
        "rope_dim": 32, "expand_ratio": 2}, (1, 16, 1, 8, 8), 48, extra={"condition": drawn(1, 17, 1, 8, 8)},
    ),
}  # fmt: skip
