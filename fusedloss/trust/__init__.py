"""Kernels prove themselves on the device where they run, before `auto` uses them."""
