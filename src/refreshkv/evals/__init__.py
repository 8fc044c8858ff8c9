"""Evaluation: a task is data and a metric, a method is what decodes it, the runner keeps one line per example.

`task` says what a task is, `tasks` holds them, one file each; `decoding` runs a batch under a method, `runner` a whole
grid; `summary` and `report` turn its lines into tables and plots.
"""
