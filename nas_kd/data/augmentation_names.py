"""timm's names of what an augmentation may do. Standard library only, so that a wrong one is told at once."""

INTERPOLATIONS = ("random", "bilinear", "bicubic", "lanczos", "nearest", "box", "hamming")  # those of Pillow
ERASE_MODES = ("const", "rand", "pixel")
