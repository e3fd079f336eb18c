"""Units of log columns: each recorded unit as factor and offset into the unit the library keeps.

SI throughout, angles in rad. Kept as they are, because the models of their field use them: degC, kW, kWh and "1"
(a bare number). Spaces, "*" and "." inside a unit do not matter: "N m", "N*m" and "Nm" are the same.
"""

from __future__ import annotations

import math

_MECHANICAL = ("s", "rad", "rad/s", "rad/s^2", "m", "m/s", "m/s^2", "N", "Nm", "kg", "kgm^2", "Hz", "Pa")
_KEPT = (*_MECHANICAL, "A", "V", "W", "kW", "J", "kWh", "degC", "K", "1")
_SPELLING = {"Nm": "N m", "kgm^2": "kg m^2"}
_SCALED: dict[str, tuple[str, float, float]] = {
    "ms": ("s", 1e-3, 0.0),
    "us": ("s", 1e-6, 0.0),
    "ns": ("s", 1e-9, 0.0),
    "min": ("s", 60.0, 0.0),
    "h": ("s", 3600.0, 0.0),
    "deg": ("rad", math.pi / 180, 0.0),
    "mrad": ("rad", 1e-3, 0.0),
    "rev": ("rad", 2 * math.pi, 0.0),
    "deg/s": ("rad/s", math.pi / 180, 0.0),
    "rpm": ("rad/s", math.pi / 30, 0.0),
    "rev/s": ("rad/s", 2 * math.pi, 0.0),
    "deg/s^2": ("rad/s^2", math.pi / 180, 0.0),
    "mm": ("m", 1e-3, 0.0),
    "cm": ("m", 1e-2, 0.0),
    "km": ("m", 1e3, 0.0),
    "mm/s": ("m/s", 1e-3, 0.0),
    "km/h": ("m/s", 1 / 3.6, 0.0),
    "mN": ("N", 1e-3, 0.0),
    "kN": ("N", 1e3, 0.0),
    "mNm": ("Nm", 1e-3, 0.0),
    "kNm": ("Nm", 1e3, 0.0),
    "gram": ("kg", 1e-3, 0.0),
    "mA": ("A", 1e-3, 0.0),
    "mV": ("V", 1e-3, 0.0),
    "mW": ("W", 1e-3, 0.0),
    "MW": ("kW", 1e3, 0.0),
    "kJ": ("J", 1e3, 0.0),
    "degF": ("degC", 5 / 9, -160 / 9),
    "kPa": ("Pa", 1e3, 0.0),
    "bar": ("Pa", 1e5, 0.0),
    "kHz": ("Hz", 1e3, 0.0),
    "%": ("1", 1e-2, 0.0),
}
_TIME = ("s", "ms", "us", "ns", "min", "h")


def _plain(unit: str) -> str:
    return unit.strip().replace(" ", "").replace("*", "").replace("·", "").replace(".", "")


def conversion(unit: str) -> tuple[str, float, float]:
    """`(kept unit, factor, offset)`: kept = factor * recorded + offset. Raises `ValueError` listing the known units."""
    key = _plain(unit)
    if key in _KEPT:
        return _SPELLING.get(key, key), 1.0, 0.0
    if key in _SCALED:
        kept, factor, offset = _SCALED[key]
        return _SPELLING.get(kept, kept), factor, offset
    raise ValueError(f"unknown unit '{unit}'; kept as they are: {', '.join(_KEPT)}; converted: {', '.join(_SCALED)}")


def time_factor(unit: str) -> float:
    """Seconds per `unit`. Raises `ValueError` when it is not a unit of time."""
    if _plain(unit) not in _TIME:
        raise ValueError(f"'{unit}' is no unit of time; known: {', '.join(_TIME)}, or 'utc' for date and time")
    return conversion(unit)[1]


def time_derivative(unit: str) -> str:
    """The unit of the time derivative of a signal kept in `unit`: "rad" -> "rad/s"."""
    return f"{unit}^2" if unit.endswith("/s") else f"{unit}/s"
