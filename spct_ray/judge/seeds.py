"""Seeds for everything random: a pure function of names, so that runs are reproducible with any number of workers."""

import hashlib


def derive_seed(*parts: str | int) -> int:
    """A 63-bit seed from e.g. (run seed, item id, sample number); stable across processes and machines."""
    digest = hashlib.blake2b("\x1f".join(f"{type(p).__name__}:{p}" for p in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
