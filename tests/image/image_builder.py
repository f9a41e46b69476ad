"""Builds a target of the Dockerfile without Docker: every instruction, with its own words, in a root folder of its own.

The base image is Debian's installer's; RUN and the finished image run in namespaces with that folder as `/`. It needs
root, Linux and Debian's packages. What only an engine has (layers, their cache, limits) is not imitated.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import psutil
from image_file import Copy, Stage, Step, let_through, substituted
from import_graph import ROOT

CERTIFICATES = Path(os.environ["SSL_CERT_FILE"]) if "SSL_CERT_FILE" in os.environ else None
NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--ipc", "--uts")
_MOUNT = """
set -e
mount --make-rprivate /
mount --bind "$IMAGE" "$IMAGE"
mount -t proc proc "$IMAGE/proc"
mount --rbind /sys "$IMAGE/sys"
mount --rbind /dev "$IMAGE/dev"
mount -t tmpfs -o size=8g,mode=1777 tmpfs "$IMAGE/dev/shm"
for pair in $BOUND; do mkdir -p "$IMAGE${pair#*:}"; mount --bind -o ro "${pair%%:*}" "$IMAGE${pair#*:}"; done
[ -z "$ALONE" ] || { ip link set lo up; mount -o remount,bind,ro "$IMAGE"; }
for folder in $WRITABLE; do mount -t tmpfs -o mode=1777 tmpfs "$IMAGE$folder"; done
exec chroot "$@"
"""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass
class Image:
    """A root folder, and what the instructions said of how it is run."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": _PATH})
    workdir: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)

    def inside(self, command: list[str], env: dict[str, str] | None = None) -> list[str]:
        """The arguments of chroot, as the image's user, that run a command in it."""
        variables = [f"{name}={value}" for name, value in (self.env | (env or {})).items()]
        return [f"--userspec={self.user}", str(self.root), "/usr/bin/env", "--ignore-environment",
                f"--chdir={self.workdir}", *variables, *command]

    def start(
        self, command: list[str], output: IO[bytes], *, env: dict[str, str] | None = None,
        bound: dict[str, str] | None = None, alone: bool = False, writable: tuple[str, ...] = ("/tmp",),
    ) -> subprocess.Popen[bytes]:
        """Start a command in the image. bound: folders of this machine, and where it sees them; alone: with no network
        and a root that cannot be written, but for the folders `writable`."""
        how = {
            "IMAGE": str(self.root), "BOUND": " ".join(f"{here}:{there}" for here, there in (bound or {}).items()),
            "ALONE": "1" if alone else "", "WRITABLE": " ".join(writable) if alone else "",
        }
        return subprocess.Popen(
            [*NAMESPACES, *(["--net"] if alone else []), "bash", "-c", _MOUNT, "-", *self.inside(command, env)],
            env=os.environ | how, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )

    def run(
        self, command: list[str], *, env: dict[str, str] | None = None, bound: dict[str, str] | None = None,
        alone: bool = False,
    ) -> str:
        """Run a command in the image to its end; its output."""
        with tempfile.TemporaryFile() as output:
            returned = self.start(command, output, env=env, bound=bound, alone=alone).wait()
            output.seek(0)
            text = output.read().decode()
        assert returned == 0, f"{shlex.join(command)}: {returned}\n{text[-8000:]}"
        return text


class Running:
    """The image as a container: a command of its own as the first process, and others beside it."""

    def __init__(self, image: Image, command: list[str], log: Path, *, writable: tuple[str, ...] = ("/tmp",)) -> None:
        self._image, self._log = image, log
        with log.open("wb") as output:
            self._process = image.start([*image.entrypoint, *command], output, alone=True, writable=writable)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # and with it, all in its namespaces
        self._process.wait()

    @property
    def log(self) -> str:
        """What the first process has printed."""
        return self._log.read_text(errors="replace")

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run another command in it, as `docker exec` does."""
        first = self._first()
        if first is None:
            return subprocess.CompletedProcess(command, 1, "", "it does not run")
        return subprocess.run(
            ["nsenter", f"--target={first.pid}", "--mount", "--pid", "--net", "--ipc", "--uts",
             "chroot", *self._image.inside(command)],
            capture_output=True, text=True, timeout=120, check=False,
        )

    def wait_for(self, command: list[str], timeout_s: float = 240.0) -> str:
        """Run a command again and again until it succeeds; its output."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and self._process.poll() is None:
            done = self.run(command)
            if done.returncode == 0:
                return done.stdout
            time.sleep(0.5)
        raise AssertionError(f"{shlex.join(command)} does not succeed\n{self.log}")

    def stop(self) -> int:
        """One SIGTERM to the first process; its exit code."""
        first = self._first()
        assert first is not None, self.log
        first.terminate()
        return self._process.wait(timeout=120)

    def _first(self) -> psutil.Process | None:
        children = psutil.Process(self._process.pid).children() if self._process.poll() is None else []
        return children[0] if children else None


class Builder:
    """Builds stages in folders below `folder`, each once."""

    def __init__(self, folder: Path, stages: dict[str, Stage], arguments: dict[str, str]) -> None:
        self._folder, self._stages, self._arguments = folder, stages, arguments
        self._built: dict[str, Image] = {}

    def build(self, name: str) -> Image:
        """The image of a stage, or of Debian where `name` is none."""
        if name not in self._built:
            self._built[name] = self._made(self._stages[name]) if name in self._stages else self._debian(name)
        return self._built[name]

    def _debian(self, tag: str) -> Image:
        image = Image(self._folder / "debian")
        assert tag.startswith("debian:12."), f"{tag} is another system than the one made here"
        command, env = debootstrap(self._folder)
        subprocess.run(
            [*command, "--variant=minbase", "bookworm", str(image.root), "http://deb.debian.org/debian"],
            check=True, env=os.environ | env, stdout=subprocess.DEVNULL,
        )
        (image.root / "etc" / "hosts").write_text("127.0.0.1 localhost\n")  # an engine puts it there
        return image

    def _made(self, stage: Stage) -> Image:
        base = self.build(stage.base)
        image = replace(base, root=self._folder / stage.name, env=dict(base.env))
        subprocess.run(["cp", "--archive", "--reflink=auto", str(base.root), str(image.root)], check=True)
        arguments: dict[str, str] = {}
        for step in stage.steps:
            self._do(step, image, arguments)
        return image

    def _do(self, step: Step, image: Image, arguments: dict[str, str]) -> None:
        match step.name:
            case "ARG":
                name, given, default = step.value.partition("=")
                if given or name in self._arguments:
                    arguments[name] = self._arguments.get(name, default)
            case "ENV":
                variables = arguments | image.env
                image.env |= dict(substituted(word, variables).split("=", 1) for word in step.words)
            case "WORKDIR":
                image.workdir = step.value
                self._place(image, step.value).mkdir(parents=True, exist_ok=True)
            case "USER":
                image.user = step.value
            case "ENTRYPOINT":
                image.entrypoint = step.words
            case "CMD":
                image.command = step.words
            case "HEALTHCHECK":
                image.health = Step("CMD", step.value.partition(" CMD ")[2].strip()).words
            case "RUN":
                image.run(["/bin/sh", "-c", step.value], env=arguments | of_this_network(), bound=self._bound())
            case "COPY":
                self._copy(Copy.of(step), image)
            case _:
                raise NotImplementedError(step.name)

    def _bound(self) -> dict[str, str]:
        wheels = {place: place for place in self._arguments.values() if place and Path(place).is_dir()}
        return wheels | ({str(CERTIFICATES.parent): "/run/certificates"} if CERTIFICATES else {})

    def _copy(self, copy: Copy, image: Image) -> None:
        target = self._place(image, copy.target)
        is_folder = copy.target.endswith(("/", "."))
        for source in copy.sources:
            if copy.stage is not None:
                found = self._place(self.build(copy.stage), source)
                target.mkdir(parents=True, exist_ok=True)
                inside = f"{found}/." if found.is_dir() else str(found)
                # Links save gigabytes: the stage is done, and what is copied over a file takes its place.
                subprocess.run(["cp", "--archive", "--link", "--remove-destination", inside, str(target)], check=True)
                continue
            paths = {path for path in let_through() if source in (".", path) or path.startswith(f"{source}/")}
            assert paths, f"nothing is let through of {source}"
            assert is_folder, "a file of the build is copied into a folder"
            for path in paths:
                to = target / (path if source == "." else Path(path).name if path == source else path[len(source) + 1:])
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / path, to)

    @staticmethod
    def _place(image: Image, path: str) -> Path:
        return image.root / str(Path(image.workdir) / path).lstrip("/")


def of_this_network() -> dict[str, str]:
    """How this machine reaches package indexes, as an engine's settings would tell a build."""
    names = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "PIP_INDEX_URL", "UV_DEFAULT_INDEX")
    seen = f"/run/certificates/{CERTIFICATES.name}" if CERTIFICATES else ""
    certificates = {"PIP_CERT": seen, "SSL_CERT_FILE": seen} if seen else {}
    return {name: os.environ[name] for name in names if name in os.environ} | certificates


def debootstrap(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The command that installs a Debian into a folder, and its environment: Debian's package, unpacked if need be."""
    if shutil.which("debootstrap"):
        return ["debootstrap"], {}
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", "--quiet", "debootstrap"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (package,) = folder.glob("debootstrap_*.deb")
    subprocess.run(["dpkg", "-x", str(package), str(folder / "installer")], check=True)
    installer = folder / "installer" / "usr"
    return ["sh", f"{installer}/sbin/debootstrap"], {"DEBOOTSTRAP_DIR": f"{installer}/share/debootstrap"}


def debootstrap_is_near() -> bool:
    """Whether Debian's installer is installed, or can be had."""
    if shutil.which("apt-cache") is None:
        return shutil.which("debootstrap") is not None
    return subprocess.run(["apt-cache", "show", "debootstrap"], capture_output=True, check=False).returncode == 0
