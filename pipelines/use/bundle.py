"""An encoder on disk: plain files, and a manifest with the size and hash of each.

A bundle directory holds these files and no others:

config.json         format_version 1, the objective that the weights belong to, its text or images
model.safetensors   the weights, without those that are for pretraining alone
tokenizer.json      splits raw text; not there for images
lineage.json        where it comes from
MODEL_CARD.md       the same for people
manifest.json       {name: {bytes, sha256}} of the files above, written last
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from pipelines.errors import DataError
from pipelines.storage import inventory, sha256_of, write_folder

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
REQUIRED_NAMES = ("config.json", "model.safetensors")
ADVICE = "download it again or register it anew"


class BundleError(DataError):
    """A bundle that is not there, or cannot be trusted."""


def write_bundle(
    directory: Path,
    *,
    config: dict[str, Any],
    state: dict[str, Tensor],
    tokenizer_json: str | None,
    lineage: dict[str, Any],
    card: str,
) -> None:
    """Write a bundle; the directory, of which there is none yet, appears complete.

    Raises:
        StorageError: If it cannot be written, or is there already.
    """
    # Clones, because safetensors refuses tensors that share memory, such as tied weights.
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    texts = {
        "config.json": _to_json({"format_version": FORMAT_VERSION, **config}),
        "lineage.json": _to_json(lineage),
        "MODEL_CARD.md": card,
    }
    if tokenizer_json is not None:
        texts["tokenizer.json"] = tokenizer_json

    def fill(aside: Path) -> None:
        save_file(weights, aside / "model.safetensors")
        for name, text in texts.items():
            (aside / name).write_text(text)
        (aside / MANIFEST_NAME).write_text(_to_json(inventory(aside)))

    write_folder(directory, fill)


def tells(directory: Path, told: dict[str, Any]) -> bool:
    """Return whether a bundle is there whose lineage says all of this."""
    try:
        lineage = json.loads((directory / "lineage.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(lineage, dict) and told.items() <= lineage.items()


def verify_bundle(directory: Path) -> dict[str, Any]:
    """Return the manifest, if the directory holds exactly the bytes that it names.

    Raises:
        BundleError: If a file is absent, altered, or not in the manifest.
    """
    manifest = _read_manifest(directory)
    present = {path.name for path in directory.iterdir()} - {MANIFEST_NAME}
    for name in sorted(present - manifest.keys()):
        raise BundleError(f"{name} in {directory} is not in its manifest.json: remove it")
    for name in sorted({*manifest, *REQUIRED_NAMES} - present):
        raise BundleError(f"{name} is missing in {directory}: {ADVICE}")
    for path in (directory / name for name in manifest):
        if path.is_symlink() or not path.is_file():
            raise BundleError(f"{path.name} in {directory} is not a plain file: {ADVICE}")
    found = inventory(directory)
    for name, expected in manifest.items():
        for key, value in found[name].items():
            if expected.get(key) != value:
                what = {"bytes": "size", "sha256": "SHA-256"}[key]
                raise BundleError(f"{name} is not what was registered: {what} differs; {ADVICE}")
    return manifest


def manifest_sha256(directory: Path) -> str:
    """Return the SHA-256 of manifest.json, which stands for the whole bundle."""
    return sha256_of(directory / MANIFEST_NAME)


def _read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest; only the one spelling that `write_bundle` gives it is accepted."""
    try:
        data = (directory / MANIFEST_NAME).read_bytes()
    except OSError as error:
        raise BundleError(f"no bundle at {directory}: {error.strerror}: manifest.json") from error
    try:
        manifest = json.loads(data)
    except ValueError:
        manifest = None
    entries = manifest.values() if isinstance(manifest, dict) else [None]
    if not all(isinstance(entry, dict) for entry in entries) or _to_json(manifest).encode() != data:
        raise BundleError(f"manifest.json is not what was registered: not as written; {ADVICE}")
    for name in manifest:
        if not name or name in (".", "..") or "/" in name or "\\" in name:
            raise BundleError(f"manifest.json names {name!r}, which is no plain file name")
    return dict(manifest)


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
