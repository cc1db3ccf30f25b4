"""Tuned settings, one YAML file per algorithm, in the RL Zoo's format (plain mappings, nothing to evaluate)."""
