"""Shared by the ``inside_apply*`` scripts: the pack as a package, one denoiser call and one sampling run."""

import importlib
import importlib.util
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management
import comfy.patcher_extension
import comfy.sample
import comfy.sampler_helpers
import torch

ROOT = Path(__file__).resolve().parents[2]
PACK = "spectral_pack"
FOLDER = Path(sys.argv[2])


def pack(name=""):
    """A module of the pack, by its path from the root."""
    if PACK not in sys.modules:
        spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACK] = module
        spec.loader.exec_module(module)
    return importlib.import_module(f"{PACK}.{name}" if name else PACK)


def adapter(name):
    return pack("spectral_core.files.adapter_file").load(FOLDER / f"{name}.safetensors")


def prepared(patcher):
    """(transformer_options, a function that ends the run): what the host's sampler does around its steps."""
    options = {"transformer_options": {}}
    comfy.sampler_helpers.prepare_model_patcher(patcher, {}, options)
    executor = comfy.patcher_extension.WrapperExecutor.new_executor(
        lambda *args, **kwargs: comfy.model_management.load_models_gpu([patcher]),
        comfy.patcher_extension.get_all_wrappers(
            comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING, options, is_model_options=True
        ),
    )
    executor.execute(patcher, [1, 4, 16, 16], {}, model_options=options)
    patcher.pre_run()
    return options["transformer_options"], patcher.cleanup


def predict(patcher, x, sigma, context, **options):
    """(input, timesteps, output) of the denoiser itself in one call of the host's ``apply_model``."""
    seen = {}

    def watch(module, args, kwargs, output):
        seen["input"], seen["timesteps"], seen["output"] = args[0].clone(), args[1].clone(), output.clone()

    transformer_options, done = prepared(patcher)
    hook = patcher.model.diffusion_model.register_forward_hook(watch, with_kwargs=True)
    try:
        patcher.model.apply_model(
            x, sigma, c_crossattn=context, transformer_options={**transformer_options, **options}
        )
    finally:
        hook.remove()
        done()
    return seen["input"], seen["timesteps"], seen["output"]


def sample(patcher, positive, negative=None, steps=3, cfg=4.0, seed=1, size=16, callback=None, start=None):
    """Latents of a run of the host's KSampler (euler, simple)."""
    latent = torch.zeros(1, 4, size, size)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
    return comfy.sample.sample(
        patcher, noise, steps, cfg, "euler", "simple", positive, negative or positive, latent,
        callback=callback, disable_pbar=True, seed=seed, **({} if start is None else {"start_step": start}),
    )  # fmt: skip


def condition(seed=5, width=128, rows=1):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(rows, 77, width, generator=generator), {}]]


@contextmanager
def interrupted():
    """What is done in the block ends in the host's interrupt."""
    try:
        yield
    except comfy.model_management.InterruptProcessingException:
        return
    raise AssertionError("the interrupt was lost")


def leftovers(model):
    """Modules of a model with a ``forward`` that is not their class's (which the host's bypass LoRA leaves on
    the instance).
    """
    return [
        name
        for name, module in model.named_modules()
        if "forward" in module.__dict__
        and getattr(module.__dict__["forward"], "__func__", None) is not type(module).forward
    ]


def run_checks(checks):
    """Name -> "" or the traceback of each check; every one runs."""
    outcome = {}
    for check in checks:
        started = time.perf_counter()
        try:
            with torch.inference_mode():
                check()
            outcome[check.__name__] = ""
        except Exception:
            outcome[check.__name__] = traceback.format_exc()
        print(f"{check.__name__}: {time.perf_counter() - started:.1f} s", flush=True)
    return outcome
