"""The parts of `kernels_gpu.py`: what is checked, what is timed, and other cuts of the same work."""
