"""The operations as Triton kernels, one module each; installed as sparseft.kernels and imported only when used."""
