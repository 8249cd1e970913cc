"""Inside a host: the configurations that small UNets of its own classes share."""

UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64, "legacy": False,
    "use_spatial_transformer": True, "adm_in_channels": None, "context_dim": 64,
}  # fmt: skip
SD15 = UNET | {
    "num_res_blocks": [1], "channel_mult": [1], "transformer_depth": [1], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1], "num_heads": 4, "use_linear_in_transformer": False,
}  # fmt: skip
