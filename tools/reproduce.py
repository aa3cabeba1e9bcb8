"""Build targets of the Dockerfile twice from the commit, and compare what comes out.

    python tools/reproduce.py [--published NAME:TAG] TARGET...

Two clones, of which one has the permissions of a private umask and in the other all is of 2001; no cache; the commit's
time for the build's (https://reproducible-builds.org/specs/source-date-epoch/). Equal digests of the manifests are
equal images to the last byte. If they differ, it says which files do, and the exit code is 1.
"""

import argparse
import hashlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator

LONG_AGO = 981_158_400  # 2001-02-03


class Archive:
    """An image in a tar archive, as https://github.com/opencontainers/image-spec/blob/main/image-layout.md has it."""

    def __init__(self, path: pathlib.Path) -> None:
        self.tar = tarfile.open(path)  # noqa: SIM115 - open as long as this is
        (self.entry,) = json.load(self.tar.extractfile("index.json"))["manifests"]
        self.digest = self.entry["digest"]
        self.manifest = self.blob(self.digest)
        self.config = self.blob(self.manifest["config"]["digest"])

    def blob(self, digest: str) -> dict:
        """Return one of the JSON documents in it."""
        return json.load(self.tar.extractfile(f"blobs/{digest.replace(':', '/')}"))

    def files(self, layer: dict) -> dict[str, dict]:
        """Return what a layer says of each file, its content as a hash."""
        found = {}
        blob = self.tar.extractfile(f"blobs/{layer['digest'].replace(':', '/')}")
        with tarfile.open(fileobj=blob, mode="r|*") as files:
            for file in files:
                content = hashlib.file_digest(files.extractfile(file), "sha256").hexdigest() if file.isfile() else ""
                found[file.name] = {
                    "type": file.type.decode(),
                    "mode": oct(file.mode),
                    "owner": f"{file.uid}:{file.gid}",
                    "time": file.mtime,
                    "link": file.linkname,
                    "size": file.size,
                    "content": content[:12],
                    "attributes": file.pax_headers,
                }
        return found


def clone(folder: pathlib.Path, umask: int) -> None:
    """Clone the repository of the current folder, as someone would who has that umask."""
    command = ["git", "-c", "advice.detachedHead=false", "clone", "--quiet", "--no-hardlinks", ".", folder]
    if subprocess.run(command, umask=umask).returncode:
        sys.exit("reproduce: the repository cannot be cloned")


def build(folder: pathlib.Path, target: str, archive: pathlib.Path) -> Archive:
    """Build a target without cache, as `make image` does; end with what the build says if it fails."""
    command = ["make", "archive", "FOLDER=1", f"TARGET={target}", f"ARCHIVE={archive}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}reproduce: {target} cannot be built")
    return Archive(archive)


def differences(one: Archive, other: Archive) -> Iterator[str]:
    """Yield a line for each file, and for each setting of the image, that is not the same in both."""
    steps = [step.get("created_by", "") for step in one.config["history"] if not step.get("empty_layer")]
    layers = itertools.zip_longest(steps, one.manifest["layers"], other.manifest["layers"])
    for number, (step, layer, its) in enumerate(layers, start=1):
        if not layer or not its:
            yield f"layer {number} ({(step or '')[:60]}): only one of them has it"
            continue
        if layer["digest"] == its["digest"]:
            continue
        if layer["mediaType"].endswith("+zstd") and sys.version_info < (3, 14):
            yield f"layer {number} ({step[:60]}): packed with zstd; to name its files takes Python 3.14"
            continue
        files, others = one.files(layer), other.files(its)
        differing = [name for name in sorted(files.keys() | others.keys()) if files.get(name) != others.get(name)]
        yield f"layer {number} ({step[:60]}): {'' if differing else 'the same files, packed in another way'}"
        for name in differing:
            mine, theirs = files.get(name, {"type": "not there"}), others.get(name, {"type": "not there"})
            fields = [field for field in mine.keys() | theirs.keys() if mine.get(field) != theirs.get(field)]
            yield f"  {name}: " + ", ".join(f"{f} {mine.get(f)} or {theirs.get(f)}" for f in sorted(fields))
    settings, others = ({**image.config, **image.config["config"]} for image in (one, other))
    for field in sorted((settings.keys() | others.keys()) - {"config", "rootfs"}):
        if settings.get(field) != others.get(field):
            yield f"{field}: {settings.get(field)} or {others.get(field)}"


def published(name: str) -> bytes:
    """Return what a registry has of an image: its manifest, or an index of them."""
    done = subprocess.run(["docker", "buildx", "imagetools", "inspect", "--raw", name], capture_output=True)
    if done.returncode:
        sys.exit(f"reproduce: {name} cannot be read: {done.stderr.decode().strip()}")
    return done.stdout


def digest_for(platform: dict, raw: bytes) -> str | None:
    """Return the digest of a platform's manifest."""
    found = json.loads(raw)
    if "manifests" not in found:
        return f"sha256:{hashlib.sha256(raw).hexdigest()}"
    return next((entry["digest"] for entry in found["manifests"] if entry.get("platform") == platform), None)


def main() -> int:
    """Build, compare, print a line for each target; return the exit code."""
    parser = argparse.ArgumentParser(description="Build targets twice from the commit, and compare their digests.")
    parser.add_argument("--published", metavar="NAME:TAG", help="compare the last target with this image too")
    parser.add_argument("targets", nargs="+", metavar="TARGET")
    arguments = parser.parse_args()
    # What this make and this repository have set is not for those in the clones.
    for name in [name for name in os.environ if name.startswith(("MAKE", "MFLAGS", "GIT_"))]:
        del os.environ[name]
    raw = published(arguments.published) if arguments.published else None
    code = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        clone(folder / "one", umask=0o077)
        clone(folder / "other", umask=0o022)
        for path in [folder / "other", *(folder / "other").rglob("*")]:
            os.utime(path, (LONG_AGO, LONG_AGO), follow_symlinks=False)
        for target in arguments.targets:
            one, other = (build(folder / name, target, folder / f"{name}.tar") for name in ("one", "other"))
            if one.digest == other.digest:
                print(f"{target:<8} {one.digest} twice", flush=True)
            else:
                code = 1
                print(
                    f"{target:<8} {one.digest} is not {other.digest}:", *differences(one, other), sep="\n  ", flush=True
                )
        if raw:
            digest = digest_for(one.entry["platform"], raw)
            print(f"{arguments.published} {digest}: {'the same' if digest == one.digest else 'ANOTHER IMAGE'}")
            code = code or int(digest != one.digest)
    return code


if __name__ == "__main__":
    sys.exit(main())
