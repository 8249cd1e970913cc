"""Inside a host: small models of the families for sound and for shapes."""

import torch
from inside_family import Family, drawn, seconds

COORDS = torch.cat(
    [torch.zeros(12, 1, dtype=torch.int), torch.arange(36, dtype=torch.int).view(12, 3) % 4], 1
)
AUDIO = {
    "audio_model": "dit1.0", "embed_dim": 768, "cond_token_dim": 768, "project_cond_tokens": False,
    "depth": 2, "num_heads": 12,
}  # fmt: skip
HUNYUAN_3D = {
    "image_model": "hunyuan3d2", "in_channels": 64, "context_in_dim": 48, "hidden_size": 64,
    "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "qkv_bias": True,
    "guidance_embed": False,
}  # fmt: skip

OTHERS = {
    "stable-audio": Family(
        "StableAudio", AUDIO | {"io_channels": 64, "global_cond_dim": 1536}, (1, 64, 16), 768,
        state=seconds(), rate=0.001,
    ),
    "stable-audio-3": Family(
        "StableAudio3", AUDIO | {"io_channels": 256, "global_cond_dim": 768,
        "global_cond_shared_embed": True, "global_cond_type": "adaLN", "local_add_cond_dim": 257,
        "timestep_features_type": "expo", "num_memory_tokens": 4}, (1, 256, 16), 768, state=seconds("expo"),
    ),
    "ace-step": Family(
        "ACEStep", {"audio_model": "ace", "num_layers": 2, "inner_dim": 64, "attention_head_dim": 32,
        "num_attention_heads": 2, "text_embedding_dim": 48, "lyric_encoder_vocab_size": 60,
        "lyric_hidden_size": 1024, "ssl_latent_dims": [32, 24]}, (1, 8, 16, 16), 48,
        extra={"conditioning_lyrics": torch.ones(1, 6, dtype=torch.long)},
    ),
    "ace-step-1.5": Family(
        "ACEStep15", {"audio_model": "ace1.5", "hidden_size": 64, "text_hidden_dim": 48,
        "num_dit_layers": 2, "num_lyric_layers": 1, "num_timbre_layers": 1, "num_tokenizer_layers": 1,
        "num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "intermediate_size": 64,
        "encoder_hidden_size": 64, "encoder_intermediate_size": 64, "encoder_num_heads": 2, "fsq_dim": 64},
        (1, 64, 16), 48, extra={"conditioning_lyrics": drawn(1, 6, 48)},
    ),
    "hunyuan3d-2": Family("Hunyuan3Dv2", HUNYUAN_3D, (1, 64, 16), 48),
    "hunyuan3d-2-mini": Family("Hunyuan3Dv2mini", HUNYUAN_3D | {"depth": 1}, (1, 64, 16), 48),
    "hunyuan3d-2.1": Family(
        "Hunyuan3Dv2_1", {"image_model": "hunyuan3d2_1", "in_channels": 64, "context_dim": 48,
        "hidden_size": 64, "num_heads": 2, "depth": 4, "qkv_bias": False, "num_moe_layers": 1,
        "guidance_cond_proj_dim": 64, "num_experts": 2}, (1, 64, 16), 48,
    ),
    "triposplat": Family(
        "TripoSplat", {"image_model": "triposplat", "q_token_length": 16, "model_channels": 128,
        "cond_channels": 48, "num_blocks": 2, "num_refiner_blocks": 1, "num_head_channels": 64}, (1, 16,
        16), 48, beside=((1, 1, 5),),
    ),
    "trellis2": Family(
        "Trellis2", {"image_model": "trellis2", "resolution": 4, "model_channels": 192, "cond_channels": 48,
        "num_blocks": 1, "in_channels": 32}, (1, 32, 12, 1), 48, extra={"embeds": drawn(1, 5, 48),
        "trellis2_coords": COORDS, "trellis2_generation_mode": "shape_generation"},
    ),
}  # fmt: skip
