"""Metrics of a run and the places that show them."""
