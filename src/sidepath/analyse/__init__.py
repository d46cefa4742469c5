"""What an adapter learned (floor 5): singular values, effective rank, shared subspaces."""

from __future__ import annotations

from sidepath.analyse.factors import factors_of
from sidepath.analyse.spectrum import Factors, Spectrum, similarity, spectrum

__all__ = ["Factors", "Spectrum", "factors_of", "similarity", "spectrum"]
