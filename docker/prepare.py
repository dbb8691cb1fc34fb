"""What the containers of compose.yaml need before the first role starts; run as root by its service `prepare`.

outputs    the folder of the results. Everything runs as its owner, so that the caller needs no sudo to use them.
           Docker makes a missing one as root: then it is given to the owner of the clone.
cache      a volume, given to the same owner
keys       a volume a server with its random key, for that owner alone; a key that is there is kept
"""

import os
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path

KEY_BYTES = 32


class PrepareError(Exception):
    """One line for the user."""


@dataclass(frozen=True)
class Folders:
    clone: Path = Path("/clone")  # a folder of it, to see whose it is
    outputs: Path = Path("/app/outputs")
    cache: Path = Path("/cache")
    keys: tuple[Path, ...] = (Path("/keys/rollout"), Path("/keys/teacher"))


@dataclass(frozen=True)
class Owner:
    uid: int
    gid: int

    @classmethod
    def of(cls, path: Path) -> "Owner":
        status = path.stat()
        return cls(status.st_uid, status.st_gid)

    def __str__(self) -> str:
        return f"{self.uid}:{self.gid}"


def prepare(folders: Folders) -> Owner:
    """Returns who the roles run as.

    Raises:
        PrepareError: the results would belong to root though the clone does not.
    """
    owner = results_owner(folders)
    give(folders.outputs, owner)
    # Docker gives an empty volume the owner that its folder has in the image, at every container that is made.
    (folders.cache / "CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55\n")
    if Owner.of(folders.cache) != owner:
        for path in folders.cache.rglob("*"):
            give(path, owner)
        give(folders.cache, owner)
    for folder in folders.keys:
        make_key(folder, owner)
    return owner


def results_owner(folders: Folders) -> Owner:
    """The owner of the results' folder, or of the clone where Docker has just made that folder.

    Raises:
        PrepareError: the folder is root's, holds something, and the clone is somebody else's.
    """
    owner, caller = Owner.of(folders.outputs), Owner.of(folders.clone)
    if owner.uid != 0 or caller.uid == 0:
        return owner
    if any(folders.outputs.iterdir()):
        raise PrepareError(
            f"the folder of the results (OUTPUTS, by default ./outputs) belongs to root, the clone to {caller}; "
            f"run: sudo chown -R {caller} outputs"
        )
    return caller


def make_key(folder: Path, owner: Owner) -> None:
    """A random key in `folder`/key unless there is one; both are for `owner` alone."""
    path = folder / "key"
    if not path.exists() or not path.read_text().strip():
        unfinished = folder / ".key.new"
        unfinished.unlink(missing_ok=True)
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(KEY_BYTES) + "\n")
        unfinished.rename(path)
    for place, mode in ((path, 0o600), (folder, 0o700)):
        place.chmod(mode)
        give(place, owner)


def give(path: Path, owner: Owner) -> None:
    if not path.is_symlink() and Owner.of(path) == owner:
        return
    os.chown(path, owner.uid, owner.gid, follow_symlinks=False)


if __name__ == "__main__":
    try:
        print(
            f"the roles run as {prepare(Folders())}, the owner of the results; the servers' keys are in their volumes"
        )
    except PrepareError as error:
        sys.exit(f"prepare: {error}")
