"""Every choice of every block, distilled once."""
