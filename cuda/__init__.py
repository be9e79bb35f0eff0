"""Numba CUDA twins of the CPU kernels, imported as `qmoe_lite.cuda`; they come with version 0.2."""

if __name__ == "cuda":  # the repository root is on sys.path: join NVIDIA's namespace package `cuda`
    __path__ = __import__("pkgutil").extend_path(__path__, __name__)
