"""The artefact store: finished work, found again by its recipe, checked by its bytes."""

from tasks.store.digest import canonical, digest_bytes, digest_file, digest_folder, fingerprint
from tasks.store.store import Artefact, Manifest, Store

__all__ = [
    "Artefact",
    "Manifest",
    "Store",
    "canonical",
    "digest_bytes",
    "digest_file",
    "digest_folder",
    "fingerprint",
]
