"""Linear layers in 8 or 4 bits: rounded once, and restored to floating point in each forward.

    int8   torchao        symmetric, a scale for each output row
    int4   torchao        a scale and a zero point for each group of 64 inputs (of 32 or 16 where 64 do not divide them)
    nf4    bitsandbytes   the 16 levels of NormalFloat, a scale for each block of 64 (Dettmers et al., arXiv:2305.14314)

The packages round and restore the numbers. refkl holds them in plain buffers, which can be moved, copied, fingerprinted
and saved like any other buffer, and which work on every device. The packages' own layers do not: torchao's int4 tensors
are each for one kind of device or take a byte per number, and bitsandbytes' Linear4bit repacks itself in place on some
processors. For a batch of tokens, those layers also multiply by the restored matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from refkl.backend.linear_layers import matrix_shape

if TYPE_CHECKING:
    pass

GROUP, SMALLEST_GROUP = 64, 16
"""Number of weights that share a scale in 4 bits, and its minimum."""


@dataclass(frozen=True)
class Format:
    """A format that holds a matrix in few bits."""

    package: str
    """Name in pip of the package that rounds."""
    pack: Callable[[Tensor], dict[str, Tensor]]
    """[out, in] fp32 -> the tensors that are held."""
    unpack: Callable[[dict[str, Tensor], torch.Size, torch.dtype], Tensor]
    """The tensors that are held, a shape and a dtype -> [out, in] in that dtype."""
    size: Callable[[int, int], int]
    """Bytes held for a matrix [out, in]."""
    transient: int
    """Bytes per number that `unpack` takes while it runs."""


def _pack_int8(weight: Tensor) -> dict[str, Tensor]:
    return _rounded(weight, weight.shape[1], "SYMMETRIC", torch.int8, -128, 127)


def _unpack_int8(parts: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    from torchao.quantization.quant_primitives import dequantize_affine

    block = (1, shape[1])
    restored: Tensor = dequantize_affine(
        parts["qdata"], block, parts["scale"], None, torch.int8, -128, 127, output_dtype=dtype
    )
    return restored


def _pack_int4(weight: Tensor) -> dict[str, Tensor]:
    parts = _rounded(weight, group_size(weight.shape[1]), "ASYMMETRIC", torch.uint8, 0, 15)
    qdata = parts["qdata"]
    return {**parts, "qdata": qdata[:, ::2] | qdata[:, 1::2] << 4}


def _unpack_int4(parts: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    from torchao.quantization.quant_primitives import dequantize_affine

    pairs, block = parts["qdata"], (1, group_size(shape[1]))
    qdata = torch.stack([pairs & 15, pairs >> 4], -1).view(shape)
    restored: Tensor = dequantize_affine(
        qdata, block, parts["scale"], parts["zero_point"], torch.uint8, 0, 15, output_dtype=dtype
    )
    return restored


def _rounded(weight: Tensor, group: int, mapping: str, dtype: torch.dtype, low: int, high: int) -> dict[str, Tensor]:
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

    block, eps = (1, group), torch.finfo(torch.float32).eps
    scale, zero_point = choose_qparams_affine(
        weight, MappingType[mapping], block, dtype, low, high, eps, torch.float32, dtype, keepdim=True
    )
    qdata = quantize_affine(weight, block, scale, zero_point, dtype, low, high)
    parts = {"qdata": qdata, "scale": scale, "zero_point": zero_point}
    return {name: part for name, part in parts.items() if mapping == "ASYMMETRIC" or name != "zero_point"}


def _pack_nf4(weight: Tensor) -> dict[str, Tensor]:
    from bitsandbytes.functional import quantize_4bit

    qdata, state = quantize_4bit(weight, blocksize=GROUP, quant_type="nf4")
    return {"qdata": qdata, "absmax": state.absmax}


def _unpack_nf4(parts: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    known = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
    # As one row: if a block spans two rows, its CPU kernel (0.50.2) uses the scale of another block.
    flat = torch.Size([shape.numel()])
    state = QuantState(parts["absmax"], shape=flat, blocksize=GROUP, quant_type="nf4", dtype=known)
    restored: Tensor = dequantize_4bit(parts["qdata"], state)
    return restored.view(shape).to(dtype)


def group_size(width: int) -> int:
    return gcd(width, GROUP)


FORMATS: dict[str, Format] = {
    "int8": Format("torchao", _pack_int8, _unpack_int8, lambda out, width: out * width + 4 * out, 8),
    "int4": Format(
        "torchao",
        _pack_int4,
        _unpack_int4,
        lambda out, width: out * width // 2 + 5 * out * (width // group_size(width)),
        9,
    ),
    "nf4": Format(
        "bitsandbytes",
        _pack_nf4,
        _unpack_nf4,
        lambda out, width: -(-out * width // 2) + 4 * -(-out * width // GROUP),
        4,
    ),
}
"""The format for each value of reference.quantize."""


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is held in few bits.

    Its buffers never change dtype: a cast would round the scales a second time.
    """

    def __init__(self, layer: nn.Module, name: str, bias: nn.Parameter | None) -> None:
        super().__init__()
        weight = layer.weight.detach()  # type: ignore[operator]
        self.format = name
        """Name of the format in FORMATS."""
        self.shape = matrix_shape(layer)
        """[out, in]"""
        self.dtype = weight.dtype
        """Dtype of `weight`."""
        self._transposed = isinstance(layer, Conv1D)
        for part, tensor in self._packed(weight).items():
            self.register_buffer(part, tensor)
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """[out, in] the restored weight that the forward uses; some models also read it outside of the forward."""
        return self._restored(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., in] -> [..., out]."""
        return nn.functional.linear(x, self._restored(x.dtype), self.bias)

    @property
    def numbers(self) -> Tensor:
        """The restored weight, in the shape that it had before quantising. A moving average continues from it."""
        return self.weight.t() if self._transposed else self.weight

    @property
    def numbers_shape(self) -> torch.Size:
        """The shape of `numbers`."""
        return self.shape[::-1] if self._transposed else self.shape

    def repack(self, numbers: Tensor) -> None:
        """Quantise and hold these numbers, given in the shape that the weight had before quantising."""
        for part, tensor in self._packed(numbers).items():
            self.get_buffer(part).copy_(tensor)

    def _packed(self, numbers: Tensor) -> dict[str, Tensor]:
        matrix = numbers.t() if self._transposed else numbers
        return FORMATS[self.format].pack(matrix.float().contiguous())

    def _restored(self, dtype: torch.dtype) -> Tensor:
        return FORMATS[self.format].unpack(dict(self.named_buffers(recurse=False)), self.shape, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        parts, self._buffers = self._buffers, {}
        super()._apply(fn, recurse)
        # Bytes are moved but never cast.
        self._buffers = {k: fn(t.view(torch.uint8)).view(t.dtype) for k, t in parts.items() if t is not None}
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        """Return the sizes and the format, in the style of nn.Linear."""
        return f"in_features={self.shape[1]}, out_features={self.shape[0]}, {self.format}"
