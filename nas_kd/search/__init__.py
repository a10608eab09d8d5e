"""Spaces, solver, sampler, trials and storage; Optuna lives here."""
