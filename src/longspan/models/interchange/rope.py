"""Rotary settings in a config.json: `rope_theta` beside `rope_scaling`, or, from transformers 5, `rope_parameters`."""

from __future__ import annotations

from typing import Any

from longspan.models.interchange.config_keys import ConfigKeys
from longspan.ops.rotary import RopeScaling

DEFAULT_BASE = 10_000.0
_NAMES = {
    "low_freq_factor": "low_frequency",
    "high_freq_factor": "high_frequency",
    "original_max_position_embeddings": "original_context",
}


def describe_rope(base: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The keys that transformers 4 and 5 both understand."""
    if scaling is None:
        return {"rope_theta": base}
    values = {theirs: getattr(scaling, ours) for theirs, ours in _NAMES.items()}
    given = {name: value for name, value in values.items() if value is not None}
    return {"rope_theta": base, "rope_scaling": {"rope_type": scaling.kind, "factor": scaling.factor, **given}}


def understand_rope(keys: ConfigKeys) -> tuple[float, RopeScaling | None]:
    """Base and scaling.

    Raises:
        UserError: a kind of scaling that is not known here, or two bases.
    """
    name = "rope_parameters" if keys.take("rope_parameters") is not None else "rope_scaling"
    found = keys.take(name) or {}
    if not isinstance(found, dict):
        raise keys.refuse(name, "an object with `rope_type`")
    values = dict(found)
    base = keys.number("rope_theta", values.get("rope_theta") or DEFAULT_BASE)
    if values.pop("rope_theta", base) != base:
        raise keys.refuse(name, f"rope_theta = {base:g}, as beside it")
    kind = values.pop("rope_type", None) or values.pop("type", None) or "default"
    values.pop("type", None)
    if values.pop("partial_rotary_factor", 1.0) != 1.0 or keys.take("partial_rotary_factor", 1.0) != 1.0:
        raise keys.refuse("partial_rotary_factor", "1.0: rotation of the whole head")
    if kind == "default" and not values:
        return base, None
    settings = {_NAMES.get(key, key): value for key, value in values.items()}
    if kind not in ("linear", "llama3") or settings.keys() - RopeScaling.model_fields.keys():
        raise keys.refuse(name, "rope_type default, linear (`factor`) or llama3 (`factor` and its three bounds)")
    return base, RopeScaling.parse({"kind": kind, **settings}, f"{keys.where}: {name}")
