"""Inside a host: small random models of some families, made with the host's own classes."""

import comfy.model_patcher
import torch
from inside_unets import SD15, UNET

__all__ = ["FLUX", "LUMINA", "QWEN", "SD15", "SD20", "SDXL", "WAN", "Z_IMAGE", "patcher_of"]

cpu = torch.device("cpu")

SD20 = UNET | {
    "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1],
    "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1], "num_head_channels": 16,
    "use_linear_in_transformer": True,
}  # fmt: skip
SDXL = UNET | {
    "num_res_blocks": [2, 2], "channel_mult": [1, 2], "transformer_depth": [0, 0, 2, 2],
    "transformer_depth_middle": 2, "transformer_depth_output": [0, 0, 0, 2, 2, 2], "num_head_channels": 16,
    "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 2816,
}  # fmt: skip
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 48,
    "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
    "axes_dim": [8, 12, 12], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
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


def patcher_of(kind, config):
    settings = kind({**config, "dtype": torch.float32})
    settings.set_inference_dtype(torch.float32, None)
    model = settings.get_model({}, device=cpu)
    generator = torch.Generator().manual_seed(2)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() and name.startswith("diffusion_model"):
            size = value[0].numel() ** -0.5 if value.dim() > 1 else 0.1
            value.data = torch.randn(value.shape, generator=generator) * size
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
