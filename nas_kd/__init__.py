"""Any timm CNN in, a family of smaller timm CNNs out, each within a hard budget."""

__version__ = "0.1.0"
