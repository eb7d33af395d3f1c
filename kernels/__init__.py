"""The four operations in Triton: one file each, the functions named and called as in `sparseft.reference`.

Installed as `sparseft.kernels`; imported only when a kernel is asked for: importing sparseft needs neither triton nor
a driver.
"""
