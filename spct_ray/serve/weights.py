"""The check that new weights fit a running judge; app.py rolls them out to the replicas."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from spct_ray.errors import ConfigError

_MAYBE_TIED = "lm_head.weight"  # may be absent where it is tied to the embedding


def check_fit(directory: str, served: str) -> None:
    """Raises ConfigError unless `directory` has tensors of the names and shapes of the model directory `served`.

    Checked before any replica is told, because a replica that cannot load its weights is lost.
    """
    new, old = _shapes(directory), _shapes(served)
    if wrong := sorted(name for name in (new.keys() | old.keys()) - {_MAYBE_TIED} if new.get(name) != old.get(name)):
        name = wrong[0]
        raise ConfigError(
            f"{directory} has other tensors than the served judge {served}: {len(wrong)} differ, the first is {name}, "
            f"of shape {new.get(name, 'none')} instead of {old.get(name, 'none')}; serve another model anew"
        )


def _shapes(directory: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        try:
            with safe_open(file, "np") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file} cannot be read: {error}") from error
    if not shapes:
        raise ConfigError(f"{directory} has no *.safetensors with tensors in it")
    return shapes
