"""Learning on One Mode: an offline-RL policy from a dataset in which several behaviours are mixed.

Source of the method: Wang, Jin, Montana, "Learning on One Mode: Addressing Multi-modality in Offline
Reinforcement Learning", ICLR 2025, arXiv 2412.03258. Implemented from its equations.

Letters used in every shape: B rows, O observation dimension, A action dimension, M mixture components, C critics.
Importing this package is light: torch is loaded by the modules that need it.
"""
