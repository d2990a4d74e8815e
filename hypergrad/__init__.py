"""hypergrad."""
