"""Self-Principled Critique Tuning (arXiv 2504.02495) as one job graph on Ray."""

__version__ = "0.1.0"
