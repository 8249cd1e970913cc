"""Noise levels, targets, weights, masks, buckets, drawing: what a batch is made of."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from spectral_core.errors import SpectralAdapterError
from spectral_core.methods import FouRAConfig, LoRAConfig
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.data.buckets import assign_buckets, bucket_sizes
from spectral_core.training.data.disk_cache import TensorCache, digest_of_module, key_of
from spectral_core.training.data.folder import Example, Order, find_examples, load_mask
from spectral_core.training.engine import checkpointing as memory
from spectral_core.training.engine.loop import evaluation_loss, train
from spectral_core.training.objectives.diffusion import Diffusion, FlowMatching, Shares
from spectral_core.training.objectives.losses import batch_loss, draw
from tests.core.training.training_toy import CONFIGS, Toy


def test_flow_matching_is_a_straight_path() -> None:
    flow = FlowMatching(shift=3.0)
    latents, noise = torch.randn(3, 2, 2, 2).double(), torch.randn(3, 2, 2, 2).double()
    t = torch.tensor([0.0, 400.0, 1000.0], dtype=torch.float64)
    noisy, target = flow.add_noise(latents, noise, t), flow.target(latents, noise, t)
    sigma = t.reshape(-1, 1, 1, 1) / 1000
    assert torch.allclose(noisy - sigma * target, latents)
    assert torch.allclose(noisy + (1 - sigma) * target, noise)
    assert flow.progress(t).tolist() == pytest.approx([1.0, 0.6, 0.0])
    levels = FlowMatching().levels(3)
    assert levels.tolist() == pytest.approx([250, 500, 750])
    assert flow.levels(1).item() == pytest.approx(1000 * 1.5 / 2)  # σ = ½, shifted by 3
    with pytest.raises(SpectralAdapterError, match="shift 0"):
        FlowMatching(shift=0)


@pytest.mark.parametrize(
    "process", [Diffusion(torch.linspace(0.99, 0.01, 1000)), FlowMatching()], ids=["t", "σ"]
)
def test_distributions_of_noise_levels(process: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = process.sample_timesteps(20000, generator).double() / 1000
    assert uniform.min() >= 0 and uniform.max() <= 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert uniform.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.01)
    normal = process.sample_timesteps(20000, generator, Shares("logit-normal", -0.5, 0.7)).double() / 1000
    logits = torch.logit(normal.clamp(1e-3, 1 - 1e-3))
    assert logits.mean().item() == pytest.approx(-0.5, abs=0.02)
    assert logits.std().item() == pytest.approx(0.7, abs=0.02)


def test_min_snr_weights() -> None:
    alphas = torch.tensor([0.999, 0.9, 0.5, 0.0])
    snr = [999.0, 9.0, 1.0, 0.0]
    found = Diffusion(alphas).min_snr_weights(torch.arange(4), 5.0).tolist()
    assert found == pytest.approx([5 / 999, 5 / 9, 1.0, 1.0], rel=1e-4)
    found = Diffusion(alphas, "v_prediction").min_snr_weights(torch.arange(4), 5.0).tolist()
    assert found == pytest.approx([min(s, 5) / (s + 1) for s in snr], rel=1e-4, abs=1e-6)


def test_masks_and_weights_in_the_loss() -> None:
    mask = torch.zeros(1, 4, 4)
    mask[0, :2] = 0.5
    toy = Toy(LoRAConfig(2), masks=[None, None, mask, *[torch.ones(1, 4, 4)] * 3])
    config = TrainConfig(weighting="min-snr")
    batch = draw(toy.setup, TrainConfig(), torch.Generator().manual_seed(0))[0]
    loss, _ = batch_loss(toy.setup, batch, config)
    noisy = toy.setup.diffusion.add_noise(
        toy.setup.latents[list(batch.indices)], batch.noise, batch.timesteps
    )  # type: ignore[call-overload]
    latents = toy.setup.latents[list(batch.indices)]  # type: ignore[call-overload]
    target = toy.setup.diffusion.target(latents, batch.noise, batch.timesteps)
    square = (toy.model(noisy) - target).square()
    weights = toy.setup.diffusion.min_snr_weights(batch.timesteps, 5.0)
    rows = [
        weights[k] * (square[k, :, :2].mean() if i == 2 else square[k].mean())
        for k, i in enumerate(batch.indices)
    ]
    assert 2 in batch.indices, "the masked example must be among them"
    assert torch.allclose(loss, torch.stack(rows).mean(), rtol=1e-5)


def test_noise_depends_on_the_sample_and_not_on_the_batches() -> None:
    """One batch of six, three batches of two, three processes with two rows each: the same samples."""

    def samples(batch: int, accumulation: int, processes: int) -> list[Any]:
        config = TrainConfig(accumulation=accumulation)
        found = draw(
            Toy(LoRAConfig(2), batch=batch).setup, config, torch.Generator().manual_seed(4), processes
        )
        return [
            (b.indices[k], b.captions[k], int(b.timesteps[k]), b.noise[k].tolist())
            for b in found
            for k in range(len(b.indices))
        ]

    assert samples(6, 1, 1) == samples(2, 3, 1) == samples(2, 1, 3)
    assert len({repr(s[3]) for s in samples(6, 1, 1)}) == 6


def test_accumulation_is_a_larger_batch() -> None:
    small, large = Toy(LoRAConfig(4), batch=1), Toy(LoRAConfig(4), batch=3)
    config = TrainConfig(steps=20, learning_rate=1e-2)
    losses = train(large.setup, config, "lora").losses
    again = train(small.setup, TrainConfig(steps=20, learning_rate=1e-2, accumulation=3), "lora").losses
    assert again == pytest.approx(losses, rel=1e-4)


def test_prior_examples_join_every_batch_with_their_weight() -> None:
    toy = Toy(LoRAConfig(2))
    prior = [Example(Path(str(i)), "", repeats=0 if i < 4 else 1) for i in range(6)]
    setup = Toy(LoRAConfig(2), prior=Order(prior, 2, 0)).setup
    found = draw(setup, TrainConfig(prior_weight=0.3), torch.Generator().manual_seed(0))
    assert [b.weight for b in found] == [1.0, 0.3] and sorted(found[1].indices) == [4, 5]
    losses = [batch_loss(setup, b)[0] for b in found]
    whole = train(setup, TrainConfig(steps=1, prior_weight=0.3), "lora").losses[0]
    assert whole != pytest.approx(train(toy.setup, TrainConfig(steps=1), "lora").losses[0]), losses


def test_buckets_keep_area_and_proportions() -> None:
    sizes = bucket_sizes((512, 512), 64)
    assert (512, 512) in sizes and (704, 320) in sizes and (832, 256) not in sizes
    for width, height in sizes:
        assert width % 64 == 0 and height % 64 == 0 and width * height <= 512 * 512
        assert max(width, height) <= 2.5 * min(width, height) and (height, width) in sizes
    shown = [(1000, 1000), (3000, 2000), (500, 900), (4000, 500)]
    found = assign_buckets(shown, (512, 512), 64)
    assert found[0] == (512, 512) and found[1] == (640, 384) and found[2][0] < found[2][1]
    assert found[3][0] / found[3][1] == max(w / h for w, h in sizes)
    with pytest.raises(SpectralAdapterError, match="at least one step"):
        bucket_sizes((32, 64), 64)


def test_batches_hold_one_bucket_and_nothing_is_lost() -> None:
    examples = [Example(Path(str(i)), "", repeats=1 + i % 2) for i in range(7)]
    groups = ["wide", "tall", "wide", "tall", "wide", "wide", "square"]
    order = Order(examples, 3, 1, groups)
    batches = [order.next() for _ in range(60)]
    assert all(len(b) == 3 and len({groups[i] for i in b}) == 1 for b in batches)
    shown = Counter(i for b in batches for i in b)
    waiting = Counter(order.state().queue)
    total = shown + waiting
    epochs = {total[i] / examples[i].repeats for i in range(7)}
    assert len(epochs) == 1, "every example as often as its repeats, those that wait counted"
    again = Order(examples, 3, 1, groups)
    again.restore(order.state())
    assert [again.next() for _ in range(5)] == [order.next() for _ in range(5)]
    with pytest.raises(SpectralAdapterError, match="training data has changed"):
        Order(examples[:2], 1, 1).restore(order.state())


def test_latents_of_several_sizes_train_and_are_evaluated() -> None:
    toy = Toy(FouRAConfig(4))
    latents = [torch.randn(1, 4, 4) if i % 2 else torch.randn(1, 2, 8) for i in range(6)]
    sizes = [tuple(x.shape) for x in latents]
    setup = Toy(LoRAConfig(4), latents=latents, order=Order(toy.examples, 2, 0, sizes)).setup
    assert evaluation_loss(setup) > 0
    assert len(train(setup, TrainConfig(steps=4), "lora").losses) == 4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_float32_parameters(precision: str) -> None:
    toy, exact = Toy(LoRAConfig(4)), Toy(LoRAConfig(4))
    seen: list[Any] = []
    handle = toy.model.first.register_forward_hook(lambda m, x, y: seen.append(y.dtype))
    losses = train(toy.setup, TrainConfig(steps=6, precision=precision), "lora").losses
    handle.remove()
    assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert {p.dtype for p in toy.attachment.parameters()} == {torch.float32}
    assert losses == pytest.approx(train(exact.setup, TrainConfig(steps=6), "lora").losses, rel=2e-2)


class Block(torch.nn.Module):
    """One of several in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.inner(x)
        return out


@pytest.mark.parametrize("config", CONFIGS[2:4], ids=str)
def test_gradient_checkpointing_changes_nothing_but_memory(config: Any) -> None:
    """Under a block that runs twice, gates with their statistics included."""
    plain, saving = Toy(config), Toy(config)
    root = torch.nn.ModuleDict({"net": saving.model})
    saving.setup = replace(saving.setup, roots=[root])
    settings = {"steps": 12, "learning_rate": 1e-2, "target_open": 0.5}
    expected = train(plain.setup, TrainConfig(**settings), config.method)
    found = train(saving.setup, TrainConfig(**settings, checkpointing="full"), config.method)
    assert found.losses == expected.losses and saving.digest == plain.digest
    assert "forward" not in vars(root["net"])


def test_checkpointing_saves_memory_and_names_what_it_does_not_know() -> None:
    tree = torch.nn.Sequential(*[Block() for _ in range(4)])
    kept: list[int] = []

    def run() -> int:
        kept.clear()
        pack = lambda t: kept.append(t.nbytes) or t  # type: ignore[func-returns-value]  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            tree(torch.randn(32, 8, requires_grad=True)).sum().backward()
        return sum(kept)

    with memory.checkpointed([tree], "full") as count:
        small = run()
    with memory.checkpointed([tree], "selective") as some:
        assert some == 2, "every second one, where there is one kind of block"
    assert count == 4 and small < 0.5 * run() and not any("forward" in vars(m) for m in tree)
    with (
        pytest.raises(SpectralAdapterError, match="Linear has no repeated blocks"),
        memory.checkpointed([torch.nn.Linear(2, 2)], "selective"),
    ):
        pass


def test_masks_lie_beside_their_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.png")
    half = np.zeros((4, 8), np.uint8)
    half[:, 4:] = 255
    Image.fromarray(half).save(tmp_path / "a.mask.png")
    found = find_examples(tmp_path)
    assert [(e.path.name, e.captioned, e.mask) for e in found] == [("a.png", False, tmp_path / "a.mask.png")]
    mask = load_mask(tmp_path / "a.mask.png", 4, 4)  # cropped about the centre, as the picture
    assert mask.tolist() == [[[0, 0, 1, 1]] * 4]


def test_tensors_are_cached_on_disk(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"x": torch.arange(3.0)}

    key = key_of(picture=b"abc", size=[1, 2])
    assert key != key_of(picture=b"abd", size=[1, 2]) != key_of(picture=b"abd", size=[2, 1])
    for _ in range(2):
        assert TensorCache(tmp_path / "new").get_or_compute(key, compute)["x"].tolist() == [0, 1, 2]
    assert len(calls) == 1
    (tmp_path / "new" / f"{key}.safetensors").write_bytes(b"broken")
    assert TensorCache(tmp_path / "new").get_or_compute(key, compute)["x"].tolist() == [0, 1, 2]
    assert len(calls) == 2 and TensorCache(tmp_path / "new").get_or_compute(key, compute) and len(calls) == 2
    (tmp_path / "file").write_text("")
    assert TensorCache(tmp_path / "file").get_or_compute(key, compute)["x"].tolist() == [0, 1, 2]
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert digest_of_module(one) == digest_of_module(one) != digest_of_module(other)
