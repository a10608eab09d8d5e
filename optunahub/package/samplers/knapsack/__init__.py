from .sampler import KnapsackSampler

__all__ = ["KnapsackSampler"]
