"""The names of a fleet's server, and certificates read back."""

from __future__ import annotations

from pathlib import Path

from cryptography import x509

NAMES = ["Sampler.Example.org", "192.0.2.7", "2001:db8::1"]


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())
