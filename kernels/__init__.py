"""Triton kernels, each beside its plain-PyTorch reference. Import from the file that has the op."""
