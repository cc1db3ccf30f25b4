"""NumPy's random generators from their states, checked: a wrong position would let them read memory that is not theirs."""

from typing import Any

import numpy as np

BIT_GENERATORS = {
    cls.__name__: cls for cls in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
}

#: Numbers that a generator keeps, behind whose end it makes new ones
_SIZES = {"MT19937": ("state", "pos", 624), "Philox": (None, "buffer_pos", 4)}


def state_of(generator: np.random.BitGenerator) -> tuple[dict[str, Any], Any]:
    """
    :param generator: A bit generator
    :return: The arguments of :func:`bit_generator`
    :raises ValueError: It is not one of NumPy's.
    """
    if type(generator) not in BIT_GENERATORS.values():
        raise ValueError(f"The random generator {type(generator).__name__} is not one of NumPy's, and can't be written.")
    seeds = getattr(generator, "seed_seq", None)
    return dict(generator.state), seeds if type(seeds) is np.random.SeedSequence else None


def bit_generator(state: dict[str, Any], seeds: np.random.SeedSequence | None = None) -> np.random.BitGenerator:
    """
    :param state: ``state`` of one of NumPy's bit generators
    :param seeds: What it was seeded by, which only its ``spawn`` needs
    :return: A generator in that state
    :raises ValueError: The state is not one.
    """
    name = state["bit_generator"]
    generator = BIT_GENERATORS[name](seeds)
    if name in _SIZES:
        part, position, size = _SIZES[name]
        if not 0 <= (state[part] if part else state)[position] <= size:
            raise ValueError(f"The state of a random generator has a position outside of 0 and {size}.")
    generator.state = state  # type: ignore[assignment]
    return generator


def seed_sequence(state: dict[str, Any]) -> np.random.SeedSequence:
    """
    :param state: ``state`` of a ``SeedSequence``
    :return: Its equal
    """
    return np.random.SeedSequence(**state)


def random_state(state: dict[str, Any]) -> np.random.RandomState:
    """
    :param state: ``get_state(legacy=False)`` of a ``RandomState``
    :return: Its equal
    """
    core = {key: value for key, value in state.items() if key not in ("has_gauss", "gauss")}
    generator = np.random.RandomState(bit_generator(core))
    generator.set_state(state)
    return generator
