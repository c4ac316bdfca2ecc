"""Bundles of certificates of RDS, with which the manager verifies the ledger's database.

Amazon Linux does not have the certificates of RDS, so the release of a stack with a database contains them
(`--database-ca`). A bundle of AWS may also contain expired certificates, and AWS's global bundle contains the
certificates of all regions.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchlab.adapters.clock import WallClock
from batchlab.core.errors import UsageError
from batchlab.deploy.template import READABLE_FILE

MAX_BYTES = 1024 * 1024
"""Maximum size of a bundle in bytes. AWS's global bundle has less than 0.2 MiB."""
BUNDLES = "https://docs.aws.amazon.com/AmazonRDS/latest/UserGuide/UsingWithRDS.SSL.html"
"""AWS's list of bundles, which also names the other addresses for China and GovCloud."""

_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


def read(path: Path, region: str = "") -> bytes:
    """Return the content of a file with a bundle of certificates. Raise UsageError for an invalid bundle (see
    `check_bundle`).
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", remedy=READABLE_FILE) from error
    check_bundle(content, str(path), region)
    return content


def check_bundle(content: bytes, where: str, region: str = "") -> None:
    """Raise UsageError if the content is not a bundle of certificates in PEM form.

    With `region`, also raise UsageError if the bundle does not contain a valid certificate of RDS in the region.
    """
    if len(content) > MAX_BYTES:
        raise UsageError(f"{where} has more than {MAX_BYTES:,} bytes.", remedy=remedy(region))
    if b"PRIVATE KEY" in content:
        raise UsageError(f"{where} contains a private key, which a release must not contain.", remedy=remedy(region))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        text = content.decode("ascii")
        if not 0 < text.count(_BEGIN) == text.count(_END):
            raise ValueError("a certificate is missing or cut off")
        context.load_verify_locations(cadata=text)
    except (ValueError, ssl.SSLError) as error:
        raise UsageError(f"{where} does not contain certificates in PEM form.", remedy=remedy(region)) from error
    if not region:
        return
    # AWS names these certificates "Amazon RDS eu-west-1 Root CA RSA2048 G1".
    own = [found for found in context.get_ca_certs() if _name(found).startswith(f"Amazon RDS {region} ")]
    if not own:
        raise UsageError(f"{where} does not contain a certificate of RDS in {region}.", remedy=remedy(region))
    if all(ssl.cert_time_to_seconds(str(found["notAfter"])) <= WallClock().now_s() for found in own):
        raise UsageError(f"The certificates of RDS in {region} in {where} have expired.", remedy=remedy(region))


def _name(certificate: Mapping[str, Any]) -> str:
    parts = [pair for part in certificate.get("subject", ()) for pair in part]
    return next((str(value) for key, value in parts if key == "commonName"), "")


def remedy(region: str) -> str:
    place = region or "REGION"
    if region.startswith(("cn-", "us-gov-")):
        return f"Download {place}-bundle.pem from the list in {BUNDLES}, and add --database-ca {place}-bundle.pem."
    return (
        f"Download https://truststore.pki.rds.amazonaws.com/{place}/{place}-bundle.pem, and add "
        f"--database-ca {place}-bundle.pem."
    )
