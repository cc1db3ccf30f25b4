"""What the file of a model holds, whether it is an archive of this package or a zip of SB3."""

import base64
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import torch as th

from sb3_r2vpo.common.allowed import UntrustedError
from sb3_r2vpo.common.archive import CorruptFileError, PathOrFile, decode_section, describe, opened, read_zip, sections_of
from sb3_r2vpo.common.serialization import LostError
from sb3_r2vpo.common.unpickling import safe_loads


@dataclass
class SavedModel:
    """
    :param saved_by: Name of the class that saved it
    :param variant: Name of the class of this package that it is or inherits from
    :param names: Of its attributes
    :param data: Those that were read, by name
    :param unread: Why others could not be read, by name
    :param parameters: State dicts by the name of what they belong to
    :param variables: Other tensors, by name
    :param rollouts: Those that only its critic learns from
    :param system_info: Of the computer that saved it
    """

    saved_by: str
    variant: str
    names: set[str]
    data: dict[str, Any]
    unread: dict[str, ValueError]
    parameters: dict[str, Any]
    variables: dict[str, Any]
    rollouts: list[Any] = field(default_factory=list)
    system_info: str = ""


def read_model(path: PathOrFile, replaced: Collection[str] = (), trust: bool = False, with_data: bool = True) -> SavedModel:
    """
    :param path: The file
    :param replaced: Attributes that are not read, as they are given
    :param trust: Whether to import and unpickle whatever the file asks for
    :param with_data: Whether attributes are needed
    :return: Its contents, on the CPU
    :raises CorruptFileError: The file is damaged, or another one.
    :raises UntrustedError: Its tensors come with a class or function that is not on the list. For attributes, that is in
        ``unread``.
    """
    where = describe(path)
    with opened(path, "zip") as file:
        entries = read_zip(file, where)
    if "format.json" not in entries:
        return _read_sb3(entries, where, replaced, trust, with_data)
    sections = sections_of(entries, where)
    if not {"about", "data", "parameters", "variables"} <= sections.keys():
        raise CorruptFileError(f"{where} holds {sorted(sections)}, not a model.")
    # Of a checkpoint, for `resume`
    sections.pop("training", None)
    tree, tensors = sections.pop("data")
    data: dict[str, Any] = {}
    unread: dict[str, ValueError] = {}
    for name in tree if with_data else ():
        if name in replaced:
            continue
        try:
            data[name] = decode_section(path, tree[name], tensors, trust)
        except (LostError, UntrustedError) as error:
            unread[name] = error
    others = {name: decode_section(path, *section, trust) for name, section in sections.items()}
    return SavedModel(names=set(tree), data=data, unread=unread, **others.pop("about"), **others)


def _read_sb3(entries: dict[str, bytes], where: str, replaced: Collection[str], trust: bool, with_data: bool) -> SavedModel:
    if "data" not in entries:
        raise CorruptFileError(f"{where} is a zip archive, but not one of a model: it has no `data`.")
    data: dict[str, Any] = {}
    unread: dict[str, ValueError] = {}
    try:
        tree = json.loads(entries["data"])
        for name, item in tree.items() if with_data else ():
            # A schedule that is made from `learning_rate` anew
            if name in replaced or name == "lr_schedule":
                continue
            if not (isinstance(item, dict) and ":serialized:" in item):
                data[name] = item
                continue
            try:
                data[name] = safe_loads(base64.b64decode(item[":serialized:"]), trust)
            except ValueError as error:
                unread[name] = type(error)(f"{where}: {error}")
        states = {
            name.removesuffix(".pth"): th.load(BytesIO(content), map_location="cpu", weights_only=not trust)
            for name, content in entries.items()
            if name.endswith(".pth")
        }
    except Exception as error:
        raise CorruptFileError(f"{where} can't be read: {error}") from error
    # "tensors" up to SB3 0.8
    variables = states.pop("pytorch_variables", states.pop("tensors", None)) or {}
    name = _algorithm_of(data)
    system_info = entries.get("system_info.txt", b"").decode(errors="replace")
    return SavedModel(name, name, set(tree), data, unread, states, variables, system_info=system_info)


def _algorithm_of(data: dict[str, Any]) -> str:
    """SB3 does not write down which class saved a file."""
    bases = " ".join(cls.__name__ for cls in getattr(data.get("policy_class"), "__mro__", ()))
    kinds = [kind for kind in ("Maskable", "Recurrent") if kind in bases]
    return "".join([*kinds, "R2VPO", "Off" if "replay_capacity" in data else ""])


def refuse_unread(algorithm: str, unread: dict[str, ValueError]) -> None:
    """
    :param algorithm: Name of the class that loads them
    :param unread: Attributes that could not be read, and why
    :raises ValueError: There are some.
    """
    for name, error in unread.items():
        raise type(error)(
            f"`{name}` can't be loaded. {error} Or pass it anew: `{algorithm}.load(path, {name}=...)` if it is an argument of "
            f"{algorithm}, else `custom_objects={{{name!r}: ...}}`."
        ) from error
