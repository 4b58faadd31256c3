"""Attention under static masks: masks, the operation, its lowerings, and which of them is the fastest here."""
