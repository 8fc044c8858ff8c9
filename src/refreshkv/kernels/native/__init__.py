"""The CPU kernels in C++, compiled where they run (`build.py`): attention, selection and rings.

Signatures as in `reference`, which serves what they do not take.
"""
