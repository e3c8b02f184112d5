"""Llama 4's hot loops as array functions: routed expert matmuls and attention, one best implementation per platform.

Arrays in, arrays out; nothing here knows a mesh, a config or a checkpoint. Every op is a folder: the public function
in `__init__.py`, its specification in `reference.py`, and one file per fast implementation. `dispatch.py` chooses.
"""

from pallas_kernels.attention import attention, attention_gradients, merge_partial_attention
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from pallas_kernels.quantized import QuantizedArray, quantize

__all__ = [
    "QuantizedArray",
    "attention",
    "attention_gradients",
    "decode_attention",
    "grouped_matmul",
    "grouped_swiglu",
    "merge_partial_attention",
    "quantize",
]
