"""GPT-2's `Conv1D` (a Linear whose weight is stored [in, out]) with a sparse weight gradient."""

from transformers.pytorch_utils import Conv1D

from sparseft.layers import _Sparse


class SparseConv1D(_Sparse, Conv1D):
    """`Conv1D` of which only `values` train."""

    plain = Conv1D
    transposed = True
