"""The state of a MuJoCo simulation, from which the next step is the same bit by bit."""

from functools import cache
from typing import Any

import numpy as np

#: Fields of the model that DM Control's tasks set at the start of an episode: targets, terrain, friction, visibility
MODEL_FIELDS = (
    *("body_pos", "body_quat", "geom_pos", "geom_quat", "geom_size", "geom_rgba", "site_pos", "site_quat", "site_size"),
    *("site_rgba", "dof_damping", "wrap_prm", "hfield_data", "mat_rgba"),
)
#: Fields of the data in memory that MuJoCo allocates at each step, for as many contacts and constraints as there are
TRANSIENT = ("efc_", "iefc_", "efm_", "island_", "map_", "contact", "iacc", "ifrc_")


def get_mujoco_state(model: Any, data: Any) -> dict[str, np.ndarray]:
    """
    :param model: ``mujoco.MjModel``
    :param data: ``mujoco.MjData`` between two steps
    :return: ``integration``, which decides what comes next (with the solver's warm start); ``derived``, the quantities that
        were computed in the last step, from which some environments take what was before the next one; and ``model``
    """
    import mujoco

    spec = mujoco.mjtState.mjSTATE_INTEGRATION
    integration = np.empty(mujoco.mj_stateSize(model, spec))
    mujoco.mj_getState(model, data, integration, spec)
    return {
        "integration": integration,
        "derived": np.concatenate([field.ravel() for field in _derived(data)]),
        "model": np.concatenate([field.ravel() for field in _model_fields(model)]),
    }


def set_mujoco_state(model: Any, data: Any, state: dict[str, np.ndarray]) -> None:
    """
    :param model: The same model
    :param data: Its data
    :param state: From :func:`get_mujoco_state`
    :raises ValueError: The state is that of another model, or of another version of MuJoCo.
    """
    import mujoco

    spec = mujoco.mjtState.mjSTATE_INTEGRATION
    fields = {"derived": _derived(data), "model": _model_fields(model)}
    sizes = {name: sum(field.size for field in arrays) for name, arrays in fields.items()}
    sizes["integration"] = mujoco.mj_stateSize(model, spec)
    if any(state[name].shape != (size,) for name, size in sizes.items()):
        raise ValueError(
            "The state is that of another MuJoCo model, or of another version of MuJoCo: make the same environment, with the "
            "package versions of the training that is to go on."
        )
    _fill(fields["model"], state["model"])
    mujoco.mj_setState(model, data, state["integration"], spec)
    # Contacts and constraints, with which the first half of dm_control's steps begins
    mujoco.mj_step1(model, data)
    _fill(fields["derived"], state["derived"])


def _fill(arrays: list[np.ndarray], values: np.ndarray) -> None:
    start = 0
    for array in arrays:
        array[...] = values[start : start + array.size].reshape(array.shape)
        start += array.size


def _derived(data: Any) -> list[np.ndarray]:
    return [getattr(data, name) for name in _float_fields()]


@cache
def _float_fields() -> list[str]:
    import mujoco

    # Of the smallest model: which fields there are does not depend on it
    data = mujoco.MjData(mujoco.MjModel.from_xml_string("<mujoco/>"))
    fields = {name: getattr(data, name) for name in dir(data) if not name.startswith(("_", *TRANSIENT))}
    return [name for name, field in fields.items() if isinstance(field, np.ndarray) and field.dtype == np.float64]


def _model_fields(model: Any) -> list[np.ndarray]:
    return [getattr(model, name) for name in MODEL_FIELDS]
