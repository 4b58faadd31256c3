"""Kernels for attention under a mask of tiles, beside those in plain torch (`vdcache.ir.tiles`)."""
