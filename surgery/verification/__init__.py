"""Proving that nothing changed: the certificate (weights) and the logits (outputs)."""

from surgery.verification.certificate import Certificate, certify
from surgery.verification.logits import Logits, compare_logits
from surgery.verification.verify import Verification, find_growths, verify

__all__ = [
    "Certificate",
    "Logits",
    "Verification",
    "certify",
    "compare_logits",
    "find_growths",
    "verify",
]
