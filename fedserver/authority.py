"""A certificate authority in a directory, for federations without one of their own.

    ca.crt ca.key           the authority; ca.key is worth as much as every site together
    server.crt server.key   for fedserver.toml
    sites/NAME.crt .key     for the site of that name
    issued/NAME-SERIAL.crt  every certificate a site ever got, for `revoke`
    revoked.crl             what `revoke` has taken back

Keys are P-256 and unencrypted, mode 600; certificates follow RFC 5280.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlink.config import check_name
from fedlink.errors import FedlinkError, Reason

AUTHORITY_DAYS = 3650
"""How long a new authority is good for."""
_CLOCK_SLACK = dt.timedelta(minutes=5)
_MAX_COMMON_NAME = 64


class Authority:
    """The authority in a directory.

    Args:
        directory: where it is, or will be.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.certificate = directory / "ca.crt"
        self.revocations = directory / "revoked.crl"
        self._key = directory / "ca.key"
        self._issued = directory / "issued"

    def create(self, name: str) -> None:
        """Make the authority, and an empty revocation list.

        Raises:
            FedlinkError: BAD_CONFIG if there is one already, the name is too long, or the directory cannot be written.
        """
        if not 0 < len(name) <= _MAX_COMMON_NAME:
            raise FedlinkError(Reason.BAD_CONFIG, f"an authority's name has 1 to {_MAX_COMMON_NAME} characters")
        if self._key.exists() or self.certificate.exists():
            text = (
                f"{self.directory} holds an authority already; a new one would make every certificate of it worthless"
            )
            raise FedlinkError(Reason.BAD_CONFIG, text)
        key, subject = ec.generate_private_key(ec.SECP256R1()), _subject(name)
        certificate = (
            _builder(subject, subject, key.public_key(), AUTHORITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        _write(self._key, _private(key), secret=True)
        _write(self.certificate, certificate.public_bytes(serialization.Encoding.PEM))
        self._write_revocations(certificate, key, [])

    def issue_server(self, hosts: list[str], days: int) -> Path:
        """Make the server's certificate, in place of a former one; returns its path.

        Args:
            hosts: names and addresses under which sites reach the server.
            days: how long it is good for.

        Raises:
            FedlinkError: BAD_CONFIG if there is no authority here, or a host is neither name nor address.
        """
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        # Only the list of names counts for hosts; a common name is for people, and has 64 characters at most.
        name = hosts[0] if len(hosts[0]) <= _MAX_COMMON_NAME else "server"
        return self._issue(self.directory / "server.crt", name, days, ExtendedKeyUsageOID.SERVER_AUTH, names)

    def issue_site(self, name: str, days: int) -> Path:
        """Make a site's certificate, in place of a former one; returns its path.

        Raises:
            FedlinkError: BAD_NAME; BAD_CONFIG if there is no authority here.
        """
        try:
            check_name(name)
        except ValueError as e:
            raise FedlinkError(Reason.BAD_NAME, str(e)) from None
        file = self.directory / "sites" / f"{name}.crt"
        names = x509.SubjectAlternativeName([x509.DirectoryName(_subject(name))])
        return self._issue(file, name, days, ExtendedKeyUsageOID.CLIENT_AUTH, names)

    def revoke(self, name: str) -> int:
        """Put every certificate that a site has got so far on the revocation list; returns how many.

        Raises:
            FedlinkError: BAD_CONFIG if it has none, or all are on the list, or the list is lost.
        """
        issuer, key = self._load()
        issued = [c for file in sorted(self._issued.glob("*.crt")) if _subject(name) == (c := _read(file)).subject]
        known = self._revoked()
        revoked = {entry.serial_number for entry in known}
        fresh = [c.serial_number for c in issued if c.serial_number not in revoked]
        if not fresh:
            what = "is revoked already" if issued else "was ever made here"
            raise FedlinkError(
                Reason.BAD_CONFIG, f"{self.directory}: {'every' if issued else 'no'} certificate of {name!r} {what}"
            )
        now = dt.datetime.now(dt.UTC)
        self._write_revocations(issuer, key, [*known, *(x509.RevokedCertificateBuilder(n, now).build() for n in fresh)])
        return len(fresh)

    def _issue(
        self, file: Path, name: str, days: int, purpose: x509.ObjectIdentifier, names: x509.SubjectAlternativeName
    ) -> Path:
        issuer, issuer_key = self._load()
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder(_subject(name), issuer.subject, key.public_key(), days, issuer.not_valid_after_utc)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(names, critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
            .sign(issuer_key, hashes.SHA256())
        )
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        if purpose == ExtendedKeyUsageOID.CLIENT_AUTH:
            # First: nothing may be in use that `revoke` does not know of.
            _write(self._issued / f"{name}-{certificate.serial_number:x}.crt", pem)
        _write(file.with_suffix(".key"), _private(key), secret=True)
        _write(file, pem)
        return file

    def _load(self) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        if not self._key.exists() and not self.certificate.exists():
            text = f"there is no authority in {self.directory}; `fedserver certificate authority` makes one"
            raise FedlinkError(Reason.BAD_CONFIG, text)
        certificate = _read(self.certificate)
        try:
            key = serialization.load_pem_private_key(self._key.read_bytes(), None)
        except (OSError, ValueError, TypeError) as e:
            why = e.strerror if isinstance(e, OSError) else "it is damaged or encrypted"
            raise FedlinkError(Reason.BAD_CONFIG, f"{self._key} cannot be used: {why}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise FedlinkError(Reason.BAD_CONFIG, f"{self._key} is not a key that this command made")
        return certificate, key

    def _revoked(self) -> list[x509.RevokedCertificate]:
        try:
            return list(x509.load_pem_x509_crl(self.revocations.read_bytes()))
        except (OSError, ValueError):
            text = f"{self.revocations} cannot be read; put a copy back, for a new list would forget what was revoked"
            raise FedlinkError(Reason.BAD_CONFIG, text) from None

    def _write_revocations(
        self, issuer: x509.Certificate, key: ec.EllipticCurvePrivateKey, entries: list[x509.RevokedCertificate]
    ) -> None:
        now = dt.datetime.now(dt.UTC)
        builder = x509.CertificateRevocationListBuilder(
            issuer.subject, now, issuer.not_valid_after_utc, revoked_certificates=entries
        )
        _write(self.revocations, builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


def _read(file: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is no certificate in PEM"
        raise FedlinkError(Reason.BAD_CONFIG, f"{file} cannot be used: {why}") from None


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int, latest: dt.datetime | None = None
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    end = now + dt.timedelta(days=days)
    return x509.CertificateBuilder(
        subject_name=subject,
        issuer_name=issuer,
        public_key=key,
        serial_number=x509.random_serial_number(),
        not_valid_before=now - _CLOCK_SLACK,
        not_valid_after=min(end, latest) if latest else end,
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not host or not host.isascii() or any(c.isspace() or c in "/:" for c in host):
        raise FedlinkError(Reason.BAD_CONFIG, f"{host!r} is neither a host name nor an address")
    return x509.DNSName(host)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes, *, secret: bool = False) -> None:
    """Put a file in place in one step, so that a server that reads it again never sees half."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = path.with_name(f".{path.name}.new")
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644), "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        new.rename(path)
    except OSError as e:
        raise FedlinkError(Reason.BAD_CONFIG, f"{path} cannot be written: {e.strerror}") from None
