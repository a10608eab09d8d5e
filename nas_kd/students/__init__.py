"""From genotype to network: building, inheritance, frames."""
