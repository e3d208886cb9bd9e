"""Random calls of the CUDA kernels for test_emulated_kernels.py, a module for each room.

A room's module holds ``RANDOM_CALLS``, by the name of what is called: between them they meet every barrier and wait of the room's kernels.
"""
