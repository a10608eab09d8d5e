"""Widths that are learnt while the network is distilled: `python -m nas_kd.structure`."""
