"""What a genotype costs: params, MACs, size, peak memory, latency; and the check that it is so."""
