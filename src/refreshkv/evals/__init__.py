"""Evaluation: tasks under methods, one line of results an example.

`grid` says what is asked for, `decoding` runs a batch under a method, `runner` a whole grid into a directory (`store`);
`summary` and `report` turn its lines into tables and plots.
"""
