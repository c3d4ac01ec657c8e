"""The compiled modules, each None where the package was installed without a C compiler."""

try:
    from replaystore import decoding
except ImportError:
    decoding = None  # type: ignore[assignment]

try:
    from replaystore import finding
except ImportError:
    finding = None  # type: ignore[assignment]

__all__ = ["decoding", "finding"]
