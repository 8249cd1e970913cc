"""The autoencoder's encoder, written down instead of trained, and a decoder that starts as its inverse.

A latent pixel is the mean colour of its 4 x 4 picture pixels and the brightness of their upper half minus the
lower half, whitened by a 4 x 4 matrix over the training scenes. Both halves of the autoencoder end in a group
norm of 32 groups over 64 channels and a SiLU, which would swallow flat colours (two flat channels per group:
only the sign of their difference is left). Two identities undo that:

* a group (s, r) of a signal s and a reference r of much larger, fixed spread is scaled by the latter; r is
  made from a constant channel and the zero padding, is 0 inside, +P and -P along the borders, mean 0. The
  outputs a = (s - m) / spread and b = (r - m) / spread give s = (a - b + r / spread) * spread;
* silu(x) - silu(-x) = x, so every channel comes with its negative.

Shapes: latents (N, 4, 16, 16); channels of both halves: signals at even places, references at odd ones.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

SIGNALS = 4  # red, green, blue, upper minus lower brightness; +s at channels 0, 4, 8, 12, -s at 2, 6, 10, 14
EMPTY = (16, 18)  # groups of a zero signal, with +r and -r
CONSTANT = 63
BORDER = 3.0


def plus(i: int) -> int:
    return 4 * i


def minus(i: int) -> int:
    return 4 * i + 2


NEGATIVE = (*(minus(i) + 1 for i in range(SIGNALS)), EMPTY[1] + 1)  # references that are -r


def zero_blocks(half: nn.Module) -> None:
    """Residual blocks and attention start as the identity."""
    for name, module in half.named_modules():
        if name.endswith(("conv2", "to_out.0")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def write_output(conv: nn.Conv2d, row: int, signal: int, gain: float) -> None:
    """``conv[row]`` reads signal number ``signal`` back from the normalised, SiLU'd channels (see above)."""
    assert conv.bias is not None
    conv.weight[row] = 0
    conv.bias[row] = 0
    for group, sign in ((plus(signal), 1), (minus(signal), -1)):
        conv.weight[row, group, 1, 1] = sign * gain
        conv.weight[row, group + 1, 1, 1] = -sign * gain
    for group, sign in ((EMPTY[0], 1), (EMPTY[1], -1)):
        conv.weight[row, group, 1, 1] = 0
        conv.weight[row, group + 1, 1, 1] = sign * gain


@torch.no_grad()
def write_encoder(model: AutoencoderKL, gain: float = 0.05) -> None:
    """Patch means and the vertical difference, by ``conv_in``, two strided convolutions and ``conv_out``."""
    encoder = model.encoder
    first, second = (block.downsamplers[0].conv for block in encoder.down_blocks[:2])
    for conv in (encoder.conv_in, first, second, encoder.conv_out):
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    zero_blocks(encoder)
    for i in range(SIGNALS):
        for channel, sign in ((plus(i), 1.0), (minus(i), -1.0)):
            colours = slice(i, i + 1) if i < 3 else slice(0, 3)
            encoder.conv_in.weight[channel, colours, 1, 1] = sign * gain / (1 if i < 3 else 3)
            first.weight[channel, channel, :2, :2] = 0.25
            second.weight[channel, channel, :2, :2] = 0.25
            if i == 3:
                second.weight[channel, channel, 1, :2] = -0.25
    encoder.conv_in.bias[CONSTANT] = 1.0
    first.weight[CONSTANT, CONSTANT, 0, 0] = 1.0
    kernel = torch.tensor([[0.0, 0.0, -0.5], [0.0, 0.0, -0.5], [0.5, 0.5, 0.0]]) * BORDER
    for channel in range(1, EMPTY[1] + 2, 2):
        second.weight[channel, CONSTANT] = -kernel if channel in NEGATIVE else kernel
    spread = (0.5 * 30 / 256 * BORDER**2) ** 0.5
    for i in range(SIGNALS):
        write_output(encoder.conv_out, i, i, spread / gain)
    model.quant_conv.weight.copy_(torch.eye(8)[:, :, None, None])
    nn.init.zeros_(model.quant_conv.bias)
    encoder.conv_out.bias[4:] = -8.0  # log variance


@torch.no_grad()
def start_decoder(model: AutoencoderKL, gain: float = 0.5) -> None:
    """Nearest-neighbour enlargement of the latents' colours; all spare channels keep their random start."""
    decoder = model.decoder
    zero_blocks(decoder)
    used = [*range(2 * SIGNALS * 2), EMPTY[0], EMPTY[0] + 1, EMPTY[1], EMPTY[1] + 1, CONSTANT]
    decoder.conv_in.weight[used] = 0
    decoder.conv_in.weight[1::2] = 0
    decoder.conv_in.bias.zero_()
    for i in range(SIGNALS):
        decoder.conv_in.weight[plus(i), i, 1, 1] = gain
        decoder.conv_in.weight[minus(i), i, 1, 1] = -gain
    decoder.conv_in.bias[CONSTANT] = 1.0
    for block in decoder.up_blocks[:2]:
        conv = block.upsamplers[0].conv
        conv.weight[used] = 0
        conv.weight[1::2] = 0
        conv.weight.mul_(0.3)
        conv.bias.zero_()
        conv.weight[:, :, 1, 1] += torch.eye(64)
    kernel = torch.tensor([[0.0, 0.5, 0.0], [-0.5, 0.0, -0.5], [0.0, 0.5, 0.0]]) * BORDER * 2
    for channel in range(1, CONSTANT, 2):
        signed = -kernel if channel in NEGATIVE else kernel
        decoder.up_blocks[0].upsamplers[0].conv.weight[channel, CONSTANT] = signed
    spread = (0.5 * 120 / 1024 * BORDER**2 + 0.5 * gain**2 * 0.3) ** 0.5
    decoder.conv_out.weight.mul_(0.1)
    for i in range(3):
        write_output(decoder.conv_out, i, i, spread / gain)


@torch.no_grad()
def whitening(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Raw latents (N, 4, 16, 16) -> W and o, so that z = W (raw - o) has unit variance.

    The colours along their principal axes; the difference channel on its own, to 0.7.
    """
    flat = raw.permute(1, 0, 2, 3).reshape(4, -1).double()
    offset = flat.mean(1)
    values, axes = torch.linalg.eigh(torch.cov(flat[:3]))
    matrix = torch.zeros(4, 4, dtype=torch.float64)
    matrix[:3, :3] = (axes / values.sqrt()).T
    matrix[3, 3] = 0.7 / flat[3].std()
    return matrix.float(), offset.float()


@torch.no_grad()
def fold(model: AutoencoderKL, matrix: Tensor, offset: Tensor, scaling: float) -> None:
    """Put z = W (raw - o) / scaling into ``quant_conv`` and its inverse into ``post_quant_conv``."""
    quant, post = model.quant_conv, model.post_quant_conv
    quant.weight[:4, :4] = (matrix / scaling)[:, :, None, None].to(quant.weight)
    quant.bias[:4] = (-(matrix @ offset) / scaling).to(quant.bias)
    post.weight.copy_((torch.linalg.inv(matrix) * scaling)[:, :, None, None])
    post.bias.copy_(offset)
