"""Numbers as short text."""


def format_number(value: float) -> str:
    """Return an integer in full, any other number with four significant digits, and NaN as a dash."""
    if value != value:
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def format_percent(share: float, digits: int = 1) -> str:
    """Return a share in percent, without the percent sign."""
    return f"{100 * share:.{digits}f}"


def format_value(value: object) -> str:
    """Return a number as `format_number` does, and any other value as its text."""
    return format_number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def format_tick(value: float) -> str:
    """Return the short label of an axis tick: 25k, 0.25, 5e-4."""
    if value and abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:g}{suffix}"
    return f"{value:.5g}".replace("-", "−")
