"""The one error class of the package."""

from __future__ import annotations


class PrivacyError(RuntimeError):
    """A step cannot be made private, or could release a gradient that is not.

    The message names what was found, where it is in the user's code, and the remedy.
    """
