"""Inside a host: training on other kinds of models; every kind of prediction against the formulas."""

import comfy.model_sampling as sampling
import torch
from inside_apply_lib import condition, pack
from inside_apply_models import sd3
from inside_train_lib import SAVED, train

applying = pack("nodes.host.apply.adapters")
demo = pack("nodes.host.demo.model")
fileformat = pack("spectral_core.files.adapter_file")
HostNoise = pack("nodes.host.training.model").HostNoise
diffusion = pack("spectral_core.training.objectives.diffusion")


def made(schedule, kind):
    class Both(schedule, kind):
        pass

    return Both()


def every_kind_of_prediction():
    """ε, v and flow: what the network shall answer, and noise levels, are those of the core's formulas."""
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    with torch.inference_mode(False):
        for kind, prediction in ((sampling.EPS, "epsilon"), (sampling.V_PREDICTION, "v_prediction")):
            host = HostNoise(made(sampling.ModelSamplingDiscrete, kind))
            ours = diffusion.Diffusion(1 / (1 + host.sigmas.square()), prediction)
            levels = torch.tensor([10, 500, 990])
            target = host.target(latents.clone(), noise.clone(), levels)
            expected = ours.target(latents, noise, levels)
            assert (target - expected).abs().max() < 1e-3, kind
            assert (host.progress(levels) - ours.progress(levels)).abs().max() < 1e-3
            weights = host.min_snr_weights(levels, 5.0)
            assert torch.allclose(weights, ours.min_snr_weights(levels, 5.0), rtol=1e-3)
            draws = [torch.Generator().manual_seed(2) for _ in range(2)]
            assert torch.equal(host.sample_timesteps(9, draws[0]), ours.sample_timesteps(9, draws[1]))
        flow = made(sampling.ModelSamplingDiscreteFlow, sampling.CONST)
        flow.set_parameters(shift=3.0)
        host, levels = HostNoise(flow), torch.tensor([10, 500, 990])
        assert (host.target(latents, noise, levels) - (noise - latents)).abs().max() < 1e-3
        mixed = host.add_noise(latents, noise, levels)
        sigma = host.sigma(levels)[:, None, None, None]
        assert torch.allclose(mixed, (1 - sigma) * latents + sigma * noise, atol=1e-5)
        try:
            host.min_snr_weights(levels, 5.0)
        except pack("spectral_core.errors").SpectralAdapterError:
            pass
        else:
            raise AssertionError("min-snr on a flow model")


def the_trainers_loss_is_that_of_the_network():
    """The network's own answer comes back from the host's estimate of the clean latents."""
    model = demo.load_model()
    training = pack("nodes.host.training.model")
    ((states, options),) = condition()
    with training.ready(model, "auto", (2, 4, 16, 16)) as ready:
        seen = []
        hook = ready.root.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
        latents = [torch.randn(4, 16, 16) for _ in range(2)]
        given = training.Conditions(ready.patcher, {0: [states, options], 1: [states, options]}, latents)
        levels = torch.tensor([40, 700])
        noisy = ready.noise.add_noise(torch.stack(latents), torch.randn(2, 4, 16, 16), levels)
        try:
            answer = training.Denoiser(ready, given)(noisy, levels, [0, 1])
        finally:
            hook.remove()
        assert ready.precision == "fp32"
        assert (answer - seen[0]).abs().max() < 1e-4 * seen[0].abs().max()


def a_flow_model_with_fused_layers():
    """Layers keep the host's names; the file works at once."""
    model = sd3()
    generator = torch.Generator().manual_seed(3)
    latents = {"samples": torch.randn(2, 16, 8, 8, generator=generator)}
    pooled = {"pooled_output": torch.randn(1, 32, generator=generator)}
    words = [[torch.randn(1, 7, 48, generator=generator), pooled]]
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    adapter, _, _ = train(
        model, run_name="flow", method="spectral_a", targets="attention", latents=latents,
        conditioning=[words], steps=3, checkpointing="full",
    )  # fmt: skip
    assert "diffusion_model.joint_blocks.0.x_block.attn.qkv" in adapter.layers, list(adapter.layers)
    assert all(torch.equal(before[k], v) for k, v in model.model.state_dict().items())
    loaded = fileformat.load(SAVED / "flow.safetensors")
    applied = applying.apply(loaded, model, None, 1.0, 1.0)
    assert applied.mode == "merged" and "left out" not in applied.report, applied.report
    on, _, _ = train(
        model, run_name="flow on", latents=latents, conditioning=[words], steps=1, adapter=loaded
    )
    assert set(on.layers) == set(adapter.layers)


MODEL_CHECKS = [
    every_kind_of_prediction,
    the_trainers_loss_is_that_of_the_network,
    a_flow_model_with_fused_layers,
]
