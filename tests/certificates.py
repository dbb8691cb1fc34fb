"""A certificate for 127.0.0.1 that no authority has signed but itself, and its key, which guards nothing."""

import ssl
from pathlib import Path

CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBrjCCAVOgAwIBAgIUa5Z/Shb8JLUEgwp+LkakKUxhmXswCgYIKoZIzj0EAwIw
HTEbMBkGA1UEAwwSZGlzdGlsbHNlcnZlIHRlc3RzMCAXDTI2MTEyNzAyMTM0M1oY
DzIxMjYxMTAzMDIxMzQzWjAdMRswGQYDVQQDDBJkaXN0aWxsc2VydmUgdGVzdHMw
WTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAR/ZzsXJlpcF+NQ3rgPxuCAAiXyvZia
jip6IFiy2A4xmcv6BBqlC36XOVKT9m2TZAXA/iyrzrPM3XGW7ol1neqbo28wbTAd
BgNVHQ4EFgQUdCgvogxBFN7cccofWHHhZUertfUwHwYDVR0jBBgwFoAUdCgvogxB
FN7cccofWHHhZUertfUwDwYDVR0TAQH/BAUwAwEB/zAaBgNVHREEEzARhwR/AAAB
gglsb2NhbGhvc3QwCgYIKoZIzj0EAwIDSQAwRgIhAObl1qbaoWr6eg+zPDvOiOxL
ul5n4R+WOxJAErsU0A/eAiEAxp0sCg7K0cQ2YhO6Zkx4Fj+nUlr/UfzNzhmp2hM5
jkE=
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgjNhlm1WHUsiKKYsK
r0YA2cXL6V1xVetllaq4diWoDC+hRANCAAR/ZzsXJlpcF+NQ3rgPxuCAAiXyvZia
jip6IFiy2A4xmcv6BBqlC36XOVKT9m2TZAXA/iyrzrPM3XGW7ol1neqb
-----END PRIVATE KEY-----
"""


def write_certificate(folder: Path) -> Path:
    """The file of the certificate alone, as SSL_CERT_FILE wants it."""
    path = folder / "certificate.pem"
    path.write_text(CERTIFICATE)
    return path


def server_context(folder: Path) -> ssl.SSLContext:
    """What a server behind TLS wraps its connections in."""
    path = folder / "server.pem"
    path.write_text(CERTIFICATE + KEY)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context
