"""X.509 certificates, keys and revocation lists as files: read, checked, and told about in sentences.

Everything here is PEM. What a handshake does with them is in `fedlink.tls`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import stat
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from fedlink.errors import FedlinkError, Reason

WARN_BEFORE = dt.timedelta(days=30)
"""How long before its end a certificate is spoken of."""


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """What a certificate says of itself."""

    common_name: str
    """Empty if there is none."""
    issuer: str
    """The issuer's common name, or its whole name."""
    serial: int
    not_before: dt.datetime
    not_after: dt.datetime
    names: tuple[str, ...]
    """Host names and addresses it is good for."""
    issuer_bytes: bytes
    """The issuer's whole name, to compare."""

    def trouble(self, now: dt.datetime | None = None) -> str:
        """Words such as "expired on ..." or "is valid only from ..."; empty if it is valid at this time."""
        now = now or dt.datetime.now(dt.UTC)
        if now > self.not_after:
            return f"expired on {_day(self.not_after)}"
        if now < self.not_before:
            return f"is valid only from {_day(self.not_before)} on"
        return ""

    def ends_soon(self, now: dt.datetime | None = None) -> str:
        """Words such as "expires on ..., in 12 days"; empty if that is more than WARN_BEFORE away."""
        left = self.not_after - (now or dt.datetime.now(dt.UTC))
        return f"expires on {_day(self.not_after)}, in {left.days} days" if left < WARN_BEFORE else ""


def facts_of(certificate: x509.Certificate) -> CertificateFacts:
    """The facts of a parsed certificate."""
    names: list[str] = []
    # A malformed extension is the handshake's to refuse.
    with contextlib.suppress(x509.ExtensionNotFound, ValueError):
        alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names += alternative.get_values_for_type(x509.DNSName)
        names += [str(address) for address in alternative.get_values_for_type(x509.IPAddress)]
    return CertificateFacts(
        common_name=_common_name(certificate.subject),
        issuer=_common_name(certificate.issuer) or certificate.issuer.rfc4514_string(),
        serial=certificate.serial_number,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        names=tuple(names),
        issuer_bytes=_comparable(certificate.issuer),
    )


def certificate_facts(path: Path) -> CertificateFacts:
    """The facts of the first certificate in a file.

    Raises:
        FedlinkError: BAD_CONFIG, naming the file.
    """
    return facts_of(_certificates(path, read_file(path, "certificate"))[0])


def read_file(path: Path, what: str) -> bytes:
    """A PEM file's bytes.

    Raises:
        FedlinkError: BAD_CONFIG, naming the file and what it is for.
    """
    try:
        return path.read_bytes()
    except OSError as e:
        raise FedlinkError(Reason.BAD_CONFIG, f"{what} {path} cannot be read: {e.strerror}") from None


def read_authorities(path: Path, what: str) -> bytes:
    """A file of CA certificates.

    Raises:
        FedlinkError: BAD_CONFIG, naming the file.
    """
    data = read_file(path, what)
    _certificates(path, data)
    return data


def read_pair(certificate: Path, key: Path) -> tuple[bytes, bytes, CertificateFacts]:
    """A certificate chain and its private key, which must belong together and be valid now.

    Returns:
        Both files' bytes and the facts of the first certificate.

    Raises:
        FedlinkError: BAD_CONFIG, naming the file.
    """
    chain, secret = read_file(certificate, "certificate"), _read_key(key)
    first = _certificates(certificate, chain)[0]
    facts = facts_of(first)
    if trouble := facts.trouble():
        raise FedlinkError(Reason.BAD_CONFIG, f"certificate {certificate} {trouble}; put a new one in its place")
    try:
        private = serialization.load_pem_private_key(secret, None)
    except TypeError:
        raise FedlinkError(
            Reason.BAD_CONFIG, f"key {key} is encrypted; it has to be stored without a pass phrase"
        ) from None
    except ValueError as e:
        raise FedlinkError(Reason.BAD_CONFIG, f"key {key} is not a private key in PEM: {e}") from None
    if _public_bytes(private.public_key()) != _public_bytes(first.public_key()):
        raise FedlinkError(Reason.BAD_CONFIG, f"key {key} does not belong to certificate {certificate}")
    return chain, secret, facts


def read_revoked(path: Path, authorities: bytes) -> frozenset[tuple[bytes, int]]:
    """The (issuer, serial number) of every certificate that a file of revocation lists names.

    Raises:
        FedlinkError: BAD_CONFIG if it is no such file, or a list is not signed by one of the authorities.
    """
    issuers = x509.load_pem_x509_certificates(authorities)
    revoked = set()
    for crl in _revocation_lists(path):
        if not any(_signed(crl, issuer) for issuer in issuers):
            name = _common_name(crl.issuer) or crl.issuer.rfc4514_string()
            raise FedlinkError(Reason.BAD_CONFIG, f"{path}: the list of {name!r} is not signed by a CA in client_ca")
        revoked |= {(_comparable(crl.issuer), entry.serial_number) for entry in crl}
    return frozenset(revoked)


def _read_key(path: Path) -> bytes:
    data = read_file(path, "key")
    if stat.S_IMODE(path.stat().st_mode) & 0o007:
        raise FedlinkError(Reason.BAD_CONFIG, f"key {path} is open to everybody on this machine: chmod 600 it")
    return data


def _certificates(path: Path, data: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as e:
        raise FedlinkError(Reason.BAD_CONFIG, f"{path} is not a certificate in PEM: {e}") from None


_CRL_END = b"-----END X509 CRL-----"


def _revocation_lists(path: Path) -> list[x509.CertificateRevocationList]:
    *parts, rest = read_file(path, "revocation list").split(_CRL_END)
    if not parts:
        raise FedlinkError(Reason.BAD_CONFIG, f"{path} holds no revocation list in PEM")
    if rest.strip():
        raise FedlinkError(Reason.BAD_CONFIG, f"{path} is not a revocation list in PEM: it is cut off")
    try:
        lists = [x509.load_pem_x509_crl(part.lstrip() + _CRL_END + b"\n") for part in parts]
    except ValueError as e:
        raise FedlinkError(Reason.BAD_CONFIG, f"{path} is not a revocation list in PEM: {e}") from None
    return lists


def _signed(crl: x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
    try:
        return crl.issuer == issuer.subject and crl.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]
    except (InvalidSignature, TypeError):
        return False


def _common_name(name: x509.Name) -> str:
    values = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(values[0].value) if values else ""


def _comparable(name: x509.Name) -> bytes:
    # Not its encoding: the same text may be of one type in a certificate and of another in a revocation list.
    return name.rfc4514_string().encode()


def _public_bytes(key: object) -> bytes:
    encode = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(*encode)  # type: ignore[attr-defined, no-any-return]


def _day(moment: dt.datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")
