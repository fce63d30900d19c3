"""A signature over the zoo's folder by sigstore's ``model-signing``, with a key. docs/hub.md has the same as commands."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lightning_deepr import zoo
from tests.helpers.optional import needs

MODELS = ("lenet300_100.deepr_1pct_mnist", "lenet300_100.deepr_2pct_mnist")


@needs("model_signing", "OpenSSL")
@pytest.mark.parametrize("change", ["a byte", "a new file", "a lost file"])
def test_a_signature_holds_until_a_file_changes(change: str, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from model_signing import signing, verifying

    key, form = ec.generate_private_key(ec.SECP256R1()), serialization.Encoding.PEM
    private, public, signature, folder = (tmp_path / name for name in ("key.pem", "key.pub", "zoo.sig", "zoo"))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(form, *plain))
    public.write_bytes(key.public_key().public_bytes(form, serialization.PublicFormat.SubjectPublicKeyInfo))
    folder.mkdir()
    for name in MODELS:
        shutil.copy(zoo.path_of(name), folder)

    signing.Config().use_elliptic_key_signer(private_key=private).sign(folder, signature)
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=public)
    verifier.verify(folder, signature)

    file = next(iter(folder.glob("*.safetensors")))
    if change == "a byte":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif change == "a new file":
        (folder / "another.txt").write_text("")
    else:
        file.unlink()
    with pytest.raises(ValueError, match="Signature mismatch"):
        verifier.verify(folder, signature)
