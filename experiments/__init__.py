"""What docs/ reports, made again: grids, tables, and the training of models. Not part of the package (ours)."""
