"""What an adapter learned (floor 5): spectra, shared subspaces, the base beside it, lower ranks."""

from __future__ import annotations

from sidepath.analyse.against import Against, against
from sidepath.analyse.factors import factors_of
from sidepath.analyse.spectrum import Decomposition, Factors, Spectrum, decompose, spectrum
from sidepath.analyse.subspace import similarity
from sidepath.analyse.truncate import Keep, Truncated, truncate

__all__ = [
    "Against",
    "Decomposition",
    "Factors",
    "Keep",
    "Spectrum",
    "Truncated",
    "against",
    "decompose",
    "factors_of",
    "similarity",
    "spectrum",
    "truncate",
]
