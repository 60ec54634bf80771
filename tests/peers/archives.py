"""The peers' archives: downloaded by pip from whatever index it uses, checked against a hash, kept in a cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from support.launching import run

from peers.selection import CHECKOUTS, PEERS, Checkout, Peer

ADAPTERS = Path(__file__).parent / "adapters"


class NoIndexError(Exception):
    """There is no package index within reach, or it does not have the package at all."""


def fetch(peer: Peer) -> Path:
    """The archive. Raises NoIndexError where it cannot be had, AssertionError for any other failure of pip."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refkl-peers"
    archive = cache / peer.archive
    if archive.is_file() and _sha256(archive) == peer.sha256:
        return archive
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        pinned = Path(scratch, "requirements.txt")
        # pip runs an sdist's setup.py to read its metadata: with a hash it looks at the archive before that.
        pinned.write_text(f"{peer.requirement} --hash=sha256:{peer.sha256}\n")
        options = ("--no-deps", "--require-hashes", "--retries", "1", "--timeout", "30", "--dest", scratch)
        command = [sys.executable, "-m", "pip", "download", *options, *peer.pip, "--requirement", str(pinned)]
        try:
            run(command, timeout=120)
        except AssertionError as error:
            # What pip says for an index that cannot be reached, and for one that does not know the package.
            if "from versions: none" in str(error):
                raise NoIndexError(f"pip finds no package index with {peer.requirement}") from error
            raise
        downloaded = Path(scratch, peer.archive)
        assert _sha256(downloaded) == peer.sha256
        downloaded.replace(archive)  # in one step: two runs may do this at once
    return archive


def lay_out(folder: Path, names: Iterable[str]) -> None:
    """FOLDER/PEER/: the selected tests in tests/, and beside it, where they look for their package, the adapter."""
    for name in names:
        peer = PEERS[name] if name in PEERS else CHECKOUTS[name]
        adapter = name if isinstance(peer, Peer) else peer.adapter
        shutil.copytree(ADAPTERS / adapter, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        read = _archived(peer) if isinstance(peer, Peer) else _checked_out(peer)
        for file in peer.files:
            # Never extractall: names inside an archive may point anywhere, these are ours.
            target = folder / name / "tests" / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(read(file.path))
    # Hardly a configuration: this repository's is not for the peers' tests. The second is a name of unittest's classes.
    (folder / "pytest.ini").write_text("[pytest]\npython_classes = Test* *Test\n")


def _archived(peer: Peer) -> Callable[[str], bytes]:
    archive = fetch(peer)
    return lambda path: _member(archive, f"{peer.folder}/{path}")


def _checked_out(peer: Checkout) -> Callable[[str], bytes]:
    folder = Path(os.environ[peer.variable])

    def read(path: str) -> bytes:
        assert (folder / path).is_file(), (
            f"{peer.variable} is {folder}, and there is no {path} in it. It takes the folder tests/ of a checkout of "
            f"version {peer.version}."
        )
        return (folder / path).read_bytes()

    return read


def _member(archive: Path, name: str) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(name)
    with tarfile.open(archive) as sdist:
        file = sdist.extractfile(name)
        assert file is not None, f"{name} in {archive.name} is not a file"
        return file.read()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
