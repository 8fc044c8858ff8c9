"""The CPU kernels in C++, compiled where they run (`build.py`): attention in bfloat16, selection for any dtype.

Signatures as in `reference.py`. What they do not take goes the way of plain torch (`kernels/cpu.py`).
"""
