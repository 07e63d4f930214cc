"""Kernels of our own for operations that plain PyTorch spreads over many passes through memory."""
