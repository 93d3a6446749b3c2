"""Kernels timed side by side on the machine at hand."""
