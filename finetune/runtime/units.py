"""Amounts as users read and write them. Imports no torch."""

GIB = 2**30


def parse_bytes(text: str) -> int:
    """Bytes of "24GiB", "24 GB", "25769803776B" or "24" (GiB). Raises ValueError."""
    units = {"": GIB, "gib": GIB, "g": GIB, "gb": 10**9, "mib": 2**20, "mb": 10**6, "b": 1}
    number = text.strip().rstrip("GgIiBbMm ")
    unit = text.strip()[len(number) :].strip().lower()
    if unit not in units or not 0 < float(number) < 1e18:
        raise ValueError(f"{text!r} is no amount of memory; write 24GiB, or 24GB")
    return int(float(number) * units[unit])


def in_words(size: int) -> str:
    """Bytes as people read them: "1.5 GiB", "12.0 MiB", "3.2 KiB"."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1024:.1f} KiB"


def in_decimal_words(size: int) -> str:
    """Bytes as downloads are counted: "28.6 GB", "12.0 MB", "3.2 kB"."""
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1000:.1f} kB"


def counted(number: int, what: str) -> str:
    """A number of things: "1 rank", "2 ranks"."""
    return f"{number:,} {what}{'' if number == 1 else 'es' if what.endswith('s') else 's'}"
