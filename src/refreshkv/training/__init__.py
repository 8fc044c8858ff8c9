"""Continued pre-training: a model meets the partial cache while it learns (RefreshKV, section 6)."""
