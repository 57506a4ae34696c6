"""What can be wrong with a bundle."""


class BundleError(Exception):
    """A bundle that must not be served.

    Attributes:
        reason: fixed code, e.g. `DIGEST_MISMATCH`.
        detail: the sentence for people: what was wrong, what was expected, what was got.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
