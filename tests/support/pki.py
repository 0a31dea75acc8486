"""Certificates for tests: whom to trust, and leaves of every kind, as files."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from pathlib import Path

import grpc
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

Tls = dict[str, str]
"""`[tls]` of a configuration."""


class Pki:
    """A CA of `trustme` with its files in a directory."""

    def __init__(self, directory: Path, *, parent: Pki | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        unit = directory.name
        self.authority = (
            trustme.CA(parent.authority, organization_unit_name=unit)
            if parent
            else trustme.CA(organization_unit_name=unit)
        )
        self.ca = self.write("ca.crt", self.authority.cert_pem.bytes())
        self.certificate = x509.load_pem_x509_certificate(self.authority.cert_pem.bytes())
        self._revoked: list[int] = []
        self.revoked = self.write("revoked.crl", self.revocations())

    def write(self, name: str, data: bytes, mode: int = 0o644) -> Path:
        """Put a file into the directory, in one step."""
        path = self.directory / name
        new = path.with_name(f".{name}")
        new.touch(mode)
        new.write_bytes(data)
        new.chmod(mode)
        return new.rename(path)

    def leaf(
        self,
        name: str,
        *hosts: str,
        lasts: dt.timedelta | None = None,
        start: dt.datetime | None = None,
        file: str = "",
    ) -> Tls:
        """A certificate whose common name is `name`, and its key; lasts to 2038 unless told."""
        now = dt.datetime.now(dt.UTC)
        start = start or now - dt.timedelta(days=100)
        cert = self.authority.issue_cert(
            *(hosts or (f"{name}.example",)),
            common_name=name,
            not_before=start,
            not_after=now + lasts if lasts is not None else None,
        )
        file = file or name
        chain = b"".join(blob.bytes() for blob in cert.cert_chain_pems)
        return {
            "certificate": str(self.write(f"{file}.crt", chain)),
            "key": str(self.write(f"{file}.key", cert.private_key_pem.bytes(), 0o600)),
        }

    def site(self, name: str, trust: Path, *, lasts: dt.timedelta | None = None, file: str = "") -> Tls:
        """`[tls]` of a site."""
        return {"ca": str(trust), **self.leaf(name, lasts=lasts, file=file)}

    def revocations(self, *serials: int) -> bytes:
        """A signed list of what was revoked so far, and of these."""
        self._revoked += serials
        now = dt.datetime.now(dt.UTC)
        builder = x509.CertificateRevocationListBuilder(
            self.certificate.subject,
            now,
            now + dt.timedelta(days=1),
            revoked_certificates=[x509.RevokedCertificateBuilder(serial, now).build() for serial in self._revoked],
        )
        key = serialization.load_pem_private_key(self.authority.private_key_pem.bytes(), None)
        return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)  # type: ignore[arg-type]

    def revoke(self, *leaves: Tls) -> None:
        """Put certificates on the list."""
        self.revoked = self.write("revoked.crl", self.revocations(*(serial_of(leaf) for leaf in leaves)))


def serial_of(leaf: Tls) -> int:
    """A certificate's serial number."""
    return x509.load_pem_x509_certificate(Path(leaf["certificate"]).read_bytes()).serial_number


def channel_credentials(tls: Tls) -> grpc.ChannelCredentials:
    """What a site's `[tls]` is to a channel."""
    read = {key: Path(path).read_bytes() for key, path in tls.items()}
    return grpc.ssl_channel_credentials(read["ca"], read.get("key"), read.get("certificate"))


def key_lines(files: Iterable[Path]) -> set[str]:
    """The lines inside the private keys in files, which must be found nowhere."""
    return {line for file in files for line in file.read_text().splitlines() if len(line) > 20 and "-" not in line}
