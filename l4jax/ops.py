"""The kernels, as the model calls them: the only importer of `pallas_kernels`, and the place that adds the mesh."""

from pallas_kernels import attention, decode_attention, grouped_matmul, grouped_swiglu, merge_partial_attention

__all__ = ["attention", "decode_attention", "grouped_matmul", "grouped_swiglu", "merge_partial_attention"]
