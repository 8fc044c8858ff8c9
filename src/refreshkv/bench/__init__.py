"""Timings.

Each benchmark checks its results first, states hardware and versions, and times every variant in one run.
"""
