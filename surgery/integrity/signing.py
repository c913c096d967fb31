"""Signatures of a model directory, through OpenSSF's model-signing: made with a key, verified
against a key or against who signed (Sigstore). https://github.com/sigstore/model-transparency

What is signed is the SHA-256 of every file, so a file that differs, is missing or is extra fails.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import ArgumentError, InputError, NotFoundError

NEEDED = "needs model-signing: pip install 'model-surgery[signing]'"


@dataclass(frozen=True)
class Signer:
    """Who is to have signed: the holder of the private key of `public_key`, or the `identity`
    (an e-mail address, a workflow) that the OpenID `provider` vouches for."""

    public_key: Path | None = None
    identity: str | None = None
    provider: str | None = None

    def __post_init__(self) -> None:
        if (self.identity is None) != (self.provider is None):
            raise ArgumentError(
                "an identity goes with its provider: --identity me@example.org "
                "--identity-provider https://accounts.google.com"
            )
        if (self.public_key is None) == (self.identity is None):
            raise ArgumentError("give either the public key or the identity of who has signed")

    def __str__(self) -> str:
        return self.identity or f"the key {self.public_key}"


def require_signing_key(key: Path) -> None:
    """Raise ArgumentError unless `key` can sign: before hours of work, not after."""
    _module("signing", "--sign-key")
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        loaded = load_pem_private_key(key.read_bytes(), None)
    except OSError as error:
        raise NotFoundError(f"{key} can't be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"{key} is no private key that can be used: {error}") from error
    if not isinstance(loaded, EllipticCurvePrivateKey):
        raise ArgumentError(
            f"{key} isn't a key on an elliptic curve: make one with `openssl ecparam -name "
            f"prime256v1 -genkey -noout -out {key.name}`"
        )


def sign(folder: Path, signature: Path, key: Path) -> None:
    """Sign all files in `folder` but hidden ones and `signature` itself, which is written."""
    require_signing_key(key)
    config = _module("signing", "--sign-key").Config()
    config.use_elliptic_key_signer(private_key=key)
    config.set_hashing_config(_hashing(folder, signature, {}, ())).sign(folder, signature)


def verify_signature(folder: Path, signature: Path, signer: Signer) -> list[str]:
    """What is wrong with the signature of `folder`; nothing if it holds."""
    if not signature.is_file():
        return [f"{signature} isn't there: nobody has signed {folder}, or it was left behind"]
    config = _verifier(signer)
    try:
        described, names = _described(signature)
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        return [f"{signature} is no signature that model-signing makes: {error!r}"]
    try:
        config.set_hashing_config(_hashing(folder, signature, described, names))
        config.verify(folder, signature)
    except Exception as error:  # noqa: BLE001  whatever it is, the signature doesn't hold
        return _differences(folder, signature, str(error), names) or [
            f"{signature} isn't a signature by {signer}: {error}"
        ]
    return []


def _verifier(signer: Signer) -> Any:
    config = _module("verifying", "verifying a signature").Config()
    if signer.public_key is not None:
        if not signer.public_key.is_file():
            raise NotFoundError(f"{signer.public_key}: no such file")
        try:
            return config.use_elliptic_key_verifier(public_key=signer.public_key)
        except (ValueError, TypeError) as error:
            raise ArgumentError(f"{signer.public_key} is no public key: {error}") from error
    try:
        return config.use_sigstore_verifier(identity=signer.identity, oidc_issuer=signer.provider)
    except Exception as error:
        raise InputError(
            f"who has signed can't be verified, as Sigstore's root of trust can't be fetched "
            f"({error}): try again with a network, or with a signature by a key (--public-key)"
        ) from error


def _described(signature: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """How the files were hashed, as the signature says, and which. It isn't verified yet: a lie
    makes other digests, and verifying fails."""
    envelope = json.loads(signature.read_bytes())["dsseEnvelope"]
    predicate = json.loads(base64.b64decode(envelope["payload"]))["predicate"]
    names = tuple(str(resource["name"]) for resource in predicate["resources"])
    return dict(predicate["serialization"]), names


def _hashing(folder: Path, signature: Path, described: dict[str, Any], names: Any) -> Any:
    """SHA-256 by file, unless `described` otherwise. All files but the signature, and hidden ones
    that weren't signed: they belong to whatever fetched the model or stores it."""
    config = _module("hashing", "a signature").Config()
    how = {"hashing_algorithm": described.get("hash_type", "sha256")}
    if described.get("method") == "shards":
        config.use_shard_serialization(shard_size=int(described["shard_size"]), **how)
    else:
        config.use_file_serialization(**how)
    hidden = [
        path
        for path in folder.rglob(".*")
        if not any(Path(name).is_relative_to(path.relative_to(folder)) for name in names)
    ]
    config.set_ignored_paths(paths=[signature, *hidden], ignore_git_paths=True)
    return config.set_allow_symlinks(bool(names))  # the Hub's cache is made of links


def _differences(folder: Path, signature: Path, error: str, names: tuple[str, ...]) -> list[str]:
    """The files of a mismatch, which model-signing lists as one text."""
    text = error.replace("\\'", "'")
    found = [
        f"{folder / name} isn't the file that was signed in {signature.name}"
        for name in names
        if f"Hash mismatch for '{name}'" in text
    ]
    for kind, listed in re.findall(
        r"(Extra|Missing) files (?:found )?in model '.*?': ([^\"'\]]*)", text
    ):
        found.append(f"{folder}: {kind.lower()} by the signature {signature.name}: {listed}")
    return found


def _module(name: str, what: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"model_signing.{name}")
    except ImportError as error:
        raise ArgumentError(f"{what} {NEEDED}") from error
