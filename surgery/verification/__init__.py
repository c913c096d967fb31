"""Proving that nothing changed: the certificate (weights) and the logits (outputs)."""

from surgery.verification.certificate import Certificate, Relation, certify
from surgery.verification.logits import Logits, compare_logits
from surgery.verification.verify import (
    Verification,
    block_places,
    find_expansion,
    find_growths,
    find_relation,
    verify,
)

__all__ = [
    "Certificate",
    "Logits",
    "Relation",
    "Verification",
    "block_places",
    "certify",
    "compare_logits",
    "find_expansion",
    "find_growths",
    "find_relation",
    "verify",
]
